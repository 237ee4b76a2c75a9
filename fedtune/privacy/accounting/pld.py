"""Privacy loss distributions (PLD): of one Poisson-sampled Gaussian step, and of many steps composed.

**One step.** Connect-the-dots, pessimistic (Doroshenko et al. 2022): losses on a grid, with probabilities
whose divergence at every grid point is the step's own and between two points lies above it. Algorithm and
ranges are dp_accounting's, which inverts the loss and stores the points one by one in Python: that was nine
tenths of the time that accounting took. Here the same formulas are taken for all points at once, and a test
holds them to the library's. A step whose unit is replaced (rare) comes from the library itself.

**Many steps.** dp_accounting composes pair by pair, which takes minutes for a node that took part in a
hundred runs with different settings. Here all steps are multiplied as Fourier transforms of one common
length, and transformed back once.

Everything stays on the safe side. The length is chosen so that the mass outside the window, which wraps
around into it, is at most `TAIL` by a Chernoff bound; the same mass is counted as infinite loss as well.
What the transforms round is bounded by `rounding`, and the caller takes it off delta.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Step", "composed", "epsilon_at", "points_of_one", "rounding", "step_distribution", "width"]

Step = tuple[float, float, bool]  # sample rate, noise multiplier, replaced rather than added
FloatArray = npt.NDArray[np.float64]
ComplexArray = npt.NDArray[np.complex128]

TAIL = 1e-15  # probability that may lie outside the window, on both sides together
_THIN = 2048  # points of a distribution that suffice to find the order of the Chernoff bound


# --- many steps -------------------------------------------------------------------------------------


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
    from scipy.fft import next_fast_len

    dense = [(part.to_dense_pmf(), count) for part, count in parts]
    masses = [(np.asarray(part._probs, dtype=np.float64), count) for part, count in dense]
    low, high = _window(masses)
    length = next_fast_len(max(high - low + 1, *(len(probs) for probs, _ in masses)), real=True)
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


def _thinning(probs: FloatArray) -> int:
    return -(-len(probs) // _THIN)


def _thinned(probs: FloatArray) -> FloatArray:
    """`probs` with runs of neighbours added up to one point each."""
    return np.add.reduceat(probs, np.arange(0, len(probs), _thinning(probs)))


# --- one step ---------------------------------------------------------------------------------------


@lru_cache(maxsize=512)
def step_distribution(step: Step, interval: float) -> Any:
    """Loss distribution (dp_accounting's class) of one step, losses rounded up to multiples of `interval`."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution

    sample_rate, noise_multiplier, replaced = step
    if replaced:
        return privacy_loss_distribution.from_gaussian_mechanism(
            standard_deviation=noise_multiplier,
            sampling_prob=sample_rate,
            value_discretization_interval=interval,
            pessimistic_estimate=True,
            neighboring_relation=NeighboringRelation.REPLACE_ONE,
        )
    parts = []
    for removed in (True, False) if sample_rate < 1.0 else (True,):
        first, last = (round_(x / interval) for round_, x in _range_of_losses(step, removed))
        grid = np.arange(first, last + 1, dtype=np.float64) * interval
        parts.append(_connected(first, interval, _divergences(grid, step, removed)))
    return privacy_loss_distribution.PrivacyLossDistribution(*parts)


def width(step: Step) -> float:
    """From the least to the greatest loss of one step that is not replaced."""
    sides = [_range_of_losses(step, removed) for removed in ((True, False) if step[0] < 1.0 else (True,))]
    return max(side[1][1] - side[0][1] for side in sides)


def _range_of_losses(step: Step, removed: bool) -> list[tuple[Callable[[float], int], float]]:
    """Least and greatest loss but for outputs of probability e^-50 on each side (as dp_accounting has it)."""
    from scipy.special import ndtri

    rate, sigma, _ = step
    edge = -sigma * float(ndtri(0.5 * math.exp(-50.0)))
    # With the unit's gradient at -1 (or 1), an output x is exp((-1/2 - x) / sigma^2) times as likely.
    low, high = (-0.5 - edge, 0.5 + edge) if removed else (0.5 - edge - 1.0, edge + 0.5)
    losses = [float(np.logaddexp(_log1m(rate), math.log(rate) + x / sigma**2)) for x in (low, high)]
    least, greatest = losses if removed else (-losses[1], -losses[0])
    return [(math.floor, least), (math.ceil, greatest)]


def _divergences(epsilons: FloatArray, step: Step, removed: bool) -> FloatArray:
    """Hockey-stick divergences of one sampled Gaussian step at `epsilons` [k], for a unit removed or added.

    As dp_accounting's `GaussianPrivacyLoss.get_delta_for_epsilon`: P(x) - e^epsilon Q(x) of all outputs below
    the x at which the two densities balance.
    """
    from scipy.special import log_ndtr, ndtr

    rate, sigma, _ = step
    if removed:  # P = (1 - q) N(0) + q N(-1), Q = N(0)
        cut = -0.5 - sigma**2 * _unsampled(epsilons, rate)
        upper = (1.0 - rate) * ndtr(cut / sigma) + rate * ndtr((cut + 1.0) / sigma)
        lower = log_ndtr(cut / sigma)
    else:  # P = N(0), Q = (1 - q) N(0) + q N(1)
        cut = 0.5 + sigma**2 * _unsampled(-epsilons, rate)
        upper = ndtr(cut / sigma)
        lower = np.logaddexp(
            _log1m(rate) + log_ndtr(cut / sigma), math.log(rate) + log_ndtr((cut - 1.0) / sigma)
        )
    # Where no output balances, the cut is infinite: Q covers P everywhere (0) or nowhere (1 - e^epsilon).
    return np.asarray(np.clip(upper - np.exp(epsilons + lower), 0.0, 1.0), dtype=np.float64)


def _connected(first: int, interval: float, divergences: FloatArray) -> Any:
    """The distribution on `interval` times first, first + 1, ... that has these `divergences` [k] there.

    Doroshenko et al. 2022, Algorithm 1, as dp_accounting's `create_pmf_pessimistic_connect_dots_fixed_gap`.
    """
    from dp_accounting.pld.pld_pmf import DensePLDPmf

    divergences = np.minimum.accumulate(divergences)  # against what was rounded
    rises, scale = np.diff(divergences), math.expm1(interval)
    probs = np.empty_like(divergences)
    probs[0] = 1.0 - divergences[0] + rises[0] / scale
    probs[1:-1] = (rises[1:] - rises[:-1] * math.exp(interval)) / scale
    probs[-1] = rises[-1] / math.expm1(-interval)
    return DensePLDPmf(interval, first, np.maximum(probs, 0.0), float(divergences[-1]), True)


def _unsampled(losses: FloatArray, rate: float) -> FloatArray:
    """log(1 + (e^loss - 1) / rate): the loss of the same output without sampling; -inf if there is none."""
    above = np.maximum(losses, 0.0)
    with np.errstate(divide="ignore"):
        large = above - math.log(rate) + np.log(rate * np.exp(-above) - np.expm1(-above))
        small = np.log1p(np.maximum(np.expm1(np.minimum(losses, 0.0)) / rate, -1.0))
    return np.where(losses > 0.0, large, small)


def _log1m(rate: float) -> float:
    return math.log1p(-rate) if rate < 1.0 else -math.inf
