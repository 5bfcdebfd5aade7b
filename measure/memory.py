"""The memory that this process has had; without JAX, so that other frameworks can be measured too."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

STATUS = Path("/proc/self/status")  # Linux
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1  # glibc's mallopt: M_MMAP_THRESHOLD and M_TRIM_THRESHOLD
LARGE = 2**30  # bytes


def reset_peak_memory() -> bool:
    """Makes this process's peak memory what it has now; False where the system cannot (it is Linux that can)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def keep_freed_memory() -> None:
    """Makes the C library keep freed memory below `LARGE` for what is allocated next, where it can (glibc can).

    Every program that JAX runs on a CPU allocates its scratch anew. By default glibc gives large scratch back, and each
    page of it is cleared by the system when it is next touched: half a million of them in a forward of 8,192 tokens.
    """
    set_option = _c_function("mallopt")
    if set_option and set_option(MMAP_THRESHOLD, LARGE):  # alone, the other would stop glibc from raising this one
        set_option(TRIM_THRESHOLD, LARGE)


def give_back_memory() -> None:
    """Gives freed memory back to the system, where the C library can (glibc can).

    Compiling leaves hundreds of megabytes behind that the allocator would keep.
    """
    if trim := _c_function("malloc_trim"):
        trim(0)


def _c_function(name: str) -> Callable[..., int] | None:
    """A function of the C library that the process runs on; None where it has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def read_peak_memory() -> int | None:
    """The most bytes that this process has had in memory, since `reset_peak_memory` if that was called.

    None on a system that does not tell. Linux's getrusage is no answer: it remembers the process that started this one.
    """
    if STATUS.exists():
        lines = STATUS.read_text().splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
