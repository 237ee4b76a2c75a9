"""A process that trains for real and is killed for real, again and again: `python -m` with five arguments.

It loads the tiny federation's data and model once and forks a victim for each kill. A victim is a node as
Flower would run it: it reserves in its ledger, trains on its shard, commits, answers, and goes on with the
next round until `kill -9` at a random moment. Two kinds of line say what it did, each written with one system
call: `touched` where a training begins to read data, `left` where an answer leaves the node. After every kill
a fresh ledger object must show all of them. The parent never trains: a fork after torch has trained is not
defined.

Arguments: the configuration as JSON, a folder, the least number of kills, a seed, and what is broken
(`nothing`, or `charge`: a node that charges when it has trained, which must be found out). How many kills
meet a training depends on the machine, so it goes on until `ENOUGH` of them did, or the fault is found out.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from fedtune.config.convert import config_from_json
from fedtune.federation.client.app import app
from fedtune.federation.client.node_context import node_ledger
from fedtune.federation.resources import run_resources
from fedtune.privacy.ledger.ledger import PrivacyLedger, Reservation
from tests.federation.client.test_client_app import Node
from tests.support.tiny_federation import one_thread

ENOUGH = (("in training", 15), ("left", 15), ("unfinished", 15))


def lines(witness: Path) -> list[tuple[str, str, int]]:
    """(what, run, round) of every line that is whole."""
    text = witness.read_text() if witness.exists() else ""
    return [
        (what, run, int(round))
        for what, run, round, _ in (one.split() for one in text.splitlines() if one[-1:] == ".")
    ]


def victim(node: Node, run: str, out: int) -> None:
    """Rounds without end."""
    from fedtune.training import local

    trained, at = local.train_locally, [0]

    def train(*arguments: Any, **options: Any) -> Any:
        os.write(out, f"touched {run} {at[0]} .\n".encode())
        return trained(*arguments, **options)

    local.train_locally = train
    for round in range(1, 10_000):
        at[0] = round
        reply = node.ask(round=round, run=run)
        assert reply.update is not None, reply
        os.write(out, f"left {run} {round} .\n".encode())


def charge_when_trained() -> None:
    """The bug: what is reserved is only remembered, and written when the training has come to its end."""
    reserve, commit = PrivacyLedger.reserve, PrivacyLedger.commit
    wanted: list[Any] = []

    def remembered(self: PrivacyLedger, asked: Any) -> Any:
        wanted.append(asked)
        return Reservation(0, "", asked.node, asked.run, asked.round, 1)

    def written(self: PrivacyLedger, reservation: Any) -> None:
        commit(self, reserve(self, wanted.pop()))

    PrivacyLedger.reserve, PrivacyLedger.commit = remembered, written  # type: ignore[method-assign, assignment]


def main() -> None:
    config, folder, kills, seed, broken = sys.argv[1:]
    one_thread()
    import opacus  # noqa: F401

    node = Node(config_from_json(config))
    run_resources(node.config).warm()
    if broken == "charge":
        charge_when_trained()
    moments, witness, found = random.Random(int(seed)), Path(folder) / "witness", Counter[str]()
    out = os.open(witness, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for kill in range(20 * int(kills)):
        met = all(found[what] >= least for what, least in ENOUGH)
        if found["forgotten"] or (met and kill >= int(kills)):
            break
        run, before = f"run-{kill}", witness.stat().st_size
        child = os.fork()
        if child == 0:
            try:
                victim(node, run, out)
            finally:
                os._exit(1)
        # From the first instructions and the making of the file to the middle of the third round.
        awaited, end = moments.randrange(5), time.monotonic() + 60
        while witness.read_bytes().count(b"\n", before) < awaited and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(moments.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the victim ended by itself"
        ledger = PrivacyLedger(node_ledger().path, shared=True)
        shown = {(one.run, one.round): one.committed for one in ledger.releases()}
        assert ledger.verify()[1] == []
        ledger.close()
        mine = [one for one in lines(witness) if one[1] == run]
        forgotten = [one for one in mine if one[1:] not in shown]
        found["forgotten"] += len(forgotten)
        touched = {one[1:] for one in mine if one[0] == "touched"}
        gone = {one[1:] for one in mine if one[0] == "left"}
        found["left"] += len(gone)
        found["kills"] += 1
        found["in training"] += bool(touched - gone)
        found["unfinished"] += any(not done for (whose, _), done in shown.items() if whose == run)
        found["before training"] += not touched
    print(json.dumps({**found, "shown": len(shown), "app": app is not None}))


if __name__ == "__main__":
    main()
