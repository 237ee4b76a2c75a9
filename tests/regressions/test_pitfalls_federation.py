"""PITFALLS that the federation decides: one test for each row, named after the bug."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict

from fedtune import engines
from fedtune.config.convert import to_json
from fedtune.config.schema import Config
from fedtune.engines.local import LocalGrid
from fedtune.errors import FederationError
from fedtune.federation.client.app import app
from fedtune.federation.client.node_context import node_ledger
from fedtune.federation.events import NullObserver
from fedtune.federation.flower import task_identity
from fedtune.federation.messages import HELLO_KEYS, REPLY_KEYS, RoundReply, RoundRequest
from fedtune.federation.resources import run_resources
from fedtune.federation.server.cohort import discover_nodes
from fedtune.federation.server.rounds import PlainRound, RoundAsk
from fedtune.privacy.ledger.budget import PrivacyBudget
from fedtune.privacy.plan import make_plan
from tests.support import tiny_federation
from tests.support.fake_federation import (
    SIZE,
    Watcher,
    fake_app,
    fake_config,
    honest_update,
    misbehaving,
    run_fake,
)


@pytest.fixture(scope="module")
def tiny_parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    tiny_federation.one_thread()
    folder = tmp_path_factory.mktemp("tiny")
    return tiny_federation.make_model(folder / "model"), tiny_federation.make_data(folder / "data")


@pytest.fixture
def private(tiny_parts: tuple[Path, Path]) -> Callable[..., Config]:
    """A configuration with local DP; keyword arguments as `tiny_federation.make_config` takes them."""
    return lambda **changes: tiny_federation.private(tiny_federation.make_config(*tiny_parts, **changes))


def noise_alone(config: Config) -> Config:
    """Nobody will ever be drawn, so an update is made of noise and nothing else."""
    config.train.sample_rate = 1e-9
    config.privacy.epsilon, config.privacy.noise_multiplier = None, 1.0
    return config


def ask(
    config: Config, *, round: int, attempt: int = 1, state: RecordDict | None = None, run: str = "run"
) -> RoundReply:
    """One message to node 0 of a tiny federation, in a Context that is new unless `state` is given."""
    resources = run_resources(config)
    plan = make_plan(config, [shard.declared_size for shard in resources.prepared.shards])
    node = resources.prepared.shards[0].node
    context = Context(
        1, 2, {"partition-id": 0, "num-partitions": 4}, RecordDict() if state is None else state,
        {"fedtune": to_json(config)},
    )  # fmt: skip
    request = RoundRequest(run, round, attempt, plan, resources.initial())
    with task_identity(1):
        answer = app(Message(request.to_records(), 2, "train"), context)
    return RoundReply.from_records(answer.content, node=node, run=run, round=round, attempt=attempt)


def test_pitfall_2_the_accountant_does_not_start_afresh_every_round(
    private: Callable[..., Config], tmp_path: Path
) -> None:
    config = private(federation__num_rounds=3)
    watcher = Watcher()
    result = engines.run(config, tmp_path, watcher)
    epsilons = [summary.epsilon for summary in watcher.rounds]
    assert epsilons == [result.plan.epsilon(r) for r in (1, 2, 3)]
    assert epsilons[0] is not None
    assert epsilons[2] is not None
    assert epsilons[0] < 0.9 * epsilons[2] <= 0.9 * 8.0
    # And the node's own books say the same, although each message came in by itself.
    ledger = node_ledger()
    assert len(ledger.releases(run=result.run, node="site-0")) == 3
    (shard, *_) = run_resources(config).prepared.shards
    epsilon = ledger.epsilon(dataset=shard.dataset, fingerprint=shard.identity, delta=result.plan.delta)
    assert epsilon == pytest.approx(epsilons[2], rel=1e-6)


def test_pitfall_3_a_node_that_joins_late_or_restarts_trains_with_the_same_protection(
    private: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.privacy.plan import PrivacyPlan

    drawn = []
    noise = PrivacyPlan.noise

    def watch(self, size, entropy):  # type: ignore[no-untyped-def]
        drawn.append(self.noise_std())
        return noise(self, size, entropy)

    monkeypatch.setattr(PrivacyPlan, "noise", watch)
    config = private(federation__num_rounds=5)
    state = RecordDict()
    for round, kept in ((1, state), (2, state), (4, RecordDict()), (5, RecordDict())):  # late, restarted
        assert ask(config, round=round, state=kept).update is not None
    assert len(drawn) == 4 * config.train.local_steps
    assert len(set(drawn)) == 1
    assert drawn[0] > 0
    assert len(node_ledger().releases(run="run")) == 4


def test_pitfall_4_weights_are_public_and_the_same_as_the_noise_assumes(tmp_path: Path) -> None:
    # A node cannot raise its weight: there is no key for it, and what it counts does not travel.
    assert not any("num" in key or "example" in key or "weight" in key for key in REPLY_KEYS)
    result = run_fake(tmp_path, misbehaving(1, "extra key"), config=fake_config(num_rounds=1))
    uniform = (honest_update(0, 1).astype(np.float64) + honest_update(2, 1)) / 2
    np.testing.assert_allclose(result.adapter, uniform, rtol=1e-6)
    # Declared sizes (100, 200, 300) do not change uniform weights either.
    plan = make_plan(fake_config(), [100, 200, 300])
    np.testing.assert_array_equal(plan.aggregation_weights(["a", "b", "c"]), np.full(3, 1 / 3))


def test_pitfall_16_a_nan_update_does_not_poison_the_adapter_and_a_zero_update_is_one(tmp_path: Path) -> None:
    def odd(node, request, reply):  # type: ignore[no-untyped-def]
        if node == 0:
            return dataclasses.replace(reply, update=np.zeros(SIZE, np.float32))  # a norm of zero
        return misbehaving(1, "nan")(node, request, reply)

    result = run_fake(tmp_path, odd, config=fake_config(num_rounds=2))
    assert np.isfinite(result.adapter).all()
    expected = sum(honest_update(2, r).astype(np.float64) / 2 for r in (1, 2))
    np.testing.assert_allclose(result.adapter, expected, rtol=1e-6)


def test_pitfall_16_an_empty_poisson_batch_is_a_step_and_is_charged(private: Callable[..., Config]) -> None:
    config = noise_alone(private())
    reply = ask(config, round=1)
    assert reply.update is not None
    assert np.linalg.norm(reply.update) > 0  # noise alone
    assert np.isfinite(reply.update).all()
    assert reply.releases == 1


def test_pitfall_21_a_round_that_is_retried_is_charged_twice_or_not_answered(
    private: Callable[..., Config],
) -> None:
    config = private(federation__num_rounds=4)
    state = RecordDict()
    first = ask(config, round=1, state=state)
    again = ask(config, round=1, state=state)  # the same message once more
    assert first.update is not None
    assert again.update is None
    assert len(node_ledger().releases(run="run")) == 1
    retried = ask(config, round=1, attempt=2, state=state)  # the server came back from a crash
    assert retried.update is not None
    assert len(node_ledger().releases(run="run")) == 2
    # Without any memory but the ledger, never more releases than were agreed to.
    answers = [ask(config, round=1, attempt=a).update is not None for a in (3, 4, 5, 6)]
    assert answers == [True, True, False, False]
    assert len(node_ledger().releases(run="run")) == 4


def test_pitfall_21_a_training_that_failed_stays_charged(
    private: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object, **options: object) -> None:
        raise RuntimeError

    monkeypatch.setattr("fedtune.training.local.train_locally", fails)
    reply = ask(private(), round=1)
    assert reply.update is None
    assert reply.releases == 1
    assert len(node_ledger().releases(run="run")) == 1


def test_pitfall_22_a_resumed_run_does_not_repeat_noise(
    private: Callable[..., Config], tmp_path: Path
) -> None:
    # By the system's entropy: the same question, asked in two attempts, has different answers.
    config = noise_alone(private(federation__num_rounds=6))
    updates = [ask(config, round=1, attempt=attempt).update for attempt in (1, 2)]
    assert not np.allclose(updates[0], updates[1])
    # Where noise is reproducible by wish, the seed tells it anyway: a resumed simulation ends alike.
    config.privacy.reproducible_noise = True
    one, two = (ask(config, round=1, attempt=attempt, run="simulated").update for attempt in (3, 4))
    assert np.array_equal(one, two)
    # So no such run is taken for a private one: the node's books count its releases as without noise.
    (shard, *_) = run_resources(config).prepared.shards
    data = {"dataset": shard.dataset, "fingerprint": shard.identity}
    charged = [release.steps for release in node_ledger().releases()]
    assert [steps is None for steps in charged] == [False, False, True, True]
    assert node_ledger().epsilon(**data, delta=1e-5) == math.inf
    # And the server's attempt rises with every start of a run, even of one that died before its first round.
    attempts = []

    def note(node, request, reply):  # type: ignore[no-untyped-def]
        attempts.append(request.attempt)
        return reply

    class Dies(PlainRound):
        def run_round(self, grid, ask, observer):  # type: ignore[no-untyped-def]
            super().run_round(grid, ask, observer)
            raise RuntimeError

    fake = fake_config(num_rounds=1)
    for start in range(4):
        with pytest.raises(RuntimeError):
            run_fake(tmp_path, note, nodes=1, config=fake, protocol=Dies())
        fake = dataclasses.replace(fake, resume=str(tmp_path))
        assert attempts == list(range(1, start + 2))


def test_pitfall_26_no_sizes_losses_epsilons_or_exact_times_leave_a_node(
    private: Callable[..., Config],
) -> None:
    for word in ("example", "loss", "accuracy", "epsilon", "histogram", "labels", "batch", "drawn"):
        assert not any(word in key for key in {*REPLY_KEYS, *HELLO_KEYS})
    config = private(federation__num_rounds=6)
    assert {ask(config, round=round).seconds for round in range(1, 4)} == {0.0}
    config = private(federation__num_rounds=6, data__public=True)
    seconds = {ask(config, round=round).seconds for round in range(4, 7)}
    assert 0.0 not in seconds
    grid = [float(f"{1.25**k:.4g}") for k in range(-40, 20)]
    assert all(any(s == pytest.approx(g, rel=1e-3) for g in grid) for s in seconds)


def test_pitfall_29_epsilon_is_the_largest_over_the_nodes_and_never_an_average(tmp_path: Path) -> None:
    config = fake_config()
    config.privacy = dataclasses.replace(config.privacy, trust="local", epsilon=None, noise_multiplier=1.0)

    def uneven(node, request, reply):  # type: ignore[no-untyped-def]
        return dataclasses.replace(reply, releases=request.round if node == 2 else 1)

    result = run_fake(tmp_path, uneven, config=config)
    assert result.releases == {"node-0": 1, "node-1": 1, "node-2": 3}
    assert result.epsilon == result.plan.epsilon(3)
    assert result.epsilon > np.mean([result.plan.epsilon(n) for n in (1, 1, 3)])
    assert "epsilon" not in REPLY_KEYS  # a node cannot even send one to be averaged


@pytest.mark.parametrize("array", [np.float32(7.0).reshape(()), np.full((1, SIZE), 7.0, np.float32)])
def test_pitfall_30_arrays_of_other_dimensions_do_not_slip_through(array: np.ndarray) -> None:
    def sends(node, request, reply):  # type: ignore[no-untyped-def]
        records = reply.to_records()
        if node == 0:
            records["update"] = ArrayRecord({"update": Array(array)})
        return records

    grid = LocalGrid(fake_app(sends), 2, {}, timeout=5.0)
    with task_identity(grid.run_id):
        nodes, _, _ = discover_nodes(grid, 5.0, expected=2)
        plan = make_plan(fake_config(), [100, 200])
        question = RoundAsk("run", 1, 1, plan, np.zeros(SIZE, np.float32), nodes, 5.0, 100.0)
        outcome = PlainRound().run_round(grid, question, NullObserver())
    assert outcome.used == ["node-1"]
    assert [node for node, _ in outcome.dropped] == ["node-0"]
    np.testing.assert_allclose(outcome.aggregate, honest_update(1, 1))


def test_pitfall_30_what_a_node_sends_is_one_flat_array_whatever_it_was_made_of() -> None:
    for update in (np.float32(3.0).reshape(()), np.ones((2, 3), np.float32), np.ones(4, np.float32)):
        sent = RoundReply("a", "r", 1, 1, update=update).to_records()["update"]["update"]
        assert sent.shape == (update.size,)
        assert sent.dtype == "float32"


def test_pitfall_33_another_partition_of_spent_data_is_refused_before_its_first_round(
    private: Callable[..., Config], tmp_path: Path
) -> None:
    """Each node had a ledger by its name, so that other names found a fresh budget: 7.967, again 7.967."""
    config = private(federation__num_rounds=2)
    first = engines.run(config, tmp_path / "natural")
    assert first.epsilon is not None and 7.0 < first.epsilon <= 8.0
    again = private(federation__num_rounds=2, partition__name="iid", federation__nodes=3, seed=1)
    shards = run_resources(again).prepared.shards
    ledger = node_ledger()
    ledger.set_budget(PrivacyBudget(8.0, first.plan.delta), dataset=shards[0].dataset)
    spent = ledger.epsilon(dataset=shards[0].dataset, fingerprint=shards[0].identity, delta=first.plan.delta)
    assert spent == pytest.approx(first.epsilon, rel=1e-6)
    before = len(ledger.releases())
    with pytest.raises(FederationError):
        engines.run(again, tmp_path / "iid")
    assert len(ledger.releases()) == before  # nothing was charged, for nothing was released
