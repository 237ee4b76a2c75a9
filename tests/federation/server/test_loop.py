"""The loop over rounds: void rounds, early ends, cohorts, resumed runs, interruptions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from fedtune.errors import AggregationAborted, CheckpointError, ConfigError, FederationError
from fedtune.federation.events import PRUNED, NodeInfo, RoundSummary, StoppingObserver
from fedtune.federation.server.agreement import check_possible
from fedtune.federation.server.checkpoint import load_latest
from fedtune.federation.server.cohort import draw_cohort
from fedtune.federation.server.rounds import PlainRound
from tests.support.fake_federation import (
    SIZE,
    FakeServerSide,
    Watcher,
    fake_config,
    honest,
    honest_update,
    misbehaving,
    run_fake,
)
from tests.support.golden import Golden


def mean(round: int, nodes: int = 3) -> np.ndarray:
    return sum(honest_update(i, round).astype(np.float64) for i in range(nodes)) / nodes  # type: ignore[return-value]


def test_the_mean_of_all_updates_is_added_each_round(tmp_path: Path) -> None:
    watcher, side = Watcher(), FakeServerSide()
    result = run_fake(tmp_path, observer=watcher, server_side=side)
    np.testing.assert_allclose(result.adapter, mean(1) + mean(2) + mean(3), rtol=1e-6)
    assert [summary.round for summary in result.history] == [1, 2, 3]
    assert result.releases == {"node-0": 3, "node-1": 3, "node-2": 3}
    assert result.epsilon is None
    assert watcher.started[0]["nodes"] == ["node-0", "node-1", "node-2"]
    assert watcher.rounds == result.history
    assert watcher.finished == [result]
    np.testing.assert_array_equal(side.evaluated[-1], result.adapter)
    assert result.evaluation.accuracy == pytest.approx(float(result.adapter.mean()))
    assert result.attempt == 1
    assert result.ended_early is None


def test_evaluation_every_other_round_and_always_of_the_last_state(tmp_path: Path) -> None:
    result = run_fake(tmp_path, config=fake_config(num_rounds=5, evaluate_every=2))
    assert [summary.accuracy is not None for summary in result.history] == [False, True, False, True, True]


def test_a_round_with_too_few_updates_is_void_and_charged(tmp_path: Path) -> None:
    def second_round_fails(node, request, reply):  # type: ignore[no-untyped-def]
        if request.round == 2:
            return dataclasses.replace(reply, update=None, error="Node failed")
        return reply

    result = run_fake(tmp_path, second_round_fails)
    assert [summary.void for summary in result.history] == [False, True, False]
    np.testing.assert_allclose(result.adapter, mean(1) + mean(3), rtol=1e-6)
    assert result.releases["node-0"] == 3
    assert len(result.dropped) == 3


def test_min_updates_decides_what_is_too_few(tmp_path: Path) -> None:
    config = fake_config(num_rounds=1, min_updates=3)
    with pytest.raises(FederationError, match=r"The first round had fewer.*min_updates=3.*NaN"):
        run_fake(tmp_path, misbehaving(0, "nan"), config=config)
    np.testing.assert_array_equal(load_latest(tmp_path)[0].adapter, np.zeros(SIZE))


def test_a_run_that_moved_nothing_is_no_success(tmp_path: Path) -> None:
    def nothing(node, request, reply):  # type: ignore[no-untyped-def]
        return dataclasses.replace(reply, update=np.full(SIZE, 1e-30, np.float32))

    config = fake_config(num_rounds=2)
    with pytest.raises(FederationError, match=r"learned nothing: after 2 rounds"):
        run_fake(tmp_path, nothing, config=config)
    config.resume = str(tmp_path)  # which does not make it one
    with pytest.raises(FederationError, match="learned nothing"):
        run_fake(tmp_path, config=config)


def test_a_step_beyond_all_measure_ends_the_run(tmp_path: Path) -> None:
    config = fake_config(num_rounds=3)
    config.federation.server_learning_rate = 1e30
    with pytest.raises(FederationError, match=r"by a norm of .*e\+29"):
        run_fake(tmp_path, config=config)
    assert load_latest(tmp_path)[0].round == 0


def test_updates_that_can_never_be_enough_are_refused_before_a_charge() -> None:
    config = fake_config(num_rounds=3, min_updates=4)
    check_possible(config, 4)
    with pytest.raises(ConfigError, match="there are 3 nodes, and a round asks 3"):
        check_possible(config, 3)
    config.federation.cohort_size = 2
    with pytest.raises(ConfigError, match="federation.min_updates=2 or less"):
        check_possible(config, 9)


def test_three_void_rounds_in_a_row_end_the_run_and_keep_the_checkpoint(tmp_path: Path) -> None:
    def broken_after_one(node, request, reply):  # type: ignore[no-untyped-def]
        return reply if request.round == 1 else dataclasses.replace(reply, update=None, error="disk on fire")

    config = fake_config(num_rounds=10)
    with pytest.raises(FederationError, match=r"3 rounds in a row.*round 4.*disk on fire.*resume="):
        run_fake(tmp_path, broken_after_one, config=config)
    saved, _ = load_latest(tmp_path)
    assert saved.round == 4
    np.testing.assert_allclose(saved.adapter, mean(1), rtol=1e-6)
    config = fake_config(num_rounds=10)
    config.resume = str(tmp_path)
    result = run_fake(tmp_path, config=config)
    assert [summary.round for summary in result.history] == list(range(1, 11))
    assert result.attempt == 2


def test_a_secure_aggregation_that_is_aborted_is_a_void_round(tmp_path: Path) -> None:
    class Aborting(PlainRound):
        def run_round(self, grid, ask, observer):  # type: ignore[no-untyped-def]
            if ask.round == 2:
                raise AggregationAborted("too many nodes dropped out")
            return super().run_round(grid, ask, observer)

    result = run_fake(tmp_path, protocol=Aborting())
    assert [summary.void for summary in result.history] == [False, True, False]
    assert result.releases == {f"node-{i}": 3 for i in range(3)}
    assert result.dropped[0].reason == "too many nodes dropped out"


def test_a_node_that_says_nothing_is_charged_all_the_same(tmp_path: Path) -> None:
    def silent(node, request, reply):  # type: ignore[no-untyped-def]
        if node == 1:
            raise RuntimeError
        return reply

    result = run_fake(tmp_path, silent)
    assert result.releases == {"node-0": 3, "node-1": 3, "node-2": 3}


def test_a_run_ends_early_when_every_node_has_used_up_its_releases(tmp_path: Path) -> None:
    def exhausted_after_two(node, request, reply):  # type: ignore[no-untyped-def]
        if request.round <= 2:
            return reply
        refused = "BudgetExhausted: epsilon 1.6 would be exceeded"
        return dataclasses.replace(reply, update=None, releases=2, refused=refused, refusal="BudgetExhausted")

    result = run_fake(tmp_path, exhausted_after_two, config=fake_config(num_rounds=9))
    assert len(result.history) == 3
    assert result.ended_early is not None
    assert "After 2 of 9 rounds" in result.ended_early
    assert "epsilon 1.6" in result.ended_early
    assert result.releases["node-0"] == 2
    np.testing.assert_allclose(result.adapter, mean(1) + mean(2), rtol=1e-6)


def test_a_node_without_budget_is_not_asked_again(tmp_path: Path) -> None:
    asked = []

    def one_refuses(node, request, reply):  # type: ignore[no-untyped-def]
        asked.append((request.round, node))
        if node == 1:
            return dataclasses.replace(
                reply, update=None, releases=0, refused="BudgetExhausted: x", refusal="BudgetExhausted"
            )
        return reply

    result = run_fake(tmp_path, one_refuses)
    assert [round for round, node in asked if node == 1] == [1]
    assert result.releases == {"node-0": 3, "node-1": 0, "node-2": 3}


def test_cohorts_depend_on_names_seed_and_round_alone() -> None:
    nodes = [NodeInfo(f"n{i}", 100 + i, 1) for i in range(10)]
    shuffled = [dataclasses.replace(node, node_id=7 * node.node_id) for node in reversed(nodes)]
    cohorts = [[n.name for n in draw_cohort(nodes, 4, 3, r)] for r in range(200)]
    assert cohorts == [[n.name for n in draw_cohort(shuffled, 4, 3, r)] for r in range(200)]
    assert all(len(set(cohort)) == 4 for cohort in cohorts)
    assert cohorts != [[n.name for n in draw_cohort(nodes, 4, 4, r)] for r in range(200)]
    # Each node is asked about as often: 80 of 200 times, standard deviation 6.9.
    counts = [sum(node.name in cohort for cohort in cohorts) for node in nodes]
    assert all(45 < count < 115 for count in counts)
    assert [n.name for n in draw_cohort(nodes, None, 0, 1)] == [n.name for n in nodes]
    assert len(draw_cohort(nodes, 50, 0, 1)) == 10


def test_only_the_cohort_is_asked(tmp_path: Path) -> None:
    asked: dict[int, list[int]] = {}

    def note(node, request, reply):  # type: ignore[no-untyped-def]
        asked.setdefault(request.round, []).append(node)
        return reply

    config = fake_config(num_rounds=6, cohort_size=2)
    run_fake(tmp_path, note, nodes=5, config=config)
    nodes = [NodeInfo(f"node-{i}", 0, 1) for i in range(5)]
    for round in range(1, 7):
        assert [f"node-{i}" for i in asked[round]] == [n.name for n in draw_cohort(nodes, 2, 0, round)]


class _Killed(BaseException):
    """What a process is told by `kill -9`: nothing."""


@pytest.mark.parametrize("strategy", ["fedavg", "fedavgm", "fedadam"])
@pytest.mark.parametrize("killed_in", [1, 2, 4])
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    tmp_path: Path, strategy: str, killed_in: int
) -> None:
    config = fake_config(num_rounds=5, strategy=strategy, server_learning_rate=0.1, cohort_size=2)
    whole = run_fake(tmp_path / "whole", config=config)

    class Dies(FakeServerSide):
        def evaluate(self, adapter):  # type: ignore[no-untyped-def]
            if len(self.evaluated) == killed_in - 1:
                raise _Killed
            return super().evaluate(adapter)

    with pytest.raises(_Killed):
        run_fake(tmp_path / "killed", config=config, server_side=Dies())
    resumed = dataclasses.replace(config, resume=str(tmp_path / "killed"))
    result = run_fake(tmp_path / "killed", config=resumed)
    np.testing.assert_array_equal(result.adapter, whole.adapter)
    assert [s.round for s in result.history] == [1, 2, 3, 4, 5]
    assert result.attempt == 2
    assert result.seconds > 0


def test_a_resumed_run_keeps_what_was_dropped_and_released(tmp_path: Path) -> None:
    config = fake_config(num_rounds=4)

    def fails_in_three(node, request, reply):  # type: ignore[no-untyped-def]
        if request.round == 3 and request.attempt == 1:
            raise _Killed
        return (
            reply
            if node != 1 or request.round != 1
            else dataclasses.replace(reply, update=None, error="late")
        )

    stopping = _StopAt(3)
    with pytest.raises(KeyboardInterrupt, match=r"resume="):
        run_fake(tmp_path, fails_in_three, config=config, protocol=stopping)
    result = run_fake(tmp_path, fails_in_three, config=dataclasses.replace(config, resume=str(tmp_path)))
    assert [(d.node, d.round) for d in result.dropped] == [("node-1", 1)]
    assert [s.updates for s in result.history] == [2, 3, 3, 3]
    assert result.bytes_up == sum(s.bytes_up for s in result.history) > 0


def test_a_round_whose_evaluation_failed_is_not_lost(tmp_path: Path) -> None:
    class OutOfMemory(FakeServerSide):
        def evaluate(self, adapter):  # type: ignore[no-untyped-def]
            raise MemoryError

    config = fake_config()
    with pytest.raises(MemoryError):
        run_fake(tmp_path, config=config, server_side=OutOfMemory())
    saved, _ = load_latest(tmp_path)
    assert saved.round == 1  # it was paid for
    np.testing.assert_allclose(saved.adapter, mean(1), rtol=1e-6)


class _StopAt(PlainRound):
    """Ctrl-C in the middle of a round."""

    def __init__(self, round: int) -> None:
        self.round = round

    def run_round(self, grid, ask, observer):  # type: ignore[no-untyped-def]
        if ask.round == self.round:
            raise KeyboardInterrupt
        return super().run_round(grid, ask, observer)


def test_ctrl_c_says_how_to_go_on_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    config = fake_config(num_rounds=3)
    with pytest.raises(KeyboardInterrupt, match=f"resume={tmp_path}"):
        run_fake(tmp_path, config=config, protocol=_StopAt(2))
    assert load_latest(tmp_path)[0].round == 1
    result = run_fake(tmp_path, config=dataclasses.replace(config, resume=str(tmp_path)))
    np.testing.assert_allclose(result.adapter, mean(1) + mean(2) + mean(3), rtol=1e-6)


def test_a_finished_run_can_be_resumed_and_has_nothing_to_do(tmp_path: Path) -> None:
    config = fake_config()
    first = run_fake(tmp_path, config=config)
    asked = []

    def note(node, request, reply):  # type: ignore[no-untyped-def]
        asked.append(node)
        return reply

    again = run_fake(tmp_path, note, config=dataclasses.replace(config, resume=str(tmp_path)))
    assert asked == []
    np.testing.assert_array_equal(again.adapter, first.adapter)
    assert again.history == first.history
    assert again.evaluation.accuracy == first.evaluation.accuracy


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path: Path, golden: Golden) -> None:
    run_fake(tmp_path)
    with pytest.raises(CheckpointError) as raised:
        run_fake(tmp_path)
    assert "resume=" in str(raised.value)
    golden(raised)


def test_nothing_to_resume(tmp_path: Path, golden: Golden) -> None:
    config = fake_config()
    config.resume = str(tmp_path)
    with pytest.raises(CheckpointError) as raised:
        run_fake(tmp_path, config=config)
    golden(raised)


def test_a_run_is_resumed_with_its_own_settings_only(tmp_path: Path) -> None:
    config = fake_config()
    run_fake(tmp_path, config=config)
    other = dataclasses.replace(config, resume=str(tmp_path), seed=5)
    other.train.learning_rate = 0.5
    with pytest.raises(CheckpointError, match=r"seed \(0, now 5\), train.learning_rate \(0\.\d+, now 0.5\)"):
        run_fake(tmp_path, config=other)


def test_a_run_may_be_resumed_on_another_device(tmp_path: Path) -> None:
    config = fake_config()
    run_fake(tmp_path, config=config)
    other = dataclasses.replace(config, resume=str(tmp_path), device="cpu", output="elsewhere")
    assert run_fake(tmp_path, config=other).attempt == 2


def test_a_broken_newest_checkpoint_is_told_of_in_the_result(tmp_path: Path) -> None:
    config = fake_config()
    run_fake(tmp_path, config=config)
    newest = max((tmp_path / "checkpoint").glob("round-*"))
    newest.write_bytes(newest.read_bytes()[:-9])
    result = run_fake(tmp_path, config=dataclasses.replace(config, resume=str(tmp_path)))
    assert [s.round for s in result.history] == [1, 2, 3]
    assert any("is broken" in notice for notice in result.notices)


def test_an_observer_that_raises_is_switched_off_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Watcher):
        def on_round(self, summary):  # type: ignore[no-untyped-def]
            raise RuntimeError("no terminal")

    watcher = Broken()
    result = run_fake(tmp_path, observer=watcher)
    assert len(result.history) == 3
    assert watcher.finished == []
    assert caplog.text.count("display failed") == 1


def test_nodes_that_cannot_start_are_left_out_and_named(tmp_path: Path) -> None:
    from flwr.app import Error, Message

    from tests.support import fake_federation

    app = fake_federation.fake_app()
    inner = app._registered_funcs["query.hello"]

    def hello(message, context):  # type: ignore[no-untyped-def]
        if context.node_config["partition-id"] == 1:
            return Message(Error(2, "DataError: there is no such file"), reply_to=message)
        return inner(message, context)

    app._registered_funcs["query.hello"] = hello
    grid = fake_federation.LocalGrid(app, 3, {}, timeout=5.0)
    with fake_federation.task_identity(grid.run_id):
        result = fake_federation.run_rounds(
            grid, fake_config(), tmp_path, server_side=FakeServerSide(), expected_nodes=3
        )
    assert [node.name for node in result.nodes] == ["node-0", "node-2"]
    assert (result.dropped[0].round, result.dropped[0].reason) == (0, "DataError: there is no such file")


def test_two_nodes_with_one_name_are_refused(tmp_path: Path) -> None:
    from tests.support import fake_federation

    class Twins(fake_federation.LocalGrid):
        def __init__(self) -> None:
            super().__init__(fake_federation.fake_app(honest), 3, {}, timeout=5.0)
            self._nodes[max(self._nodes)]["partition-id"] = 0

    grid = Twins()
    with (
        fake_federation.task_identity(grid.run_id),
        pytest.raises(FederationError, match="Two nodes say that they are node-0"),
    ):
        fake_federation.run_rounds(
            grid, fake_config(), tmp_path, server_side=FakeServerSide(), expected_nodes=3
        )


@pytest.mark.slow
def test_the_server_waits_for_nodes_that_connect_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.federation.server import cohort
    from tests.support import fake_federation

    class Late(fake_federation.LocalGrid):
        looked = 0

        def get_node_ids(self):  # type: ignore[no-untyped-def]
            self.looked += 1
            return list(super().get_node_ids())[: max(0, self.looked - 2)]

    monkeypatch.setattr(cohort, "_SETTLED_SECONDS", 0.3)
    for expected in (3, None):  # told how many, or by waiting until no more come
        grid = Late(fake_federation.fake_app(), 3, {}, timeout=5.0)
        with fake_federation.task_identity(grid.run_id):
            nodes, _, notices = cohort.discover_nodes(grid, 5.0, expected=expected)
        assert [node.name for node in nodes] == ["node-0", "node-1", "node-2"]
        assert notices == []


@pytest.mark.slow
def test_the_server_goes_on_without_nodes_that_never_connect() -> None:
    from fedtune.federation.server import cohort
    from tests.support import fake_federation

    grid = fake_federation.LocalGrid(fake_federation.fake_app(), 2, {}, timeout=5.0)
    with fake_federation.task_identity(grid.run_id):
        nodes, _, _ = cohort.discover_nodes(grid, 0.3, expected=5)
    assert len(nodes) == 2


def test_shards_without_a_node_are_told_of() -> None:
    from fedtune.federation.server import cohort
    from tests.support import fake_federation

    app = fake_federation.fake_app()
    inner = app._registered_funcs["query.hello"]

    def hello(message, context):  # type: ignore[no-untyped-def]
        answer = inner(message, context)
        answer.content["hello"]["shards"] = 4
        return answer

    app._registered_funcs["query.hello"] = hello
    grid = fake_federation.LocalGrid(app, 2, {}, timeout=5.0)
    with fake_federation.task_identity(grid.run_id):
        _, _, (notice,) = cohort.discover_nodes(grid, 5.0, expected=2)
    assert "has 4 shards, and only 2 of them" in notice
    assert "num-supernodes=4" in notice


def test_a_judge_ends_a_run_and_a_resumed_one_does_not_go_on_with_it(tmp_path: Path) -> None:
    seen: list[int] = []

    def stop_rule(summary: RoundSummary) -> str | None:
        seen.append(summary.round)
        return f"{PRUNED} after two" if summary.round == 2 else None

    watcher = Watcher()
    result = run_fake(tmp_path, observer=StoppingObserver(watcher, stop_rule))
    assert seen == [1, 2] and len(watcher.rounds) == 2, "the display is told of every round, too"
    assert len(result.history) == 2 and result.ended_early == f"{PRUNED} after two"
    assert set(result.releases.values()) == {2}, "what was released is charged, and no more"
    config = dataclasses.replace(fake_config(), resume=str(tmp_path))
    again = run_fake(tmp_path, config=config, observer=StoppingObserver(watcher, stop_rule))
    assert len(again.history) == 2 and again.ended_early == result.ended_early
    assert np.array_equal(again.adapter, result.adapter)


def test_a_judge_has_no_say_after_the_last_round(tmp_path: Path) -> None:
    observer = StoppingObserver(
        Watcher(), lambda summary: "late" if summary.round == summary.num_rounds else None
    )
    result = run_fake(tmp_path, observer=observer)
    assert result.ended_early is None


def test_a_judge_that_raises_is_switched_off(tmp_path: Path) -> None:
    def stop_rule(summary: RoundSummary) -> str | None:
        raise ValueError("no such study")

    assert run_fake(tmp_path, observer=StoppingObserver(Watcher(), stop_rule)).ended_early is None
