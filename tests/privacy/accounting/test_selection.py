"""The best of a random number of trials: exact sums, another implementation, and mutants."""

from __future__ import annotations

import itertools
import logging
import math
from collections import Counter
from typing import Any

import dp_accounting as dp
import numpy as np
import pytest
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.rdp import RdpAccountant

from fedtune.errors import PrivacyError
from fedtune.privacy.accounting import selection
from fedtune.privacy.accounting.epsilon import Term, epsilon_of_terms
from fedtune.privacy.accounting.selection import (
    TrialCount,
    _delta,
    _epsilon,
    _truncated_mean,
    best_of_curve,
    epsilon_best_of,
    renyi_curve,
)
from tests.support.golden import Golden

TERMS = {Term(0.05, 1.0): 60}
EVENT = dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(0.05, dp.GaussianDpEvent(1.0)), 60)
SHAPES = [0.0, 0.5, 1.0, 2.0, math.inf]


def renyi(p: np.ndarray, q: np.ndarray, order: float) -> float:
    """Renyi divergence of two distributions on a finite set, by its definition."""
    return math.log(np.sum(p**order * q ** (1.0 - order))) / (order - 1.0)


def best_of(p: np.ndarray, trials: TrialCount) -> np.ndarray:
    """Exact distribution of the best of K draws from `p`, whose outcomes are ordered by score; K = 0 first.

    P[best <= y] = E[P[Y <= y]^K]: the generating function of K at the distribution function of one draw.
    """
    weights = np.array(list(itertools.islice(trials.probabilities(), 4000)))
    below = np.concatenate([[0.0], np.cumsum(p)])
    reached = np.array([np.sum(weights * x ** np.arange(len(weights))) for x in np.minimum(below, 1.0)])
    return np.concatenate([[reached[0]], np.diff(reached)])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mean", [1.0, 3.0, 20.0])
def test_probabilities_sum_to_one_and_have_the_mean(mean: float, shape: float) -> None:
    weights = np.array(list(itertools.islice(TrialCount(mean, shape).probabilities(), 5000)))
    assert weights.min() >= 0.0
    assert math.isclose(weights.sum(), 1.0, rel_tol=1e-6)
    assert math.isclose(np.sum(weights * np.arange(len(weights))), mean, rel_tol=1e-5)


def test_geometric_and_poisson_by_hand() -> None:
    geometric = list(itertools.islice(TrialCount(4.0, 1.0).probabilities(), 4))
    assert np.allclose(geometric, [0.0, 1 / 4, 3 / 16, 9 / 64])
    poisson = list(itertools.islice(TrialCount(2.0, math.inf).probabilities(), 3))
    assert np.allclose(poisson, math.exp(-2.0) * np.array([1.0, 2.0, 2.0]))


def test_draws_follow_the_distribution() -> None:
    trials = TrialCount(3.0, 1.0)
    assert [trials.draw(u) for u in (0.0, 0.33, 0.34, 0.99)] == [1, 1, 2, 12]
    drawn = Counter(trials.draw((i + 0.5) / 3000) for i in range(3000))
    assert drawn[1] == 1000 and drawn[0] == 0
    assert math.isclose(sum(k * n for k, n in drawn.items()) / 3000, 3.0, rel_tol=0.01)
    assert len({TrialCount(50.0, 0.0).draw() for _ in range(40)}) > 5, "drawn, not fixed"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(8))
def test_bound_holds_for_exact_mechanisms(shape: float, seed: int) -> None:
    """The theorem against the definition: neighbouring finite distributions, exact best-of-K."""
    random = np.random.default_rng(seed)
    p = random.dirichlet(np.ones(5))
    q = p * np.exp(random.uniform(-0.5, 0.5, 5))
    q /= q.sum()
    orders = np.array([1.25, 1.5, 2.0, 3.0, 5.0, 9.0, 17.0, 33.0, 65.0])
    curve = np.array([max(renyi(p, q, o), renyi(q, p, o)) for o in orders])
    for mean in (2.0, 8.0):
        trials = TrialCount(mean, shape)
        bound = best_of_curve(orders, curve, trials)
        ours, theirs = best_of(p, trials), best_of(q, trials)
        seen = ours > 0  # K = 0 has probability 0 but for Poisson
        exact = [renyi(ours[seen], theirs[seen], o) for o in orders]
        assert np.all(exact <= bound + 1e-9)


def test_one_runs_curve_is_no_bound_for_the_best_of_many() -> None:
    """The bug that this module is there for, the best of N with the epsilon of one, would be seen above."""
    p, q = np.array([0.99, 0.01]), np.array([0.98, 0.02])
    trials = TrialCount(20.0, 1.0)
    alone = max(renyi(p, q, 2.0), renyi(q, p, 2.0))
    assert renyi(best_of(q, trials)[1:], best_of(p, trials)[1:], 2.0) > 2 * alone


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mean", [2.0, 10.0, 100.0])
def test_agrees_with_dp_accounting(mean: float, shape: float) -> None:
    accountant = RdpAccountant()
    accountant.compose(RepeatAndSelectDpEvent(EVENT, mean, shape))
    ours = epsilon_best_of([TERMS], TrialCount(mean, shape), 1e-5)
    assert math.isclose(ours, accountant.get_epsilon(1e-5), rel_tol=1e-6)


@pytest.mark.parametrize("shape", [0.0, 1.0, math.inf])
def test_more_than_one_run_and_in_time_less_than_all_of_them(shape: float) -> None:
    alone = epsilon_of_terms(TERMS, 1e-5)
    best = epsilon_best_of([TERMS], TrialCount(100.0, shape), 1e-5)
    everything = epsilon_of_terms({term: 100 * count for term, count in TERMS.items()}, 1e-5)
    assert alone < best < everything


def test_the_worst_kind_of_trial_counts() -> None:
    weak, strong = {Term(0.05, 0.8): 60}, {Term(0.05, 2.0): 60}
    trials = TrialCount(5.0)
    both = epsilon_best_of([strong, weak], trials, 1e-5)
    assert both == epsilon_best_of([weak], trials, 1e-5) > epsilon_best_of([strong], trials, 1e-5)


def test_a_kind_without_noise_has_no_bound() -> None:
    assert epsilon_best_of([TERMS, None], TrialCount(5.0), 1e-5) == math.inf
    assert np.all(np.isinf(renyi_curve(None)[1]))


def test_curve_of_plain_gaussian_is_order_over_twice_the_variance() -> None:
    orders, curve = renyi_curve({Term(1.0, 3.0): 7})
    assert np.allclose(curve, 7 * orders / (2 * 9.0))
    assert np.allclose(renyi_curve({Term(0.1, 3.0, replace=True): 7})[1], 4 * curve)


@pytest.mark.parametrize(
    ("mean", "shape"), [(0.5, 1.0), (math.nan, 1.0), (math.inf, 1.0), (2.0, -1.0), (2.0, math.nan)]
)
def test_distributions_without_meaning_are_refused(mean: float, shape: float, golden: Golden) -> None:
    with pytest.raises(PrivacyError) as raised:
        TrialCount(mean, shape)
    golden(raised)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5])
def test_delta_without_meaning_is_refused(delta: float) -> None:
    with pytest.raises(PrivacyError, match="delta"):
        epsilon_best_of([TERMS], TrialCount(2.0), delta)


NEGATIVE_BINOMIAL = [0.0, 0.5, 1.0, 2.0]


def mean_of(gamma: float, shape: float) -> float:
    """Of the truncated negative binomial (Papernot and Steinke 2022, definition 1)."""
    if shape == 0.0:
        return (1 / gamma - 1) / math.log(1 / gamma)
    return shape * (1 - gamma) / (gamma * (1 - gamma**shape))


@pytest.mark.parametrize("shape", NEGATIVE_BINOMIAL)
@pytest.mark.parametrize("mean", [1.5, 3.0, 1e5])
def test_gamma_gives_the_mean_and_is_rounded_down(mean: float, shape: float) -> None:
    gamma = TrialCount(mean, shape).gamma()
    assert mean_of(gamma, shape) == pytest.approx(mean, rel=1e-9)
    assert _truncated_mean(gamma, shape) == pytest.approx(mean_of(gamma, shape), rel=1e-9)
    assert _truncated_mean(gamma, shape) >= mean > _truncated_mean(gamma * (1 + 1e-11), shape)


def test_edges_of_gamma(golden: Golden) -> None:
    assert 1.0 - 2e-12 < TrialCount(1.0).gamma() <= 1.0
    assert _truncated_mean(1.0, 0.0) == _truncated_mean(1.0, 2.0) == 1.0
    with pytest.raises(PrivacyError) as raised:
        TrialCount(2.0, math.inf).gamma()
    golden(raised)
    # It ends, even where no gamma that floats can tell from 0 is small enough.
    assert 0.0 <= TrialCount(1e305).gamma() < 1e-300


def probability(k: int, mean: float, shape: float) -> float:
    if math.isinf(shape):
        return math.exp(-mean) * mean**k / math.factorial(k)
    gamma = TrialCount(mean, shape).gamma()
    if k == 0:
        return 0.0
    if shape == 0.0:
        return (1 - gamma) ** k / (k * math.log(1 / gamma))
    rising = math.prod((i + shape) / (i + 1) for i in range(k))
    return (1 - gamma) ** k * rising / (gamma**-shape - 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_probabilities_are_those_of_the_definition(shape: float) -> None:
    found = list(itertools.islice(TrialCount(3.0, shape).probabilities(), 8))
    assert found == pytest.approx([probability(k, 3.0, shape) for k in range(8)], rel=1e-9)
    if not math.isinf(shape):
        assert list(itertools.islice(TrialCount(1.0, shape).probabilities(), 5)) == [0.0, 1.0, 0.0, 0.0, 0.0]


def test_a_draw_is_the_first_number_whose_sum_is_beyond(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = TrialCount(2.0, math.inf)
    sums = [sum(probability(k, 2.0, math.inf) for k in range(n)) for n in range(1, 6)]
    assert [trials.draw(s - 1e-9) for s in sums] == [0, 1, 2, 3, 4]
    assert [trials.draw(s + 1e-9) for s in sums] == [1, 2, 3, 4, 5]
    monkeypatch.setattr(selection, "_MOST_TRIALS", 5)
    assert TrialCount(1e6).draw(0.5) == 5
    assert selection._MOST_TRIALS == 5


def test_draws_ask_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fixed:
        def random(self) -> float:
            return 0.99

    monkeypatch.setattr(selection.secrets, "SystemRandom", Fixed)
    assert TrialCount(3.0).draw() == 12
    assert TrialCount(3.0).draw(0.0) == 1


def test_distributions_are_called_by_name() -> None:
    names = [TrialCount(2.0, shape).name for shape in (0.0, 1.0, 2.5, math.inf)]
    assert names == ["logarithmic", "geometric", "truncated negative binomial (eta 2.5)", "Poisson"]
    assert TrialCount(2.0).shape == 1.0


def test_the_least_that_is_allowed_and_the_first_that_is_not(golden: Golden) -> None:
    assert TrialCount(1.0, 0.0).mean == 1.0
    for mean, shape in ((0.999, 1.0), (2.0, -0.001), (True, 1.0), (2.0, False)):
        name = "shape" if mean == 2.0 else "mean"
        with pytest.raises(PrivacyError, match=f"The {name} of the number of trials must be [01] or more"):
            TrialCount(mean, shape)
    with pytest.raises(PrivacyError) as raised:
        TrialCount(math.inf, 1.0)
    golden(raised)


def test_the_curve_composes_every_term() -> None:
    terms = {Term(0.1, 2.0): 3, Term(1.0, 4.0): 2, Term(0.1, 5.0, True): 4}
    orders, curve = renyi_curve(terms)
    accountant = dp.rdp.RdpAccountant()
    accountant.compose(dp.PoissonSampledDpEvent(0.1, dp.GaussianDpEvent(2.0)), 3)
    accountant.compose(dp.GaussianDpEvent(4.0), 2)
    accountant.compose(dp.GaussianDpEvent(2.5), 4)
    assert orders.tolist() == list(accountant.orders)
    assert curve == pytest.approx(np.asarray(accountant.rdp), rel=1e-12)
    assert renyi_curve({})[1].tolist() == [0.0] * len(orders)


ORDERS = np.array([5.0, 1.5, 0.5, 1.0, 2.0, 9.0])
CURVE = np.array([0.9, 0.2, 0.05, 0.1, 0.35, 1.2])


@pytest.mark.parametrize("shape", NEGATIVE_BINOMIAL)
@pytest.mark.parametrize("mean", [1.0, 6.0])
def test_the_bound_on_the_best_is_theorem_2(mean: float, shape: float) -> None:
    trials = TrialCount(mean, shape)
    gamma = trials.gamma()
    second = min((1 - 1 / a) * r - math.log(gamma) / a for a, r in zip(ORDERS, CURVE, strict=True))
    raw = {
        a: r + (1 + shape) * second + math.log(mean) / (a - 1)
        for a, r in zip(ORDERS, CURVE, strict=True)
        if a > 1
    }
    # Renyi divergence does not fall in its order: a bound at a higher one holds below.
    expected = [min(value for a, value in raw.items() if a >= order) for order in ORDERS]
    assert best_of_curve(ORDERS, CURVE, trials) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("mean", [1.0, 6.0])
def test_the_bound_on_the_best_is_theorem_6(mean: float) -> None:
    def converted(epsilon: float) -> float:
        """delta at epsilon (Canonne, Kamath and Steinke 2020, proposition 12)."""
        usable = [(a, r) for a, r in zip(ORDERS, CURVE, strict=True) if a > 1.01]
        return min(
            [1.0, *(math.exp((a - 1) * (r - epsilon)) / a * (1 - 1 / a) ** (a - 1) for a, r in usable)]
        )

    raw = {
        a: r + mean * converted(math.log(a / (a - 1))) + math.log(mean) / (a - 1)
        for a, r in zip(ORDERS, CURVE, strict=True)
        if a > 1
    }
    expected = [min(value for a, value in raw.items() if a >= order) for order in ORDERS]
    assert best_of_curve(ORDERS, CURVE, TrialCount(mean, math.inf)) == pytest.approx(expected, rel=1e-12)


def test_conversions_are_the_best_over_the_orders() -> None:
    def epsilon(a: float, r: float, delta: float) -> float:
        return r + math.log(1 - 1 / a) - math.log(delta * a) / (a - 1)

    by_order = [epsilon(a, r, 1e-3) for a, r in zip(ORDERS, CURVE, strict=True) if a > 1.0]
    assert _epsilon(ORDERS, CURVE, 1e-3) == pytest.approx(min(by_order), rel=1e-12)
    found = _epsilon(ORDERS, CURVE, 1e-3)
    assert _delta(ORDERS, CURVE, found) == pytest.approx(1e-3, rel=1e-9)
    assert _delta(ORDERS, np.full(6, 50.0), 0.0) == 1.0
    assert _epsilon(ORDERS, np.zeros(6), 0.9) == 0.0


def test_orders_near_one_and_infinite_curves_say_nothing() -> None:
    near = np.array([1.01, 2.0])
    # At delta near 1 the order of 1.01 would give less than 0, far below what order 2 gives.
    assert _epsilon(near, np.array([0.0, 5.0]), 0.999) == pytest.approx(
        5.0 + math.log(0.5) - math.log(2 * 0.999)
    )
    assert _delta(near, np.array([0.0, 5.0]), 1e-3) == 1.0
    assert _delta(np.array([1.01]), np.array([0.0]), 100.0) == 1.0
    assert _epsilon(np.array([1.01]), np.array([0.0]), 0.5) == math.inf
    infinite = np.array([math.inf, math.inf])
    assert _epsilon(near, infinite, 1e-5) == math.inf and _delta(near, infinite, 3.0) == 1.0
    half = np.array([math.inf, 0.5])
    assert _epsilon(np.array([3.0, 2.0]), half, 1e-3) == pytest.approx(0.5 + math.log(0.5) - math.log(2e-3))


def test_the_worst_kind_counts_at_each_order(golden: Golden) -> None:
    # One is worse at small orders, the other at large ones.
    kinds: list[Any] = [{Term(1.0, 3.0): 1}, {Term(0.01, 0.6): 30}]
    curves = [renyi_curve(kind)[1] for kind in kinds]
    assert (curves[0] > curves[1]).any() and (curves[0] < curves[1]).any()
    orders, trials = renyi_curve(kinds[0])[0], TrialCount(4.0)
    bound = best_of_curve(orders, np.maximum(*curves), trials)
    assert epsilon_best_of(kinds, trials, 1e-5) == pytest.approx(_epsilon(orders, bound, 1e-5), rel=1e-12)
    with pytest.raises(PrivacyError) as raised:
        epsilon_best_of([], trials, 1e-5)
    golden(raised)


def test_the_log_level_of_others_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    logger, levels = logging.getLogger("absl"), []
    real = dp.rdp.RdpAccountant.compose

    def compose(self: Any, *arguments: Any) -> Any:
        levels.append(logger.level)
        return real(self, *arguments)

    monkeypatch.setattr(dp.rdp.RdpAccountant, "compose", compose)
    before = logger.level
    logger.setLevel(logging.DEBUG)
    try:
        renyi_curve({Term(0.1, 2.0): 3})
        assert levels == [logging.ERROR] and logger.level == logging.DEBUG
    finally:
        logger.setLevel(before)
