"""How many connections the service keeps, and which one gives way to another.

uvicorn's own limit (`limit_concurrency`) answers 503 to everybody once it is reached, to /healthz as well:
who holds connections open would have the service restarted by whoever watches it. Here a connection that
waits for its own client gives way to a new one: it is idle, its request has not come to its end, or its
client does not take the answer; the one that has done so for longest. A request that has come to its end is
never given up. Where there are only such, a new connection is told 503 with Retry-After, unless it asks for
one of `PROBES`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fedtune.deploy.door import HeaderDeadline

__all__ = ["PROBES", "BoundedConnection", "Connections"]

PROBES = (b"/healthz", b"/readyz", b"/metrics")
_FULL = json.dumps({"detail": "Too many connections are being answered."}).encode()


class Connections:
    """The connections that there are now.

    Args:
        most: of them, beside those that are being told so.

    Attributes:
        noted: is told of each connection that gave way ("closed"), or came when none could ("refused").
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.noted: Callable[[str], None] = lambda what: None
        self._all: set[BoundedConnection] = set()
        self._waiting: dict[BoundedConnection, None] = {}  # for their clients, longest first

    def __len__(self) -> int:
        return len(self._all)

    def admit(self, connection: BoundedConnection) -> bool:
        """Takes a new connection; False: there is no room, for all others are being answered."""
        fits = len(self._all) < self.most
        if not fits and self._waiting:
            oldest = next(iter(self._waiting))
            self.leave(oldest)
            oldest.transport.abort()
            self.noted("closed")
            fits = len(self._all) < self.most
        self._all.add(connection)
        self.waits(connection, True)
        return fits

    def waits(self, connection: BoundedConnection, waits: bool) -> None:
        """Notes whether a connection waits for its client."""
        if not waits:
            self._waiting.pop(connection, None)
        elif connection in self._all:
            self._waiting.setdefault(connection)

    def leave(self, connection: BoundedConnection) -> None:
        """Notes that a connection has ended."""
        self._all.discard(connection)
        self._waiting.pop(connection, None)


class BoundedConnection(HeaderDeadline):
    """uvicorn's protocol: one connection among `Connections`, which its configuration's app carries."""

    _fits = True
    _paused = False

    def connection_made(self, transport: Any) -> None:
        """See asyncio.Protocol."""
        super().connection_made(transport)
        self._room: Connections = self.config.app.state.connections  # type: ignore[union-attr]
        self._fits = self._room.admit(self)

    def on_message_begin(self) -> None:
        """See httptools."""
        super().on_message_begin()
        if self.cycle is not None and self.cycle.response_complete:  # it was idle, and is so no longer
            self._room.waits(self, False)
            self._room.waits(self, True)

    def on_headers_complete(self) -> None:
        """See httptools."""
        if not self._fits and self.url.partition(b"?")[0] not in PROBES:
            self._room.noted("refused")
            self.app = _refuse
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """See httptools."""
        super().on_message_complete()
        self._look()

    def on_response_complete(self) -> None:
        """See uvicorn."""
        super().on_response_complete()
        self._look()

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        super().pause_writing()
        self._paused = True
        self._look()

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        super().resume_writing()
        self._paused = False
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._room.leave(self)
        super().connection_lost(exc)

    def _look(self) -> None:
        asked = self.cycle is not None and not self.cycle.response_complete and not self.cycle.more_body
        self._room.waits(self, self._paused or not asked)


async def _refuse(scope: Any, receive: Any, send: Any) -> None:
    """Says that there are too many connections, and closes."""
    headers = {
        b"content-type": b"application/json",
        b"content-length": str(len(_FULL)).encode(),
        b"retry-after": b"1",
        b"connection": b"close",
    }
    await send({"type": "http.response.start", "status": 503, "headers": list(headers.items())})
    await send({"type": "http.response.body", "body": _FULL})
