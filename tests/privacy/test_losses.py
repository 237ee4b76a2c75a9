"""Composition in one transform: the same as dp_accounting's pair by pair, and never below the truth."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld

from fedtune.privacy import losses
from fedtune.privacy.accounting import Term, epsilon_of_terms, epsilon_rdp_of_terms
from fedtune.privacy.losses import Step, composed, points_of_one, rounding

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
        part = losses._one(step, INTERVAL)
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
    probs = losses._one((0.05, 1.0, False), INTERVAL)._pmf_remove.to_dense_pmf()._probs
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
