"""`fedtune serve MODEL_DIR`: the service (`fedtune.serving.app`) on uvicorn, until it is told to stop.

The folder is checked (`Bundle.open`), the model is loaded and asked once before the port opens. SIGTERM and
Ctrl-C close the port; what was accepted is answered, for `GRACE` seconds at most, and the process ends with
status 0.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.errors import ConfigError, ResourceError
from fedtune.serving.bundle import Bundle
from fedtune.serving.classifier import Classifier

if TYPE_CHECKING:
    from fedtune.serving.app import Limits

__all__ = ["GRACE", "serve"]

GRACE = 60  # seconds for what was accepted
_LAST_CALL = 0.2  # seconds, in which connections that wait for the process are taken and their requests read
_NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    model_dir: Path,
    host: str,
    port: int,
    *,
    wanted: str | None = None,
    threads: int = 0,
    rate: float | None = None,
    waiting: int | None = None,
) -> None:
    """Serves the exported model in `model_dir` until SIGTERM or Ctrl-C.

    Args:
        wanted: the format; None: the fastest that is there.
        threads: of the model; 0: as many as there are cores.
        rate: texts a second from one address; None: any.
        waiting: tokens that may wait; None: as `Limits` has it.

    Raises:
        ModelError: the folder is no export, or not what was exported.
        ConfigError: the format is not there, a number is out of its range, or something is not installed.
        ResourceError: the port is taken.
    """
    _require()
    import uvicorn

    from fedtune.serving.app import Limits, make_app

    limits = _limits(Limits(), rate, waiting)
    bundle = Bundle.open(model_dir)
    model = Classifier.open(bundle, wanted, threads)
    model.logits(model.encode(["a first text"]))  # what is loaded lazily is loaded now
    listener = _listen(host, port)
    logging.basicConfig(stream=sys.stderr, format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("fedtune.serve").setLevel(logging.INFO)
    config = uvicorn.Config(
        make_app(bundle, model, limits),
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=GRACE,
        lifespan="on",
    )
    # uvicorn raises the signal again when it is done; the end that was asked for is no failure.
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: None)
    where = listener.getsockname()
    shown = f"[{where[0]}]" if ":" in where[0] else where[0]
    print(
        f"{bundle.chosen(wanted)} of run {bundle.about['run']}: http://{shown}:{where[1]}/predict", flush=True
    )
    _server(config, listener).run(sockets=[listener])


def _server(config: Any, listener: socket.socket) -> Any:
    """uvicorn's server, which takes in what the system already took for it before it closes the port."""
    import uvicorn

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            listener.listen(0)
            await asyncio.sleep(_LAST_CALL)
            await super().shutdown(sockets)

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
    from dataclasses import replace

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
