"""Where the files of a generation lie below an index."""

from __future__ import annotations

FILES = "files.json"


FILES_VERSION = 1


HOLD = "hold.json"


def folder_of(generation: str) -> str:
    """Where a generation lies below its index."""
    return f"generations/{generation}"
