"""How the process gives memory back that it no longer needs."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3  # malloc.h of the GNU C library
_LARGE_LEN = 1024 * 1024


def return_large_blocks() -> bool:
    """Have the bodies of large requests go back to the system as soon as they are freed.

    The GNU C library learns from the first of them that such blocks are common, and takes
    the next ones from a heap that shrinks only at its end (mallopt(3), M_MMAP_THRESHOLD):
    the process would stay as large as its largest moment.

    Returns:
        Whether this C library has such a setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGE_LEN))
