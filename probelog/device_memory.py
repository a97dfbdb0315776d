"""Telling that memory ran out, which libraries report in several ways."""

from __future__ import annotations

_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory, of the host or of a device, ran out (then a smaller batch may do)."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)
