"""Models whose weights can be compared: by architecture, in bounded memory, with distances from sketches."""
