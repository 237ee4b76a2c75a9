"""Everything that changes from round to round: `RunState`, and the checkpoint that it is saved in.

A checkpoint appears under its name only when it is complete (written beside, synced, renamed, folder
synced), so a `kill -9` or a power cut at any instruction leaves the previous one. Each file begins with
a line of JSON that holds the payload's length and sha256; the last two are kept, and one that does not
match its checksum is passed over, with a notice, for the one before.

Going back one checkpoint forgets a round's result, never its cost: what a node released is in the
node's ledger, and this file has no say in it. And a resumed run never repeats noise (PITFALLS 22):
every start of a run takes a number of its own, higher than any before, *before* the first message, by
creating a file that must not exist (`attempt-3`). So (run, round, attempt) names a release once, even
if the process died between sending a message and writing the checkpoint.

What a resumed run may not change is checked here: its noise was calibrated to the settings that it was
started with, so it goes on with those or not at all.

What it does not do: hold private data. Adapter, moments, history and public configuration are what the
server knows anyway. (The noise of dp_ftrl lies beside it; see `fedtune.federation.server.correlated`.)
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.config.files import sync_folder
from fedtune.config.schema import Config
from fedtune.errors import CheckpointError
from fedtune.federation import run_folder
from fedtune.federation.events import Dropped, FederationResult, NodeInfo, RoundSummary
from fedtune.federation.run_folder import no_room, write_durably
from fedtune.federation.server.cohort import Roster
from fedtune.federation.server.correlated import CorrelatedRounds
from fedtune.federation.server.evaluation import EvaluationOutcome, NodesEvaluation
from fedtune.federation.server.optimizers import ServerOptimizer, server_optimizer
from fedtune.federation.server.rounds import RoundOutcome, name_of
from fedtune.privacy.plan import PrivacyPlan
from fedtune.privacy.publication import merge, publish

__all__ = ["Checkpoint", "RunState", "has_checkpoint", "load_latest", "next_attempt", "save"]

FORMAT = 1
KEEP = 2
_AWAY = 0  # no node's id: of one that is not connected
_PLAIN = ("exhausted", "seconds", "train_seconds", "flops", "ended_early")  # JSON values as they are
_START = "start.ckpt"  # the adapter that a run on public texts began with: the file may be gone later
# Settings that a resumed run may change: they decide where and how long, not what is computed or promised.
_MAY_CHANGE = ("resume", "output", "device", "engine", "pricing", "tracker")


@dataclass
class RunState:
    """A run between two rounds. `nodes`: everybody who ever took part, by name; gone or not."""

    run: str
    plan: PrivacyPlan
    adapter: np.ndarray
    optimizer: ServerOptimizer
    attempt: int
    encoder: str  # the digest of what the adapter trains on
    start: np.ndarray  # where the adapter began
    round: int = 0
    nodes: list[NodeInfo] = field(default_factory=list)
    history: list[RoundSummary] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    unusable: list[Dropped] = field(default_factory=list)  # counted as zero: not published
    releases: dict[str, int] = field(default_factory=dict)
    answers: dict[str, int] = field(default_factory=dict)
    trained: list[str] = field(default_factory=list)  # whose updates are in the adapter, by name
    evaluation: NodesEvaluation | None = None  # the last that nodes answered for
    exhausted: list[str] = field(default_factory=list)
    seconds: float = 0.0
    train_seconds: float = 0.0
    flops: int | None = 0
    notices: list[str] = field(default_factory=list)
    ended_early: str | None = None
    correlated: CorrelatedRounds | None = None  # dp_ftrl
    public_start: dict[str, Any] | None = None  # which public texts the start was trained on

    def save(self, run_dir: Path, config: Config) -> None:
        """Checkpoints the state after `round`."""
        if self.correlated is not None:
            self.correlated.save_noise()  # first: noise that is in an adapter must be known to later rounds
        meta: dict[str, Any] = {
            "config": asdict(config),
            "encoder": self.encoder,
            "plan": self.plan.to_json(),
            "strategy": self.optimizer.name,
            "attempt": self.attempt,
            "nodes": [[node.name, node.declared_size] for node in self.nodes],
            "history": [summary.to_json() for summary in self.history],
            "dropped": [asdict(lost) for lost in self.dropped],
            "unusable": [asdict(lost) for lost in self.unusable],
            # By name, and not in the order of arrival, which tells who computed for how long.
            "releases": dict(sorted(self.releases.items())),
            "answers": dict(sorted(self.answers.items())),
            "trained": self.trained,
            "evaluation": None if self.evaluation is None else self.evaluation.to_json(),
            **{name: getattr(self, name) for name in _PLAIN},
            "notices": self.notices,
            "public_start": self.public_start,
        }
        meta, own = publish("checkpoint", meta, public_data=config.data.public)
        run_folder.update_local(run_dir, checkpoint={"run": self.run, "meta": own} if own else {})
        save(run_dir, Checkpoint(self.run, self.round, self.adapter, self.optimizer.state_dict(), meta))

    def save_start(self, run_dir: Path) -> None:
        """Keeps where the adapter began, so that a resumed run needs nothing to make it again.

        Raises:
            ResourceError: it cannot be written.
        """
        _write(_folder(run_dir) / _START, Checkpoint(self.run, 0, self.start))

    @classmethod
    def restore(
        cls, run_dir: Path, config: Config, attempt: int, initial: Callable[[], np.ndarray]
    ) -> RunState:
        """The state to go on from. `initial` makes the start of a run whose folder does not keep it.

        Raises:
            CheckpointError: it is another run's or unreadable.
        """
        saved, notices = load_latest(run_dir)
        try:
            meta = _with_local(saved, run_dir)
            _same_config(meta["config"], config)
            optimizer = server_optimizer(config, saved.round)
            optimizer.load_state_dict(saved.optimizer)
            state = cls(
                run=saved.run,
                plan=PrivacyPlan.from_json(meta["plan"]),
                adapter=saved.adapter.astype(np.float32),
                optimizer=optimizer,
                attempt=attempt,
                encoder=meta["encoder"],
                start=_start(run_dir, initial),
                round=saved.round,
                nodes=[NodeInfo(str(name), _AWAY, int(size)) for name, size in meta["nodes"]],
                history=[RoundSummary.from_json(summary) for summary in meta["history"]],
                dropped=[Dropped(**lost) for lost in meta["dropped"]],
                unusable=[Dropped(**lost) for lost in meta["unusable"]],
                releases=dict(meta["releases"]),
                answers=dict(meta["answers"]),
                trained=list(meta.get("trained", sorted(meta["releases"]))),  # an earlier version did not say
                evaluation=None
                if meta["evaluation"] is None
                else NodesEvaluation.from_json(meta["evaluation"]),
                notices=[*meta["notices"], *notices],
                public_start=meta.get("public_start"),
                **{name: meta[name] for name in _PLAIN},
            )
            if state.plan.root() is not None:
                state._resume_correlated(run_dir)
            return state
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise CheckpointError(
                f"The checkpoint in {run_dir} was written by another version of fedtune "
                f"({type(error).__name__}: {error}). Resume with that version, or start a new run."
            ) from error

    def reconnect(self, there: Sequence[NodeInfo]) -> list[NodeInfo]:
        """Those who took part before, with the ids of those who are there now, who join if they may."""
        known = {node.name: node for node in self.nodes}
        closed = self.plan.mechanism.fixed_nodes
        known |= {node.name: node for node in there if node.name in known or not closed}
        self.nodes = [known[name] for name in sorted(known)]
        return self.nodes

    def join(self, roster: Roster) -> None:
        """Takes over who has joined, and who could not."""
        self.nodes = list(roster.nodes.values())
        self.dropped += roster.dropped
        roster.dropped = []

    def known_evaluation(self) -> NodesEvaluation | None:
        """What the nodes said of the adapter as it is now; None if they were not asked."""
        return (
            self.evaluation if self.evaluation is not None and self.evaluation.round == self.round else None
        )

    def record_evaluation(self, outcome: EvaluationOutcome) -> None:
        """Charges the nodes for their answers, and takes over what they said, in the last round's summary."""
        for node, count in outcome.answers.items():
            known = self.answers.get(node, 0)
            self.answers[node] = known + 1 if count is None else max(known, count)
        self.answers = dict(sorted(self.answers.items()))
        summary = self.history[-1] if self.history else None
        if isinstance(outcome.result, NodesEvaluation):
            self.evaluation = outcome.result
            if summary is not None:
                summary.epsilon = self.epsilon()
                summary.accuracy = outcome.result.accuracy
                summary.accuracy_error = outcome.result.standard_error
        if summary is not None:
            summary.bytes_up += outcome.bytes_up
            summary.bytes_down += outcome.bytes_down

    def _resume_correlated(self, run_dir: Path) -> None:
        """Goes on after the last round that was begun: one that was lost on the way stays lost."""
        self.correlated, lost = CorrelatedRounds.resume(run_dir, self.run, self.plan, self.adapter.size)
        self.notices += lost
        before, self.round = self.round, max(self.round, self.correlated.round)
        if self.round == before:
            return
        for name, asked in self.correlated.last_asked.items():
            self.releases[name] = self.releases.get(name, 0) + (asked > before)
        for number in range(before + 1, self.round + 1):
            self.history.append(
                RoundSummary(
                    round=number, num_rounds=self.plan.num_rounds, seconds=0.0, epsilon=self.epsilon(),
                    bytes_up=0, bytes_down=0, void=True,
                )
            )  # fmt: skip
        self.notices.append(
            f"The run was stopped after round {before} was saved and round {self.round} begun. With dp_ftrl "
            "a round is published once, so what came after is left out; it stays charged."
        )

    def account(self, outcome: RoundOutcome, cohort: Sequence[NodeInfo], num_rounds: int) -> None:
        """Charges each node of the cohort: by what it says; where it says nothing, as if it had released.

        Ends the run if every node has used up its releases.
        """
        answered = {reply.node: reply for reply in outcome.replies}
        for node in cohort:
            reply = answered.get(node.name)
            known = self.releases.get(node.name, 0)
            if reply is None:
                self.releases[node.name] = known + 1
                continue
            # A count that goes down would be a lie or a lost ledger; the larger one is the safe one.
            self.releases[node.name] = max(known, reply.releases)
            if reply.refusal == "BudgetExhausted" and node.name not in self.exhausted:
                self.exhausted.append(node.name)
        if outcome.aggregate is not None:
            self.trained = sorted({*self.trained, *outcome.used})
        outcome.dropped.sort()
        self.dropped += [Dropped(node, self.round, reason) for node, reason in outcome.dropped]
        self.unusable += [Dropped(node, self.round, reason) for node, reason in outcome.unusable]
        if all(node.name in self.exhausted for node in self.nodes):
            reason = outcome.dropped[0][1] if outcome.dropped else "none is left to ask"
            self.ended_early = (
                f"After {self.round - 1} of {num_rounds} rounds every node had used up the releases that it "
                f"agreed to: {reason}"
            )

    def info(self, config: Config, run_dir: Path) -> dict[str, Any]:
        """What `Observer.on_start` is told."""
        return {
            "run": self.run,
            "run_dir": str(run_dir),
            "nodes": [node.name for node in self.nodes],
            "num_rounds": self.plan.num_rounds,
            "first_round": self.round + 1,
            "trust": self.plan.trust,
            "epsilon": self.plan.target_epsilon,
            "delta": self.plan.delta if self.plan.is_private() else None,
            "attempt": self.attempt,
        }

    def summary(self, outcome: RoundOutcome, num_rounds: int) -> RoundSummary:
        """What is known of a round before its evaluation."""
        return RoundSummary(
            round=self.round,
            num_rounds=num_rounds,
            seconds=0.0,
            epsilon=self.epsilon(),
            bytes_up=outcome.bytes_up,
            bytes_down=outcome.bytes_down,
            dropped=list(outcome.dropped),
            updates=len(outcome.used),
            train_seconds=sum(reply.seconds for reply in outcome.replies),
            void=outcome.aggregate is None,
        )

    def epsilon(self) -> float | None:
        """Epsilon of this run so far: the largest over the nodes."""
        nodes = {*self.releases, *self.answers}
        return self.plan.largest_epsilon(
            (self.releases.get(one, 0), self.answers.get(one, 0)) for one in nodes
        )

    def _left_out(self) -> dict[str, str]:
        """Who should have taken part and has no part in the adapter, with the first reason."""
        known = {*self.trained, *(name_of(node.node_id) for node in self.nodes if node.node_id)}
        reasons = {lost.node: lost.reason for lost in reversed(self.dropped) if lost.node not in known}
        return dict(sorted(reasons.items()))

    def result(self, evaluation: Any) -> FederationResult:
        """What is handed over at the end."""
        return FederationResult(
            run=self.run,
            nodes=list(self.nodes),
            plan=self.plan,
            adapter=self.optimizer.result(self.adapter).copy(),
            history=self.history,
            dropped=self.dropped,
            unusable=self.unusable,
            releases={node.name: self.releases.get(node.name, 0) for node in self.nodes},
            epsilon=self.epsilon(),
            evaluation=evaluation,
            answers={node.name: self.answers.get(node.name, 0) for node in self.nodes},
            left_out=self._left_out(),
            seconds=self.seconds,
            train_seconds=self.train_seconds,
            flops=self.flops,
            bytes_up=sum(summary.bytes_up for summary in self.history),
            bytes_down=sum(summary.bytes_down for summary in self.history),
            attempt=self.attempt,
            ended_early=self.ended_early,
            notices=self.notices,
            public_start=self.public_start,
        )


def _start(run_dir: Path, initial: Callable[[], np.ndarray]) -> np.ndarray:
    """Where the run's adapter began, as its folder keeps it; else made again."""
    try:
        return _read(_folder(run_dir) / _START).adapter
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return initial()


def _with_local(saved: Checkpoint, run_dir: Path) -> dict[str, Any]:
    """The checkpoint's facts with those that the folder keeps for the owner; without them, if they are of
    another round or gone: measured times then begin anew."""
    own = run_folder.read_local(run_dir).get("checkpoint") or {}
    if not isinstance(own, dict) or own.get("run") != saved.run:
        return saved.meta
    merged: dict[str, Any] = merge(saved.meta, own.get("meta"))
    history = merged.get("history")
    return merged if isinstance(history, list) and len(history) == len(saved.meta["history"]) else saved.meta


def _same_config(saved: dict[str, Any], config: Config) -> None:
    """Raises CheckpointError, naming the settings, if a resumed run would not be the same run."""
    now = json.loads(json.dumps(asdict(config)))

    def differences(a: Any, b: Any, prefix: str) -> list[str]:
        if isinstance(a, dict) or isinstance(b, dict):
            a, b = a or {}, b or {}  # an earlier version had no such group
            return [
                d
                for key in sorted({*a, *b})
                for d in differences(a.get(key), b.get(key), f"{prefix}.{key}".strip("."))
            ]
        return [] if a == b else [f"{prefix} ({a!r}, now {b!r})"]

    changed = [d for d in differences(saved, now, "") if d.split(".")[0].split(" ")[0] not in _MAY_CHANGE]
    changed = [d for d in changed if not d.startswith("federation.round_timeout ")]
    if changed:
        raise CheckpointError(
            f"The run to resume was started with other settings: {', '.join(changed[:6])}. Its noise was "
            "calibrated to the old ones. Leave them out of the command, or start a new run."
        )


# --- the file ----------------------------------------------------------------------------------------


@dataclass
class Checkpoint:
    """The state after `round` rounds (0: before the first). `meta` is JSON; arrays are stored exactly."""

    run: str
    round: int
    adapter: np.ndarray  # float32 [P]
    optimizer: dict[str, np.ndarray] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


def _folder(run_dir: Path) -> Path:
    return run_dir / "checkpoint"


def _files(run_dir: Path) -> list[Path]:
    """Newest first."""
    return sorted(_folder(run_dir).glob("round-*.ckpt"), reverse=True)


def has_checkpoint(run_dir: Path) -> bool:
    """Whether a run was started in this folder."""
    return bool(_files(run_dir))


def save(run_dir: Path, checkpoint: Checkpoint) -> Path:
    """Writes a checkpoint, durably, and removes all but the last two.

    Raises:
        ResourceError: it cannot be written; the one before is intact.
    """
    folder = _folder(run_dir)
    path = folder / f"round-{checkpoint.round:06d}.ckpt"
    _write(path, checkpoint)
    with suppress(OSError):  # they are in nobody's way, and the next round removes them
        for old in [*_files(run_dir)[KEEP:], *folder.glob(".round-*.tmp")]:
            old.unlink(missing_ok=True)
    return path


def _write(path: Path, checkpoint: Checkpoint) -> None:
    """Writes one file, durably. Raises `ResourceError` if it cannot."""
    meta = {"run": checkpoint.run, "round": checkpoint.round, "meta": checkpoint.meta}
    buffer = io.BytesIO()
    arrays = {f"optimizer.{name}": value for name, value in checkpoint.optimizer.items()}
    np.savez(
        buffer,
        allow_pickle=False,
        adapter=checkpoint.adapter,
        json=np.frombuffer(json.dumps(meta, allow_nan=False).encode(), dtype=np.uint8),
        **arrays,
    )
    payload = buffer.getvalue()
    header = {"format": FORMAT, "length": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
    write_durably(path, json.dumps(header).encode() + b"\n" + payload)


def _read(path: Path) -> Checkpoint:
    """Raises ValueError (or what it is made of) if the file is anything but a whole checkpoint."""
    header_line, _, payload = path.read_bytes().partition(b"\n")
    header = json.loads(header_line)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"it is not of format {FORMAT}, which this fedtune reads")
    if len(payload) != header["length"]:
        raise ValueError(f"{len(payload)} bytes instead of {header['length']}")
    if hashlib.sha256(payload).hexdigest() != header["sha256"]:
        raise ValueError("its checksum does not match")
    with np.load(io.BytesIO(payload), allow_pickle=False) as arrays:
        meta = json.loads(arrays["json"].tobytes())
        optimizer = {
            name[len("optimizer.") :]: arrays[name] for name in arrays if name.startswith("optimizer.")
        }
        return Checkpoint(meta["run"], meta["round"], arrays["adapter"], optimizer, meta["meta"])


def load_latest(run_dir: Path) -> tuple[Checkpoint, list[str]]:
    """The newest usable checkpoint, and a notice for each broken one that was passed over.

    Raises:
        CheckpointError: there is none that is usable.
    """
    notices: list[str] = []
    files = _files(run_dir)
    for path in files:
        try:
            return _read(path), notices
        except (ValueError, KeyError, TypeError, OSError, EOFError) as error:
            notices.append(
                f"The checkpoint {path.name} is broken ({error}); going on from the one before it. What its "
                "round released stays charged."
            )
    if not files:
        raise CheckpointError(
            f"{run_dir} holds no checkpoint, so there is nothing to resume. Give the folder of a run that "
            "was started, or leave `resume` out to start a new one."
        )
    raise CheckpointError(
        f"No checkpoint in {_folder(run_dir)} is usable: {' '.join(notices)} Start a new run; what this one "
        "released stays in the nodes' ledgers (`fedtune budget history`)."
    )


def next_attempt(run_dir: Path) -> int:
    """Takes the next attempt number of this run, durably: 1 for the first start.

    Raises:
        ResourceError: it cannot be written.
    """
    folder = _folder(run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = [int(path.name.removeprefix("attempt-")) for path in folder.glob("attempt-[0-9]*")]
        number = max(taken, default=0) + 1
        while True:
            try:
                os.close(os.open(folder / f"attempt-{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            except FileExistsError:
                number += 1
                continue
            sync_folder(folder)
            return number
    except OSError as error:
        raise no_room(folder, error, 0) from error
