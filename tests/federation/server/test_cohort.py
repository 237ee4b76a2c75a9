"""Nodes that join late, leave, come back or are late, and a run that waits for its minimum."""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from fedtune.config.schema import Config
from fedtune.deploy.flower import error_in_place_of
from fedtune.engines.local import LocalGrid
from fedtune.errors import FederationError
from fedtune.federation.events import FederationResult, NodeInfo
from fedtune.federation.flower import task_identity
from fedtune.federation.messages import VERSION
from fedtune.federation.server import cohort as roster_module
from fedtune.federation.server.agreement import PROPOSE
from fedtune.federation.server.checkpoint import load_latest
from fedtune.federation.server.cohort import Roster
from fedtune.federation.server.loop import run_rounds
from fedtune.federation.server.tracking_grid import TrackingGrid
from tests.support.fake_federation import FakeServerSide, Watcher, fake_app, fake_config, honest_update


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roster_module, "_POLL_SECONDS", 0.02)


class Field(LocalGrid):
    """Nodes that come and go and take their time, as `plan` has it.

    `away`: positions that are not connected. `seconds`: by (position, round), how long an answer takes, 0 by
    default; round 0 is discovery.
    """

    def __init__(self, nodes: int = 3) -> None:
        super().__init__(fake_app(), nodes, {}, timeout=30.0)
        self.away: set[int] = set()
        self.seconds: dict[tuple[int, int], float] = {}
        self.asked: list[tuple[int, int]] = []  # (round, position)
        self._due: dict[str, tuple[float, Message]] = {}

    def get_node_ids(self) -> list[int]:
        return [node_id for node_id in super().get_node_ids() if node_id - 2 not in self.away]

    def push_messages(self, messages: Any) -> list[str]:
        messages = list(messages)
        ids = list(super().push_messages(messages))
        for message in messages:
            node, round = message.metadata.dst_node_id - 2, int(message.metadata.group_id or 0)
            kind = message.metadata.message_type
            if kind == "train":
                self.asked.append((round, node))
            wait = self.seconds.get((node, round if kind == "train" else 0), 0.0)
            self._due[message.metadata.message_id] = (time.monotonic() + wait, message)
        return ids

    def pull_messages(self, message_ids: Any) -> list[Message]:
        now = time.monotonic()
        ready = [name for name in set(message_ids) & set(self._due) if self._due[name][0] <= now]
        for name in ready:
            del self._due[name]
        return [self._answer(name) for name in ready]


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time passes only where somebody sleeps: a busy machine misses no deadline, nobody waits for one."""
    now = [1_000.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", sleep)


def real(**federation: Any) -> Config:
    """A configuration of a real federation, whose nodes all have machines of their own."""
    config = fake_config(**federation)
    config.engine.name = "deployment"
    return config


def run(grid: LocalGrid, config: Config, folder: Path, watcher: Any, expected: int = 3) -> FederationResult:
    with task_identity(grid.run_id):
        return run_rounds(
            grid, config, folder, watcher, server_side=FakeServerSide(), expected_nodes=expected
        )


def mean(round: int, *nodes: int) -> np.ndarray:
    total: np.ndarray = np.sum([honest_update(i, round).astype(np.float64) for i in nodes], axis=0)
    return total / len(nodes)


@pytest.mark.slow
def test_a_round_goes_on_at_its_deadline_and_a_late_update_is_dropped_and_charged(tmp_path: Path) -> None:
    grid, watcher = Field(), Watcher()
    grid.seconds = {(2, 1): 2.4, (0, 2): 1.2, (1, 2): 1.2}  # in round 2 the others wait for its late answer
    result = run(grid, real(num_rounds=3, round_timeout=1.5), tmp_path, watcher)
    assert grid.asked == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
    expected = mean(1, 0, 1) + mean(2, 0, 1) + mean(3, 0, 1, 2)
    np.testing.assert_allclose(result.adapter, expected, rtol=1e-6)
    assert [(one.node, one.round) for one in result.dropped] == [("node-2", 1)]
    assert "did not answer in 1.5 s" in result.dropped[0].reason
    # Charged for the round that it was late for; what it said itself in round 3 is the fake's count, 3.
    assert load_latest(tmp_path)[0].meta["releases"] == {"node-0": 3, "node-1": 3, "node-2": 3}
    assert watcher.waits == []


@pytest.mark.slow
def test_a_node_that_never_answers_is_charged_once_and_not_asked_while_its_question_is_open(
    tmp_path: Path,
) -> None:
    grid = Field()
    grid.seconds = {(2, 1): 1e6}
    result = run(grid, real(num_rounds=4, round_timeout=0.3), tmp_path, Watcher())
    assert [round for round, node in grid.asked if node == 2] == [1]
    assert result.releases == {"node-0": 4, "node-1": 4, "node-2": 1}


@pytest.mark.slow
def test_the_deadline_is_counted_from_the_question_only_where_nodes_work_side_by_side(tmp_path: Path) -> None:
    times = {(0, 1): 0.3, (1, 1): 0.7, (2, 1): 1.1}  # no pause longer than 0.4 s, and 1.1 s in all
    for config, used in ((real(num_rounds=1, round_timeout=0.9), 2), (fake_config(num_rounds=1), 3)):
        config.federation.round_timeout = 0.9
        grid = Field()
        grid.seconds = dict(times)
        result = run(grid, config, tmp_path / str(used), Watcher())
        assert result.history[0].updates == used


def test_below_the_minimum_a_run_waits_says_why_and_asks_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grid = Field()

    class Leaves(Watcher):
        def on_round(self, summary: Any) -> None:
            super().on_round(summary)
            grid.away = {1, 2} if summary.round == 1 else set()

        def on_wait(self, reason: str) -> None:
            super().on_wait(reason)
            if "node-1, node-2" in reason:
                grid.away = {1}

    watcher = Leaves()
    with caplog.at_level(logging.INFO, "fedtune.federation.server.cohort"):
        result = run(grid, real(num_rounds=3, min_updates=2), tmp_path, watcher)
    assert [summary.updates for summary in result.history] == [3, 2, 3]
    assert [summary.void for summary in result.history] == [False] * 3
    assert watcher.waits == [
        "round 2 waits: 1 of the 2 nodes that it needs are here and free; not connected: node-1, node-2",
        "",
    ]
    assert [(round, node) for round, node in grid.asked if round == 2] == [(2, 0), (2, 2)]
    assert sum("waits" in line.message for line in caplog.records) == 1  # at most one line a minute
    joined = [(node, status) for node, status in watcher.clients if status in ("joined", "left")]
    assert joined == [("node-1", "left"), ("node-2", "left"), ("node-2", "joined"), ("node-1", "joined")]


def test_a_run_for_fewer_nodes_than_a_round_needs_is_refused_before_a_charge(tmp_path: Path) -> None:
    """Two are connected, as it needs, and one cannot say who it is: each round would be void, and charged."""

    class Failing(Field):
        def pull_messages(self, message_ids: Any) -> Any:
            answers = list(super().pull_messages(message_ids))
            return [
                error_in_place_of(answer, "its disk is full")
                if answer.metadata.message_type == "query.hello" and answer.metadata.src_node_id == 2
                else answer
                for answer in answers
            ]

    grid = Failing()
    with pytest.raises(FederationError, match=r"2 of 3 nodes agreed .* a round needs 3 .*its disk is full"):
        run(grid, real(num_rounds=3, round_timeout=0.2, min_updates=3), tmp_path, Watcher())
    assert grid.asked == []


def test_a_run_waits_for_its_first_nodes(tmp_path: Path) -> None:
    grid = Field()
    grid.away = {0, 1, 2}

    class Comes(Watcher):
        def on_wait(self, reason: str) -> None:
            super().on_wait(reason)
            grid.away -= {2 - len(grid.away) % 3, 0}

    watcher = Comes()
    result = run(grid, real(num_rounds=1, round_timeout=0.2, min_updates=2), tmp_path, watcher, expected=2)
    assert result.history[0].updates >= 2
    assert watcher.waits[0] == "0 nodes are connected, and a round needs 2 (federation.min_updates)"
    assert watcher.waits[-1] == ""


@pytest.mark.slow
def test_a_node_that_said_late_who_it_is_takes_part_when_it_has(tmp_path: Path) -> None:
    """It is connected and stays so: nobody would ask it again when it comes back, for it never goes."""
    grid = Field()
    grid.seconds = {(2, 0): 0.4, **{(0, round): 0.2 for round in range(1, 7)}}
    result = run(grid, real(num_rounds=6, round_timeout=0.3), tmp_path, Watcher())
    late = [round for round, node in grid.asked if node == 2]
    assert late and late[0] > 1 and late[-1] == 6
    assert result.history[-1].updates == 3


def test_a_node_that_could_not_is_asked_again_while_a_round_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster_module, "_AGAIN_SECONDS", 0.1)
    grid = Field()
    roster = Roster(TrackingGrid(grid), [NodeInfo("node-0", 2, 100)], [3], dynamic=True, observer=Watcher())
    with task_identity(grid.run_id):
        assert [node.name for node in roster.wait_for(3, [], 1)] == ["node-0", "node-1", "node-2"]


@pytest.mark.slow
def test_a_node_that_joins_late_takes_part_from_the_next_round(tmp_path: Path) -> None:
    grid = Field()
    grid.away = {2}
    grid.seconds = {(0, 2): 0.2, (0, 3): 0.2, (2, 0): 0.1}

    class Joins(Watcher):
        def on_round(self, summary: Any) -> None:
            super().on_round(summary)
            grid.away = set()

    watcher = Joins()
    result = run(grid, real(num_rounds=4), tmp_path, watcher, expected=2)
    # Discovered before round 2 and proposed the run before round 3, while they go on; asked in round 4.
    assert [(round, node) for round, node in grid.asked if node == 2] == [(4, 2)]
    expected = mean(1, 0, 1) + mean(2, 0, 1) + mean(3, 0, 1) + mean(4, 0, 1, 2)
    np.testing.assert_allclose(result.adapter, expected, rtol=1e-6)
    assert [node.name for node in result.nodes] == ["node-0", "node-1", "node-2"]
    assert ("node-2", "joined") in watcher.clients


def test_a_node_that_joins_late_and_does_not_agree_to_the_run_is_asked_nothing(tmp_path: Path) -> None:
    class Unwilling(Field):
        def _deliver(self, message: Message) -> Message:
            answer = super()._deliver(message)
            if message.metadata.message_type == PROPOSE and message.metadata.dst_node_id == 4:
                values = {"version": VERSION, "node": "node-2", "run": "", "attempt": 1}
                values |= {"run": str(message.content["proposal"]["run"])}
                refused = {"refused": "BudgetExhausted: no", "refusal": "BudgetExhausted", "last_round": 0}
                answer.content = RecordDict({"consent": ConfigRecord({**values, **refused})})
            return answer

    grid = Unwilling()
    grid.away = {2}

    class Joins(Watcher):
        def on_round(self, summary: Any) -> None:
            super().on_round(summary)
            grid.away = set()

    result = run(grid, real(num_rounds=5), tmp_path, Joins(), expected=2)
    assert not [node for _, node in grid.asked if node == 2]
    assert [(one.node, one.reason) for one in result.dropped] == [("node-2", "BudgetExhausted: no")]
    assert [node.name for node in result.nodes] == ["node-0", "node-1"]


def test_who_took_part_before_a_crash_stays_in_the_books(tmp_path: Path) -> None:
    class Stops(Watcher):
        def on_round(self, summary: Any) -> None:
            if summary.round == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Field(), real(num_rounds=4), tmp_path, Stops())
    grid = Field()
    grid.away = {1}
    config = dataclasses.replace(real(num_rounds=4), resume=str(tmp_path))
    result = run(grid, config, tmp_path, Watcher(), expected=2)
    assert [node.name for node in result.nodes] == ["node-0", "node-1", "node-2"]
    assert result.releases == {"node-0": 4, "node-1": 2, "node-2": 4}


def a_roster(grid: Field, watcher: Watcher, known: int, **settings: Any) -> Roster:
    nodes = [NodeInfo(f"node-{i}", i + 2, 100) for i in range(known)]
    return Roster(TrackingGrid(grid), nodes, dynamic=True, timeout=5.0, observer=watcher, **settings)


def test_no_node_joins_where_the_noise_is_shared_out() -> None:
    grid, watcher = Field(), Watcher()
    with task_identity(grid.run_id):
        roster = a_roster(grid, watcher, 2, closed=True)
        roster.refresh()
        here = roster.refresh(3)
        assert [node.name for node in here] == ["node-0", "node-1"]
        assert "shared out over the nodes of the beginning" in roster.dropped[0].reason
        grid.away = {0}
        assert [node.name for node in roster.refresh(4)] == ["node-1"]
        grid.away = set()
        assert [node.name for node in roster.refresh(5)] == ["node-0", "node-1"]
        assert len(roster.dropped) == 1  # it is not asked again while it stays


def test_a_second_node_of_one_name_does_not_join() -> None:
    grid, watcher = Field(), Watcher()
    grid._nodes[4]["partition-id"] = 0
    with task_identity(grid.run_id):
        roster = a_roster(grid, watcher, 2)
        roster.refresh()
        roster.refresh()
        assert "another node of that name is connected" in roster.dropped[0].reason
        # The first is gone, and the second comes back: a site that made a new key.
        grid.away = {0, 2}
        roster.refresh()
        grid.away = {0}
        roster.refresh()
        assert {node.node_id for node in roster.refresh()} == {3, 4}


def test_a_run_does_not_wait_for_nodes_that_have_used_up_their_releases() -> None:
    grid, watcher = Field(), Watcher()
    with task_identity(grid.run_id):
        roster = a_roster(grid, watcher, 3)
        assert [node.name for node in roster.wait_for(3, ["node-1"], 2)] == ["node-0", "node-2"]
    assert watcher.waits == []


def test_ctrl_c_ends_the_wait(tmp_path: Path) -> None:
    import threading

    grid, stop = Field(), threading.Event()
    grid.away = {0, 1, 2}
    stop.set()
    with task_identity(grid.run_id), pytest.raises(KeyboardInterrupt):
        run_rounds(grid, real(), tmp_path, server_side=FakeServerSide(), stop=stop)


def test_in_a_simulation_nobody_is_waited_for(tmp_path: Path) -> None:
    grid = Field()
    grid.away = {1, 2}
    with pytest.raises(FederationError, match="1 of 1 nodes agreed to the run, and a round needs 2"):
        run(grid, fake_config(num_rounds=5, min_updates=2), tmp_path, Watcher(), expected=1)
