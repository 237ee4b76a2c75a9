"""`fedtune serve MODEL_DIR...`: the service (`fedtune.serving.app`) on uvicorn, until it is told to stop.

Each folder is checked (`Bundle.open`), each model is loaded and asked once before the port opens. SIGTERM and
Ctrl-C close the port; what was accepted is answered, for `GRACE` seconds at most, and the process ends with
status 0. A connection that takes too long to say what it wants is closed (`fedtune.deploy.door`), and so is
one that waits for its client where there are too many (`fedtune.serving.connections`).
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.errors import ConfigError, ResourceError
from fedtune.monitoring.logs import log_to_stderr, without_cut_off_requests
from fedtune.serving.bundle import Bundle
from fedtune.serving.classifier import Classifier

if TYPE_CHECKING:
    from fedtune.serving.app import Served
    from fedtune.serving.questions import Limits

__all__ = ["GRACE", "KEEP_ALIVE", "serve"]

GRACE = 60  # seconds for what was accepted
# Seconds that a connection may be idle: longer than proxies keep theirs (60 mostly), so that none asks on one
# that is being closed: of 76,000 requests three found it so with uvicorn's own 5 seconds. Where there are too
# many, idle ones make room.
KEEP_ALIVE = 75
# Seconds in which connections that wait for the process are taken and their requests read, and until which
# those that are open are told, with their next answer, that it was the last.
_LAST_CALL, _GOODBYE = 0.2, 1.0
_NEEDED = ("fastapi", "httptools", "uvicorn", "prometheus_client")


def serve(
    model_dirs: Sequence[str],
    host: str,
    port: int,
    *,
    wanted: str | None = None,
    workers: int = 0,
    threads: int = 1,
    rate: float | None = None,
    waiting: int | None = None,
    keys: Path | None = None,
) -> None:
    """Serves exported models until SIGTERM or Ctrl-C.

    Args:
        model_dirs: folders, each by itself or as NAME=FOLDER; without a name a model is called as its run.
        wanted: the format; None: the fastest that is there.
        workers: batches that are computed at once, at most; 0: as many as there are cores.
        threads: of one batch; 0: as many as there are cores.
        rate: texts a second of one client; None: any.
        waiting: tokens that may wait; None: as `Limits` has it.
        keys: the file of keys; None: anybody may ask.

    Raises:
        ModelError: a folder is no export, or not what was exported.
        ConfigError: the format is not there, a number is out of its range, the file of keys cannot be read,
            two models have one name, or something is not installed.
        ResourceError: the port is taken.
    """
    _require()
    import uvicorn

    from fedtune.deploy.door import most_connections
    from fedtune.serving.app import make_app
    from fedtune.serving.connections import BoundedConnection
    from fedtune.serving.keys import Keys
    from fedtune.serving.questions import Limits

    limits = _limits(Limits(), rate, waiting)
    limits = replace(limits, connections=min(limits.connections, most_connections()))
    for name, value in (("workers", workers), ("threads", threads)):
        if value < 0:
            raise ConfigError(f"--{name} {value}: give a number from 1, or 0 for as many as there are cores.")
    known = None if keys is None else Keys.open(keys)
    models = _open(model_dirs, wanted, threads)
    listener = _listen(host, port)
    log_to_stderr(None, as_json=True)  # each request, and warnings of the libraries
    app = make_app(models, limits, keys=known, workers=workers or os.cpu_count() or 1)
    config = uvicorn.Config(
        app,
        http=BoundedConnection,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=GRACE,
        timeout_keep_alive=KEEP_ALIVE,
        lifespan="on",
        server_header=False,
    )
    server = _server(config, listener)
    # uvicorn listens for signals when it runs, and raises them again when it is done: the end that was asked
    # for is no failure then, and before then it is not forgotten.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    where = listener.getsockname()
    shown = f"[{where[0]}]" if ":" in where[0] else where[0]
    what = ", ".join(f"{name} ({served.format})" for name, served in models.items())
    print(f"{what}: http://{shown}:{where[1]}/predict", flush=True)
    server.run(sockets=[listener])


def _open(model_dirs: Sequence[str], wanted: str | None, threads: int) -> Mapping[str, Served]:
    """The models by name."""
    from fedtune.serving.app import Served

    bundles: dict[str, Bundle] = {}
    for text in model_dirs:
        name, _, folder = text.rpartition("=") if not Path(text).exists() else ("", "", text)
        bundle = Bundle.open(Path(folder))
        name = name or str(bundle.about["run"])
        if name in bundles:
            raise ConfigError(
                f"Two models are called {name!r}, and a request names one of them. Give each a name of its "
                f"own: fedtune serve first={bundles[name].folder} second={folder}"
            )
        bundles[name] = bundle
    found = Classifier.open_all(list(bundles.values()), wanted, threads)
    return {
        name: Served(bundle, model, bundle.chosen(wanted))
        for (name, bundle), model in zip(bundles.items(), found, strict=True)
    }


def _server(config: Any, listener: socket.socket) -> Any:
    """uvicorn's server, which takes in what the system already took for it before it closes the port.

    uvicorn then closes connections that are idle, and a client that asks at that moment finds its question
    unread. So each answer says that the connection is closed after it, and idle ones are waited for a little.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            listener.listen(0)
            self.server_state.default_headers.append((b"connection", b"close"))
            await asyncio.sleep(_LAST_CALL)
            for server in self.servers:
                server.close()
            end = time.monotonic() + _GOODBYE - _LAST_CALL
            while self.server_state.connections and time.monotonic() < end:
                await asyncio.sleep(0.05)
            await super().shutdown(sockets)

    without_cut_off_requests()
    return Server(config)


def _require() -> None:
    from importlib.util import find_spec

    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        names = " ".join(missing).replace("_", "-")
        raise ConfigError(
            f"fedtune serve needs {' and '.join(missing)}, which this Python lacks. Install with "
            f"`pip install {names}`."
        )


def _limits(limits: Limits, rate: float | None, waiting: int | None) -> Limits:
    if rate is not None and not 0 < rate < float("inf"):
        raise ConfigError(f"--rate {rate}: give texts a second, above 0, or leave it out for any number.")
    if waiting is not None and waiting < 1:
        raise ConfigError(f"--waiting {waiting}: give a number of tokens, 1 or more.")
    return replace(limits, rate=rate, waiting=limits.waiting if waiting is None else waiting)


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens, so that a port which is taken is an error of one sentence."""
    if not 0 <= port < 65536:
        raise ConfigError(f"--port {port}: a port is a number from 0 (any that is free) to 65535.")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ResourceError(
            f"Cannot listen on {host} port {port}: {error.strerror or error}. Choose another with --host and "
            "--port (0: any that is free)."
        ) from error
