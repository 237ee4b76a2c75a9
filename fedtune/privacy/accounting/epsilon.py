"""From steps to epsilon: privacy loss distributions, with Renyi DP beside them.

A plan says what is done (`Term`: a Poisson-sampled Gaussian, so many times); this module says what it costs.
For neighbouring data sets with output distributions P and Q,

    delta(epsilon) = max over both orders of (P, Q) of  sup over sets S of  P(S) - e^epsilon Q(S),

and epsilon(delta) is the least epsilon whose delta(epsilon) is at most delta. It comes from the privacy loss
distribution of the composed steps (Koskela et al. 2020; Doroshenko et al. 2022), which
`fedtune.privacy.accounting.pld` composes; tests hold that to dp_accounting's composition.

Guarantee: a result is an upper bound for these steps, never an estimate. Losses are discretized
pessimistically, truncated mass counts as infinite loss, and what the FFT may have rounded away is taken off
delta before epsilon is read. The grid is refined until that changes the result by less than about 0.05
percent; a typical DP-SGD run (rate 0.05, 60 steps) takes a tenth of a second.

    >>> run = {Term(sample_rate=0.05, noise_multiplier=1.0): 60}
    >>> round(epsilon_of_terms(run, delta=1e-5), 2)
    2.86
    >>> epsilon_rdp_of_terms(run, delta=1e-5) > epsilon_of_terms(run, delta=1e-5)
    True

Adjacency is add-or-remove one unit, unless a term says `replace`: such a term comes from a release whose unit
is coarser than the one that is asked about (see `fedtune.privacy.ledger.accounts`).

What it does not do: it knows nothing of how the noise was made, and does not account the rounding of
floating-point arithmetic in training. And its epsilon is that of steps that were fixed in advance; for steps
that are chosen on the way, and for when a budget is spent, see `fedtune.privacy.accounting.filter`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedtune.config.quiet import hushed
from fedtune.errors import PrivacyError
from fedtune.privacy.accounting import pld as losses

__all__ = [
    "Conversions",
    "Term",
    "compose_terms",
    "conversions",
    "deltas_of_terms",
    "epsilon_of_terms",
    "epsilon_on_grid",
    "epsilon_rdp_of_terms",
    "quiet_accountant",
    "renyi_accountant",
]

FloatArray = npt.NDArray[np.float64]

_TOLERANCE = 5e-4  # relative width of the discretization error at which refining stops
_MEANINGLESS = 1e5  # epsilon from about which on a closed form says as much as any composition
_MAX_POINTS = 150_000  # of one step's privacy loss distribution


class Term(NamedTuple):
    """One Poisson-sampled Gaussian step.

    Attributes:
        sample_rate: probability that a unit takes part, in (0, 1]; 1.0: always.
        noise_multiplier: standard deviation of the noise over the L2 sensitivity of one unit.
        replace: the unit is replaced by another, not added or removed.
    """

    sample_rate: float
    noise_multiplier: float
    replace: bool = False


Terms = tuple[tuple[Term, int], ...]


def compose_terms(*parts: Mapping[Term, int] | None) -> dict[Term, int] | None:
    """All of `parts` together; None (no privacy) as soon as one of them is None."""
    total: dict[Term, int] = {}
    for part in parts:
        if part is None:
            return None
        for term, count in part.items():
            total[term] = total.get(term, 0) + count
    return total


def epsilon_of_terms(terms: Mapping[Term, int] | None, delta: float) -> float:
    """Upper bound on epsilon of the composed steps at `delta`; `math.inf` of None: without privacy.

    Cached in memory: it is a pure function.

    Raises:
        PrivacyError: `delta` is not in (0, 1), or a step has no meaning.
    """
    _check_delta(delta)
    if terms is None:
        return math.inf
    return _epsilon(_key(terms), float(delta))


def deltas_of_terms(terms: Mapping[Term, int], epsilons: FloatArray, *, resolution: int = 5000) -> FloatArray:
    """Upper bounds on delta of the composed steps at each epsilon: the whole curve, [k].

    Args:
        terms: the steps with their counts.
        epsilons: 0 or more each, ascending, [k].
        resolution: points of the grid over about one epsilon of the whole; fewer are faster and looser.
    """
    key = _key(terms)
    if not key:
        return np.zeros(len(epsilons))
    scale = max(_scale_guess(key, 1e-5), 1e-3)
    loss = losses.composed(key, scale / resolution)
    slack = losses.rounding(key, loss)
    with np.errstate(over="ignore", invalid="ignore"):  # infinity times 0, above 709 and all losses
        deltas = np.asarray(loss.get_delta_for_epsilon(epsilons), dtype=np.float64)
    # Delta falls as epsilon grows: where it is no number, the last one before is a bound.
    bounds: FloatArray = np.fmin.accumulate(np.concatenate([[1.0], deltas + slack]))[1:]
    return bounds


def epsilon_rdp_of_terms(terms: Mapping[Term, int] | None, delta: float) -> float:
    """As `epsilon_of_terms`, from Renyi DP (Mironov 2017; Mironov et al. 2019): looser, independent code."""
    _check_delta(delta)
    if terms is None:
        return math.inf
    return _epsilon_rdp(_key(terms), float(delta))


@dataclass(frozen=True)
class Conversions:
    """The same guarantee in two other currencies, each with how it is meant. Infinite without noise.

    Attributes:
        rho: zero-concentrated DP (Bun and Steinke 2016). Exact for Gaussian steps without sampling, otherwise
            an upper bound that does not count sampling (zCDP has none).
        rho_is: `exact` or which kind of bound, in words.
        mu: Gaussian DP (Dong, Roth and Su 2022). Exact without sampling, otherwise the central limit
            theorem's value (Bu et al. 2020): an approximation that can be below the truth, no guarantee.
        mu_is: `exact` or what else, in words.
    """

    rho: float
    rho_is: str
    mu: float
    mu_is: str


def conversions(terms: Mapping[Term, int] | None) -> Conversions:
    """zCDP and Gaussian DP parameters of composed steps."""
    if terms is None:
        return Conversions(math.inf, "exact", math.inf, "exact")
    key = _key(terms)
    sampled = any(term.sample_rate < 1.0 for term, _ in key)
    # A replaced unit moves the sum by up to twice the clipping norm.
    rho = sum(count * (4.0 if t.replace else 1.0) / (2.0 * t.noise_multiplier**2) for t, count in key)
    return Conversions(
        rho=rho,
        rho_is="upper bound, sampling not counted" if sampled else "exact",
        mu=math.sqrt(_squared_mu(key)),
        mu_is="central limit approximation, not a bound" if sampled else "exact",
    )


def _check_delta(delta: float) -> None:
    if isinstance(delta, bool) or not isinstance(delta, int | float) or not 0.0 < delta < 1.0:
        raise PrivacyError(f"delta must lie strictly between 0 and 1, not {delta}.")


def _key(terms: Mapping[Term, int]) -> Terms:
    """The steps in one order; different ones without sampling are one Gaussian of the summed squares, exactly
    (Dong, Roth and Su 2022, corollary 3.3)."""
    counted = {Term(*term): int(count) for term, count in terms.items() if count}
    for rate, noise, _ in counted:
        # Of noise whose square is no float nothing can be computed.
        if not (0.0 < rate <= 1.0 and noise > 0.0 and 0.0 < noise * noise < math.inf):
            raise PrivacyError(
                f"A step has sample_rate {rate} and noise_multiplier {noise}; the rate must lie in (0, 1] "
                "and the noise be finite and above 0. Nothing was charged."
            )
    for replace in (False, True):
        plain = [term for term in counted if term.sample_rate == 1.0 and term.replace == replace]
        if len(plain) > 1:
            inverse = sum(counted.pop(term) / term.noise_multiplier**2 for term in plain)
            # A little less noise than that: what the sum rounds must not be in anybody's favour.
            merged = Term(1.0, inverse**-0.5 * (1.0 - 1e-12), replace)
            counted[merged] = 1
    return tuple(sorted(counted.items()))


def _squared_mu(key: Terms) -> float:
    """Square of the Gaussian DP parameter in the central limit; exact where nothing is sampled."""
    total = 0.0
    for term, count in key:
        inverse = (4.0 if term.replace else 1.0) / term.noise_multiplier**2
        if term.sample_rate == 1.0:
            total += count * inverse
        else:
            total += count * term.sample_rate**2 * math.expm1(min(inverse, 500.0))
    return total


def _scale_guess(key: Terms, delta: float) -> float:
    """A rough epsilon, for choosing the grid only: any value gives a valid, if slower or looser, bound."""
    mu = math.sqrt(_squared_mu(key))
    guess = mu * math.sqrt(2.0 * math.log(1.0 / delta)) + mu * mu / 2.0
    return min(guess, _unsampled(key, delta))


def _unsampled(key: Terms, delta: float) -> float:
    """Upper bound on epsilon that counts no sampling (Bun and Steinke 2016, Proposition 1.3)."""
    rho = sum(c * (4.0 if t.replace else 1.0) / (2.0 * t.noise_multiplier**2) for t, c in key)
    return rho + 2.0 * math.sqrt(rho * math.log(1.0 / delta))


def epsilon_on_grid(terms: Mapping[Term, int], delta: float, interval: float) -> float:
    """Upper bound on epsilon with losses rounded up to multiples of `interval`: looser and faster than
    `epsilon_of_terms`, and smooth in the noise, for a search; `math.inf` where the grid says nothing."""
    key = _key(terms)
    if not key:
        return 0.0
    loss = losses.composed(key, interval)
    slack = losses.rounding(key, loss)
    return losses.epsilon_at(loss, delta - slack) if slack < delta / 2.0 else _epsilon_rdp(key, delta)


@lru_cache(maxsize=4096)
def _epsilon(key: Terms, delta: float) -> float:
    if not key:
        return 0.0
    scale = _scale_guess(key, delta)
    if scale > _MEANINGLESS:
        return _unsampled(key, delta) * (1.0 + 1e-9)
    interval = min(max(scale / 300.0, 1e-7), 1.0)
    best, previous = math.inf, math.inf
    # With many different steps every grid costs seconds, and half a percent is not worth them.
    tolerance = _TOLERANCE if len(key) <= 8 else 10.0 * _TOLERANCE
    for _ in range(7):
        loss = losses.composed(key, interval)
        slack = losses.rounding(key, loss)
        # Where rounding could matter as much as delta itself, this accountant has nothing to say.
        if slack >= delta / 2.0:
            break
        current = losses.epsilon_at(loss, delta - slack)
        best = min(best, current)  # every grid gives an upper bound
        # The error falls with the square of the interval: a quarter of it leaves a fifteenth of the change.
        if current == 0.0 or previous - current < 15.0 * tolerance * current:
            break
        if 4 * losses.points_of_one(key, interval) > _MAX_POINTS:
            break
        previous, interval = current, interval / 4.0
    return best if math.isfinite(best) else _epsilon_rdp(key, delta)


@lru_cache(maxsize=4096)
def _epsilon_rdp(key: Terms, delta: float) -> float:
    if not key:
        return 0.0
    with quiet_accountant():
        return float(renyi_accountant(dict(key)).get_epsilon(delta))


def renyi_accountant(terms: Mapping[Term, int]) -> Any:
    """dp_accounting's `RdpAccountant` to which `terms` were composed.

    Renyi DP of the sampled Gaussian is known for add-or-remove; a replaced unit is bounded without
    amplification, by twice the sensitivity.
    """
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant()
    with quiet_accountant():
        for term, count in terms.items():
            event: Any = GaussianDpEvent(term.noise_multiplier / (2.0 if term.replace else 1.0))
            if term.sample_rate < 1.0 and not term.replace:
                event = PoissonSampledDpEvent(term.sample_rate, event)
            accountant.compose(event, count)
    return accountant


def quiet_accountant() -> AbstractContextManager[None]:
    """dp_accounting drops fractional orders whose series does not converge (a looser bound); here it does not
    log each of them."""
    return hushed("absl")
