"""One round with nodes that misbehave: each costs its own update, and the record names it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from fedtune.config.schema import PrivacyConfig
from fedtune.engines.local import LocalGrid
from fedtune.errors import UpdateRejected
from fedtune.federation.events import NodeInfo, NullObserver
from fedtune.federation.flower import serialized_size, task_identity
from fedtune.federation.messages import check_update
from fedtune.federation.server import rounds
from fedtune.federation.server.rounds import CentralRound, PlainRound, RoundAsk, RoundOutcome, RoundProtocol
from fedtune.privacy.plan import PrivacyPlan, make_plan
from tests.support.fake_federation import (
    SIZE,
    Watcher,
    fake_app,
    fake_config,
    honest,
    honest_update,
    impatient,
    misbehaving,
    run_fake,
)

BAD = {
    "raise": "failed with RuntimeError",
    "hang": r"did not answer in 1 s",
    "nan": "NaN or infinite",
    "infinity": "NaN or infinite",
    "huge": "over federation.max_update_norm=100",
    "short": r"float32\[5\] and should be float32\[6\]",
    "empty": r"float32\[0\]",
    "float64": "float64",
    "scalar": r"float32\[\]",
    "matrix": r"float32\[2, 3\]",
    "other round": "is for round 2, and 1 was asked",
    "other node": "is for node 'node-0'",
    "nothing": "should be one of an update",
    "extra key": "unknown keys .'num-examples'",
    "missing key": "lacks .'round'",
    "extra record": "nobody asked for: .'metrics'",
    "wrong type": "releases is a float",
    "other version": "version 99",
    "lying header": "cannot be decoded",
    "refuse": "BudgetExhausted: no more",
}


def test_what_ended_a_worker_is_told_by_its_kind_alone() -> None:
    """Flower's simulation answers with whatever text the exception has; nobody has looked at that."""
    from flwr.app import Error, Message

    with task_identity(1):
        asked = Message(RecordDict(), 7, "query.hello")
        texts = [
            "<class 'ray.exceptions.OutOfMemoryError'>:<'pid 17 used 3.21GB for the film was awful'>",
            "no",
        ]
        said = [rounds.reason_of(Message(Error(0, text), reply_to=asked)) for text in texts]
    assert said == ["its worker failed with OutOfMemoryError; the log of the engine says more", "no"]


@pytest.mark.parametrize("how", BAD)
def test_a_bad_node_costs_its_own_update_and_the_record_names_it(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch)
    config = fake_config(num_rounds=1, round_timeout=1.0 if how == "hang" else 30.0)
    watcher = Watcher()
    result = run_fake(tmp_path, misbehaving(1, how), config=config, observer=watcher)
    expected = (honest_update(0, 1).astype(np.float64) + honest_update(2, 1)) / 2
    np.testing.assert_array_equal(result.adapter, expected.astype(np.float32))
    (dropped,) = result.dropped
    assert (dropped.node, dropped.round) == ("node-1", 1)
    import re

    assert re.search(BAD[how], dropped.reason), dropped.reason
    assert result.history[0].dropped == [("node-1", dropped.reason)]
    assert result.history[0].updates == 2
    status = "refused" if how == "refuse" else "dropped"
    assert ("node-1", f"{status}: {dropped.reason}") in watcher.clients
    assert ("node-0", "answered") in watcher.clients


def test_what_a_client_raises_does_not_quote_private_text(tmp_path: Path) -> None:
    result = run_fake(tmp_path, misbehaving(1, "raise"), config=fake_config(num_rounds=1))
    assert "Jane" not in str(result)


@pytest.mark.slow
def test_a_node_that_hung_can_answer_in_the_next_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    impatient(monkeypatch)
    bad = misbehaving(1, "hang")

    def once(node, request, reply):  # type: ignore[no-untyped-def]
        return bad(node, request, reply) if request.round == 1 else reply

    result = run_fake(tmp_path, once, config=fake_config(num_rounds=2, round_timeout=0.5))
    assert [summary.updates for summary in result.history] == [2, 3]
    # The late answer of round 1 must not have been taken for anything.
    sums = [sum(honest_update(i, 1).astype(np.float64) for i in (0, 2)) / 2]
    sums += [sum(honest_update(i, 2).astype(np.float64) for i in range(3)) / 3]
    np.testing.assert_allclose(result.adapter, sum(sums), rtol=1e-6)


def test_nodes_do_not_share_the_message_they_get(tmp_path: Path) -> None:
    seen = []

    def vandal(node, request, reply):  # type: ignore[no-untyped-def]
        seen.append(request.adapter.copy())
        request.adapter[:] = 1e6
        return reply

    run_fake(tmp_path, vandal, config=fake_config(num_rounds=1))
    assert len(seen) == 3
    for adapter in seen:
        np.testing.assert_array_equal(adapter, np.zeros(SIZE))


def _ask(plan: PrivacyPlan, grid: LocalGrid, nodes: int, **changes: object) -> RoundAsk:
    infos = [NodeInfo(f"node-{i}", node_id, 100 * (i + 1)) for i, node_id in enumerate(grid.get_node_ids())]
    ask = RoundAsk("run", 1, 1, plan, np.zeros(SIZE, np.float32), infos[:nodes], 5.0, 1e9)
    return dataclasses.replace(ask, **changes)  # type: ignore[arg-type]


def _round(protocol: RoundProtocol, plan: PrivacyPlan, behave=honest, nodes: int = 4) -> RoundOutcome:  # type: ignore[no-untyped-def]
    grid = LocalGrid(fake_app(behave), nodes, {}, timeout=5.0)
    with task_identity(grid.run_id):
        return protocol.run_round(grid, _ask(plan, grid, nodes), NullObserver())


def test_weights_by_declared_sizes_are_scaled_over_those_that_answered() -> None:
    config = fake_config(weighting="declared")
    plan = make_plan(config, [100, 200, 300, 400])
    outcome = _round(PlainRound(), plan, misbehaving(3, "nan"))
    expected = sum(honest_update(i, 1) * (i + 1) for i in range(3)) / 6
    np.testing.assert_allclose(outcome.aggregate, expected, rtol=1e-6)


@pytest.mark.parametrize("head_norm", [None, 3.0])
def test_a_small_site_is_not_refused_for_the_noise_that_it_must_add(head_norm: float | None) -> None:
    """At epsilon 1 two records hide under noise of a norm of hundreds, which is no sign of a broken node."""
    config = fake_config(strategy="fedsgd", num_rounds=60)
    config.train.sample_rate, config.train.head_rounds = 1.0, 0
    config.adapter.name = "lora"
    config.privacy = PrivacyConfig(
        trust="local", unit="record", epsilon=1.0, max_grad_norm=0.9, head_norm=head_norm or 0.0,
        head_share=0.1,
    )  # fmt: skip
    plan = make_plan(config, [2, 2000])
    size, few, many = 30_000, NodeInfo("few", 1, 2), NodeInfo("many", 2, 2000)
    head = None if head_norm is None else np.arange(size) < 1000
    ask = RoundAsk(
        "run", 1, 1, plan, np.zeros(size, np.float32), [few, many], 5.0, 100.0, head=head, gradients=True
    )
    for node in (few, many):
        training = plan.training_plan(node.declared_size)
        sent = training.average(training.noise(size, training.entropy(node.name, 1)))
        if head is not None:
            sent = training.clipping.undone(sent, head)
        norm = check_update(
            sent.astype(np.float32), node=node.name, round=1, size=size, max_norm=100.0,
            noise=ask.noise_in(node),
        )  # fmt: skip
        assert 0.45 * ask.noise_in(node) < norm < 0.55 * ask.noise_in(node)
        assert (norm > 100.0) == (node is few)
        with pytest.raises(UpdateRejected, match="max_update_norm=100 beside "):
            check_update(
                np.float32(3) * sent.astype(np.float32) + np.float32(1), node=node.name, round=1, size=size,
                max_norm=100.0, noise=ask.noise_in(node),
            )  # fmt: skip
    assert dataclasses.replace(ask, gradients=False).noise_in(few) == 0.0


def test_bytes_are_those_of_the_messages() -> None:
    outcome = _round(PlainRound(), make_plan(fake_config(), [100] * 4))
    # Four adapters of 24 bytes in numpy's format, and a plan each; the replies have no plan.
    assert 4 * 24 < outcome.bytes_up < outcome.bytes_down < 4 * 3000


def _central(noise: float, **privacy: object) -> PrivacyPlan:
    config = fake_config()
    config.privacy = PrivacyConfig(
        trust="central", unit="client", epsilon=None, noise_multiplier=noise, delta=0.1,
        reproducible_noise=True, max_grad_norm=0.5, **privacy,
    )  # fmt: skip
    return make_plan(config, [100, 200, 300, 400])


def test_a_central_server_clips_every_update_and_divides_by_a_public_constant() -> None:
    plan = _central(1e-6)
    outcome = _round(CentralRound(), plan, misbehaving(3, "raise"))
    clipped = [
        u * min(1, 0.5 / np.linalg.norm(u))
        for u in (honest_update(i, 1).astype(np.float64) for i in range(3))
    ]
    # Three answered, the cohort is four: the divisor is four.
    np.testing.assert_allclose(outcome.aggregate, sum(clipped) / 4, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_central_server_adds_the_plans_noise_and_not_another_scale() -> None:
    plan = _central(2.0)
    clean = _round(CentralRound(), _central(1e-6)).aggregate
    draws = []
    for run in range(150):
        grid = LocalGrid(fake_app(), 4, {}, timeout=5.0)
        with task_identity(grid.run_id):
            ask = _ask(plan, grid, 4, attempt=run)
            draws.append(CentralRound().run_round(grid, ask, NullObserver()).aggregate - clean)
    spread = float(np.std(np.concatenate(draws)))
    expected = 2.0 * 0.5 / 4
    assert abs(spread / expected - 1) < 0.1  # 900 draws: standard error 2.4 percent
    assert abs(spread / (expected * 2 / 3) - 1) > 0.3
    assert abs(spread / (expected * 3 / 2) - 1) > 0.2


def test_an_adaptive_norm_moves_and_is_handed_to_the_next_round() -> None:
    plan = _central(0.5, adaptive_clipping=True)
    outcome = _round(CentralRound(), plan)
    assert outcome.next_plan is not None
    assert outcome.next_plan.max_grad_norm != plan.max_grad_norm
    assert outcome.next_plan.noise_multiplier == plan.noise_multiplier


@pytest.mark.slow
def test_a_grid_that_never_answers_is_given_up() -> None:
    class Silent(LocalGrid):
        def pull_messages(self, message_ids):  # type: ignore[no-untyped-def]
            return []

    grid = Silent(fake_app(), 2, {}, timeout=5.0)
    plan = make_plan(fake_config(), [100, 200])
    with task_identity(grid.run_id):
        outcome = PlainRound().run_round(grid, _ask(plan, grid, 2, timeout=0.3), NullObserver())
    assert outcome.aggregate is None
    assert [node for node, _ in outcome.dropped] == ["node-0", "node-1"]
    assert "did not answer in 0.3 s" in outcome.dropped[0][1]


def test_the_server_asks_seldom_while_all_nodes_train(monkeypatch: pytest.MonkeyPatch) -> None:
    now, slept = [0.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(rounds.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(rounds.time, "sleep", sleep)

    class Silent:
        def push_messages(self, messages: object) -> list[str]:
            return ["one"]

        def pull_messages(self, ids: object) -> list[object]:
            return []

    with task_identity(1):
        messages = rounds.make_messages(RecordDict(), "train", [NodeInfo("a", 7, 1)], 1)
    assert list(rounds.exchange(Silent(), messages, 60.0)) == []  # type: ignore[arg-type]
    assert slept[0] == 0.1 and max(slept) == 1.0
    assert len(slept) < 150  # a tenth of a second each time would be 600
    assert 60.0 < now[0] < 61.1


def test_a_size_that_no_delta_allows_does_not_end_the_run_of_the_others() -> None:
    """Its own node refuses it; one that lies and answers all the same must not stop the server's step."""
    config = fake_config(strategy="fedsgd", num_rounds=20)
    config.adapter.name = "head"
    config.privacy = PrivacyConfig(trust="local", unit="record", epsilon=3.0, max_grad_norm=0.9)
    plan = make_plan(config, [100, 200])
    noise = {size: plan.mechanism.noise_on_average(plan, {"one": size}) for size in (100, 200, 10**9)}
    own = plan.for_shard(100)
    assert noise[100] == pytest.approx(own.noise_std() / own.expected_batch_size())
    assert noise[100] == pytest.approx(2 * noise[200]) and noise[10**9] > 0.0


def test_bytes_of_a_rounds_questions_are_those_of_each() -> None:
    grid = LocalGrid(fake_app(honest), 1, {}, timeout=5.0)
    ids = [2, 127, 128, 2**14 - 1, 2**14, 2**20, 2**56, 2**63 + 1]
    nodes = [NodeInfo(f"node-{i}", node_id, 10) for i, node_id in enumerate(ids)]
    with task_identity(grid.run_id):
        messages = rounds.make_messages(RecordDict({"c": ConfigRecord({"x": 1})}), "train", nodes, 1)
    sizes = [serialized_size(message) for message in messages]
    assert len(set(sizes)) > 3
    assert rounds._bytes_of(messages) == sum(sizes)
