"""DP-FTRL in the server loop: who is asked when, what noise is added, and what a stopped run may repeat."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.config.schema import Config, PrivacyConfig
from fedtune.errors import CheckpointError, ResourceError, SeparationError
from fedtune.federation.events import NodeInfo
from fedtune.federation.messages import Consent, RoundReply, RoundRequest
from fedtune.federation.server import agreement, checkpoint, correlated, loop
from fedtune.federation.server.correlated import CorrelatedRounds
from fedtune.privacy.mechanisms.matrix import BandedRoot
from tests.privacy.mechanisms.test_matrix import dense, ftrl
from tests.support.fake_federation import FakeServerSide, Watcher, fake_config, run_fake
from tests.support.golden import Golden

SIZE, ROUNDS, COHORT = 3000, 9, 2
ROOT = BandedRoot(ROUNDS, 3, 3)


class Nodes:
    """Six nodes that send nothing but zeros, and refuse by the plan as a node's ledger does."""

    def __init__(self) -> None:
        self.rounds: dict[int, list[int]] = {}
        self.asked: list[tuple[int, int]] = []  # (attempt, round)

    def __call__(self, node: int, request: RoundRequest, reply: RoundReply) -> RoundReply:
        self.asked.append((request.attempt, request.round))
        mine = self.rounds.setdefault(node, [])
        root = request.plan.root()
        assert root is not None
        try:
            root.check(f"node-{node}", request.run, request.round, mine)
        except SeparationError as error:
            return replace(reply, update=None, refused=f"SeparationError: {error}", refusal="SeparationError")
        mine.append(request.round)
        return replace(reply, update=np.zeros(SIZE, dtype=np.float32), releases=len(mine))


class Stops(Watcher):
    """Ctrl-C at one moment: after a round is saved, or when a node has answered in a later one."""

    def __init__(self, after: int, during: bool = False) -> None:
        super().__init__()
        self.after, self.during = after, during

    def on_round(self, summary: Any) -> None:
        super().on_round(summary)
        if summary.round == self.after and not self.during:
            raise KeyboardInterrupt

    def on_client(self, node: str, status: str) -> None:
        if self.during and len(self.rounds) == self.after and status == "answered":
            raise KeyboardInterrupt


def config(resume: Path | None = None, **privacy: Any) -> Config:
    made = fake_config(num_rounds=ROUNDS, cohort_size=COHORT)
    made.data.test_split, made.data.test_public = "test", True  # what the adapters are looked at through
    values = {
        "trust": "central", "unit": "client", "epsilon": None, "noise_multiplier": 1.0,
        "mechanism": "dp_ftrl", "bands": 3, "min_separation": 3, "max_grad_norm": 0.5,
    }  # fmt: skip
    made.privacy = PrivacyConfig(**{**values, **privacy})
    made.resume = None if resume is None else str(resume)
    return made


def run(
    folder: Path, nodes: Nodes, observer: Any = None, side: FakeServerSide | None = None, **more: Any
) -> Any:
    side = side or FakeServerSide(SIZE)
    return run_fake(folder, nodes, nodes=6, config=config(**more), observer=observer, server_side=side)


def whitened(adapters: list[np.ndarray]) -> np.ndarray:
    """Covariance of C x over coordinates, [ROUNDS, ROUNDS], in units of what the accountant counts on."""
    x = np.diff(np.array([np.zeros(SIZE), *adapters], dtype=np.float64), axis=0) * COHORT
    rows = dense(ROOT) @ x / (0.5 * ROOT.sensitivity())
    return np.asarray(rows @ rows.T / SIZE)


def off_white(covariance: np.ndarray) -> float:
    return float(np.abs(covariance - np.eye(ROUNDS)).max())


TOLERANCE = 0.15  # the deviation of a diagonal entry is sqrt(2 / 3000) = 0.026


def test_the_server_adds_correlated_noise_and_asks_nobody_too_soon(tmp_path: Path) -> None:
    nodes, side = Nodes(), FakeServerSide(SIZE)
    result = run(tmp_path, nodes, side=side)
    assert [one.updates for one in result.history] == [COHORT] * ROUNDS
    assert result.dropped == []
    assert all(len(rounds) == 3 for rounds in nodes.rounds.values())
    assert off_white(whitened(side.evaluated)) < TOLERANCE
    assert off_white(2.25 * whitened(side.evaluated)) > 3 * TOLERANCE
    assert off_white(whitened(side.evaluated) / 2.25) > 3 * TOLERANCE
    assert result.epsilon == pytest.approx(result.plan.epsilon(3))
    assert not (tmp_path / "checkpoint" / "noise.secret").exists()  # no round is to come


@pytest.mark.parametrize("lost", [False, True])
def test_a_resumed_run_takes_back_what_was_added_before(tmp_path: Path, lost: bool) -> None:
    nodes, side = Nodes(), FakeServerSide(SIZE)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, nodes, Stops(4), side)
    secret = tmp_path / "checkpoint" / "noise.secret"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    if lost:
        secret.unlink()
    result = run(tmp_path, nodes, side=side, resume=tmp_path)
    assert [one.round for one in result.history] == list(range(1, ROUNDS + 1))
    assert sorted({round for _, round in nodes.asked}) == list(range(1, ROUNDS + 1))
    white = off_white(whitened(side.evaluated))
    if lost:  # the mutant that this test is for: the noise of rounds 3 and 4 is not taken back
        assert white > 2 * TOLERANCE
        assert any("less accurate, its privacy as promised" in one for one in result.notices)
    else:
        assert white < TOLERANCE
        assert result.notices == []


def test_a_round_that_was_begun_is_never_begun_again(tmp_path: Path) -> None:
    nodes = Nodes()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, nodes, Stops(3, during=True))
    before = {node: list(rounds) for node, rounds in nodes.rounds.items()}
    assert any(4 in rounds for rounds in before.values())
    result = run(tmp_path, nodes, resume=tmp_path)
    assert (2, 4) not in nodes.asked and (2, 5) in nodes.asked
    assert [one.round for one in result.history if one.void] == [4]
    assert any("a round is published once" in one for one in result.notices)
    # Nobody was asked too soon: the book knows who was asked in the round that was lost.
    assert not any("SeparationError" in one.reason for one in result.dropped)
    assert max(result.releases.values()) == 3


@pytest.mark.parametrize("phase", ["between rounds", "in a round", "noise drawn, not saved", "saved"])
def test_a_folder_restored_from_a_backup_of_any_phase_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    """Issue 10, item 8: a round replayed with another cohort would take the same noise back again."""
    nodes, copies = Nodes(), []

    def copy(*_: Any) -> None:
        if not copies:
            copies.append(shutil.copytree(tmp_path / "a", tmp_path / "b"))

    class Copies(Stops):
        def on_round(self, summary: Any) -> None:
            if phase == "between rounds" and summary.round == 3:
                copy()
            super().on_round(summary)

        def on_client(self, node: str, status: str) -> None:
            if phase == "in a round" and len(self.rounds) == 3 and status == "answered":
                copy()

    save, keep = checkpoint.save, CorrelatedRounds.save_noise

    def kept(books: CorrelatedRounds) -> None:
        if phase == "noise drawn, not saved" and books.round == 4:
            copy()
        keep(books)

    def saved(run_dir: Path, state: Any) -> Path:
        path = save(run_dir, state)
        if phase == "saved" and state.round == 4:
            copy()
        return path

    monkeypatch.setattr(CorrelatedRounds, "save_noise", kept)
    monkeypatch.setattr(checkpoint, "save", saved)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", nodes, Copies(5))
    asked = list(nodes.asked)
    with pytest.raises(CheckpointError, match=r"was wound back.*this machine of round 5.*newest copy"):
        run(tmp_path / "b", nodes, resume=tmp_path / "b")
    assert nodes.asked == asked, "nobody was asked"
    assert run(tmp_path / "a", nodes, resume=tmp_path / "a").history[-1].round == ROUNDS


def test_noise_that_cannot_be_removed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuses)
    with pytest.raises(ResourceError, match=r"noise.secret.*cannot be removed: Read-only.*resume=RUN_DIR"):
        CorrelatedRounds.start(tmp_path, "run", ftrl(), SIZE)


@pytest.mark.parametrize("written", [0, 1])
def test_a_run_that_died_while_it_noted_a_round_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: int
) -> None:
    """Its folder is not one that was wound back (seed 731 of the simulator: the run was lost)."""
    nodes, real = Nodes(), correlated.write_durably
    notes: list[Path] = []

    def dies(path: Path, content: bytes, **options: Any) -> None:
        if path.suffix == ".json" and b'"round": 3' in content:
            notes.append(path)
            if len(notes) == written + 1:
                raise KeyboardInterrupt
        real(path, content, **options)

    with monkeypatch.context() as patch:
        patch.setattr(correlated, "write_durably", dies)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "a", nodes)
    assert all(round < 3 for _, round in nodes.asked), "nobody was asked for that round"
    assert run(tmp_path / "a", nodes, resume=tmp_path / "a").history[-1].round == ROUNDS


def test_a_node_that_knows_a_later_round_has_a_wound_back_folder_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine, which has no note of its own."""
    nodes = Nodes()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", nodes, Stops(3))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", nodes, Stops(5), resume=tmp_path / "a")
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "elsewhere"))
    consent = agreement.read_consent

    def tells(answer: Any, node: str, proposal: Any) -> Consent:
        return replace(consent(answer, node, proposal), last_round=max(nodes.rounds.get(int(node[5:]), [0])))

    monkeypatch.setattr(agreement, "read_consent", tells)
    with pytest.raises(CheckpointError, match=r"was wound back.*node 'node-\d' of round [45]"):
        run(tmp_path / "b", nodes, resume=tmp_path / "b")


def test_a_note_of_rounds_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    nodes = Nodes()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, nodes, Stops(2))
    (note,) = (Path(os.environ["FEDTUNE_HOME"]) / "state" / "rounds").glob("*.json")
    note.write_text("")
    with pytest.raises(CheckpointError, match="which rounds of this run were begun"):
        run(tmp_path, nodes, resume=tmp_path)


def test_a_folder_restored_from_a_backup_publishes_no_round_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody tells of the later rounds, the nodes' ledgers still do, when they are asked."""
    nodes, side = Nodes(), FakeServerSide(SIZE)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", nodes, Stops(3))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "a", nodes, Stops(5), resume=tmp_path / "a")
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "elsewhere"))
    result = run(tmp_path / "b", nodes, side=side, resume=tmp_path / "b")
    assert [one.round for one in result.history if one.void] == [4, 5]
    np.testing.assert_array_equal(side.evaluated[0], side.evaluated[1])  # rounds 4 and 5: nothing published
    assert any("lost its books" in one.reason for one in result.dropped)
    assert all(one.updates == COHORT for one in result.history[5:])


def test_one_refusal_discards_the_round_though_another_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "most_void", lambda *_: 9)  # else the first void round ends the run
    nodes = Nodes()
    nodes.rounds = {node: [2] for node in range(3)}  # what another copy of the server has asked
    side = FakeServerSide(SIZE)
    result = run(tmp_path, nodes, side=side)
    refused = {one.round for one in result.dropped if "SeparationError" in one.reason or "lost" in one.reason}
    assert refused
    for summary in result.history:
        assert summary.void == (summary.round in refused)


def test_without_its_book_a_run_does_not_go_on(tmp_path: Path, golden: Golden) -> None:
    nodes = Nodes()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, nodes, Stops(2))
    book = tmp_path / "checkpoint" / "rounds.json"
    for content in (None, "{", '{"run": "another", "round": 0, "asked": {}}', "[]"):
        book.unlink(missing_ok=True)
        if content is not None:
            book.write_text(content)
        with pytest.raises(CheckpointError) as raised:
            run(tmp_path, nodes, resume=tmp_path)
        golden(raised)


def test_a_broken_checkpoint_leaves_its_round_out(tmp_path: Path) -> None:
    nodes = Nodes()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, nodes, Stops(4))
    newest = tmp_path / "checkpoint" / "round-000004.ckpt"
    newest.write_bytes(newest.read_bytes()[:-7])
    result = run(tmp_path, nodes, resume=tmp_path)
    assert (2, 4) not in nodes.asked
    assert [one.round for one in result.history if one.void] == [4]


@pytest.mark.parametrize("damage", ["cut", "another run", "another shape"])
def test_noise_that_cannot_be_used_is_lost_and_said_to_be(tmp_path: Path, damage: str) -> None:
    plan = ftrl(num_rounds=9, bands=3, min_separation=3)
    books = CorrelatedRounds.start(tmp_path, "r", plan, 4)
    books.begin(1, [NodeInfo("a", 1, 5)])
    books.noise.next(1, np.ones(4))
    books.save_noise()
    secret = tmp_path / "checkpoint" / "noise.secret"
    size = 4
    if damage == "cut":
        secret.write_bytes(secret.read_bytes()[:-30])
    elif damage == "another run":
        other = CorrelatedRounds(tmp_path, "other", plan, 4)
        other.noise.next(1, np.ones(4))
        other.save_noise()
    else:
        size = 5
    again, notices = CorrelatedRounds.resume(tmp_path, "r", plan, size)
    assert len(notices) == 1 and "noise.secret" in notices[0]
    assert again.round == again.noise.round == 1
    assert again.last_asked == {"a": 1}
    np.testing.assert_array_equal(again.noise.next(2, np.ones(size)), np.ones(size))


def test_the_secret_is_private_whatever_the_umask(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        books = CorrelatedRounds.start(tmp_path, "r", ftrl(num_rounds=9, bands=3, min_separation=3), 4)
        books.noise.next(1, np.ones(4))
        books.save_noise()
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "checkpoint" / "noise.secret").stat().st_mode) == 0o600
