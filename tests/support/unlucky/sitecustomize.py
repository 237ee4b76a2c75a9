"""Makes a site's worker die, or answer garbage, over chosen messages: those in the file FEDTUNE_TEST_UNLUCKY.

The file has words such as `1:advertise 3:mask 2:train 4:garbage`, each a round and what happens in it; it is
read anew for every message. Python imports this by itself where its folder is in PYTHONPATH. Over `mask` and
`train` a worker dies with the release charged and before anything of it has left; over the others before it
has begun.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_FILE = os.environ.get("FEDTUNE_TEST_UNLUCKY")


def _chosen(round: str, what: str) -> bool:
    try:
        return f"{round}:{what}" in Path(str(_FILE)).read_text().split()
    except OSError:
        return False


def _garbage(data: bytes) -> bytes:
    """The answer, with an update of which nothing is finite."""
    import numpy as np
    from flwr.app import Array, ArrayRecord

    from fedtune.federation.flower import deserialize, serialize

    reply = deserialize(data)
    record = reply.content["update"]
    assert isinstance(record, ArrayRecord)
    nothing = {key: Array(np.full(one.numpy().shape, np.nan, np.float32)) for key, one in record.items()}
    reply.content["update"] = ArrayRecord(nothing)
    return serialize(reply)


def _watch() -> None:
    from fedtune.deploy import channel

    receive, send = channel.receive, channel.send
    now = ["", ""]  # round and kind of the message that is answered

    def receive_and_die(connection: Any) -> tuple[dict[str, Any], list[bytes]]:
        header, parts = receive(connection)
        now[:] = ["", ""]
        if len(parts) == 2:
            from flwr.proto.message_pb2 import Message

            message = Message()
            message.ParseFromString(parts[0])
            now[:] = [message.metadata.group_id, message.metadata.message_type.rpartition("_")[2]]
            if now[1] in ("advertise", "share", "unmask") and _chosen(*now):
                os.kill(os.getpid(), signal.SIGKILL)
        return header, parts

    def send_or_die(connection: Any, header: dict[str, Any], parts: Sequence[bytes] = ()) -> None:
        if now[1] in ("mask", "train") and _chosen(*now):
            os.kill(os.getpid(), signal.SIGKILL)
        if now[1] == "train" and _chosen(now[0], "garbage"):
            parts = [_garbage(parts[0]), *parts[1:]]
        send(connection, header, parts)

    channel.receive, channel.send = receive_and_die, send_or_die


if _FILE and "fedtune.deploy.worker" in sys.orig_argv:
    _watch()
