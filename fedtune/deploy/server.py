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
import json
import socket
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from fedtune.deploy import certificates, join, server_metrics
from fedtune.deploy.admission import Admission
from fedtune.deploy.asgi import Passed, Request
from fedtune.deploy.certificates import expiry_warning, parse_address
from fedtune.deploy.door import (
    Bodies,
    BodyTimeout,
    Connections,
    DoorServer,
    most_connections,
)
from fedtune.deploy.join import PublishedBudgets
from fedtune.deploy.memory import SERVER_BLOCK, give_memory_back
from fedtune.deploy.news import QUESTION, News
from fedtune.deploy.operators import Operator, Operators, Right
from fedtune.deploy.progress import MAX_REPORT, Progress
from fedtune.deploy.progress import PATH as PROGRESS_PATH
from fedtune.deploy.provision import Federation, read_token
from fedtune.deploy.runs import RUN_HEADER, STOP_HEADER, TICKET_HEADER, Runs
from fedtune.deploy.served_certificate import ServedCertificate, check_pair, keep_certificate
from fedtune.deploy.trail import Trail
from fedtune.deploy.view import ServerView
from fedtune.errors import ResourceError
from fedtune.monitoring.logs import without_cut_off_requests

if TYPE_CHECKING:
    from fedtune.deploy.flower import FrequentCalls

__all__ = [
    "AFTER_HEADER",
    "ENROL_HEADER",
    "ENROL_PATH",
    "FOLLOW_PATH",
    "FOR_NODES",
    "FOR_OPERATORS",
    "PUBLISHED_PATH",
    "REVOKE_HEADER",
    "RUNS_PATH",
    "STOP_PATH",
    "TOKEN_HEADER",
    "Gate",
    "behind_the_door",
    "run_server",
]
_BACKLOG = 1024
TOKEN_HEADER = "x-fedtune-operator"
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
PUBLISHED_PATH = "/v1/fedtune/published"
RUNS_PATH = "/v1/fedtune/runs"
STOP_PATH = "/v1/fedtune/stop"
ENROL_PATH = "/v1/fedtune/enrol"
ENROL_HEADER = "x-fedtune-enrol"
REVOKE_HEADER = "x-fedtune-revoke"
FOLLOW_PATH = "/v1/fedtune/follow"
AFTER_HEADER = "x-fedtune-after"  # the last round that is known
_OWN = (PUBLISHED_PATH, RUNS_PATH, STOP_PATH, ENROL_PATH, FOLLOW_PATH)
_TO_NODES = ("/v1/runtime/push-messages", "/v1/runtime/push-object")
_START, _TAKE = "/v1/control/start-run", "/v1/runtime/acquire-task"
# What right each call needs. What a run's ServerApp asks has the run's own token beside, which Flower checks.
FOR_OPERATORS: dict[str, Right] = {
    "/v1/control/list-nodes": "read",
    "/v1/control/list-runs": "read",
    PUBLISHED_PATH: "read",
    RUNS_PATH: "read",
    FOLLOW_PATH: "read",
    "/v1/control/stop-run": "stop",
    STOP_PATH: "stop",
    ENROL_PATH: "enrol",
    _START: "submit",
    PROGRESS_PATH: "submit",
    **dict.fromkeys(
        (
            f"/v1/runtime/{call}"
            for call in (
                "acquire-task", "confirm-message-received", "get-nodes", "pull-messages", "pull-object",
                "pull-task-input", "push-messages", "push-object", "push-task-output", "send-task-heartbeat",
            )
        ),
        "submit",
    ),
}  # fmt: skip


_SIDES = {
    **dict.fromkeys([*FOR_NODES, join.PATH], "node"),
    **dict.fromkeys(FOR_OPERATORS, "operator"),
}


def run_server(
    folder: Path, say: Callable[[str], None], host: str | None = None, monitor: str | None = None
) -> None:
    """Serves until it is stopped (Ctrl-C, SIGTERM).

    Args:
        folder: the server folder that `fedtune provision` made.
        say: prints a line for the operator.
        host: the address to listen on; by default all, or the loopback if the sites use that.
        monitor: where its administrator looks (`fedtune.deploy.server_metrics`); None: nowhere.

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
    people, trail = Operators(folder, read_token(folder)), Trail(folder, say)
    listener = _listen(host, port)
    from fedtune.deploy import flower  # late: what is wrong with the folder is known before

    give_memory_back(SERVER_BLOCK, arenas=2)
    app = flower.superlink_app(folder, host, port)
    state = app.state.linkstate_factory.state()
    admission = Admission(state, folder, say, people, trail)
    admitted = admission.update()
    ending = threading.Event()
    runs = Runs(state, folder, trail, federation.max_runs)
    budgets, progress = PublishedBudgets(folder / "published.json"), Progress(folder / "progress", runs.by)
    calls = flower.FrequentCalls(app)
    gate = Gate(app, people, admission, budgets, runs, trail, progress, calls)
    counted = server_metrics.Counted(gate, _SIDES)
    serving = behind_the_door(gate, folder, listener, counted)
    watching: AbstractContextManager[str | None] = nullcontext()
    if monitor is not None:
        view = ServerView(
            federation.name, federation.server, folder, admission, budgets, progress, runs, trail
        )
        watching = server_metrics.monitor(monitor, view, counted)
    for keep_updated in (admission.keep_updated, runs.keep_updated):
        threading.Thread(target=keep_updated, args=(ending,), daemon=True).start()
    renewed = (ServedCertificate(folder, serving.config.ssl), ending, say)
    threading.Thread(target=keep_certificate, args=renewed, daemon=True).start()
    say(
        f"federation {federation.name} on {host}:{port} (sites reach it as {federation.server}); "
        f"{admitted} sites enrolled"
    )
    trail.note("server started", "server", address=f"{host}:{port}")
    try:
        with watching as at:
            if at is not None:
                say(f"http://{at}/ has its page, /metrics and /healthz")
            serving.run()
    except KeyboardInterrupt:
        pass  # uvicorn has ended as it should, and raises the signal that asked for it again
    finally:
        ending.set()
        trail.note("server ended", "server")
    say("the server has ended; its database keeps nodes and runs")


def behind_the_door(gate: Gate, folder: Path, listener: socket.socket, app: Any = None) -> DoorServer:
    """uvicorn's server for `gate`, or for what stands before it, with the certificate of a server folder."""
    config = uvicorn.Config(
        app or gate,
        ssl_keyfile=str(folder / "server.key"),
        ssl_certfile=str(folder / "server.crt"),
        log_level="error",
        access_log=False,
        timeout_graceful_shutdown=3,
    )
    config.load()
    without_cut_off_requests()
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


class Gate:
    """Passes nodes' calls from enrolled nodes, and operators' calls from whoever has the right to them.

    A credential and a request's size are checked before anything of its body is read, since Flower reads all
    of it before it checks the sender. A request that comes in chunks, whatever length it names beside, has no
    size. One that names two keys is refused, because the gate would read the one and Flower the other.

    Args:
        app: Flower's SuperLink, an ASGI application.
        people: the operators.
        admission: which nodes are let in.
        budgets: where what sites publish is stored.
        runs: whose turn it is to start one.
        trail: where refusals and what operators do are noted.
        progress: where reports of runs are kept.
        calls: answers frequent calls; None: Flower's application does.

    Attributes:
        connections: those that the server has; on one of them a credential is checked once, and Flower
            checks each request of a node again.
    """

    def __init__(
        self,
        app: Any,
        people: Operators,
        admission: Admission,
        budgets: PublishedBudgets | None = None,
        runs: Runs | None = None,
        trail: Trail | None = None,
        progress: Progress | None = None,
        calls: FrequentCalls | None = None,
    ) -> None:
        self._app, self._people, self._admission, self._budgets = app, people, admission, budgets
        self._runs, self._trail, self._progress = runs, trail, progress
        self._calls, self._news = calls, News()
        self.connections, self._bodies = Connections(most_connections()), Bodies()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":
            return None  # websockets are not used
        request = Request(scope)
        if request.path == join.PATH and request.has_no_body:
            # It queries the database, so not in the event loop, which serves everybody.
            answered = await asyncio.to_thread(join.answer, request.headers, self._admission, self._budgets)
            if join.is_refusal(*answered):
                await self._note_refusal(request, "?", 403, "a key that is not enrolled, or no signature")
            return await _respond(send, *answered)
        who, credential, refused = await self._refusal(request)
        if refused is not None:
            await self._note_refusal(request, who, *refused)
            return await _respond(send, refused[0], {"error": refused[1]}, close=True)
        if request.connection is not None:
            self.connections.prove(request.connection, credential)
        if request.path in _OWN:
            return await _respond(send, *await asyncio.to_thread(self._own_answer, request, who))
        if not request.length.isdigit() or b"transfer-encoding" in request.headers:
            error = "A request has to say how long it is."
            return await _respond(send, 411, {"error": error}, close=True)
        length = int(request.length)
        most = MAX_REPORT if request.path == PROGRESS_PATH else _MAX_BODY
        if length > most:
            said = {"error": f"A request may have {most} bytes, and this one has {length}."}
            return await _respond(send, 413, said, close=True)
        of_a_queue = self._runs is not None and request.path in (_START, _TAKE)
        if of_a_queue and (waits := await asyncio.to_thread(self._waits, request, who)):
            return await _respond(send, 429, waits, close=True)
        try:
            async with self._bodies.read(receive, length, credential) as body:
                if request.path == PROGRESS_PATH and self._progress is not None:
                    noted = await asyncio.to_thread(self._progress.note, bytes(body), who)
                    return await _respond(send, *noted)
                passed = Passed(send)
                if self._calls is not None and self._calls.take(scope):
                    await self._answer(scope, receive, passed, bytes(body), credential)
                else:
                    await self._app(scope, _once(body, receive), passed)
                if request.path in _TO_NODES:
                    self._news.came()
        except BodyTimeout:
            error = "The body of the request did not arrive in time."
            return await _respond(send, 408, {"error": error}, close=True)
        if of_a_queue and passed.status == 200:
            await asyncio.to_thread(self._note, request, who, passed)
        return None

    async def _answer(self, scope: Any, receive: Any, send: Any, body: bytes, credential: bytes) -> None:
        """Answers a frequent call; a node's question for messages when there may be one."""
        assert self._calls is not None
        if scope["path"] != QUESTION:
            await self._calls.answer(scope, receive, send, body)
            return
        gone = asyncio.ensure_future(receive())  # the body was read: all that may come is the end
        try:
            known = await self._news.wait(credential, gone)
            if gone.done():
                return  # Flower would give the message away, to nobody
        finally:
            gone.cancel()
        if await self._calls.answer(scope, receive, send, body):
            self._news.note(credential, known)

    async def _note_refusal(self, request: Request, who: str, status: int, reason: str) -> None:
        if self._trail is not None:
            await asyncio.to_thread(self._trail.refused, who, request.address, request.path, status, reason)

    async def _refusal(self, request: Request) -> tuple[str, bytes, tuple[int, str] | None]:
        """(who asks, their credential, why not: HTTP status and reason)."""
        if request.path in FOR_NODES:
            keys = request.all(_NODE_KEY)
            credential = keys[0] if len(keys) == 1 else b""
            refused = self._admission.refusal_of_request(credential)
            if refused is None and not request.has_shown(credential) and not _signed(request.headers):
                refused = 401, "This needs a request that is signed by the node's key."
            return "a node", credential, refused
        right = FOR_OPERATORS.get(request.path)
        if right is None:
            return "?", b"", (403, "This server has no such call.")
        try:
            operator = self._people.who(request.headers, TOKEN_HEADER)
        except ResourceError as error:
            return "?", b"", (503, str(error))
        if operator is None:
            return "?", b"", (403, "This needs an operator's key, or the operator's token.")
        if right not in operator.rights and not self._may_stop_own(request, operator):
            return operator.name, b"", (403, f"Operator {operator.name} has no right to {right}.")
        return operator.name, operator.credential, None

    def _may_stop_own(self, request: Request, operator: Operator) -> bool:
        """Who may submit may stop runs of their own; by our call alone, for Flower's names it in its body."""
        if request.path != STOP_PATH or "submit" not in operator.rights or self._runs is None:
            return False
        return (run := request.run()) is not None and self._runs.by(run) in (operator.name, "?", None)

    def _own_answer(self, request: Request, who: str) -> tuple[int, dict[str, Any]]:
        if request.path == PUBLISHED_PATH:
            return 200, self._budgets.all() if self._budgets else {}
        if request.path == ENROL_PATH:
            return self._admission.changed(
                enrol=request.one(ENROL_HEADER), revoke=request.one(REVOKE_HEADER), by=who
            )
        if self._runs is None:
            return 200, {}
        if request.path == RUNS_PATH:
            return 200, {**self._runs.listed(), "trail": self._trail.head() if self._trail else None}
        run = request.run()
        if request.path == FOLLOW_PATH:
            return self._followed(run, request.one(AFTER_HEADER))
        if run is not None and self._runs.stop(run, who, now=request.one(STOP_HEADER) == "now"):
            return 200, {"stopped": str(run)}
        return 404, {"error": f"No run {request.one(RUN_HEADER)} goes on here."}

    def _followed(self, run: int | None, after: str) -> tuple[int, dict[str, Any]]:
        """What is known of a run: its state, the rounds that were reported after one, the statement."""
        assert self._runs is not None
        state = None if run is None else self._runs.state(run)
        if state is None:
            return 404, {"error": "This server knows no such run; `fedtune status DIR` shows their numbers."}
        status, ended = state
        known = {} if self._progress is None else self._progress.of(str(run))
        least = int(after) if after.isdecimal() and len(after) < 7 else 0
        rounds = [one for one in known.get("rounds", ()) if one["round"] > least]
        about = {"state": status, "ended": ended, "by": str(known.get("by", ""))}
        statement = str(known.get("statement", "")) if ended else ""
        return 200, {**about, "rounds": rounds, "statement": statement}

    def _waits(self, request: Request, who: str) -> dict[str, Any] | None:
        assert self._runs is not None
        ticket = request.one(TICKET_HEADER) or who
        if request.path == _START:
            return self._runs.turn(ticket, who)
        if request.path == _TAKE and not self._runs.may_take(ticket):
            return {"error": "It is another's turn to start a run."}
        return None

    def _note(self, request: Request, who: str, passed: Passed) -> None:
        from fedtune.deploy import flower

        assert self._runs is not None
        ticket = request.one(TICKET_HEADER) or who
        if request.path == _START and (run := flower.run_started(passed.body())) is not None:
            self._runs.started(ticket, who, run)
        elif request.path == _TAKE and (run := flower.task_taken(passed.body())) is not None:
            self._runs.taken(run)


def _signed(headers: dict[bytes, bytes]) -> bool:
    from fedtune.deploy import flower

    return flower.signed_by_node(headers)


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
