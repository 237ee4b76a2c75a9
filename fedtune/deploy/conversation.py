"""What a node says to the SuperLink: fetch a message, have it answered, send the answer, wait, ask again.

Flower's own loop (`start_client_internal`) waits 3 s whenever there is no message and looks every 0.5 s
whether an answer is there, so that a round would mostly wait for polls. This one is made of the same parts,
answers a message in the thread that fetched it, and waits between two questions for a twentieth of the time
since the last message: rounds follow each other closely, and a node that has been idle for a minute asks
every 3 s, as Flower's does. It also says more often that it lives.

What it does not do: decide anything about a message, which is for the one who answers.

Uses Flower's internals (checked with 1.41): the parts of `start_client_internal`, which is what
`flower-supernode` calls.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

__all__ = ["UPLOAD_SECONDS", "Pace", "converse", "pauses"]

# For an object of a message on its way. Whoever died while it sent one would hold the other side until
# Flower forgets the upload, after 3 minutes.
UPLOAD_SECONDS = 60
# Flower's server holds a node that was killed for connected until it has missed two heartbeats, and lets the
# one that was started in its place in no earlier. At Flower's 30 s that is a minute in the way of rounds;
# 10 s is the least that the server takes.
HEARTBEAT_SECONDS = 10


class Pace:
    """Seconds to wait before asking again: a share of how long nothing has come, within bounds."""

    SHARE, SHORTEST, LONGEST = 0.05, 0.1, 3.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock() - self.LONGEST / self.SHARE  # nothing has come for long

    def message(self) -> None:
        """A message has come."""
        self._last = self._clock()

    def seconds(self) -> float:
        """The wait before the next question."""
        return min(self.LONGEST, max(self.SHORTEST, self.SHARE * (self._clock() - self._last)))


def converse(
    state: Any,
    store: Any,
    *,
    server: str,
    authority: Path,
    key: Any,
    node_config: dict[str, Any],
    guard: Callable[[Any], Any],
    answer: Callable[[], bool],
    say: Callable[[str], None],
) -> None:
    """Joins the SuperLink at `server` and goes on until the connection ends for a reason unforeseen.

    Args:
        state: Flower's NodeState; it is told the node's id once the node has joined.
        store: Flower's ObjectStore of that state.
        authority: file with the certificate of whoever vouches for the server.
        key: the node's private key.
        node_config: what every Context of this node holds.
        guard: Flower's connection (eight functions), with the node's own checks put before them.
        answer: answers the messages that are in `state`; False if there is nothing to send.
        say: tells the site's administrator of an answer that did not arrive.

    Raises SystemExit if the server does not let this node in, and when it is told to end (Ctrl-C, SIGTERM).
    """
    from flwr.supercore import heartbeat
    from flwr.supercore.exit import register_signal_handlers
    from flwr.supercore.telemetry import EventType
    from flwr.supernode import fleet_http_connection
    from flwr.supernode.start_client_internal import (
        _init_connection,
        _pull_and_store_message,
        _push_messages,
    )

    for where in (fleet_http_connection, heartbeat):  # what the server is told, and what is kept
        setattr(where, "HEARTBEAT_DEFAULT_INTERVAL", HEARTBEAT_SECONDS)  # noqa: B010 (Flower re-exports it)
    register_signal_handlers(event_type=EventType.RUN_SUPERNODE_LEAVE)
    pace = Pace()
    connection = _init_connection(
        server_address=server,
        insecure=False,
        root_certificates=authority.read_bytes(),
        authentication_keys=(key, key.public_key()),
    )
    with connection as opened:
        node_id, receive, send, get_run, get_fab, pull_object, push_object, confirm = guard(opened)
        state.set_node_id(node_id)
        deliver = _delivery(store, send, push_object, say)
        while True:
            came = _pull_and_store_message(
                state=state,
                object_store=store,
                node_config=node_config,
                receive=receive,
                get_run=get_run,
                get_fab=get_fab,
                pull_object=_soon_again(pull_object),
                confirm_message_received=confirm,
                trusted_entities=None,
            )
            if came is None:
                time.sleep(pace.seconds())
                continue
            if answer():
                _push_messages(state=state, object_store=store, send=deliver, push_object=push_object)
            pace.message()


def pauses() -> Iterator[float]:
    """Seconds between two questions for an object on its way: UPLOAD_SECONDS in all, short ones first.

    Flower's own first pause is a second, and most objects are there after a tenth.
    """
    yield from (0.05, 0.1, 0.2, 0.3, 0.35)
    yield from itertools.repeat(1.0, UPLOAD_SECONDS - 1)


def _soon_again(pull: Callable[[int, str], bytes]) -> Callable[[int, str], bytes]:
    """`pull`, which waits for an object that is on its way, and gives it up when it does not come.

    A server that fails for a moment (its database was locked by twenty nodes at once) is asked again too:
    Flower would forget the message, and the round would wait for this node until its deadline.
    """
    import httpx
    from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectUnavailableError

    def patient(run_id: int, object_id: str) -> bytes:
        for pause in pauses():
            try:
                return pull(run_id, object_id)
            except ObjectUnavailableError:
                time.sleep(pause)
            except httpx.HTTPStatusError as error:
                if error.response.status_code < 500:
                    raise
                time.sleep(pause)
        raise ObjectPullError(object_id, f"it did not arrive in {UPLOAD_SECONDS} s.")

    return patient


def _delivery(
    store: Any, send: Callable[..., Any], push_object: Callable[..., Any], say: Callable[[str], None]
) -> Callable[[Any, Any, float], tuple[set[str], str]]:
    """Flower's `send`, which also pushes the answer's objects, and does both again when the server failed.

    Flower drops an answer at an HTTP 500 or an object that was not stored, and this one is charged. All of it
    is begun again, for the server may have stored an object and failed later: it knows an answer by the hash
    of its content, keeps it once, and says which of its objects it still misses; a new push of an answer
    replaces the one before (`LinkState.store_message_res`, `CoreState.preregister_object_tree`).
    """
    import httpx
    from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
    from flwr.supercore.inflatable.inflatable_utils import (
        ObjectPushError,
        push_object_contents_from_iterable,
    )

    def deliver(message: Any, tree: Any, seconds: float) -> tuple[set[str], str]:
        for pause in itertools.chain(pauses(), [None]):
            try:
                missing, session = send(message, tree, seconds)
                names = dict.fromkeys(one.object_id for one in iterate_object_tree(tree))
                push_object_contents_from_iterable(
                    ((name, store.get(name)) for name in names if name in missing),
                    partial(push_object, message.metadata.run_id, session),
                )
                return set(), session
            except Exception as error:
                status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else 0
                if pause is None or not (status >= 500 or isinstance(error, ObjectPushError)):
                    told = f"HTTP status {status}" if status else f"{type(error).__name__}: {error}"
                    say(
                        f"the answer to {message.metadata.message_type}, round {message.metadata.group_id}, "
                        f"did not arrive at the server ({told}) and is given up; what was charged for it "
                        "stays charged"
                    )
                    raise
                time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    return deliver
