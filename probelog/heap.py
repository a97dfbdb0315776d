"""The C library's heap, told to keep what a forward pass frees for the next one.

By default glibc takes large pieces of memory from the kernel one by one and gives each back when it is freed: every
activation of every batch is new memory then, and its pages are cleared one after the other (mallopt(3)). That takes
up to a fifth of the time of convolutional networks at 224 pixels. Elsewhere than on glibc nothing happens.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # <malloc.h>
# Larger pieces are still the kernel's: they would be hard to place in what others left.
_LARGEST_KEPT = 1 << 28
_SMALL = 1 << 20
#: So much of what is freed is kept, in bytes; more where it does not lie together.
KEPT = 1 << 29


def keep_freed() -> bool:
    """Keep ``KEPT`` bytes of freed memory in this process; returns whether the C library knows how."""
    library = _library()
    if library is None:
        return False
    return bool(library.mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT) and library.mallopt(_TRIM_THRESHOLD, KEPT))


def keep_nothing() -> None:
    """Give memory back now, and from now on where it is freed: until ``keep_freed``.

    For a process at its limit: what is kept counts, and code that oneDNN makes cannot be put into it.
    """
    library = _library()
    if library is not None:
        library.mallopt(_MMAP_THRESHOLD, _SMALL)
        library.malloc_trim(0)


def give_back() -> None:
    """Give what is freed and whole pages long to the kernel, where it was kept."""
    library = _library()
    if library is not None:
        library.malloc_trim(0)


@functools.cache
def _library() -> Any:
    """glibc, or None."""
    library = ctypes.CDLL(None)
    known = all(hasattr(library, name) for name in ("gnu_get_libc_version", "mallopt", "malloc_trim"))
    return library if known else None
