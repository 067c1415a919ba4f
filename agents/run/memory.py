"""What a training process asks of the C library's memory."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # the numbers of these options in glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let the process keep the memory that it frees, for the next tensors, instead of giving it back each time.

    A step on a CPU frees and takes the same hundreds of megabytes again and again. glibc returns large blocks to the
    system at once, which then has to clear every page anew: a quarter of the time of a small model's step. The process
    so keeps the most that it has ever used.

    Returns:
        Whether the C library can do it; others than glibc are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1)) and bool(mallopt(_MMAP_MAX, 0))
