"""A port of a process' own administrator: /healthz, /readyz, /metrics, and pages to look at. Read only.

It is apart from the port that others use: what it says is for whoever runs the process. By default that is
this machine alone; it asks nobody who they are, so on another address let a firewall or a proxy ask.

On the loopback a request that names another host is refused, for a page that somebody reads in a browser here
could otherwise read this one (DNS rebinding). At most `_AT_ONCE` are answered at once, each within
twice `_SECONDS`; one more is closed.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from fedtune.errors import ConfigError, ResourceError

__all__ = ["PORT", "Page", "Pages", "as_json", "endpoint", "parse_listen", "watched"]

PORT = 9464  # of an exporter of metrics, by custom
_SECONDS = 10.0
_AT_ONCE = 16
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Page:
    """An answer."""

    body: bytes
    kind: str = "text/plain; charset=utf-8"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


Pages = Mapping[str, Callable[[Mapping[str, str]], Page]]


def as_json(value: Any, status: int = 200) -> Page:
    """A page of JSON. Raises ValueError for a number that JSON does not have."""
    return Page(json.dumps(value, allow_nan=False).encode(), "application/json", status)


def watched(metrics: Callable[[], bytes], lives: Callable[[], bool], ready: Callable[[], bool]) -> Pages:
    """The pages that every process has.

    Args:
        metrics: the exposition for Prometheus.
        lives: whether it is worth keeping: /healthz says 200, or 503, at which a supervisor starts it again.
        ready: whether it does its work now: /readyz says 200, or 503.
    """

    def said(word: str, check: Callable[[], bool]) -> Callable[[Mapping[str, str]], Page]:
        return lambda _: as_json({"status": word}) if check() else as_json({"status": f"not {word}"}, 503)

    return {
        "/healthz": said("alive", lives),
        "/readyz": said("ready", ready),
        "/metrics": lambda _: Page(metrics(), "text/plain; version=0.0.4; charset=utf-8"),
    }


def parse_listen(text: str) -> tuple[str, int]:
    """(host, port) of `PORT` (this machine alone), `HOST:PORT` or `[IPV6]:PORT`.

    Raises:
        ConfigError: it is something else.
    """
    host, _, port = text.strip().rpartition(":")
    host = host.removeprefix("[").removesuffix("]") or "127.0.0.1"
    if not (port.isascii() and port.isdigit() and int(port) < 65536) or " " in host:
        raise ConfigError(
            f"--monitor {text!r}: give a port, as {PORT} (on this machine alone), or HOST:PORT, as "
            f"0.0.0.0:{PORT} (whoever reaches this machine reads it)."
        )
    return host, int(port)


@contextmanager
def endpoint(listen: str, pages: Pages) -> Iterator[str]:
    """Answers for the pages until the block ends.

    Args:
        listen: as `parse_listen` takes it; port 0 is any that is free.
        pages: by their paths; each is made of the query's words, in a thread of its own.

    Yields:
        The address, HOST:PORT.

    Raises:
        ConfigError: `listen` is no address.
        ResourceError: the port is taken.
    """
    host, port = parse_listen(listen)
    try:
        server = _Server((host, port), pages)
    except OSError as error:
        raise ResourceError(
            f"--monitor {listen}: cannot listen there ({error.strerror or error}). Choose another port."
        ) from error
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        name, bound = str(server.server_address[0]), server.server_address[1]
        yield f"[{name}]:{bound}" if ":" in name else f"{name}:{bound}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(_SECONDS)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], pages: Pages) -> None:
        self.pages, self.free = pages, threading.BoundedSemaphore(_AT_ONCE)
        self.ends: dict[socket.socket, float] = {}  # until when each may last
        family, *_, where = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
        self.address_family = family
        super().__init__(where[:2], _Handler)  # type: ignore[arg-type]
        self.is_local = ipaddress.ip_address(str(self.server_address[0]).partition("%")[0]).is_loopback

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self.free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        self.ends[request] = time.monotonic() + 2 * _SECONDS
        try:
            super().process_request_thread(request, client_address)
        finally:
            del self.ends[request]
            self.free.release()

    def service_actions(self) -> None:
        # `timeout` below is of one read: a byte every nine seconds would hold a place for ever.
        for request, end in list(self.ends.items()):
            if time.monotonic() > end:
                _close(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.debug("a request to the endpoint broke", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = _SECONDS  # of each read and write
    server_version, sys_version = "fedtune", ""

    def do_GET(self) -> None:
        self._send(self._answer())

    def do_HEAD(self) -> None:
        self._send(self._answer(), body=False)

    def _answer(self) -> Page:
        if self.server.is_local and not _names_loopback(self.headers.get("Host", "")):
            return Page(b"This is for this machine alone.\n", status=403)
        asked = urlsplit(self.path)
        make = self.server.pages.get(asked.path)
        if make is None:
            return Page(("There is " + ", ".join(self.server.pages) + "\n").encode(), status=404)
        try:
            return make(dict(parse_qsl(asked.query, max_num_fields=10)))
        except Exception as error:
            _log.warning("%s cannot be answered: %s", asked.path, error)
            return Page(b"It cannot be told now; the log says why.\n", status=503)

    def _send(self, page: Page, *, body: bool = True) -> None:
        self.send_response(page.status)
        headers = {"Content-Type": page.kind, "Content-Length": str(len(page.body)), **page.headers}
        for name, value in {"Cache-Control": "no-store", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(page.body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: whoever asks every few seconds is no news."""


def _close(request: socket.socket) -> None:
    with contextlib.suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)


def _names_loopback(host: str) -> bool:
    name = ""
    with contextlib.suppress(ValueError):
        name = urlsplit(f"//{host}").hostname or ""
        return ipaddress.ip_address(name).is_loopback
    return name == "localhost"
