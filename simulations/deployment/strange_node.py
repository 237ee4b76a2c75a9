#!/usr/bin/env python
"""`fedtune node`, gone wrong: what a federation must survive from one of its own sites.

    strange_node.py slow SECONDS LATE node --config node.yaml     answers late, every fifth time LATE seconds
    strange_node.py garbage node --config node.yaml               sends another kind of nonsense each round

Node, worker, ledger and audit log are the product's; only the answer is touched, before Flower has it.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from processes import REPOSITORY

assert str(REPOSITORY) in sys.path

Ask = Callable[..., list[bytes]]


def slow(ask: Ask, seconds: float, late: float) -> Ask:
    """Waits before each answer."""
    count = itertools.count(1)

    def asking(*args: Any) -> list[bytes]:
        data = ask(*args)
        time.sleep(late if next(count) % 5 == 0 else seconds)
        return data

    return asking


def garbage(ask: Ask) -> Ask:
    """Replaces each update by something else that is none."""
    from flwr.app import Array, ArrayRecord, ConfigRecord

    from fedtune.federation.flower import deserialize, serialize

    count = itertools.count()

    def asking(*args: Any) -> list[bytes]:
        data = ask(*args)
        reply = deserialize(data[0])
        if not reply.has_content() or "update" not in reply.content:
            return data
        kind = next(count) % 7
        values = reply.content["update"]["update"].numpy().copy()
        if kind == 0:
            values[:] = np.nan
        elif kind == 1:
            values[:] = 1e6
        elif kind == 2:
            values = values[:-1]
        elif kind == 3:
            values = values.astype(np.float64)
        elif kind == 4:
            said = dict(reply.content["reply"])
            reply.content["reply"] = ConfigRecord({**said, "round": said["round"] + 1})
        elif kind == 5:
            reply.content["more"] = ConfigRecord({"answer": 42})
        else:
            return [b"this is no message", data[1]]
        reply.content["update"] = ArrayRecord({"update": Array(values)})
        return [serialize(reply), data[1]]

    return asking


def main() -> int:
    """Runs fedtune's own command with the worker's answers replaced."""
    from fedtune.cli.app import main as fedtune
    from fedtune.deploy import node

    kind, *rest = sys.argv[1:]
    worker: Any = node.WorkerProcess
    if kind == "slow":
        worker.ask = slow(worker.ask, float(rest[0]), float(rest[1]))
        rest = rest[2:]
    else:
        worker.ask = garbage(worker.ask)
    return fedtune(rest)


if __name__ == "__main__":
    sys.exit(main())
