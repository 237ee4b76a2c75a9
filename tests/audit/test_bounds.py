"""Bounds against printed values, closed forms, randomized response, and mechanisms that need their delta."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import integrate, stats

from fedtune.audit.bounds import (
    epsilon_lower_one_run,
    epsilon_lower_two_sample,
    epsilon_of_gaussians,
    epsilon_one_shot,
    p_value_one_run,
)
from fedtune.privacy.accounting.epsilon import Term, epsilon_of_terms

# --- one run -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "delta", "printed"),
    [((1000, 100, 75), 1e-4, 0.673), ((100_000, 1510, 1439), 1e-5, 2.675)],
)
def test_values_printed_by_steinke_nasr_and_jagielski(
    counts: tuple[int, int, int], delta: float, printed: float
) -> None:
    """Appendix D and section 7 of arXiv 2305.08846 (the second is cut off, not rounded, there)."""
    found = epsilon_lower_one_run(*counts, delta=delta, confidence=0.95)
    assert found == pytest.approx(printed, abs=1e-3)
    # Two ways to get it wrong: delta left out, and guesses where canaries are meant.
    without = epsilon_lower_one_run(*counts, delta=0.0, confidence=0.95)
    fewer = epsilon_lower_one_run(counts[1], *counts[1:], delta=delta, confidence=0.95)
    assert abs(without - printed) > 0.02 and abs(fewer - printed) > 0.02


def test_closed_forms_without_delta() -> None:
    # All right: rate^r = 1 - confidence.
    for guesses in (1, 10, 500):
        rate = 0.05 ** (1.0 / guesses)
        expected = max(0.0, math.log(rate / (1.0 - rate)))
        assert epsilon_lower_one_run(1000, guesses, guesses, delta=0.0) == pytest.approx(expected, abs=1e-6)
    # In general: Clopper and Pearson's lower bound on the rate of right guesses.
    rate = stats.beta.ppf(0.05, 400, 101)
    expected = math.log(rate / (1.0 - rate))
    assert epsilon_lower_one_run(500, 500, 400, delta=0.0) == pytest.approx(expected, abs=1e-6)
    # No better than a coin, or no guess at all: nothing.
    assert epsilon_lower_one_run(1000, 1000, 500, delta=0.0) == 0.0
    assert epsilon_lower_one_run(1000, 0, 0, delta=1e-5) == 0.0


def test_delta_term_is_the_sum_that_the_paper_writes() -> None:
    """Against the definition, term by term."""
    m, r, v, epsilon, delta = 400, 120, 90, 0.6, 1e-4
    rate = 1.0 / (1.0 + math.exp(-epsilon))
    binomial = stats.binom(r, rate)
    slope = max((binomial.cdf(v - 1) - binomial.cdf(v - i - 1)) / i for i in range(1, v + 1))
    expected = binomial.sf(v - 1) + 2.0 * m * delta * slope
    assert p_value_one_run(m, r, v, epsilon, delta) == pytest.approx(expected, rel=1e-9)


def test_p_value_grows_with_epsilon_and_delta() -> None:
    """So that the bisection finds the crossing, and a larger claim is never easier to refute."""
    for r, v in ((50, 48), (400, 300), (400, 390)):
        for delta in (0.0, 1e-6, 1e-4):
            values = [p_value_one_run(1000, r, v, e, delta) for e in np.linspace(0.0, 8.0, 81)]
            assert all(a <= b + 1e-12 for a, b in itertools.pairwise(values))
        assert p_value_one_run(1000, r, v, 1.0, 1e-4) >= p_value_one_run(1000, r, v, 1.0, 0.0)


def randomized_response(rng: np.random.Generator, canaries: int, epsilon: float) -> int:
    """Right guesses where each canary's coin is told truthfully with the rate that epsilon-DP allows."""
    return int(rng.binomial(canaries, 1.0 / (1.0 + math.exp(-epsilon))))


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_randomized_response_is_bounded_and_nearly_reached(epsilon: float) -> None:
    rng = np.random.default_rng(1)
    found = np.array(
        [
            epsilon_lower_one_run(1000, 1000, randomized_response(rng, 1000, epsilon), delta=0.0)
            for _ in range(400)
        ]
    )
    # At 95 percent confidence 20 of 400 may exceed; 40 or more have a probability below 1e-4.
    assert 2 <= (found > epsilon).sum() < 40
    assert np.median(found) > 0.75 * epsilon
    many = epsilon_lower_one_run(200_000, 200_000, randomized_response(rng, 200_000, epsilon), delta=0.0)
    assert 0.97 * epsilon < many <= 1.01 * epsilon


def test_a_bound_without_its_delta_convicts_the_innocent() -> None:
    """Names each canary's coin with probability delta and says nothing else: (0, delta)-DP."""
    rng, canaries, delta = np.random.default_rng(2), 5000, 0.01
    guilty = 0
    for _ in range(60):
        named = int(rng.binomial(canaries, delta))
        assert epsilon_lower_one_run(canaries, named, named, delta=delta) == 0.0
        guilty += epsilon_lower_one_run(canaries, named, named, delta=0.0) > 0.0
    assert guilty == 60


@pytest.mark.parametrize(
    "arguments", [(10, 5, 6, 1.0, 0.0), (10, 11, 5, 1.0, 0.0), (0, 0, 0, 1.0, 0.0), (10, 5, 5, -1.0, 0.0)]
)
def test_counts_that_cannot_be_are_refused(arguments: tuple[int, int, int, float, float]) -> None:
    with pytest.raises(ValueError):
        p_value_one_run(*arguments)
    with pytest.raises(ValueError):
        epsilon_lower_one_run(10, 5, 5, delta=0.0, confidence=1.0)


# --- two samples ---------------------------------------------------------------------------------


def test_two_sample_closed_form_and_both_directions() -> None:
    half = 0.025
    found = stats.beta.ppf(half, 60, 41)
    wrong = 1.0 - stats.beta.ppf(half, 95, 6)
    expected = math.log((found - 1e-3) / wrong)
    assert epsilon_lower_two_sample(60, 100, 5, 100, delta=1e-3) == pytest.approx(expected, rel=1e-9)
    # The mirror image: calling "out" what is out.
    assert epsilon_lower_two_sample(95, 100, 40, 100, delta=1e-3) == pytest.approx(expected, rel=1e-9)
    assert epsilon_lower_two_sample(50, 100, 50, 100, delta=0.0) == 0.0
    assert epsilon_lower_two_sample(0, 0, 0, 100, delta=0.0) == 0.0
    with pytest.raises(ValueError):
        epsilon_lower_two_sample(5, 4, 0, 10, delta=0.0)


def test_two_sample_holds_its_confidence_for_gaussians() -> None:
    """A Gaussian mechanism has epsilon 1 at this delta; one threshold, fixed beforehand, 400 times."""
    rng, delta = np.random.default_rng(3), 1e-5
    noise = 4.0
    truth = epsilon_of_terms({Term(1.0, noise): 1}, delta)
    exceeded, best = 0, 0.0
    for _ in range(400):
        hits = rng.binomial(5000, stats.norm.sf(8.0 - 1.0, scale=noise))
        false = rng.binomial(5000, stats.norm.sf(8.0, scale=noise))
        found = epsilon_lower_two_sample(int(hits), 5000, int(false), 5000, delta=delta)
        exceeded, best = exceeded + (found > truth), max(best, found)
    assert exceeded == 0 and best > 0.3 * truth


# --- Gaussians -----------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.7, 1.0, 5.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_equal_spreads_are_the_gaussian_mechanism(noise: float, delta: float) -> None:
    expected = epsilon_of_terms({Term(1.0, noise): 1}, delta)
    assert epsilon_of_gaussians(0.0, noise, 1.0, noise, delta) == pytest.approx(expected, rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.6, 0.9999, 1.5])
def test_unequal_spreads_against_numerical_integration(spread: float) -> None:
    delta, mean = 1e-4, 0.8
    epsilon = epsilon_of_gaussians(0.0, 1.0, mean, spread, delta)
    p, q = stats.norm(mean, spread), stats.norm(0.0, 1.0)

    def stick(a: object, b: object) -> float:
        def density(x: float) -> float:
            return max(0.0, a.pdf(x) - math.exp(epsilon) * b.pdf(x))  # type: ignore[attr-defined]

        edges = np.linspace(-14.0, 14.0, 113)
        return sum(integrate.quad(density, x, y)[0] for x, y in itertools.pairwise(edges))

    assert max(stick(p, q), stick(q, p)) == pytest.approx(delta, rel=1e-3)


def test_extreme_gaussians() -> None:
    assert epsilon_of_gaussians(0.0, 1.0, 0.0, 1.0, 1e-5) == 0.0
    assert epsilon_of_gaussians(0.0, 1e-6, 1.0, 1e-6, 1e-5) == math.inf
    with pytest.raises(ValueError):
        epsilon_of_gaussians(0.0, 0.0, 1.0, 1.0, 1e-5)


def test_one_shot_estimate_finds_the_gaussian_mechanisms_epsilon() -> None:
    """Sum of random unit vectors plus noise, as in section 3 of Andrew et al. 2024."""
    rng, dimension, delta = np.random.default_rng(4), 20_000, 1e-5
    for noise in (1.0, 2.0):
        vectors = rng.standard_normal((50, dimension))
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        released = vectors.sum(0) + noise * rng.standard_normal(dimension)
        cosines = vectors @ released / np.linalg.norm(released)
        truth = epsilon_of_terms({Term(1.0, noise): 1}, delta)
        assert epsilon_one_shot(cosines, dimension, delta) == pytest.approx(truth, rel=0.35)
        # Half of the noise, or none of it for all that the estimate knows, is another number.
        released = vectors.sum(0) + 0.5 * noise * rng.standard_normal(dimension)
        cosines = vectors @ released / np.linalg.norm(released)
        assert epsilon_one_shot(cosines, dimension, delta) > 1.5 * truth


@pytest.mark.parametrize("cosines", [[0.1], [0.1, math.nan]])
def test_one_shot_refuses_what_allows_no_estimate(cosines: list[float]) -> None:
    with pytest.raises(ValueError):
        epsilon_one_shot(cosines, 100, 1e-5)
