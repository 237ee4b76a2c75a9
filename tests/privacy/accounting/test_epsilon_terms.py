"""Merging steps and choosing grids: nothing is lost on the way to the accountant, nothing counted free."""

from __future__ import annotations

import logging
import math
from fractions import Fraction

import dp_accounting as dp
import numpy as np
import pytest

from fedtune.errors import PrivacyError
from fedtune.privacy.accounting import epsilon as accounting
from fedtune.privacy.accounting import pld as losses
from fedtune.privacy.accounting.epsilon import (
    Term,
    _epsilon,
    _epsilon_rdp,
    _key,
    _scale_guess,
    conversions,
    deltas_of_terms,
    epsilon_of_terms,
    epsilon_on_grid,
    epsilon_rdp_of_terms,
)
from tests.privacy.accounting.test_epsilon import analytic_gaussian, delta_of
from tests.support.events import epsilon_of, epsilon_rdp
from tests.support.golden import Golden


@pytest.mark.parametrize(
    ("rate", "sigma"),
    [(math.nan, 1.0), (-0.1, 1.0), (0.0, 1.0), (1.1, 1.0), (0.5, math.inf), (0.5, math.nan), (0.5, 0.0)],
)
def test_steps_without_meaning_are_refused(rate: float, sigma: float, golden: Golden) -> None:
    for price in (epsilon_of_terms, epsilon_rdp_of_terms):
        with pytest.raises(PrivacyError) as raised:
            price({Term(0.5, 1.0): 1, Term(rate, sigma): 1}, 1e-5)
        golden(raised)


@pytest.mark.parametrize("replace", [False, True])
def test_unsampled_steps_become_one_gaussian_with_a_hair_less_noise(replace: bool) -> None:
    terms = {Term(1.0, 4.0, replace): 8, Term(1.0, 2.0, replace): 3, Term(0.5, 3.0, replace): 5}
    merged = dict(_key(terms))
    assert merged.pop(Term(0.5, 3.0, replace)) == 5
    ((term, count),) = merged.items()
    assert count == 1 and term.sample_rate == 1.0 and term.replace is replace
    exact = 1 / (Fraction(8, 16) + Fraction(3, 4))  # of the square
    relative = Fraction(term.noise_multiplier) ** 2 / exact - 1
    assert -1e-11 < relative < -1e-13


def test_only_like_steps_are_merged() -> None:
    terms = {
        Term(1.0, 4.0): 8,
        Term(1.0, 2.0, True): 3,
        Term(0.5, 3.0): 5,
        Term(0.5, 2.0): 1,
        Term(0.2, 1.0): 0,
    }
    assert _key(terms) == tuple(sorted((t, c) for t, c in terms.items() if c))


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Of a Gaussian mechanism, exactly (Balle and Wang 2018)."""
    normal = [0.5 * math.erfc(-x / math.sqrt(2)) for x in (mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu)]
    return normal[0] - math.exp(epsilon) * normal[1]


@pytest.mark.parametrize("sigma", [0.7, 20.0, 1000.0])
def test_delta_is_that_of_the_gaussian_mechanism(sigma: float) -> None:
    mu = 1 / sigma
    for epsilon in (0.0, mu, 3 * mu):
        exact = gaussian_delta(mu, epsilon)
        assert exact * (1 - 1e-9) <= delta_of(dp.GaussianDpEvent(sigma), epsilon) <= exact * (1 + 1e-4)


def test_delta_is_never_more_than_one_nor_less_than_what_was_rounded() -> None:
    assert delta_of(dp.GaussianDpEvent(0.01), 0.0) == 1.0
    key = ((Term(1.0, 1.0), 1),)
    slack = losses.rounding(key, losses.composed(key, 1e-3))
    assert slack / 10 < delta_of(dp.GaussianDpEvent(1.0), 100.0) < 1e-9


def test_the_curve_of_nothing_is_nothing() -> None:
    assert deltas_of_terms({}, np.array([0.0, 1.0])).tolist() == [0.0, 0.0]
    assert deltas_of_terms({Term(0.5, 1.0): 0}, np.array([0.0])).tolist() == [0.0]


def test_delta_is_a_number_at_any_epsilon() -> None:
    bounds = deltas_of_terms({Term(1.0, 2.0): 1}, np.array([0.1, 5.0, 800.0, 1e300]))
    assert np.isfinite(bounds).all() and (np.diff(bounds) <= 0.0).all()
    assert bounds[0] > 0.05 and bounds[1:].max() < 1e-6


def test_conversions_of_mixed_and_of_absent_noise_say_what_they_are() -> None:
    assert conversions(None).rho_is == conversions(None).mu_is == "exact"
    mixed = conversions({Term(1.0, 4.0): 8, Term(0.5, 2.0): 3})
    assert "upper bound" in mixed.rho_is and "not a bound" in mixed.mu_is
    assert mixed.rho == pytest.approx(8 / 32 + 3 / 8)
    assert mixed.mu == pytest.approx(math.sqrt(8 / 16 + 3 * 0.25 * math.expm1(1 / 4)))
    # A replaced unit: twice the sensitivity, four times the square.
    replaced = conversions({Term(1.0, 4.0, True): 8, Term(0.5, 2.0, True): 3})
    assert replaced.rho == pytest.approx(4 * mixed.rho)
    assert replaced.mu == pytest.approx(math.sqrt(4 * 8 / 16 + 3 * 0.25 * math.expm1(1.0)))
    assert conversions({Term(1.0, 4.0, True): 8}).mu == pytest.approx(2 * math.sqrt(8) / 4)


def test_different_unsampled_steps_cost_what_one_gaussian_costs() -> None:
    event = dp.ComposedDpEvent([dp.GaussianDpEvent(4.0)] * 8 + [dp.GaussianDpEvent(2.0)] * 3)
    exact = analytic_gaussian(math.sqrt(8 / 16 + 3 / 4), 1e-5)
    assert exact * (1 - 1e-9) <= epsilon_of(event, 1e-5) <= exact * 1.002


def test_a_step_with_next_to_no_noise_has_finite_conversions() -> None:
    assert conversions({Term(0.5, 0.01): 1}).mu == pytest.approx(0.5 * math.exp(250))
    assert conversions({Term(0.5, 1 / math.sqrt(499)): 1}).mu == pytest.approx(0.5 * math.exp(249.5))


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("sigma", [0.3, 30.0])
@pytest.mark.parametrize("rate", [0.05, 1.0])
def test_the_first_guess_is_the_less_of_two_closed_forms(rate: float, sigma: float, replace: bool) -> None:
    """Gaussian DP's epsilon at delta, roughly, and zCDP's without sampling (Bun and Steinke 2016)."""
    key = ((Term(rate, sigma, replace), 7),)
    squared = (4 if replace else 1) / sigma**2
    mu = math.sqrt(7 * (squared if rate == 1.0 else rate**2 * math.expm1(squared)))
    rho, log = 7 * squared / 2, math.log(1e5)
    by_mu, by_rho = mu * math.sqrt(2 * log) + mu**2 / 2, rho + 2 * math.sqrt(rho * log)
    assert _scale_guess(key, 1e-5) == pytest.approx(min(by_mu, by_rho))


def test_a_grid_that_says_nothing_leaves_it_to_renyi_dp() -> None:
    terms = {Term(0.05, 1.0): 60}
    assert epsilon_on_grid({}, 1e-5, 1e-2) == 0.0
    assert epsilon_on_grid(terms, 1e-14, 1e-2) == epsilon_rdp_of_terms(terms, 1e-14)
    slack = losses.rounding(_key(terms), losses.composed(_key(terms), 1e-2))
    # From twice what is rounded on, the grid counts.
    assert epsilon_on_grid(terms, 1.99 * slack, 1e-2) == epsilon_rdp_of_terms(terms, 1.99 * slack)
    assert epsilon_on_grid(terms, 2.01 * slack, 1e-2) < epsilon_rdp_of_terms(terms, 2.01 * slack)


def test_what_is_rounded_is_taken_off_delta() -> None:
    terms = {Term(0.05, 1.0): 60}
    key = _key(terms)
    loss = losses.composed(key, 1e-2)
    slack = losses.rounding(key, loss)
    delta = 3 * slack
    assert epsilon_on_grid(terms, delta, 1e-2) == losses.epsilon_at(loss, delta - slack)
    assert losses.epsilon_at(loss, delta - slack) > losses.epsilon_at(loss, delta)


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_renyi_dp_composes_every_step(rate: float, replace: bool) -> None:
    """Against an accountant that is given the steps one by one; a replaced unit has half of the noise."""
    accountant = dp.rdp.RdpAccountant()
    for sigma, count in ((1.5, 3), (4.0, 2)):
        step: dp.DpEvent = dp.GaussianDpEvent(sigma / 2 if replace else sigma)
        if rate < 1.0 and not replace:
            step = dp.PoissonSampledDpEvent(rate, step)
        for _ in range(count):
            accountant.compose(step)
    terms = ((Term(rate, 1.5, replace), 3), (Term(rate, 4.0, replace), 2))
    assert _epsilon_rdp(terms, 1e-5) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-9)


def test_nothing_costs_nothing_by_either_accountant() -> None:
    assert epsilon_rdp(dp.NoOpDpEvent(), 1e-5) == 0.0
    assert epsilon_rdp_of_terms({}, 1e-5) == epsilon_of_terms({}, 1e-5) == 0.0


def test_the_log_level_of_others_is_left_as_it_was() -> None:
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.DEBUG)
    try:
        _epsilon_rdp(((Term(0.1, 1.23), 3),), 1e-5)
        assert logger.level == logging.DEBUG
    finally:
        logger.setLevel(before)


@pytest.mark.parametrize("count", [8, 9])
def test_many_different_steps_are_bounded_closely_too(count: int) -> None:
    terms = {Term(0.05, 1.0 + i / 100): 5 for i in range(count)}
    loss = losses.composed(_key(terms), 1e-3)
    fine = losses.epsilon_at(loss, 1e-5)
    assert fine * (1 - 1e-3) <= epsilon_of_terms(terms, 1e-5) <= fine * (1 + 6e-3)


class Grids:
    """Stands in for `losses`: the epsilon, rounding and points that each grid in turn is to give."""

    def __init__(self, epsilons: list[float], rounding: float = 0.0, points: int = 1) -> None:
        self._left, self._rounding, self._points = list(epsilons), rounding, points
        self.intervals: list[float] = []
        self.deltas: list[float] = []

    def composed(self, key: object, interval: float) -> float:
        self.intervals.append(interval)
        return interval

    def rounding(self, key: object, loss: float) -> float:
        assert loss == self.intervals[-1]
        return self._rounding

    def epsilon_at(self, loss: float, delta: float) -> float:
        self.deltas.append(delta)
        return self._left.pop(0)

    def points_of_one(self, key: object, interval: float) -> int:
        return self._points


def refined(
    monkeypatch: pytest.MonkeyPatch, grids: Grids, kinds: int = 1, sigma: float = 1.0, delta: float = 1e-5
) -> float:
    monkeypatch.setattr(accounting, "losses", grids)
    key = tuple((Term(0.05, sigma + i / 1000), 60) for i in range(kinds))
    return _epsilon.__wrapped__(key, delta)


@pytest.mark.parametrize(
    ("kinds", "epsilons", "grids", "result"),
    [
        (1, [2.0, 1.5, 1.0074, 1.0, 0.9], 4, 1.0),  # 15 times 5e-4 is the change that is worth no more
        (1, [2.0, 1.5, 1.0076, 1.0, 0.9999, 0.9], 5, 0.9999),
        (1, [40.0, 20.151, 20.0, 19.9], 4, 19.9),  # relative to what is there
        (1, [40.0, 20.149, 20.0, 10.0], 3, 20.0),
        (8, [2.0, 1.5, 1.0074, 1.0, 0.9], 4, 1.0),
        (9, [2.0, 1.5, 1.074, 1.0, 0.9], 4, 1.0),  # ten times less exact where there are many steps
        (9, [2.0, 1.5, 1.0755, 1.0, 0.9999, 0.9], 5, 0.9999),
        (8, [2.0, 1.5, 1.07, 1.0, 0.9999, 0.9], 5, 0.9999),
        (1, [2.0, 1.5, 1.6, 0.5], 3, 1.5),  # the least of them: each is an upper bound
        (1, [0.0, 1.0], 1, 0.0),
        (1, [2.0, 1.0, 0.5, 0.4999, 0.3], 4, 0.4999),
        (1, [math.inf, 2.0, 1.9999, 1.0], 3, 1.9999),
        (1, [2.0 * 0.5**i for i in range(9)], 7, 2.0 * 0.5**6),  # and then it is enough
    ],
)
def test_the_grid_is_refined_until_that_changes_next_to_nothing(
    monkeypatch: pytest.MonkeyPatch, kinds: int, epsilons: list[float], grids: int, result: float
) -> None:
    source = Grids(epsilons)
    assert refined(monkeypatch, source, kinds) == result
    assert len(source.intervals) == grids
    first = source.intervals[0]
    assert source.intervals == pytest.approx([first / 4**i for i in range(grids)])
    key = tuple((Term(0.05, 1.0 + i / 1000), 60) for i in range(kinds))
    assert first == pytest.approx(_scale_guess(key, 1e-5) / 300)


@pytest.mark.parametrize(("points", "grids"), [(37_500, 2), (37_501, 1)])
def test_a_grid_of_too_many_points_is_not_refined(
    monkeypatch: pytest.MonkeyPatch, points: int, grids: int
) -> None:
    source = Grids([2.0, 1.9999, 1.0], points=points)
    refined(monkeypatch, source)
    assert len(source.intervals) == grids


@pytest.mark.parametrize(("sigma", "first"), [(1e9, 1e-7), (0.03, 1.0)])
def test_the_first_grid_is_neither_too_fine_nor_too_coarse(
    monkeypatch: pytest.MonkeyPatch, sigma: float, first: float
) -> None:
    source = Grids([0.0])
    refined(monkeypatch, source, sigma=sigma)
    assert source.intervals == [first]


def test_where_rounding_is_half_of_delta_the_grid_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    by_renyi = _epsilon_rdp(((Term(0.05, 1.0), 60),), 1e-5)
    for rounding in (5e-6, 9e-6):
        assert refined(monkeypatch, Grids([1.0], rounding=rounding), delta=1e-5) == by_renyi
    source = Grids([1.0, 1.0], rounding=4.9e-6)
    assert refined(monkeypatch, source, delta=1e-5) == 1.0
    assert source.deltas == pytest.approx([5.1e-6, 5.1e-6])


def test_renyi_dp_is_computed_in_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = []
    real = dp.rdp.RdpAccountant.compose

    def compose(self: dp.rdp.RdpAccountant, *arguments: object) -> object:
        levels.append(logging.getLogger("absl").level)
        return real(self, *arguments)

    monkeypatch.setattr(dp.rdp.RdpAccountant, "compose", compose)
    _epsilon_rdp.__wrapped__(((Term(0.1, 1.2), 3),), 1e-5)
    assert levels == [logging.ERROR]
