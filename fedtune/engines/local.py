"""A small Flower Grid in one process: the same ServerApp loop and ClientApp, without a server between them.

One Context a node, one worker thread, one message at a time: torch already uses every core for one
client, and one model serves all. Messages are copied in both directions, so that no node can reach into
another's message or the server's; their bytes are counted as Flower would serialize them.
A message is run when its answer is pulled, so a few megabytes of adapters at most are on their way at once.
What can be done for many before the first of them is run is done `ahead`: charges, in one durable write,
answers that need the ledger, and the training of small heads.

A client that hangs is given up after `timeout` seconds: its thread is told to end at its next Python
instruction, its late answer goes nowhere, and the next client gets a new thread and, through
`on_abandoned`, a new model. Threads are daemons: none of them keeps the process alive.

What it does not do: run clients side by side, or in processes of their own; engine `ray` does.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import logging
import os
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedtune.federation.client.node_context import public_reason
from fedtune.federation.flower import (
    SERVER_NODE_ID,
    Run,
    copied,
    copied_records,
    empty_run,
    error_answer,
    set_message_id,
    task_identity,
)

if TYPE_CHECKING:
    from fedtune.config.schema import Config
    from fedtune.federation.events import FederationResult, Observer

__all__ = ["Ahead", "ClientThread", "LocalGrid", "run"]

_log = logging.getLogger(__name__)
_FIRST_NODE_ID = SERVER_NODE_ID + 1
_MOST_BYTES = 8_000_000  # of messages that go ahead together


class _Abandoned(BaseException):
    """Raised inside a client's thread that was given up; not an Exception, so nothing below catches it."""


class ClientThread:
    """A thread that does one call after another, and can be given up.

    One for all calls: every new thread that enters torch would get a pool of OpenMP threads of its own.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], list[Any], threading.Event] | None]
        self._calls = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="fedtune-client", daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        try:
            while (call := self._calls.get()) is not None:
                function, result, done = call
                try:
                    result.append(function())
                except Exception as error:
                    result.append(error)
                finally:
                    done.set()
        except _Abandoned:
            return

    def run(self, function: Callable[[], Any], timeout: float) -> Any:
        """What `function` returns; raises what it raises, or TimeoutError, after which the thread is lost."""
        result: list[Any] = []
        done = threading.Event()
        self._calls.put((function, result, done))
        if not done.wait(timeout) or not result:
            raise TimeoutError
        if isinstance(result[0], Exception):
            raise result[0]
        return result[0]

    def abandon(self, wait: float = 0.0) -> None:
        """Asks the thread to end, inside of whatever it does, and waits for it at most `wait` seconds."""
        self._calls.put(None)
        if self._thread.is_alive() and self._thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(
                ctypes.c_ulong(self._thread.ident), ctypes.py_object(_Abandoned)
            )
            self._thread.join(wait)


@dataclasses.dataclass(frozen=True)
class Ahead:
    """What is done for many messages before the first of them is run.

    Attributes:
        kinds: of messages for which it is done.
        most: messages, all of one kind and each of another node.
        before: called with them, each with its node's Context.
        at_hand: whether all that takes time was done for a message, as its node gets it: then it is run
            without a thread that could be given up, which takes longer than the rest.
        after: called when no message waits any more; with the ids of those that will not be run, at the end.
    """

    kinds: Collection[str]
    most: int
    before: Callable[[Sequence[tuple[Message, Context]]], None]
    at_hand: Callable[[Message, Context], bool]
    after: Callable[[Iterable[str]], None]


class LocalGrid(Grid):
    """Runs a ClientApp for `num_nodes` nodes in this process.

    Args:
        client_app: what a node does.
        num_nodes: nodes; node i has `partition-id` i.
        run_config: what every Context's `run_config` holds.
        timeout: seconds that one client may take for one message.
        node_config: more keys for every Context's `node_config`.
        on_abandoned: called after a client was given up, before the next one starts.
        ahead: what is done for many messages before the first of them is run.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_nodes: int,
        run_config: Mapping[str, Any],
        *,
        timeout: float,
        node_config: Mapping[str, Any] | None = None,
        on_abandoned: Callable[[], None] | None = None,
        ahead: Ahead | None = None,
    ) -> None:
        self._app, self._ahead = client_app, ahead
        self._timeout = timeout
        self._on_abandoned = on_abandoned
        # Always 56 bits: every message carries it, and is as long in every run, whatever was drawn.
        self._run = empty_run(int.from_bytes(os.urandom(7), "big") | 1 << 55)
        self._run_config = dict(run_config)
        self._nodes = {
            _FIRST_NODE_ID + i: {"partition-id": i, "num-partitions": num_nodes, **(node_config or {})}
            for i in range(num_nodes)
        }
        self._states = {node_id: RecordDict() for node_id in self._nodes}
        # Ordered: the first of a plain dict is found past all that were taken out before it.
        self._pending: OrderedDict[str, Message] = OrderedDict()
        self._ready: dict[str, tuple[Message, Context]] = {}  # of those pending: as its client gets each
        self._thread: ClientThread | None = None

    @property
    def run_id(self) -> int:
        """Flower's number of this run; of no meaning outside of the process."""
        return int(self._run.run_id)

    # --- Flower's interface

    def set_run(self, run: Run) -> None:
        """Sets Flower's description of the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """Flower's description of the run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Deprecated by Flower in favour of `Message(...)`; does the same."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes, in the order of their partitions."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Takes messages; they run when their answers are pulled.

        Raises:
            ValueError: a message is for a node that there is not.
        """
        ids = []
        for message in messages:
            if message.metadata.dst_node_id not in self._nodes:
                raise ValueError(f"There is no node {message.metadata.dst_node_id} in this grid.")
            set_message_id(message, str(uuid4()))
            self._pending[message.metadata.message_id] = message
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Runs the first of these messages that has not run, and gives its answer; [] if all have."""
        wanted = message_ids if isinstance(message_ids, Set) else set(message_ids)
        message_id = next((name for name in self._pending if name in wanted), None)
        return [] if message_id is None else [self._answer(message_id)]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """All answers; those of clients that raise or hang carry an error."""
        ids = set(self.push_messages(messages))
        end = None if timeout is None else time.monotonic() + timeout
        answers: list[Message] = []
        while len(answers) < len(ids) and (end is None or time.monotonic() < end):
            answers.extend(self.pull_messages(ids))
        return answers

    # --- ours

    def close(self, wait: float = 5.0) -> None:
        """Ends the worker thread; waits for a client in the middle of something at most `wait` seconds."""
        if self._thread is not None:
            self._thread.abandon(wait)
            self._thread = None
        if self._ahead is not None:
            self._ahead.after(list(self._ready))
        self._ready.clear()
        self._pending.clear()

    def _answer(self, message_id: str) -> Message:
        """The answer to a pending message."""
        ahead = self._ahead
        if ahead is None or self._pending[message_id].metadata.message_type not in ahead.kinds:
            return self._deliver(self._pending.pop(message_id))
        if message_id not in self._ready:
            self._prepare(ahead, message_id)
        answer = self._deliver(self._pending.pop(message_id))
        if not self._pending:
            ahead.after(())
        return answer

    def _prepare(self, ahead: Ahead, first: str) -> None:
        """Makes the message `first` ready, and with it those behind it for which something is done ahead."""
        kind, group, size = self._pending[first].metadata.message_type, dict[int, str](), 0
        for name, message in itertools.dropwhile(lambda item: item[0] != first, self._pending.items()):
            node_id = message.metadata.dst_node_id
            if node_id in group or message.metadata.message_type != kind:
                break
            if name not in self._ready:
                group[node_id] = name
                self._ready[name] = self._received(message)
                size += _bytes_in(message)
            if len(group) == ahead.most or size > _MOST_BYTES:
                break
        if len(group) == 1:
            return
        ready = [self._ready[name] for name in group.values()]
        try:
            self._client_thread().run(lambda: ahead.before(ready), self._timeout)
        except TimeoutError:
            self._give_up()
            for name in group.values():  # what the thread has may still be written to
                self._ready[name] = self._received(self._pending[name])
        except Exception as error:
            _log.debug("Nothing was done ahead: %s", error)  # each client meets it, and answers for itself

    def _received(self, message: Message) -> tuple[Message, Context]:
        """A message as its node gets it, with a Context of its own."""
        node_id = message.metadata.dst_node_id
        context = Context(
            run_id=self.run_id,
            node_id=node_id,
            node_config=dict(self._nodes[node_id]),
            state=copied_records(self._states[node_id]),
            run_config=dict(self._run_config),
        )
        return copied(message), context

    def _client_thread(self) -> ClientThread:
        if self._thread is None:
            self._thread = ClientThread()
        return self._thread

    def _give_up(self) -> None:
        """Leaves the client's thread to itself."""
        self._client_thread().abandon()
        self._thread = None
        if self._on_abandoned is not None:
            self._on_abandoned()

    def _deliver(self, message: Message) -> Message:
        ready = self._ready.pop(message.metadata.message_id, None)
        received, context = self._received(message) if ready is None else ready
        node_id = message.metadata.dst_node_id

        def run() -> Message:
            return copied(self._app(received, context))

        try:
            if ready is not None and self._ahead is not None and self._ahead.at_hand(received, context):
                answer = run()
            else:
                answer = self._client_thread().run(run, self._timeout)
            # A client that was given up may still be writing to its own copy; that copy is not kept.
            self._states[node_id] = context.state
        except TimeoutError:
            self._give_up()
            answer = error_answer(
                message, f"did not answer in {self._timeout:g} s (federation.round_timeout)"
            )
        except Exception as error:
            whose = f"partition {self._nodes[node_id]['partition-id']}"
            answer = error_answer(message, public_reason(error, whose, context))
        set_message_id(answer, str(uuid4()))
        return answer


def _bytes_in(message: Message) -> int:
    """Of its arrays."""
    records = message.content.array_records.values()
    return sum(len(array.data) for record in records for array in record.values())


def run(config: Config, run_dir: Path, observer: Observer | None = None) -> FederationResult:
    """Runs a federation in this process.

    Raises:
        FedtuneError: as `fedtune.federation.server.loop.run_rounds` does.
    """
    from fedtune.config.convert import to_json
    from fedtune.federation.client import together
    from fedtune.federation.client.app import app
    from fedtune.federation.resources import forget, run_resources, training_usage
    from fedtune.federation.server.loop import run_rounds

    before = (training_usage.seconds, training_usage.flops)
    num_nodes = len(run_resources(config).prepared.shards)
    grid = LocalGrid(
        app,
        num_nodes,
        {"fedtune": to_json(dataclasses.replace(config, output=str(run_dir)))},
        timeout=config.federation.round_timeout,
        on_abandoned=forget,
        ahead=Ahead(together.KINDS, together.MOST, together.prepare, together.at_hand, together.settle),
    )
    try:
        with task_identity(grid.run_id):
            return run_rounds(
                grid,
                config,
                run_dir,
                observer,
                expected_nodes=num_nodes,
                usage=lambda: (training_usage.seconds - before[0], training_usage.flops - before[1]),
            )
    finally:
        grid.close()
