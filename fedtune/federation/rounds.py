"""One exchange with a cohort: ask every node, check what comes back, and sum it up.

`RoundProtocol` is the seam between the server loop and what a round is: `PlainRound` for updates that
nodes may show (trust `local` and `none`), `CentralRound` for a server that clips and noises (trust
`central`), and secure aggregation in `fedtune.federation.distributed`. A protocol never raises because
of one node: a node that raises, hangs, or sends something unusable is *dropped*, by name and with the
reason, and the others go on.

Updates are added up as they arrive, in float64, and forgotten: memory does not grow with the cohort.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from fedtune.errors import UpdateRejected
from fedtune.federation._flower import serialized_size
from fedtune.federation.events import NodeInfo, Observer
from fedtune.federation.messages import RoundReply, RoundRequest, check_update
from fedtune.privacy.noise import Entropy
from fedtune.privacy.plan import PrivacyPlan

__all__ = [
    "ClippedUpdates",
    "PlainRound",
    "RoundAsk",
    "RoundOutcome",
    "RoundProtocol",
    "exchange",
    "make_messages",
    "reason_of",
]

_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class RoundAsk:
    """What the server loop wants from a round. `timeout`: seconds without any answer until it is over."""

    run: str
    round: int
    attempt: int
    plan: PrivacyPlan
    adapter: np.ndarray = field(repr=False)  # float32 [P]
    nodes: Sequence[NodeInfo]
    timeout: float
    max_update_norm: float
    min_updates: int = 1
    stop: threading.Event | None = None


@dataclass
class RoundOutcome:
    """What a round gave.

    Attributes:
        aggregate: float64 [P], what the server optimizer adds; None if too few updates were usable.
        used: names of the nodes whose updates are in the aggregate.
        replies: every readable answer, without its update.
        dropped: (node, reason) of every update that is not in the aggregate.
        next_plan: the plan of the rounds to come, where this one changed it (an adaptive norm).
    """

    aggregate: np.ndarray | None = None
    used: list[str] = field(default_factory=list)
    replies: list[RoundReply] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    next_plan: PrivacyPlan | None = None


class RoundProtocol(Protocol):
    """How a round is done."""

    def run_round(self, grid: Grid, ask: RoundAsk, observer: Observer) -> RoundOutcome:
        """Asks `ask.nodes`, waits, and aggregates. Drops nodes rather than raising because of them.

        Raises AggregationAborted if the whole round must be discarded (it stays charged), and
        KeyboardInterrupt if `ask.stop` is set.
        """


def make_messages(content: RecordDict, kind: str, nodes: Sequence[NodeInfo], round: int) -> list[Message]:
    """One message a node, each with records of its own: what one node does to its copy, no other sees.

    The arrays' bytes are shared, which is safe because they are immutable.
    """
    messages = []
    for node in nodes:
        own = RecordDict()
        for name, record in content.items():
            if isinstance(record, ArrayRecord):
                own[name] = ArrayRecord({key: replace(array) for key, array in record.items()})
            elif isinstance(record, ConfigRecord):
                own[name] = ConfigRecord(dict(record))
        messages.append(Message(own, node.node_id, kind, group_id=str(round)))
    return messages


def exchange(
    grid: Grid, messages: Sequence[Message], timeout: float, stop: threading.Event | None = None
) -> Iterator[Message]:
    """Sends all messages and yields the answers as they come.

    Ends when all have answered, or when nothing has come for `timeout` seconds. The clock starts again
    with each answer: where few workers serve many nodes, those at the end of the queue are not late.
    """
    pending = set(grid.push_messages(messages))
    deadline = time.monotonic() + timeout
    while pending:
        answers = list(grid.pull_messages(pending))
        for answer in answers:
            pending.discard(answer.metadata.reply_to_message_id)
            yield answer
        if stop is not None and stop.is_set():
            raise KeyboardInterrupt
        if answers:
            deadline = time.monotonic() + timeout
        elif time.monotonic() > deadline:
            return
        else:
            time.sleep(_POLL_SECONDS)


def reason_of(answer: Message) -> str:
    """Why a message carries an error instead of content, in one line."""
    reason = answer.error.reason or f"error code {answer.error.code}"
    return " ".join(str(reason).split())[:500]


def collect(
    grid: Grid, ask: RoundAsk, observer: Observer, outcome: RoundOutcome
) -> Iterator[tuple[NodeInfo, np.ndarray]]:
    """Asks every node for its update and yields the usable ones, float32 [P], as they come.

    All else goes to `outcome`: replies, bytes, and who was dropped and why.
    """

    def drop(node: str, reason: str, status: str = "dropped") -> None:
        outcome.dropped.append((node, reason))
        observer.on_client(node, f"{status}: {reason}")

    request = RoundRequest(ask.run, ask.round, ask.attempt, ask.plan, ask.adapter)
    messages = make_messages(request.to_records(), "train", ask.nodes, ask.round)
    outcome.bytes_down = sum(serialized_size(message) for message in messages)
    for node in ask.nodes:
        observer.on_client(node.name, "asked")
    waiting = {node.node_id: node for node in ask.nodes}
    for answer in exchange(grid, messages, ask.timeout, ask.stop):
        sender = waiting.pop(answer.metadata.src_node_id, None)
        if sender is None:
            continue  # not asked, or answered twice: the first answer counts
        node, name = sender, sender.name
        outcome.bytes_up += serialized_size(answer)
        if answer.has_error():
            drop(name, reason_of(answer))
            continue
        try:
            reply = RoundReply.from_records(
                answer.content, node=name, run=ask.run, round=ask.round, attempt=ask.attempt
            )
            update, reply = reply.update, replace(reply, update=None)
            outcome.replies.append(reply)
            if update is None:
                drop(name, reply.refused or reply.error or "", "refused" if reply.refused else "dropped")
                continue
            check_update(
                update, node=name, round=ask.round, size=ask.adapter.size, max_norm=ask.max_update_norm
            )
        except UpdateRejected as error:
            drop(name, str(error))
            continue
        yield node, update
        outcome.used.append(name)
        observer.on_client(name, "answered")
    for node in waiting.values():
        drop(node.name, f"did not answer in {ask.timeout:g} s (federation.round_timeout)")


class PlainRound:
    """Updates as they are: for trust `local`, where each is private by itself, and for trust `none`.

    Weights are the plan's, from public numbers only (PITFALLS 4), scaled to sum to 1 over the nodes whose
    updates were usable. Sound here because each update is private by itself, whatever is done with it.
    """

    def run_round(self, grid: Grid, ask: RoundAsk, observer: Observer) -> RoundOutcome:
        """See `RoundProtocol`."""
        outcome = RoundOutcome()
        sizes = {node.name: node.declared_size for node in ask.nodes}
        weights = dict(zip(sizes, ask.plan.aggregation_weights(list(sizes), sizes), strict=True))
        total = np.zeros(ask.adapter.size, dtype=np.float64)  # [P]
        weight = 0.0
        for node, update in collect(grid, ask, observer, outcome):
            total += weights[node.name] * update.astype(np.float64)
            weight += weights[node.name]
        if len(outcome.used) >= max(1, ask.min_updates):
            outcome.aggregate = total / weight
        return outcome


class ClippedUpdates:
    """The trusted server's sum of clipped updates, forgotten one by one as they come, released once.

    Guarantee: one update more or less changes the sum by at most `plan.max_grad_norm`, and `release` adds
    the plan's noise to it and divides by a public constant.
    """

    def __init__(self, plan: PrivacyPlan, size: int) -> None:
        self._plan = plan
        self._total = np.zeros(size, dtype=np.float64)  # [P]
        self._norms: list[float] = []

    def add(self, update: np.ndarray) -> None:
        """Adds one finite update [P], clipped."""
        values = update.astype(np.float64)
        norm = float(np.linalg.norm(values))
        self._total += self._plan.clip_factors([norm])[0] * values
        self._norms.append(norm)

    def release(self, entropy: Entropy) -> tuple[np.ndarray, PrivacyPlan]:
        """The noised average, float64 [P], and the plan of the next round (its norm may have moved)."""
        plan = self._plan
        noised = self._total + plan.noise(self._total.size, entropy)
        return plan.average(noised), plan.adapt_clip(self._norms, entropy)


class CentralRound:
    """Client-level DP by a trusted server: whole updates are clipped, summed and noised here.

    McMahan et al. 2018, with the norm following a private quantile (Andrew et al. 2021) where the plan
    says so. One node more or less changes the sum by at most `max_grad_norm`; the noise is the plan's,
    and the divisor its public cohort size, however many answered. A node that was dropped counts as zero.
    """

    def run_round(self, grid: Grid, ask: RoundAsk, observer: Observer) -> RoundOutcome:
        """See `RoundProtocol`."""
        outcome = RoundOutcome()
        total = ClippedUpdates(ask.plan, ask.adapter.size)
        for _, update in collect(grid, ask, observer, outcome):
            total.add(update)
        if len(outcome.used) >= max(1, ask.min_updates):
            entropy = ask.plan.entropy("server", ask.round, ask.attempt)
            outcome.aggregate, outcome.next_plan = total.release(entropy)
        return outcome
