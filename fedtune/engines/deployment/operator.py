"""What the operator asks of a running server: start a run and be its ServerApp, and what is going on.

A run of fedtune is submitted by the process that will be its ServerApp: it starts the run at the SuperLink,
takes the run's task itself, and runs the same loop as every other engine, with the display in front of the
person. So the record, the adapter and the statement are written where the person is, and the server runs
nobody's code. If this process dies, the run is resumed from its folder (`fedtune submit DIR resume=RUN_DIR`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.engines.deployment.conversation import pauses
from fedtune.engines.deployment.join import as_enrolled
from fedtune.engines.deployment.provision import read_yaml
from fedtune.engines.deployment.published import checked
from fedtune.engines.deployment.reach import check_server, tls_context
from fedtune.engines.deployment.server import PUBLISHED_PATH, TOKEN_HEADER, read_token
from fedtune.engines.deployment.thin import thin_app
from fedtune.errors import ConfigError, FederationError

if TYPE_CHECKING:
    from fedtune.config.schema import Config
    from fedtune.federation.events import FederationResult, Observer

__all__ = ["Status", "run", "status"]

_TASK_SECONDS = 20.0


class _Token:
    """Adds the operator's token to each request; an interceptor of Flower's HTTP clients."""

    def __init__(self, token: str) -> None:
        self._token = token

    def intercept(self, context: Any, call_next: Any) -> Any:
        """Flower's interface."""
        context.request.headers[TOKEN_HEADER] = self._token
        return call_next(context)


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


@dataclasses.dataclass(frozen=True)
class _Server:
    folder: Path
    address: str
    authority: bytes
    token: str
    sites: dict[int, str] = dataclasses.field(default_factory=dict)  # by Flower's node id

    @classmethod
    def of(cls, folder: Path) -> _Server:
        """The server that a folder made by `fedtune provision` describes, which must answer."""
        address = str(read_yaml(folder / "server.yaml").get("server"))
        check_server(address, folder / "ca.crt")
        return cls(folder, address, (folder / "ca.crt").read_bytes(), read_token(folder))

    @contextlib.contextmanager
    def asked(self, kind: Any) -> Iterator[Any]:
        """A client for a question or two. Raises FederationError for a refusal or a connection that broke."""
        import httpx

        with contextlib.closing(self.client(kind)) as client:
            try:
                yield client
            except httpx.HTTPStatusError as error:
                if error.response.status_code == httpx.codes.FORBIDDEN:
                    raise FederationError(
                        f"The server {self.address} does not know the operator's token of this folder. "
                        "Use the server folder itself, or copy its operator.token over this one."
                    ) from error
                raise FederationError(
                    f"The server {self.address} refused the request (HTTP status "
                    f"{error.response.status_code}); is it of the same version as this fedtune?"
                ) from error
            except httpx.HTTPError as error:
                raise FederationError(
                    f"The connection to the server {self.address} broke ({type(error).__name__}). Try again."
                ) from error

    def site_of(self, node_id: int) -> str | None:
        """The site for which the key of a connected node is enrolled."""
        from flwr.proto.control_pb2 import ListNodesRequest
        from flwr.supercore.control import ControlHttpClient

        if node_id not in self.sites:  # the first message of a node; its key never changes sites
            with contextlib.closing(self.client(ControlHttpClient, patient=True)) as control:
                nodes = control.ListNodes(ListNodesRequest()).nodes_info
            self.sites.update({node.node_id: node.name for node in nodes})
        return self.sites.get(node_id)

    def published(self) -> dict[str, Any]:
        """What the sites publish of their budgets, by name."""
        import httpx

        context = tls_context(self.folder / "ca.crt")
        try:
            found = httpx.get(
                f"https://{self.address}{PUBLISHED_PATH}", headers={TOKEN_HEADER: self.token}, verify=context
            )
            values = found.raise_for_status().json()
        except (httpx.HTTPError, ValueError) as error:
            raise FederationError(
                f"The server {self.address} does not tell what its sites publish ({type(error).__name__}); "
                "is it of the same version as this fedtune?"
            ) from error
        return {name: checked(one) for name, one in values.items()}

    def client(self, kind: Any, *interceptors: Any, patient: bool = False) -> Any:
        """One of Flower's HTTP clients, with the operator's token; `patient` ones wait for the server."""
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
        from flwr.supercore.retry import make_simple_http_retry_invoker

        version = RuntimeVersionHttpInterceptor(component_name="flwr-serverapp")
        return kind.from_server_address(
            self.address,
            False,
            self.authority,
            [version, _Token(self.token), *interceptors],
            retry_invoker=make_simple_http_retry_invoker() if patient else None,
        )


def run(config: Config, run_dir: Path, observer: Observer | None = None) -> FederationResult:
    """Runs a federation over the sites that are connected to the server in `config.engine.server`.

    Raises what `fedtune.federation.server.run_rounds` raises; ConfigError or FederationError if there is no
    server, no token, or a run that has not ended.
    """
    from fedtune.config.convert import to_json
    from fedtune.config.schema import TrackerConfig
    from fedtune.federation.server import run_rounds

    if not config.engine.server:
        raise ConfigError(
            "engine.name=deployment needs engine.server=FOLDER; `fedtune submit FOLDER` sets both."
        )
    server = _Server.of(Path(config.engine.server))
    # What is the operator's own (folders, the tracker's too) is nobody else's business.
    told = dataclasses.replace(
        config,
        output=None,
        resume=None,
        engine=dataclasses.replace(config.engine, server=None),
        tracker=TrackerConfig(),
    )
    with _served(server, to_json(told)) as grid:
        return run_rounds(grid, config, run_dir, observer)


@contextlib.contextmanager
def _served(server: _Server, config: str) -> Iterator[Any]:
    """Starts a run at the server and gives the grid of its ServerApp, which this process now is."""
    import httpx
    from flwr.common.constant import SubStatus
    from flwr.common.serde import fab_to_proto, run_from_proto, user_config_to_proto
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest, PushTaskOutputRequest
    from flwr.supercore.constant import TaskType
    from flwr.supercore.control import ControlHttpClient
    from flwr.supercore.fab import Fab
    from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
    from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor
    from flwr.supercore.runtime import RuntimeHttpClient
    from flwr.superlink.grid import HttpGrid

    from fedtune.federation._flower import act_as, quiet

    quiet()
    content, digest = thin_app()
    with server.asked(ControlHttpClient) as control:
        started = control.StartRun(
            StartRunRequest(
                fab=fab_to_proto(Fab(digest, content, {})),
                override_config=user_config_to_proto({"fedtune": config}),
            )
        )
    if not started.HasField("run_id"):
        raise FederationError(f"The server {server.address} did not start the run; its own log says why.")
    with server.asked(RuntimeHttpClient) as free:
        request = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
        end = time.monotonic() + _TASK_SECONDS
        while not (taken := free.AcquireTask(request)).token:
            if time.monotonic() > end:
                raise FederationError(
                    f"The server {server.address} started run {started.run_id}, and has no task for it."
                )
            time.sleep(0.2)
    if taken.task.run_id != started.run_id:
        raise FederationError(
            "Somebody else submitted a run to this server at the same moment, and the two took one "
            "another's tasks. "
            "Submit again."
        )
    client = server.client(RuntimeHttpClient, RuntimeTokenHttpInterceptor(taken.token), patient=True)

    prompt: Any = _SoonAgain(client)

    class Grid(HttpGrid):
        def _connect(self) -> None:
            self._client = prompt

        def pull_messages(self, message_ids: Any) -> Any:
            found = list(super().pull_messages(message_ids))
            return [as_enrolled(one, server.site_of) for one in found]

    grid = Grid(server.address, False, server.authority, token=taken.token)
    beat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    outcome, details = SubStatus.FAILED, "The submitting process ended."
    try:
        beat.start()
        given = client.PullTaskInput(PullTaskInputRequest())
        act_as(given.task_id, given.run.run_id, given.context.node_id)
        grid.set_run(run_from_proto(given.run))
        yield grid
        outcome, details = SubStatus.COMPLETED, ""
    except httpx.HTTPError as error:
        raise FederationError(
            f"The connection to the server {server.address} was lost ({type(error).__name__}). Finished "
            f"rounds are "
            "saved: start the server if it is down, and go on with `fedtune submit DIR resume=RUN_DIR`."
        ) from error
    finally:
        with contextlib.suppress(Exception):
            client.PushTaskOutput(PushTaskOutputRequest(sub_status=outcome, details=details))
        if beat.is_running:
            beat.stop()
        client.close()


@dataclasses.dataclass(frozen=True)
class Status:
    """What a server knows: sites with their state and what they publish, and runs, newest first."""

    address: str
    sites: tuple[dict[str, Any], ...]
    runs: tuple[dict[str, str], ...]


def status(folder: Path) -> Status:
    """Asks the server that `folder` describes. Raises ConfigError, FederationError or ResourceError."""
    from flwr.proto.control_pb2 import ListNodesRequest, ListRunsRequest
    from flwr.supercore.control import ControlHttpClient

    from fedtune.federation._flower import quiet

    quiet()
    server = _Server.of(folder)
    with server.asked(ControlHttpClient) as control:
        nodes = control.ListNodes(ListNodesRequest()).nodes_info
        runs = control.ListRuns(ListRunsRequest()).run_dict
    budgets = server.published()
    sites = [
        {
            "site": node.name,
            "state": node.status,
            "since": node.last_activated_at or "",
            "budget": budgets.get(node.name),
        }
        for node in nodes
        if node.status != "unregistered"
    ]
    listed = [
        {
            "run": str(one.run_id),
            "state": one.status.sub_status or one.status.status,
            "details": one.status.details,
            "started": one.pending_at,
        }
        for one in runs.values()
    ]
    return Status(
        server.address,
        tuple(sorted(sites, key=lambda one: one["site"])),
        tuple(sorted(listed, key=lambda one: one["started"], reverse=True)),
    )
