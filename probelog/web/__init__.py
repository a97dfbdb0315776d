"""The page: an index in a browser, and over HTTP for other programs (`probelog web`). Upon the query client alone."""
