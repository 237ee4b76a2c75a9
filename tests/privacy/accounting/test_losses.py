"""Composition in one transform: the same as dp_accounting's pair by pair, and never below the truth."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld

from fedtune.privacy.accounting import pld as losses
from fedtune.privacy.accounting.epsilon import Term, epsilon_of_terms, epsilon_rdp_of_terms
from fedtune.privacy.accounting.pld import composed, epsilon_at, points_of_one, rounding
from fedtune.privacy.accounting.step_losses import Step, _divergences, step_distribution, width

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


def test_the_window_holds_all_but_the_tail() -> None:
    probs = step_distribution((0.05, 1.0, False), INTERVAL)._pmf_remove.to_dense_pmf()._probs
    low, high = losses._window([(probs, 60)])
    whole = np.array([1.0])
    for _ in range(60):
        whole = np.convolve(whole, probs)  # slow and obviously right
    assert whole[:low].sum() <= losses.TAIL and whole[high + 1 :].sum() <= losses.TAIL
    assert high - low < len(whole) / 3  # and it is worth having


@pytest.mark.parametrize("least", [1, 2, 3, 7, 11, 97, 1000, 1025, 65537, 99999])
def test_lengths_are_smooth_and_just_long_enough(least: int) -> None:
    length = losses._fast_length(least)
    assert least <= length <= max(1.25 * least, least + 1)
    for prime in (2, 3, 5):
        while length % prime == 0:
            length //= prime
    assert length == 1


def test_the_books_of_many_different_runs_are_read_in_seconds() -> None:
    terms = {Term(0.05, 1.0 + i / 50): 60 for i in range(12)}
    start = time.process_time()
    epsilon = epsilon_of_terms(terms, 1e-5)
    assert time.process_time() - start < 5.0  # pair by pair it is several times that
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
