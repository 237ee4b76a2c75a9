"""One run at the SuperLink, and this process as its ServerApp.

What can go wrong on the way, and what becomes of it:

- The server does not answer (it was killed, it restarts): asked again until it does; the observer is told.
- The server has given the run up, because it was away for longer than the minute after which a ServerApp
  that is not heard of counts as dead: `RunLost`. It goes on from its checkpoint, as another run there.
- This process is killed: nothing is told to anybody. A resumed run stops what is left of the one before it,
  so that no node begins a round that nobody waits for any more.

Uses Flower's internals (checked with 1.41): what its own `flwr-serverapp` uses.
"""

from __future__ import annotations

import contextlib
import datetime
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.config.files import lock_file, replace_whole
from fedtune.deploy.conversation import pauses
from fedtune.deploy.join import as_enrolled
from fedtune.deploy.superlink import Server, patient_retries
from fedtune.deploy.thin import thin_app
from fedtune.errors import FederationError

if TYPE_CHECKING:
    from fedtune.federation.events import Observer

__all__ = ["RunLost", "served"]

_TASK_SECONDS = 20.0
_ORPHAN_SECONDS = 30.0  # a task that nobody has taken for so long is of a submit that was killed
_NOTE = "server-run"  # in the run folder's checkpoint folder: the SuperLink's number of the last run


class RunLost(Exception):
    """The server has ended the run although this process goes on."""


@contextlib.contextmanager
def served(
    server: Server, config: str, run_dir: Path, observer: Observer | None
) -> Iterator[tuple[Any, threading.Event]]:
    """Starts a run at the server; gives the grid of its ServerApp, which this process now is, and the event
    that is set when the server has ended the run.

    Raises RunLost then; FederationError if there is no run to be had or the connection broke for good.
    """
    import httpx
    from flwr.common.constant import SubStatus
    from flwr.common.serde import run_from_proto
    from flwr.proto.runtime_pb2 import PullTaskInputRequest, PushTaskOutputRequest
    from flwr.supercore.heartbeat import HeartbeatSender
    from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor
    from flwr.supercore.runtime import RuntimeHttpClient

    from fedtune.federation.flower import act_as, quiet

    quiet()
    token = _start(server, config, run_dir)
    interceptor = RuntimeTokenHttpInterceptor(token)
    retries = patient_retries(server.address, observer)
    client = server.client(RuntimeHttpClient, interceptor, retries=retries)
    impatient = server.client(RuntimeHttpClient, interceptor)
    lost = threading.Event()
    beat = HeartbeatSender(_heartbeat(impatient, lost))
    outcome, details = SubStatus.FAILED, "The submitting process ended."
    try:
        beat.start()
        given = client.PullTaskInput(PullTaskInputRequest())
        act_as(given.task_id, given.run.run_id, given.context.node_id)
        grid = _grid(server, client, token)
        grid.set_run(run_from_proto(given.run))
        yield grid, lost
        outcome, details = SubStatus.COMPLETED, ""
    except KeyboardInterrupt:
        if lost.is_set():
            raise RunLost from None
        raise
    except httpx.HTTPStatusError as error:
        if error.response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise RunLost from error
        raise _broken(server, error) from error
    except httpx.HTTPError as error:
        raise _broken(server, error) from error
    finally:
        with contextlib.suppress(Exception):
            impatient.PushTaskOutput(PushTaskOutputRequest(sub_status=outcome, details=details))
        if beat.is_running:
            beat.stop()
        client.close()
        impatient.close()


def _broken(server: Server, error: Exception) -> FederationError:
    return FederationError(
        f"The connection to the server {server.address} was lost ({type(error).__name__}: {error}). Finished "
        "rounds are saved; go on with `fedtune submit DIR resume=RUN_DIR`."
    )


def _start(server: Server, config: str, run_dir: Path) -> str:
    """Starts a run and takes its task: the token of the ServerApp."""
    from flwr.common.serde import fab_to_proto, user_config_to_proto
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.proto.runtime_pb2 import AcquireTaskRequest
    from flwr.supercore.constant import TaskType
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.fab import Fab
    from flwr.supercore.runtime import RuntimeHttpClient

    content, digest = thin_app()
    note = run_dir / "checkpoint" / _NOTE
    with _one_at_a_time(server.folder):
        with server.asked(ControlHttpClient) as control:
            _stop(control, note)
            app = fab_to_proto(Fab(digest, content, {}))
            values = user_config_to_proto({"fedtune": config})
            started = control.StartRun(StartRunRequest(fab=app, override_config=values))
        if not started.HasField("run_id"):
            raise FederationError(f"The server {server.address} did not start the run; its own log says why.")
        note.parent.mkdir(parents=True, exist_ok=True)
        replace_whole(note, str(started.run_id).encode())
        request = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
        end = time.monotonic() + _TASK_SECONDS
        with server.asked(RuntimeHttpClient) as free:
            while time.monotonic() < end:
                taken = free.AcquireTask(request)
                if taken.token and taken.task.run_id == started.run_id:
                    return str(taken.token)
                if not taken.token:
                    time.sleep(0.2)
                elif not _finished_orphan(server, taken):
                    raise FederationError(
                        "Somebody else submitted a run to this server at the same moment, and the two took "
                        "one another's tasks. Submit again."
                    )
    raise FederationError(
        f"The server {server.address} started run {started.run_id}, and has no task for it."
    )


def _stop(control: Any, note: Path) -> None:
    """Stops what is left at the server of the run that this folder's last submit started."""
    import httpx
    from flwr.proto.control_pb2 import StopRunRequest

    try:
        number = int(note.read_text())
    except (OSError, ValueError):
        return
    # It has ended, mostly; or the server has forgotten it.
    with contextlib.suppress(httpx.HTTPStatusError):
        control.StopRun(StopRunRequest(run_id=number))


def _finished_orphan(server: Server, taken: Any) -> bool:
    """Ends the run of a task that nobody took because its submit was killed. False if it may be alive."""
    from flwr.common.constant import SubStatus
    from flwr.proto.runtime_pb2 import PushTaskOutputRequest
    from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor
    from flwr.supercore.runtime import RuntimeHttpClient

    since = datetime.datetime.fromisoformat(taken.task.pending_at)
    if (datetime.datetime.now(datetime.UTC) - since).total_seconds() < _ORPHAN_SECONDS:
        return False
    details = "The submitting process was killed before it took the run."
    with server.asked(RuntimeHttpClient, RuntimeTokenHttpInterceptor(taken.token)) as its:
        its.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.FAILED, details=details))
    return True


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Keeps two submits on this machine from taking one another's tasks."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # somebody else's folder, to read only
            stack.enter_context(lock_file(folder / ".submit.lock"))
        yield


def _heartbeat(client: Any, lost: threading.Event) -> Any:
    """What Flower's HeartbeatSender calls: False if the server did not answer."""
    import httpx
    from flwr.proto.runtime_pb2 import SendTaskHeartbeatRequest

    def beat() -> bool:
        try:
            if not client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success:
                lost.set()
        except httpx.HTTPStatusError as error:
            if error.response.status_code not in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
                return False
            lost.set()
        except httpx.TransportError:
            return False
        return True

    return beat


class _SoonAgain:
    """Flower's client, which waits for an answer that is on its way, and gives up one whose node has died."""

    def __init__(self, client: Any) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def PullObject(self, request: Any) -> Any:
        """Flower's interface."""
        for pause in pauses():
            response = self._client.PullObject(request)
            if response.object_available or not response.object_found:
                return response
            time.sleep(pause)
        response.object_found = False  # nobody will send the rest: Flower makes it an error of that node
        return response


def _grid(server: Server, client: Any, token: str) -> Any:
    """Flower's Grid over `client`; a node takes part by the name that its key is enrolled for, if at all."""
    from flwr.superlink.grid import HttpGrid

    prompt: Any = _SoonAgain(client)

    class Grid(HttpGrid):
        def _connect(self) -> None:
            self._client = prompt

        def pull_messages(self, message_ids: Any) -> Any:
            found = list(super().pull_messages(message_ids))
            return [as_enrolled(one, server.site_of) for one in found]

    return Grid(server.address, False, server.authority, token=token)
