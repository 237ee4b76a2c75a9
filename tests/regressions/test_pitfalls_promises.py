"""Promises that said more than was kept; numbers as in PITFALLS.

36: epsilon was stated towards the one who sees least.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize, stats

from fedtune.config.schema import Config, DataConfig, FederationConfig, PrivacyConfig, TrainConfig
from fedtune.errors import PrivacyError
from fedtune.federation.policy import Permit, SiteData, SiteSettings
from fedtune.privacy.accounting import Term, epsilon_of_terms
from fedtune.privacy.discrete import DiscreteMechanism
from fedtune.privacy.noise import Entropy
from fedtune.privacy.plan import PrivacyPlan
from fedtune.privacy.planning import make_plan


def distributed(nodes: int, **privacy: object) -> PrivacyPlan:
    """The default run (epsilon 8, rate 0.1, 12 rounds) under privacy=distributed."""
    settings = {"trust": "distributed", "epsilon": 8.0, "delta": 1e-4, **privacy}
    config = Config(
        privacy=PrivacyConfig(**settings),  # type: ignore[arg-type]
        train=TrainConfig(sample_rate=settings.pop("sample_rate", 0.1)),  # type: ignore[arg-type]
        federation=FederationConfig(num_rounds=12),
    )
    return make_plan(config, [1000] * nodes)


def analytic_gaussian(sigma: float, delta: float) -> float:
    """Epsilon of one Gaussian step without sampling, exactly (Balle and Wang 2018)."""

    def excess(epsilon: float) -> float:
        lower = math.exp(epsilon + stats.norm.logcdf(-0.5 / sigma - epsilon * sigma))
        return float(stats.norm.cdf(0.5 / sigma - epsilon * sigma) - lower - delta)

    return float(optimize.brentq(excess, 0.0, 100.0))


# --- 36 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nodes", "before"), [(2, 17.1), (4, 10.9)])
def test_36_what_is_promised_holds_towards_another_node_too(nodes: int, before: float) -> None:
    """What another node sees is the sum less the noise that it knows; the promised 8 was `before` there."""
    plan = distributed(nodes)
    assert 7.84 <= plan.epsilon() <= 8.0
    mechanism = DiscreteMechanism.for_plan(plan, 64)
    # all shares but one, in units of the gradient: at least the accounted noise
    left = mechanism.noise_std(nodes - 1) / plan.max_grad_norm
    assert plan.noise_multiplier <= left <= 1.01 * plan.noise_multiplier
    assert epsilon_of_terms({Term(0.1, left): 12}, 1e-4) <= 8.0
    # the mutant: all shares together are the accounted noise
    short = plan.noise_multiplier * math.sqrt((nodes - 1) / nodes)
    assert epsilon_of_terms({Term(0.1, short): 12}, 1e-4) == pytest.approx(before, rel=0.03)


@pytest.mark.parametrize("nodes", [2, 4])
def test_36_by_the_closed_form_of_one_step_without_sampling(nodes: int) -> None:
    config = Config(
        privacy=PrivacyConfig(trust="distributed", epsilon=8.0, delta=1e-4),
        train=TrainConfig(sample_rate=1.0),
        federation=FederationConfig(num_rounds=1),
    )
    plan = make_plan(config, [1000] * nodes)
    known = 1
    share = plan.noise_multiplier / math.sqrt(plan.honest_shares())
    assert analytic_gaussian(share * math.sqrt(nodes - known), 1e-4) == pytest.approx(8.0, rel=0.01)
    towards_server = analytic_gaussian(share * math.sqrt(nodes), 1e-4)
    assert plan.epsilon_towards_server() == pytest.approx(towards_server, rel=0.01)
    assert towards_server < 0.92 * 8.0


def test_36_the_noise_that_a_node_does_not_know_is_really_there() -> None:
    plan = distributed(2)
    mechanism = DiscreteMechanism.for_plan(plan, 50_000)
    other = mechanism.decode(mechanism.share(np.zeros(50_000), Entropy.system()))
    # with two nodes it is all in the other one's share; 5.5 standard errors
    tolerance = 5.5 / math.sqrt(2 * 50_000)
    assert np.std(other) > plan.noise_std() * (1 - tolerance)
    assert np.std(other) / math.sqrt(2) < plan.noise_std() * (1 - tolerance)  # the share before


def test_36_no_colluders_and_one_are_the_same_noise_and_more_are_more() -> None:
    four = [distributed(4, max_colluders=colluders) for colluders in (None, 0, 1)]
    assert len({plan.honest_shares() for plan in four}) == 1 and four[0].max_colluders == 1
    assert distributed(4, max_colluders=2).honest_shares() == 2
    # secure aggregation cannot have one more colluder beside this dropout; the noise is the same
    assert distributed(3, max_dropouts=1).max_colluders == 0
    assert distributed(3, max_dropouts=1).honest_shares() == 1
    with pytest.raises(PrivacyError, match="a node knows its own noise"):
        distributed(2, max_dropouts=1)


def test_36_a_site_can_demand_more_colluders_than_the_default() -> None:
    def site(least: int) -> SiteSettings:
        return SiteSettings(
            federation="f", site="s", server="s", ca="c", key="k", ledger="l", audit_log="a",
            data=SiteData(name="d", declared_size=1000), budget_epsilon=9.0, budget_delta=1e-4,
            permit=Permit(min_colluders=least),
        )  # fmt: skip

    asked = Config(data=DataConfig(name="d"))
    site(1).check(asked, distributed(4))
    site(1).check(asked, distributed(4, max_colluders=0))  # the noise covers one all the same
    site(2).check(asked, distributed(4, max_colluders=2))
    with pytest.raises(PrivacyError, match="privacy.max_colluders=1 is below the least permitted, 2"):
        site(2).check(asked, distributed(4))
    local = make_plan(Config(privacy=PrivacyConfig(epsilon=8.0, delta=1e-4)), [1000])
    site(2).check(asked, local)  # nothing is shared out there
