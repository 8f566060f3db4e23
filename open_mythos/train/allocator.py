"""Freed memory is kept for the next step.

glibc gives large buffers back to the system when they are freed. Steps of training on a CPU, and batches that
are measured, free the same ones thousands of times, and each returns as pages that the system has to map and
clear anew: up to a quarter of a step of training, a seventh of a sweep. Man page: mallopt(3).
"""

import ctypes
import sys

TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # malloc.h
ALL = 2**31 - 1
AT_ONCE = 2**26  # bytes asked of the system when the heap must grow


def keep_freed_memory() -> bool:
    """Tell the C library, for the whole process. Whether it took the advice: only glibc does."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(*choice) for choice in ((TRIM_THRESHOLD, ALL), (TOP_PAD, AT_ONCE), (MMAP_MAX, 0)))
