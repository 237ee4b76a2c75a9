"""Exact discrete Gaussians, from random bits and integers alone.

Floating-point noise has holes that tell the value it was added to (Mironov 2012). Here no step rounds: every
decision compares random bits with integers, so each integer comes out with exactly the probability
of the discrete Gaussian (Canonne, Kamath and Steinke 2020, algorithms 1 to 3), as far as the source of bits
is uniform. What makes that possible in whole arrays is that the standard deviation is a power of two, which
`fedtune.privacy.mechanisms.discrete` can choose because it chooses the grid.

Not hidden: the time that it takes, which depends on what is drawn.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from fedtune.privacy.mechanisms.noise import Entropy

__all__ = ["MAX_LOG2_STD", "discrete_gaussian", "steps_of_one"]

MAX_LOG2_STD = 24  # squares of what is drawn fit into 63 bits

_ROUNDING = 4.0  # r of the argument in `discrete`: what lies between the discrete and the continuous Gaussian

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


def steps_of_one(noise_multiplier: float) -> int:
    """Steps into which one unit is cut, so that noise of 2^24 steps is a Gaussian of `noise_multiplier`.

    A hair below, so that float rounding cannot take the multiplier under the plan's.
    """
    std = 2**MAX_LOG2_STD
    return math.floor(math.sqrt(std**2 - _ROUNDING**2) / noise_multiplier * (1.0 - 1e-12))


def _bits(size: int, width: int, entropy: Entropy) -> npt.NDArray[np.uint32] | npt.NDArray[np.uint64]:
    """`size` uniform integers of `width` bits, 1 <= width <= 64."""
    if width <= 32:  # random bytes are half of the cost of a draw: take no more than are needed
        return entropy.words((size + 1) // 2).view(np.uint32)[:size] >> np.uint32(32 - width)
    return entropy.words(size) >> np.uint64(64 - width)


def _one_in(k: int, size: int, entropy: Entropy) -> BoolArray:
    """bool [size], each True with probability exactly 1/k."""
    part = 2**32 // k
    drawn = _bits(size, 32, entropy).astype(np.uint64)
    redraw = np.flatnonzero(drawn >= np.uint64(part * k))
    while redraw.size:
        drawn[redraw] = _bits(redraw.size, 32, entropy)
        redraw = redraw[drawn[redraw] >= np.uint64(part * k)]
    return np.asarray(drawn < np.uint64(part))


def _exp_minus_one(size: int, entropy: Entropy) -> BoolArray:
    """bool [size], each True with probability exactly exp(-1) (algorithm 1 with gamma = 1)."""
    result = np.zeros(size, dtype=np.bool_)
    alive, k = np.arange(size), 2  # the draw for k = 1 always succeeds
    while alive.size:
        again = _one_in(k, alive.size, entropy)
        if k % 2:
            result[alive[~again]] = True
        alive, k = alive[again], k + 1
    return result


def _exp_minus(numerators: IntArray, log2_denominator: int, entropy: Entropy) -> BoolArray:
    """bool [n], True with probability exactly exp(-numerators / 2^log2_denominator).

    Canonne, Kamath and Steinke 2020, algorithm 1. Needs numerators >= 0 and 1 <= log2_denominator <= 62.
    """
    wholes = numerators >> log2_denominator
    fractions = (numerators & ((1 << log2_denominator) - 1)).astype(np.uint64)
    result = np.zeros(numerators.size, dtype=np.bool_)
    alive = np.arange(numerators.size)
    done = 0
    while True:  # exp(-whole): that many successes in a row
        more = wholes[alive] > done
        if not more.any():
            break
        keep = np.ones(alive.size, dtype=np.bool_)
        keep[more] = _exp_minus_one(int(more.sum()), entropy)
        alive, done = alive[keep], done + 1
    k = 1
    while alive.size:  # exp(-fraction): the first failure of Bernoulli(fraction / k) comes at an odd k
        again = _bits(alive.size, log2_denominator, entropy) < fractions[alive]
        if k > 1:
            hits = np.flatnonzero(again)
            again[hits] = _one_in(k, hits.size, entropy)
        if k % 2:
            result[alive[~again]] = True
        alive, k = alive[again], k + 1
    return result


def _discrete_laplace(size: int, bits: int, entropy: Entropy) -> IntArray:
    """About 0.63 `size` draws with probability proportional to exp(-|k| / 2^bits) (algorithm 2)."""
    low = _bits(size, bits, entropy).astype(np.int64)
    low = low[_exp_minus(low, bits, entropy)]
    high = np.zeros(low.size, dtype=np.int64)
    alive = np.arange(low.size)
    while alive.size:
        alive = alive[_exp_minus_one(alive.size, entropy)]
        high[alive] += 1
    magnitude = low + (high << bits)
    negative = _one_in(2, magnitude.size, entropy)
    once = ~(negative & (magnitude == 0))  # zero has one sign only
    return np.where(negative, -magnitude, magnitude)[once]


def discrete_gaussian(size: int, log2_std: int, entropy: Entropy) -> IntArray:
    """`size` independent discrete Gaussians, int64 [size], with parameter std = 2^log2_std.

    Each integer k has probability proportional to exp(-k^2 / (2 std^2)), exactly: the sampler (Canonne,
    Kamath and Steinke 2020, algorithm 3, with t = std) compares random bits with integers and never rounds,
    for which std is a power of two. The variance is std^2 to within 1e-30 for log2_std >= 2.
    Raises `ValueError` unless 1 <= log2_std <= 24 and size >= 0.
    """
    if not (1 <= log2_std <= MAX_LOG2_STD and size >= 0):
        raise ValueError(
            f"log2_std must lie in 1 ... {MAX_LOG2_STD} and size be 0 or more: {log2_std}, {size}"
        )
    std = 1 << log2_std
    blocks: list[IntArray] = []
    missing = size
    while missing > 0:
        proposed = _discrete_laplace(int(2.15 * missing) + 32, log2_std, entropy)
        excess = np.abs(proposed) - std
        block = proposed[_exp_minus(excess * excess, 2 * log2_std + 1, entropy)][:missing]
        blocks.append(block)
        missing -= block.size
    return np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.int64)
