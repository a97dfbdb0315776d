"""Paths of a generation's files below an index."""

from __future__ import annotations

FILES = "files.json"


FILES_VERSION = 1


HOLD = "hold.json"


def folder_of(generation: str) -> str:
    """Path of a generation's folder below its index."""
    return f"generations/{generation}"
