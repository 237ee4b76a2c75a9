"""How the operator's side speaks to a running server: its address, its authority, the operator's token.

Uses Flower's internals (checked with 1.41): its HTTP clients, and the retries that they take.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.deploy.gate import PUBLISHED_PATH, TOKEN_HEADER
from fedtune.deploy.provision import Federation, read_token
from fedtune.deploy.published import checked
from fedtune.deploy.reach import check_server, tls_context
from fedtune.errors import FederationError

if TYPE_CHECKING:
    from fedtune.federation.events import Observer

__all__ = ["Server", "patient_retries"]

_QUIET_SECONDS = 3.0  # without the server before anybody is told
_LONGEST_PAUSE = 10


class _Token:
    """Adds the operator's token to each request; an interceptor of Flower's HTTP clients."""

    def __init__(self, token: str) -> None:
        self._token = token

    def intercept(self, context: Any, call_next: Any) -> Any:
        """Flower's interface."""
        context.request.headers[TOKEN_HEADER] = self._token
        return call_next(context)


@dataclasses.dataclass(frozen=True)
class Server:
    """The server of a folder that `fedtune provision` made, to somebody with its operator's token."""

    folder: Path
    address: str
    authority: bytes
    token: str
    sites: dict[int, str] = dataclasses.field(default_factory=dict)  # by Flower's node id

    @classmethod
    def of(cls, folder: Path) -> Server:
        """The server that a folder made by `fedtune provision` describes, which must answer."""
        address, token = Federation.read(folder / "server.yaml").server, read_token(folder)
        check_server(address, folder / "ca.crt")
        return cls(folder, address, (folder / "ca.crt").read_bytes(), token)

    @contextlib.contextmanager
    def asked(self, kind: Any, *interceptors: Any) -> Iterator[Any]:
        """A client for a question or two. Raises FederationError for a refusal or a connection that broke."""
        import httpx

        with contextlib.closing(self.client(kind, *interceptors)) as client:
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
            client = self.client(ControlHttpClient, retries=patient_retries(self.address))
            with contextlib.closing(client) as control:
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

    def client(self, kind: Any, *interceptors: Any, retries: Any = None) -> Any:
        """One of Flower's HTTP clients, with the operator's token; without `retries` it asks once."""
        from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

        version = RuntimeVersionHttpInterceptor(component_name="flwr-serverapp")
        return kind.from_server_address(
            self.address,
            False,
            self.authority,
            [version, _Token(self.token), *interceptors],
            retry_invoker=retries,
        )


def patient_retries(address: str, observer: Observer | None = None) -> Any:
    """Asks again for as long as the server does not answer, and tells the observer so.

    Flower's own retries send this process a SIGINT when the server has ended its run; these raise.
    """
    import httpx
    from flwr.supercore.retry import RetryInvoker, exponential

    told = threading.Event()

    def on_backoff(state: Any) -> None:
        if state.elapsed_time >= _QUIET_SECONDS and not told.is_set():
            told.set()
            if observer is not None:
                observer.on_wait(f"the server {address} does not answer; trying again until it does")

    def on_success(state: Any) -> None:
        if told.is_set():
            told.clear()
            if observer is not None:
                observer.on_wait("")

    def give_up(error: Exception) -> bool:
        if isinstance(error, httpx.HTTPStatusError):
            return error.response.status_code not in (502, 503, 504)
        # A server that dies in the middle of a handshake is no reason; one that is another is.
        return "certificate" in str(error).lower()

    return RetryInvoker(
        wait_gen_factory=lambda: exponential(max_delay=_LONGEST_PAUSE),
        recoverable_exceptions=(httpx.TransportError, httpx.HTTPStatusError),
        max_tries=None,
        max_time=None,
        on_success=on_success,
        on_backoff=on_backoff,
        should_giveup=give_up,
    )
