"""The library that generators are run with: looked for before a job begins, without Ray and without importing it."""

from __future__ import annotations

import importlib.util


def missing_library() -> str | None:
    """What to do where generators cannot be run for want of a library; None where it is there."""
    if importlib.util.find_spec("diffusers") is not None:
        return None
    return 'generators.enabled: diffusers is not installed, which generators are run with: pip install ".[index]"'
