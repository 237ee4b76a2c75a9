"""The node's end of its worker: starts the process, asks it, notices when it hangs, ends it when idle.

`fedtune.deploy.worker` is what runs in the process; they talk over a local socket (`channel`).

A worker that is late is not always one that hangs: the first round of a large site computes the frozen layers
of all its texts, and what it has done so far helps the next round although nobody waits for its answer. So
there are two limits: a worker that does nothing is killed once the server no longer waits (a deadlock, a disk
that does not answer), and any worker is killed after its owner's own limit (`limits.message_seconds`).
"""

from __future__ import annotations

import contextlib
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

import psutil

from fedtune.config.build import build
from fedtune.deploy import channel
from fedtune.errors import ResourceError
from fedtune.federation.client.policy import SiteSettings

__all__ = ["HangDetector", "WorkerDied", "WorkerProcess", "processor_seconds"]

_START_SECONDS = 120.0
_BEAT_SECONDS = 5.0
_END_SECONDS = 10.0
_IDLE_SECONDS = 30.0  # without work, past the time that anybody waits
_WORK = 0.01  # processor seconds a second, below which a process does nothing


class WorkerDied(Exception):
    """The worker ended in the middle of a message; the text says how."""


class WorkerProcess:
    """The resident worker: started when needed, and again when it has died.

    Between the rounds of a run it stays, so that a round costs training and not imports. When nothing has
    come for long it ends (`end_if_idle`): a node may be idle for months, and the worker is most of its
    memory. One thread asks; another may call `end_if_idle`, which does nothing meanwhile.
    """

    def __init__(self, site: SiteSettings, *, log_json: bool = False) -> None:
        self._site, self._log_json = site, log_json
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
        """The worker's process id; None if it does not run."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def start(self, beat: Callable[[], object] = lambda: None) -> None:
        """Starts the worker if it does not run, calling `beat` every second meanwhile.

        Raises:
            ResourceError: it does not start, or is of another version than the one that the server let in.
        """
        with self._lock:
            if self.pid is None or self._connection is None:
                self.close_worker()
                self._start(beat)

    def _start(self, beat: Callable[[], object]) -> None:
        command = [sys.executable, "-m", "fedtune.deploy.worker", self._path]
        command += ["--log-json"] if self._log_json else []
        environment = {**os.environ, "OMP_NUM_THREADS": str(self._site.limits.threads)}
        self._process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
        try:
            connection, runs = self._accept(self._process, beat)
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
        if runs != build():
            self.kill()
            raise ResourceError(
                f"fedtune was upgraded under this node ({build()} runs, {runs or 'another'} is "
                "installed): start the node again."
            )
        self._used = time.monotonic()

    def _accept(
        self, process: subprocess.Popen[bytes], beat: Callable[[], object]
    ) -> tuple[socket.socket, object]:
        """(connection to a worker that was just started and given its settings, its version of fedtune).

        Raises:
            EOFError, OSError: it ends before it is ready, or does not answer for _START_SECONDS.
        """

        def wait_for(other: socket.socket) -> None:
            end = time.monotonic() + _START_SECONDS
            while time.monotonic() <= end:
                beat()
                if select.select([other], [], [], 1.0)[0]:
                    return
                if process.poll() is not None:
                    raise EOFError
            raise TimeoutError

        while True:
            wait_for(self._listener)
            connection, _ = self._listener.accept()
            if channel.peer(connection) == (process.pid, os.getuid()):
                break
            connection.close()  # somebody else of this machine; not our child
        try:
            channel.send(connection, {}, [self._site.to_json().encode()])
            wait_for(connection)
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
        give_up: Callable[[], str] = lambda: "",
    ) -> list[bytes]:
        """Has the worker answer a message.

        Args:
            message: serialized.
            context: serialized.
            header: task, run and node of the message.
            beat: called every few seconds meanwhile.
            awaited: seconds for which the server waits for the answer.
            give_up: why it should be killed now; empty as long as it should not.

        Returns:
            [reply, context], serialized.

        Raises:
            WorkerDied: the worker died, or hung and was killed.
        """
        with self._lock:
            self.start(beat)
            connection, process = self._connection, self._process
            assert connection is not None and process is not None
            limit = self._site.limits.message_seconds
            detector = HangDetector(awaited, limit, lambda: processor_seconds(process.pid))
            try:
                channel.send(connection, header, [message, context])
                while not select.select([connection], [], [], _BEAT_SECONDS)[0]:
                    beat()
                    if why := detector.hangs() or give_up():
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

    def end_if_idle(self) -> bool:
        """Ends a worker that was idle for `limits.idle_seconds`; the next message starts another.

        While another thread starts, asks or ends it, it is not idle.

        Returns:
            Whether it was ended now.
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
        """Kills the worker; the next message starts another."""
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._process.wait()
            self.close_worker()

    def close_worker(self) -> None:
        """Ends the worker, which exits when its socket closes, or is killed if it works.

        SIGTERM is no word for it: service managers send it to all processes of a unit, and it would end the
        step that the node still waits for.
        """
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            if self._process is not None and self._process.poll() is None:
                try:
                    self._process.wait(_END_SECONDS)
                except subprocess.TimeoutExpired:
                    self.kill()

    def close(self) -> None:
        """Ends the worker and removes the socket."""
        self.close_worker()
        self._listener.close()
        self._folder.cleanup()


def processor_seconds(pid: int) -> float | None:
    """Processor time that a process has used, all its threads together; None where that cannot be known."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return None
    return float(times.user + times.system)


class HangDetector:
    """Whether the worker that answers one message hangs.

    Args:
        awaited: seconds for which the server waits for the answer.
        limit: seconds after which the worker is given up whatever it does.
        used: processor seconds that the worker has used so far, None if not known.
    """

    def __init__(
        self,
        awaited: float,
        limit: float,
        used: Callable[[], float | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._awaited, self._limit, self._used, self._clock = min(awaited, limit), limit, used, clock
        self._begun = self._since = clock()
        self._before = used()

    def hangs(self) -> str:
        """Why the worker should be killed; empty if it should not. Call it every few seconds."""
        now, used = self._clock(), self._used()
        if now - self._begun > self._limit:
            return f"it had not answered after {self._limit:g} s (limits.message_seconds)"
        if used is None or self._before is None:
            return ""
        if used - self._before > _WORK * (now - self._since):
            self._before, self._since = used, now
        if now - self._begun > self._awaited and now - self._since > _IDLE_SECONDS:
            return (
                f"it had not answered after {now - self._begun:.0f} s, of which it did nothing for the last "
                f"{now - self._since:.0f}"
            )
        return ""
