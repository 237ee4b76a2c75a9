"""What of a server is open, and to whom: the one way in.

Flower's SuperLink has some eighty calls. fedtune uses those that are named here, one by one; every other is
closed to everybody, so that a call which a later Flower adds is closed until somebody here opens it. In
particular nobody registers or unregisters a node by Flower's own interfaces, with or without the operator's
token: whom a server lets in is said by its enrolment files alone (`admission`).
"""

from __future__ import annotations

import asyncio
import hmac
import json
from typing import Any

from fedtune.deploy import join
from fedtune.deploy.admission import Admission
from fedtune.deploy.published import Board
from fedtune.errors import ConfigError

__all__ = ["FOR_NODES", "FOR_OPERATORS", "PUBLISHED_PATH", "TOKEN_HEADER", "Gate"]

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


class Gate:
    """Lets enrolled nodes to what nodes may call, and whoever has the operator's token to what operators may.

    A request's size is looked at before anything of it is read, since Flower reads all of it before it looks
    who sent it. One that comes in chunks, whatever length it names beside, has no size; one that names two
    keys is let to nothing, for the gate would read the one and Flower the other. `board` keeps what sites
    publish. Raises ConfigError for an empty token, which would be everybody's.
    """

    def __init__(self, app: Any, token: str, admission: Admission, board: Board | None = None) -> None:
        if not token:
            raise ConfigError("The operator's token is empty: everybody would have it. Nothing is served.")
        self._app, self._token, self._admission, self._board = app, token.encode(), admission, board

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return None  # no websocket is spoken here
        headers, path = dict(scope["headers"]), scope["path"]
        if path == join.PATH:
            # Asks the database, so not in the loop that serves everybody.
            said = await asyncio.to_thread(join.answer, headers, self._admission, self._board)
            return await _respond(send, *said)
        if path in FOR_NODES:
            keys = [value for name, value in scope["headers"] if name == _NODE_KEY]
            refused = self._admission.of_request(keys[0] if len(keys) == 1 else b"")
        elif path in FOR_OPERATORS or path == PUBLISHED_PATH:
            refused = None if self._knows(headers) else (403, "This needs the operator's token.")
        else:
            refused = 403, "This server has no such call."
        if refused is not None:
            return await _respond(send, refused[0], {"error": refused[1]})
        if path == PUBLISHED_PATH:
            return await _respond(send, 200, self._board.all() if self._board else {})
        length = headers.get(b"content-length", b"0" if scope.get("method") == "GET" else b"")
        if not length.isdigit() or b"transfer-encoding" in headers:
            return await _respond(send, 411, {"error": "A request has to say how long it is."})
        if int(length) > _MAX_BODY:
            error = f"A request may have {_MAX_BODY} bytes, and this one has {int(length)}."
            return await _respond(send, 413, {"error": error})
        await self._app(scope, receive, send)
        return None

    def _knows(self, headers: dict[bytes, bytes]) -> bool:
        given = headers.get(TOKEN_HEADER.encode(), b"")
        return bool(given) and hmac.compare_digest(given, self._token)


async def _respond(send: Any, status: int, values: dict[str, Any]) -> None:
    body = json.dumps(values).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
