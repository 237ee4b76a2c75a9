"""How a process that lives long gives memory back to the system."""

from __future__ import annotations

import contextlib
import ctypes

__all__ = ["SERVER_BLOCK", "WORKER_BLOCK", "give_memory_back"]

SERVER_BLOCK = 2**18  # bodies of requests
# Activations of BERT-base are larger, and go back after each layer. Blocks of a quarter are asked for so
# often that it costs time (simulations/LOG.md).
WORKER_BLOCK = 4 * 10**6


def give_memory_back(block: int, *, arenas: int | None = None) -> None:
    """Has the C library give freed blocks of `block` bytes or more back to the system at once.

    glibc keeps them otherwise: after one large block its threshold rises to that block's size, for good, and
    each thread has a heap of its own (`arenas` bounds how many). Does nothing with another C library.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(-3, block)  # M_MMAP_THRESHOLD
        library.mallopt(-1, max(block // 4, 2**17))  # M_TRIM_THRESHOLD
        if arenas is not None:
            library.mallopt(-8, arenas)  # M_ARENA_MAX
