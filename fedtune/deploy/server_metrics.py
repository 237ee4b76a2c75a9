"""What `fedtune server` counts, and what it answers on its administrator's port (`--monitor`).

    /          a page: sites, runs with their curves, statements; read only
    /status.json, /run?id=RUN       what the page shows
    /healthz   the process answers on its main port's loop;   /readyz   so does its database
    /metrics   for Prometheus

Nothing here comes from private records. The server sees what sites send it anyway: that they are connected,
how many messages and bytes, what they publish. Of requests it measures how long the server itself took.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from fedtune.deploy.view import LIVE, ServerView
from fedtune.monitoring.endpoint import Page, as_json, endpoint, watched
from fedtune.monitoring.pages import load_page

if TYPE_CHECKING:
    from fedtune.monitoring.metrics import Reading

__all__ = ["Counted", "monitor", "readings"]

_SECONDS = 5.0  # for an answer of the main loop


class Counted:
    """Counts what passes an ASGI application: requests, bytes, seconds, by whose call it is.

    Args:
        app: the application.
        sides: whose call each path is: a node's or an operator's.
    """

    def __init__(self, app: Any, sides: Mapping[str, str]) -> None:
        self._app, self._sides = app, sides
        self._loop: asyncio.AbstractEventLoop | None = None
        self.requests: Counter[tuple[str, str, str]] = Counter()  # by side, call and status
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.received: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        self._loop = asyncio.get_running_loop()
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        # Names of ours, so that a stranger's path makes no line of its own.
        side = self._sides.get(scope["path"], "stranger")
        call = "other" if side == "stranger" else scope["path"].rpartition("/")[2]
        status, began = "none", time.monotonic()

        async def counted_receive() -> Any:
            message = await receive()
            self.received[side] += len(message.get("body", b""))
            return message

        async def counted_send(message: Any) -> None:
            nonlocal status
            status = str(message.get("status", status))
            self.sent[side] += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, counted_receive, counted_send)
        finally:
            self.requests[side, call, status] += 1
            self.seconds[side] += time.monotonic() - began
        return None

    def lives(self) -> bool:
        """Whether the loop that serves everybody does something within seconds."""
        if self._loop is None:
            return True  # it starts
        try:
            asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self._loop).result(_SECONDS)
        except (FutureTimeout, RuntimeError):
            return False
        return True


def readings(view: ServerView, counted: Counted) -> Iterator[Reading]:
    """All metrics of a server (`fedtune.monitoring.metrics.Readings`)."""
    yield from _of_requests(counted)
    yield from _of_sites(view)
    yield from _of_runs(view)
    days = [((), float(view.days()))]
    yield "fedtune_server_certificate_days", "Until the server's certificate expires.", (), days
    lines = [((), float(view.trail.head().partition("-")[0]))]
    yield "fedtune_server_trail_lines", "Of the audit trail, which only grows.", (), lines


def _of_requests(counted: Counted) -> Iterator[Reading]:
    requests = [(words, float(count)) for words, count in counted.requests.copy().items()]
    labels = ("side", "call", "status")
    yield "fedtune_server_requests_total", "Requests that were answered.", labels, requests
    for name, what, counts in (
        ("request_seconds", "What answering them took.", counted.seconds),
        ("received_bytes", "Bytes of their bodies.", counted.received),
        ("sent_bytes", "Bytes of the answers.", counted.sent),
    ):
        yield f"fedtune_server_{name}_total", what, ("side",), _lines(counts)


def _of_sites(view: ServerView) -> Iterator[Reading]:
    sites = view.sites()
    states = Counter({"online": 0, "offline": 0, "suspended": 0})
    states.update(str(row["state"]) for row in sites)
    yield "fedtune_server_sites", "Enrolled sites.", ("state",), _lines(states)
    connected = [((row["site"],), float(row["state"] == "online")) for row in sites]
    yield "fedtune_server_site_connected", "1 for a site that is connected.", ("site",), connected
    published = [(row["site"], row["budget"]) for row in sites if row["budget"] is not None]
    for name, what, key in (
        ("epsilon_left", "What is left of a budget whose owner publishes it.", "epsilon_left"),
        ("epsilon_budget", "That budget.", "epsilon"),
    ):
        values = [((site,), float(budget[key])) for site, budget in published]
        yield f"fedtune_server_site_{name}", what, ("site",), values


def _of_runs(view: ServerView) -> Iterator[Reading]:
    runs, progress = view.runs(*LIVE), view.progress
    states = Counter({"waiting": len(view.waiting()), **dict.fromkeys(LIVE, 0)})
    states.update(str(row["state"]) for row in runs)
    yield "fedtune_server_runs", "Runs that have not ended; waiting: the queue.", ("state",), _lines(states)
    for name, what, counts in (
        ("rounds", "Rounds that were reported.", progress.rounds),
        ("updates", "Updates in them.", progress.updates),
    ):
        yield f"fedtune_server_{name}_total", what, ("result",), _lines(counts)
    going = [(row["run"], row["last"]) for row in runs if row["last"] is not None]
    for name, what, key in (
        ("round", "The last round of a run that has not ended.", "round"),
        ("rounds", "Of how many.", "num_rounds"),
        ("accuracy", "Its accuracy then, as published.", "accuracy"),
        ("epsilon", "The largest epsilon that it has cost a site.", "epsilon"),
    ):
        values = [((run,), float(last[key])) for run, last in going if last[key] is not None]
        yield f"fedtune_server_run_{name}", what, ("run",), values


def _lines(counts: Mapping[str, float]) -> list[tuple[tuple[str, ...], float]]:
    return [((name,), float(value)) for name, value in dict(counts).items()]


def monitor(listen: str, view: ServerView, counted: Counted) -> AbstractContextManager[str]:
    """The administrator's port of a server; see `fedtune.monitoring.endpoint.endpoint`."""
    from fedtune.monitoring.metrics import Exposition, Readings  # late: only who is watched needs it

    exposition = Exposition()
    Readings(exposition, "server_metrics", lambda: readings(view, counted))
    page, headers = load_page("fedtune.deploy", "server_page.html")

    def ready() -> bool:
        view.admission.nodes()
        return True

    return endpoint(
        listen,
        {
            "/": lambda _: Page(page.encode(), "text/html; charset=utf-8", headers=headers),
            "/status.json": lambda _: as_json(view.status()),
            "/run": lambda asked: as_json(view.progress.of(asked.get("id", ""))),
            **watched(exposition.page, counted.lives, ready),
        },
    )
