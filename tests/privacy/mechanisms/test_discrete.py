"""The exact sampler against its closed form, and the argument of the module against numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from fedtune.errors import PrivacyError
from fedtune.privacy.mechanisms.discrete import FLOAT_MARGIN, DiscreteMechanism, sum_divergence
from fedtune.privacy.mechanisms.noise import Entropy, _exp_minus, _one_in, discrete_gaussian
from tests.support.events import distributed_epsilon

FIXED = Entropy.reproducible(7, "node", 1, 1)  # statistics below must not fail by chance on some days


def gaussian_pmf(std: float, reach: int, shift: int = 0) -> np.ndarray:
    """Discrete Gaussian probabilities of -reach ... reach, by definition."""
    values = np.exp(-((np.arange(-reach, reach + 1) - shift) ** 2) / (2.0 * std * std))
    return values / values.sum()


def chi_square(sample: np.ndarray, pmf: np.ndarray) -> float:
    """P value of a sample against probabilities of -reach ... reach; rare values pooled."""
    reach = len(pmf) // 2
    observed = np.bincount(np.clip(sample, -reach, reach) + reach, minlength=len(pmf)).astype(float)
    expected = pmf * len(sample)
    common = expected >= 10
    if not common.all():
        observed = np.append(observed[common], observed[~common].sum())
        expected = np.append(expected[common], max(expected[~common].sum(), 1e-3))
    return float(stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue)


@pytest.mark.parametrize("log2_std", [1, 2, 4])
def test_the_sampler_has_the_distribution_that_it_says_and_no_other(log2_std):
    std = 2.0**log2_std
    sample = discrete_gaussian(60_000, log2_std, FIXED)
    reach = int(8 * std)
    assert chi_square(sample, gaussian_pmf(std, reach)) > 1e-4
    assert chi_square(sample, gaussian_pmf(std * 2 / 3, reach)) < 1e-12
    assert chi_square(sample, gaussian_pmf(std * 3 / 2, reach)) < 1e-12


@pytest.mark.parametrize("log2_std", [6, 19, 24])
def test_moments_of_a_wide_discrete_gaussian(log2_std):
    n = 100_000
    sample = discrete_gaussian(n, log2_std, FIXED).astype(float) / 2.0**log2_std
    assert abs(sample.mean()) < 5 / math.sqrt(n)
    assert abs(sample.std() - 1.0) < 5 / math.sqrt(2 * n)
    assert abs((sample**4).mean() - 3.0) < 5 * math.sqrt(96 / n)
    assert abs(sample.std() - 2 / 3) > 0.3 and abs(sample.std() - 3 / 2) > 0.3
    assert stats.kstest(sample, "norm").pvalue > 1e-4


@pytest.mark.system_entropy
def test_the_sampler_draws_from_the_operating_system_and_never_twice_the_same():
    first, second = (discrete_gaussian(500, 10, Entropy.system()) for _ in range(2))
    assert (first != second).mean() > 0.95


def test_sizes_and_arguments_of_the_sampler():
    assert discrete_gaussian(0, 5, FIXED).shape == (0,)
    assert discrete_gaussian(1, 5, FIXED).dtype == np.int64
    for bad in (0, 25):
        with pytest.raises(ValueError, match="log2_std"):
            discrete_gaussian(3, bad, FIXED)


@pytest.mark.parametrize("k", [2, 3, 7, 1000])
def test_one_in_k(k):
    n = 200_000
    hits = int(_one_in(k, n, FIXED).sum())
    assert stats.binomtest(hits, n, 1 / k).pvalue > 1e-4


@pytest.mark.parametrize("exponent", [0.0, 0.25, 1.0, 1.5, 3.75])
def test_exp_minus_is_a_bernoulli_of_exp_minus_gamma(exponent):
    n = 100_000
    drawn = _exp_minus(np.full(n, int(exponent * 2**7), dtype=np.int64), 7, FIXED)
    p = math.exp(-exponent)
    assert stats.binomtest(int(drawn.sum()), n, p).pvalue > 1e-4 if exponent else drawn.all()


class Scripted:
    """Entropy that hands out chosen words."""

    def __init__(self, words):
        self.queue = list(words)

    def words(self, count, purpose="noise"):
        out, self.queue = self.queue[:count], self.queue[count:]
        return np.array(out, dtype=np.uint64)


def test_one_in_three_draws_again_where_bits_do_not_divide():
    # 2^32 = 3 * 1431655765 + 1: the last value belongs to no third, and must be drawn anew.
    assert not _one_in(3, 1, Scripted([2**32 - 1, 1431655765]))[0]
    assert _one_in(3, 1, Scripted([2**32 - 1, 2**32 - 1, 1431655764]))[0]


# --- the argument -------------------------------------------------------------------------------------


def convolve(pmf: np.ndarray, times: int) -> np.ndarray:
    total = pmf
    for _ in range(times - 1):
        total = np.convolve(total, pmf)
    return total


@pytest.mark.parametrize(("std", "shares"), [(0.6, 2), (0.6, 5), (0.75, 3), (1.0, 4)])
def test_a_sum_of_discrete_gaussians_is_within_its_bound_of_one(std, shares):
    """Step 3: the bound holds at every point, and is no more than a few times too large."""
    reach = 40
    total = convolve(gaussian_pmf(std, reach), shares)
    single = gaussian_pmf(std * math.sqrt(shares), reach * shares)
    seen = single > 1e-12
    worst = np.abs(np.log(total[seen] / single[seen])).max()
    bound = sum_divergence(std, shares)
    assert worst <= bound * (1 + 1e-6)
    if shares == 2:  # more shares smooth out what the first two differ by, which the bound does not count
        assert worst > bound / 4
    # Kairouz, Liu and Steinke's own constant is larger.
    theirs = 10 * sum(math.exp(-2 * math.pi**2 * std**2 * k / (k + 1)) for k in range(1, shares))
    assert bound <= theirs


def hockey_stick(p: np.ndarray, q: np.ndarray, epsilon: float) -> float:
    return float(np.maximum(p - math.exp(epsilon) * q, 0.0).sum())


def gaussian_hockey_stick(multiplier: float, rate: float, epsilon: float, remove: bool) -> float:
    """Of one Poisson-sampled Gaussian step, by integration over a fine grid."""
    x = np.linspace(-14 * multiplier, 14 * multiplier + 1, 400_001)
    base = stats.norm.pdf(x, 0, multiplier)
    mixed = (1 - rate) * base + rate * stats.norm.pdf(x, 1, multiplier)
    p, q = (mixed, base) if remove else (base, mixed)
    return float(np.maximum(p - math.exp(epsilon) * q, 0.0).sum() * (x[1] - x[0]))


@pytest.mark.parametrize("rate", [0.1, 1.0])
@pytest.mark.parametrize("remove", [True, False])
def test_the_sampled_sum_of_shares_is_dominated_by_the_continuous_gaussian(rate, remove):
    """Steps 3 and 4 in one dimension, where everything can be computed: for an integer shift, the sampled sum
    of h discrete Gaussians never costs more than a continuous Gaussian of variance h std^2 - r^2."""
    shares, std, r, shift = 3, 4.0, 1.5, 9
    reach = 80
    noise = convolve(gaussian_pmf(std, reach), shares)
    moved = np.zeros_like(noise)
    moved[shift:] = noise[:-shift]
    mixed = (1 - rate) * noise + rate * moved
    p, q = (mixed, noise) if remove else (noise, mixed)
    honest = math.sqrt(shares * std * std - r * r) / shift
    wrong = math.sqrt(shares * (1.5 * std) ** 2) / shift  # as if the shares were larger than they are
    compared = 0
    for epsilon in (0.05, 0.1, 0.3, 0.6, 1.0, 2.0):
        real = hockey_stick(p, q, epsilon)
        assert real <= gaussian_hockey_stick(honest, rate, epsilon, remove) + 1e-9
        if real > 1e-6:
            compared += 1
            assert real > gaussian_hockey_stick(wrong, rate, epsilon, remove)
    assert compared >= 1


def mechanism(**changes) -> DiscreteMechanism:
    settings = {
        "dimension": 5_000, "nodes": 6, "shares": 4, "noise_multiplier": 1.1, "max_grad_norm": 0.5,
        "sample_rate": 0.05, "expected_batch_size": 200.0,
    }  # fmt: skip
    return DiscreteMechanism.design(**{**settings, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"dimension": 300_000}, {"nodes": 100, "shares": 60}, {"noise_multiplier": 0.3},
        {"noise_multiplier": 40.0}, {"expected_batch_size": 20_000.0},
        {"max_grad_norm": 1e-3}, {"max_grad_norm": 1e3},
    ],
)  # fmt: skip
def test_the_accounted_multiplier_is_the_plans_and_the_extra_noise_small(changes):
    made = mechanism(**changes)
    wanted = {"noise_multiplier": 1.1, **changes}["noise_multiplier"]
    assert wanted <= made.effective_noise_multiplier <= wanted * (1 + 1e-9)
    assert 1.0 < made.inflation < 1.03
    assert made.slack(10_000) < 1e-100
    # Real noise of the counted shares, over the clipping norm, covers sensitivity and rounding.
    assert made.noise_std(made.shares) / made.max_grad_norm >= wanted * (1 + FLOAT_MARGIN)


def test_one_unit_never_moves_the_integers_further_than_the_sensitivity():
    made = mechanism(dimension=400, max_grad_norm=1.0)
    generator = np.random.default_rng(3)
    worst = 0.0
    for _ in range(200):
        others = generator.normal(size=400) * 3
        unit = generator.normal(size=400)
        unit /= np.linalg.norm(unit)
        moved = made.encode(others + unit) - made.encode(others)
        worst = max(worst, float(np.linalg.norm(moved)))
    assert 0.9 * made.scale < worst <= made.sensitivity


def test_the_largest_sum_that_nodes_can_draw_fits_with_its_noise():
    """Overflow is impossible by construction: every unit of every node pulls one coordinate the same way."""
    made = mechanism(dimension=8, nodes=5, shares=5, max_grad_norm=2.0, expected_batch_size=100.0)
    drawn = 100 + 10 * 10 + 50
    sums = [np.full(8, 2.0 * drawn / 5) for _ in range(5)]
    total = np.zeros(8, dtype=np.uint32)
    for one in sums:
        total += made.share(one, FIXED)
    decoded = made.decode(total)
    assert np.abs(decoded - 2.0 * drawn).max() < 6 * made.noise_std(5)
    # The range is not larger than it needs to be by much: eight times that wraps around.
    wrapped = made.decode((8 * sum(made.encode(one) for one in sums)).astype(np.uint32))
    assert np.abs(wrapped - 16.0 * drawn).max() > drawn


def test_the_sum_decodes_to_the_sum_and_its_noise_meets_the_plan_for_every_number_of_dropouts():
    made = mechanism(dimension=20_000, nodes=6, shares=4, max_grad_norm=0.5)
    generator = np.random.default_rng(5)
    plain = [generator.normal(size=20_000) for _ in range(6)]
    for survivors in (4, 5, 6):  # 4 = nodes - dropouts - colluders
        total = np.zeros(20_000, dtype=np.uint32)
        for one in plain[:survivors]:
            total += made.share(one, FIXED)
        noise = made.decode(total) - np.sum(plain[:survivors], axis=0)
        wanted = 1.1 * 0.5
        spread = noise.std()
        assert spread > wanted * (1 - 3 / math.sqrt(2 * 20_000))
        assert abs(spread / made.noise_std(survivors) - 1) < 0.03
        assert spread < wanted * math.sqrt(survivors / 4) * 1.05
    # One node fewer than the plan allows does not meet it: this is why such a round is discarded.
    assert made.noise_std(3) < 0.9 * 1.1 * 0.5


def test_epsilon_of_the_distributed_mechanism_is_that_of_a_trusted_server():
    made = mechanism()
    cost = distributed_epsilon(made, rounds=60, delta=1e-5)
    assert cost["epsilon_ideal"] == pytest.approx(cost["epsilon"], rel=1e-6)
    assert cost["epsilon"] >= cost["epsilon_ideal"] * (1 - 1e-9)
    assert cost["epsilon"] <= cost["epsilon_rdp"] < 1.5 * cost["epsilon"]
    half = mechanism(noise_multiplier=0.55)
    assert distributed_epsilon(half, 60, 1e-5)["epsilon"] > 1.5 * cost["epsilon"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shares": 0}, "none would be left"),
        ({"dimension": 0}, "nothing to aggregate"),
        ({"noise_multiplier": 0.0}, "noise_multiplier"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"max_grad_norm": math.inf}, "max_grad_norm"),
        ({"expected_batch_size": 1e9}, "does not fit into 32 bits"),
        ({"dimension": 10**13}, "does not fit into 32 bits"),
    ],
)
def test_what_cannot_be_done_is_refused(changes, said):
    with pytest.raises(PrivacyError, match=said):
        mechanism(**changes)


def test_sums_that_are_not_sums_of_clipped_units_are_refused(golden):
    made = mechanism(dimension=4)
    for bad in (np.zeros(5), np.zeros((2, 2)), np.float64(1.0)):
        with pytest.raises(PrivacyError, match="shape"):
            made.encode(np.asarray(bad))
    for bad in (math.nan, math.inf):
        with pytest.raises(PrivacyError) as raised:
            made.encode(np.array([0.0, bad, 0.0, 0.0]))
        golden(raised)
    assert np.abs(made.encode(np.full(4, 1e12))).max() < 2**31  # clamped, not wrapped
