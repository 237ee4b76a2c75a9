"""Privacy loss distributions of many steps at once: one Fourier transform for all of them.

dp_accounting composes pair by pair, which takes minutes for the books of a node that took part in a hundred
runs with different settings. Here all steps are multiplied as Fourier transforms of one common length, and
transformed back once.

Everything stays on the safe side. The length is chosen so that the mass outside the window, which wraps
around into it, is at most `TAIL` by a Chernoff bound; the same mass is counted as infinite loss as well.
What the transforms round is bounded by `rounding` and taken off delta by the caller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedtune.privacy.accounting.step_losses import Step, step_distribution

__all__ = ["Step", "composed", "epsilon_at", "points_of_one", "rounding"]

FloatArray = npt.NDArray[np.float64]
ComplexArray = npt.NDArray[np.complex128]

TAIL = 1e-15  # probability that may lie outside the window, on both sides together


def composed(steps: Sequence[tuple[Step, int]], interval: float) -> Any:
    """Privacy loss distribution (dp_accounting's) of all `steps` [(step, how often)], losses rounded up to
    multiples of `interval`."""
    from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution

    parts = [(step_distribution(step, interval), count) for step, count in steps]
    removal = _convolved([(part._pmf_remove, count) for part, count in parts], interval)
    if all(part._symmetric for part, _ in parts):
        return PrivacyLossDistribution(removal)
    addition = _convolved([(part._pmf_add, count) for part, count in parts], interval)
    return PrivacyLossDistribution(removal, addition)


def epsilon_at(loss: Any, delta: float) -> float:
    """The least epsilon (0 or more) at which the divergence of `loss`, in both directions, is `delta`.

    Infinite if it is larger at every epsilon. It is what `loss.get_epsilon_for_delta` finds in a loop over
    all points, found by halving.
    """
    parts = (loss._pmf_remove,) if loss._symmetric else (loss._pmf_remove, loss._pmf_add)
    return max(_epsilon_of_one(part, delta) for part in parts)


def _epsilon_of_one(part: Any, delta: float) -> float:
    if part._infinity_mass > delta:
        return math.inf

    def above(index: int) -> tuple[float, float]:
        """Mass of the losses beyond a point (which may lie before the first), and as much of it as the
        other distribution has times e^(the point's loss): their difference is the divergence there."""
        probs = part._probs[max(index + 1, 0) :]
        gaps = np.arange(len(part._probs) - len(probs) - index, len(part._probs) - index) * interval
        return part._infinity_mass + float(probs.sum()), float(probs @ np.exp(-gaps))

    # Points by their index: losses are (index + first) * interval, and epsilon is looked for from 0 upwards.
    interval, first = part._discretization, part._lower_loss
    low, high = -first, len(part._probs) - 1
    upper, lower = above(low)
    if low > high or upper - lower <= delta:
        return 0.0
    while high - low > 1:
        middle = (low + high) // 2
        upper, lower = above(middle)
        low, high = (middle, high) if upper - lower > delta else (low, middle)
    upper, lower = above(low)
    # Between two points the divergence is `upper` - e^(epsilon - loss) `lower`.
    return float((low + first) * interval + math.log((upper - delta) / lower))


def points_of_one(steps: Sequence[tuple[Step, int]], interval: float) -> int:
    """Grid points of the largest single distribution: what refining the grid costs."""
    return max(int(step_distribution(step, interval)._pmf_remove.size) for step, _ in steps)


def rounding(steps: Sequence[tuple[Step, int]], loss: Any) -> float:
    """What the transforms may have moved, as probability: generous, and far below any useful delta."""
    count = sum(count for _, count in steps)
    return float(2.0**-52 * (count + 10.0 * len(steps)) * math.sqrt(loss._pmf_remove.size))


def _convolved(parts: list[tuple[Any, int]], interval: float) -> Any:
    from dp_accounting.pld.pld_pmf import DensePLDPmf

    dense = [(part.to_dense_pmf(), count) for part, count in parts]
    masses = [(np.asarray(part._probs, dtype=np.float64), count) for part, count in dense]
    low, high = _window(masses)
    length = _fast_length(max(high - low + 1, *(len(probs) for probs, _ in masses)))
    product: Any = 1.0
    for probs, count in masses:
        product = product * _power(np.fft.rfft(probs, length), count)
    circle = np.fft.irfft(product, length)
    probs = np.maximum(np.roll(circle, -low)[: high - low + 1], 0.0)
    finite = sum(count * math.log1p(-part._infinity_mass) for part, count in dense)
    start = sum(part._lower_loss * count for part, count in dense) + low
    return DensePLDPmf(interval, start, probs, TAIL - math.expm1(finite), True)


def _window(masses: list[tuple[FloatArray, int]]) -> tuple[int, int]:
    """First and last index of the sum outside of which lies at most TAIL / 2 each, by Chernoff's bound.

    Every order of the bound is valid and one is the tightest. It is sought for the whole range of orders:
    with a small sampling rate one step has a narrow middle and a far tail, and an order that is right for
    the middle would leave a window of as many points as all steps together could reach.
    """
    last = sum(count * (len(probs) - 1) for probs, count in masses)
    if last == 0:
        return 0, 0
    need = math.log(2.0 / TAIL)
    whole = [_Moments.of(probs, count) for probs, count in masses]
    rough = [_Moments.of(_thinned(probs), count, scale=_thinning(probs)) for probs, count in masses]
    up, down = _order(rough, need, last), -_order(rough, need, last, sign=-1.0)
    high = (sum(part.at(up)[0] for part in whole) + need) / up
    low = (sum(part.at(down)[0] for part in whole) + need) / down
    return max(0, math.floor(low)), min(last, math.ceil(high))


def _power(transform: ComplexArray, count: int) -> ComplexArray:
    """`transform` to the power of `count` by squaring: a twentieth of the time of numpy's, which goes through
    logarithms, and no more rounding."""
    result = np.ones_like(transform)
    while True:
        if count & 1:
            result *= transform
        count >>= 1
        if not count:
            return result
        transform = transform * transform


class _Moments(NamedTuple):
    """One step's distribution, ready for its moment-generating function."""

    points: FloatArray  # index of those that have any probability
    logs: FloatArray  # of their probabilities
    times: int  # that the step is taken

    @classmethod
    def of(cls, probs: FloatArray, count: int, scale: int = 1) -> _Moments:
        index = np.flatnonzero(probs)
        return cls(index.astype(np.float64) * scale, np.log(probs[index]), count)

    def at(self, order: float) -> tuple[float, float]:
        """log E exp(order * point) of all the steps, without overflow, and its derivative."""
        exponents = order * self.points + self.logs
        top = float(exponents.max())
        weights = np.exp(exponents - top)
        total = float(weights.sum())
        return self.times * (top + math.log(total)), self.times * float(weights @ self.points) / total


def _order(parts: list[_Moments], need: float, last: int, *, sign: float = 1.0) -> float:
    """Size of the order (above 0) at which (log moment + need) / order is least: where its derivative,
    which grows with the order, is 0."""
    low, high = math.log(need / last), math.log(need / last) + 1.0

    def falls(log_order: float) -> bool:
        order = math.exp(log_order)
        values = [part.at(sign * order) for part in parts]
        return sign * order * sum(d for _, d in values) - sum(v for v, _ in values) < need

    while falls(high) and high < 7.0:
        low, high = high, high + 1.0
    for _ in range(4):
        middle = (low + high) / 2.0
        low, high = (middle, high) if falls(middle) else (low, middle)
    return math.exp((low + high) / 2.0)


_THIN = 2048  # points of a distribution that suffice to find the order


def _thinning(probs: FloatArray) -> int:
    return -(-len(probs) // _THIN)


def _thinned(probs: FloatArray) -> FloatArray:
    """`probs` with runs of neighbours added up to one point each."""
    return np.add.reduceat(probs, np.arange(0, len(probs), _thinning(probs)))


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
