"""What a node does with a message: Flower's SuperNode has received it, the resident worker answers it.

Flower would start a process that installs and runs the app which came with the run; here an app that is not
the thin one was turned away when it arrived (`thin.Apps`), and the message goes to the worker. Whatever is
wrong with a message, it gets an answer, for Flower's SuperNode takes no other before it has one.

Uses Flower's internals (checked with 1.41): the NodeState and ObjectStore of a SuperNode.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
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

from fedtune import __version__
from fedtune.deploy import channel
from fedtune.deploy.thin import Apps
from fedtune.deploy.watch import Watch, processor_seconds
from fedtune.errors import FederationError, FedtuneError, ResourceError
from fedtune.federation.client.audit_log import Books
from fedtune.federation.client.policy import SiteSettings
from fedtune.privacy.publication import told

__all__ = ["Answers", "Worker", "WorkerDied"]

_log = logging.getLogger("fedtune.node")
_START_SECONDS = 120.0
_BEAT_SECONDS = 5.0
_END_SECONDS = 10.0
_INVALID_APP, _APP_CRASHED = 3, 4  # any of flwr's ErrorCode will do: the reason is what is read


class WorkerDied(Exception):
    """The worker ended in the middle of a message; the text says how."""


class Worker:
    """The resident worker: started when needed, and again when it has died.

    Between the rounds of a run it stays, so that a round costs training and not imports. When nothing has
    come for long it ends (`rest`): a node may be idle for months, and the worker is most of its memory.
    One thread asks; another may call `rest`, which does nothing while the first is at it.
    """

    def __init__(self, site: SiteSettings) -> None:
        self._site = site
        self._folder = tempfile.TemporaryDirectory(prefix="fedtune-node-")  # mode 0700
        self._path = str(Path(self._folder.name) / "worker.sock")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self._path)
        self._listener.listen(1)
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._used = time.monotonic()  # when it was last started or asked
        self._lock = threading.RLock()  # of the process and its connection

    @property
    def pid(self) -> int | None:
        """The worker's process, if it lives."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self, beat: Callable[[], object] = lambda: None) -> None:
        """Starts the worker if it does not live, calling `beat` meanwhile.

        Raises ResourceError if it does not start, or is of another version: the server has let in this one.
        """
        with self._lock:
            if self.pid is None or self._connection is None:
                self.close_worker()
                self._start(beat)

    def _start(self, beat: Callable[[], object]) -> None:
        command = [sys.executable, "-m", "fedtune.deploy.worker", self._path]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self._site.limits.threads)}
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
        try:
            connection, runs = self._greet(self._process, beat)
        except (EOFError, OSError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_BEAT_SECONDS)  # one that closed its socket is about to end
            status = self._process.poll()
            self.kill()
            how = f"no word in {_START_SECONDS:g} s" if status is None else f"exit status {status}"
            raise ResourceError(
                f"The node's worker did not start ({how}); its own output says why."
            ) from None
        self._connection = connection
        if runs != __version__:
            self.kill()
            raise ResourceError(
                f"fedtune was upgraded under this node ({__version__} runs, {runs or 'another'} is "
                "installed): start the node again."
            )
        self._used = time.monotonic()

    def _greet(
        self, process: subprocess.Popen[bytes], beat: Callable[[], object]
    ) -> tuple[socket.socket, object]:
        """The connection of a worker that was just started and given its settings; its version of fedtune.

        Raises EOFError or OSError if it ends before it is ready, or nothing is heard for _START_SECONDS.
        """

        def hear(other: socket.socket) -> None:
            end = time.monotonic() + _START_SECONDS
            while time.monotonic() <= end:
                beat()
                if select.select([other], [], [], 1.0)[0]:
                    return
                if process.poll() is not None:
                    raise EOFError
            raise TimeoutError

        while True:
            hear(self._listener)
            connection, _ = self._listener.accept()
            if channel.peer(connection) == (process.pid, os.getuid()):
                break
            connection.close()  # somebody else of this machine; not our child
        try:
            channel.send(connection, {}, [self._site.to_json().encode()])
            hear(connection)
            return connection, channel.receive(connection)[0].get("fedtune")
        except BaseException:
            connection.close()
            raise

    def ask(
        self,
        message: bytes,
        context: bytes,
        header: dict[str, Any],
        beat: Callable[[], object],
        awaited: float = math.inf,
    ) -> list[bytes]:
        """[reply, context] of the worker; calls `beat` every few seconds meanwhile.

        `awaited`: seconds for which the server waits for the answer. Raises WorkerDied if the worker dies, or
        hangs and is killed.
        """
        with self._lock:
            self.start(beat)
            return self._answer(message, context, header, beat, awaited)

    def _answer(
        self,
        message: bytes,
        context: bytes,
        header: dict[str, Any],
        beat: Callable[[], object],
        awaited: float,
    ) -> list[bytes]:
        connection, process = self._connection, self._process
        assert connection is not None and process is not None
        watch = Watch(awaited, self._site.limits.message_seconds, lambda: processor_seconds(process.pid))
        try:
            channel.send(connection, header, [message, context])
            while not select.select([connection], [], [], _BEAT_SECONDS)[0]:
                beat()
                if why := watch.hangs():
                    self.kill()
                    raise WorkerDied(f"the worker was killed, for {why}")
            return channel.receive(connection)[1]
        except (EOFError, OSError) as error:
            connection.close()
            self._connection = None
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            status = process.poll()
            how = f"by signal {-status}" if status is not None and status < 0 else f"with status {status}"
            raise WorkerDied(f"the worker ended {how}") from error
        finally:
            self._used = time.monotonic()

    def rest(self) -> bool:
        """Ends a worker that nobody has asked for `limits.idle_seconds`; the next message starts another.

        True if it was ended now. While another thread starts, asks or ends it, it is not idle.
        """
        longest = self._site.limits.idle_seconds
        if longest is None or not self._lock.acquire(blocking=False):
            return False
        try:
            if time.monotonic() - self._used <= longest or self.pid is None:
                return False
            self.close_worker()
            return True
        finally:
            self._lock.release()

    def kill(self) -> None:
        """Ends a worker that does not listen; the next message starts another."""
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._process.wait()
            self.close_worker()

    def close_worker(self) -> None:
        """Ends the worker: it leaves when its socket closes, or is killed."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            if self._process is not None and self._process.poll() is None:
                self._process.terminate()
                try:
                    self._process.wait(_END_SECONDS)
                except subprocess.TimeoutExpired:
                    self.kill()

    def close(self) -> None:
        """Ends the worker and removes the socket."""
        self.close_worker()
        self._listener.close()
        self._folder.cleanup()


def _awaited(context: Any) -> float:
    """Seconds for which the server waits for an answer, as the run's configuration says; else infinite."""
    try:
        seconds = json.loads(context.run_config["fedtune"])["federation"]["round_timeout"]
        return float(seconds) if math.isfinite(seconds) else math.inf
    except (KeyError, TypeError, ValueError, RecursionError):
        return math.inf


class Answers:
    """Has each message that Flower's SuperNode has received answered, and hands the answer back to it."""

    def __init__(self, state: Any, store: Any, site: SiteSettings, worker: Worker, apps: Apps) -> None:
        self._state, self._store, self._site, self._worker, self._apps = state, store, site, worker, apps
        self._books = Books(Path(site.ledger), Path(site.audit_log))

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
        """Has the message of a task answered; by a refusal if nothing else, whatever is wrong with it."""
        from flwr.common.constant import SubStatus
        from flwr.supernode.start_client_internal import _insert_message

        from fedtune.federation.client.node_context import public_reason
        from fedtune.federation.flower import act_as

        state = self._state
        if state.claim_task(task.task_id) is None or not state.activate_task(task.task_id):
            return False
        found = state.get_messages_legacy(run_ids=[task.run_id], is_reply=False, limit=1)
        if not found:
            return False
        message = found[0]  # without its content, but who sent it and whom to answer
        run = state.get_run(task.run_id)
        context = state.get_run_series_context(run.series_id)
        act_as(task.task_id, run.run_id, context.node_id)
        state.record_message_processing_start(message_id=message.metadata.message_id)
        try:
            self._apps.check(run.run_id)
            reply = self._ask(self._whole(message), run, context, task)
        except WorkerDied as error:
            _log.warning("%s", error)  # how it ended may tell how much there was to do
            reason = (
                f"Site '{self._site.site}' lost this round: its worker ended. If the release was reserved, "
                "it stays charged; the next message starts another worker."
            )
            reply = self._refusal(message, _APP_CRASHED, "worker died", reason)
        except FedtuneError as error:
            reply = self._refusal(message, _INVALID_APP, "refused", public_reason(error, self._site.site))
        except Exception as error:
            _log.exception("a message could not be read")
            reason = f"Site '{self._site.site}' cannot read this message ({type(error).__name__})."
            reply = self._refusal(message, _INVALID_APP, "refused", reason)
        state.record_message_processing_end(message_id=message.metadata.message_id)
        self._store.delete(message.metadata.message_id)
        _insert_message(reply, state, self._store)
        state.finish_task(task.task_id, SubStatus.COMPLETED, "")
        return True

    def _ask(self, message: Any, run: Any, context: Any, task: Any) -> Any:
        """The worker's reply; what its ClientApp remembers of the run is kept."""
        from flwr.common.serde import context_from_proto, context_to_proto
        from flwr.proto.message_pb2 import Context as ProtoContext

        from fedtune.federation.flower import deserialize, serialize

        data = self._worker.ask(
            serialize(message),
            context_to_proto(context).SerializeToString(),
            {"task": task.task_id, "run": run.run_id, "node": context.node_id},
            lambda: self._state.acknowledge_task_heartbeat(task.task_id),
            _awaited(context),
        )
        proto = ProtoContext()
        proto.ParseFromString(data[1])
        self._state.set_run_series_context(run.series_id, context_from_proto(proto))
        return deserialize(data[0])

    def _whole(self, message: Any) -> Any:
        """The message with its content. One that is wrong may raise anything."""
        from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
        from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

        message_id = message.metadata.message_id
        wanted = {tree.object_id for tree in iterate_object_tree(self._store.get_object_tree(message_id))}
        contents = {name: data for name in wanted if (data := self._store.get(name))}
        if len(contents) < len(wanted):
            raise FederationError(f"Message {message_id[:12]} arrived in part only.")
        whole: Any = inflate_object_from_contents(message_id, contents)
        if type(whole) is not type(message):
            raise FederationError(f"The server sent a {type(whole).__name__} where a message was announced.")
        # What was announced is what is answered: the content may name another run or another node.
        whole.__dict__["_metadata"] = message.metadata
        return whole

    def _refusal(self, message: Any, code: int, event: str, reason: str) -> Any:
        from flwr.app import Error, Message

        try:
            self._books.append(event, message=message.metadata.message_type, reason=reason)
        except ResourceError as error:  # it still carries nothing of the data, and the server waits for it
            _log.error("%s", error)
            reason = told(error, self._site.site)
        _log.warning("%s", reason)
        return Message(Error(code, reason), reply_to=message)
