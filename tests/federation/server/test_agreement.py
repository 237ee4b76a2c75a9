"""Issue 10, item 7 (PITFALLS 40): the whole run is checked before round 1, and refused without a charge."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedtune.config.convert import to_json
from fedtune.config.schema import Config
from fedtune.engines.local import LocalGrid
from fedtune.errors import FederationError
from fedtune.federation.client.app import app
from fedtune.federation.client.node_context import node_ledger
from fedtune.federation.events import FederationResult
from fedtune.federation.flower import task_identity
from fedtune.federation.messages import VERSION, Proposal
from fedtune.federation.resources import run_resources
from fedtune.federation.server.agreement import read_consent
from fedtune.federation.server.loop import run_rounds
from fedtune.privacy.ledger.ledger import PrivacyBudget
from fedtune.privacy.plan import make_plan
from tests.support.fake_federation import FakeServerSide, Watcher, fake_app, fake_config
from tests.support.tiny_federation import private

Make = Callable[..., Config]


@pytest.fixture
def config(tiny: Make) -> Config:
    return private(tiny(federation__num_rounds=3), epsilon=4.0)


def simulate(config: Config, run_dir: Path, observer: Any = None) -> FederationResult:
    grid = LocalGrid(app, 4, {"fedtune": to_json(config)}, timeout=60.0)
    try:
        with task_identity(grid.run_id):
            return run_rounds(grid, config, run_dir, observer, expected_nodes=4)
    finally:
        grid.close()


def shards(config: Config) -> list[Any]:
    return list(run_resources(config).prepared.shards)


def allow(config: Config, epsilon: float, delta: float = 1e-5) -> None:
    node_ledger().set_budget(PrivacyBudget(epsilon, delta))


def charged(config: Config) -> list[int]:
    return [len(node_ledger().releases(node=shard.node)) for shard in shards(config)]


def spend(config: Config, position: int, rounds: int) -> None:
    """Earlier releases of one node's data, as a run of before made them."""
    shard = shards(config)[position]
    plan = make_plan(config, [one.declared_size for one in shards(config)]).for_shard(shard.declared_size)
    for number in range(rounds):
        node_ledger().reserve(
            dataset=shard.dataset, fingerprint=shard.identity, node=shard.node, run="before",
            round=number + 1, plan=plan,
        )  # fmt: skip


def test_pitfall_40_a_run_that_no_budget_allows_is_refused_before_round_1_and_charges_nothing(
    config: Config, tmp_path: Path
) -> None:
    config.privacy.epsilon = 6.0
    allow(config, 4.0)  # enough for a round or two, not for three
    with pytest.raises(
        FederationError, match="0 of 4 nodes agreed to the run.*nothing was charged"
    ) as caught:
        simulate(config, tmp_path)
    assert charged(config) == [0, 0, 0, 0]
    assert all(shard.node in str(caught.value) for shard in shards(config))
    assert not list(tmp_path.glob("checkpoint/round-*")), "there is nothing to go on with"


def test_a_run_that_fits_exactly_runs_to_its_end_within_the_budget(config: Config, tmp_path: Path) -> None:
    """What `submit` does as shipped: no delta is set, and the owners' budgets have one."""
    config.privacy.epsilon = 4.0
    allow(config, 4.0)
    result = simulate(config, tmp_path)
    assert result.plan.delta == 1e-5, "the smallest of the owners', not 1/(2n)"
    assert charged(config) == [3, 3, 3, 3] and not result.dropped
    for shard in shards(config):
        spent = node_ledger().epsilon(dataset=shard.dataset, fingerprint=shard.identity, delta=1e-5)
        assert 3.0 < spent <= 4.0


def test_one_who_cannot_pay_for_telling_its_size_is_left_out_by_its_name(
    config: Config, tmp_path: Path
) -> None:
    poor = shards(config)[1].node
    spend(config, 1, 3)
    allow(config, 6.0)
    config.output = str(tmp_path)
    config.data.declared_size = None  # so that each says how much it has, before it can say who it is
    watcher = Watcher()
    result = simulate(config, tmp_path, watcher)
    assert list(result.left_out) == [poor] and "BudgetExhausted" in result.left_out[poor]
    assert any(name == poor and status.startswith("dropped: ") for name, status in watcher.clients)
    assert not any("num-supernodes" in notice for notice in result.notices), "starting more would not help"


@pytest.mark.slow
def test_one_who_cannot_pay_is_left_out_with_its_reason_and_the_others_go_on(
    config: Config, tmp_path: Path
) -> None:
    poor = shards(config)[1].node
    spend(config, 1, 3)
    allow(config, 6.0)
    watcher = Watcher()
    result = simulate(config, tmp_path, watcher)
    assert charged(config) == [3, 3, 3, 3] and poor not in [node.name for node in result.nodes]
    ((node, round),) = [(one.node, one.round) for one in result.dropped]
    assert (node, round) == (poor, 0) and "BudgetExhausted" in result.dropped[0].reason
    assert list(result.left_out) == [poor] and "BudgetExhausted" in result.left_out[poor]
    assert any(name == poor and status.startswith("refused: ") for name, status in watcher.clients)


@pytest.mark.slow
def test_shared_noise_is_shared_out_anew_over_those_who_agree(config: Config, tmp_path: Path) -> None:
    config.privacy.trust = "distributed"
    spend(config, 1, 3)
    allow(config, 6.0)
    result = simulate(config, tmp_path)
    assert result.plan.nodes == 3 and len(result.nodes) == 3
    sizes = [shard.declared_size for i, shard in enumerate(shards(config)) if i != 1]
    assert result.plan.declared_size == sum(sizes)
    assert [count for count in charged(config) if count] == [3, 3, 3, 3]


def test_too_few_who_agree_end_the_run_before_it_began(config: Config, tmp_path: Path) -> None:
    config.federation.min_updates = 4
    spend(config, 1, 3)
    allow(config, 6.0)
    with pytest.raises(FederationError, match=r"3 of 4 nodes agreed.*federation.min_updates=4"):
        simulate(config, tmp_path)
    assert charged(config) == [0, 3, 0, 0]


class Stops(Watcher):
    """Ends a run after its first round."""

    def on_round(self, summary: Any) -> None:
        raise KeyboardInterrupt


@pytest.mark.slow
def test_a_run_that_goes_on_is_asked_again_for_what_is_left(config: Config, tmp_path: Path) -> None:
    allow(config, 4.0)
    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path, Stops())
    assert charged(config) == [1, 1, 1, 1]
    again = dataclasses.replace(config, resume=str(tmp_path))
    allow(config, 3.0)  # an owner who has thought again
    with pytest.raises(FederationError, match="0 of 4 nodes agreed"):
        simulate(again, tmp_path)
    assert charged(config) == [1, 1, 1, 1]
    allow(config, 4.0)  # what is left fits, as it did: what was spent is not counted twice
    finished = simulate(again, tmp_path)
    assert len(finished.history) == 3 and not finished.left_out
    assert charged(config) == [3, 3, 3, 3]


@pytest.mark.slow
def test_who_refuses_to_go_on_has_a_part_in_what_it_trained_before(config: Config, tmp_path: Path) -> None:
    allow(config, 4.0)
    with pytest.raises(KeyboardInterrupt):
        simulate(config, tmp_path, Stops())
    allow(config, 20.0)
    spend(config, 1, 3)
    allow(config, 4.0)
    result = simulate(dataclasses.replace(config, resume=str(tmp_path)), tmp_path)
    assert [one.node for one in result.dropped] == [shards(config)[1].node] and not result.left_out


class Answers(LocalGrid):
    """Fakes, of which node 1 answers the proposal with `content`."""

    def __init__(self, content: RecordDict | None) -> None:
        super().__init__(fake_app(), 3, {}, timeout=30.0)
        self.content = content

    def _deliver(self, message: Message) -> Message:
        answer = super()._deliver(message)
        if message.metadata.message_type == "query.propose" and message.metadata.dst_node_id == 3:
            if self.content is None:
                raise RuntimeError("broken")
            answer.content = self.content
        return answer


def consent(**changes: Any) -> RecordDict:
    values = {"version": VERSION, "node": "node-1", "run": "r", "attempt": 1, "refused": "", "refusal": ""}
    values["last_round"] = 0
    return RecordDict({"consent": ConfigRecord({**values, **changes})})


@pytest.mark.parametrize(
    "content",
    [
        consent(), consent(node="node-0"), consent(more=1), consent(refused=3), RecordDict(),
        RecordDict({**consent(), "loss": ConfigRecord({"loss": 0.3})}),
    ],
)  # fmt: skip
def test_what_is_no_consent_is_a_refusal(content: RecordDict, tmp_path: Path) -> None:
    grid = Answers(content)
    with task_identity(grid.run_id):
        result = run_rounds(
            grid, fake_config(num_rounds=1), tmp_path, server_side=FakeServerSide(), expected_nodes=3
        )
    assert [node.name for node in result.nodes] == ["node-0", "node-2"]
    assert [(one.node, one.round) for one in result.dropped] == [("node-1", 0)]


def test_a_proposal_that_is_none_is_answered_with_an_error(config: Config) -> None:
    context = Context(
        run_id=1, node_id=10, node_config={"partition-id": 0, "num-partitions": 4}, state=RecordDict(),
        run_config={"fedtune": to_json(config)},
    )  # fmt: skip
    plan = make_plan(config, [30] * 4)
    digest = run_resources(config).digest()
    good = Proposal("r", 1, plan, digest).to_records()
    with task_identity(1):
        for content in (RecordDict(), RecordDict({**good, "more": ConfigRecord({"a": 1})})):
            assert app(Message(content, 10, "query.propose"), context).has_error()
        answer = app(Message(good, 10, "query.propose"), context)
        name = shards(config)[0].node
        assert read_consent(answer, name, Proposal("r", 1, plan, digest)).refused is None
        weaker = dataclasses.replace(plan, noise_multiplier=plan.noise_multiplier / 2)
        weak = Proposal("r", 1, weaker, digest)
        answer = app(Message(weak.to_records(), 10, "query.propose"), context)
        refused = read_consent(answer, name, weak)
        other = Proposal("r", 1, plan, "0" * 64)
        unlike = read_consent(app(Message(other.to_records(), 10, "query.propose"), context), name, other)
    assert refused.refusal == "PrivacyError" and "permits 4" in str(refused.refused)
    assert unlike.refusal == "ModelError"
    assert f"digest is {digest[:12]} here and 000000000000 there" in str(unlike.refused)
