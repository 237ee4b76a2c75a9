"""How a node and its worker talk: frames on a local socket, and who is on the other end of it.

A frame is a small JSON header and some byte strings (Flower's protobuf messages), each with its length before
it. No pickle: what a frame holds is data, whoever wrote it. The socket lies in a folder that only its owner
can enter, and the kernel tells process and user of whoever connects.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Sequence
from typing import Any

from fedtune.errors import FederationError

__all__ = ["MAX_FRAME", "MAX_MESSAGE", "peer", "receive", "send"]

MAX_MESSAGE = 2**28  # bytes, of one from the server; an adapter has some millions
MAX_FRAME = MAX_MESSAGE + 2**26  # beside the message, what its node remembers of the run
_LENGTH = struct.Struct("!Q")


def send(connection: socket.socket, header: dict[str, Any], parts: Sequence[bytes] = ()) -> None:
    """Sends one frame. Raises FederationError, and sends nothing, where it is larger than any may be."""
    if (size := sum(map(len, parts))) > MAX_FRAME:
        raise FederationError(f"A frame of {size:,} bytes is not sent: at most {MAX_FRAME:,} are taken.")
    data = json.dumps({**header, "lengths": [len(part) for part in parts]}).encode()
    connection.sendall(_LENGTH.pack(len(data)) + data)
    for part in parts:
        connection.sendall(part)


def receive(connection: socket.socket) -> tuple[dict[str, Any], list[bytes]]:
    """One frame. Raises EOFError if the other end is gone, FederationError for what is no frame."""
    size = _LENGTH.unpack(_exactly(connection, _LENGTH.size))[0]
    if size > 100_000:
        raise FederationError(f"A frame's header has {size} bytes; this is not fedtune on the other end.")
    try:
        header = json.loads(_exactly(connection, size))
        lengths = header.pop("lengths")
        right = all(type(length) is int and length >= 0 for length in lengths) and sum(lengths) <= MAX_FRAME
    except (ValueError, KeyError, AttributeError, TypeError):
        right = False
    if not right:
        raise FederationError("A frame's header is malformed or names more bytes than a message may have.")
    return header, [_exactly(connection, length) for length in lengths]


def peer(connection: socket.socket) -> tuple[int, int]:
    """(process id, user id) of the other end, as the kernel knows them."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    process, user, _ = struct.unpack("3i", data)
    return process, user


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        count = connection.recv_into(view[at:])
        if count == 0:
            raise EOFError
        at += count
    return bytes(data)
