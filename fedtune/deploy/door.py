"""The server's door: how many connections it keeps, how long it waits, and how much of a body it holds.

Flower's SuperLink is an application behind uvicorn, which waits for ever for headers and bodies and takes as
many connections as the system gives it. So the door is ours, in the same process. A proxy before it would be
a second program to install, would hold a second descriptor for each connection, and could not tell a node
from anybody else without the TLS key and the list of nodes, which are here. nginx in front is possible, as
TLS passthrough, and not needed. What the door holds to:

- Connections that have shown no credential are `UNPROVEN` at most, `UNPROVEN_PER_ADDRESS` from one address.
  One more takes the place of the oldest of them. So whoever holds connections open holds up nobody else, a
  node behind the same address neither; those of nodes and operators are never closed for others. Each of them
  has `PER_CREDENTIAL`, and one more takes the place of their own oldest.
- When the process has no descriptors left, who comes is told that the server is full, by an alert of TLS that
  `certificates.check_server` understands.
- The TLS handshake, and the headers of each request, have `HEADER_SECONDS`; headers have `HEADER_BYTES`. A
  body is read only after the gate (`server.Gate`) has seen a credential; it may not pause for
  `PAUSE_SECONDS`, nor come slower than `SLOWEST` bytes a second after its first `GRACE_SECONDS`.
- Bodies that are read at once have `MOST_BYTES` together, half of it from one sender; others wait, unread.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import ssl
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = [
    "CONNECTION",
    "FULL_ALERT",
    "Bodies",
    "BodyTimeout",
    "Connection",
    "Connections",
    "DoorServer",
    "HeaderDeadline",
    "most_connections",
]

HEADER_SECONDS, HEADER_BYTES = 10.0, 2**16
PAUSE_SECONDS, GRACE_SECONDS, SLOWEST = 20.0, 30.0, 2**15
UNPROVEN, UNPROVEN_PER_ADDRESS, PER_CREDENTIAL = 512, 128, 256
MOST_BYTES, SMALL = 2**26, 2**16  # a small body waits for no other: a heartbeat must not
CONNECTION = "fedtune.connection"  # in the scope of a request: the `Connection` that it came by
# A fatal alert 'internal error' of TLS, in clear: all that may be said to somebody before the handshake.
FULL_ALERT = b"\x15\x03\x03\x00\x02\x02\x50"
_DESCRIPTORS = 8192
_TURNED_AWAY, _LINGER_SECONDS = 64, 0.5
_CLOSE_SECONDS = 2.0  # for the other side's goodbye


# --- connections --------------------------------------------------------------------------------------


class Connection:
    """One connection: where it is from, and the credential that was seen on it (None: none yet)."""

    def __init__(self, address: str, end: Callable[[], object]) -> None:
        self.address, self._end = address, end
        self.proven: bytes | None = None

    def close(self) -> None:
        """Ends it at once."""
        self._end()

    def ends_by(self, end: Callable[[], object]) -> None:
        """From now on `end` is what closes it."""
        self._end = end


class Connections:
    """The connections that a server has now.

    Args:
        most: of all.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._unproven_most = min(UNPROVEN, max(1, most // 2))
        self._unproven: dict[Connection, None] = {}  # oldest first
        self._by_address: dict[str, dict[Connection, None]] = {}
        self._proven: dict[bytes, dict[Connection, None]] = {}  # by credential, oldest first
        self._all: set[Connection] = set()

    def __len__(self) -> int:
        return len(self._all)

    def admit(self, address: str, end: Callable[[], object]) -> Connection | None:
        """Takes a new connection, closing the oldest one without a credential where there are too many.

        Args:
            address: of the other side.
            end: closes the connection.

        Returns:
            It; None if the server is full, of connections that have shown a credential.
        """
        same = self._by_address.get(address, {})
        if len(same) >= min(UNPROVEN_PER_ADDRESS, self._unproven_most):
            self._evict(next(iter(same)))
        elif self._unproven and (len(self._unproven) >= self._unproven_most or len(self._all) >= self._most):
            self._evict(next(iter(self._unproven)))
        if len(self._all) >= self._most:
            return None
        made = Connection(address, end)
        self._all.add(made)
        self._unproven[made] = None
        self._by_address.setdefault(address, {})[made] = None
        return made

    def prove(self, connection: Connection, credential: bytes) -> None:
        """Notes that a request on it had a credential. Its oldest is closed if it has too many."""
        if connection.proven == credential or connection not in self._all:
            return
        self._forget_unproven(connection)
        self._forget_proven(connection)
        connection.proven = credential
        same = self._proven.setdefault(credential, {})
        if len(same) >= min(PER_CREDENTIAL, max(4, self._most // 2)):
            self._evict(next(iter(same)))
        self._proven.setdefault(credential, {})[connection] = None

    def leave(self, connection: Connection) -> None:
        """Notes that a connection has ended."""
        self._all.discard(connection)
        self._forget_unproven(connection)
        self._forget_proven(connection)

    def _evict(self, connection: Connection) -> None:
        self.leave(connection)
        connection.close()

    def _forget_unproven(self, connection: Connection) -> None:
        self._unproven.pop(connection, None)
        same = self._by_address.get(connection.address, {})
        same.pop(connection, None)
        if not same:
            self._by_address.pop(connection.address, None)

    def _forget_proven(self, connection: Connection) -> None:
        if connection.proven is not None:
            same = self._proven.get(connection.proven, {})
            same.pop(connection, None)
            if not same:
                self._proven.pop(connection.proven, None)


def most_connections() -> int:
    """Connections that a server may have: as many as there are descriptors for, beside the database's own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _DESCRIPTORS and (hard == resource.RLIM_INFINITY or hard > soft):
        soft = _DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, _DESCRIPTORS)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return int(min(soft, _DESCRIPTORS) - min(256, soft // 2))


# --- bodies -------------------------------------------------------------------------------------------


class BodyTimeout(Exception):
    """A body came too slowly, or not to its end."""


class Bodies:
    """Reads the bodies of requests, within the bytes that they may have together.

    Args:
        most: bytes of all bodies that are read, or read and not yet answered, at once.
    """

    def __init__(self, most: int = MOST_BYTES) -> None:
        self._most, self._held = most, 0
        self._by_sender: Counter[bytes] = Counter()
        self._changed = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def read(self, receive: Any, length: int, sender: bytes) -> AsyncIterator[bytes]:
        """The body of a request, once there is room for it; the room is given back when the block ends.

        Args:
            receive: of ASGI.
            length: in bytes, as the request announced it.
            sender: the credential that it came with.

        Raises:
            BodyTimeout: it came too slowly, or the connection ended.
        """
        if length <= SMALL:
            yield await _whole(receive, length)
            return
        share = max(self._most // 2, length)
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._held + length <= self._most and self._by_sender[sender] + length <= share
            )
            self._held += length
            self._by_sender[sender] += length
        try:
            yield await _whole(receive, length)
        finally:
            self._held -= length
            self._by_sender[sender] -= length
            if not self._by_sender[sender]:
                del self._by_sender[sender]
            async with self._changed:
                self._changed.notify_all()


async def _whole(receive: Any, length: int) -> bytes:
    parts: list[bytes] = []
    end = time.monotonic() + GRACE_SECONDS + length / SLOWEST
    more = True
    while more:
        left = min(PAUSE_SECONDS, end - time.monotonic())
        try:
            message = await asyncio.wait_for(receive(), max(0.0, left))
        except TimeoutError as error:
            raise BodyTimeout from error
        if message["type"] != "http.request":
            raise BodyTimeout
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


# --- the server ---------------------------------------------------------------------------------------


class HeaderDeadline(HttpToolsProtocol):
    """uvicorn's protocol, which takes `HEADER_BYTES` of a request's headers, and waits for them
    `HEADER_SECONDS`.

    uvicorn itself waits for ever, so that a few thousand connections that say nothing would keep others out,
    and keeps all that comes.
    """

    _deadline: asyncio.TimerHandle | None = None
    _header_bytes = 0  # so far

    def connection_made(self, transport: Any) -> None:
        """See asyncio.Protocol."""
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        super().data_received(data)
        if self._deadline is None and (self.cycle is None or self.cycle.response_complete):
            self._expect()
        self._header_bytes = 0 if self._deadline is None else self._header_bytes + len(data)
        if self._header_bytes > HEADER_BYTES:
            self.transport.abort()

    def on_headers_complete(self) -> None:
        """See httptools."""
        self._expect_nothing()
        super().on_headers_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._expect_nothing()
        super().connection_lost(exc)

    def _expect(self) -> None:
        self._deadline = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _expect_nothing(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class DoorServer(uvicorn.Server):
    """uvicorn's server behind the door.

    Args:
        config: of uvicorn, loaded, with its TLS context.
        listener: the socket that listens.
        connections: counts them.
    """

    def __init__(self, config: uvicorn.Config, listener: socket.socket, connections: Connections) -> None:
        super().__init__(config)
        self._listener, self.connections = listener, connections
        self._turned_away = 0
        self._handshakes: set[asyncio.Task[None]] = set()
        self._accepting: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's: the application starts, then the port is open."""
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            self.should_exit = True
            return
        self.servers = []  # asyncio's: it would count no connection before its handshake
        self._listener.setblocking(False)
        self._accepting = asyncio.create_task(self._accept())
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's: the port is closed, then what was begun has its time."""
        if self._accepting is not None:
            self._accepting.cancel()
        self._listener.close()
        await super().shutdown(sockets)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                other, address = await loop.sock_accept(self._listener)
            except OSError:  # no descriptor left, or who came is gone again
                await asyncio.sleep(0.1)
                continue
            held = self.connections.admit(address[0], partial(_end, other))
            if held is None:
                self._turn_away(other)
                continue
            task = loop.create_task(self._handshake(other, held))
            self._handshakes.add(task)
            task.add_done_callback(self._handshakes.discard)

    async def _handshake(self, other: socket.socket, held: Connection) -> None:
        def protocol() -> asyncio.Protocol:
            return _Counted(self, held)

        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                protocol,
                other,
                ssl=self.config.ssl,
                ssl_handshake_timeout=HEADER_SECONDS,
                ssl_shutdown_timeout=_CLOSE_SECONDS,
            )
        except (OSError, ssl.SSLError):
            self.connections.leave(held)

    def _turn_away(self, other: socket.socket) -> None:
        """Says that the server is full. Closed at once, the system would take the word back."""
        with contextlib.suppress(OSError):
            other.setblocking(False)
            other.send(FULL_ALERT)
            other.shutdown(socket.SHUT_WR)
        if self._turned_away >= _TURNED_AWAY:
            other.close()
            return

        def close() -> None:
            self._turned_away -= 1
            other.close()

        self._turned_away += 1
        asyncio.get_running_loop().call_later(_LINGER_SECONDS, close)


class _Counted(HeaderDeadline):
    """A connection of a `DoorServer`, known to its application."""

    def __init__(self, server: DoorServer, held: Connection) -> None:
        super().__init__(server.config, server.server_state, server.lifespan.state)
        self._counts, self._held = server.connections, held

    def connection_made(self, transport: Any) -> None:
        """See asyncio.Protocol."""
        super().connection_made(transport)
        self._held.ends_by(transport.abort)

    def on_message_begin(self) -> None:
        """See httptools."""
        super().on_message_begin()
        self.scope[CONNECTION] = self._held  # type: ignore[literal-required]

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._counts.leave(self._held)
        super().connection_lost(exc)


def _end(other: socket.socket) -> None:
    """Ends a connection whose handshake goes on: its task sees the end, and closes the socket."""
    with contextlib.suppress(OSError):
        other.shutdown(socket.SHUT_RDWR)
