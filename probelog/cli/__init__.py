"""`probelog`: the analyst's command line over a published index."""

from probelog.cli.commands import app, main

__all__ = ["app", "main"]
