"""Memory that is free inside a process goes back to the system, so that what a long run holds does not creep up.

Batches come in many sizes, and what stays of some (rows between layers) lies between what others left. The C library
keeps those gaps: under a steady load the process grew by 40 MB a minute while what it used stayed the same.
"""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from functools import cache

EVERY_SECONDS = 2.0
"""Time between two times: taking the memory again costs some milliseconds."""

_last = 0.0


def give_back_memory() -> bool:
    """Hand free memory back, `EVERY_SECONDS` at most; call it as often as you like, from any thread.

    Returns:
        Whether it was done now. Never where the C library is not glibc.
    """
    global _last
    now = time.monotonic()
    if now - _last < EVERY_SECONDS:
        return False
    _last = now
    trim = _malloc_trim()
    if trim is None:
        return False
    trim(0)
    return True


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """The function of glibc, None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None
