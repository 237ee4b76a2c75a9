"""Promises that said more than was kept; numbers as in PITFALLS.

35: unknown earlier spending was printed as none. 36: epsilon was stated towards the one who sees least. 37: a
budget was enforced by composing what was chosen adaptively as if it had been fixed (the adversary who breaks
that is in tests/privacy/accounting/test_filter.py). 38: epsilon was graded without delta.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize, stats

from fedtune.config.schema import (
    AdapterConfig,
    Config,
    DataConfig,
    FederationConfig,
    PrivacyConfig,
    TrainConfig,
)
from fedtune.errors import BudgetExhausted, PrivacyError
from fedtune.federation.client.policy import Permit, SiteData, SiteSettings
from fedtune.privacy.accounting.epsilon import Term, compose_terms, epsilon_of_terms
from fedtune.privacy.accounting.filter import fits
from fedtune.privacy.ledger.budget import PrivacyBudget
from fedtune.privacy.ledger.ledger import PrivacyLedger
from fedtune.privacy.mechanisms.discrete import DiscreteMechanism
from fedtune.privacy.mechanisms.noise import Entropy
from fedtune.privacy.plan import PrivacyPlan, make_plan
from fedtune.privacy.statement.facts import statement_json, statement_markdown, statement_picture
from tests.privacy.statement.test_statement import first_paragraph, record
from tests.regressions.test_pitfalls_privacy import release
from tests.support.golden import Golden
from tests.support.ledgers import charged
from tests.support.plans import local_plan


def distributed(nodes: int, **privacy: object) -> PrivacyPlan:
    """The default run (epsilon 8, rate 0.1, 12 rounds) under privacy=distributed."""
    settings = {"trust": "distributed", "epsilon": 8.0, "delta": 1e-4, **privacy}
    config = Config(
        privacy=PrivacyConfig(**settings),  # type: ignore[arg-type]
        train=TrainConfig(sample_rate=settings.pop("sample_rate", 0.1)),  # type: ignore[arg-type]
        federation=FederationConfig(num_rounds=12, evaluation="none"),
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
        federation=FederationConfig(num_rounds=1, evaluation="none"),
    )
    plan = make_plan(config, [1000] * nodes)
    known = 1
    share = plan.noise_multiplier / math.sqrt(plan.mechanism.honest_shares(plan))
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


def test_36_no_colluders_and_one_are_the_same_noise_and_more_are_more(golden: Golden) -> None:
    four = [distributed(4, max_colluders=colluders) for colluders in (None, 0, 1)]
    assert (
        len({plan.mechanism.honest_shares(plan) for plan in four}) == 1
        and four[0].settings()["max_colluders"] == 1
    )
    two = distributed(4, max_colluders=2)
    assert two.mechanism.honest_shares(two) == 2
    # secure aggregation cannot have one more colluder beside this dropout; the noise is the same
    three = distributed(3, max_dropouts=1)
    assert three.settings()["max_colluders"] == 0
    assert three.mechanism.honest_shares(three) == 1
    with pytest.raises(PrivacyError) as raised:
        distributed(2, max_dropouts=1)
    golden(raised)


def test_36_a_site_can_demand_more_colluders_than_the_default() -> None:
    def site(least: int) -> SiteSettings:
        return SiteSettings(
            federation="f", site="s", server="s", ca="c", key="k", ledger="l", audit_log="a",
            data=SiteData(name="d", declared_size=1000), budget_epsilon=9.0, budget_delta=1e-4,
            permit=Permit(min_colluders=least),
        )  # fmt: skip

    asked = Config(data=DataConfig(name="d"), adapter=AdapterConfig(name="head"))
    site(1).check(asked, distributed(4))
    site(1).check(asked, distributed(4, max_colluders=0))  # the noise covers one all the same
    site(2).check(asked, distributed(4, max_colluders=2))
    with pytest.raises(PrivacyError, match="privacy.max_colluders=1 is below the least permitted, 2"):
        site(2).check(asked, distributed(4))
    local = make_plan(Config(privacy=PrivacyConfig(epsilon=8.0, delta=1e-4)), [1000])
    site(2).check(asked, local)  # nothing is shared out there


# --- 35 ----------------------------------------------------------------------------------------------


def test_35_unknown_earlier_spending_is_written_as_unknown() -> None:
    """A real node keeps its ledger to itself; 1.214 was printed with 'none' beside it, and 8.286 was true."""
    silent = {"node": "north", "dataset": None, "releases": None, "epsilon": None, "delta": 1e-5}
    text = statement_markdown(record(ledger=[silent]))
    assert "| north | unknown | unknown | unknown | 1e-05 |" in text and "**Unknown**" in text
    assert "is not known here" in first_paragraph(text)
    assert "| none" not in text.split("## Other uses")[1].split("## Audit")[0]
    known = {"node": "south", "dataset": "d", "releases": 40, "epsilon": 8.286, "delta": 1e-5}
    both = first_paragraph(statement_markdown(record(ledger=[silent, known])))
    assert "epsilon is 8.29" in both and "is not known here" in both
    unnoised = statement_markdown(record(ledger=[{**known, "epsilon": None}]))
    assert "| 40 | infinite |" in unnoised


# --- 37 ----------------------------------------------------------------------------------------------


def test_37_what_is_chosen_after_a_look_is_not_composed_as_if_it_had_been_fixed(tmp_path: Path) -> None:
    """The composed privacy loss distribution of both runs fits the budget; the proven filter says no."""
    first = local_plan(sample_rate=1.0, local_steps=1, num_rounds=4, noise_multiplier=6.0)
    second = local_plan(sample_rate=0.1, local_steps=1, num_rounds=1, noise_multiplier=0.8)
    ledger = PrivacyLedger(tmp_path / "n.sqlite")
    both = compose_terms(first.terms(4), second.terms(1))
    limit = 1.02 * epsilon_of_terms(both, 1e-5)
    assert not fits(both, limit, 1e-5)
    ledger.set_budget(PrivacyBudget(limit, 1e-5))
    for round in range(1, 5):
        release(ledger, first, round=round)
    with pytest.raises(BudgetExhausted, match="over its budget"):
        release(ledger, second, run="run-2")
    assert charged(ledger, "d", "f") == first.terms(4)  # and nothing was charged for what was refused
    # one run that is fixed in advance, of the very same steps, is admitted whole
    alone = PrivacyLedger(tmp_path / "m.sqlite")
    alone.set_budget(PrivacyBudget(1.02 * epsilon_of_terms(first.terms(4), 1e-5), 1e-5))
    assert not fits(first.terms(4), 1.02 * epsilon_of_terms(first.terms(4), 1e-5), 1e-5)
    for round in range(1, 5):
        release(alone, first, round=round)


# --- 38 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("epsilon", "delta"), [(0.996, 1 / 8), (3.0, 1 / 6), (8.0, 1 / 6)])
def test_38_epsilon_is_not_graded_without_delta(epsilon: float, delta: float) -> None:
    text = statement_markdown(record("central", "client", epsilon=epsilon, delta=delta))
    assert "strong" not in first_paragraph(text) and "moderate" not in first_paragraph(text)
    assert "weak protection" in first_paragraph(text)


def test_38_nothing_is_praised_where_nothing_was_trained() -> None:
    refused = [{"node": node, "epsilon": 0.0, "delta": 1e-5, "releases": 0, "answers": 0} for node in "ab"]
    for trust in ("local", "none"):
        made = record(trust, per_node=refused)
        if trust == "local":
            made["privacy"]["epsilon"] = 0.0
        text = statement_markdown(made)
        assert first_paragraph(text).startswith("**Nothing was trained.**")
        for word in ("strong protection", "moderate protection", "weak protection", "How strong that is"):
            assert word not in text
        assert statement_json(made)["strength"] is None and statement_picture(made) is None
    refused[0]["answers"] = 1  # an answer about held-out data is a release too
    assert "Nothing was trained" not in statement_markdown(record(per_node=refused))
