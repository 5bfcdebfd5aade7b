"""The memory that this process has had; without JAX, so that other frameworks can be measured too."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")  # Linux


def reset_peak_memory() -> bool:
    """Makes this process's peak memory what it has now; False where the system cannot (it is Linux that can)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def give_back_memory() -> None:
    """Gives freed memory back to the system; where its C library cannot, nothing happens (it is glibc that can).

    Compiling leaves hundreds of megabytes behind that the allocator would keep.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim:
        trim(0)


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
