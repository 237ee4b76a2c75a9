"""Connections that hold a server up, or try to: such as say nothing, and such as send half a request."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator, Mapping
from typing import Any

MIB = 2**20


@contextlib.contextmanager
def crowd(
    address: tuple[str, int], *, idle: int = 0, greeted: int = 0, fat: int = 0, sends: bytes = b""
) -> Iterator[list[Any]]:
    """Holds connections until the block ends: `idle` before their TLS handshake, `greeted` after it, and
    `fat` ones that then send `sends`, or as much of it as the server takes."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    held: list[Any] = []
    try:
        for _ in range(idle):
            held.append(socket.create_connection(address))
        for number in range(greeted + fat):
            with contextlib.suppress(OSError):
                plain = socket.create_connection(address, 5)
                held.append(context.wrap_socket(plain))
                if number >= greeted:
                    held[-1].sendall(sends)
        yield held
    finally:
        for one in held:
            one.close()


def half_a_body(headers: Mapping[str, str], size: int = 31 * MIB) -> bytes:
    """The beginning of a request that announces `size` bytes, with half of them."""
    lines = [
        "POST /v1/fleet/push-object HTTP/1.1", "host: a", "content-type: application/protobuf",
        f"content-length: {size}", *(f"{name}: {value}" for name, value in headers.items()),
    ]  # fmt: skip
    return "\r\n".join([*lines, "", ""]).encode() + bytes(size // 2)
