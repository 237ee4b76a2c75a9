"""Epsilon against closed forms, against other people's accountants, and against what it must never do."""

from __future__ import annotations

import itertools
import math

import dp_accounting as dp
import numpy as np
import pytest
from scipy import optimize, stats

from fedtune.errors import PrivacyError
from fedtune.privacy.accounting import epsilon as accounting
from fedtune.privacy.accounting.epsilon import (
    Term,
    compose_terms,
    conversions,
    deltas_of_terms,
    epsilon_of_terms,
    epsilon_on_grid,
    epsilon_rdp_of_terms,
)
from tests.support.events import epsilon_of, epsilon_rdp, terms_of
from tests.support.work import Points

# Rates, noise and steps from single shots to long trainings, with two deltas: 50 settings.
GRID = [
    *itertools.product((0.01, 0.05, 0.3), (0.7, 1.0, 2.0, 5.0), (12, 300), (1e-5, 1e-7)),
    (0.001, 0.6, 5000, 1e-6),
    (1.0, 8.0, 60, 1e-5),
]


def sampled(rate: float, sigma: float, steps: int) -> dp.DpEvent:
    return dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(sigma)), steps)


def delta_of(event: dp.DpEvent, epsilon: float) -> float:
    """One point of the curve of deltas; without privacy 1."""
    terms = terms_of(event)
    return 1.0 if terms is None else float(deltas_of_terms(terms, np.array([epsilon]))[0])


def analytic_gaussian(mu: float, delta: float) -> float:
    """Epsilon of a Gaussian mechanism of sensitivity over noise `mu`, exactly (Balle and Wang 2018)."""

    def excess(epsilon: float) -> float:
        upper = stats.norm.cdf(mu / 2 - epsilon / mu)
        lower = math.exp(epsilon + stats.norm.logcdf(-mu / 2 - epsilon / mu))
        return float(upper - lower - delta)

    return 0.0 if excess(0.0) <= 0 else float(optimize.brentq(excess, 0.0, 500.0, xtol=1e-12))


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0, 20.0])
@pytest.mark.parametrize("steps", [1, 7, 100])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-8])
def test_without_sampling_it_is_the_analytic_gaussian_mechanism(
    sigma: float, steps: int, delta: float
) -> None:
    exact = analytic_gaussian(math.sqrt(steps) / sigma, delta)
    ours = epsilon_of(dp.SelfComposedDpEvent(dp.GaussianDpEvent(sigma), steps), delta)
    assert exact * (1 - 1e-9) <= ours <= exact * 1.002 + 1e-6


@pytest.mark.parametrize("rate", [0.01, 0.2])
def test_one_sampled_step_is_the_subsampled_gaussian_exactly(rate: float) -> None:
    sigma, delta = 0.8, 1e-4
    # Removal of the unit: P = (1-q) N(0) + q N(1), Q = N(0), over the outputs where P > e^eps Q.
    exact = optimize.brentq(
        lambda epsilon: hockey_stick(rate, sigma, epsilon) - delta, 1e-6, 50.0, xtol=1e-12
    )
    ours = epsilon_of(sampled(rate, sigma, 1), delta)
    assert exact * (1 - 1e-9) <= ours <= exact * 1.002


def hockey_stick(rate: float, sigma: float, epsilon: float) -> float:
    inside = (math.exp(epsilon) - (1 - rate)) / rate
    edge = sigma**2 * math.log(inside) + 0.5  # the output at which P = e^eps Q
    mixture = (1 - rate) * stats.norm.sf(edge / sigma) + rate * stats.norm.sf((edge - 1) / sigma)
    return float(mixture - math.exp(epsilon) * stats.norm.sf(edge / sigma))


def test_the_grid_has_fifty_settings() -> None:
    assert len(GRID) == 50


@pytest.mark.slow
@pytest.mark.parametrize(("rate", "sigma", "steps", "delta"), GRID)
def test_agrees_with_opacus_prv_and_stays_below_rdp(
    rate: float, sigma: float, steps: int, delta: float
) -> None:
    check_against_others(rate, sigma, steps, delta)


@pytest.mark.parametrize(("rate", "sigma", "steps", "delta"), GRID[::12])
def test_agrees_with_opacus_prv_and_stays_below_rdp_in_short(
    rate: float, sigma: float, steps: int, delta: float
) -> None:
    check_against_others(rate, sigma, steps, delta)


def check_against_others(rate: float, sigma: float, steps: int, delta: float) -> None:
    prv = pytest.importorskip("opacus.accountants").PRVAccountant()
    prv.history = [(sigma, rate, steps)]
    ours = epsilon_of(sampled(rate, sigma, steps), delta)
    # PRV's own error bound is absolute, 0.01 by default; ask for a hundredth of the value.
    theirs = prv.get_epsilon(delta, eps_error=max(min(0.01, ours / 200), 1e-4))
    assert abs(ours - theirs) <= 0.02 * theirs
    assert ours <= epsilon_rdp(sampled(rate, sigma, steps), delta)
    # The same comparison convicts noise that is off by half.
    for wrong in (2 / 3, 3 / 2):
        assert abs(epsilon_of(sampled(rate, sigma * wrong, steps), delta) - theirs) > 0.02 * theirs


@pytest.mark.parametrize("interval", [1e-3, 1e-2, 1e-1])
def test_a_coarser_grid_is_never_below_a_finer_one(interval: float) -> None:
    terms = {Term(0.05, 1.0): 60}
    assert epsilon_on_grid(terms, 1e-5, interval) >= epsilon_on_grid(terms, 1e-5, interval / 7) - 1e-9


def test_a_typical_run_is_little_work(pld_points: Points) -> None:
    epsilon_of(sampled(0.05, 1.1017, 60), 1e-5)
    assert 0 < pld_points.number < 100_000  # well within a second


def test_different_steps_compose_as_one() -> None:
    twice = dp.ComposedDpEvent([sampled(0.05, 1.0, 30), sampled(0.05, 1.0, 30)])
    assert epsilon_of(twice, 1e-5) == epsilon_of(sampled(0.05, 1.0, 60), 1e-5)
    mixed = dp.ComposedDpEvent([sampled(0.05, 1.0, 30), dp.GaussianDpEvent(4.0)])
    parts = epsilon_of(sampled(0.05, 1.0, 30), 5e-6) + epsilon_of(dp.GaussianDpEvent(4.0), 5e-6)
    assert epsilon_of(sampled(0.05, 1.0, 30), 1e-5) < epsilon_of(mixed, 1e-5) < parts
    assert epsilon_of(mixed, 1e-5) <= epsilon_rdp(mixed, 1e-5)


def test_a_replaced_unit_costs_more_than_an_added_one_and_less_than_two() -> None:
    added = epsilon_of_terms({Term(0.05, 1.0): 60}, 1e-5)
    replaced = epsilon_of_terms({Term(0.05, 1.0, replace=True): 60}, 1e-5)
    assert added < replaced < epsilon_of_terms({Term(1.0, 0.5): 60}, 1e-5)
    exact = analytic_gaussian(2.0 / 3.0, 1e-5)  # replaced: twice the sensitivity
    assert epsilon_of_terms({Term(1.0, 3.0, replace=True): 1}, 1e-5) == pytest.approx(exact, rel=2e-3)
    assert replaced <= epsilon_rdp_of_terms({Term(0.05, 1.0, replace=True): 60}, 1e-5)


def test_delta_and_epsilon_invert_each_other() -> None:
    event = sampled(0.05, 1.0, 60)
    for epsilon in (0.5, 2.0, 4.0):
        delta = delta_of(event, epsilon)
        assert epsilon_of(event, delta) == pytest.approx(epsilon, rel=5e-3)
    assert delta_of(dp.NonPrivateDpEvent(), 5.0) == 1.0
    assert delta_of(dp.NoOpDpEvent(), 0.0) == 0.0


def test_where_rounding_could_matter_rdp_takes_over() -> None:
    event = sampled(0.05, 1.0, 60)
    tiny = epsilon_of(event, 1e-14)
    assert tiny == epsilon_rdp(event, 1e-14)
    assert epsilon_of(event, 1e-9) < tiny < math.inf


def test_nothing_costs_nothing_and_no_noise_costs_everything() -> None:
    assert epsilon_of(dp.NoOpDpEvent(), 1e-5) == 0.0
    assert epsilon_of(dp.SelfComposedDpEvent(dp.GaussianDpEvent(1.0), 0), 1e-5) == 0.0
    assert epsilon_of(dp.PoissonSampledDpEvent(0.0, dp.GaussianDpEvent(1.0)), 1e-5) == 0.0
    for event in (dp.NonPrivateDpEvent(), dp.GaussianDpEvent(0.0), sampled(0.1, 0.0, 3)):
        assert epsilon_of(event, 1e-5) == math.inf
        assert epsilon_rdp(event, 1e-5) == math.inf
    assert terms_of(dp.ComposedDpEvent([sampled(0.1, 1.0, 3), dp.NonPrivateDpEvent()])) is None
    assert compose_terms({Term(0.1, 1.0): 3}, None) is None
    assert compose_terms({Term(0.1, 1.0): 3}, {Term(0.1, 1.0): 4}) == {Term(0.1, 1.0): 7}


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 2.0, math.nan, math.inf, True, "1e-5"])
def test_a_delta_without_meaning_is_refused(delta: float) -> None:
    for bound in (epsilon_of, epsilon_rdp):
        with pytest.raises(PrivacyError, match="delta"):
            bound(sampled(0.05, 1.0, 10), delta)


def test_swapped_rate_and_noise_are_refused() -> None:
    with pytest.raises(PrivacyError, match="sample_rate"):
        epsilon_of_terms({Term(1.5, 0.05): 1}, 1e-5)


def test_conversions_are_exact_without_sampling_and_say_so_otherwise() -> None:
    exact = conversions({Term(1.0, 4.0): 8})
    assert (exact.rho, exact.mu) == pytest.approx((8 / 32, math.sqrt(8) / 4))
    assert exact.rho_is == exact.mu_is == "exact"
    # The Gaussian DP parameter gives back the epsilon that the loss distribution has.
    assert analytic_gaussian(exact.mu, 1e-5) == pytest.approx(
        epsilon_of_terms({Term(1.0, 4.0): 8}, 1e-5), rel=2e-3
    )
    loose = conversions({Term(0.05, 1.0): 60})
    assert loose.rho == 30.0 and "upper bound" in loose.rho_is
    assert loose.mu == pytest.approx(0.05 * math.sqrt(60 * (math.e - 1))) and "not a bound" in loose.mu_is
    assert conversions(None).rho == conversions(None).mu == math.inf
    assert conversions({Term(1.0, 4.0, replace=True): 8}).rho == 4 * exact.rho


def test_zcdp_bound_holds_for_the_sampled_mechanism() -> None:
    terms, delta = {Term(0.05, 1.0): 60}, 1e-5
    rho = conversions(terms).rho
    assert epsilon_of_terms(terms, delta) <= rho + 2 * math.sqrt(rho * math.log(1 / delta))


def test_results_are_kept_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    terms = {Term(0.05, 1.234): 60}
    first = epsilon_of_terms(terms, 1e-5)
    monkeypatch.setattr(accounting, "losses", None)  # a second computation would fail
    assert epsilon_of_terms(dict(reversed(terms.items())), 1e-5) == first
