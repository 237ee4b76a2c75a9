"""Everything that changes from round to round, and nothing else; saved whole, restored whole.

What a resumed run may not change is checked here: its noise was calibrated to the settings that it was
started with, so it goes on with those or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.config.schema import Config
from fedtune.errors import CheckpointError
from fedtune.federation import local_record
from fedtune.federation.events import Dropped, FederationResult, NodeInfo, RoundSummary
from fedtune.federation.server import checkpoint as checkpoints
from fedtune.federation.server.checkpoint import Checkpoint
from fedtune.federation.server.correlated import CorrelatedRounds
from fedtune.federation.server.evaluation import NodesEvaluation
from fedtune.federation.server.optimizers import ServerOptimizer, server_optimizer
from fedtune.federation.server.roster import Roster
from fedtune.federation.server.rounds import RoundOutcome
from fedtune.privacy.plan import PrivacyPlan
from fedtune.privacy.publication import merge, publish

__all__ = ["RunState"]

# Settings that a resumed run may change: they decide where and how long, not what is computed or promised.
_AWAY = 0  # no node's id: of one that is not connected
_MAY_CHANGE = ("resume", "output", "device", "engine", "pricing", "tracker")


@dataclass
class RunState:
    """A run between two rounds. `nodes`: everybody who ever took part, by name; gone or not."""

    run: str
    plan: PrivacyPlan
    adapter: np.ndarray
    optimizer: ServerOptimizer
    attempt: int
    round: int = 0
    nodes: list[NodeInfo] = field(default_factory=list)
    history: list[RoundSummary] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    unusable: list[Dropped] = field(default_factory=list)  # counted as zero: not published
    releases: dict[str, int] = field(default_factory=dict)
    answers: dict[str, int] = field(default_factory=dict)
    evaluation: NodesEvaluation | None = None  # the last that nodes answered for
    exhausted: list[str] = field(default_factory=list)
    seconds: float = 0.0
    train_seconds: float = 0.0
    flops: int | None = 0
    notices: list[str] = field(default_factory=list)
    ended_early: str | None = None
    correlated: CorrelatedRounds | None = None  # dp_ftrl

    def save(self, run_dir: Path, config: Config) -> None:
        """Checkpoints the state after `round`."""
        if self.correlated is not None:
            self.correlated.keep()  # first: noise that is in an adapter must be known to later rounds
        meta: dict[str, Any] = {
            "config": asdict(config),
            "plan": self.plan.to_json(),
            "strategy": self.optimizer.name,
            "attempt": self.attempt,
            "nodes": [[node.name, node.declared_size] for node in self.nodes],
            "history": [summary.to_json() for summary in self.history],
            "dropped": [asdict(one) for one in self.dropped],
            "unusable": [asdict(one) for one in self.unusable],
            # By name, and not in the order of arrival, which tells who computed for how long.
            "releases": dict(sorted(self.releases.items())),
            "answers": dict(sorted(self.answers.items())),
            "evaluation": None if self.evaluation is None else self.evaluation.to_json(),
            "exhausted": self.exhausted,
            "seconds": self.seconds,
            "train_seconds": self.train_seconds,
            "flops": self.flops,
            "notices": self.notices,
            "ended_early": self.ended_early,
        }
        meta, own = publish("checkpoint", meta, public_data=config.data.public)
        local_record.update(run_dir, checkpoint={"run": self.run, "meta": own} if own else {})
        checkpoints.save(
            run_dir, Checkpoint(self.run, self.round, self.adapter, self.optimizer.state_dict(), meta)
        )

    @classmethod
    def restore(cls, run_dir: Path, config: Config, attempt: int) -> RunState:
        """The state to go on from. Raises CheckpointError if it is another run's or unreadable."""
        saved, notices = checkpoints.load_latest(run_dir)
        meta = _with_local(saved, run_dir)
        try:
            _same_config(meta["config"], config)
            optimizer = server_optimizer(config)
            optimizer.load_state_dict(saved.optimizer)
            state = cls(
                run=saved.run,
                plan=PrivacyPlan.from_json(meta["plan"]),
                adapter=saved.adapter.astype(np.float32),
                optimizer=optimizer,
                attempt=attempt,
                round=saved.round,
                nodes=[NodeInfo(str(name), _AWAY, int(size)) for name, size in meta["nodes"]],
                history=[RoundSummary.from_json(one) for one in meta["history"]],
                dropped=[Dropped(**one) for one in meta["dropped"]],
                unusable=[Dropped(**one) for one in meta["unusable"]],
                releases=dict(meta["releases"]),
                answers=dict(meta["answers"]),
                evaluation=None
                if meta["evaluation"] is None
                else NodesEvaluation.from_json(meta["evaluation"]),
                exhausted=list(meta["exhausted"]),
                seconds=meta["seconds"],
                train_seconds=meta["train_seconds"],
                flops=meta["flops"],
                notices=[*meta["notices"], *notices],
                ended_early=meta["ended_early"],
            )
            if state.plan.root() is not None:
                state._resume_correlated(run_dir)
            return state
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"The checkpoint in {run_dir} was written by another version of fedtune "
                f"({type(error).__name__}: {error}). Resume with that version, or start a new run."
            ) from error

    def reconnect(self, there: Sequence[NodeInfo]) -> list[NodeInfo]:
        """Those who took part before, with the ids of those who are there now, who join if they may."""
        known = {node.name: node for node in self.nodes}
        closed = self.plan.trust == "distributed"  # the noise is shared out over the nodes of the beginning
        known |= {node.name: node for node in there if node.name in known or not closed}
        self.nodes = [known[name] for name in sorted(known)]
        return self.nodes

    def joined(self, roster: Roster) -> None:
        """Notes who has joined, and who could not."""
        self.nodes = list(roster.nodes.values())
        self.dropped += roster.dropped
        roster.dropped = []

    def _resume_correlated(self, run_dir: Path) -> None:
        """Goes on after the last round that was begun: one that was lost on the way stays lost."""
        self.correlated, lost = CorrelatedRounds.resume(run_dir, self.run, self.plan, self.adapter.size)
        self.notices += lost
        before, self.round = self.round, max(self.round, self.correlated.round)
        if self.round == before:
            return
        for name, asked in self.correlated.asked.items():
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

    def account(self, outcome: RoundOutcome, cohort: Sequence[NodeInfo]) -> None:
        """Charges each node of the cohort: by what it says; where it says nothing, as if it had released."""
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
        outcome.dropped.sort()
        self.dropped += [Dropped(node, self.round, reason) for node, reason in outcome.dropped]
        self.unusable += [Dropped(node, self.round, reason) for node, reason in outcome.unusable]

    def info(self, config: Config, run_dir: Path) -> dict[str, Any]:
        """What `Observer.on_start` is told."""
        return {
            "run": self.run,
            "run_dir": str(run_dir),
            "nodes": [node.name for node in self.nodes],
            "num_rounds": config.federation.num_rounds,
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
        """Epsilon of this run so far: the largest over the nodes, never an average (PITFALLS 29)."""
        if not self.plan.is_private():
            return None
        nodes = {*self.releases, *self.answers}
        made = {(self.releases.get(node, 0), self.answers.get(node, 0)) for node in nodes}
        # Of two nodes one may have answered less: only those that no other exceeds are accounted.
        most = [one for one in made if not any(one != o and one[0] <= o[0] and one[1] <= o[1] for o in made)]
        return max((float(self.plan.epsilon(*one)) for one in most if any(one)), default=0.0)

    def result(self, evaluation: Any) -> FederationResult:
        """What is handed over at the end."""
        return FederationResult(
            run=self.run,
            nodes=list(self.nodes),
            plan=self.plan,
            adapter=self.adapter.copy(),
            history=self.history,
            dropped=self.dropped,
            unusable=self.unusable,
            releases={node.name: self.releases.get(node.name, 0) for node in self.nodes},
            epsilon=self.epsilon(),
            evaluation=evaluation,
            answers={node.name: self.answers.get(node.name, 0) for node in self.nodes},
            seconds=self.seconds,
            train_seconds=self.train_seconds,
            flops=self.flops,
            bytes_up=sum(one.bytes_up for one in self.history),
            bytes_down=sum(one.bytes_down for one in self.history),
            attempt=self.attempt,
            ended_early=self.ended_early,
            notices=self.notices,
        )


def _with_local(saved: Checkpoint, run_dir: Path) -> dict[str, Any]:
    """The checkpoint's facts with those that the folder keeps for the owner; without them, if they are of
    another round or gone: measured times then begin anew."""
    own = local_record.read(run_dir).get("checkpoint") or {}
    if not isinstance(own, dict) or own.get("run") != saved.run:
        return saved.meta
    merged: dict[str, Any] = merge(saved.meta, own.get("meta"))
    history = merged.get("history")
    return merged if isinstance(history, list) and len(history) == len(saved.meta["history"]) else saved.meta


def _same_config(saved: dict[str, Any], config: Config) -> None:
    """Raises CheckpointError, naming the settings, if a resumed run would not be the same run."""
    now = json.loads(json.dumps(asdict(config)))

    def differences(a: Any, b: Any, prefix: str) -> list[str]:
        if isinstance(a, dict) and isinstance(b, dict):
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
