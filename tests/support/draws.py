"""Noise and samples that are the same in every session, so that no draw makes a test fail on another day.

fedtune draws from the operating system where it promises privacy. In a test such a draw comes from a stream
that its name alone decides, and so does one in a fixture that several tests share. `FEDTUNE_TEST_DRAWS=3`
gives other streams, of which a test must pass with any; `FEDTUNE_TEST_DRAWS=system` those of the system.
Tests of the generator itself are marked `system_entropy`. Processes that a test starts draw as ever.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from fedtune.privacy.mechanisms.noise import Entropy

__all__ = ["repeatable"]

_DRAWS = os.environ.get("FEDTUNE_TEST_DRAWS", "")
_words = Entropy.words


@contextlib.contextmanager
def repeatable(name: str) -> Iterator[None]:
    """Within, what is drawn from the system's entropy in this process follows from `name`."""
    if _DRAWS == "system":
        yield
        return
    stream = np.random.default_rng(zlib.crc32(f"{_DRAWS} {name}".encode()))

    def words(entropy: Entropy, count: int, purpose: str = "noise") -> npt.NDArray[np.uint64]:
        if entropy.is_reproducible:
            return _words(entropy, count, purpose)
        return stream.integers(0, 2**64, size=count, dtype=np.uint64)

    before, Entropy.words = Entropy.words, words  # type: ignore[method-assign]
    try:
        yield
    finally:
        Entropy.words = before  # type: ignore[method-assign]
