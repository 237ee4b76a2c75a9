"""From ledgers and results to the record's numbers: the larger count, every node, and no guess."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedtune.config.files import state_dir
from fedtune.cost.meter import EnergyReading
from fedtune.federation.events import NodeInfo
from fedtune.privacy.ledger.simulation import simulation_ledger
from fedtune.privacy.plan import PrivacyPlan
from fedtune.runs import measures
from fedtune.training.evaluation import score
from tests.support.plans import central_plan, distributed_plan, local_plan, plan_of, public_plan

PLAN = plan_of(
    "local", unit="record", sample_rate=0.1, local_steps=2, num_rounds=5, noise_multiplier=1.0,
    max_grad_norm=1.0, declared_size=1000, delta=1e-4,
)  # fmt: skip


def result(plan: PrivacyPlan = PLAN, names: tuple[str, ...] = ("a", "b"), **releases: int) -> Any:
    nodes = [NodeInfo(name, number, 100) for number, name in enumerate(names)]
    return SimpleNamespace(run="run", plan=plan, nodes=nodes, releases=releases, answers={})


def shard(node: str) -> Any:
    return SimpleNamespace(node=node, declared_size=100, dataset="data", identity=f"print-{node}")


def reserve(node: str, run: str, rounds: int, plan: Any = PLAN) -> None:
    """Releases of `node` in the ledger, reserved and never committed: the node crashed each time."""
    ledger = simulation_ledger(state_dir() / "ledgers")
    for round in range(1, rounds + 1):
        ledger.reserve(
            dataset="data", fingerprint=f"print-{node}", node=node, run=run, round=round,
            plan=plan if plan.purpose == "evaluation" else plan.for_shard(100), public=True,
        )  # fmt: skip


def test_the_larger_of_two_counts_is_charged_whoever_counted() -> None:
    reserve("a", "run", 3)
    reserve("b", "run", 1)
    a, b = measures.node_privacy([shard("a"), shard("b")], result(a=2, b=4))
    assert (a.releases, b.releases) == (3, 4)
    assert a.epsilon == pytest.approx(PLAN.for_shard(100).epsilon(3))
    assert b.epsilon == pytest.approx(PLAN.for_shard(100).epsilon(4))
    assert a.epsilon_rdp is not None and a.epsilon is not None and a.epsilon < a.epsilon_rdp


def test_answers_about_held_out_data_are_counted_apart_and_composed() -> None:
    plan = dataclasses.replace(PLAN, evaluation_share=0.2, evaluation_answers=2, evaluation_noise=3.0)
    reserve("a", "run", 2, plan)
    reserve("a", "run", 1, plan.evaluation())
    asked = result(plan, names=("a",), a=2)
    asked.answers["a"] = 2  # one was asked for and never reached the ledger: it counts
    (a,) = measures.node_privacy([shard("a")], asked)
    assert (a.releases, a.answers, a.total_releases) == (2, 2, 3)
    assert a.epsilon == pytest.approx(plan.epsilon(2, 2))
    assert a.epsilon > plan.epsilon(2, 1) > plan.epsilon(2)


def test_other_runs_count_in_the_total_and_not_in_this_run() -> None:
    reserve("a", "earlier", 4)
    reserve("a", "run", 2)
    (a,) = measures.node_privacy([shard("a")], result(names=("a",), a=2))
    assert (a.releases, a.total_releases) == (2, 6)
    assert a.epsilon == pytest.approx(PLAN.for_shard(100).epsilon(2))
    assert a.total_epsilon is not None and a.epsilon is not None
    assert a.total_epsilon > 1.2 * a.epsilon


def test_a_node_that_is_gone_after_a_resume_keeps_what_it_released() -> None:
    reserve("b", "run", 2)
    found = measures.node_privacy([shard("a"), shard("b")], result(names=("a",), a=1))
    assert {one.node: one.releases for one in found} == {"a": 1, "b": 2}


def test_of_a_node_on_another_machine_only_the_run_is_known() -> None:
    (a,) = measures.node_privacy([], result(names=("a",), a=3))
    assert a.epsilon == pytest.approx(PLAN.for_shard(100).epsilon(3))
    assert (a.dataset, a.fingerprint, a.total_epsilon, a.total_releases) == (None, None, None, None)


@pytest.mark.parametrize("make", [local_plan, distributed_plan])
def test_noise_that_drowns_everything_is_said_with_the_epsilon_that_would_do(make: Any) -> None:
    """Held to the definition: noise as it is drawn, over all steps, beside gradients that point one way."""
    settings = {"num_rounds": 60, "nodes": 2, "declared_size": 100, "max_grad_norm": 0.9}
    drowned = make(**settings, noise_multiplier=400.0)
    generator, numbers = np.random.default_rng(0), 1000
    noise = drowned.mechanism.noise_on_average(drowned, {"a": 100, "b": 100})
    drawn = generator.normal(0.0, noise, (drowned.steps(), numbers)).sum(axis=0)
    ratio = np.linalg.norm(drawn) / (drowned.steps() * 0.9)
    assert ratio > 2
    said = measures.noise_line(result(drowned), numbers)
    assert said is not None
    told = float(said.split(" times as long")[0].rsplit(" ", 1)[1])
    assert told == pytest.approx(ratio, rel=0.1)
    enough = float(said.split("about epsilon ")[1].split(" ")[0])
    assert enough == pytest.approx(drowned.epsilon() * ratio, rel=0.1)
    weaker = make(**settings, noise_multiplier=400.0 / ratio / 1.1)
    assert measures.noise_line(result(weaker), numbers) is None


@pytest.mark.parametrize("plan", [public_plan(), central_plan(noise_multiplier=900.0)])
def test_nothing_is_said_of_noise_that_no_node_adds(plan: PrivacyPlan) -> None:
    assert measures.noise_line(result(plan), 10**6) is None


def test_a_node_that_was_never_asked_has_spent_nothing() -> None:
    _, b = measures.node_privacy([shard("a"), shard("b")], result(a=1))
    assert b.releases == 0 and b.epsilon == 0.0


def test_guessing_the_commonest_label_and_the_sites_sizes_are_beside_the_accuracy() -> None:
    labels = np.array([0, 0, 0, 1])
    sites = np.array(["x", "x", "y", "y"])
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3], [0.1, 0.9]], dtype=np.float32)
    test: Any = SimpleNamespace(labels=labels, sites=sites, label_names=("n", "p"))
    found = measures.metrics(score(probabilities, labels, sites), test)
    assert found.majority_rate == 0.75 and found.num_records == 4
    assert found.per_site == {
        "x": {"accuracy": 0.5, "num_records": 2},
        "y": {"accuracy": 1.0, "num_records": 2},
    }


def test_without_privacy_there_is_no_accountant() -> None:
    none = plan_of(
        "none", unit="record", sample_rate=0.1, local_steps=2, num_rounds=5, noise_multiplier=0.0,
        max_grad_norm=float("inf"), declared_size=1000, delta=0.0,
    )  # fmt: skip
    assert measures.accountant(none) is None and none.mechanism.describe(none) == "none"
    (a,) = measures.node_privacy([shard("a")], result(none, ("a",), a=3))
    assert a.epsilon is None and a.epsilon_rdp is None and a.releases == 3
    named = str(measures.accountant(PLAN))
    assert named.startswith("PLD (fedtune ") and "checked against dp-accounting" in named
    assert "record" in PLAN.mechanism.describe(PLAN)


def test_the_energy_of_a_resumed_run_is_unknown_and_not_that_of_its_last_session() -> None:
    whole = EnergyReading(0.002, "estimate", 60.0, 2.0)
    assert measures.energy_of_run(whole, attempt=1) is whole
    part = measures.energy_of_run(whole, attempt=2)
    assert part.kwh is None and "2 Wh since its last start" in part.note
