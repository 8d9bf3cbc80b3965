"""Keeps the memory that large tensors free on the CPU for the next ones."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

# The parameters' numbers in glibc's malloc.h; its sizes have no sign, so that this is no bound.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_UNBOUNDED = -1
_TUNABLES = "GLIBC_TUNABLES"


def keep_freed_memory() -> bool:
    """Has glibc reuse large blocks in place of returning each to the system.

    By default it maps every tensor above some MiB anew, and the system then clears its pages one
    by one; a training step makes and frees the same tensors again and again. Where the environment
    sets a MALLOC_* variable, its choice stands.

    Returns:
        Whether it was done; false where the C library is another one.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    # One arena, or what one thread frees could not serve the other: backward has its own thread.
    settings = ((_MMAP_THRESHOLD, _UNBOUNDED), (_TRIM_THRESHOLD, _UNBOUNDED), (_ARENA_MAX, 1))
    return all([mallopt(name, value) for name, value in settings])


def with_large_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which a process' glibc asks the system for pages of 2 MiB, not of 4 KiB.

    It matters to models whose tensors come and go by the gigabyte, as the scores of Megatron's GPT
    do. Where GLIBC_TUNABLES is set, its choice stands.
    """
    return {_TUNABLES: "glibc.malloc.hugetlb=1", **environment}
