"""Privacy loss distribution of one Poisson-sampled Gaussian step.

Connect-the-dots, pessimistic (Doroshenko et al. 2022): losses on a grid, with probabilities whose divergence
at every point of the grid is the step's own and between two points lies above it. Algorithm and ranges are
dp_accounting's; its way there inverts the loss and stores the points one by one in Python, which was nine
tenths of the time that accounting took. Here the same formulas are taken for all points at once, and a test
holds them to the library's. A step whose unit is replaced (rare) comes from the library itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Step", "step_distribution", "width"]

Step = tuple[float, float, bool]  # sample rate, noise multiplier, replaced rather than added
FloatArray = npt.NDArray[np.float64]


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
