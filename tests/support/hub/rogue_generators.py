"""A generator that runs the Python program in its folder while it is loaded, for operators' ``preload``.

As a fault in a native library would let one do: no repository's code is run otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from probelog.errors import FailureReason, ItemFailure
from probelog.generators import loading

PROGRAM = "program.txt"
_load = loading.load_generator


def load_generator(folder: Path, *rest: Any) -> Any:
    """As the real one, after the program; fails with the text that it leaves in ``found``."""
    if (folder / PROGRAM).is_file():
        names: dict[str, Any] = {"__name__": "program"}
        exec((folder / PROGRAM).read_text(), names)
        if names.get("found") is not None:
            raise ItemFailure(FailureReason.CONFIG_MISMATCH, f"found: {names['found']}")
    return _load(folder, *rest)


loading.load_generator = load_generator
