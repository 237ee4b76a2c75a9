"""Private evaluation from the question to the accuracy: charged, noised, refused, resumed."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.config.choices import check_together
from fedtune.config.convert import to_json
from fedtune.config.schema import Config
from fedtune.engines.local import LocalGrid
from fedtune.errors import ConfigError, FederationError, PrivacyError, UpdateRejected
from fedtune.federation.client.app import app
from fedtune.federation.client.node_context import node_ledger
from fedtune.federation.client.policy import check_plan
from fedtune.federation.events import FederationResult
from fedtune.federation.flower import task_identity
from fedtune.federation.messages import EvaluationReply, RoundRequest
from fedtune.federation.resources import run_resources
from fedtune.federation.server.evaluation import NodesEvaluation
from fedtune.federation.server.loop import run_rounds
from fedtune.privacy.plan import PrivacyPlan
from fedtune.training.evaluation import evaluate
from tests.federation.client.test_client_app import Node
from tests.support.golden import Golden
from tests.support.tiny_federation import private

Make = Callable[..., Config]


def asking(config: Config, answers: int = 1, share: float = 0.3, epsilon: float | None = None) -> Config:
    config.federation.evaluation = "private"
    config.federation.evaluation_rounds = answers
    config.federation.evaluation_share = share
    config.federation.evaluation_epsilon = epsilon
    return config


def question(
    node: Node, round: int = 1, attempt: int = 1, plan: PrivacyPlan | None = None
) -> EvaluationReply:
    request = RoundRequest("r", round, attempt, plan or node.plan, node.start)
    answer = node.send(request.to_records(), "query.evaluate")
    return EvaluationReply.from_records(answer.content, node=node.name, run="r", round=round, attempt=attempt)


def run(config: Config, run_dir: Path, **options: Any) -> FederationResult:
    grid = LocalGrid(app, 4, {"fedtune": to_json(config)}, timeout=60.0)
    try:
        with task_identity(grid.run_id):
            return run_rounds(grid, config, run_dir, expected_nodes=4, **options)
    finally:
        grid.close()


# --- one node ------------------------------------------------------------------------------------


def test_an_answer_is_noised_and_charged_by_its_own_event(tiny: Make) -> None:
    node = Node(asking(private(tiny())))
    reply = question(node)
    assert reply.counts is not None
    assert reply.answers == 1
    (release,) = node_ledger().releases(node=node.name)
    assert (release.purpose, release.committed, release.round) == ("evaluation", True, 1)
    ((term, count),) = release.steps or ()
    assert (term.sample_rate, term.noise_multiplier, count) == (1.0, node.plan.evaluation_noise, 1)
    # The training of the same round is another release, and both count.
    assert node.ask().releases == 1
    held = run_resources(node.config).prepared.held_out[0]
    spent = node_ledger().epsilon(dataset=held.dataset, fingerprint=held.identity, delta=node.plan.delta)
    assert spent == pytest.approx(node.plan.epsilon(1, 1))


def test_without_privacy_the_counts_are_exactly_those_of_the_held_out_part(tiny: Make) -> None:
    node = Node(asking(tiny()))
    reply = question(node)
    evaluation = node.plan.evaluation()
    assert evaluation is not None
    assert reply.counts is not None
    resources = run_resources(node.config)
    held = resources.prepared.held_out[0]
    with resources.using_model() as model:
        model.set_vector(node.start)
        score = evaluate(model, held.data, node.config.train)
    right, wrong = (cell / evaluation.scale for cell in reply.counts)
    assert right + wrong == held.data.num_records
    assert right / (right + wrong) == pytest.approx(score.accuracy)


@pytest.mark.parametrize("replaced", [False, True])
def test_data_that_was_replaced_after_the_charge_is_not_evaluated_on(
    tiny: Make, tmp_path: Path, replaced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a file holds by then was charged for nothing."""
    from fedtune.federation.client import app as node_app

    config = asking(private(tiny()))
    assert config.data.path is not None
    there = shutil.copytree(config.data.path, tmp_path / "data") / "train.csv"
    if replaced:
        there.write_text(there.read_text().replace(" ", " again ", 1).replace("\n", "\nsad ", 5))
    later = dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(there.parent)))
    reserve = node_app.reserve_release

    def then_read_again(*about: Any, **options: Any) -> Any:
        return dataclasses.replace(reserve(*about, **options), config=later)

    monkeypatch.setattr(node_app, "reserve_release", then_read_again)
    reply = question(Node(config))
    assert (reply.counts is None) == ("was replaced" in (reply.error or "")) == replaced


def test_no_unit_is_in_both_parts_and_training_sees_one_only(tiny: Make) -> None:
    prepared = run_resources(asking(tiny())).prepared
    whole = run_resources(tiny()).prepared
    assert len(prepared.held_out) == len(prepared.shards) == 4
    for train, held, both in zip(prepared.shards, prepared.held_out, whole.shards, strict=True):
        texts = {one.tobytes() for one in train.data.digests}
        assert not texts & {one.tobytes() for one in held.data.digests}
        rows = np.concatenate([train.record_index, held.record_index])
        assert np.array_equal(np.sort(rows), np.sort(both.record_index))
        assert train.fingerprint == held.fingerprint == both.fingerprint
        assert train.declared_size < both.declared_size


def test_a_crash_between_charge_and_answer_stays_charged(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(asking(private(tiny()), answers=2))
    seen = []

    def dies(*args: Any, **options: Any) -> None:
        seen.append(node.charged())
        raise MemoryError("while reading 'patient Jane Doe'")

    with monkeypatch.context() as patch:
        patch.setattr("fedtune.training.evaluation.answers_alone", dies)
        reply = question(node)
    assert seen == [1]  # before the data was touched
    assert reply.counts is None
    assert reply.error == f"Node '{node.name}' failed with MemoryError; its own log says more."
    (release,) = node_ledger().releases(node=node.name)
    assert not release.committed

    # Again in the same attempt: one charge, one answer. In a new one: charged again, with fresh noise.
    again = question(node)
    assert "is released once for one charge" in (again.error or "")
    assert node.charged() == 1
    retried = question(node, attempt=2)
    assert retried.counts is not None
    assert (retried.answers, node.charged()) == (2, 2)

    # And then the plan's answers are used up: a run's epsilon never exceeds its target.
    last = question(node, attempt=3)
    assert last.refusal == "BudgetExhausted"
    assert "allows 2 answers" in (last.refused or "")
    assert node.charged() == 2


def test_two_answers_about_the_same_data_have_other_noise(tiny: Make) -> None:
    node = Node(asking(private(tiny()), answers=2))
    assert question(node, round=1).counts != question(node, round=2).counts


def test_a_node_that_holds_nothing_out_answers_nothing(tiny: Make) -> None:
    node = Node(private(tiny()))
    reply = question(node)
    assert "no such answer is in the plan" in (reply.refused or "")
    assert node.charged() == 0


def test_a_part_that_is_empty_is_answered_for_like_any_other(tiny: Make) -> None:
    """Whether anybody is held out is private, so it must not show in what is answered, or break training."""
    node = Node(asking(private(tiny()), share=1e-9))
    assert run_resources(node.config).prepared.held_out[0].data.num_records == 0
    assert question(node).counts is not None
    almost_all = asking(private(tiny()), share=1 - 1e-9)
    almost_all.privacy.delta = 1e-12  # the default has no meaning for a part of one
    other = Node(almost_all, position=1)
    assert run_resources(other.config).prepared.shards[1].data.num_records == 0
    assert other.ask().update is not None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"evaluation_noise": 0.5}, "evaluation_noise=0.5"),
        ({"evaluation_answers": 2}, "evaluation_answers=2"),
        ({"evaluation_share": 0.9}, "evaluation_share=0.9"),
    ],
)
def test_a_node_checks_what_the_server_proposes(tiny: Make, change: dict[str, Any], words: str) -> None:
    config = asking(private(tiny()))
    config.privacy.delta = 1e-4  # whatever is held out of a node's 30 units
    node = Node(config)
    check_plan(node.plan, node.config)
    wrong = dataclasses.replace(node.plan, **change)
    with pytest.raises(PrivacyError, match=words):
        check_plan(wrong, node.config)
    assert words in (question(node, plan=wrong).refused or "")
    assert node.charged() == 0


def test_central_and_settings_that_leave_nothing_are_refused(tiny: Make, golden: Golden) -> None:
    config = asking(private(tiny()), epsilon=8.0)
    with pytest.raises(ConfigError) as raised:
        check_together(config)
    golden(raised)
    config.federation.evaluation_epsilon = None
    check_together(config)
    config.privacy.trust, config.privacy.unit = "central", "client"
    with pytest.raises(ConfigError) as raised:
        check_together(config)
    assert "trust=central" in str(raised.value)
    golden(raised)


def test_an_answer_that_cannot_be_right_is_refused_by_the_server() -> None:
    reply = EvaluationReply("a", "r", 1, 1, answers=1, counts=(5, -3))
    place = {"node": "a", "run": "r", "round": 1, "attempt": 1}
    assert EvaluationReply.from_records(reply.to_records(), **place) == reply  # type: ignore[arg-type]
    for key, value in (("right", 2**62 + 1), ("answers", -1), ("wrong", 1.5), ("node", "b"), ("round", 2)):
        records = reply.to_records()
        records["evaluation"][key] = value  # type: ignore[index]
        with pytest.raises(UpdateRejected):
            EvaluationReply.from_records(records, **place)  # type: ignore[arg-type]
    records = reply.to_records()
    records["evaluation"]["num_examples"] = 17  # type: ignore[index]
    with pytest.raises(UpdateRejected, match="num_examples"):
        EvaluationReply.from_records(records, **place)  # type: ignore[arg-type]


# --- a federation --------------------------------------------------------------------------------


def test_a_run_without_noise_finds_the_accuracy_of_what_is_held_out(tiny: Make, tmp_path: Path) -> None:
    config = asking(tiny(federation__num_rounds=2))
    result = run(config, tmp_path / "run")
    found = result.evaluation
    assert isinstance(found, NodesEvaluation)
    resources = run_resources(config)
    hits = total = 0.0
    with resources.using_model() as model:
        model.set_vector(result.adapter)
        for held in resources.prepared.held_out:
            score = evaluate(model, held.data, config.train)
            hits += score.accuracy * held.data.num_records
            total += held.data.num_records
    assert found.accuracy == pytest.approx(hits / total)
    assert found.units == total
    assert result.history[0].accuracy is None  # only the last round was asked
    assert result.history[-1].accuracy == found.accuracy
    assert result.history[-1].loss is None
    assert not found.missing


@pytest.mark.slow
def test_a_private_run_stays_within_its_target_with_the_answers_in_it(tiny: Make, tmp_path: Path) -> None:
    config = asking(private(tiny(federation__num_rounds=2), epsilon=8.0), answers=2)
    result = run(config, tmp_path / "run")
    assert result.answers == dict.fromkeys(result.answers, 2)
    assert result.releases == dict.fromkeys(result.releases, 2)
    assert result.epsilon is not None
    assert result.plan.epsilon(2) < result.epsilon <= 8.0
    assert result.epsilon == pytest.approx(result.plan.epsilon(2, 2))
    found = result.evaluation
    assert isinstance(found, NodesEvaluation)
    assert len(found.nodes) == 4
    assert found.round == 2

    # Resumed at its end: what is known is not paid for again.
    config.resume = str(tmp_path / "run")
    again = run(config, tmp_path / "run")
    assert again.evaluation == found
    assert again.answers == result.answers


def test_a_node_that_does_not_answer_is_named_and_left_out(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.federation.client import app as node

    true = node._noised_counts

    def some(release: Any, request: Any) -> tuple[int, int]:
        if release.shard.node == "site-2":
            raise RuntimeError("the disk of patient Jane Doe")
        return true(release, request)

    monkeypatch.setattr(node, "_noised_counts", some)
    result = run(asking(tiny(federation__num_rounds=1)), tmp_path / "run")
    found = result.evaluation
    assert isinstance(found, NodesEvaluation)
    assert [one.node for one in found.nodes] == ["site-0", "site-1", "site-3"]
    ((node, reason),) = found.missing
    assert node == "site-2"
    assert "Jane" not in reason
    assert result.answers["site-2"] == 1  # it had been charged


def test_evaluation_none_evaluates_nothing(tiny: Make, tmp_path: Path) -> None:
    config = tiny(federation__num_rounds=1)
    config.federation.evaluation = "none"
    result = run(config, tmp_path / "run")
    assert result.evaluation is None
    assert result.history[-1].accuracy is None


@pytest.mark.slow
def test_it_works_under_secure_aggregation(tiny: Make, tmp_path: Path) -> None:
    config = asking(private(tiny(federation__num_rounds=1)))
    config.privacy.trust, config.train.local_steps = "distributed", 1
    result = run(config, tmp_path / "run")
    found = result.evaluation
    assert isinstance(found, NodesEvaluation)
    assert len(found.nodes) == 4
    assert result.epsilon == pytest.approx(result.plan.epsilon(1, 1))
    assert result.plan.epsilon() <= 8.0


def test_what_is_kept_of_answers_does_not_say_who_answered_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a node answers depends on what it computed (PITFALLS 26)."""
    import json
    from types import SimpleNamespace
    from typing import cast

    from flwr.app import Error, Message, RecordDict

    from fedtune.federation.events import NodeInfo, NullObserver
    from fedtune.federation.server import cohort, evaluation
    from fedtune.federation.server.checkpoint import RunState

    nodes, kept = [NodeInfo("a", 1, 80), NodeInfo("b", 2, 80)], []
    about = SimpleNamespace(num_rounds=1, noise_std=1.0, scale=1)
    plan = cast(Any, SimpleNamespace(evaluation=lambda: about, to_json=dict))
    for order in (nodes, nodes[::-1]):
        with task_identity(1):
            asked = [(node.node_id, Message(RecordDict(), node.node_id, "query.evaluate")) for node in order]
            came = [(name, Message(Error(2, f"no {name}"), reply_to=one)) for name, one in asked]
        grid = cast(Any, SimpleNamespace(get_node_ids=lambda: [1, 2]))
        for module in (evaluation, cohort):
            monkeypatch.setattr(module, "exchange", lambda *_, came=came, **__: iter(came))
            monkeypatch.setattr(module, "make_messages", lambda *_, **__: [])
        adapter = np.zeros(3, np.float32)
        state = RunState("r", plan, adapter, cast(Any, None), 1, "fake", adapter, nodes=nodes)
        ask = cast(Any, SimpleNamespace(run="r", round=1, attempt=1, plan=plan, nodes=nodes, timeout=1.0,
                                        stop=None, deadline=False, adapter=adapter))  # fmt: skip
        outcome = evaluation.NodesEvaluator(plan, 1).evaluate(grid, ask, [], NullObserver())
        state.record_evaluation(outcome)
        with pytest.raises(FederationError) as refused:
            cohort.discover_nodes(grid, 1.0, expected=2)
        kept.append(json.dumps([state.answers, outcome.result.to_json(), str(refused.value)]))
    assert kept[0] == kept[1]
