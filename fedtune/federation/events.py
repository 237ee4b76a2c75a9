"""What a run reports while it goes on, and what it hands over at the end.

The server loop calls an `Observer`; a live display, a log or a test is one. What is in these objects was sent
over the wire under the plan, or measured by the server itself: whoever shows them to anybody but the owner of
the data puts them through `fedtune.privacy.publication` first, which holds back what was measured. An
observer must not change the run, but for one thing: `on_round` may say why the run should end here, as a
search that gives up a bad trial does (`StoppingObserver`). One that raises is logged and not called again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np

    from fedtune.privacy.plan import PrivacyPlan

__all__ = [
    "PRUNED",
    "Dropped",
    "FederationResult",
    "NodeInfo",
    "NullObserver",
    "Observer",
    "Observers",
    "RoundSummary",
    "SafeObserver",
    "StopRule",
    "StoppingObserver",
]

_log = logging.getLogger(__name__)

PRUNED = "Pruned"  # how the reason begins if a search gave the run up; checkpoints keep the reason


@dataclass(frozen=True)
class Dropped:
    """One update that a round went without: which node, in which round (0: before the first), and why."""

    node: str
    round: int
    reason: str


@dataclass(frozen=True)
class NodeInfo:
    """What a node says of itself before the first round; all of it declared public by its owner.

    `delta`: that of its owner's budget; None where there is none.
    """

    name: str
    node_id: int
    declared_size: int
    delta: float | None = None


@dataclass
class RoundSummary:
    """One round, as the server saw it.

    `seconds` is wall time of the round, evaluation included; `train_seconds` is what the nodes report
    (coarse, see `fedtune.federation.messages`), summed. `epsilon` is the largest over the nodes for this
    run's releases so far, None where there is none; `dropped` names each update that was lost.
    `accuracy_error` is the standard error of an accuracy that comes from noised counts, else None.
    """

    round: int
    num_rounds: int
    seconds: float
    accuracy: float | None = None
    loss: float | None = None
    epsilon: float | None = None
    bytes_up: int = 0
    bytes_down: int = 0
    dropped: list[tuple[str, str]] = field(default_factory=list)
    updates: int = 0
    train_seconds: float = 0.0
    void: bool = False
    accuracy_error: float | None = None

    def to_json(self) -> dict[str, Any]:
        """A dict that `json` takes; `from_json` is its inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> RoundSummary:
        """Inverse of `to_json`.

        Raises:
            TypeError: a key is missing or unknown.
        """
        summary = cls(**values)
        summary.dropped = [(str(node), str(reason)) for node, reason in summary.dropped]
        return summary


@dataclass
class FederationResult:
    """A federation that has ended, with everything that a record is made from.

    Attributes:
        run: the run's id, the same over resumes.
        nodes: who took part, by name, with declared sizes.
        plan: the plan as the server proposed it; a node uses `plan.for_shard(its declared size)`.
        adapter: float32 [P], the last state.
        history: one summary a round, resumed rounds included.
        dropped: every update that was lost, over all rounds.
        unusable: every answer that counted as zero in a trusted server's sum; not for publication.
        releases: by node, how often it released (or may have released) something in this run.
        epsilon: the largest over the nodes, of this run alone; None where there is none.
        left_out: by node that should have taken part and has no part in the adapter (it refused, or none of
            its updates arrived), why.
        answers: by node, how often it answered (or may have) about held-out data in this run.
        evaluation: of the last state: `fedtune.training.evaluation.Evaluation` on public data, or
            `fedtune.federation.server.evaluation.NodesEvaluation`; None if never evaluated.
        seconds: wall time, summed over resumes.
        train_seconds: what nodes spent training, summed; exact in the local engine, coarse elsewhere.
        flops: floating point operations of the nodes' training; None where the engine cannot see them.
        attempt: how often the run was started (1: never resumed).
        ended_early: why the run has fewer rounds than it was asked for; None if it has them all.
        notices: what a person should know (a broken checkpoint that was passed over, an idle node).
        public_start: which public texts the adapter began with (`digest`, `texts`), and how accurate it was
            then; None: with none.
    """

    run: str
    nodes: list[NodeInfo]
    plan: PrivacyPlan
    adapter: np.ndarray
    history: list[RoundSummary]
    dropped: list[Dropped]
    releases: dict[str, int]
    epsilon: float | None
    evaluation: Any
    seconds: float
    train_seconds: float
    bytes_up: int
    bytes_down: int
    attempt: int
    flops: int | None = None
    ended_early: str | None = None
    notices: list[str] = field(default_factory=list)
    answers: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    unusable: list[Dropped] = field(default_factory=list)
    public_start: dict[str, Any] | None = None


StopRule = Callable[[RoundSummary], str | None]


class Observer(Protocol):
    """Receives the events of a run; every method may do nothing."""

    def on_start(self, info: dict[str, Any]) -> None:
        """Before the first round: run, run_dir, nodes (names), num_rounds, first_round, trust, epsilon,
        delta, attempt."""

    def on_round(self, summary: RoundSummary) -> str | None:
        """After each round; returns why the run should end after it, or None."""

    def on_client(self, node: str, status: str) -> None:
        """`asked`, `answered`, `refused: ...` or `dropped: ...`; `joined` and `left` where nodes do that."""

    def on_wait(self, reason: str) -> None:
        """Why the run does not go on just now; empty when it does again."""

    def on_finish(self, result: FederationResult) -> None:
        """After the last round."""


class _Forwarding:
    """An Observer whose events all go through one method."""

    def _forward(self, event: str, *args: Any) -> Any:
        raise NotImplementedError

    def on_start(self, info: dict[str, Any]) -> None:
        """See `Observer`."""
        self._forward("on_start", info)

    def on_round(self, summary: RoundSummary) -> str | None:
        """See `Observer`."""
        reason = self._forward("on_round", summary)
        return reason if isinstance(reason, str) and reason else None

    def on_client(self, node: str, status: str) -> None:
        """See `Observer`."""
        self._forward("on_client", node, status)

    def on_wait(self, reason: str) -> None:
        """See `Observer`."""
        self._forward("on_wait", reason)

    def on_finish(self, result: FederationResult) -> None:
        """See `Observer`."""
        self._forward("on_finish", result)


class NullObserver(_Forwarding):
    """Ignores every event."""

    def _forward(self, event: str, *args: Any) -> None:
        return None


class StoppingObserver(_Forwarding):
    """Passes everything on to `observer`, and lets `rule` say after each round whether to go on."""

    def __init__(self, observer: Observer, rule: StopRule) -> None:
        self._observer, self._rule = observer, rule

    def _forward(self, event: str, *args: Any) -> Any:
        return getattr(self._observer, event)(*args)

    def on_round(self, summary: RoundSummary) -> str | None:
        """Why the run should end here: what the rule says, or else the observer."""
        reason = super().on_round(summary)
        return self._rule(summary) or reason


class SafeObserver(_Forwarding):
    """Passes everything on, and stops doing so once the observer raises: a display must not end a run."""

    def __init__(self, observer: Observer | None) -> None:
        self._observer: Observer = observer or NullObserver()

    def _forward(self, event: str, *args: Any) -> Any:
        try:
            return getattr(self._observer, event)(*args)
        except Exception as error:
            _log.warning(
                "The display failed (%s: %s) and is switched off; the run goes on.",
                type(error).__name__,
                error,
            )
            self._observer = NullObserver()
            return None


class Observers(_Forwarding):
    """Passes everything on to several observers; one that raises is switched off, and the others go on."""

    def __init__(self, *observers: Observer) -> None:
        self._all = [SafeObserver(observer) for observer in observers]

    def _forward(self, event: str, *args: Any) -> Any:
        answers = [getattr(observer, event)(*args) for observer in self._all]
        return next((answer for answer in answers if answer), None)
