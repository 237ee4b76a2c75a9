"""One exchange with a cohort: ask every node, check what comes back, and sum it up.

`RoundProtocol` is the seam between the server loop and what a round is: `PlainRound` for updates that
nodes may show (trust `local` and `none`), `CentralRound` for a server that clips and noises (trust
`central`), and secure aggregation in `fedtune.federation.secagg.server`. A protocol never raises because
of one node: a node that raises, hangs, or sends something unusable is *dropped*, by name and with the
reason, and the others go on.

Updates are added up in float64, in the order of the nodes' names, so that every engine computes the same
sum to the last bit, and forgotten: where nodes answer in that order, memory does not grow with the cohort. An
update that comes early is kept until those before it have come or are given up.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedtune.errors import AggregationAborted, PrivacyError, SeparationError, UpdateRejected
from fedtune.federation.events import NodeInfo, Observer
from fedtune.federation.flower import blamed, copied_records, serialized_size, wrapped_exception
from fedtune.federation.messages import RoundReply, RoundRequest, check_update
from fedtune.privacy.mechanisms.matrix import CorrelatedNoise
from fedtune.privacy.mechanisms.noise import Entropy
from fedtune.privacy.plan import PrivacyPlan
from fedtune.privacy.publication import one_line

__all__ = [
    "ClippedUpdates",
    "PlainRound",
    "RoundAsk",
    "RoundOutcome",
    "RoundProtocol",
    "exchange",
    "make_messages",
    "name_of",
    "reason_of",
    "time_to_live",
]

_log = logging.getLogger(__name__)
_POLL_SECONDS, _LONGEST_POLL, _POLL_SHARE = 0.1, 1.0, 0.05  # a question costs the server some 10 ms
_GRACE_SECONDS = 300.0  # by which clocks may differ: a node that is further off may not join
_STALL_SECONDS = 5.0  # a grid that takes longer to say what has come was cut off itself


@dataclass(frozen=True)
class RoundAsk:
    """What the server loop wants from a round.

    `timeout`: seconds until it goes on without those that have not answered, counted from the question if
    `deadline` is set (every node has a machine of its own), else from the last answer (few workers serve many
    nodes, and those at the end of the queue are not late).
    `gradients`: nodes send one noised gradient each, not what training made of it.
    """

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
    deadline: bool = False
    noise: CorrelatedNoise | None = field(default=None, repr=False)  # dp_ftrl: what past rounds have left
    head: np.ndarray | None = field(default=None, repr=False)  # bool [P]: the head's part, where it matters
    gradients: bool = False

    def noise_in(self, node: NodeInfo) -> float:
        """Twice the L2 norm that noise has in what `node` sends, by the plan alone; 0.0 but for gradients.

        The fewer units, the more of it: on 77 classes a site of 30 records at epsilon 1 sends noise of norm
        109. Twice the root of the mean square is passed by chance less than once in 10^9, from P = 16 on.
        """
        if not self.gradients or not self.plan.is_private():
            return 0.0
        plan = self.plan
        deviations = plan.average(np.full(self.adapter.size, plan.noise_std()))
        if self.head is not None:
            alone = plan.head_alone(self.round)
            deviations = plan.clipping.undone(deviations, self.head, alone) * (self.head | (not alone))
        # Each node divides by its own size.
        return 2.0 * float(np.linalg.norm(deviations)) * plan.declared_size / node.declared_size


@dataclass
class RoundOutcome:
    """What a round gave.

    Attributes:
        aggregate: float64 [P], what the server optimizer adds; None if too few updates were usable.
        used: names of the nodes whose updates are in the aggregate.
        replies: every readable answer, without its update.
        dropped: (node, reason) of every update that is not in the aggregate.
        unusable: (node, reason) of every answer that counts as zero in the aggregate (trust central). What
            a raw update looked like is private: the reason is for whoever is trusted with it alone.
        next_plan: the plan of the rounds to come, where this one changed it (an adaptive norm).
    """

    aggregate: np.ndarray | None = None
    used: list[str] = field(default_factory=list)
    replies: list[RoundReply] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    unusable: list[tuple[str, str]] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    next_plan: PrivacyPlan | None = None


class RoundProtocol(Protocol):
    """How a round is done."""

    def run_round(self, grid: Grid, ask: RoundAsk, observer: Observer) -> RoundOutcome:
        """Asks `ask.nodes`, waits, and aggregates. Drops nodes rather than raising because of them.

        Raises:
            AggregationAborted: the whole round must be discarded (it stays charged).
            KeyboardInterrupt: `ask.stop` is set.
        """


def time_to_live(timeout: float) -> float:
    """Seconds after which a question that is waited for `timeout` seconds is not delivered any more: whoever
    comes later would work, and be charged, for nothing."""
    return timeout + _GRACE_SECONDS


def make_messages(
    content: RecordDict, kind: str, nodes: Sequence[NodeInfo], round: int, *, ttl: float | None = None
) -> list[Message]:
    """One message a node, each with records of its own: what one node does to its copy, no other sees.

    `ttl`: see `time_to_live`.
    """
    return [
        Message(copied_records(content), node.node_id, kind, group_id=str(round), ttl=ttl) for node in nodes
    ]


def exchange(
    grid: Grid,
    messages: Sequence[Message],
    timeout: float,
    stop: threading.Event | None = None,
    *,
    deadline: bool = False,
) -> Iterator[tuple[int, Message]]:
    """Sends all messages and yields the answers as they come, each with the id of the node that was asked.

    Whose answer it is follows from the question: where a node is gone, Flower's server answers for it. Ends
    when all have answered, or after `timeout` seconds as `RoundAsk` says; seconds in which the grid itself
    was cut off are nobody's lateness.
    """
    ids = list(grid.push_messages(messages))
    pending = {
        name: message.metadata.dst_node_id for name, message in zip(ids, messages, strict=True) if name
    }
    last_answer = time.monotonic()
    end = last_answer + timeout
    while pending:
        asked = time.monotonic()
        answers = list(grid.pull_messages(pending.keys()))  # a view: nothing is copied for an answer
        took = time.monotonic() - asked
        for answer in answers:
            node_id = pending.pop(answer.metadata.reply_to_message_id, None)
            if node_id is not None:  # the first answer counts
                yield node_id, answer
        if stop is not None and stop.is_set():
            raise KeyboardInterrupt
        if answers:
            last_answer = time.monotonic()
        if answers and not deadline:
            end = last_answer + timeout
        elif took > _STALL_SECONDS:
            end += took
        if pending and not answers:
            if time.monotonic() > end:
                return
            # Often while answers come; while all train, the processor is theirs.
            time.sleep(min(_LONGEST_POLL, max(_POLL_SECONDS, _POLL_SHARE * (time.monotonic() - last_answer))))


def name_of(node_id: int, answer: Message | None = None) -> str:
    """What to call a node that has not said who it is: as its error says, or else by Flower's number."""
    named = None if answer is None else blamed(one_line(str(answer.error.reason or "")))[0]
    return named or f"node id {node_id}"


def reason_of(answer: Message) -> str:
    """Why a message carries an error instead of content, in one line."""
    _, reason = blamed(one_line(str(answer.error.reason or f"error code {answer.error.code}")))
    if exception := wrapped_exception(reason):
        return f"its worker failed with {exception}; the log of the engine says more"
    return reason[:500]


def _bytes_of(messages: Sequence[Message]) -> int:
    """Bytes of messages that are the same to all but in their nodes' ids: of each length one is counted."""
    sizes: dict[int, int] = {}
    total = 0
    for message in messages:
        length = message.metadata.dst_node_id.bit_length()
        if length not in sizes:
            sizes[length] = serialized_size(message)
        total += sizes[length]
    return total


def collect(
    grid: Grid, ask: RoundAsk, observer: Observer, outcome: RoundOutcome, *, raw: bool = False
) -> Iterator[tuple[NodeInfo, np.ndarray]]:
    """Asks every node for its update and yields the usable ones, float32 [P], in the order of `ask.nodes`.

    All else goes to `outcome`: replies, bytes, and who was dropped and why. `raw`: updates are not private
    when they come (trust central), so whether one is usable must not show. One that is not, or that its node
    failed to make, is then an update of zeros, and `outcome.unusable` has the reason.
    """
    request = RoundRequest(ask.run, ask.round, ask.attempt, ask.plan, ask.adapter)
    ttl = time_to_live(ask.timeout) if ask.deadline else None
    messages = make_messages(request.to_records(), "train", ask.nodes, ask.round, ttl=ttl)
    outcome.bytes_down = _bytes_of(messages)
    for node in ask.nodes:
        observer.on_client(node.name, "asked")
    waiting = {node.node_id: node for node in ask.nodes}
    early: dict[str, np.ndarray] = {}  # usable updates of nodes whose turn has not come
    turns = deque(ask.nodes)
    sizes: list[int] = []

    def in_turn() -> Iterator[tuple[NodeInfo, np.ndarray]]:
        while turns and turns[0].node_id not in waiting:
            node = turns.popleft()
            if (update := early.pop(node.name, None)) is not None:
                outcome.used.append(node.name)
                yield node, update

    for node_id, answer in exchange(grid, messages, ask.timeout, ask.stop, deadline=ask.deadline):
        node = waiting.pop(node_id)
        update = _usable(answer, node, ask, observer, outcome, raw)
        if raw and update is not None:
            sizes.append(serialized_size(answer))
        else:
            outcome.bytes_up += serialized_size(answer)
        if update is not None:
            early[node.name] = update
            observer.on_client(node.name, "answered")
        yield from in_turn()
    for node in waiting.values():
        reason = f"did not answer in {ask.timeout:g} s (federation.round_timeout)"
        _drop(node.name, reason, observer, outcome)
    waiting.clear()
    # Each as the largest: a raw answer that is short for want of an update must not show in the sum.
    outcome.bytes_up += len(sizes) * max(sizes, default=0)
    yield from in_turn()


def _usable(
    answer: Message, node: NodeInfo, ask: RoundAsk, observer: Observer, outcome: RoundOutcome, raw: bool
) -> np.ndarray | None:
    """The update in an answer; None, and the node dropped, if there is no usable one; `raw` as `collect`."""
    name = node.name

    def lost(reason: str) -> np.ndarray | None:
        if not raw:
            _drop(name, reason, observer, outcome)
            return None
        outcome.unusable.append((name, reason))
        _log.warning("An answer of node %r counts as zero in round %d: %s", name, ask.round, reason)
        return np.zeros(ask.adapter.size, dtype=np.float32)

    if answer.has_error():
        return lost(reason_of(answer))
    try:
        reply = RoundReply.from_records(
            answer.content, node=name, run=ask.run, round=ask.round, attempt=ask.attempt
        )
        update, reply = reply.update, replace(reply, update=None)
        outcome.replies.append(reply)
        if reply.refused:  # the node's own decision, before it read any data
            _drop(name, reply.refused, observer, outcome, "refused")
            return None
        if update is None:
            return lost(reply.error or "")
        check_update(
            update, node=name, round=ask.round, size=ask.adapter.size,
            max_norm=ask.max_update_norm, noise=ask.noise_in(node),
        )  # fmt: skip
    except UpdateRejected as error:
        return lost(str(error))
    return update


def _drop(node: str, reason: str, observer: Observer, outcome: RoundOutcome, status: str = "dropped") -> None:
    outcome.dropped.append((node, reason))
    observer.on_client(node, f"{status}: {reason}")


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

    def release(
        self, entropy: Entropy, correlated: CorrelatedNoise | None = None, round: int = 0
    ) -> tuple[np.ndarray, PrivacyPlan]:
        """The noised average, float64 [P], and the plan of the next round (its norm may have moved).

        `correlated` and `round` (from 1): for dp_ftrl, whose noise depends on that of the rounds before.

        Raises:
            PrivacyError: it has none, or the round was released before.
        """
        plan = self._plan
        noise = plan.noise(self._total.size, entropy)
        if plan.root() is not None:
            if correlated is None:
                raise PrivacyError("dp_ftrl releases no round without the noise of the rounds before it.")
            noise = correlated.next(round, noise)
        return plan.average(self._total + noise), plan.adapt_clip(self._norms, entropy)


class CentralRound:
    """Client-level DP by a trusted server: whole updates are clipped, summed and noised here.

    McMahan et al. 2018, with the norm following a private quantile (Andrew et al. 2021) where the plan
    says so. One node more or less changes the sum by at most `max_grad_norm`; the noise is the plan's,
    and the divisor its public cohort size, however many answered. A node that was dropped counts as zero,
    and so does an answer that is unusable, or says that its node failed: the round is released all the same,
    for whether it is must not depend on what one node's data did to its update.
    With dp_ftrl a round in which a node says that it was asked too soon is discarded: this server does not
    know all that was published (`fedtune.federation.server.correlated`).
    """

    def run_round(self, grid: Grid, ask: RoundAsk, observer: Observer) -> RoundOutcome:
        """See `RoundProtocol`."""
        outcome = RoundOutcome()
        total = ClippedUpdates(ask.plan, ask.adapter.size)
        for _, update in collect(grid, ask, observer, outcome, raw=True):
            total.add(update)
        if ask.plan.root() is not None:
            for reply in outcome.replies:
                if reply.refusal == SeparationError.__name__:
                    raise AggregationAborted(f"The round is discarded, because {reply.refused}")
        if len(outcome.used) >= max(1, ask.min_updates):
            entropy = ask.plan.entropy("server", ask.round)
            outcome.aggregate, outcome.next_plan = total.release(entropy, ask.noise, ask.round)
        return outcome
