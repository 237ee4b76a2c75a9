"""Who takes part: which nodes there are, which a round asks, and who joins or leaves between rounds.

`discover_nodes` asks everybody who they are before the first round; `draw_cohort` draws who is asked in a
round; `Roster` knows, round by round, who is there and free. Nodes join late, leave, come back, or still work
on an earlier round. With fewer free nodes than it needs a round is not begun, for what it would ask is
charged whether or not the round can be used: `wait_for` waits, and tells the observer for whom. A node that
connects after the run began is asked who it is between two rounds, without waiting for it; the run is
proposed to it (all of it: what it would cost at most), and it takes part from the first round after it
agreed.

Under trust=distributed the plan's noise is shared out over the nodes of the beginning: these may leave and
come back, and no other joins. In a simulation nobody comes later, so nobody is waited for.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedtune.errors import FederationError
from fedtune.federation.events import Dropped, NodeInfo, Observer
from fedtune.federation.messages import NodeHello, Proposal
from fedtune.federation.server.agreement import PROPOSE, read_consent
from fedtune.federation.server.rounds import exchange, make_messages, name_of, reason_of, time_to_live
from fedtune.federation.server.tracking_grid import TrackingGrid

__all__ = ["Roster", "connected", "discover_nodes", "draw_cohort", "pause"]

_log = logging.getLogger(__name__)
_HELLO = "query.hello"
_SETTLED_SECONDS = 3.0
_POLL_SECONDS = 1.0
_LOG_SECONDS = 60.0
_AGAIN_SECONDS = 300.0
_COHORT_STREAM = 0xC0407  # keeps the cohort's draws apart from every other use of `seed`


def draw_cohort(nodes: Sequence[NodeInfo], size: int | None, seed: int, round: int) -> list[NodeInfo]:
    """The nodes asked in a round: `size` of them without replacement (all if None), in the order of names.

    Depends on names, seed and round only: the same in every engine, and in a resumed run.
    """
    ordered = sorted(nodes, key=lambda node: node.name)
    if size is None or size >= len(ordered):
        return ordered
    generator = np.random.default_rng([_COHORT_STREAM, seed, round])
    return [ordered[i] for i in sorted(generator.choice(len(ordered), size=size, replace=False))]


def pause(seconds: float, stop: threading.Event | None) -> None:
    """Sleeps; raises KeyboardInterrupt as soon as `stop` is set."""
    if stop is None:
        time.sleep(seconds)
    elif stop.wait(seconds):
        raise KeyboardInterrupt


def connected(
    grid: Grid,
    expected: int | None,
    timeout: float,
    stop: threading.Event | None,
    *,
    least: int = 0,
    observer: Observer | None = None,
) -> list[int]:
    """The ids of the nodes that are there, once they are.

    Nodes connect one by one, and in a simulation after the server has started. Waits for `expected` nodes
    if that is known, else until some are there and no more have come for `_SETTLED_SECONDS`; at most
    `timeout` seconds, then goes on with those that are there. With fewer than `least` it waits for ever, and
    tells the observer so.

    Raises:
        KeyboardInterrupt: `stop` is set.
    """
    deadline = changed = time.monotonic()
    deadline += timeout
    ids = list(grid.get_node_ids())
    announced = ""
    while len(ids) < least or time.monotonic() < deadline:
        if len(ids) >= least:
            if expected is not None and len(ids) >= expected:
                break
            if expected is None and ids and time.monotonic() - changed > _SETTLED_SECONDS:
                break
        if observer is not None and len(ids) < max(least, expected or 0):
            reason = _waits_for(len(ids), least, expected, timeout)
            if reason != announced:
                observer.on_wait(reason)
                announced = reason
        pause(0.1, stop)
        now = list(grid.get_node_ids())
        if len(now) != len(ids):
            changed = time.monotonic()
        ids = now
    if announced and observer is not None:
        observer.on_wait("")
    return ids


def _waits_for(here: int, least: int, expected: int | None, timeout: float) -> str:
    if here < least:
        return f"{here} nodes are connected, and a round needs {least} (federation.min_updates)"
    return f"{here} of {expected} nodes are connected (federation.nodes); begins after {timeout:g} s at last"


def discover_nodes(
    grid: Grid,
    timeout: float,
    stop: threading.Event | None = None,
    expected: int | None = None,
    *,
    least: int = 0,
    deadline: bool = False,
    observer: Observer | None = None,
) -> tuple[list[NodeInfo], dict[int, Dropped], list[str]]:
    """Asks every connected node who it is: (nodes by name, by id those that failed, notices).

    `least` as in `connected`; `deadline` as in `RoundAsk`.

    Raises:
        FederationError: no node can take part, or two have one name.
    """
    ids = connected(grid, expected, timeout, stop, least=least, observer=observer)
    unknown = [NodeInfo(name=name_of(node_id), node_id=node_id, declared_size=0) for node_id in ids]
    nodes: list[NodeInfo] = []
    failed: dict[int, Dropped] = {}
    idle = shards = 0
    waiting = set(ids)
    ttl = time_to_live(timeout) if deadline else None
    messages = make_messages(RecordDict(), _HELLO, unknown, 0, ttl=ttl)
    for node_id, answer in exchange(grid, messages, timeout, stop, deadline=deadline):
        waiting.discard(node_id)
        if answer.has_error():
            failed[node_id] = Dropped(name_of(node_id, answer), 0, reason_of(answer))
            continue
        try:
            hello = NodeHello.from_records(answer.content)
        except FederationError as error:
            failed[node_id] = Dropped(name_of(node_id), 0, str(error))
            continue
        shards = max(shards, hello.shards)
        if hello.idle:
            idle += 1
        else:
            nodes.append(NodeInfo(hello.node, node_id, hello.declared_size, hello.delta or None))
    failed = dict(sorted(failed.items()))  # not as they came: how long a node took depends on its data
    late = f"did not answer in {timeout:g} s (federation.round_timeout)"
    failed |= {node_id: Dropped(name_of(node_id), 0, late) for node_id in sorted(waiting)}
    for lost in failed.values():
        if observer is not None:
            observer.on_client(lost.node, f"dropped: {lost.reason}")
    if not nodes:
        reasons = " ".join(dict.fromkeys(lost.reason for lost in failed.values())) or "No node is connected."
        raise FederationError(f"None of {len(ids)} nodes can take part in this run. {reasons}")
    nodes.sort(key=lambda node: node.name)
    names = Counter(node.name for node in nodes)
    if duplicates := sorted(name for name, count in names.items() if count > 1):
        raise FederationError(
            f"Two nodes say that they are {', '.join(duplicates)}. Shards are disjoint, so each node needs a "
            "partition-id of its own; the guarantee does not hold for one person's data on two nodes."
        )
    notices = []
    if idle:
        notices.append(
            f"{idle} of {len(ids)} connected nodes have no shard in this federation and stay idle."
        )
    if len(nodes) + len(failed) < shards:  # of those that failed the reasons are told
        notices.append(
            f"The federation has {shards} shards, and only {len(nodes) + len(failed)} of them have a node; "
            "the data of the others is not trained on. With `flwr run`, start as many nodes as there are "
            f"shards: --federation-config 'num-supernodes={shards}'."
        )
    return nodes, failed, notices


class Roster:
    """The nodes of one run.

    Args:
        grid: the way to the nodes.
        nodes: those that have said who they are.
        failed: ids of nodes that could not; they are asked again when they come back, and every five minutes
            while a round waits for nodes.
        proposal: what a node must agree to before its first round; None: nothing is asked.
        dynamic: nodes come and go (a real federation); False: those of the beginning are all there will be.
        closed: no node joins that was not there at the beginning.
        timeout: seconds that a node has to say who it is.

    Attributes:
        nodes: every node that ever took part, by name, whether or not it is there.
        dropped: nodes that came and could not take part, with the reason, until somebody takes them.
        last_rounds: of nodes that were proposed the run, the last round of it that each says it has charged.
    """

    def __init__(
        self,
        grid: TrackingGrid,
        nodes: Sequence[NodeInfo],
        failed: Collection[int] = (),
        *,
        proposal: Proposal | None = None,
        dynamic: bool = False,
        closed: bool = False,
        timeout: float = 600.0,
        observer: Observer,
        stop: threading.Event | None = None,
    ) -> None:
        self._grid, self._observer, self._stop = grid, observer, stop
        self._dynamic, self._closed, self._timeout = dynamic, closed, timeout
        self.nodes = {node.name: node for node in sorted(nodes, key=lambda node: node.name)}
        self.dropped: list[Dropped] = []
        self.last_rounds: dict[str, int] = {}
        self._failed = set(failed)
        self._proposal = proposal
        self._agreed = {node.name for node in nodes if node.node_id}
        self._asked: dict[int, NodeInfo] = {}  # nodes that have the proposal, by id
        self._here: set[int] = set()

    def refresh(self, round: int = 0) -> list[NodeInfo]:
        """The nodes that are connected and free, by name. Asks those that are new who they are."""
        for question, answer in self._grid.late():
            if question.kind == _HELLO:
                self._on_hello(question.node_id, answer, round)
            elif question.kind == PROPOSE:
                self._on_consent(question.node_id, answer, round)
            else:
                _log.info("A late answer of node id %d was dropped.", question.node_id)
        here = set(self._grid.get_node_ids())
        if self._dynamic:
            for node in self.nodes.values():
                if (node.node_id in here) != (node.node_id in self._here) and self._here:
                    self._observer.on_client(node.name, "joined" if node.node_id in here else "left")
        self._here = here
        self._failed &= here  # whoever was away may have been mended
        busy = self._grid.busy()
        known = {node.node_id for node in self.nodes.values()}
        new = sorted(here - known - self._failed - busy)
        if new and self._dynamic:
            infos = [NodeInfo(name_of(node_id), node_id, 0) for node_id in new]
            ttl = time_to_live(self._timeout)
            self._grid.push_messages(make_messages(RecordDict(), _HELLO, infos, round, ttl=ttl))
        return [node for node in self.nodes.values() if node.node_id in here and node.node_id not in busy]

    def wait_for(self, need: int, exhausted: Collection[str], round: int) -> list[NodeInfo]:
        """The nodes that round `round` can ask: at least `need`, unless no more can come.

        Those in `exhausted` have used up their releases and are not asked.

        Raises:
            KeyboardInterrupt: `stop` is set.
        """
        announced, logged, since = "", -_LOG_SECONDS, time.monotonic()
        while True:
            free = [node for node in self.refresh(round) if node.name not in exhausted]
            able = [name for name in self.nodes if name not in exhausted]
            if len(free) >= need or not self._dynamic or (exhausted and len(able) < need):
                if announced:
                    self._observer.on_wait("")
                return free
            reason = self._reason(free, able, need, round)
            if reason != announced:
                self._observer.on_wait(reason)
                announced = reason
            if time.monotonic() - logged >= _LOG_SECONDS:
                _log.info("%s", reason)
                logged = time.monotonic()
            if time.monotonic() - since >= _AGAIN_SECONDS:
                self._failed.clear()  # what kept a node out may be mended, and the run has nothing else to do
                since = time.monotonic()
            pause(_POLL_SECONDS, self._stop)

    def _reason(self, free: Sequence[NodeInfo], able: Sequence[str], need: int, round: int) -> str:
        busy = self._grid.busy()
        late = [name for name in able if self.nodes[name].node_id in self._here & busy]
        away = [name for name in able if self.nodes[name].node_id not in self._here]
        parts = [f"round {round} waits: {len(free)} of the {need} nodes that it needs are here and free"]
        if away:
            parts.append(f"not connected: {', '.join(away)}")
        if late:
            parts.append(f"still at work on an earlier round: {', '.join(late)}")
        return "; ".join(parts)

    def _on_hello(self, node_id: int, answer: Message, round: int) -> None:
        try:
            if answer.has_error():
                raise FederationError(reason_of(answer))
            hello = NodeHello.from_records(answer.content)
            known = self.nodes.get(hello.node)
            if hello.idle:
                raise FederationError("it has no shard of this federation")
            if known is not None and known.node_id in self._here:
                raise FederationError(
                    f"It says that it is {hello.node}, and another node of that name is connected. Shards "
                    "are disjoint, so each node needs a name of its own."
                )
            if known is None and self._closed:
                raise FederationError(
                    f"{hello.node} came after the run began, and under privacy.trust=distributed the noise "
                    "is shared out over the nodes of the beginning. It can take part in the next run."
                )
        except FederationError as error:
            name = name_of(node_id, answer if answer.has_error() else None)
            self._drop(node_id, name, round, str(error))
            return
        info = NodeInfo(hello.node, node_id, hello.declared_size)
        if self._proposal is None or hello.node in self._agreed:
            self._joined(info)
            return
        self._asked[node_id] = info
        ttl = time_to_live(self._timeout)
        records = self._proposal.to_records()
        self._grid.push_messages(make_messages(records, PROPOSE, [info], round, ttl=ttl))

    def _on_consent(self, node_id: int, answer: Message, round: int) -> None:
        info = self._asked.pop(node_id, None)
        if info is None or self._proposal is None:
            return
        consent = read_consent(answer, info.name, self._proposal)
        self.last_rounds[info.name] = consent.last_round
        if consent.refused is not None:
            self._drop(node_id, info.name, round, consent.refused)
            return
        self._agreed.add(info.name)
        self._joined(info)

    def _joined(self, info: NodeInfo) -> None:
        self.nodes[info.name] = info
        self.nodes = {name: self.nodes[name] for name in sorted(self.nodes)}
        self._observer.on_client(info.name, "joined")

    def _drop(self, node_id: int, name: str, round: int, reason: str) -> None:
        self._failed.add(node_id)
        self.dropped.append(Dropped(name, round, reason))
        self._observer.on_client(name, f"dropped: {reason}")
