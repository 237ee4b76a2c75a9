"""Who takes part: which nodes are there, and which of them a round asks."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedtune.errors import FederationError
from fedtune.federation.events import NodeInfo, Observer
from fedtune.federation.messages import NodeHello
from fedtune.federation.server.rounds import exchange, make_messages, reason_of, time_to_live

__all__ = ["connected", "discover_nodes", "draw_cohort", "pause"]

_SETTLED_SECONDS = 3.0
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
    tells the observer so. Raises KeyboardInterrupt if `stop` is set.
    """
    deadline = changed = time.monotonic()
    deadline += timeout
    ids = list(grid.get_node_ids())
    said = ""
    while len(ids) < least or time.monotonic() < deadline:
        if len(ids) >= least:
            if expected is not None and len(ids) >= expected:
                break
            if expected is None and ids and time.monotonic() - changed > _SETTLED_SECONDS:
                break
        if observer is not None and len(ids) < max(least, expected or 0):
            reason = _waits_for(len(ids), least, expected, timeout)
            if reason != said:
                observer.on_wait(reason)
                said = reason
        pause(0.1, stop)
        now = list(grid.get_node_ids())
        if len(now) != len(ids):
            changed = time.monotonic()
        ids = now
    if said and observer is not None:
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
) -> tuple[list[NodeInfo], list[tuple[int, str]], list[str]]:
    """Asks every connected node who it is: (nodes by name, (id, reason) of those that failed, notices).

    `least` as in `connected`; `deadline` as in `RoundAsk`. Raises FederationError if no node can take part,
    or two have one name.
    """
    ids = connected(grid, expected, timeout, stop, least=least, observer=observer)
    unknown = [NodeInfo(name=f"node id {node_id}", node_id=node_id, declared_size=0) for node_id in ids]
    nodes: list[NodeInfo] = []
    failed: list[tuple[int, str]] = []
    idle = shards = 0
    waiting = set(ids)
    ttl = time_to_live(timeout) if deadline else None
    messages = make_messages(RecordDict(), "query.hello", unknown, 0, ttl=ttl)
    for node_id, answer in exchange(grid, messages, timeout, stop, deadline=deadline):
        waiting.discard(node_id)
        try:
            if answer.has_error():
                raise FederationError(reason_of(answer))
            hello = NodeHello.from_records(answer.content)
        except FederationError as error:
            failed.append((node_id, str(error)))
            continue
        shards = max(shards, hello.shards)
        if hello.idle:
            idle += 1
        else:
            nodes.append(NodeInfo(hello.node, node_id, hello.declared_size, hello.delta or None))
    failed.sort()  # not as they came: how long a node took depends on its data
    late = f"did not answer in {timeout:g} s (federation.round_timeout)"
    failed += [(node_id, late) for node_id in sorted(waiting)]
    if not nodes:
        reasons = " ".join(dict.fromkeys(reason for _, reason in failed)) or "No node is connected."
        raise FederationError(f"None of {len(ids)} nodes can take part in this run. {reasons}")
    nodes.sort(key=lambda node: node.name)
    names = [node.name for node in nodes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise FederationError(
            f"Two nodes say that they are {', '.join(twice)}. Shards are disjoint, so each node needs a "
            "partition-id of its own; the guarantee does not hold for one person's data on two nodes."
        )
    notices = []
    if idle:
        notices.append(
            f"{idle} of {len(ids)} connected nodes have no shard in this federation and stay idle."
        )
    if len(nodes) < shards:
        notices.append(
            f"The federation has {shards} shards, and only {len(nodes)} of them have a node that takes part; "
            "the data of the others is not trained on. With `flwr run`, start as many nodes as there are "
            f"shards: --federation-config 'num-supernodes={shards}'."
        )
    return nodes, failed, notices
