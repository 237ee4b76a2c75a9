"""Grid, range and bounds of the discrete mechanism, recomputed from the formulas of the argument."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import dp_accounting as dp
import numpy as np
import pytest

from fedtune.errors import PrivacyError
from fedtune.privacy.mechanisms.discrete import DiscreteMechanism, _unevenness, sum_divergence
from fedtune.privacy.mechanisms.noise import Entropy, discrete_gaussian
from tests.support.events import distributed_epsilon, epsilon_of
from tests.support.golden import Golden
from tests.support.plans import distributed_plan, local_plan


def mechanism(**changes: Any) -> DiscreteMechanism:
    settings = {
        "dimension": 5_000, "nodes": 6, "shares": 4, "noise_multiplier": 1.1, "max_grad_norm": 0.5,
        "sample_rate": 0.05, "expected_batch_size": 200.0,
    }  # fmt: skip
    return DiscreteMechanism.design(**{**settings, **changes})


def grid(
    dimension: int, nodes: int, shares: int, noise: float, clip: float, batch: float
) -> tuple[int, float]:
    """(log2 of a node's noise, steps per unit of the gradient) of the finest grid that fits into 32 bits."""
    units = batch + 10 * math.sqrt(batch) + 50
    for log2_std in range(24, 5, -1):
        std = 2.0**log2_std
        # (scale * clip * (1 + 2^-10) + sqrt(d)) * noise = sqrt(h std^2 - 4^2), solved for scale * clip
        steps = (math.sqrt(shares * std**2 - 16) / noise - math.sqrt(dimension)) / (1 + 2**-10)
        if units * steps + 12 * std * math.sqrt(nodes) + nodes <= 2**31 - 1:
            return log2_std, steps / clip
    raise AssertionError("no grid fits")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dimension": 1, "expected_batch_size": 0.01, "nodes": 1, "shares": 1, "noise_multiplier": 20.0},
        {"dimension": 300_000, "nodes": 100, "shares": 60, "expected_batch_size": 7_000.0},
        {"noise_multiplier": 0.3, "expected_batch_size": 30_000.0, "nodes": 40, "shares": 2},
        {"noise_multiplier": 900.0, "nodes": 2, "shares": 1, "max_grad_norm": 1e3},
        {"max_grad_norm": 1e9},
        {"noise_multiplier": 0.2, "dimension": 4, "expected_batch_size": 3e5, "max_grad_norm": 1e-3},
    ],
)
def test_the_grid_is_the_finest_whose_range_holds_every_sum(changes: dict[str, Any]) -> None:
    made = mechanism(**changes)
    settings = {"expected_batch_size": 200.0, **changes}
    log2_std, scale = grid(
        made.dimension, made.nodes, made.shares, made.noise_multiplier, made.max_grad_norm,
        settings["expected_batch_size"],
    )  # fmt: skip
    assert made.log2_std == log2_std
    assert scale * (1 - 1e-11) <= made.scale <= scale * (1 - 1e-13)  # a hair below, on the safe side
    assert made.std == 2.0**log2_std
    assert made.sensitivity == pytest.approx(
        made.scale * made.max_grad_norm * (1 + 1 / 1024) + math.sqrt(made.dimension), rel=1e-14
    )
    multiplier = math.sqrt(made.shares * 4.0**log2_std - 16) / made.sensitivity
    assert made.effective_noise_multiplier == pytest.approx(multiplier, rel=1e-14)
    assert made.effective_noise_multiplier > made.noise_multiplier
    wanted = made.scale * made.noise_multiplier * made.max_grad_norm
    assert made.inflation == pytest.approx(math.sqrt(made.shares) * made.std / wanted, rel=1e-14)
    assert made.noise_std(3) == pytest.approx(math.sqrt(3) * made.std / made.scale, rel=1e-14)


def fits(batch: float, **changes: Any) -> int | None:
    """log2 of the noise that `grid` finds."""
    made = {"dimension": 5_000, "nodes": 6, "shares": 4, "noise_multiplier": 1.1, **changes}
    try:
        return grid(made["dimension"], made["nodes"], made["shares"], made["noise_multiplier"], 0.5, batch)[0]
    except AssertionError:
        return None


@pytest.mark.parametrize(
    ("low", "high", "changes"),
    [
        (1e-3, 400.0, {"noise_multiplier": 4.0}),  # where units that were not expected are most
        (100.0, 2_000.0, {}),
        (
            10.0,
            600.0,
            {"nodes": 3_000, "shares": 2, "noise_multiplier": 3.0},
        ),  # where noise takes up the range
        (1e4, 1e8, {"dimension": 1, "nodes": 1, "shares": 1, "noise_multiplier": 0.04}),  # where nothing fits
    ],
)
def test_the_grid_changes_at_the_batch_size_of_the_formula(
    low: float, high: float, changes: dict[str, Any]
) -> None:
    if fits(high, **changes) is not None:
        high = next(b for b in np.geomspace(low, high, 500) if fits(b, **changes) != fits(low, **changes))
    coarser = fits(high, **changes)
    while high / low > 1 + 1e-7:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle, **changes) == coarser else (middle, high)
    assert mechanism(expected_batch_size=low, **changes).log2_std == fits(low, **changes)
    if coarser is None:
        assert fits(low, **changes) == 6  # 64 steps are enough for the argument: t is below 1e-100
        with pytest.raises(PrivacyError, match="does not fit into 32 bits"):
            mechanism(expected_batch_size=high, **changes)
    else:
        assert (
            mechanism(expected_batch_size=high, **changes).log2_std == coarser < (fits(low, **changes) or 0)
        )


def test_where_no_grid_fits_none_is_made_up(golden: Golden) -> None:
    # One step per unit would look fine here: 64 steps of noise are 1.16 times the multiplier.
    with pytest.raises(PrivacyError) as raised:
        mechanism(dimension=1, nodes=1, shares=1, noise_multiplier=55.0, expected_batch_size=2e10)
    assert "32" in str(raised.value)
    golden(raised)


def test_most_noise_is_that_of_the_sampler() -> None:
    assert mechanism(expected_batch_size=1.0, nodes=1, shares=1, noise_multiplier=30.0).log2_std == 24


@pytest.mark.parametrize("name", ["noise_multiplier", "max_grad_norm"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_what_has_no_meaning_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(PrivacyError, match=f"needs a finite {name} above 0"):
        mechanism(**{name: value})


def test_too_coarse_a_grid_is_refused_and_one_just_fine_enough_is_not() -> None:
    """Rounding costs sqrt(d): where that is more than a quarter of the noise, nothing is made."""
    inflations = []
    for dimension in np.unique(np.geomspace(1e9, 1e14, 200).astype(np.int64)).tolist():
        try:
            inflations.append(mechanism(dimension=dimension).inflation)
        except PrivacyError:
            break
    assert 1.2 < inflations[-1] <= 1.25 and inflations == sorted(inflations)


def test_a_mechanism_without_a_grid_is_infinitely_noisy() -> None:
    for scale in (0.0, -1.0):
        assert dataclasses.replace(mechanism(), scale=scale).inflation == math.inf


@pytest.mark.parametrize("std", [0.3, 0.6, 1.0])
def test_unevenness_bounds_the_series_of_poisson_summation(std: float) -> None:
    series = 2 * sum(math.exp(-2 * math.pi**2 * std**2 * m**2) for m in range(1, 20))
    # The series of squares is below the geometric one, which has the same first term.
    assert series <= _unevenness(std) <= series / (1 - math.exp(-2 * math.pi**2 * std**2)) * (1 + 1e-12)


@pytest.mark.parametrize("shares", [1, 2, 5])
def test_the_divergence_of_a_sum_is_one_term_for_each_further_share(shares: int) -> None:
    terms = [2 * math.atanh(_unevenness(0.5 * math.sqrt(k / (k + 1)))) for k in range(1, 6)]
    assert sum_divergence(0.5, shares) == pytest.approx(sum(terms[: shares - 1]), rel=1e-12)
    assert sum_divergence(0.5, 1) == 0.0


def test_slack_is_that_of_every_coordinate_in_every_round() -> None:
    made = dataclasses.replace(mechanism(), log2_std=-1)  # far too little noise: t is then not nothing
    t1, t2 = sum_divergence(0.5, 4), 2 * math.atanh(_unevenness(4.0))
    assert made.slack(30) == pytest.approx(30 * 5_000 * (t1 + t2), rel=1e-12, abs=0.0)
    sole = dataclasses.replace(mechanism(), shares=1)
    assert sole.slack(30) == pytest.approx(30 * 5_000 * t2, rel=1e-12, abs=0.0) and t2 > 0.0


def test_the_mechanism_of_a_plan_counts_on_honest_nodes_that_arrive() -> None:
    plan = distributed_plan(nodes=8, max_dropouts=2, max_colluders=1)
    made = DiscreteMechanism.for_plan(plan, 300)
    assert made == DiscreteMechanism.design(
        dimension=300, nodes=8, shares=5, noise_multiplier=plan.noise_multiplier,
        max_grad_norm=plan.max_grad_norm, sample_rate=plan.sample_rate,
        expected_batch_size=plan.expected_batch_size(),
    )  # fmt: skip
    with pytest.raises(PrivacyError, match="trust=distributed"):
        DiscreteMechanism.for_plan(local_plan(), 300)


def test_encoding_rounds_to_the_nearest_step_and_clamps_where_noise_could_wrap() -> None:
    made = mechanism(dimension=6)
    limit = 2**31 - 1 - math.ceil(12 * made.std * math.sqrt(6))
    steps = np.array([0.4, 0.6, -0.6, 3.0, 1e12, -1e12])
    assert made.encode(steps / made.scale).tolist() == [0, 1, -1, 3, limit, -limit]
    assert made.encode(steps / made.scale).dtype == np.int64


def test_a_share_is_the_encoded_sum_and_the_exact_noise_modulo_two_to_the_32() -> None:
    made = mechanism(dimension=300)
    clipped = np.random.default_rng(0).normal(size=300)
    share = made.share(clipped, Entropy.reproducible(1, "n", 2, 3))
    noise = discrete_gaussian(300, made.log2_std, Entropy.reproducible(1, "n", 2, 3))
    assert share.dtype == np.uint32
    assert share.tolist() == ((made.encode(clipped) + noise) % 2**32).tolist()
    signed = [k - 2**32 if k >= 2**31 else k for k in share.tolist()]
    assert made.decode(share) == pytest.approx(np.array(signed) / made.scale, rel=1e-14)


def test_epsilon_is_that_of_the_steps_with_what_the_integers_cost_on_top() -> None:
    made, rounds, delta = dataclasses.replace(mechanism(), log2_std=4, dimension=1), 20, 1e-5
    made = dataclasses.replace(made, scale=made.std * 2 / 1.1 / 0.5)

    def cost(multiplier: float, at: float) -> float:
        step = dp.PoissonSampledDpEvent(0.05, dp.GaussianDpEvent(multiplier))
        return epsilon_of(dp.SelfComposedDpEvent(step, rounds), at)

    found = distributed_epsilon(made, rounds, delta)
    slack = made.slack(rounds)
    assert found["epsilon_ideal"] == cost(1.1, delta)
    effective = made.effective_noise_multiplier
    assert found["epsilon"] == pytest.approx(cost(effective, delta * math.exp(-slack)) + 2 * slack)
    assert slack < 1e-100
    # Renyi DP at integer orders, of all shares' noise over the sensitivity, without the r of step 4.
    accountant = dp.rdp.RdpAccountant(orders=[*range(2, 129), 160, 192, 256, 512])
    multiplier = math.sqrt(4 * made.std**2) / made.sensitivity
    step = dp.PoissonSampledDpEvent(0.05, dp.GaussianDpEvent(multiplier))
    accountant.compose(step, rounds)
    assert found["epsilon_rdp"] == pytest.approx(accountant.get_epsilon(delta), rel=1e-12)


def test_slack_is_paid_twice_in_epsilon_and_once_in_delta(monkeypatch: pytest.MonkeyPatch) -> None:
    made = mechanism()
    monkeypatch.setattr(DiscreteMechanism, "slack", lambda self, rounds: 0.01 * rounds)
    found = distributed_epsilon(made, 10, 1e-5)
    step = dp.PoissonSampledDpEvent(0.05, dp.GaussianDpEvent(made.effective_noise_multiplier))
    event = dp.SelfComposedDpEvent(step, 10)
    assert found["epsilon"] == pytest.approx(epsilon_of(event, 1e-5 * math.exp(-0.1)) + 0.2, rel=1e-12)
    accountant = dp.rdp.RdpAccountant(orders=[*range(2, 129), 160, 192, 256, 512])
    multiplier = math.sqrt(4) * made.std / made.sensitivity
    accountant.compose(dp.PoissonSampledDpEvent(0.05, dp.GaussianDpEvent(multiplier)), 10)
    assert found["epsilon_rdp"] == pytest.approx(
        accountant.get_epsilon(1e-5 * math.exp(-0.1)) + 0.2, rel=1e-12
    )
