"""A port for a server that must have the same one twice, or that another process opens."""

from __future__ import annotations

import itertools
import os
import socket

__all__ = ["free_port"]

_FIRST, _EACH = 20_000, 500  # below those that systems hand out by themselves, to whoever asks for any
_tried = itertools.count()


def free_port() -> int:
    """One that nobody listens at, nor will: each process of a session has ports of its own, each once."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 20
    for number in itertools.islice(_tried, _EACH):
        port = _FIRST + worker * _EACH + number % _EACH
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise OSError(f"no port from {_FIRST + worker * _EACH} on is free")
