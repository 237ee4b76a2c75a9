"""The best of a random number of trials: exact divergences, dp_accounting, and wrong bounds that fail."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import dp_accounting as dp
import numpy as np
import pytest
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.rdp import RdpAccountant

from fedtune.errors import PrivacyError
from fedtune.privacy.accounting.epsilon import Term, epsilon_of_terms
from fedtune.privacy.accounting.selection import TrialCount, best_of_curve, epsilon_best_of, renyi_curve

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
def test_distributions_without_meaning_are_refused(mean: float, shape: float) -> None:
    with pytest.raises(PrivacyError, match="number of trials"):
        TrialCount(mean, shape)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5])
def test_delta_without_meaning_is_refused(delta: float) -> None:
    with pytest.raises(PrivacyError, match="delta"):
        epsilon_best_of([TERMS], TrialCount(2.0), delta)
