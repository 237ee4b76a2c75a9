"""What the gate reads of a request, and what it remembers of an answer that passes it (ASGI)."""

from __future__ import annotations

from typing import Any

from fedtune.deploy.door import CONNECTION
from fedtune.deploy.runs import RUN_HEADER

__all__ = ["Passed", "Request"]

_SMALL_ANSWER = 10_000


class Request:
    """What the head of a request says."""

    def __init__(self, scope: Any) -> None:
        self.path: str = scope["path"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self._all = scope["headers"]
        self.connection = scope.get(CONNECTION)
        self.address = str((scope.get("client") or ("?",))[0])
        self.length = self.headers.get(b"content-length", b"0" if scope.get("method") == "GET" else b"")

    @property
    def has_no_body(self) -> bool:
        """Whether nothing follows."""
        return b"content-length" not in self.headers and b"transfer-encoding" not in self.headers

    def all(self, name: bytes) -> list[bytes]:
        """Each value of a header."""
        return [value for one, value in self._all if one == name]

    def one(self, name: str) -> str:
        """A header's text; empty without it."""
        return self.headers.get(name.encode(), b"").decode("latin-1")[:1000]

    def run(self) -> int | None:
        """The number of the run that it names, if any."""
        named = self.headers.get(RUN_HEADER.encode(), b"")
        return int(named) if named.isdigit() and len(named) <= 20 else None

    def has_shown(self, credential: bytes) -> bool:
        """Whether this credential was checked on the connection of the request."""
        return self.connection is not None and self.connection.proven == credential


class Passed:
    """`send` of ASGI, which remembers the status and, of small answers, the body."""

    def __init__(self, send: Any) -> None:
        self._send, self.status = send, 0
        self._parts: list[bytes] = []

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif len(message.get("body", b"")) <= _SMALL_ANSWER and len(self._parts) < 4:
            self._parts.append(message.get("body", b""))
        await self._send(message)

    def body(self) -> bytes:
        """Of the answer, where it is small."""
        return b"".join(self._parts)
