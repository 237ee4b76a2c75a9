"""Epsilon of publishing the best of a random number of trials (Papernot and Steinke 2022).

Whoever trains many times on private data and publishes the best result has published something that all the
trials went into. Composing all of them is always valid and soon large. If the number of trials is itself
drawn at random, and only the best result ever leaves, far less is lost: the bound here grows with the
logarithm of the expected number of trials.

What must hold for the bound ("Hyperparameter Tuning with Renyi Differential Privacy", arXiv 2110.03620):

- the number of trials K is drawn before the first one, from the distribution below, and stays secret;
- each trial draws its settings at random, independently, from one list that does not depend on the data;
- the score by which the best is chosen is part of a trial's output, or computed on public data;
- nothing but the best trial is published: no table of all trials, no count of them, no total cost.

Orders and curves of Renyi DP come from dp_accounting; the theorems are implemented here because trials with
different noise need the largest of several curves, which dp_accounting's own event does not know.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedtune.errors import PrivacyError
from fedtune.privacy.accounting.epsilon import Term, quiet_accountant, renyi_accountant

if TYPE_CHECKING:
    import numpy.typing as npt

    FloatArray = npt.NDArray[np.float64]

__all__ = ["TrialCount", "best_of_curve", "epsilon_best_of", "renyi_curve"]

_MOST_TRIALS = 1_000_000  # where a draw stops: further out lies less probability than floats resolve


@dataclass(frozen=True)
class TrialCount:
    """Distribution of the number of trials: truncated negative binomial, or Poisson.

    Attributes:
        mean: expected number of trials, at least 1.
        shape: eta of the truncated negative binomial, 0 or more (0: logarithmic, 1: geometric), which always
            makes at least one trial; `math.inf`: Poisson, which may make none and then releases nothing.
    """

    mean: float
    shape: float = 1.0

    def __post_init__(self) -> None:
        for name, value, low in (("mean", self.mean, 1.0), ("shape", self.shape, 0.0)):
            if isinstance(value, bool) or math.isnan(value) or value < low:
                raise PrivacyError(
                    f"The {name} of the number of trials must be {low:g} or more, not {value}."
                )
        if math.isinf(self.mean):
            raise PrivacyError("The mean of the number of trials must be finite.")

    @property
    def name(self) -> str:
        """What the distribution is called."""
        if math.isinf(self.shape):
            return "Poisson"
        return {0.0: "logarithmic", 1.0: "geometric"}.get(
            self.shape, f"truncated negative binomial (eta {self.shape:g})"
        )

    def gamma(self) -> float:
        """The parameter gamma in (0, 1] whose truncated negative binomial has this mean; never too large.

        The bound falls in gamma, so that rounding down is the safe side.
        """
        if math.isinf(self.shape):
            raise PrivacyError("A Poisson number of trials has no gamma.")
        low, high = 0.0, 1.0
        while high - low > 1e-12 * high:
            middle = (low + high) / 2.0
            if _truncated_mean(middle, self.shape) < self.mean:
                high = middle
            else:
                low = middle
            if high < 1e-300:
                break
        return low

    def probabilities(self) -> Iterator[float]:
        """P[K = 0], P[K = 1], ..., without end."""
        if math.isinf(self.shape):
            k = 0
            while True:
                yield math.exp(k * math.log(self.mean) - self.mean - math.lgamma(k + 1))
                k += 1
        yield 0.0
        gamma = self.gamma()
        if self.mean == 1.0:
            yield 1.0
            while True:
                yield 0.0
        # P[K = k] is proportional to (1 - gamma)^k times the product of (l + eta) / (l + 1), l < k.
        if self.shape == 0.0:
            term = (1.0 - gamma) / math.log(1.0 / gamma)
        else:
            term = (1.0 - gamma) * self.shape / math.expm1(-self.shape * math.log(gamma))
        k = 1
        while True:
            yield term
            term *= (1.0 - gamma) * (k + self.shape) / (k + 1)
            k += 1

    def draw(self, uniform: float | None = None) -> int:
        """One number of trials, from the operating system's randomness (or from `uniform`, in [0, 1))."""
        target = secrets.SystemRandom().random() if uniform is None else uniform
        total = 0.0
        for k, probability in enumerate(self.probabilities()):
            total += probability
            if target < total or k >= _MOST_TRIALS:
                return k
        raise AssertionError("unreachable")


def renyi_curve(terms: Mapping[Term, int] | None) -> tuple[FloatArray, FloatArray]:
    """(orders, Renyi divergence bound at each) of composed steps; infinite where there is no noise."""
    accountant = renyi_accountant(terms or {})
    orders = np.asarray(accountant.orders, dtype=np.float64)
    if terms is None:
        return orders, np.full_like(orders, np.inf)
    return orders, np.asarray(accountant.rdp, dtype=np.float64)


def best_of_curve(orders: FloatArray, curve: FloatArray, trials: TrialCount) -> FloatArray:
    """Renyi divergence bound, at each order [n], of releasing the best of K trials of `curve` [n] each.

    Truncated negative binomial: Theorem 2 of the paper, with the best second order for each; Poisson:
    Theorem 6.
    """
    bound = np.full_like(orders, np.inf)
    above = orders > 1.0
    spread = math.log(trials.mean) / (orders[above] - 1.0)
    if math.isinf(trials.shape):
        with quiet_accountant():
            deltas = np.array([_delta(orders, curve, math.log1p(1.0 / (o - 1.0))) for o in orders[above]])
        bound[above] = curve[above] + trials.mean * deltas + spread
    else:
        at_one_order = (1.0 - 1.0 / orders) * curve - math.log(trials.gamma()) / orders
        bound[above] = curve[above] + (1.0 + trials.shape) * float(np.min(at_one_order)) + spread
    # Renyi divergence does not fall in its order, so a bound at a higher order holds at the lower ones.
    rising = np.argsort(orders)
    bound[rising] = np.minimum.accumulate(bound[rising][::-1])[::-1]
    return bound


def epsilon_best_of(kinds: Iterable[Mapping[Term, int] | None], trials: TrialCount, delta: float) -> float:
    """Upper bound on epsilon, at `delta`, of publishing the best of K trials and nothing else.

    Args:
        kinds: the steps of each kind of trial that could have been drawn; the worst at each order counts
            (a public random choice between mechanisms is no worse than the worst of them).
        trials: the distribution that K was drawn from.

    Raises:
        PrivacyError: `delta` is not in (0, 1), or there is no kind of trial.
    """
    if not 0.0 < delta < 1.0:
        raise PrivacyError(f"delta must lie strictly between 0 and 1, not {delta}.")
    curves = [renyi_curve(terms) for terms in kinds]
    if not curves:
        raise PrivacyError("There is no trial to choose the best of.")
    orders = curves[0][0]
    worst = np.max(np.stack([curve for _, curve in curves]), axis=0)
    bound = best_of_curve(orders, worst, trials)
    return _epsilon(orders, bound, delta)


def _truncated_mean(gamma: float, shape: float) -> float:
    if gamma >= 1.0:
        return 1.0
    if shape == 0.0:
        return (1.0 / gamma - 1.0) / -math.log(gamma)
    return shape * (1.0 / gamma - 1.0) / -math.expm1(shape * math.log(gamma))


def _epsilon(orders: FloatArray, curve: FloatArray, delta: float) -> float:
    """Conversion by Canonne, Kamath and Steinke 2020 (arXiv 2004.00010, Proposition 12)."""
    usable = (orders > 1.01) & np.isfinite(curve)
    if not usable.any():
        return math.inf
    order, value = orders[usable], curve[usable]
    epsilons = value + np.log1p(-1.0 / order) - np.log(delta * order) / (order - 1.0)
    return max(0.0, float(np.min(epsilons)))


def _delta(orders: FloatArray, curve: FloatArray, epsilon: float) -> float:
    """The same conversion, solved for delta; at most 1."""
    usable = (orders > 1.01) & np.isfinite(curve)
    if not usable.any():
        return 1.0
    order, value = orders[usable], curve[usable]
    logs = (order - 1.0) * (value - epsilon + np.log1p(-1.0 / order)) - np.log(order)
    return min(1.0, float(np.exp(min(0.0, float(np.min(logs))))))
