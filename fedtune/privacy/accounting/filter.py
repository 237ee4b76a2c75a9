"""When a budget is spent: a proven stop for releases that are chosen while their results are seen.

A server picks the noise, the rate and the number of the next steps after it has seen the last ones. The
composed privacy loss distribution (`fedtune.privacy.accounting.epsilon`) holds for steps that were fixed
before the first of them; to compose what was chosen on the way and to stop where epsilon passes the budget
is not proven, and does fail (arXiv 2602.06756; arXiv 2602.15815, where it is called the natural filter). A
server that alternates between steps with (rate 1, noise 6) and (rate 0.1, noise 0.8), each time after a
look at the last output, gets 1.36 times the delta of 0.01 that such a stop promises at epsilon 1
(`tests/privacy/accounting/test_filter.py` computes that).

**The filter.** One Renyi order is fixed by the budget (epsilon, delta) alone, and with it the largest Renyi
divergence that still converts to (epsilon, delta) (Canonne, Kamath and Steinke 2020, Proposition 12). A
release is admitted if the sum of the divergences, at that order, of all that was released and of this
release stays within. Guarantee: however a release is chosen from what was released before it, all releases
together are (epsilon, delta)-DP (fully adaptive composition at one order: Feldman and Zrnic 2021, Theorem
3.1; Lecuyer 2021). Whitehouse et al. 2023 prove the same of zero-concentrated DP, which knows no
amplification by sampling.

Why one order, and not the minimum over orders as in a report: the theorem is for one order. If the order that
admits may change on the way, then which of them holds in the end depends on the outputs, and each of
them bounds only the runs in which it was the last to hold.

**The run that was fixed in advance.** If all that was ever released of some data is one run whose plan was
fixed before its first release, nothing was chosen on the way and its composed privacy loss distribution does
hold, which is tighter. So one such run may be admitted whole (`admits`), and then it closes the account: none
may follow. Proof, by what is known before the first release. Either the filter admits the first run's whole
plan, or the plan's privacy loss distribution does not fit: then only the filter ever decides. Or the
distribution alone admits it: then the first run is all that is ever released, whether it ends early or not,
and a part of what was fixed in advance costs no more than the whole. (The order in which its rounds and its
answers about held-out data alternate may depend on outputs: losses of different steps are independent, so
that their sum is the same in every order.)

What the filter costs. Noise with which a run fits by the filter, over the noise with which it fits when it is
fixed in advance, at delta 1e-5 (`tests/privacy/accounting/test_filter.py` holds these numbers):

    sample rate              0.05  0.1   0.2   0.5   1
    epsilon 1,  10 steps     1.22  1.10  1.10  1.12  1.13
    epsilon 1, 100 steps     1.10  1.11  1.12  1.13  1.13
    epsilon 3,  10 steps     1.19  1.13  1.09  1.09  1.12
    epsilon 3, 100 steps     1.07  1.08  1.10  1.11  1.11
    epsilon 8,  10 steps     1.14  1.11  1.08  1.09  1.14
    epsilon 8, 100 steps     1.06  1.06  1.09  1.12  1.13

The order is the one with the largest budget for divergences that grow with its square. For the plain Gaussian
mechanism, whose divergence grows with the order itself, a larger one is best; but with it steps with a small
rate and little noise would cost up to 1.4 times the noise.

What it does not do: it does not know whether a plan really was fixed; `fedtune.privacy.ledger.ledger` holds
runs to that. An owner who raises a budget because of what was released has chosen on the way too: what was
promised before then holds for the larger budget with delta up to twice as large.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from fedtune.errors import PrivacyError
from fedtune.privacy.accounting.epsilon import Term, compose_terms, epsilon_of_terms

__all__ = [
    "FILTER",
    "RunSteps",
    "admits",
    "closes",
    "fits",
    "least_epsilon",
    "order_of",
    "renyi_budget",
    "renyi_of_terms",
    "spent",
]

FILTER = "Renyi filter at one order (Feldman and Zrnic 2021; Lecuyer 2021)"  # as a statement names it

_LARGEST_ORDER = 100_000  # enough for budgets down to epsilon 0.0005; below, only a run fixed in advance fits
_SLACK = 1e-8  # relative: far above what the sums below round

Terms = Mapping[Term, int]


class RunSteps(NamedTuple):
    """What one run has released of some data, and what its plan, fixed before, allows it to release.

    Attributes:
        charged: the steps that were released; None where one had no noise.
        planned: all that the plan allows, rounds, answers about held-out data and everything else, `charged`
            included; None where one has no noise.
    """

    charged: Terms | None
    planned: Terms | None


def admits(
    runs: Sequence[RunSteps],
    epsilon: float,
    delta: float,
    *,
    fixed: Callable[[Terms | None, float], float] = epsilon_of_terms,
) -> bool:
    """Whether data of which `runs` were released stays within the budget (epsilon, delta).

    Guarantee: if every release was asked for and none was made without a yes, all releases together are
    (epsilon, delta)-DP, however they were chosen (proof: the module's docstring).

    The ledger takes this decision for many keys of the data at once, with sums of divergences
    (`fedtune.privacy.ledger.allowance`); a test holds it to this function.

    Args:
        runs: in the order of their first releases, the one that asks included, with what it asks for in its
            `charged`.
        epsilon: of the budget.
        delta: of the budget.
        fixed: epsilon, at a delta, of steps that were fixed in advance (a cache may stand in).

    Raises:
        PrivacyError: the budget has no meaning.
    """
    _check(epsilon, delta)
    if not runs:
        return True
    if not closes(runs[0].planned, epsilon, delta, fixed=fixed):
        return fits(compose_terms(*(run.charged for run in runs)), epsilon, delta)
    return len(runs) == 1 and _is_part(runs[0].charged, runs[0].planned)


def fits(terms: Terms | None, epsilon: float, delta: float) -> bool:
    """Whether the filter of the budget (epsilon, delta) admits `terms`, all that was ever released."""
    _check(epsilon, delta)
    if terms is None:
        return False
    order = order_of(epsilon, delta)
    return renyi_of_terms(terms, order) <= renyi_budget(epsilon, delta, order)


def spent(
    runs: Sequence[RunSteps],
    delta: float,
    budget: float | None = None,
    *,
    fixed: Callable[[Terms | None, float], float] = epsilon_of_terms,
) -> float:
    """The epsilon to show for what `runs` have released, at `delta`; infinite if anything was not noised.

    One run: by its privacy loss distribution, as it was fixed in advance. Several: the least epsilon whose
    filter admits their total, an upper bound by Renyi DP at one order.

    Args:
        runs: as in `admits`.
        delta: at which epsilon is asked for.
        budget: the epsilon of the owner's budget; then the number is above it exactly where `admits` says no
            (a run whose whole plan does not fit is shown as the filter counts it, and one that closed the
            account as its whole plan).
        fixed: as in `admits`.
    """
    if any(run.charged is None for run in runs):
        return math.inf
    used = [run for run in runs if run.charged and any(run.charged.values())]
    if not used:
        return 0.0
    first, *others = used
    if not others and (budget is None or fixed(first.planned, delta) <= budget):
        return fixed(first.charged, delta)
    closed = budget is not None and closes(first.planned, budget, delta, fixed=fixed)
    counted = first.planned if closed else first.charged
    total = compose_terms(counted, *(run.charged for run in others))
    if total is None:
        return math.inf
    least = least_epsilon(total, delta)
    if budget is None:
        return least
    # Orders are whole numbers, and where they change the least epsilon may lie a hair off the budget's own.
    if fits(total, budget, delta):
        return min(least, budget)
    return max(least, math.nextafter(budget, math.inf))


def closes(
    planned: Terms | None,
    epsilon: float,
    delta: float,
    *,
    fixed: Callable[[Terms | None, float], float] = epsilon_of_terms,
) -> bool:
    """Whether a first run with this plan is admitted whole by its privacy loss distribution, so that no other
    may follow. Known before its first release: it depends on the plan and on the budget alone."""
    return not fits(planned, epsilon, delta) and fixed(planned, delta) <= epsilon


def _is_part(charged: Terms | None, planned: Terms | None) -> bool:
    if charged is None or planned is None:
        return False
    return all(planned.get(term, 0) >= count for term, count in charged.items())


def least_epsilon(terms: Terms | None, delta: float) -> float:
    """The least epsilon, up to a part in 10,000 above it, whose filter admits `terms` at `delta`.

    An upper bound on epsilon by Renyi DP at one order: what several runs together are shown by. Infinite
    without noise.
    """
    if terms is None:
        return math.inf
    counted = {Term(*term): int(count) for term, count in terms.items() if count}
    return _least(tuple(sorted(counted.items())), float(delta)) if counted else 0.0


@lru_cache(maxsize=4096)
def order_of(epsilon: float, delta: float) -> int:
    """The Renyi order (2 or more) at which the budget (epsilon, delta) is kept: a function of it alone."""
    _check(epsilon, delta)
    low, high = 2, _LARGEST_ORDER

    def value(order: int) -> float:
        return renyi_budget(epsilon, delta, order) / order**2

    # It rises up to its maximum and falls from there.
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if value(middle) < value(middle + 1) else (low, middle)
    return low


def renyi_budget(epsilon: float, delta: float, order: int) -> float:
    """The largest Renyi divergence at `order` that is (epsilon, delta)-DP; below 0 if there is none.

    Canonne, Kamath and Steinke 2020, Proposition 12, solved for the divergence, rounded down:

        epsilon + log(order / (order - 1)) + log(delta order) / (order - 1).
    """
    gain = -math.log1p(-1.0 / order)
    loss = math.log(delta * order) / (order - 1.0)
    return epsilon + gain + loss - _SLACK * 1e-4 * (epsilon + gain + abs(loss))


def renyi_of_terms(terms: Terms, order: int) -> float:
    """Upper bound on the Renyi divergence at `order` (whole, 2 or more) of `terms` composed, for either
    of two neighbours as the first one."""
    return math.fsum(count * _renyi(Term(*term), order) for term, count in terms.items() if count)


@lru_cache(maxsize=65536)
def _renyi(term: Term, order: int) -> float:
    """Upper bound on one step's Renyi divergence.

    Gaussian: order / (2 sigma^2) (Mironov 2017, Proposition 7). Poisson-sampled: Mironov, Talwar and Zhang
    2019, section 3.3, which by their Theorem 5 is the larger of the two directions. With their binomial
    sum for whole orders, and since binomial probabilities sum to 1,

        exp((order - 1) D) = 1 + sum over k >= 2 of Binomial(order, q)(k) (exp((k^2 - k) / (2 sigma^2)) - 1),

    where nothing is negative and nothing cancels. A unit that is replaced is bounded without amplification,
    by twice the sensitivity.
    """
    from scipy.special import gammaln

    rate, sigma, replace = term
    if replace or rate == 1.0:
        return order * (4.0 if replace else 1.0) / (2.0 * sigma**2) * (1.0 + _SLACK)
    k = np.arange(2, order + 1, dtype=np.float64)
    choose = gammaln(order + 1.0) - gammaln(k + 1.0) - gammaln(order - k + 1.0)
    gain = (k * k - k) / (2.0 * sigma**2)
    logs = choose + k * math.log(rate) + (order - k) * math.log1p(-rate) + gain + np.log(-np.expm1(-gain))
    top = float(logs.max())
    log_sum = top + math.log(float(np.exp(logs - top).sum())) + _SLACK
    return float(np.logaddexp(0.0, log_sum)) / (order - 1.0) * (1.0 + _SLACK)


@lru_cache(maxsize=4096)
def _least(terms: tuple[tuple[Term, int], ...], delta: float) -> float:
    low, high = 1e-3, 1.0
    total = dict(terms)
    while not fits(total, high, delta):
        low, high = high, 2.0 * high
        if high > 1e6:
            return math.inf
    while high / low > 1.0001:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(total, middle, delta) else (middle, high)
    return high


def _check(epsilon: float, delta: float) -> None:
    if not (0.0 < epsilon < math.inf and 0.0 < delta < 1.0):
        raise PrivacyError(
            f"A budget has a finite epsilon above 0 and a delta between 0 and 1, not {epsilon} and {delta}."
        )
