"""`fedtune submit`: starts a run at a server, and is its ServerApp.

A run of fedtune is submitted by the process that will be its ServerApp: it starts the run at the SuperLink,
takes the run's task itself, and runs the same loop as every other engine, with the display in front of the
person. So record, adapter and statement are written where the person is, and the server runs nobody's code.
What can go wrong on the way, and what becomes of it:

- The server does not answer (it was killed, it restarts): asked again until it does; the observer is told.
- The server has given the run up, because it was away for longer than the minute after which a ServerApp
  that is not heard of counts as dead, or because somebody stopped it: `RunLost`, however the server failed at
  it meanwhile. It goes on from its checkpoint, as another run there.
- This process is killed: nothing is told to anybody. The run is resumed from its folder (`fedtune submit DIR
  resume=RUN_DIR`), which stops what is left of the one before it, so that no node begins a round that nobody
  waits for any more.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from fedtune.config.files import replace_whole
from fedtune.deploy import flower
from fedtune.deploy.certificates import wait_for_server
from fedtune.deploy.client import AddedHeaders, Server, patient_retries
from fedtune.deploy.consent import SUBMITTER, sign_run
from fedtune.deploy.join import as_enrolled
from fedtune.deploy.message_loop import begun_again, pauses
from fedtune.deploy.progress import Reporter
from fedtune.deploy.provision import Federation
from fedtune.deploy.runs import TICKET_HEADER
from fedtune.deploy.thin_app import thin_app
from fedtune.errors import ConfigError, FederationError, FedtuneError
from fedtune.federation.flower import act_as
from fedtune.privacy.publication import one_line

if TYPE_CHECKING:
    from fedtune.config.schema import Config
    from fedtune.federation.events import FederationResult, Observer

__all__ = [
    "NOTE",
    "RunLost",
    "as_told",
    "report_statement",
    "run",
    "run_number_in",
    "submitted_run",
]

_log = logging.getLogger(__name__)
_MAX_RUNS = 20  # of the server's, for one run of ours
_TASK_SECONDS = 20.0
NOTE = "server-run"  # in the run folder's checkpoint folder: the SuperLink's number of the last run
_TURN_SECONDS = 2.0  # between two questions whether it is this run's turn


def run(config: Config, run_dir: Path, observer: Observer | None = None) -> FederationResult:
    """Runs a federation over the sites that are connected to the server in `config.engine.server`.

    Raises:
        ConfigError, FederationError: no server, no token, or the server ends the run again and again.
        FedtuneError: as `fedtune.federation.server.loop.run_rounds`.
    """
    from fedtune.config.convert import changes_to_json
    from fedtune.federation.events import Observers, SafeObserver, StoppingObserver
    from fedtune.federation.run_folder import lock_folder
    from fedtune.federation.server.checkpoint import has_checkpoint
    from fedtune.federation.server.loop import run_rounds

    if not config.engine.server:
        raise ConfigError(
            "engine.name=deployment needs engine.server=FOLDER; `fedtune submit FOLDER` sets both."
        )
    server = Server.of(Path(config.engine.server))
    with lock_folder(run_dir):
        pass  # not in use: what its last run left at the server may be stopped
    for _ in range(_MAX_RUNS):
        try:
            with submitted_run(server, changes_to_json(as_told(config)), run_dir, SafeObserver(observer)) as (
                grid,
                lost,
            ):
                told = Observers(SafeObserver(observer), Reporter(_number(run_dir), server.report))
                watched = StoppingObserver(told, lambda _: _asked_to_stop(server, run_dir))
                return run_rounds(grid, config, run_dir, watched, stop=lost)
        except RunLost:
            waits = SafeObserver(observer).on_wait
            wait_for_server(server.address, server.folder / "ca.crt", waits)
            waits("")
            if (by := _stopped_by(server, run_dir)) is not None:
                raise FederationError(
                    f"The run was stopped at the server {server.address} by {by}. Finished rounds are saved; "
                    "the round that it was in counts as released by the sites that it had charged. Go on "
                    f"with `fedtune submit DIR resume={run_dir}`."
                ) from None
            _log.warning(
                "The server %s had ended the run, as it does with one that it has not heard of for a minute; "
                "going on from the last complete round.",
                server.address,
            )
            if has_checkpoint(run_dir):
                config = dataclasses.replace(config, resume=str(run_dir))
    raise FederationError(
        f"The server {server.address} ended the run {_MAX_RUNS} times. Finished rounds are saved; when its "
        "own log has said why, go on with `fedtune submit DIR resume=RUN_DIR`."
    )


def as_told(config: Config) -> Config:
    """What server and nodes are told of `config`: not what is the operator's own (folders, the tracker, the
    file of public texts). No node needs that file: what it taught is in the adapter that nodes are sent.
    """
    from fedtune.config.schema import PublicConfig, TrackerConfig

    return dataclasses.replace(
        config,
        output=None,
        resume=None,
        engine=dataclasses.replace(config.engine, server=None),
        tracker=TrackerConfig(),
        public=PublicConfig(),
    )


def report_statement(config: Config, run_dir: Path, statement: str) -> None:
    """Tells the server the statement of a run that has ended, for its page; never raises for that."""
    if config.engine.server:
        with contextlib.suppress(FedtuneError, OSError):
            server = Server.of(Path(config.engine.server))
            server.report({"run": _number(run_dir), "statement": statement})


def _number(run_dir: Path) -> str:
    """The server's number of the run that this folder's last submit started."""
    return run_number_in(run_dir / "checkpoint" / NOTE) or ""


def _asked_to_stop(server: Server, run_dir: Path) -> str | None:
    """Why the run of a folder is to end after this round; None if it is not, or the server does not say."""
    number = _number(run_dir)
    try:
        by = server.runs().get("runs", {}).get(number, {}).get("stop")
    except (FedtuneError, AttributeError):
        return None
    return None if by is None else f"Stopped after this round by {one_line(str(by)[:100])}"


def _stopped_by(server: Server, run_dir: Path) -> str | None:
    """Who ended the last run of a folder at once; None if nobody did, or the server does not say."""
    try:
        by = server.runs().get("stopped", {}).get(_number(run_dir))
    except (FedtuneError, AttributeError):
        return None
    return None if by is None else one_line(str(by)[:100])


# --- one run at the server, and this process as its ServerApp ------------------------------------------


class RunLost(Exception):
    """The server has ended the run although this process goes on."""


@contextlib.contextmanager
def submitted_run(
    server: Server, config: str, run_dir: Path, observer: Observer | None
) -> Iterator[tuple[Any, threading.Event]]:
    """Starts a run at the server, of which this process is the ServerApp.

    Yields:
        (the ServerApp's grid, an event that is set when the server has ended the run).

    Raises:
        RunLost: the server has ended the run.
        FederationError: the server starts no run, or the connection broke for good.
    """
    flower.quiet()
    token = _start(server, config, run_dir, observer)
    interceptor = flower.RuntimeTokenHttpInterceptor(token)
    retries = patient_retries(server.address, observer)
    client = server.open_client(flower.RuntimeHttpClient, interceptor, retries=retries)
    impatient = server.open_client(flower.RuntimeHttpClient, interceptor)
    lost = threading.Event()
    alive = _heartbeat(impatient, lost)
    beat = flower.HeartbeatSender(alive)
    outcome, details = flower.SubStatus.FAILED, "The submitting process ended."
    try:
        beat.start()
        given = client.PullTaskInput(flower.runtime_pb2.PullTaskInputRequest())
        act_as(given.task_id, given.run.run_id, given.context.node_id)
        grid = _grid(server, client, token)
        grid.set_run(flower.run_from_proto(given.run))
        yield grid, lost
        outcome, details = flower.SubStatus.COMPLETED, ""
    except KeyboardInterrupt:
        if lost.is_set():
            raise RunLost from None
        raise
    except (httpx.HTTPStatusError, flower.ObjectPushError) as error:
        # One of them may be how the server fails at a run that it is just ending: it says whether it has.
        alive()
        if _refused(error) or lost.is_set():
            raise RunLost from error
        raise _broken(server, error) from error
    except httpx.HTTPError as error:
        raise _broken(server, error) from error
    finally:
        with contextlib.suppress(Exception):
            impatient.PushTaskOutput(
                flower.runtime_pb2.PushTaskOutputRequest(sub_status=outcome, details=details)
            )
        if beat.is_running:
            beat.stop()
        client.close()
        impatient.close()


def _refused(error: Exception) -> bool:
    """Whether the server answers so because the run's token is of no run that goes on."""
    codes = (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)
    return isinstance(error, httpx.HTTPStatusError) and error.response.status_code in codes


def _broken(server: Server, error: Exception) -> FederationError:
    return FederationError(
        f"The connection to the server {server.address} was lost ({type(error).__name__}: {error}). Finished "
        "rounds are saved; go on with `fedtune submit DIR resume=RUN_DIR`."
    )


def _start(server: Server, config: str, run_dir: Path, observer: Observer | None) -> str:
    """Starts a run when it is its turn, and takes its task. Returns the token of its ServerApp."""
    content, digest = thin_app()
    note = run_dir / "checkpoint" / NOTE
    ticket = AddedHeaders(partial(dict, {TICKET_HEADER: uuid.uuid4().hex}))
    _stop_former(server, note)
    with server.client(flower.ControlHttpClient, ticket) as control:

        def start() -> Any:  # signed anew each time: it may have waited for days
            return control.StartRun(flower.start_request(content, digest, _signed(server, config)))

        started = _in_turn(start, observer)
    if not started.HasField("run_id"):
        raise FederationError(f"The server {server.address} did not start the run; its own log says why.")
    note.parent.mkdir(parents=True, exist_ok=True)
    replace_whole(note, str(started.run_id).encode())
    request = flower.runtime_pb2.AcquireTaskRequest(supported_task_types=[flower.TaskType.SERVER_APP])
    end = time.monotonic() + _TASK_SECONDS
    with server.client(flower.RuntimeHttpClient, ticket) as free:
        while time.monotonic() < end:
            taken = free.AcquireTask(request)
            if taken.token and taken.task.run_id == started.run_id:
                return str(taken.token)
            if not taken.token:
                time.sleep(0.2)
            else:
                _end_orphan(server, taken)
    raise FederationError(
        f"The server {server.address} started run {started.run_id}, and has no task for it."
    )


def _signed(server: Server, config: str) -> dict[str, str]:
    """A run's configuration, with the operator's signature where they have a key (`consent`)."""
    if isinstance(server.credential, str):
        return {"fedtune": config}
    federation = Federation.read(server.folder / "server.yaml").name
    return {"fedtune": config, SUBMITTER: sign_run(server.credential.key, federation, config)}


def _in_turn(start: Callable[[], Any], observer: Observer | None) -> Any:
    """What `start` returns when it is this run's turn; the observer is told what it waits for."""
    waited = False
    while True:
        try:
            started = start()
        except httpx.HTTPStatusError as error:
            if error.response.status_code != httpx.codes.TOO_MANY_REQUESTS:
                raise
            waited = True
            if observer is not None:
                observer.on_wait(_queue_text(error.response))
            time.sleep(_TURN_SECONDS)
            continue
        if waited and observer is not None:
            observer.on_wait("")
        return started


def _queue_text(response: Any) -> str:
    try:
        values = response.json()
        running, before = int(values["running"]), int(values["before"])
    except (ValueError, KeyError, TypeError):
        return "waiting for this run's turn at the server"
    return f"waiting for this run's turn: {running} go on at the server, {before} wait before it"


def _stop_former(server: Server, note: Path) -> None:
    """Stops what is left at the server of the run that this folder's last submit started."""
    number = run_number_in(note)
    if number is not None:
        with contextlib.suppress(ConfigError):  # usually it has ended, or the server has forgotten it
            server.stop(number, now=True)


def run_number_in(note: Path) -> str | None:
    """The server's number of the last run that was submitted from a folder; None if there is none."""
    try:
        return str(int(note.read_text()))
    except (OSError, ValueError):
        return None


def _end_orphan(server: Server, taken: Any) -> None:
    """Ends the run of a task that nobody took: its submit was killed, for one run starts at a time."""
    details = "The submitting process was killed before it took the run."
    with server.client(flower.RuntimeHttpClient, flower.RuntimeTokenHttpInterceptor(taken.token)) as owner:
        failed = flower.SubStatus.FAILED
        owner.PushTaskOutput(flower.runtime_pb2.PushTaskOutputRequest(sub_status=failed, details=details))


def _heartbeat(client: Any, lost: threading.Event) -> Any:
    """What Flower's HeartbeatSender calls: False if the server did not answer."""

    def beat() -> bool:
        try:
            if not client.SendTaskHeartbeat(flower.runtime_pb2.SendTaskHeartbeatRequest()).success:
                lost.set()
        except httpx.HTTPStatusError as error:
            if not _refused(error):
                return False
            lost.set()
        except httpx.TransportError:
            return False
        return True

    return beat


class _PatientClient:
    """Flower's client, but it waits for an object that is on its way, unless the node has died."""

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
    patient: Any = _PatientClient(client)

    class Grid(flower.HttpGrid):
        def _connect(self) -> None:
            self._client = patient

        def push_messages(self, messages: Any) -> Any:
            push, messages = super().push_messages, list(messages)
            return begun_again(lambda: push(messages))

        def pull_messages(self, message_ids: Any) -> Any:
            messages = super().pull_messages(message_ids)
            return [as_enrolled(message, server.site_of) for message in messages]

    return Grid(server.address, False, server.authority, token=token)
