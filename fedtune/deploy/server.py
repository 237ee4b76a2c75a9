"""`fedtune server`: Flower's SuperLink with TLS, node keys and a database, for one federation.

It relays messages between the process that submits a run (`submit`, which is the ServerApp) and the nodes,
and runs nobody's code: there is no executor for apps in it. Nodes are let in by their enrolled keys
(`admission`: a file that appears enrols, one that is missing or broken suspends, within seconds; only
`--revoke` revokes). The database keeps nodes, runs and messages over a crash. A renewed certificate is used
without a restart.

The door (`fedtune.deploy.door`) bounds connections, seconds and bytes; the `Gate` behind it is the one way
in. Flower's SuperLink has some eighty calls. fedtune uses those that are named here, one by one; every other
is closed to everybody, so that a call which a later Flower adds is closed until somebody here opens it. In
particular nobody registers or unregisters a node by Flower's own interfaces, with or without the operator's
token.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn

from fedtune.deploy import certificates, join
from fedtune.deploy.admission import Admission
from fedtune.deploy.certificates import expiry_warning, parse_address
from fedtune.deploy.door import (
    CONNECTION,
    Bodies,
    BodyTimeout,
    Connections,
    DoorServer,
    give_memory_back,
    most_connections,
)
from fedtune.deploy.join import PublishedBudgets
from fedtune.deploy.provision import Federation, read_token
from fedtune.errors import ConfigError, ResourceError

__all__ = ["FOR_NODES", "FOR_OPERATORS", "PUBLISHED_PATH", "TOKEN_HEADER", "Gate", "run_server"]
_log = logging.getLogger("fedtune.server")
_SYNC_SECONDS = 2.0
_WARN_SECONDS = 86_400.0
_BACKLOG = 1024
TOKEN_HEADER = "x-fedtune-operator"
PUBLISHED_PATH = "/v1/fedtune/published"
# Flower cuts arrays into chunks of 5 MiB, and an app has at most 10.
_MAX_BODY = 2**25
_NODE_KEY = b"flwr-public-key"  # flwr.supercore.constant.FLEET_HTTP_PUBLIC_KEY_HEADER

FOR_NODES = frozenset(
    f"/v1/fleet/{call}"
    for call in (
        "activate-node", "confirm-message-received", "deactivate-node", "get-fab", "get-run",
        "pull-messages", "pull-object", "push-messages", "push-object", "send-node-heartbeat",
    )
)  # fmt: skip
FOR_OPERATORS = frozenset(
    [f"/v1/control/{call}" for call in ("list-nodes", "list-runs", "start-run", "stop-run")]
    + [
        f"/v1/runtime/{call}"
        for call in (
            "acquire-task", "confirm-message-received", "get-nodes", "pull-messages", "pull-object",
            "pull-task-input", "push-messages", "push-object", "push-task-output", "send-task-heartbeat",
        )
    ]
)  # fmt: skip


def run_server(folder: Path, say: Callable[[str], None], host: str | None = None) -> None:
    """Serves until it is stopped (Ctrl-C, SIGTERM).

    Args:
        folder: the server folder that `fedtune provision` made.
        say: prints a line for the operator.
        host: the address to listen on; by default all, or the loopback if the sites use that.

    Raises:
        ConfigError: a folder, key or certificate that is wrong.
        ResourceError: the port is taken.
    """
    federation = Federation.read(folder / "server.yaml")
    named, port = parse_address(federation.server)
    host = host or ("127.0.0.1" if named in ("127.0.0.1", "localhost") else "0.0.0.0")
    days = certificates.check_server_certificate(folder)
    certificates.load_private_key(folder / "server.key")
    check_pair(folder)
    if warning := expiry_warning(days):
        say(warning)
    token = read_token(folder)
    listener = _listen(host, port)
    from fedtune.deploy import flower  # late: what is wrong with the folder is known before

    give_memory_back()
    app = flower.superlink_app(folder, host, port)
    admission = Admission(app.state.linkstate_factory.state(), folder, say)
    admitted = admission.update()
    ending = threading.Event()
    gate = Gate(app, token, admission, PublishedBudgets(folder / "published.json"))
    serving = behind_the_door(gate, folder, listener)
    threading.Thread(target=admission.keep_updated, args=(ending,), daemon=True).start()
    renewed = (_Certificate(folder, serving.config.ssl), ending, say)
    threading.Thread(target=_keep_certificate, args=renewed, daemon=True).start()
    say(
        f"federation {federation.name} on {host}:{port} (sites reach it as {federation.server}); "
        f"{admitted} sites enrolled"
    )
    try:
        serving.run()
    finally:
        ending.set()
    say("the server has ended; its database keeps nodes and runs")


def behind_the_door(gate: Gate, folder: Path, listener: socket.socket) -> DoorServer:
    """uvicorn's server for `gate`, with the certificate of a server folder."""
    config = uvicorn.Config(
        gate,
        ssl_keyfile=str(folder / "server.key"),
        ssl_certfile=str(folder / "server.crt"),
        log_level="error",
        access_log=False,
        timeout_graceful_shutdown=3,
    )
    config.load()
    return DoorServer(config, listener, gate.connections)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ResourceError(
            f"Port {port} on {host} cannot be used ({error.strerror}): is another server of this "
            "federation running? End it, or change the address in the federation file and provision "
            "again."
        ) from error


def check_pair(folder: Path) -> None:
    """Raises ConfigError if a server folder's certificate and key do not belong together."""
    try:
        trial = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        trial.load_cert_chain(folder / "server.crt", folder / "server.key", password="")
    except ssl.SSLError as error:
        raise ConfigError(
            f"{folder / 'server.crt'} and {folder / 'server.key'} do not belong together "
            f"({error.reason or error}). Put both there as they were made, or make new ones with `fedtune "
            "provision FEDERATION.yaml -o DIR --renew`."
        ) from error


class Gate:
    """Passes nodes' calls from enrolled nodes, and operators' calls from whoever has the operator's token.

    A node's signature and a request's size are checked before anything of its body is read, since Flower
    reads all of it before it checks the sender. A request that comes in chunks, whatever length it names
    beside, has no size. One that names two keys is refused, because the gate would read the one and Flower
    the other.

    Args:
        app: Flower's SuperLink, an ASGI application.
        token: the operator's.
        admission: which nodes are let in.
        budgets: where what sites publish is stored.

    Attributes:
        connections: those that the server has; on one of them a credential is checked once, and Flower
            checks each request of a node again.

    Raises:
        ConfigError: an empty token, which everybody would have.
    """

    def __init__(
        self, app: Any, token: str, admission: Admission, budgets: PublishedBudgets | None = None
    ) -> None:
        if not token:
            raise ConfigError("The operator's token is empty: everybody would have it. Nothing is served.")
        self._app, self._token, self._admission, self._budgets = app, token.encode(), admission, budgets
        self.connections, self._bodies = Connections(most_connections()), Bodies()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return None  # websockets are not used
        headers, path, connection = dict(scope["headers"]), scope["path"], scope.get(CONNECTION)
        if path == join.PATH and b"content-length" not in headers and b"transfer-encoding" not in headers:
            # It queries the database, so not in the event loop, which serves everybody.
            answered = await asyncio.to_thread(join.answer, headers, self._admission, self._budgets)
            return await _respond(send, *answered)
        if path in FOR_NODES:
            keys = [value for name, value in scope["headers"] if name == _NODE_KEY]
            credential = keys[0] if len(keys) == 1 else b""
            refused = self._admission.refusal_of_request(credential)
            shown = connection is not None and connection.proven == credential
            if refused is None and not shown and not self._signed(headers):
                refused = 401, "This needs a request that is signed by the node's key."
        elif path in FOR_OPERATORS or path == PUBLISHED_PATH:
            credential = b"operator"
            refused = None if self._is_operator(headers) else (403, "This needs the operator's token.")
        else:
            credential, refused = b"", (403, "This server has no such call.")
        if refused is not None:
            return await _respond(send, refused[0], {"error": refused[1]}, close=True)
        if connection is not None:
            self.connections.prove(connection, credential)
        if path == PUBLISHED_PATH:
            return await _respond(send, 200, self._budgets.all() if self._budgets else {})
        length = headers.get(b"content-length", b"0" if scope.get("method") == "GET" else b"")
        if not length.isdigit() or b"transfer-encoding" in headers:
            error = "A request has to say how long it is."
            return await _respond(send, 411, {"error": error}, close=True)
        if int(length) > _MAX_BODY:
            error = f"A request may have {_MAX_BODY} bytes, and this one has {int(length)}."
            return await _respond(send, 413, {"error": error}, close=True)
        try:
            async with self._bodies.read(receive, int(length), credential) as body:
                await self._app(scope, _once(body, receive), send)
        except BodyTimeout:
            error = "The body of the request did not arrive in time."
            await _respond(send, 408, {"error": error}, close=True)
        return None

    def _signed(self, headers: dict[bytes, bytes]) -> bool:
        from fedtune.deploy import flower

        return flower.signed_by_node(headers)

    def _is_operator(self, headers: dict[bytes, bytes]) -> bool:
        given = headers.get(TOKEN_HEADER.encode(), b"")
        return bool(given) and hmac.compare_digest(given, self._token)


def _once(body: bytes, receive: Any) -> Any:
    """`receive` of ASGI for a body that was read: it comes first, whole."""
    whole: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

    async def given() -> Any:
        return whole.pop() if whole else await receive()

    return given


async def _respond(send: Any, status: int, values: dict[str, Any], *, close: bool = False) -> None:
    """`close`: the connection ends with it, and what it still sends is not read."""
    body = json.dumps(values).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class _Certificate:
    """The server's certificate as it is on disk, and in the TLS context that serves."""

    def __init__(self, folder: Path, context: ssl.SSLContext | None) -> None:
        self._folder, self._context = folder, context
        self._served = self._on_disk()
        self._unfit: tuple[tuple[bytes, bytes], int] | None = None  # what does not fit, and how often seen

    def _on_disk(self) -> tuple[bytes, bytes]:
        return tuple((self._folder / name).read_bytes() for name in ("server.crt", "server.key"))  # type: ignore[return-value]

    def renew(self) -> bool:
        """Uses a new certificate, if there is one, for whoever connects from now on. True if there was.

        Raises:
            ConfigError: once, for a certificate and a key that do not belong together; the former one stays
                in use.
        """
        if self._context is None or (now := self._on_disk()) == self._served:
            return False
        try:
            # Not in the context that serves: a certificate without its key leaves it with no key at all.
            check_pair(self._folder)
        except ConfigError as error:
            seen = self._unfit[1] + 1 if self._unfit is not None and self._unfit[0] == now else 1
            self._unfit = (now, seen)
            # They are written one after the other: at the first look the second may be on its way.
            if seen == 2:
                raise ConfigError(f"{error} Until then the former certificate stays in use.") from error
            return False
        if self._on_disk() != now:
            return False  # it was written meanwhile; the next call uses it
        self._context.load_cert_chain(self._folder / "server.crt", self._folder / "server.key")
        self._served = now
        return True

    def days(self) -> int:
        """Until it expires."""
        return certificates.check_server_certificate(self._folder)


def _keep_certificate(certificate: _Certificate, ending: threading.Event, say: Callable[[str], None]) -> None:
    """Uses a renewed certificate, and warns once a day that one is needed, until `ending` is set."""
    warned = time.monotonic()
    while not ending.wait(_SYNC_SECONDS):
        try:
            if certificate.renew():
                say(f"uses the renewed certificate, good for {certificate.days()} days")
            if time.monotonic() - warned > _WARN_SECONDS:
                warned = time.monotonic()
                if warning := expiry_warning(certificate.days()):
                    say(warning)
        except ConfigError as error:
            say(str(error))
        except OSError as error:  # key and certificate are written one after the other
            _log.debug("the certificate is not whole yet: %s", error)
