"""What a node tells of its size: one Gaussian of 20 units, inside the run's epsilon, and never below 1."""

from __future__ import annotations

import dataclasses
import math

import dp_accounting as dp
import numpy as np
import pytest
from scipy import stats

from fedtune.config.schema import Config, DataConfig, PrivacyConfig
from fedtune.errors import PrivacyError
from fedtune.privacy.accounting.epsilon import Term, epsilon_of_terms
from fedtune.privacy.mechanisms.counts import SIZE_NOISE, SizePlan, size_noise, size_plan
from fedtune.privacy.mechanisms.noise import Entropy
from fedtune.privacy.plan import PrivacyPlan, make_plan
from tests.support import plans
from tests.support.events import epsilon_of
from tests.support.golden import Golden
from tests.support.plans import event_of


def sizing(**changes: object) -> SizePlan:
    values = {"trust": "local", "unit": "record", "noise_multiplier": SIZE_NOISE, "delta": 1e-5}
    return SizePlan(**{**values, **changes})  # type: ignore[arg-type]


def private(**privacy: object) -> Config:
    config = Config(privacy=PrivacyConfig(unit="record", **privacy))  # type: ignore[arg-type]
    return dataclasses.replace(config, federation=dataclasses.replace(config.federation, evaluation="none"))


def likelihood(told: np.ndarray, scale: float) -> float:
    """P value of the chi-squared test that the noise around 10,000 has standard deviation `scale`."""
    statistic = float(np.sum((told - 10_000.0) ** 2)) / scale**2
    return 2 * min(stats.chi2.cdf(statistic, told.size), stats.chi2.sf(statistic, told.size))


@pytest.mark.slow
def test_a_count_has_the_noise_that_it_is_charged_for() -> None:
    plan = sizing()
    told = np.array([plan.told(10_000, Entropy.system()) for _ in range(600)], dtype=np.float64)
    assert abs(told.mean() - 10_000) < 5 * SIZE_NOISE / math.sqrt(told.size)
    assert likelihood(told, SIZE_NOISE) > 1e-6
    for wrong in (2 / 3, 3 / 2):
        assert likelihood(told, wrong * SIZE_NOISE) < 1e-6
    assert plan.terms(1) == {Term(1.0, SIZE_NOISE): 1}
    assert plan.terms(0) == {}


def test_one_unit_more_moves_the_count_by_one() -> None:
    plan = sizing(reproducible_noise=True)
    told = [plan.told(500 + more, plan.entropy("n")) for more in (0, 1, 7)]
    assert [one - told[0] for one in told] == [0, 1, 7]


@pytest.mark.slow
def test_a_size_is_never_told_below_one() -> None:
    assert {sizing().told(0, Entropy.system()) for _ in range(60)} >= {1}
    assert all(sizing().told(2, Entropy.system()) >= 1 for _ in range(60))


@pytest.mark.parametrize("trust", ["local", "distributed"])
def test_what_sizes_cost_is_inside_the_target(trust: str) -> None:
    plan = make_plan(private(trust=trust, epsilon=1.0), [900, 300, 500])
    assert plan.size_noise == SIZE_NOISE
    assert 0.97 < plan.epsilon() <= 1.0
    training = plan.terms(plan.num_rounds)
    assert training is not None
    assert epsilon_of_terms(training, plan.delta) < plan.epsilon()  # the size is in it
    event = event_of(plan, plan.num_rounds)
    assert any(
        isinstance(part, dp.SelfComposedDpEvent) and part.event == dp.GaussianDpEvent(SIZE_NOISE)
        for part in event.events  # type: ignore[attr-defined]
    )
    assert epsilon_of(event, plan.delta) == pytest.approx(plan.epsilon())
    # Before the first round the size is all that was told, and it is not nothing.
    assert plan.epsilon(0) == pytest.approx(epsilon_of_terms({Term(1.0, SIZE_NOISE): 1}, plan.delta))
    assert PrivacyPlan.from_json(plan.to_json()) == plan


def test_delta_is_below_one_over_the_largest_size_that_is_plausible(golden: Golden) -> None:
    few = make_plan(private(), [1, 1])
    assert few.delta < 1 / (1 + 4 * SIZE_NOISE)
    with pytest.raises(PrivacyError) as raised:
        make_plan(private(delta=0.01), [30, 20])
    assert "=" in str(raised.value)
    assert "130" in str(raised.value)
    golden(raised)
    assert make_plan(private(delta=0.005), [30, 20]).delta == 0.005


def test_sizes_have_noise_only_where_nobody_declares_them() -> None:
    assert size_noise(private()) == SIZE_NOISE
    plan = size_plan(private(delta=1e-6))
    assert plan is not None
    assert (plan.purpose, plan.num_rounds, plan.delta) == ("size", 1, 1e-6)
    for config in (
        dataclasses.replace(private(), data=DataConfig(declared_size=500)),
        dataclasses.replace(private(), data=DataConfig(public=True)),
        dataclasses.replace(private(), engine=dataclasses.replace(private().engine, name="deployment")),
        private(trust="none", epsilon=None),
        private(trust="central"),
    ):
        assert size_noise(config) == 0.0
        assert size_plan(config) is None


@pytest.mark.parametrize("wrong", [-1.0, math.inf, math.nan, "20"])
def test_a_plan_refuses_noise_on_sizes_that_has_no_meaning(wrong: object) -> None:
    with pytest.raises(PrivacyError) as raised:
        plans.local_plan(size_noise=wrong)
    assert raised.value.setting == "size_noise" and "size_noise" in str(raised.value)


def test_no_other_trust_model_tells_sizes_with_noise(golden: Golden) -> None:
    for make in (plans.central_plan, plans.public_plan):
        with pytest.raises(PrivacyError) as raised:
            make(size_noise=20.0)
        golden(raised)
