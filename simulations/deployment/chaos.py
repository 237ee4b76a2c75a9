#!/usr/bin/env python
r"""Does a federation end well if its nodes do not behave? One is killed every so often, one slow, one mad.

    python simulations/deployment/chaos.py default                   50 rounds, five nodes, a kill every 20 s
    python simulations/deployment/chaos.py tiny --rounds 8 --kill-every 8

The same federation runs twice: undisturbed, and with a node killed (SIGKILL to node and worker, and started
again, as systemd would) at random every `--kill-every` seconds, one node slow and in every fifth round later
than the deadline, and one that sends garbage in every round. Asked: accuracy of both, and whether all ledgers
and audit logs verify.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

from processes import RECORDS, Federation, Setup, default, quiet_folder, record_of, tiny, write

RESTART = 5.0  # seconds, as in deploy/systemd/fedtune-node.service


class Killer(threading.Thread):
    """Kills one node at random every `every` seconds."""

    def __init__(self, federation: Federation, every: float, seed: int) -> None:
        super().__init__(daemon=True)
        self._federation, self._every = federation, every
        self._chance = random.Random(seed)
        self._begun = time.monotonic()
        self.ending = threading.Event()
        self.killed: list[dict[str, Any]] = []

    def run(self) -> None:
        """Until `ending` is set."""
        sites = list(self._federation.setup.sites)
        while not self.ending.wait(self._every):
            site = self._chance.choice(sites)
            at = round(time.monotonic() - self._begun, 1)
            self._federation.processes[site].kill()
            self.killed.append({"second": at, "site": site})


def one(
    root: Path, setup: Setup, settings: list[str], *, disturbed: bool, every: float, late: float, seed: int
) -> dict[str, Any]:
    """One run of the federation, as a part of the record."""
    federation = Federation(root, setup)
    sites = list(setup.sites)
    strange = {sites[-2]: ("slow", "2", str(late)), sites[-1]: ("garbage",)} if disturbed else {}
    killer = Killer(federation, every, seed)
    try:
        federation.start_server()
        federation.start_nodes(wait=RESTART if disturbed else None, strange=strange)
        if disturbed:
            killer.start()
        folder, seconds = federation.submit("run", *settings)
        killer.ending.set()
        record = record_of(folder)
        books = federation.books()
    finally:
        killer.ending.set()
        federation.close()
    dropped = collections.Counter(
        f"{drop['node']}: {' '.join(drop['reason'].split())[:110]}"
        for drop in record["federation"]["dropped"]
    )
    return {
        "seconds": round(seconds, 1),
        "accuracy": record["metrics"]["accuracy"],
        "rounds": record["federation"]["rounds"],
        "epsilon": record["privacy"]["epsilon"],
        "accuracy_by_round": [round(r["accuracy"], 4) for r in record["metrics"]["by_round"]],
        "seconds_by_round": [round(r["seconds"], 1) for r in record["metrics"]["by_round"]],
        "bytes_up": record["cost"]["bytes_up"],
        "bytes_down": record["cost"]["bytes_down"],
        "kills": killer.killed,
        "starts": {site: federation.processes[site].starts for site in sites},
        "dropped": dict(dropped.most_common()),
        "strange": {site: " ".join(words) for site, words in strange.items()},
        "books": books,
    }


def study(
    root: Path, setup: Setup, rounds: int, every: float, timeout: float, seed: int, *more: str
) -> dict[str, Any]:
    """Both runs. The first one computes what is cached (frozen layers), so it may take its time."""
    common = [f"federation.num_rounds={rounds}", "privacy.epsilon=8", "privacy.delta=1e-4", *more]
    kept = root / "undisturbed.json"  # a study that was interrupted goes on from here
    if kept.exists():
        quiet = json.loads(kept.read_text())
    else:
        quiet = one(
            root / "undisturbed", setup, common, disturbed=False, every=every, late=2 * timeout, seed=seed
        )
        kept.write_text(json.dumps(quiet))
    settings = [*common, f"federation.round_timeout={timeout:g}"]
    wild = one(root / "disturbed", setup, settings, disturbed=True, every=every, late=2 * timeout, seed=seed)
    whole = all(
        book["ledger_verifies"] and book["audit_log_verifies"] and book["releases"] >= book["released"]
        for run in (quiet, wild)
        for book in run["books"].values()
    )
    return {
        "accuracy_lost_in_points": round(100 * (quiet["accuracy"] - wild["accuracy"]), 2),
        "all_books_verify": whole,
        "undisturbed": quiet,
        "disturbed": wild,
    }


def main() -> None:
    """Runs it and keeps the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("setup", choices=("default", "tiny"))
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--kill-every", type=float, default=20.0)
    parser.add_argument("--timeout", type=float, default=20.0, help="federation.round_timeout when disturbed")
    parser.add_argument("--seed", type=int, default=0, help="of who is killed")
    parser.add_argument("--folder", type=Path, help="keep what was made here")
    parser.add_argument("--records", type=Path, default=RECORDS)
    parser.add_argument("settings", nargs="*", help="overrides of both runs")
    arguments = parser.parse_args()
    load = [round(x, 2) for x in os.getloadavg()]
    with quiet_folder(arguments.folder) as root:
        setup = tiny(root, 5, rows=1000) if arguments.setup == "tiny" else default(5)
        found = study(
            root,
            setup,
            arguments.rounds,
            arguments.kill_every,
            arguments.timeout,
            arguments.seed,
            *arguments.settings,
        )
    write(
        f"chaos_{setup.name}",
        {
            "question": "a node killed at random every so often, one slow, one mad: what is lost",
            "command": f"python simulations/deployment/chaos.py {' '.join(sys.argv[1:])}",
            "target": "accuracy_lost_in_points at most 1, all_books_verify",
            "load_average_before": load,
            "kill_every_seconds": arguments.kill_every,
            "round_timeout_seconds": arguments.timeout,
            **found,
        },
        arguments.records,
    )


if __name__ == "__main__":
    main()
