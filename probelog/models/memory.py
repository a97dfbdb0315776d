"""Memory of the host and of devices: telling that it ran out, and measuring how much a stretch of work takes."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from probelog.models import memory

_SIGNS = (
    "out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory", "alloc_failed",
    "bad_alloc",
    # oneDNN's words for it (and, rarely, for other failures: those then fail with the smallest batch too).
    "could not create a primitive", "could not execute a primitive",
)  # fmt: skip
_PROCESS = Path("/proc/self")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory, of the host or of a device, ran out (then a smaller batch may do)."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)


class PeakMemory:
    """How much memory the work since `__init__` took at its peak, on one device.

    On a GPU it is what torch's allocator handed out. On the CPU it is the resident size of the whole process, whose
    high-water mark Linux can reset (``/proc/self/clear_refs``, proc(5)): other threads' work is in it too.
    """

    def __init__(self, device: str) -> None:
        import torch

        self._device = torch.device(device)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            memory.give_back()  # what the work before it freed would be hidden in it
            _reset_high_water()
            self._before = _resident("VmRSS")

    def grown(self) -> int:
        """Bytes by which the peak exceeded what was in use at the start; 0 where it cannot be told."""
        import torch

        if self._device.type == "cuda":
            return max(0, torch.cuda.max_memory_allocated(self._device) - self._before)
        return max(0, _resident("VmHWM") - self._before)


def free_memory(device: str, memory_bytes: int | None) -> int | None:
    """Bytes that this process may still take on a device; None where nothing bounds them.

    ``memory_bytes`` is the process's share of the device. Without it a GPU's bound is what is free on it, and the
    CPU has none.
    """
    import torch

    requested = torch.device(device)
    if requested.type == "cuda":
        taken = torch.cuda.memory_allocated(requested)
        if memory_bytes is not None:
            return max(0, memory_bytes - taken)
        kept = torch.cuda.memory_reserved(requested) - taken  # by torch's allocator, for its own use
        return int(torch.cuda.mem_get_info(requested)[0]) + kept
    if memory_bytes is None:
        return None
    memory.give_back()
    return max(0, memory_bytes - _resident("VmRSS"))


def _reset_high_water() -> None:
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed: the mark then is that of the process's whole life
        return


def _resident(name: str) -> int:
    """A line of ``/proc/self/status`` in bytes; 0 where there is none."""
    try:
        lines = (_PROCESS / "status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)


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
def _library() -> ctypes.CDLL | None:
    """glibc, or None."""
    library = ctypes.CDLL(None)
    known = all(hasattr(library, name) for name in ("gnu_get_libc_version", "mallopt", "malloc_trim"))
    return library if known else None
