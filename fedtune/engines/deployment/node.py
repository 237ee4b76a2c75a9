"""`fedtune node`: a SuperNode for one site, which runs its own installed fedtune and nothing else.

Flower's SuperNode keeps the connection, the identity and the messages. What it would do with a message, start
a process that installs and runs the app which the server sent, is replaced: the app is compared with the one
thin app that this fedtune knows (`thin`), and the message goes to the resident worker. An app that is any
other is refused, with a line in the audit log, and never unpacked.

Uses Flower's internals (checked with 1.41): its NodeState, and what `conversation` names.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedtune.engines.deployment import certificates, channel
from fedtune.engines.deployment.reach import check_server, wait_for_server
from fedtune.engines.deployment.site import open_ledger
from fedtune.engines.deployment.thin import check_app
from fedtune.errors import FederationError, FedtuneError, ResourceError
from fedtune.federation.audit_log import AuditLog
from fedtune.federation.policy import SiteSettings

__all__ = ["Worker", "run_node"]

_log = logging.getLogger("fedtune.node")
_START_SECONDS = 120.0
_BEAT_SECONDS = 5.0
_INVALID_APP, _APP_CRASHED = 3, 4  # any of flwr's ErrorCode will do: the reason is what is read


class WorkerDied(Exception):
    """The worker ended in the middle of a message; the text says how."""


class Worker:
    """The resident worker: started when needed, and again when it has died."""

    def __init__(self, site: SiteSettings) -> None:
        self._site = site
        self._folder = tempfile.TemporaryDirectory(prefix="fedtune-node-")  # mode 0700
        self._path = str(Path(self._folder.name) / "worker.sock")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self._path)
        self._listener.listen(1)
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None

    @property
    def pid(self) -> int | None:
        """The worker's process, if it lives."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self) -> None:
        """Starts the worker if it does not live. Raises ResourceError if it cannot."""
        if self.pid is not None and self._connection is not None:
            return
        self.close_worker()
        command = [sys.executable, "-m", "fedtune.engines.deployment.worker", self._path]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self._site.limits.threads)}
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
        self._listener.settimeout(1.0)
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            with contextlib.suppress(TimeoutError):
                connection, _ = self._listener.accept()
                if channel.peer(connection) != (self._process.pid, os.getuid()):
                    connection.close()  # somebody else of this machine; not our child
                    continue
                connection.settimeout(None)
                channel.send(connection, {}, [self._site.to_json().encode()])
                channel.receive(connection)
                self._connection = connection
                return
        raise ResourceError(
            f"The node's worker did not start (exit status {self._process.poll()}); its own output says why."
        )

    def ask(
        self, message: bytes, context: bytes, header: dict[str, Any], beat: Callable[[], object]
    ) -> list[bytes]:
        """[reply, context] of the worker; calls `beat` every few seconds meanwhile. Raises WorkerDied."""
        self.start()
        connection = self._connection
        assert connection is not None and self._process is not None
        try:
            channel.send(connection, header, [message, context])
            while not select.select([connection], [], [], _BEAT_SECONDS)[0]:
                beat()
            return channel.receive(connection)[1]
        except (EOFError, OSError) as error:
            connection.close()
            self._connection = None
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(5)
            status = self._process.poll()
            how = f"by signal {-status}" if status is not None and status < 0 else f"with status {status}"
            raise WorkerDied(f"the worker ended {how}") from error

    def close_worker(self) -> None:
        """Ends the worker: it leaves when its socket closes."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(10)

    def close(self) -> None:
        """Ends the worker and removes the socket."""
        self.close_worker()
        self._listener.close()
        self._folder.cleanup()


class Answers:
    """Has each message that Flower's SuperNode has received answered, and hands the answer back to it."""

    def __init__(self, state: Any, store: Any, site: SiteSettings, worker: Worker) -> None:
        self._state, self._store, self._site, self._worker = state, store, site, worker
        self._log = AuditLog(Path(site.audit_log))

    def __call__(self) -> bool:
        """Answers what is pending. False if there was nothing that could be answered."""
        from flwr.common.constant import Status

        done = False
        for task in self._state.get_tasks(statuses=[Status.PENDING], order_by="pending_at"):
            try:
                done = self._handle(task) or done
            except Exception:  # one message must not end the node
                _log.exception("a message could not be answered")
        return done

    def _handle(self, task: Any) -> bool:
        from flwr.common.constant import SubStatus
        from flwr.supernode.start_client_internal import _insert_message

        from fedtune.federation._flower import act_as

        state = self._state
        if state.claim_task(task.task_id) is None or not state.activate_task(task.task_id):
            return False
        message = self._message(task.run_id)
        run = state.get_run(task.run_id)
        context = state.get_run_series_context(run.series_id)
        act_as(task.task_id, run.run_id, context.node_id)
        state.record_message_processing_start(message_id=message.metadata.message_id)
        try:
            check_app(state.get_fab(run.fab_hash).content)
            reply = self._ask(message, context, run, task)
        except WorkerDied as error:
            reason = (
                f"Site '{self._site.site}' lost this round: {error}. If the release was reserved, it "
                f"stays charged; "
                "the next message starts another worker."
            )
            reply = self._refusal(message, _APP_CRASHED, "worker died", reason)
        except FedtuneError as error:
            reply = self._refusal(message, _INVALID_APP, "refused", f"{type(error).__name__}: {error}")
        except Exception as error:  # unforeseen: the server must not wait for an answer that never comes
            _log.exception("a message could not be answered")
            reason = f"Site '{self._site.site}' failed with {type(error).__name__}; its own log says more."
            reply = self._refusal(message, _APP_CRASHED, "failed", reason)
        state.record_message_processing_end(message_id=message.metadata.message_id)
        self._store.delete(message.metadata.message_id)
        _insert_message(reply, state, self._store)
        state.finish_task(task.task_id, SubStatus.COMPLETED, "")
        return True

    def _ask(self, message: Any, context: Any, run: Any, task: Any) -> Any:
        """The worker's reply; what it remembers of the run is kept."""
        from flwr.common.serde import context_from_proto, context_to_proto
        from flwr.proto.message_pb2 import Context as ProtoContext

        from fedtune.federation._flower import deserialize, serialize

        data = self._worker.ask(
            serialize(message),
            context_to_proto(context).SerializeToString(),
            {"task": task.task_id, "run": run.run_id, "node": context.node_id},
            lambda: self._state.acknowledge_task_heartbeat(task.task_id),
        )
        reply = deserialize(data[0])
        proto = ProtoContext()
        proto.ParseFromString(data[1])
        self._state.set_run_series_context(run.series_id, context_from_proto(proto))
        return reply

    def _message(self, run_id: int) -> Any:
        """The message with its content, all of which has arrived."""
        from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
        from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

        found = self._state.get_messages_legacy(run_ids=[run_id], is_reply=False, limit=1)
        if not found:
            raise FederationError(f"No message of run {run_id} arrived.")
        message_id = found[0].metadata.message_id
        wanted = {tree.object_id for tree in iterate_object_tree(self._store.get_object_tree(message_id))}
        contents = {name: data for name in wanted if (data := self._store.get(name))}
        if len(contents) < len(wanted):
            raise FederationError(f"Message {message_id[:12]} of run {run_id} arrived in part only.")
        message = inflate_object_from_contents(message_id, contents)
        message.metadata.__dict__["_message_id"] = message_id  # type: ignore[attr-defined]
        return message

    def _refusal(self, message: Any, code: int, event: str, reason: str) -> Any:
        from flwr.app import Message
        from flwr.app.error import Error

        self._log.append(event, message=message.metadata.message_type, reason=reason)
        _log.warning("%s", reason)
        return Message(Error(code, reason), reply_to=message)


def run_node(site: SiteSettings, say: Callable[[str], None]) -> None:
    """Joins the federation and answers until it is told to end (Ctrl-C, SIGTERM).

    Raises ConfigError or FederationError if it cannot join, LedgerError if the ledger cannot be trusted.
    """
    key = certificates.load_private_key(Path(site.key))
    open_ledger(site)
    say(f"site {site.site}: ledger {site.ledger}, audit log {site.audit_log}")
    wait_for_server(site.server, Path(site.ca), say)
    worker = Worker(site)
    try:
        worker.start()
        _join(site, key, worker, say)
    finally:
        worker.close()


def _join(site: SiteSettings, key: Any, worker: Worker, say: Callable[[str], None]) -> None:
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

    from fedtune.engines.deployment.conversation import converse

    joined, ending = threading.Event(), threading.Event()

    class State(InMemoryNodeState):
        def set_node_id(self, node_id: int | None) -> None:
            super().set_node_id(node_id)
            say(f"joined {site.server} as {site.site}")
            joined.set()

    said = _Capture()
    store = ObjectStoreFactory().store()
    state = State(store)
    answer = Answers(state, store, site, worker)
    threading.Thread(target=_watch, args=(site, ending, say), daemon=True).start()
    try:
        while True:
            joined.clear()
            converse(
                state,
                store,
                server=site.server,
                authority=Path(site.ca),
                key=key,
                node_config={"site": site.to_json()},
                answer=answer,
            )
            # Something unforeseen ended it; identity and memory of runs are kept.
            say(f"the connection ended ({said.last()}); joining again")
            time.sleep(5.0)
            wait_for_server(site.server, Path(site.ca), say)
    except SystemExit:
        if not joined.is_set():
            raise FederationError(_not_joined(site, key, said.last())) from None
        say("left the federation")
    finally:
        ending.set()


def _watch(site: SiteSettings, ending: threading.Event, say: Callable[[str], None]) -> None:
    """Says once a minute that the server does not answer; Flower tries again by itself, and silently."""
    while not ending.wait(60.0):
        try:
            check_server(site.server, Path(site.ca))
        except FedtuneError as error:
            say(f"{error} Trying again.")


def _not_joined(site: SiteSettings, key: Any, said: str) -> str:
    known = certificates.fingerprint(certificates.public_key_of(key))
    return (
        f"The server {site.server} did not let site '{site.site}' in. Either its key (fingerprint "
        f"{known}) is not "
        "enrolled or was revoked (ask the operator for `fedtune server DIR --enrol`), or another node "
        "with this key "
        "is connected, or this machine's clock is off by more than 5 minutes. "
        f"The server said: {said}."
    )


class _Capture(logging.Handler):
    """Keeps what Flower would print, to be told in fedtune's words."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self._lines: list[str] = []
        logger = logging.getLogger("flwr")
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
        logger.addHandler(self)
        logger.setLevel(logging.ERROR)

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps the last few."""
        self._lines = [*self._lines[-4:], record.getMessage()]

    def last(self) -> str:
        """The last line, in one."""
        lines = [" ".join(line.split()) for line in self._lines]
        text = lines[-1] if lines else "nothing"
        # Flower frames it with an exit code before, and the address of a page after.
        text = text.partition("For more information")[0]
        text = text.partition("[code:")[2].partition("]")[2] or text
        return text[:300].strip(" .,")
