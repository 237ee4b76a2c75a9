"""Privacy loss distributions: of one step, of many at once, and each part of the transform by brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.pld.pld_pmf import DensePLDPmf
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from scipy import optimize, stats

from fedtune.privacy.accounting import pld as losses
from fedtune.privacy.accounting.epsilon import Term, epsilon_of_terms, epsilon_rdp_of_terms
from fedtune.privacy.accounting.pld import (
    Step,
    _divergences,
    composed,
    epsilon_at,
    points_of_one,
    rounding,
    step_distribution,
    width,
)
from tests.support.work import Points

INTERVAL = 5e-3
MIXES: list[list[tuple[Step, int]]] = [
    [((0.05, 1.0, False), 60)],
    [((0.05, 1.0, False), 1)],
    [((1.0, 5.0, False), 30)],
    [((0.05, 0.7, False), 30), ((0.05, 2.0, False), 200)],
    [((0.01, 0.6, False), 500), ((1.0, 20.0, False), 3), ((0.3, 4.0, False), 40)],
    [((1.0, 6.0, False), 4), ((1.0, 9.0, False), 4)],
    [((0.05, 1.0, True), 20), ((0.05, 1.0, False), 20)],
]


def pair_by_pair(mix: list[tuple[Step, int]]) -> pld.PrivacyLossDistribution:
    total = None
    for step, count in mix:
        part = step_distribution(step, INTERVAL)
        part = part.self_compose(count) if count > 1 else part
        total = part if total is None else total.compose(part)
    assert total is not None
    return total


@pytest.mark.parametrize("mix", MIXES)
def test_it_is_what_composing_pair_by_pair_gives(mix: list[tuple[Step, int]]) -> None:
    ours, theirs = composed(mix, INTERVAL), pair_by_pair(mix)
    for delta in (1e-3, 1e-5, 1e-8):
        expected = theirs.get_epsilon_for_delta(delta)
        assert ours.get_epsilon_for_delta(delta) == pytest.approx(expected, rel=1e-5, abs=1e-7)
    for epsilon in (0.0, 0.5, 3.0):
        expected = theirs.get_delta_for_epsilon(epsilon)
        assert ours.get_delta_for_epsilon(epsilon) == pytest.approx(expected, rel=1e-6, abs=1e-13)


@pytest.mark.parametrize("mix", MIXES)
def test_no_probability_gets_lost(mix: list[tuple[Step, int]]) -> None:
    loss = composed(mix, INTERVAL)
    for part in (loss._pmf_remove, loss._pmf_add):
        assert (part._probs >= 0.0).all()
        total = part._probs.sum() + part._infinity_mass
        # Never less than one, up to what the transforms round; pessimistic rounding may add a little.
        assert 1.0 - 1e-10 <= total <= 1.0 + 1e-6


@pytest.mark.slow
def test_the_window_holds_all_but_the_tail() -> None:
    probs = step_distribution((0.05, 1.0, False), INTERVAL)._pmf_remove.to_dense_pmf()._probs
    low, high = losses._window([(probs, 60)])
    whole = np.array([1.0])
    for _ in range(60):
        whole = np.convolve(whole, probs)  # slow and obviously right
    assert whole[:low].sum() <= losses.TAIL and whole[high + 1 :].sum() <= losses.TAIL
    assert high - low < len(whole) / 3  # and it is worth having


@pytest.mark.slow
def test_many_different_runs_are_composed_at_once(pld_points: Points) -> None:
    terms = {Term(0.05, 1.0 + i / 50): 60 for i in range(12)}
    epsilon = epsilon_of_terms(terms, 1e-5)
    assert 0 < pld_points.number < 200_000  # pair by pair it is several times that
    assert epsilon <= epsilon_rdp_of_terms(terms, 1e-5)
    # All runs at the least noise bound them, all at the most noise are below them.
    assert (
        epsilon_of_terms({Term(0.05, 1.3): 720}, 1e-5)
        < epsilon
        < epsilon_of_terms({Term(0.05, 1.0): 720}, 1e-5)
    )


def test_rounding_grows_with_the_work_and_stays_far_below_delta() -> None:
    mix: list[tuple[Step, int]] = [((0.05, 1.0, False), 60)]
    small = rounding(mix, composed(mix, INTERVAL))
    more: list[tuple[Step, int]] = [((0.05, 1.0, False), 6000)]
    assert 0.0 < small < rounding(more, composed(more, INTERVAL)) < 1e-9
    assert points_of_one(mix, INTERVAL / 2) > points_of_one(mix, INTERVAL) > 0
    # It covers what the transform really does to the sum of all probabilities.
    assert abs(composed(mix, INTERVAL)._pmf_remove._probs.sum() - 1.0) < small + 1e-13
    assert math.isfinite(small)


RATES, NOISE = (1e-6, 1e-3, 0.05, 0.999, 1.0), (0.05, 0.4, 1.0, 30.0, 1000.0)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("sigma", NOISE)
def test_one_step_is_what_the_library_makes_point_by_point(rate: float, sigma: float) -> None:
    interval = min(0.5, 0.02 / min(sigma, sigma**2))
    ours = step_distribution((rate, sigma, False), interval)
    theirs = pld.from_gaussian_mechanism(
        sigma, sampling_prob=rate, value_discretization_interval=interval, pessimistic_estimate=True
    )
    assert ours._symmetric == theirs._symmetric
    for part, other in ((ours._pmf_remove, theirs._pmf_remove), (ours._pmf_add, theirs._pmf_add)):
        other = other.to_dense_pmf()
        assert (part._lower_loss, part.size) == (other._lower_loss, other.size)
        assert part._infinity_mass == pytest.approx(other._infinity_mass, rel=1e-9)
        # A divergence is right to 1e-15, and probabilities are its slope.
        assert np.abs(part._probs - other._probs).max() < 1e-15 / min(interval, 1.0) + 1e-14


@pytest.mark.parametrize("rate", [1e-3, 0.3])
@pytest.mark.parametrize("removed", [True, False])
def test_divergences_are_those_of_the_two_mixtures(rate: float, removed: bool) -> None:
    """The integral of what one density has above e^epsilon times the other, by a sum over a fine grid."""
    x = np.linspace(-15.0, 15.0, 200_001)
    plain = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    mixed = (1 - rate) * plain + rate * np.exp(-((x + 1) ** 2) / 2) / math.sqrt(2 * math.pi)
    upper, lower = (mixed, plain) if removed else (plain, mixed)
    epsilons = np.array([-2.0, -0.1, -1e-4, 0.0, 1e-4, 0.1, 0.3, 2.0])
    expected = [np.maximum(upper - math.exp(e) * lower, 0.0).sum() * (x[1] - x[0]) for e in epsilons]
    assert _divergences(epsilons, (rate, 1.0, False), removed) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    # With half the noise they are others.
    assert _divergences(epsilons, (rate, 0.5, False), removed) != pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("delta", [0.5, 1e-2, 1e-5, 1e-9])
def test_epsilon_is_where_the_library_finds_it(mix: list[tuple[Step, int]], delta: float) -> None:
    loss = composed(mix, INTERVAL)
    assert epsilon_at(loss, delta) == pytest.approx(loss.get_epsilon_for_delta(delta), rel=1e-9, abs=1e-12)


def test_epsilon_is_infinite_where_infinite_loss_alone_is_more_than_delta() -> None:
    loss = composed(MIXES[0], INTERVAL)
    assert epsilon_at(loss, loss._pmf_remove._infinity_mass / 2) == math.inf
    assert math.isfinite(epsilon_at(loss, loss._pmf_remove._infinity_mass * 2))


def test_the_window_stays_narrow_where_losses_are_rare_and_large() -> None:
    """20,000 steps at rate 1e-4: a window of all that they could reach has eighty million points."""
    step: Step = (1e-4, 0.44, False)
    probs = step_distribution(step, 1e-3)._pmf_remove._probs
    low, high = losses._window([(probs, 20_000)])
    assert high - low < 4 * len(probs) < 20_000 * len(probs)
    loss = composed([(step, 20_000)], 1e-3)
    assert loss._pmf_remove._infinity_mass < 1e-14
    # Four times the length holds no other answer.
    wide = np.fft.irfft(losses._power(np.fft.rfft(probs, 8 * len(probs)), 20_000), 8 * len(probs))
    assert np.abs(np.roll(wide, -low)[: high - low + 1] - loss._pmf_remove._probs).max() < 1e-11


@pytest.mark.parametrize("count", [1, 2, 3, 60, 20_000])
def test_powers_by_squaring_are_powers(count: int) -> None:
    transform = np.exp(1j * np.linspace(0, 6, 50)) * np.linspace(0.99, 1.0, 50)
    assert losses._power(transform, count) == pytest.approx(transform**count, rel=1e-10, abs=1e-12)


def test_the_width_is_that_of_the_distribution() -> None:
    for step in ((0.05, 1.0, False), (1.0, 2.0, False), (1e-4, 0.4, False)):
        assert width(step) == pytest.approx(points_of_one([(step, 1)], 1e-3) * 1e-3, rel=0.02)


COIN = np.array([0.9, 0.0, 0.1])


@pytest.mark.parametrize("order", [-3.0, 0.2, 1.0])
@pytest.mark.parametrize("scale", [1, 7])
def test_moments_are_those_of_the_definition(order: float, scale: int) -> None:
    value, slope = losses._Moments.of(COIN, 5, scale).at(order)
    weights = COIN * np.exp(order * scale * np.arange(3))
    assert value == pytest.approx(5 * math.log(weights.sum()), rel=1e-12)
    assert slope == pytest.approx(5 * float(weights @ (scale * np.arange(3))) / weights.sum(), rel=1e-12)


def test_moments_do_not_overflow_and_leave_out_what_cannot_be() -> None:
    moments = losses._Moments.of(np.array([0.5, 0.0, 0.5]), 2)
    assert moments.points.tolist() == [0.0, 2.0] and moments.times == 2
    assert moments.at(1e4) == pytest.approx((2 * (2e4 + math.log(0.5)), 4.0))


def parts(count: int = 200) -> list[tuple[np.ndarray, int]]:
    return [(COIN, count), (np.array([0.2, 0.5, 0.3]), 3 * count)]


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("count", [1, 200, 30_000])
@pytest.mark.parametrize("need", [3.0, 35.0])
def test_the_order_is_about_the_one_of_the_tightest_bound(sign: float, count: int, need: float) -> None:
    moments = [losses._Moments.of(*part) for part in parts(count)]
    last = sum(2 * m.times for m in moments)

    def bound(log_order: float) -> float:
        order = math.exp(log_order)
        return (sum(m.at(sign * order)[0] for m in moments) + need) / order

    best = optimize.minimize_scalar(bound, bounds=(-12, 9), method="bounded", options={"xatol": 1e-9})
    order = losses._order(moments, need, last, sign=sign)
    # A unit of its logarithm is halved four times, and the middle taken; the search starts at need / last.
    wanted = max(best.x, math.log(need / last))
    if wanted < 6.9:
        assert abs(math.log(order) - wanted) <= 1 / 32 + 1e-3


def test_the_order_is_not_looked_for_without_end() -> None:
    sure = [losses._Moments.of(np.array([0.0, 1.0]), 4)]  # the bound falls with every order
    assert 6.0 < math.log(losses._order(sure, 30.0, 4)) < 9.0


@pytest.mark.parametrize("probability", [0.5, 1e-3])
@pytest.mark.parametrize("count", [40, 5_000])
def test_the_window_is_that_of_chernoffs_bound(probability: float, count: int) -> None:
    low, high = losses._window([(np.array([1 - probability, probability]), count)])
    exact = stats.binom(count, probability)
    half = losses.TAIL / 2
    assert exact.sf(high) <= half and exact.cdf(low - 1) <= half
    assert 0 <= low <= high <= count and isinstance(low, int)
    # By the bound itself, minimized: exp(-n KL(x / n | p)) at the ends is about that mass.

    def chernoff(x: float) -> float:
        q = x / count
        relative = [
            q * math.log(q / probability) if q > 0 else 0.0,
            (1 - q) * math.log((1 - q) / (1 - probability)) if q < 1 else 0.0,
        ]
        return math.exp(-count * sum(relative))

    if high < count:
        assert chernoff(high) <= half * 1.01 and chernoff(high - 2) > half / 2
    if low > 0:
        assert chernoff(low) <= half * 1.01 and chernoff(low + 2) > half / 2


def test_the_window_of_one_point_is_that_point() -> None:
    assert losses._window([(np.array([1.0]), 7)]) == (0, 0)


@pytest.mark.parametrize(("points", "runs"), [(2048, 1), (2049, 2), (4097, 3)])
def test_thinning_adds_neighbours_up(points: int, runs: int) -> None:
    probs = np.random.default_rng(0).random(points)
    assert losses._thinning(probs) == runs
    thinned = losses._thinned(probs)
    assert thinned == pytest.approx([probs[i : i + runs].sum() for i in range(0, points, runs)], rel=1e-12)


def test_what_the_transforms_round_grows_with_steps_kinds_and_points() -> None:
    mix: list[tuple[Step, int]] = [((0.05, 1.0, False), 60), ((0.05, 2.0, False), 7)]
    loss = composed(mix, 1e-2)
    expected = 2.0**-52 * (67 + 10 * 2) * math.sqrt(loss._pmf_remove.size)
    assert rounding(mix, loss) == pytest.approx(expected, rel=1e-12, abs=0.0)
    assert points_of_one(mix, 1e-2) == step_distribution(mix[0][0], 1e-2)._pmf_remove.size
    assert points_of_one(mix[1:], 1e-2) == step_distribution(mix[1][0], 1e-2)._pmf_remove.size


def test_infinite_losses_are_those_of_all_steps_and_the_tail() -> None:
    mix: list[tuple[Step, int]] = [((0.3, 0.7, False), 3), ((0.05, 0.5, False), 2)]
    loss = composed(mix, 0.5)
    each = [step_distribution(step, 0.5) for step, _ in mix]
    for side in ("_pmf_remove", "_pmf_add"):
        finite = math.prod(
            (1 - getattr(one, side)._infinity_mass) ** n for one, (_, n) in zip(each, mix, strict=True)
        )
        assert getattr(loss, side)._infinity_mass == pytest.approx(
            1 - finite + losses.TAIL, rel=1e-9, abs=1e-18
        )


@pytest.mark.parametrize("mix", [[((1.0, 5.0, False), 30)], [((0.3, 5.0, False), 30)]])
def test_losses_are_where_the_sum_of_all_steps_is(mix: list[tuple[Step, int]]) -> None:
    """Mean and variance add up, in units of losses."""
    interval = 1e-3
    loss, one = composed(mix, interval), step_distribution(mix[0][0], interval)
    for side in ("_pmf_remove", "_pmf_add"):
        moments = []
        for part in (getattr(loss, side), getattr(one, side).to_dense_pmf()):
            at = (part._lower_loss + np.arange(part.size)) * part._discretization
            mean = float(part._probs @ at)
            moments.append((mean, float(part._probs @ (at - mean) ** 2)))
        assert moments[0] == pytest.approx((30 * moments[1][0], 30 * moments[1][1]), rel=1e-6)
    assert loss._symmetric == (mix[0][0][0] == 1.0)


def by_bisection(first: int, interval: float, probs: np.ndarray, infinite: float, delta: float) -> float:
    """The least epsilon of 0 or more at which the divergence of these losses is at most `delta`."""
    at = (first + np.arange(len(probs))) * interval

    def divergence(epsilon: float) -> float:
        return infinite + float(np.maximum(probs * (1.0 - np.exp(epsilon - at)), 0.0).sum())

    if infinite > delta:
        return math.inf
    if divergence(0.0) <= delta:
        return 0.0
    low, high = 0.0, max(float(at[-1]), 0.0)
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if divergence(middle) > delta else (low, middle)
    return high


@pytest.mark.parametrize("first", [-7, -3, -1, 0, 1, 2])
@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_epsilon_is_where_the_divergence_is_delta(first: int, size: int) -> None:
    random = np.random.default_rng(100 * size + first + 10)
    for infinite in (0.0, 0.1):
        probs = random.dirichlet(np.ones(size)) * (1 - infinite)
        loss = PrivacyLossDistribution(DensePLDPmf(0.5, first, probs, infinite, True))
        for delta in (1e-6, 0.01, 0.1, 0.11, 0.15, 0.3, 0.6):
            expected = by_bisection(first, 0.5, probs, infinite, delta)
            assert epsilon_at(loss, delta) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_epsilon_is_that_of_the_worse_direction() -> None:
    worse = DensePLDPmf(0.5, 0, np.array([0.2, 0.8]), 0.0, True)
    better = DensePLDPmf(0.5, 0, np.array([0.8, 0.2]), 0.0, True)
    for loss in (PrivacyLossDistribution(worse, better), PrivacyLossDistribution(better, worse)):
        assert epsilon_at(loss, 0.01) == epsilon_at(PrivacyLossDistribution(worse), 0.01)
        assert epsilon_at(loss, 0.01) > epsilon_at(PrivacyLossDistribution(better), 0.01) > 0.0


def test_one_sampled_step_among_plain_ones_makes_two_directions() -> None:
    plain: tuple[Step, int] = ((1.0, 5.0, False), 3)
    sampled: tuple[Step, int] = ((0.3, 1.0, False), 3)
    for mix in ([plain, sampled], [sampled, plain], [sampled]):
        loss = composed(mix, 1e-2)
        assert not loss._symmetric
        assert loss._pmf_add.get_delta_for_epsilon(0.5) != loss._pmf_remove.get_delta_for_epsilon(0.5)
    assert composed([plain, plain], 1e-2)._symmetric


@pytest.mark.parametrize("counts", [(10, 0), (3, 2), (1, 7), (15, 16)])
def test_the_one_transform_is_the_convolution_of_all_steps(counts: tuple[int, int]) -> None:
    """Slow and obviously right: one step after the other. Infinite losses are those of any step."""
    steps = [
        (DensePLDPmf(0.5, -1, np.array([0.5, 0.4]), 0.1, True), counts[0]),
        (DensePLDPmf(0.5, 2, np.array([0.2, 0.3, 0.45]), 0.05, True), counts[1]),
    ]
    steps = [(step, count) for step, count in steps if count]
    whole, first, finite = np.array([1.0]), 0, 1.0
    for step, count in steps:
        for _ in range(count):
            whole = np.convolve(whole, step._probs)
            first += step._lower_loss
            finite *= 1.0 - step._infinity_mass
    made = losses._convolved(steps, 0.5)
    assert made._discretization == 0.5 and made._pessimistic_estimate is True
    assert made._infinity_mass == pytest.approx(1.0 - finite + losses.TAIL, rel=1e-12)
    skipped = made._lower_loss - first
    assert skipped >= 0 and skipped + made.size <= len(whole)
    assert made._probs == pytest.approx(whole[skipped : skipped + made.size], abs=1e-15)
    assert whole[:skipped].sum() + whole[skipped + made.size :].sum() <= losses.TAIL
    assert (made._probs >= 0.0).all()


def test_divergences_that_rounding_made_rise_are_taken_for_flat() -> None:
    rising, flat = np.array([0.5, 0.5 + 1e-9, 0.2, 0.0]), np.array([0.5, 0.5, 0.2, 0.0])
    made, wanted = (losses._connected(-1, 0.5, divergences) for divergences in (rising, flat))
    assert made._probs.tolist() == wanted._probs.tolist() and made._lower_loss == -1


@pytest.mark.parametrize("step", [(1.0, 2.0, False), (0.3, 2.0, False), (1e-3, 0.5, False)])
def test_the_width_is_that_of_the_wider_direction(step: Step) -> None:
    loss = step_distribution(step, 1e-3)
    sizes = [part.size for part in (loss._pmf_remove, loss._pmf_add)]
    assert width(step) == pytest.approx((max(sizes) - 1) * 1e-3, abs=2e-3)
