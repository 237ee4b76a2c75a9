"""Privacy loss distributions of many steps at once: one Fourier transform for all of them.

dp_accounting makes the distribution of one step (connect-the-dots, pessimistic; Doroshenko et al. 2022) and
reads epsilon off a composed one. Between the two it composes pair by pair, which takes minutes for the books
of a node that took part in a hundred runs with different settings. Here all steps are multiplied as
Fourier transforms of one common length, and transformed back once.

Everything stays on the safe side. The length is chosen so that the mass outside the window, which wraps
around into it, is at most `TAIL` by a Chernoff bound; the same mass is counted as infinite loss as well.
What the transforms round is bounded by `rounding` and taken off delta by the caller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Step", "composed", "points_of_one", "rounding"]

Step = tuple[float, float, bool]  # sample rate, noise multiplier, replaced rather than added
FloatArray = npt.NDArray[np.float64]

TAIL = 1e-15  # probability that may lie outside the window, on both sides together


def composed(steps: Sequence[tuple[Step, int]], interval: float) -> Any:
    """Privacy loss distribution (dp_accounting's) of all `steps` [(step, how often)], losses rounded up to
    multiples of `interval`."""
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    parts = [(_one(step, interval), count) for step, count in steps]
    removal = _convolved([(part._pmf_remove, count) for part, count in parts], interval)
    if all(part._symmetric for part, _ in parts):
        return PrivacyLossDistribution(removal)
    addition = _convolved([(part._pmf_add, count) for part, count in parts], interval)
    return PrivacyLossDistribution(removal, addition)


def points_of_one(steps: Sequence[tuple[Step, int]], interval: float) -> int:
    """Grid points of the largest single distribution: what refining the grid costs."""
    return max(_one(step, interval)._pmf_remove.size for step, _ in steps)


def rounding(steps: Sequence[tuple[Step, int]], loss: Any) -> float:
    """What the transforms may have moved, as probability: generous, and far below any useful delta."""
    count = sum(count for _, count in steps)
    return float(2.0**-52 * (count + 10.0 * len(steps)) * math.sqrt(loss._pmf_remove.size))


@lru_cache(maxsize=512)
def _one(step: Step, interval: float) -> Any:
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    sample_rate, noise_multiplier, replaced = step
    relation = NeighboringRelation.REPLACE_ONE if replaced else NeighboringRelation.ADD_OR_REMOVE_ONE
    return privacy_loss_distribution.from_gaussian_mechanism(
        standard_deviation=noise_multiplier,
        sampling_prob=sample_rate,
        value_discretization_interval=interval,
        pessimistic_estimate=True,
        neighboring_relation=relation,
    )


def _convolved(parts: list[tuple[Any, int]], interval: float) -> Any:
    from dp_accounting.pld.pld_pmf import DensePLDPmf

    dense = [(part.to_dense_pmf(), count) for part, count in parts]
    masses = [(np.asarray(part._probs, dtype=np.float64), count) for part, count in dense]
    low, high = _window(masses)
    length = _fast_length(max(high - low + 1, *(len(probs) for probs, _ in masses)))
    product: Any = 1.0
    for probs, count in masses:
        product = product * np.fft.rfft(probs, length) ** count
    circle = np.fft.irfft(product, length)
    probs = np.maximum(np.roll(circle, -low)[: high - low + 1], 0.0)
    finite = sum(count * math.log1p(-part._infinity_mass) for part, count in dense)
    start = sum(part._lower_loss * count for part, count in dense) + low
    return DensePLDPmf(interval, start, probs, TAIL - math.expm1(finite), True)


def _window(masses: list[tuple[FloatArray, int]]) -> tuple[int, int]:
    """First and last index of the sum outside of which lies at most TAIL / 2 each, by Chernoff's bound."""
    last = sum(count * (len(probs) - 1) for probs, count in masses)
    moments = []
    for probs, count in masses:
        index = np.flatnonzero(probs).astype(np.float64)
        some = probs[probs > 0.0]
        mean = float(index @ some) / float(some.sum())
        moments.append((index, np.log(some), count, float((index - mean) ** 2 @ some)))
    spread = math.sqrt(max(sum(count * variance for _, _, count, variance in moments), 1e-2))
    low, high = 0.0, float(last)
    need = math.log(2.0 / TAIL)
    # For a Gaussian the best order is sqrt(2 need) = 8.4 over the spread; tails here are not far from one.
    for order in np.geomspace(0.5, 40.0, 14) / spread:
        up = sum(count * _log_moment(index, logs, order) for index, logs, count, _ in moments)
        down = sum(count * _log_moment(index, logs, -order) for index, logs, count, _ in moments)
        high = min(high, (up + need) / order)
        low = max(low, -(down + need) / order)
    return max(0, math.floor(low)), min(last, math.ceil(high))


def _log_moment(index: FloatArray, logs: FloatArray, order: float) -> float:
    """log sum exp(order * index + logs), without overflow."""
    exponents = order * index + logs
    top = float(exponents.max())
    return top + math.log(float(np.exp(exponents - top).sum()))


def _fast_length(least: int) -> int:
    """The least 2^a 3^b 5^c that is not below `least`: what a Fourier transform does fast."""
    best = 1 << (least - 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            two = three
            while two < least:
                two *= 2
            best = min(best, two)
            three *= 3
        five *= 5
    return best
