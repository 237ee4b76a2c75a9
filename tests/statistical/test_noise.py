"""The noise is what the plan says: the right distribution is accepted and wrong ones are rejected.

Every acceptance has a false-alarm probability below 1e-6, so that these tests do not cry wolf on fresh
entropy in every run; every mutant is so far away that it is caught with the same certainty.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from fedtune.privacy.mechanisms.discrete import DiscreteMechanism
from fedtune.privacy.mechanisms.noise import Entropy, FloatArray
from tests.support.plans import local_plan

pytestmark = pytest.mark.system_entropy
SIZE = 200_000
SOURCES = [Entropy.system(), Entropy.reproducible(5, "n", 0, 0)]


def scale_is(values: FloatArray, std: float) -> bool:
    """Whether the sample variance fits N(0, std^2) at a false-alarm rate of 1e-7."""
    low, high = stats.chi2.ppf([5e-8, 1 - 5e-8], len(values))
    return bool(low <= np.sum((values / std) ** 2) <= high)


def is_standard_gaussian(values: FloatArray) -> bool:
    return bool(stats.kstest(values, "norm").pvalue > 1e-7)


@pytest.mark.parametrize("entropy", SOURCES)
def test_noise_is_gaussian_of_the_declared_scale(entropy: Entropy) -> None:
    plan = local_plan(noise_multiplier=1.7, max_grad_norm=0.3)
    noise = plan.noise(SIZE, entropy)
    std = 1.7 * 0.3
    assert scale_is(noise, std)
    assert not scale_is(noise, std * 2 / 3)
    assert not scale_is(noise, std * 3 / 2)
    assert is_standard_gaussian(noise / std)
    assert abs(noise.mean()) < 6 * std / math.sqrt(SIZE)
    assert abs(stats.kurtosis(noise)) < 6 * math.sqrt(24 / SIZE)


@pytest.mark.parametrize("wrong", [2 / 3, 3 / 2])
def test_a_plan_with_the_wrong_noise_scale_is_rejected(wrong: float) -> None:
    noise = local_plan(noise_multiplier=1.7 * wrong).noise(SIZE, Entropy.system())
    assert not scale_is(noise, 1.7)


@pytest.mark.parametrize(
    "draw",
    [
        lambda rng: rng.laplace(scale=1 / math.sqrt(2), size=SIZE),
        lambda rng: rng.uniform(-math.sqrt(3), math.sqrt(3), SIZE),
        lambda rng: rng.standard_t(5, SIZE) * math.sqrt(3 / 5),
        lambda rng: np.clip(rng.standard_normal(SIZE), -2.0, 2.0),
    ],
    ids=["laplace", "uniform", "student", "clipped"],
)
def test_other_distributions_of_the_same_spread_are_rejected(
    draw: Callable[[np.random.Generator], FloatArray],
) -> None:
    assert not is_standard_gaussian(draw(np.random.default_rng(0)))


@pytest.mark.parametrize("entropy", SOURCES)
def test_tails_are_not_cut(entropy: Entropy) -> None:
    values = np.abs(entropy.gaussian(1_000_000, 1.0))
    for at in (3.0, 4.0):
        expected = 1_000_000 * math.erfc(at / math.sqrt(2))
        assert abs(int((values > at).sum()) - expected) < 6 * math.sqrt(expected)


@pytest.mark.parametrize("entropy", SOURCES)
def test_noise_is_independent_along_the_vector(entropy: Entropy) -> None:
    noise = entropy.gaussian(SIZE, 1.0)
    block = 1 << 14  # what is drawn at once
    half = block // 2
    for lag in (1, 2, half, block):
        assert abs(np.corrcoef(noise[:-lag], noise[lag:])[0, 1]) < 6 / math.sqrt(SIZE)
        # Box-Muller pairs share their radius: their squares would agree if they lay in one vector unmixed.
        squares = np.corrcoef(noise[:-lag] ** 2, noise[lag:] ** 2)[0, 1]
        assert abs(squares) < 6 / math.sqrt(SIZE)


def test_two_releases_share_no_noise() -> None:
    plan = local_plan()
    one = plan.noise(SIZE, plan.entropy("n", 3, 1))
    two = plan.noise(SIZE, plan.entropy("n", 3, 1))
    assert abs(np.corrcoef(one, two)[0, 1]) < 6 / math.sqrt(SIZE)


@pytest.mark.parametrize("entropy", SOURCES)
def test_sampling_is_poisson_at_the_declared_rate(entropy: Entropy) -> None:
    plan = local_plan(sample_rate=0.05)
    num_units, draws = 500, 4000
    counts = np.zeros(num_units)
    sizes = np.empty(draws)
    for i in range(draws):
        drawn = plan.sample(num_units, entropy)
        counts[drawn] += 1
        sizes[i] = len(drawn)
    assert accepts_poisson(sizes, counts, 0.05)


def accepts_poisson(sizes: FloatArray, counts: FloatArray, rate: float) -> bool:
    """Whether batch sizes and how often each unit was drawn fit independent draws at `rate`."""
    draws, units = len(sizes), len(counts)
    mean, variance = units * rate, units * rate * (1 - rate)
    if abs(sizes.mean() - mean) > 6 * math.sqrt(variance / draws):
        return False
    # The spread of the size is what tells Poisson sampling from batches of one size.
    low, high = stats.chi2.ppf([5e-8, 1 - 5e-8], draws)
    if not low <= np.sum((sizes - mean) ** 2) / variance <= high:
        return False
    expected, spread = draws * rate, draws * rate * (1 - rate)
    low, high = stats.chi2.ppf([5e-8, 1 - 5e-8], units)
    return bool(low <= np.sum((counts - expected) ** 2) / spread <= high)


@pytest.mark.slow
def test_other_samplers_are_rejected() -> None:
    rng = np.random.default_rng(1)
    units, draws, rate = 500, 4000, 0.05

    def outcome(batches: list[np.ndarray]) -> tuple[FloatArray, FloatArray]:
        counts = np.zeros(units)
        for batch in batches:
            np.add.at(counts, batch, 1)
        return np.array([len(batch) for batch in batches], dtype=float), counts

    poisson = [np.flatnonzero(rng.random(units) < rate) for _ in range(draws)]
    fixed = [rng.choice(units, 25, replace=False) for _ in range(draws)]
    cyclic = [np.arange(25) + 25 * (i % 20) for i in range(draws)]
    wrong_rate = [np.flatnonzero(rng.random(units) < rate * 1.1) for _ in range(draws)]
    weights = np.linspace(0.5, 1.5, units)  # right on average, wrong for each
    weighted = [np.flatnonzero(rng.random(units) < rate * weights) for _ in range(draws)]
    with_replacement = [rng.integers(0, units, rng.binomial(units, rate)) for _ in range(draws)]
    assert accepts_poisson(*outcome(poisson), rate)
    for wrong in (fixed, cyclic, wrong_rate, weighted):
        assert not accepts_poisson(*outcome(wrong), rate)
    # With replacement every margin looks right; only that no unit comes twice tells it apart.
    assert any(len(np.unique(batch)) < len(batch) for batch in with_replacement)
    plan = local_plan(sample_rate=0.5)
    for _ in range(50):
        drawn = plan.sample(units, Entropy.system())
        assert len(np.unique(drawn)) == len(drawn)
        assert drawn.dtype == np.int64


@pytest.mark.slow
@pytest.mark.parametrize("honest", [3, 2])
def test_distributed_shares_add_up_to_the_plans_noise(honest: int) -> None:
    from tests.support.plans import distributed_plan

    plan = distributed_plan(nodes=4, max_dropouts=3 - honest, noise_multiplier=1.2, max_grad_norm=0.5)
    mechanism = DiscreteMechanism.for_plan(plan, SIZE)
    zeros = np.zeros(SIZE)
    shares = [mechanism.decode(mechanism.share(zeros, Entropy.system())) for _ in range(honest)]
    total = np.sum(shares, axis=0)
    assert scale_is(total, plan.noise_std())
    # One more that is missing, or known, than the plan allows leaves too little noise.
    assert not scale_is(total - shares[0], plan.noise_std())


def test_central_noise_is_raised_where_a_quantile_is_paid() -> None:
    from tests.support.plans import central_plan

    plan = central_plan(noise_multiplier=1.0, adaptive_clipping=True, quantile_noise=1.0, max_grad_norm=2.0)
    noise = plan.noise(SIZE, Entropy.system())
    assert scale_is(noise, 2.0 * (1.0**-2 - 2.0**-2) ** -0.5)
    assert not scale_is(noise, 2.0)  # what it would be if the quantile were free
