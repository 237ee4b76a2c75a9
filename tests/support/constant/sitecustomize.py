"""Makes what a site's mechanisms release a constant, and keeps messages: in the folder FEDTUNE_TEST_KEPT.

Python imports this by itself where its folder is in PYTHONPATH. In a site's worker it does what
`tests.support.byte_for_byte.hold_node_still` says, and writes each message and each answer into a file. In
the process that submits a run it makes what a trusted server releases a constant, and the size of a message
that of its content, for the random numbers that Flower gives a run take one byte more or less.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_KEPT = os.environ.get("FEDTUNE_TEST_KEPT")


def _worker(folder: Path) -> None:
    from fedtune.deploy import channel
    from tests.support.byte_for_byte import content_of, hold_node_still

    hold_node_still(setattr)
    receive, send = channel.receive, channel.send
    asked: list[bytes] = []

    def keep(content: bytes) -> None:
        number = len(list(folder.iterdir()))
        (folder / f"{number:04d}").write_bytes(content)

    def receive_and_keep(connection: Any) -> tuple[dict[str, Any], list[bytes]]:
        from fedtune.federation.flower import deserialize

        header, parts = receive(connection)
        if len(parts) == 2:
            asked.append(content_of(deserialize(parts[0])))
        return header, parts

    def send_and_keep(connection: Any, header: dict[str, Any], parts: Sequence[bytes] = ()) -> None:
        from fedtune.federation.flower import deserialize

        if len(parts) == 2:
            keep(asked.pop() + b"\n=>\n" + content_of(deserialize(parts[0])))
        send(connection, header, parts)

    channel.receive, channel.send = receive_and_keep, send_and_keep


def _server() -> None:
    from fedtune.federation import flower as _flower
    from tests.support.byte_for_byte import content_of, hold_server_still

    # First, for what is imported next takes the function as it finds it.
    _flower.serialized_size = lambda message: len(content_of(message))
    hold_server_still(setattr)


if _KEPT and "fedtune.deploy.worker" in sys.orig_argv:
    _worker(Path(_KEPT))
elif _KEPT and "submit" in sys.orig_argv:
    _server()
