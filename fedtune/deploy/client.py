"""What an operator asks of a running server: what is going on, what to stop; and the clients for a run.

Each request shows who asks, by the key or the token in the operator's folder (`operator_key`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from fedtune.deploy import flower
from fedtune.deploy.certificates import check_server, tls_context
from fedtune.deploy.join import checked_budget
from fedtune.deploy.operator_key import OPERATOR_KEY, OperatorKey, credential_in
from fedtune.deploy.progress import PATH as PROGRESS_PATH
from fedtune.deploy.provision import Federation
from fedtune.deploy.runs import RUN_HEADER, STOP_HEADER
from fedtune.deploy.server import PUBLISHED_PATH, RUNS_PATH, STOP_PATH, TOKEN_HEADER
from fedtune.deploy.trail import seen_head
from fedtune.deploy.view import run_row, site_row
from fedtune.errors import ConfigError, FederationError, FedtuneError, ResourceError
from fedtune.privacy.publication import one_line

if TYPE_CHECKING:
    from fedtune.federation.events import Observer

__all__ = ["AddedHeaders", "Server", "Status", "patient_retries", "status"]

_log = logging.getLogger(__name__)
_QUIET_SECONDS = 3.0  # without an answer, before the observer is told
_LONGEST_PAUSE = 10


@dataclasses.dataclass(frozen=True)
class Status:
    """What a server knows: sites with their state and what they publish, and runs, newest first.

    `warnings`: what an operator should look into.
    """

    address: str
    sites: tuple[dict[str, Any], ...]
    runs: tuple[dict[str, str], ...]
    waiting: tuple[str, ...] = ()  # operators whose runs wait for their turn
    trail: str | None = None  # the head of its audit trail
    warnings: tuple[str, ...] = ()


def status(folder: Path) -> Status:
    """Asks the server that `folder` describes.

    Raises:
        ConfigError: the folder is no server folder.
        FederationError: the server refuses the request or is not to be trusted.
        ResourceError: it does not answer.
    """
    flower.quiet()
    server = Server.of(folder)
    with server.client(flower.ControlHttpClient) as control:
        nodes = control.ListNodes(flower.control_pb2.ListNodesRequest()).nodes_info
        runs = control.ListRuns(flower.control_pb2.ListRunsRequest()).run_dict
    budgets, queue = server.published(), server.runs()
    sites = [site_row(node, budgets.get(node.name)) for node in nodes if node.status != "unregistered"]
    started, head = queue.get("runs", {}), queue.get("trail")
    trail = None if head is None else one_line(str(head)[:100])  # a server of before tells none
    own = isinstance(server.credential, OperatorKey)  # who has the server folder has the trail
    back = seen_head(folder, trail) if trail is not None and own else None
    listed = [run_row(run, str(started.get(str(run.run_id), {}).get("by", ""))) for run in runs.values()]
    return Status(
        server.address,
        tuple(sorted(sites, key=itemgetter("site"))),
        tuple(sorted(listed, key=itemgetter("started"), reverse=True)),
        tuple(one_line(str(name)) for name in queue.get("waiting", ())),
        trail,
        () if back is None else (back,),
    )


class AddedHeaders:
    """Adds headers to each request; an interceptor of Flower's HTTP clients."""

    def __init__(self, headers: Callable[[], Mapping[str, str]]) -> None:
        self._headers = headers

    def intercept(self, context: Any, call_next: Any) -> Any:
        """Flower's interface."""
        context.request.headers.update(self._headers())
        return call_next(context)


@dataclasses.dataclass(frozen=True)
class Server:
    """The server that a folder describes, to an operator with a key in it, or with the operator's token."""

    folder: Path
    address: str
    authority: bytes
    credential: OperatorKey | str = dataclasses.field(repr=False)
    sites: dict[int, str] = dataclasses.field(default_factory=dict)  # by Flower's node id

    @classmethod
    def of(cls, folder: Path) -> Server:
        """The server that a folder made by `fedtune provision` describes, which must answer."""
        address, credential = Federation.read(folder / "server.yaml").server, credential_in(folder)
        check_server(address, folder / "ca.crt")
        return cls(folder, address, (folder / "ca.crt").read_bytes(), credential)

    def headers(self) -> dict[str, str]:
        """What shows the server who asks."""
        if isinstance(self.credential, str):
            return {TOKEN_HEADER: self.credential}
        return self.credential.headers()

    @contextlib.contextmanager
    def client(self, kind: Any, *interceptors: Any) -> Iterator[Any]:
        """A client for a question or two.

        Raises:
            FederationError: the server refused the request, or the connection broke.
        """
        with contextlib.closing(self.open_client(kind, *interceptors)) as client:
            try:
                yield client
            except httpx.HTTPStatusError as error:
                if error.response.status_code == httpx.codes.FORBIDDEN:
                    raise FederationError(self._forbidden(error.response)) from error
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
        if node_id not in self.sites:  # the first message of a node; its key never changes sites
            client = self.open_client(flower.ControlHttpClient, retries=patient_retries(self.address))
            with contextlib.closing(client) as control:
                nodes = control.ListNodes(flower.control_pb2.ListNodesRequest()).nodes_info
            self.sites.update({node.node_id: node.name for node in nodes})
        return self.sites.get(node_id)

    def _forbidden(self, response: Any) -> str:
        try:
            said = one_line(str(response.json()["error"])[:300])
        except (ValueError, KeyError, TypeError):
            said = ""
        if said.startswith("Operator "):  # it knows who asks
            return f"{said} Whoever administrates the server {self.address} gives rights."
        if isinstance(self.credential, str):
            return (
                f"The server {self.address} does not know the operator's token of this folder. Use the "
                "server folder itself, or copy its operator.token over this one."
            )
        return (
            f"The server {self.address} does not know the key {self.folder / OPERATOR_KEY}, or this "
            f"machine's clock is off. Send the line that `fedtune operator {self.folder} --name YOU` prints "
            "to the server's administrator. A key that was revoked stays so."
        )

    def published(self) -> dict[str, Any]:
        """What the sites publish of their budgets, by name."""
        return {name: checked_budget(budget) for name, budget in self.ask(PUBLISHED_PATH).items()}

    def runs(self) -> dict[str, Any]:
        """The runs that go on, who started each and whether it is to stop; who waits. See `runs.Runs`."""
        return self.ask(RUNS_PATH)

    def stop(self, run: str, *, now: bool) -> None:
        """Has a run end after its round, or at once.

        Raises:
            ConfigError: no such run goes on.
        """
        headers = {RUN_HEADER: run, STOP_HEADER: "now" if now else "round"}
        self.ask(STOP_PATH, "POST", headers)

    def report(self, values: Mapping[str, Any]) -> bool:
        """Sends a report of a run (`fedtune.deploy.progress`). Returns whether it arrived; never raises."""
        try:
            self.ask(PROGRESS_PATH, "POST", {}, json.dumps(dict(values)).encode())
        except (FedtuneError, OSError) as error:
            _log.debug("a report did not arrive: %s", error)
            return False
        return True

    def ask(
        self,
        path: str,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> dict[str, Any]:
        """The answer to a request of fedtune's own.

        Raises:
            ConfigError: the server says what is wrong with the request.
            FederationError: it refuses it.
            ResourceError: it does not answer, or cannot now.
        """
        asked = {**self.headers(), **(headers or {})}
        try:
            response = httpx.request(
                method, f"https://{self.address}{path}", headers=asked,
                verify=tls_context(self.folder / "ca.crt"), timeout=20.0, content=body,
            )  # fmt: skip
            if response.status_code == httpx.codes.FORBIDDEN:
                raise FederationError(self._forbidden(response))
            if response.status_code in (httpx.codes.NOT_FOUND, httpx.codes.CONFLICT):
                raise ConfigError(one_line(str(response.json()["error"])[:1000]))
            if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
                said = one_line(str(response.json()["error"])[:1000])
                raise ResourceError(f"The server {self.address} cannot answer now: {said}")
            values = dict(response.raise_for_status().json())
        except httpx.TransportError as error:
            raise ResourceError(
                f"The server {self.address} does not answer ({type(error).__name__})."
            ) from error
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise FederationError(
                f"The server {self.address} does not answer {path} ({type(error).__name__}); is it of the "
                "same version as this fedtune?"
            ) from error
        return values

    def open_client(self, kind: Any, *interceptors: Any, retries: Any = None) -> Any:
        """One of Flower's HTTP clients, with the operator's token; without `retries` it asks once."""
        version = flower.RuntimeVersionHttpInterceptor(component_name="flwr-serverapp")
        added = [version, AddedHeaders(self.headers), *interceptors]
        return kind.from_server_address(self.address, False, self.authority, added, retry_invoker=retries)


def patient_retries(address: str, observer: Observer | None = None) -> Any:
    """Retries for as long as the server does not answer, and tells the observer so.

    Flower's own retries send this process a SIGINT when the server has ended its run; these raise.
    """
    waiting = threading.Event()

    def on_backoff(state: Any) -> None:
        if state.elapsed_time >= _QUIET_SECONDS and not waiting.is_set():
            waiting.set()
            if observer is not None:
                observer.on_wait(f"the server {address} does not answer; trying again until it does")

    def on_success(state: Any) -> None:
        if waiting.is_set():
            waiting.clear()
            if observer is not None:
                observer.on_wait("")

    def give_up(error: Exception) -> bool:
        if isinstance(error, httpx.HTTPStatusError):
            return error.response.status_code not in (502, 503, 504)
        # Not for a server that dies in the middle of a handshake, or whose certificate expired and will be
        # renewed, but for one that is another.
        return "certificate" in str(error).lower() and "expired" not in str(error).lower()

    return flower.RetryInvoker(
        wait_gen_factory=lambda: flower.exponential(max_delay=_LONGEST_PAUSE),
        recoverable_exceptions=(httpx.TransportError, httpx.HTTPStatusError),
        max_tries=None,
        max_time=None,
        on_success=on_success,
        on_backoff=on_backoff,
        should_giveup=give_up,
    )
