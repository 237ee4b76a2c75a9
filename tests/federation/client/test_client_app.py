"""What a node does with a request: it checks, charges, trains, and tells no more than it must."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

from fedtune.config.convert import to_json
from fedtune.config.schema import Config
from fedtune.errors import LedgerError, PreflightError, PrivacyError
from fedtune.federation import resources
from fedtune.federation.client import release as node_module
from fedtune.federation.client.app import app
from fedtune.federation.client.node_context import node_ledger
from fedtune.federation.client.policy import check_plan
from fedtune.federation.flower import task_identity
from fedtune.federation.messages import NodeHello, RoundReply, RoundRequest
from fedtune.federation.resources import run_resources
from fedtune.privacy.plan import PrivacyPlan, make_plan
from tests.support.golden import Golden
from tests.support.plans import changed
from tests.support.tiny_federation import private

Make = Callable[..., Config]


class Node:
    """One node of the tiny federation, spoken to as Flower would."""

    def __init__(self, config: Config, position: int = 0, places: int = 4) -> None:
        self.config = config
        self.context = Context(
            run_id=1,
            node_id=10 + position,
            node_config={"partition-id": position, "num-partitions": places},
            state=RecordDict(),
            run_config={"fedtune": to_json(config)},
        )
        shards = run_resources(config).prepared.shards
        self.plan = make_plan(config, [shard.declared_size for shard in shards])
        self.start = run_resources(config).initial()
        self.name = shards[position].node if position < len(shards) else ""

    def send(self, content: RecordDict, kind: str = "train") -> Message:
        with task_identity(1):
            return app(Message(content, self.context.node_id, kind), self.context)

    def ask(
        self, round: int = 1, attempt: int = 1, run: str = "r", plan: PrivacyPlan | None = None
    ) -> RoundReply:
        request = RoundRequest(run, round, attempt, plan or self.plan, self.start)
        answer = self.send(request.to_records())
        return RoundReply.from_records(answer.content, node=self.name, run=run, round=round, attempt=attempt)

    def charged(self) -> int:
        return len(node_ledger().releases(node=self.name))


def test_a_node_answers_with_an_update_and_has_charged_it(tiny: Make) -> None:
    node = Node(private(tiny()))
    reply = node.ask()
    assert reply.update is not None
    assert reply.update.shape == node.start.shape
    assert np.linalg.norm(reply.update) > 0
    assert (reply.releases, reply.steps) == (1, 2)
    assert node.charged() == 1
    assert node.ask(round=2).releases == 2


def test_the_release_is_charged_before_the_data_is_touched(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Node(private(tiny()))
    seen = []

    def train(*args: Any, **options: Any) -> None:
        seen.append(node.charged())
        raise MemoryError("while reading 'patient Jane Doe'")

    monkeypatch.setattr("fedtune.training.local.train_locally", train)
    reply = node.ask()
    assert seen == [1]
    assert reply.update is None
    assert node.charged() == 1
    assert reply.releases == 1
    assert reply.error == f"Node '{node.name}' failed with MemoryError; its own log says more."


def test_a_node_says_who_it_is(tiny: Make) -> None:
    node = Node(tiny(), position=2)
    hello = NodeHello.from_records(node.send(RecordDict(), "query.hello").content)
    assert hello.node == "site-2"
    assert hello.declared_size == run_resources(node.config).prepared.shards[2].declared_size
    assert not hello.idle


def test_a_node_without_a_shard_is_idle(tiny: Make) -> None:
    node = Node(tiny(), position=4, places=5)
    assert NodeHello.from_records(node.send(RecordDict(), "query.hello").content).idle


@pytest.mark.parametrize("place", [None, -1, "0", True, 1.0])
def test_a_node_without_a_place_says_how_to_start_it(tiny: Make, place: object) -> None:
    node = Node(tiny())
    node.context.node_config["partition-id"] = place  # type: ignore[assignment]
    answer = node.send(RecordDict(), "query.hello")
    assert answer.has_error()
    assert "partition-id" in (answer.error.reason or "")


def test_a_message_that_was_answered_is_not_answered_again(tiny: Make) -> None:
    node = Node(private(tiny()))
    assert node.ask(round=2).update is not None
    for round, attempt in ((2, 1), (1, 1), (3, 0)):
        again = node.ask(round=round, attempt=attempt)
        assert again.update is None
        assert "An answer is released once for one charge" in (again.error or "")
    assert node.charged() == 1
    assert node.ask(round=2, attempt=2).update is not None
    assert node.charged() == 2


def test_a_ledger_that_forgot_is_noticed_by_the_second_witness(
    tiny: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    node = Node(private(tiny()))
    node.ask(round=1)
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path))  # another disk, with an empty ledger
    reply = node.ask(round=2)
    assert reply.refusal == "LedgerError"
    assert "shows 0 releases" in (reply.refused or "")
    assert "remembers 1" in (reply.refused or "")


def test_a_node_whose_state_was_lost_goes_by_its_ledger(tiny: Make) -> None:
    config = private(tiny())
    Node(config).ask(round=1)
    restarted = Node(config)
    assert restarted.ask(round=2).releases == 2


def test_more_rounds_than_agreed_are_refused(tiny: Make) -> None:
    node = Node(private(tiny(federation__num_rounds=2)))
    assert [node.ask(round=r).update is not None for r in (1, 2, 3)] == [True, True, False]
    reply = node.ask(round=4)
    assert reply.refusal == "BudgetExhausted"
    assert node.charged() == 2


def test_a_budget_refuses_and_the_numbers_stay_with_its_owner(
    tiny: Make, caplog: pytest.LogCaptureFixture
) -> None:
    from fedtune.privacy.ledger.ledger import PrivacyBudget

    caplog.set_level("INFO", "fedtune.node")

    node = Node(private(tiny(), epsilon=8.0))
    shard = run_resources(node.config).prepared.shards[0]
    node_ledger().set_budget(PrivacyBudget(epsilon=1.0, delta=node.plan.delta), dataset=shard.dataset)
    reply = node.ask()
    assert reply.update is None
    assert reply.refusal == "BudgetExhausted"
    assert reply.refused == (
        f"BudgetExhausted: node '{node.name}' gives no answer, for its owner's budget does not allow it; its "
        "own log says more."
    )
    assert "over its budget of 1 at delta" in caplog.text
    assert node.charged() == 0


def test_a_preflight_that_fails_is_a_refusal(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise PreflightError("the head is trained and not noised")

    monkeypatch.setattr("fedtune.training.local.preflight", fails)
    reply = Node(private(tiny())).ask()
    assert (reply.update, reply.refusal) == (None, "PreflightError")
    assert "not noised" in (reply.refused or "")


CHANGES: dict[str, dict[str, Any]] = {
    "unit": {"unit": "person"},
    "sample_rate": {"sample_rate": 0.1},
    "local_steps": {"local_steps": 1},
    "num_rounds": {"num_rounds": 1},
    "max_grad_norm": {"max_grad_norm": 0.9},
    "delta": {"delta": 1e-9},
    "reproducible_noise": {"reproducible_noise": True},
    "weighting": {"weighting": "declared"},
    "seed": {"seed": 1},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_plan_that_the_configuration_does_not_permit_is_refused(
    tiny: Make, name: str, golden: Golden
) -> None:
    config = private(tiny())
    config.privacy.delta = 1e-3
    plan = make_plan(config, [30, 30, 30, 30])
    check_plan(plan, config)
    with pytest.raises(PrivacyError) as raised:
        check_plan(changed(plan, **CHANGES[name]), config)
    golden(raised)


def test_another_cohort_of_a_trusted_server_is_refused(tiny: Make, golden: Golden) -> None:
    config = private(tiny(), epsilon=30.0)
    config.privacy.trust, config.privacy.unit, config.privacy.delta = "central", "client", 0.1
    plan = make_plan(config, [30, 30, 30, 30])
    check_plan(plan, config)
    with pytest.raises(PrivacyError) as raised:
        check_plan(changed(plan, cohort_size=1), config)
    assert "cohort_size=4" in str(raised.value)
    golden(raised)


def test_a_delta_that_is_not_the_default_is_refused_where_the_default_was_agreed(tiny: Make) -> None:
    config = private(tiny())
    plan = make_plan(config, [30, 30, 30, 30])
    check_plan(plan, config)
    with pytest.raises(PrivacyError, match="delta="):
        check_plan(dataclasses.replace(plan, delta=1.9 * plan.delta), config)


def test_a_union_that_is_smaller_than_the_nodes_own_part_is_refused(tiny: Make) -> None:
    config = private(tiny())
    config.privacy.trust = "distributed"
    node = Node(config)
    small = make_plan(config, [1, 1, 1, 2])  # its delta would be a tenth: no guarantee for anyone
    reply = node.ask(plan=small)
    assert reply.refusal == "PrivacyError"
    assert "a union of 5 units" in (reply.refused or "")
    assert node.charged() == 0


@pytest.mark.parametrize(
    "changes", [{"head_norm": 4.0}, {"head_share": 0.4}, {"head_norm": 0.0, "head_share": 0.0}]
)
def test_another_norm_of_the_head_is_refused(tiny: Make, changes: dict[str, float]) -> None:
    config = private(tiny())
    config.privacy.head_norm, config.privacy.head_share = 3.0, 0.3
    plan = make_plan(config, [30, 30, 30, 30])
    assert (plan.head_norm, plan.head_share) == (3.0, 0.3)
    check_plan(plan, config)
    with pytest.raises(PrivacyError, match=f"head_.* permits {next(iter(changes))}="):
        check_plan(changed(plan, **changes), config)


def test_a_plan_without_privacy_is_refused_where_privacy_was_agreed(tiny: Make) -> None:
    plain = make_plan(tiny(), [30, 30])
    with pytest.raises(PrivacyError, match="trust='none'"):
        check_plan(plain, private(tiny()))
    node = Node(private(tiny()))
    reply = node.ask(plan=make_plan(tiny(), [s.declared_size for s in run_resources(tiny()).prepared.shards]))
    assert reply.update is None
    assert reply.refusal == "PrivacyError"
    assert node.charged() == 0


@pytest.mark.parametrize("trust", ["local", "distributed", "central"])
def test_too_little_noise_is_refused_with_the_epsilon_that_it_gives(
    tiny: Make, trust: str, golden: Golden
) -> None:
    config = private(tiny(), epsilon=4.0)
    config.privacy.trust = trust
    if trust == "central":
        config.privacy.unit, config.privacy.delta, config.privacy.epsilon = "client", 0.1, 30.0
    plan = make_plan(config, [30, 50, 30, 30])
    check_plan(plan, config)
    weak = dataclasses.replace(plan, noise_multiplier=plan.noise_multiplier * 2 / 3)
    with pytest.raises(PrivacyError) as raised:
        check_plan(weak, config)
    golden(raised)


def test_a_request_that_is_no_request_is_an_error_without_a_charge(tiny: Make) -> None:
    node = Node(tiny())
    answer = node.send(RecordDict())
    assert answer.has_error()
    assert "has no record 'request'" in (answer.error.reason or "")


def test_an_adapter_of_another_model_is_an_error(tiny: Make) -> None:
    node = Node(tiny())
    node.start = node.start[:-1]
    reply = node.ask()
    assert reply.update is None
    assert "trainable parameters" in (reply.error or "")


def test_a_ledger_error_is_a_refusal(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise LedgerError("the ledger is read-only")

    monkeypatch.setattr(node_module, "node_ledger", broken)
    reply = Node(tiny()).ask()
    assert (reply.update, reply.refusal, reply.releases) == (None, "LedgerError", 0)


@pytest.mark.slow
def test_answers_can_be_held_back_to_a_fixed_time(tiny: Make) -> None:
    import time

    node = Node(tiny())
    node.ask(round=1)
    node.context.node_config["answer-after"] = 1.0
    started = time.monotonic()
    node.ask(round=2)
    assert time.monotonic() - started >= 1.0


def test_what_nodes_of_a_process_have_in_common_is_worked_out_once(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan as text, its comparison with the configuration, and what data and model follow from."""
    counts: Counter[str] = Counter()

    def counting(where: Any, name: str) -> None:
        real = getattr(where, name)

        def counted(*arguments: Any) -> Any:
            counts[name] += 1
            return real(*arguments)

        monkeypatch.setattr(where, name, counted)

    config = private(tiny())
    config.seed = 77  # seen by no other test
    nodes = [Node(config, position) for position in range(4)]
    monkeypatch.setattr(PrivacyPlan, "from_json", classmethod(counted_from_json(counts)))
    counting(node_module, "check_plan")
    counting(resources, "_key_of")
    for round in (1, 2):
        for one in nodes:
            assert one.ask(round=round).update is not None
    assert counts == {"from_json": 1, "check_plan": 1, "_key_of": 1}
    # A refusal is no answer that is kept: each is refused by a check of its own.
    wrong = dataclasses.replace(nodes[0].plan, max_grad_norm=9.0)
    for one in nodes:
        assert "max_grad_norm=9.0" in (one.ask(round=3, plan=wrong).refused or "")
    assert counts["check_plan"] == 1 + len(nodes)
    # Another configuration is another check of the same plan.
    stricter = dataclasses.replace(config, privacy=dataclasses.replace(config.privacy, epsilon=0.5))
    nodes[0].context.run_config["fedtune"] = to_json(stricter)
    assert nodes[0].ask(round=4).refusal == "PrivacyError"


def counted_from_json(counts: Counter[str]) -> Callable[..., PrivacyPlan]:
    real = PrivacyPlan.from_json.__func__  # type: ignore[attr-defined]

    def from_json(cls: type[PrivacyPlan], values: Any) -> PrivacyPlan:
        counts["from_json"] += 1
        plan: PrivacyPlan = real(cls, values)
        return plan

    return from_json
