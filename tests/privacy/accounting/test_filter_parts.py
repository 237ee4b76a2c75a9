"""The filter's parts in closed form, and its decisions on accountants that are tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction

import pytest

from fedtune.errors import PrivacyError
from fedtune.privacy.accounting.epsilon import Term
from fedtune.privacy.accounting.filter import (
    RunSteps,
    _is_part,
    _renyi,
    admits,
    fits,
    least_epsilon,
    order_of,
    renyi_budget,
    renyi_of_terms,
    spent,
)

BUDGETS = [(0.05, 1e-9), (1.0, 1e-5), (3.0, 0.01), (8.0, 1e-7), (30.0, 0.3)]


def converted(renyi: float, order: int, delta: float) -> float:
    """Epsilon of a Renyi divergence (Canonne, Kamath and Steinke 2020, proposition 12)."""
    return renyi + math.log((order - 1) / order) - (math.log(delta) + math.log(order)) / (order - 1)


@pytest.mark.parametrize(("epsilon", "delta"), BUDGETS)
@pytest.mark.parametrize("order", [2, 3, 11, 400])
def test_the_renyi_budget_is_the_conversion_solved_and_rounded_down(
    epsilon: float, delta: float, order: int
) -> None:
    budget = renyi_budget(epsilon, delta, order)
    parts = [epsilon, math.log(order / (order - 1)), abs(math.log(delta * order)) / (order - 1)]
    left = epsilon - converted(budget, order, delta)
    assert left == pytest.approx(1e-12 * sum(parts), rel=0.1, abs=1e-14) and left >= 0.0


@pytest.mark.parametrize(("epsilon", "delta"), BUDGETS)
def test_the_order_has_the_largest_budget_over_its_square(epsilon: float, delta: float) -> None:
    values = {order: renyi_budget(epsilon, delta, order) / order**2 for order in range(2, 4000)}
    assert order_of(epsilon, delta) == max(values, key=lambda order: values[order])


def test_a_budget_of_next_to_nothing_has_the_largest_order_there_is() -> None:
    assert order_of(1e-9, 1e-9) == 100_000


def exactly(rate: float, sigma: float, order: int) -> float:
    """Mironov, Talwar and Zhang 2019, equation 12, with exact binomials; digits are lost only in exp."""
    q = Fraction(rate)
    terms = [
        float(math.comb(order, k) * q**k * (1 - q) ** (order - k)) * math.expm1((k * k - k) / (2 * sigma**2))
        for k in range(2, order + 1)
    ]
    return math.log1p(math.fsum(terms)) / (order - 1)


@pytest.mark.parametrize("order", [2, 3, 8, 30])
@pytest.mark.parametrize("sigma", [0.9, 4.0, 300.0])
@pytest.mark.parametrize("rate", [1e-6, 0.05, 0.7])
def test_a_sampled_step_is_its_binomial_sum_rounded_up(rate: float, sigma: float, order: int) -> None:
    found, exact = _renyi(Term(rate, sigma), order), exactly(rate, sigma, order)
    assert exact * (1 + 9e-9) <= found <= exact * (1 + 2.2e-8)


def test_unsampled_and_replaced_steps_are_gaussians_rounded_up() -> None:
    for order in (2, 17):
        assert _renyi(Term(1.0, 3.0), order) == pytest.approx(order / 18 * (1 + 1e-8), rel=1e-14)
        for rate in (1.0, 0.1):
            assert _renyi(Term(rate, 3.0, True), order) == pytest.approx(
                order * 4 / 18 * (1 + 1e-8), rel=1e-14
            )


def test_divergences_add_up() -> None:
    terms = {Term(0.1, 2.0): 7, Term(1.0, 5.0): 2, Term(0.5, 1.0): 0}
    expected = 7 * _renyi(Term(0.1, 2.0), 6) + 2 * _renyi(Term(1.0, 5.0), 6)
    assert renyi_of_terms(terms, 6) == pytest.approx(expected, rel=1e-15)
    assert renyi_of_terms({}, 6) == 0.0


def edge(epsilon: float, delta: float) -> float:
    """Noise of one Gaussian that takes up the budget."""
    order = order_of(epsilon, delta)
    return math.sqrt(order * (1 + 1e-8) / (2 * renyi_budget(epsilon, delta, order)))


@pytest.mark.parametrize(("epsilon", "delta"), BUDGETS)
def test_what_takes_up_the_budget_fits_and_a_hair_more_does_not(epsilon: float, delta: float) -> None:
    noise = edge(epsilon, delta)
    assert fits({Term(1.0, noise * (1 + 1e-9)): 1}, epsilon, delta)
    assert not fits({Term(1.0, noise * (1 - 1e-9)): 1}, epsilon, delta)
    assert fits({}, epsilon, delta) and fits(None, epsilon, delta) is False
    least = least_epsilon({Term(1.0, noise): 1}, delta)
    assert epsilon * (1 - 1e-6) <= least <= epsilon * 1.00011


def test_the_least_epsilon_of_nothing_and_of_no_noise() -> None:
    assert least_epsilon(None, 1e-5) == math.inf and least_epsilon({}, 1e-5) == 0.0
    assert least_epsilon({Term(1.0, 2.0): 0}, 1e-5) == 0.0
    assert least_epsilon({Term(1.0, 1e-4): 10}, 1e-5) == math.inf
    # Neither the order of the terms nor their type matters.
    one, two = (Term(1.0, 9.0), 3), ((0.1, 2.0, False), 5)
    assert least_epsilon(dict([one, two]), 1e-5) == least_epsilon(dict([two, one]), 1e-5) > 0.5


@pytest.mark.parametrize(
    ("epsilon", "delta"),
    [(0.0, 0.1), (-1.0, 0.1), (math.inf, 0.1), (math.nan, 0.1), (1.0, 0.0), (1.0, 1.0), (1.0, math.nan)],
)
def test_a_budget_without_meaning_is_refused_by_each(epsilon: float, delta: float) -> None:
    asks: list[Callable[[], object]] = [
        lambda: admits([], epsilon, delta),
        lambda: fits(None, epsilon, delta),
        lambda: order_of(epsilon, delta),
    ]
    for ask in asks:
        with pytest.raises(PrivacyError, match="A budget has a finite epsilon above 0 and a delta between"):
            ask()


# --- decisions ---------------------------------------------------------------------------------------

DELTA = 1e-5
NOISE = edge(1.0, DELTA)
SMALL = {Term(1.0, 4 * NOISE): 8}  # half of what the filter of epsilon 1 holds
WHOLE = {Term(1.0, 4 * NOISE): 16}
LARGE = {Term(1.0, 4 * NOISE): 17}


def says(table: Mapping[int, float]) -> Callable[[Mapping[Term, int] | None, float], float]:
    """An accountant of runs that were fixed in advance: epsilon by the number of steps."""

    def fixed(terms: Mapping[Term, int] | None, delta: float) -> float:
        assert delta == DELTA
        return math.inf if terms is None else table[sum(terms.values())]

    return fixed


def test_the_filter_decides_where_the_first_run_fits_it() -> None:
    fixed = says({8: 99.0, 16: 99.0, 17: 99.0})
    assert admits([], 1.0, DELTA) is True
    # A hair less noise than the edge's, so that sixteen steps fit.
    assert admits([RunSteps(SMALL, SMALL)], 1.0, DELTA, fixed=fixed) is True
    assert admits([RunSteps(SMALL, LARGE)], 1.0, DELTA, fixed=fixed) is True  # what was asked for so far
    assert admits([RunSteps(LARGE, LARGE)], 1.0, DELTA, fixed=fixed) is False
    assert admits([RunSteps(SMALL, SMALL), RunSteps(SMALL, SMALL)], 1.001, DELTA, fixed=fixed) is True
    assert admits([RunSteps(SMALL, SMALL), RunSteps(LARGE, LARGE)], 1.001, DELTA, fixed=fixed) is False
    assert admits([RunSteps(SMALL, SMALL), RunSteps(None, None)], 1.0, DELTA, fixed=fixed) is False
    assert admits([RunSteps(None, None)], 1.0, DELTA, fixed=fixed) is False


def test_one_run_that_only_its_own_distribution_admits_closes_the_account() -> None:
    for cost, admitted in ((1.0, True), (math.nextafter(1.0, 2.0), False)):
        fixed = says({8: 0.4, 16: 0.9, 17: cost})
        assert admits([RunSteps(LARGE, LARGE)], 1.0, DELTA, fixed=fixed) is admitted
        # It ended early: what follows would fit, but the account is closed.
        two = [RunSteps(SMALL, LARGE), RunSteps({Term(1.0, 90 * NOISE): 1}, {Term(1.0, 90 * NOISE): 1})]
        assert admits(two, 1.0, DELTA, fixed=fixed) is not admitted
    # More than its plan, or another step than the plan's, is not what was admitted.
    fixed = says({8: 0.4, 17: 0.9, 18: 0.95, 1: 0.1})
    assert not admits([RunSteps({Term(1.0, 4 * NOISE): 18}, LARGE)], 1.0, DELTA, fixed=fixed)
    assert not admits([RunSteps({Term(1.0, 5 * NOISE): 1}, LARGE)], 1.0, DELTA, fixed=fixed)
    assert admits([RunSteps({}, LARGE)], 1.0, DELTA, fixed=fixed)


def test_a_part_has_no_step_that_the_whole_lacks() -> None:
    a, b = Term(0.1, 1.0), Term(0.2, 1.0)
    assert _is_part({a: 2}, {a: 2, b: 1}) is True and _is_part({}, {a: 1}) is True
    assert _is_part({a: 3}, {a: 2, b: 1}) is False and _is_part({a: 1, b: 1}, {a: 2}) is False
    assert _is_part(None, {a: 1}) is _is_part({a: 1}, None) is _is_part(None, None) is False


def test_one_run_is_shown_by_its_distribution_where_its_plan_fits() -> None:
    fixed = says({8: 0.4, 16: 0.9, 17: 1.0})
    assert spent([], DELTA, fixed=fixed) == spent([RunSteps({}, LARGE)], DELTA, fixed=fixed) == 0.0
    nothing = RunSteps({Term(1.0, 1.0): 0}, LARGE)
    assert spent([nothing], DELTA, 1.0, fixed=fixed) == 0.0
    assert spent([RunSteps(SMALL, LARGE), nothing], DELTA, fixed=fixed) == 0.4
    for budget in (None, 1.0, 2.0):
        assert spent([RunSteps(SMALL, LARGE)], DELTA, budget, fixed=fixed) == 0.4
        assert spent([RunSteps({Term(1.0, 1.0): 0, **SMALL}, LARGE)], DELTA, budget, fixed=fixed) == 0.4
    # A plan that does not fit the budget: as the filter counts it.
    counted = spent([RunSteps(SMALL, LARGE)], DELTA, 0.99, fixed=fixed)
    assert counted == pytest.approx(least_epsilon(SMALL, DELTA)) and counted != 0.4
    for runs in ([RunSteps(None, None)], [RunSteps(SMALL, SMALL), RunSteps(None, SMALL)]):
        assert spent(runs, DELTA, fixed=fixed) == math.inf


def test_several_runs_are_shown_by_the_least_epsilon_of_their_total() -> None:
    fixed = says({8: 0.4, 16: 0.9, 17: 1.0})
    two = [RunSteps(SMALL, SMALL), RunSteps(SMALL, SMALL)]
    assert spent(two, DELTA, fixed=fixed) == least_epsilon(WHOLE, DELTA)
    # Never above a budget that admits them, nor within one that does not.
    least = least_epsilon(WHOLE, DELTA)
    assert spent(two, DELTA, 5.0, fixed=fixed) == least
    for budget in (least * 0.99, least * 0.99999, least, least * 1.00001):
        shown = spent(two, DELTA, budget, fixed=fixed)
        assert (shown <= budget) == fits(WHOLE, budget, DELTA)
        assert shown == pytest.approx(least, rel=2e-4)


def test_a_run_that_closed_the_account_counts_whole_beside_others() -> None:
    fixed = says({8: 0.4, 17: 1.0})
    other = {Term(1.0, 90 * NOISE): 1}
    whole = least_epsilon({**LARGE, **other}, DELTA)
    part = least_epsilon({**SMALL, **other}, DELTA)
    runs = [RunSteps(SMALL, LARGE), RunSteps(other, other)]
    assert spent(runs, DELTA, 1.0, fixed=fixed) == pytest.approx(whole, rel=2e-4)
    assert spent(runs, DELTA, fixed=fixed) == part
    assert spent(runs, DELTA, 0.9, fixed=fixed) == part  # its plan did not fit by either rule
    unnoised = [RunSteps(SMALL, None), RunSteps(other, other)]
    assert spent(unnoised, DELTA, 1.0, fixed=fixed) == part
