"""From scores to bounds: right for Gaussian scores, wrong if choices are tested on what chose them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from fedtune.audit.verdict import _Half, curve, limit, one_run, two_sample
from fedtune.privacy.accounting.epsilon import Term, epsilon_of_terms

DELTA = 1e-5
NOISE = 1.1
TERMS = {Term(1.0, NOISE): 1}
TRUTH = epsilon_of_terms(TERMS, DELTA)


def draw(
    rng: np.random.Generator, count: int, noise: float = NOISE
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Scores of the Gaussian mechanism without sampling, whose best attack is the value itself."""
    included = rng.random(count) < 0.5
    return {"value": included + noise * rng.standard_normal(count)}, included


def all_bounds(scores: dict[str, np.ndarray], included: np.ndarray, confidence: float = 0.95) -> list[float]:
    options = {"delta": DELTA, "confidence": confidence}
    return [
        one_run(scores, included, **options).epsilon_lower,
        two_sample(scores, included, **options).epsilon_lower,
        curve(scores, included, TERMS, **options).epsilon_lower,
    ]


@pytest.mark.slow
def test_no_bound_exceeds_the_truth_and_the_curve_comes_near() -> None:
    rng = np.random.default_rng(0)
    found = np.array([all_bounds(*draw(rng, 8000)) for _ in range(20)])
    # Each of the three may exceed with probability 0.05 (they share draws); three or more of 20: 0.075.
    assert ((found > TRUTH).sum(axis=0) <= 2).all()
    assert np.median(found[:, 2]) > 0.65 * TRUTH
    assert (np.median(found[:, :2], axis=0) > 0.25 * TRUTH).all()


def test_less_noise_is_found_to_be_less() -> None:
    rng = np.random.default_rng(1)
    scores, included = draw(rng, 20_000, noise=NOISE / 2.0)
    half = epsilon_of_terms({Term(1.0, NOISE / 2.0): 1}, DELTA)
    one, two, whole = all_bounds(scores, included)
    assert TRUTH < whole < half and whole > 0.8 * half
    assert max(one, two) > 0.75 * TRUTH
    # And scores that tell nothing give nothing.
    assert all_bounds({"value": rng.standard_normal(4000)}, rng.random(4000) < 0.5) == [0.0, 0.0, 0.0]


def test_limit_is_the_gaussian_trade_off_curve() -> None:
    """The most powerful test between N(0, 1) and N(mu, 1) (Dong, Roth and Su 2022)."""
    rates = np.array([1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9])
    expected = stats.norm.sf(stats.norm.isf(rates) - 1.0 / NOISE)
    assert limit(TERMS, rates) == pytest.approx(expected, rel=5e-3)
    assert (limit(TERMS, rates) >= expected - 1e-9).all()  # never below: the claim is the accountant's bound


@pytest.mark.slow
def test_attack_and_threshold_are_chosen_without_looking_at_what_is_tested() -> None:
    """Twenty worthless attacks: the best of them on the same data would convict."""
    rng = np.random.default_rng(2)
    guilty, cheated = 0, 0
    for _ in range(12):
        included = rng.random(300) < 0.5
        scores = {str(i): rng.standard_normal(300) for i in range(20)}
        options = {"delta": 0.0, "confidence": 0.9}
        guilty += one_run(scores, included, **options).epsilon_lower > 0.0
        same = {name: np.repeat(values, 2) for name, values in scores.items()}  # both halves are alike
        cheated += one_run(same, np.repeat(included, 2), **options).epsilon_lower > 0.0
    assert guilty <= 4  # a tenth of 12 is expected; five or more have probability 0.004
    assert cheated == 12


def test_halves_have_the_right_counts() -> None:
    included = np.array([True, False, True, True, False, False])
    half = _Half({"a": np.arange(6.0)}, included)
    assert half._counts("a", 2.0, ~half._first) == (1, 1, 1, 2)
    assert half._counts("a", -1.0, half._first) == (2, 2, 1, 1)


def test_few_canaries_give_zero_and_no_error() -> None:
    rng = np.random.default_rng(3)
    assert all_bounds(*draw(rng, 20)) == pytest.approx([0.0] * 3, abs=1.0)
