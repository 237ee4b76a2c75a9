"""Laws of the accountant: composition, filter and calibration, for steps and budgets of hypothesis."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedtune.privacy.accounting.calibration import noise_multiplier_for
from fedtune.privacy.accounting.epsilon import Term, compose_terms, epsilon_of_terms, epsilon_rdp_of_terms
from fedtune.privacy.accounting.filter import RunSteps, admits, closes, fits, renyi_of_terms

DELTA = 1e-5
GRID = 2e-3  # relative: two results of the accountant, each refined until it changes by 0.05 percent

rates = st.sampled_from([0.01, 0.05, 0.2, 1.0])
noises = st.sampled_from([0.8, 1.0, 2.0, 6.0, 20.0])
terms = st.builds(Term, rates, noises, st.booleans())
added = st.builds(Term, rates, noises)
counted = st.dictionaries(terms, st.integers(0, 50), max_size=4)
few = st.dictionaries(added, st.integers(1, 40), min_size=1, max_size=2)
small = st.integers(1, 3)


@given(st.lists(st.one_of(st.none(), counted), max_size=4), st.randoms(use_true_random=False))
def test_composition_knows_no_order_and_no_privacy_wins(parts, random) -> None:  # type: ignore[no-untyped-def]
    shuffled = list(parts)
    random.shuffle(shuffled)
    whole = compose_terms(*parts)
    assert compose_terms(*shuffled) == whole
    assert (whole is None) == (None in parts)
    if whole is not None:
        half = len(parts) // 2
        assert compose_terms(compose_terms(*parts[:half]), compose_terms(*parts[half:])) == whole


@pytest.mark.slow
@settings(max_examples=10)
@given(few, few)
def test_all_costs_more_than_a_part_and_less_than_the_parts_one_by_one(
    first: dict[Term, int], second: dict[Term, int]
) -> None:
    both = compose_terms(first, second)
    assert both == compose_terms(second, first)
    epsilon = epsilon_of_terms(both, DELTA)
    assert epsilon == epsilon_of_terms(dict(reversed((both or {}).items())), DELTA)
    assert epsilon >= max(epsilon_of_terms(part, DELTA) for part in (first, second)) * (1.0 - GRID)
    assert epsilon <= sum(epsilon_of_terms(part, DELTA / 2.0) for part in (first, second)) * (1.0 + GRID)
    assert epsilon <= epsilon_rdp_of_terms(both, DELTA) * (1.0 + GRID)


@pytest.mark.slow
@settings(max_examples=10)
@given(rates, noises, st.integers(1, 60), st.sampled_from([1e-7, 1e-5, 1e-3]))
def test_epsilon_grows_with_rate_steps_and_less_noise_and_falls_with_delta(
    rate: float, noise: float, steps: int, delta: float
) -> None:
    epsilon = epsilon_of_terms({Term(rate, noise): steps}, delta)
    for more in (
        {Term(min(1.0, 1.5 * rate), noise): steps},
        {Term(rate, noise / 1.2): steps},
        {Term(rate, noise): steps + 5},
        {Term(rate, noise, replace=True): steps},
    ):
        assert epsilon_of_terms(more, delta) >= epsilon * (1.0 - GRID)
    assert epsilon_of_terms({Term(rate, noise): steps}, 2.0 * delta) <= epsilon * (1.0 + GRID)


@given(counted, counted, st.integers(2, 40))
def test_renyi_divergences_add_up(first: dict[Term, int], second: dict[Term, int], order: int) -> None:
    both = compose_terms(first, second) or {}
    total = renyi_of_terms(first, order) + renyi_of_terms(second, order)
    assert abs(renyi_of_terms(both, order) - total) <= 1e-9 * total


@given(counted, terms, st.floats(0.1, 20.0), st.sampled_from([1e-7, 1e-5, 1e-3]))
def test_what_does_not_fit_does_not_fit_with_more(
    steps: dict[Term, int], another: Term, epsilon: float, delta: float
) -> None:
    more = compose_terms(steps, {another: 1})
    assert fits(steps, epsilon, delta) or not fits(more, epsilon, delta)
    assert not fits(None, epsilon, delta)


@given(st.lists(st.tuples(added, small, small), min_size=1, max_size=4), st.floats(0.5, 8.0))
def test_the_filter_admits_a_beginning_and_a_part_of_what_it_admits(
    drawn: list[tuple[Term, int, int]], epsilon: float
) -> None:
    """`fixed` says infinity: only the filter decides then, as where results were looked at on the way."""

    def fixed(_: object, __: float) -> float:
        return float("inf")

    runs = [RunSteps({term: made}, {term: made + left}) for term, made, left in drawn]
    admitted = admits(runs, epsilon, DELTA, fixed=fixed)
    assert admits(runs[::-1], epsilon, DELTA, fixed=fixed) == admitted
    if admitted:
        assert admits(runs[:-1], epsilon, DELTA, fixed=fixed)
        less = [RunSteps({term: made - 1}, {term: made + left}) for term, made, left in drawn]
        assert admits(less, epsilon, DELTA, fixed=fixed)


@pytest.mark.slow
@settings(max_examples=10)
@given(added, st.integers(2, 60), st.floats(0.2, 6.0))
def test_a_run_that_closes_its_account_is_admitted_in_every_part_and_lets_no_other_follow(
    term: Term, steps: int, epsilon: float
) -> None:
    plan = {term: steps}
    assume(closes(plan, epsilon, DELTA))
    for made in (0, 1, steps):
        assert admits([RunSteps({term: made}, plan)], epsilon, DELTA)
    assert not admits([RunSteps({term: steps + 1}, plan)], epsilon, DELTA)
    assert not admits([RunSteps({term: 1}, plan), RunSteps({Term(0.01, 20.0): 1}, None)], epsilon, DELTA)


@settings(max_examples=5)
@given(st.sampled_from([0.5, 2.0, 8.0]), st.sampled_from([0.02, 0.1]), st.sampled_from([10, 60]))
def test_calibrated_noise_meets_its_target_is_the_least_and_moves_with_what_is_asked(
    epsilon: float, rate: float, steps: int
) -> None:
    noise = noise_multiplier_for(epsilon, DELTA, sample_rate=rate, steps=steps)
    assert 0.98 * epsilon <= epsilon_of_terms({Term(rate, noise): steps}, DELTA) <= epsilon
    assert epsilon_of_terms({Term(rate, noise / 1.04): steps}, DELTA) > epsilon
    assert noise_multiplier_for(1.5 * epsilon, DELTA, sample_rate=rate, steps=steps) < noise
    assert noise_multiplier_for(epsilon, DELTA, sample_rate=rate, steps=2 * steps) > noise
    assert noise_multiplier_for(epsilon, DELTA, sample_rate=2 * rate, steps=steps) > noise
    assert noise_multiplier_for(epsilon, DELTA / 100, sample_rate=rate, steps=steps) > noise
    also = {Term(1.0, 30.0 / epsilon): 1}
    assert noise_multiplier_for(epsilon, DELTA, sample_rate=rate, steps=steps, also=also) > noise * 0.99
