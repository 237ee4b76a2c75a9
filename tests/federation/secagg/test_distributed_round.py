"""Distributed rounds over Flower's messages: the sum, dropouts, refusals, charges, and what travels."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from fedtune.config.convert import to_json
from fedtune.config.schema import Config, PrivacyConfig
from fedtune.engines.local import LocalGrid, run
from fedtune.errors import (
    ConfigError,
    FederationError,
    PreflightError,
    PrivacyError,
    UpdateRejected,
)
from fedtune.federation.client.app import app
from fedtune.federation.client.node_context import node_ledger
from fedtune.federation.client.release import Release
from fedtune.federation.events import NodeInfo, NullObserver
from fedtune.federation.flower import error_answer, serialized_size, task_identity
from fedtune.federation.messages import RoundReply, RoundRequest
from fedtune.federation.resources import run_resources
from fedtune.federation.secagg import client as distributed_node
from fedtune.federation.secagg import messages as secagg_messages
from fedtune.federation.secagg.messages import PHASES, PhaseId
from fedtune.federation.secagg.protocol import MaskedSum, Masker, Session
from fedtune.federation.secagg.server import DistributedRound
from fedtune.federation.server.rounds import RoundAsk, RoundOutcome
from fedtune.privacy.ledger.ledger import PrivacyBudget
from fedtune.privacy.mechanisms.discrete import DiscreteMechanism
from fedtune.privacy.plan import make_plan
from tests.support import tiny_federation
from tests.support.plans import changed

Make = Callable[..., Config]
SIZE = 4000  # of the vectors where no model is needed


def distributed(config: Config, **changes: Any) -> Config:
    """The same under `trust=distributed`, with noise of one clipping norm and one dropout covered."""
    settings: dict[str, Any] = {
        "trust": "distributed", "epsilon": None, "noise_multiplier": 1.0, "delta": 1e-4, "max_dropouts": 1,
        "head_norm": 0.0,
    }  # fmt: skip
    config.privacy = PrivacyConfig(**{**settings, **changes})
    config.train.head_rounds, config.train.label_smoothing = 0, 0.0
    return config


class Lossy(LocalGrid):
    """Loses, breaks or changes chosen answers. `faults`: (position, phase) -> what happens to the answer."""

    def __init__(self, config: Config, nodes: int = 4) -> None:
        super().__init__(app, nodes, {"fedtune": to_json(config)}, timeout=60.0)
        self.faults: dict[tuple[int, str], Callable[[Message], Message | None]] = {}
        self.seen: list[tuple[str, Message, Message]] = []

    def _deliver(self, message: Message) -> Message:
        answer = super()._deliver(message)
        phase = message.metadata.message_type.rpartition("secagg_")[2]
        self.seen.append((phase, message, answer))
        fault = self.faults.get((message.metadata.dst_node_id - 2, phase))
        return fault(answer) if fault else answer  # type: ignore[return-value]

    def pull_messages(self, message_ids: Any) -> list[Message]:
        # A lost answer takes no turn: what comes next is delivered before anybody looks at the clock.
        while found := list(super().pull_messages(message_ids)):
            if found[0] is not None:
                return found
        return []


def lost(answer: Message) -> None:
    return None


class Bench:
    """Four nodes and a server, one round at a time."""

    def __init__(self, config: Config, size: int | None = None) -> None:
        self.config, self.grid = config, Lossy(config)
        shards = run_resources(config).prepared.shards
        self.nodes = [NodeInfo(s.node, i + 2, s.declared_size) for i, s in enumerate(shards)]
        self.plan = make_plan(config, [node.declared_size for node in self.nodes])
        self.adapter = run_resources(config).initial() if size is None else np.zeros(size, np.float32)

    def round(self, round: int = 1, attempt: int = 1, **changes: Any) -> RoundOutcome:
        settings = {"run": "r", "plan": self.plan, "adapter": self.adapter, "nodes": self.nodes}
        settings |= {"timeout": 0.3, "max_update_norm": 10.0}
        ask = RoundAsk(round=round, attempt=attempt, **{**settings, **changes})
        with task_identity(self.grid.run_id):
            return DistributedRound(self.config, self.plan).run_round(self.grid, ask, NullObserver())

    def send(self, kind: str, content: RecordDict, position: int = 0) -> Message:
        with task_identity(self.grid.run_id):
            self.grid.push_messages([Message(content, position + 2, kind)])
            return self.grid.pull_messages(list(self.grid._pending))[0]

    def charged(self) -> dict[str, int]:
        return {node.name: len(node_ledger().releases(run="r", node=node.name)) for node in self.nodes}


@pytest.fixture
def vectors(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Nodes that need no model: each adds this vector, by name, instead of a sum of gradients."""
    known = {f"site-{i}": np.linspace(-1.0, 1.0, SIZE) * (i + 1) for i in range(4)}

    def known_sum(release: Release, request: RoundRequest) -> tuple[np.ndarray, float]:
        mechanism = DiscreteMechanism.for_plan(release.training, request.adapter.size)
        entropy = release.training.entropy(release.shard.node, request.round)
        return mechanism.share(known[release.shard.node], entropy), 0.5

    monkeypatch.setattr(distributed_node, "clipped_gradient_sum", known_sum)
    return known


def expect_sum(bench: Bench, outcome: RoundOutcome, vectors: dict[str, np.ndarray], names: list[str]) -> None:
    """The aggregate is the sum over `names`, with noise that meets the plan and is no more than it needs."""
    assert outcome.used == names
    assert outcome.aggregate is not None
    batch = bench.plan.expected_batch_size()
    noise = -outcome.aggregate * batch - np.sum([vectors[name] for name in names], axis=0)
    mechanism = DiscreteMechanism.for_plan(bench.plan, SIZE)
    tolerance = 5.5 / math.sqrt(2 * SIZE)
    assert abs(noise.std() / mechanism.noise_std(len(names)) - 1) < tolerance
    assert noise.std() > bench.plan.noise_multiplier * bench.plan.max_grad_norm * (1 - tolerance)
    assert abs(noise.mean()) < 5 * noise.std() / math.sqrt(SIZE)


# --- the sum ------------------------------------------------------------------------------------------


def test_the_aggregate_is_the_noised_sum_over_the_expected_batch(tiny: Make, vectors) -> None:
    bench = Bench(distributed(tiny()), SIZE)
    outcome = bench.round()
    expect_sum(bench, outcome, vectors, [f"site-{i}" for i in range(4)])
    assert outcome.dropped == []
    assert [(r.node, r.releases, r.steps) for r in outcome.replies] == [(f"site-{i}", 1, 1) for i in range(4)]
    assert bench.charged() == {f"site-{i}": 1 for i in range(4)}
    # The next round is another draw of the noise.
    again = bench.round(2)
    assert np.abs(outcome.aggregate - again.aggregate).min() >= 0
    assert (outcome.aggregate == again.aggregate).mean() < 0.01


@pytest.mark.slow
def test_a_round_is_the_step_that_pooled_data_would_take(tiny: Make) -> None:
    """With everybody sampled and next to no noise: the gradient over the union of all shards."""
    from fedtune.training.dp_step import clipped_sum
    from fedtune.training.example_gradients import hooks_for
    from fedtune.training.local import ShardView

    config = distributed(tiny(train__sample_rate=1.0), noise_multiplier=1e-4)
    bench = Bench(config)
    outcome = bench.round()
    expected = np.zeros(bench.adapter.size)
    total = 0
    with run_resources(config).using_model() as model:
        model.set_vector(bench.adapter)
        for shard in run_resources(config).prepared.shards:
            view = ShardView(model, shard, "record", config.train)
            total += view.num_units
            rows = np.arange(view.num_units)
            with hooks_for(model, view.features):
                expected += clipped_sum(
                    model, view.features, rows, None, bench.plan, micro_batch_tokens=2048, precision="fp32"
                )
    assert outcome.aggregate is not None
    assert bench.plan.expected_batch_size() == total
    np.testing.assert_allclose(-outcome.aggregate * total, expected, atol=1e-3)
    assert np.abs(expected).max() > 0.1


# --- dropouts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("how", ["lost", "failed"])
def test_one_dropout_in_any_exchange_is_recovered(tiny: Make, vectors, phase: str, how: str) -> None:
    bench = Bench(distributed(tiny()), SIZE)
    # An error answers a request, so it is made from the last one that was delivered.
    fails = lambda answer: error_answer(bench.grid.seen[-1][1], "gone")  # noqa: E731
    bench.grid.faults[(2, phase)] = lost if how == "lost" else fails
    outcome = bench.round()
    names = ["site-0", "site-1", "site-3"]
    # Whoever is lost after its vector had come is in the sum all the same.
    expect_sum(bench, outcome, vectors, sorted([*names, "site-2"]) if phase == "unmask" else names)
    if phase == "unmask":
        assert outcome.dropped == []
    else:
        ((name, reason),) = outcome.dropped
        assert name == "site-2"
        assert f"'{phase}'" in reason


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_more_dropouts_than_planned_void_the_round_and_are_charged(tiny: Make, vectors, phase: str) -> None:
    bench = Bench(distributed(tiny()), SIZE)
    bench.grid.faults = {(i, phase): lost for i in (1, 2)}  # 'unmask' needs the threshold, 3 of 4
    outcome = bench.round()
    assert outcome.aggregate is None
    assert outcome.used == []
    reasons = dict(outcome.dropped)
    assert set(reasons) == {f"site-{i}" for i in range(4)}
    assert "are needed" in reasons["site-0"]
    touched = {"advertise": 0, "share": 0, "mask": 1, "unmask": 1}[phase]
    assert bench.charged() == {f"site-{i}": touched for i in range(4)}


@pytest.mark.slow
def test_nodes_that_are_missing_from_the_start_count_as_dropouts(tiny: Make, vectors) -> None:
    bench = Bench(distributed(tiny()), SIZE)
    expect_sum(bench, bench.round(nodes=bench.nodes[:3]), vectors, ["site-0", "site-1", "site-2"])
    bench.grid.faults = {(0, "mask"): lost}
    assert bench.round(2, nodes=bench.nodes[:3]).aggregate is None
    outcome = bench.round(3, nodes=bench.nodes[:2])
    assert outcome.aggregate is None
    assert "2 of 4 nodes are missing" in outcome.dropped[0][1]


@pytest.mark.parametrize(("dropouts", "colluders"), [(2, 0), (1, 2), (0, 3)])
def test_a_plan_that_four_nodes_cannot_keep_is_refused_before_anything(
    tiny: Make, vectors, dropouts: int, colluders: int
) -> None:
    bench = Bench(distributed(tiny(), max_dropouts=dropouts, max_colluders=colluders), SIZE)
    with pytest.raises(PrivacyError, match="privacy.max_dropouts"):
        bench.round()
    assert not any(bench.charged().values())


# --- charges and refusals -----------------------------------------------------------------------------


def test_the_release_is_charged_before_data_is_touched(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(distributed(tiny()), SIZE)
    charged: list[int] = []

    def touch(release: Release, request: RoundRequest) -> tuple[np.ndarray, float]:
        charged.append(len(node_ledger().releases(run="r", node=release.shard.node)))
        raise RuntimeError("killed while it read private text")

    monkeypatch.setattr(distributed_node, "clipped_gradient_sum", touch)
    outcome = bench.round()
    assert charged == [1, 1, 1, 1]
    assert outcome.aggregate is None
    assert bench.charged() == {f"site-{i}": 1 for i in range(4)}
    assert all("private text" not in reason for _, reason in outcome.dropped)
    assert {reply.releases for reply in outcome.replies} == {1}


def test_a_preflight_that_fails_stops_a_node_in_a_distributed_round_too(
    tiny: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs before every training, also where a round is one step of a sum; what was reserved stays."""
    asked: list[str] = []

    def fails(model: object, features: object, plan: Any, *rest: object) -> None:
        asked.append(plan.trust)
        raise PreflightError("the head is not noised")

    monkeypatch.setattr("fedtune.training.preflight.preflight", fails)
    bench = Bench(distributed(tiny()))
    outcome = bench.round()
    assert asked == ["distributed"] * 4
    assert outcome.aggregate is None
    assert [reply.refused or reply.error for reply in outcome.replies] == [
        "PreflightError: the head is not noised"
    ] * 4
    assert bench.charged() == {f"site-{i}": 1 for i in range(4)}


def test_a_node_over_its_budget_refuses_and_the_others_go_on(tiny: Make, vectors) -> None:
    bench = Bench(distributed(tiny()), SIZE)
    # All simulated nodes share one ledger: of them only site-1 has records that were used before.
    spent = run_resources(bench.config).prepared.shards[1]
    ledger = node_ledger()
    ledger.reserve(
        dataset=spent.dataset, fingerprint=spent.identity, node="site-1", run="earlier", round=1,
        plan=dataclasses.replace(bench.plan, num_rounds=1, noise_multiplier=0.05),
    )  # fmt: skip
    ledger.set_budget(PrivacyBudget(epsilon=20.0, delta=1e-4))
    outcome = bench.round()
    expect_sum(bench, outcome, vectors, ["site-0", "site-2", "site-3"])
    ((name, reason),) = outcome.dropped
    assert name == "site-1"
    assert "its owner's budget does not allow it" in reason and "20" not in reason
    assert [r.refusal for r in outcome.replies] == [None, "BudgetExhausted", None, None]
    assert bench.charged()["site-1"] == 0


@pytest.mark.parametrize(
    "change",
    [
        {"noise_multiplier": 0.5}, {"sample_rate": 0.9}, {"max_grad_norm": 2.0}, {"max_dropouts": 0},
        {"max_colluders": 0}, {"unit": "person"},
    ],
)  # fmt: skip
def test_a_node_refuses_another_plan_than_its_own_before_it_makes_keys(tiny: Make, vectors, change) -> None:
    bench = Bench(distributed(tiny()), SIZE)
    outcome = bench.round(plan=changed(bench.plan, **change))
    assert outcome.aggregate is None
    assert {phase for phase, *_ in bench.grid.seen} == {"advertise"}
    assert "PrivacyError" in outcome.dropped[0][1]
    assert not any(bench.charged().values())


def replay(bench: Bench, phase: str, position: int = 0) -> Message:
    """Sends a node the request that it has answered once more."""
    (request, first), *_ = [
        (sent, answer)
        for name, sent, answer in bench.grid.seen
        if name == phase and sent.metadata.dst_node_id == position + 2
    ]
    assert not first.has_error()
    return bench.send(request.metadata.message_type, request.content, position)


@pytest.mark.parametrize("phase", PHASES)
def test_no_request_of_a_round_is_answered_twice(tiny: Make, vectors, phase: str) -> None:
    bench = Bench(distributed(tiny()), SIZE)
    assert bench.round().aggregate is not None
    answer = replay(bench, phase)
    if phase == "mask":
        _, vector = secagg_messages.read_mask_answer(
            answer.content, node="site-0", phase_id=PhaseId("r", 1, 1, "mask"), size=SIZE
        )
        assert vector is None
        assert "in order" in answer.content["reply"]["error"]
    else:
        assert answer.has_error()
    assert bench.charged()["site-0"] == 1
    # The round that was answered is over for good; the next attempt of it is another one, charged again.
    assert bench.round(1, attempt=1).aggregate is None
    assert bench.round(1, attempt=2).aggregate is not None
    assert bench.charged()["site-0"] == 2


def test_a_node_that_lost_its_memory_is_a_dropout(tiny: Make, vectors) -> None:
    """A SuperNode that restarts in the middle of a round has no keys any more."""
    bench = Bench(distributed(tiny()), SIZE)

    def forget(answer: Message) -> Message:
        bench.grid._states[3].clear()  # site-1
        return answer

    bench.grid.faults = {(3, "advertise"): forget}
    outcome = bench.round()
    expect_sum(bench, outcome, vectors, ["site-0", "site-2", "site-3"])
    assert "has no keys for attempt 1" in outcome.dropped[0][1]


@pytest.mark.slow
def test_a_server_that_asks_with_too_few_survivors_gets_no_shares(tiny: Make, vectors) -> None:
    """A sum of two nodes has the noise of two, which is less than the plan's."""
    bench = Bench(distributed(tiny()), SIZE)
    bench.grid.faults = {(i, "unmask"): lost for i in range(4)}
    asked: list[RecordDict] = []
    original = Lossy._deliver

    def few(self: Lossy, message: Message) -> Message:
        if message.metadata.message_type.endswith("unmask"):
            message.content["secagg"]["names"] = ["site-0", "site-1"]
            asked.append(message.content)
        return original(self, message)

    Lossy._deliver = few  # type: ignore[method-assign]
    try:
        assert bench.round().aggregate is None
    finally:
        Lossy._deliver = original  # type: ignore[method-assign]
    answers = [answer for phase, _, answer in bench.grid.seen if phase == "unmask"]
    assert len(answers) == len(asked) == 4
    for answer in answers:
        assert answer.has_error()
        assert "AggregationAborted" in answer.error.reason


# --- nodes that cheat ---------------------------------------------------------------------------------


def change(record: str, key: str, value: Callable[[Any], Any]) -> Callable[[Message], Message]:
    def tamper(answer: Message) -> Message:
        answer.content[record][key] = value(answer.content[record][key])
        return answer

    return tamper


def flip(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:]


@pytest.mark.parametrize(
    ("phase", "key", "value", "said"),
    [
        ("advertise", "masking", lambda key: key[:31], "'site-1' advertised a key of 31 bytes"),
        ("share", "seed_hashes", lambda one: [flip(h) for h in one], "'site-1' sent node 'site-0' a share"),
        ("share", "sealed", lambda one: [flip(s) if s else s for s in one], "'site-1' sent node 'site-0'"),
        ("unmask", "shares", lambda one: [flip(s) for s in one], "'site-1' answered with a wrong share"),
    ],
)
def test_what_cannot_be_right_voids_the_round_and_names_its_sender(
    tiny: Make, vectors, phase: str, key: str, value: Callable[[Any], Any], said: str
) -> None:
    bench = Bench(distributed(tiny()), SIZE)
    bench.grid.faults = {(1, phase): change("secagg", key, value)}
    outcome = bench.round()
    assert outcome.aggregate is None
    assert said in dict(outcome.dropped)["site-3"]
    assert "charged" in dict(outcome.dropped)["site-3"]


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("how", ["key", "type", "record", "round", "version", "nothing"])
def test_a_malformed_answer_costs_its_sender_and_not_the_round(tiny: Make, vectors, phase, how) -> None:
    bench = Bench(distributed(tiny()), SIZE)

    def spoil(answer: Message) -> Message:
        record = answer.content["secagg"]
        if how == "key":
            record["more"] = 1
        if how == "type":
            record["round"] = "1"
        if how == "record":
            answer.content["metrics"] = ConfigRecord({"loss": 0.5})
        if how == "round":
            record["round"] = 7
        if how == "version":
            record["version"] = 9
        if how == "nothing":
            for name in list(answer.content):
                del answer.content[name]
        return answer

    bench.grid.faults = {(1, phase): spoil}
    outcome = bench.round()
    names = ["site-0", "site-2", "site-3"]
    expect_sum(bench, outcome, vectors, sorted([*names, "site-1"]) if phase == "unmask" else names)
    if phase != "unmask":
        assert [name for name, _ in outcome.dropped] == ["site-1"]


@pytest.mark.parametrize("how", ["float32", "short", "lying header", "no numpy"])
def test_a_malformed_vector_costs_its_sender_and_not_the_round(tiny: Make, vectors, how: str) -> None:
    from flwr.app import Array

    bench = Bench(distributed(tiny()), SIZE)

    def spoil(answer: Message) -> Message:
        good = answer.content["masked"]["masked"]
        array = {
            "float32": Array(np.zeros(SIZE, np.float32)),
            "short": Array(np.zeros(SIZE - 1, np.uint32)),
            "lying header": Array("uint32", (SIZE,), good.stype, good.data[:200]),
            "no numpy": Array("uint32", (SIZE,), good.stype, b"x" * (4 * SIZE + 10)),
        }[how]
        answer.content["masked"] = ArrayRecord({"masked": array})
        return answer

    bench.grid.faults = {(1, "mask"): spoil}
    outcome = bench.round()
    expect_sum(bench, outcome, vectors, ["site-0", "site-2", "site-3"])
    assert outcome.dropped[0][0] == "site-1"


# --- the wire -----------------------------------------------------------------------------------------


def test_only_keys_hashes_sealed_shares_and_one_masked_vector_leave_a_node(tiny: Make, vectors) -> None:
    bench = Bench(distributed(tiny()), SIZE)
    bench.round()
    place = {"version", "run", "round", "attempt", "phase"}
    dealt = {"names", "sealed", "seed_hashes", "key_hashes"}
    allowed = {
        "advertise": place | {"sealing", "masking"}, "share": place | dealt | {"seed"}, "mask": place,
        "unmask": place | {"names", "shares"},
    }  # fmt: skip
    assert len(bench.grid.seen) == 16
    for phase, _, answer in bench.grid.seen:
        assert set(answer.content["secagg"]) == allowed[phase]
        assert set(answer.content) == ({"secagg", "reply", "masked"} if phase == "mask" else {"secagg"})
        if phase == "mask":
            array = answer.content["masked"]["masked"]
            assert (array.dtype, array.shape) == ("uint32", (SIZE,))
            counts = np.bincount(array.numpy() >> np.uint32(28), minlength=16)
            assert ((counts - SIZE / 16) ** 2 / (SIZE / 16)).sum() < 60  # chi-square, 15 degrees of freedom
    # Neither key nor seed is ever in clear among what was sent.
    text = b"".join(repr(dict(a.content["secagg"])).encode() for _, _, a in bench.grid.seen)
    for state in bench.grid._states.values():
        record = state["fedtune.secagg"]
        assert json.loads(record["masker"])["secrets"] == ["", "", ""]
        assert json.loads(record["masker"])["held"] == {}
    assert b"masker" not in text


@pytest.mark.parametrize("nodes", [4, 10, 30])
def test_a_node_sends_at_most_twice_the_bytes_of_a_plain_update(nodes: int) -> None:
    size = 75_000  # 300 KB in float32
    names = tuple(f"node-{i}" for i in range(nodes))
    session = Session("0123456789abcdef", 1, 1, names, size, 1, 0)
    maskers = {name: Masker(session, name) for name in names}
    server = MaskedSum(session)
    roster = server.advertised({name: masker.advertise() for name, masker in maskers.items()})
    dealt = {name: maskers[name].share(roster) for name in names}
    received = server.shared(dealt)["node-0"]
    masked = maskers["node-0"].mask(np.zeros(size, np.uint32), received)
    for name in names[1:]:
        maskers[name].check_received(server.shared(dealt)[name])
    shares = maskers["node-0"].unmask(names)
    reply = RoundReply("node-0", session.run, 1, 1, releases=1, steps=1, seconds=1.0)
    first = roster["node-0"]

    def place(phase: str) -> PhaseId:
        return PhaseId(session.run, 1, 1, phase)

    answers = [
        secagg_messages.phase_records(place("advertise"), sealing=first.sealing, masking=first.masking),
        secagg_messages.share_answer(place("share"), dealt["node-0"]),
        secagg_messages.mask_answer(place("mask"), reply, masked),
        secagg_messages.phase_records(place("unmask"), names=list(shares), shares=list(shares.values())),
    ]
    with task_identity(1):
        up = sum(serialized_size(Message(content, 2, "train")) for content in answers)
    assert 4 * size < up < 1.1 * 4 * size


def test_messages_are_read_back_as_they_were_written_or_refused() -> None:
    place = PhaseId("r", 3, 2, "unmask")
    record = secagg_messages.unmask_ask(place, ["a", "b"])
    keys = secagg_messages.ASKS["unmask"]
    assert secagg_messages.read_record(record, keys, "unmask", "It")[0] == place
    for wrong in (
        RecordDict(),
        secagg_messages.unmask_ask(place, ["a", "a"]),
        secagg_messages.phase_records(place, names=[b"a"]),
        secagg_messages.phase_records(place, names="a"),
        secagg_messages.phase_records(PhaseId("r", True, 2, "unmask"), names=["a"]),
        secagg_messages.phase_records(PhaseId("r", 3, 2, "mask"), names=["a"]),
    ):
        with pytest.raises(FederationError, match="^It"):
            secagg_messages.read_record(wrong, keys, "unmask", "It")
    with pytest.raises(UpdateRejected):
        secagg_messages.read_mask_answer(RecordDict(), node="a", phase_id=place, size=3)


# --- whole runs ---------------------------------------------------------------------------------------


def with_persons(folder: Path, n: int = 160) -> Path:
    """The tiny data with a person for every two or three records of a site."""
    tiny_federation.make_data(folder, n)
    for split in ("train", "test"):
        path = folder / f"{split}.csv"
        with path.open(newline="") as handle:
            rows = list(csv.DictReader(handle))
        with path.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, [*rows[0], "person"])
            writer.writeheader()
            for i, row in enumerate(rows):
                writer.writerow({**row, "person": f"{split} {row['site']}-{i // 10}"})
    return folder


@pytest.mark.parametrize("unit", ["record", "person"])
def test_a_run_trains_by_distributed_rounds_and_accounts_the_union(
    tiny_parts: tuple[Path, Path], tmp_path: Path, unit: str
) -> None:
    data = tiny_parts[1] if unit == "record" else with_persons(tmp_path / "data")
    config = tiny_federation.make_config(tiny_parts[0], data, federation__num_rounds=2)
    config.privacy = PrivacyConfig(trust="distributed", unit=unit, epsilon=4.0, max_dropouts=1)
    if unit == "person":
        config.data.unit = "person"
    result = run(config, tmp_path / "run")
    assert [summary.void for summary in result.history] == [False, False]
    assert result.dropped == []
    assert set(result.releases.values()) == {2}
    assert result.plan.declared_size == sum(node.declared_size for node in result.nodes)
    assert result.epsilon is not None
    assert 3.9 < result.epsilon <= 4.0
    assert np.abs(result.adapter - run_resources(config).initial()).max() > 0


def test_a_run_goes_on_from_its_checkpoint_with_the_optimizers_state(tiny: Make, tmp_path: Path) -> None:
    from fedtune.federation.server.checkpoint import load_latest

    config = distributed(tiny(federation__num_rounds=2), epsilon=None)
    run(config, tmp_path / "run")
    saved, _ = load_latest(tmp_path / "run")
    assert set(saved.optimizer) == {"m", "v", "steps", "mean"}
    assert saved.optimizer["steps"][0] == 2
    config.resume = str(tmp_path / "run")
    again = run(config, tmp_path / "run")
    assert len(again.history) == 2


# --- the step -----------------------------------------------------------------------------------------


def test_a_cohort_is_refused(tiny: Make) -> None:
    config = distributed(tiny(federation__cohort_size=2))
    with pytest.raises(ConfigError, match="cohort_size=2"):
        DistributedRound(config, make_plan(config, [30, 30, 30, 30]))
