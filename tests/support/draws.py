"""Noise and samples that are the same in every session, so that no draw makes a test fail on another day.

fedtune draws from the operating system where it promises privacy. In a test such a draw comes from a stream
that its name alone decides, and so does one in a fixture that several tests share. The generators that a
whole process shares (random's, numpy's, torch's) are set in the same way, whichever tests ran before.
`FEDTUNE_TEST_DRAWS=3` gives other streams, of which a test must pass with any; `FEDTUNE_TEST_DRAWS=system`
those of the system. Tests of the generator itself are marked `system_entropy`. Processes that a test starts
draw as ever.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from fedtune.privacy.mechanisms.noise import Entropy

__all__ = ["repeatable"]

_DRAWS = os.environ.get("FEDTUNE_TEST_DRAWS", "")
_words = Entropy.words
_within: list[int] = []  # the seeds of the blocks that are open, the innermost last


@contextlib.contextmanager
def repeatable(name: str) -> Iterator[None]:
    """Within, what is drawn from the system's entropy in this process follows from `name`."""
    if _DRAWS == "system":
        yield
        return
    seed = zlib.crc32(f"{_DRAWS} {name}".encode())
    stream = np.random.default_rng(seed)

    def words(entropy: Entropy, count: int, purpose: str = "noise") -> npt.NDArray[np.uint64]:
        if entropy.is_reproducible:
            return _words(entropy, count, purpose)
        return stream.integers(0, 2**64, size=count, dtype=np.uint64)

    before, Entropy.words = Entropy.words, words  # type: ignore[method-assign]
    _within.append(seed)
    _set_shared(seed)
    try:
        yield
    finally:
        Entropy.words = before  # type: ignore[method-assign]
        _within.pop()
        if _within:
            _set_shared(_within[-1])


def _set_shared(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)
