#!/usr/bin/env python
r"""Fifty sites at one server: what a round costs there, and does its memory grow with the rounds.

    python simulations/deployment/fifty.py --nodes 50 --minutes 8
    python simulations/deployment/fifty.py --nodes 50 --minutes 30 --day    until a day's rounds are done

With `--day` the rounds follow each other at once, as many as a day has at one in ten minutes (144): the
server sees a day's messages, but not a day's heartbeats, questions and logs. Where the minutes end before,
the growth a round that was measured is continued to that number, which the record says.

The server is the product, a process of its own, and so is the submitting side (the real loop over rounds,
its checkpoint, its reports). The sites are the product's but for what trains: connection over TLS with a key
each, message loop, policy, ledger and audit log are real; model, data and training are the simulator's toys
(`scripts/simulator/toys.py`), and all sites are threads of one process, for fifty workers with torch need
more memory than a small machine has. So a round here is what the transport and the books cost, with no
training in it; sites on machines of their own have a processor each, and these share one.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import psutil
import yaml
from processes import Federation, Setup, quiet_folder, write

from scripts.simulator.toys import SCENARIOS, SIZE, ToyServer, site_values, toys

A_DAY = 144  # rounds, one in ten minutes


class ToyWorker:
    """In the place of a site's worker process: the same answers, from toys, in this process."""

    lock = threading.Lock()  # Flower keeps the identity of a task once a process

    def __init__(self, site: Any) -> None:
        self._site = site

    def ask(self, message: bytes, context: bytes, header: dict[str, int], *more: Any) -> list[bytes]:
        """As `WorkerProcess.ask`."""
        from fedtune.deploy.worker import answer

        return answer(message, context, header, self._site)


def be_site(folder: Path, joined: list[str]) -> None:
    """Joins as the site of a folder, and answers until the process ends."""
    from fedtune.deploy import authorities, certificates, flower, join
    from fedtune.deploy.leaving import Leaving
    from fedtune.deploy.message_loop import MessageHandler, run_message_loop
    from fedtune.deploy.node import guard
    from fedtune.deploy.node_metrics import NodeActivity
    from fedtune.deploy.site import books_of, open_ledger, read_site
    from fedtune.deploy.thin_app import AppAllowList

    def say(line: str) -> None:
        print(f"{folder.name}: {line}", flush=True)

    site = read_site(folder / "node.yaml")
    key = certificates.load_private_key(Path(site.key))
    open_ledger(site, setting=True)
    books, activity, apps = books_of(site), NodeActivity(), AppAllowList()
    join.check_in(site, key, say, books=books)
    state, store = flower.node_state(lambda: joined.append(site.site))
    leaving = Leaving(60.0, say)
    handler = MessageHandler(state, store, site, ToyWorker(site), apps, leaving, activity)  # type: ignore[arg-type]

    def answers() -> bool:
        with ToyWorker.lock:
            return handler()

    run_message_loop(
        state,
        store,
        server=site.server,
        authority=authorities.trusted(site),
        key=key,
        node_config={"site": site.to_json()},
        guard=partial(guard, apps=apps, books=books, activity=activity),
        answer=answers,
        leaving=leaving,
        say=say,
    )


def be_sites(root: Path) -> None:
    """All sites below a folder, until this process is killed."""
    from fedtune.federation.flower import quiet

    quiet()
    import numpy as np

    from fedtune.privacy.ledger import ledger

    joined: list[str] = []
    folders = sorted(root.glob("site-*/node.yaml"))
    ledger._MOST_OPEN = 2 * len(folders)  # a thread closes no ledger that another one writes
    with toys(lambda site, run, round, share: np.full(SIZE, 0.01, dtype=np.float32)):
        for path in folders:
            threading.Thread(target=be_site, args=(path.parent, joined), daemon=True).start()
            time.sleep(0.1)
        while len(joined) < len(folders):
            time.sleep(0.2)
        print("all have joined", flush=True)
        threading.Event().wait()


def be_submitter(server: Path, run_dir: Path, rounds: int) -> None:
    """The loop over rounds, with toys where it would load a model; prints when each round was done."""
    from fedtune.config.convert import to_json
    from fedtune.deploy.client import Server
    from fedtune.deploy.progress import Reporter
    from fedtune.deploy.submit import run_number_in, submitted_run
    from fedtune.federation.events import Observers, RoundSummary
    from fedtune.federation.server.loop import run_rounds

    class Shown(Reporter):
        def on_round(self, summary: RoundSummary) -> None:
            print(f"round {summary.round} {time.time():.3f} {summary.updates}", flush=True)
            super().on_round(summary)

    config = SCENARIOS["local"].config()
    config.engine.name = "deployment"
    config.federation.num_rounds, config.federation.round_timeout = rounds, 300.0
    found = Server.of(server)
    run_dir.mkdir(parents=True)
    with submitted_run(found, to_json(config), run_dir, None) as (grid, lost):
        number = str(run_number_in(run_dir / "checkpoint" / "server-run"))
        told = Observers(Shown(number, found.report))
        run_rounds(grid, config, run_dir, told, server_side=ToyServer(), stop=lost)


def server_memory(federation: Federation) -> float:
    """Megabytes that the server's process has resident."""
    process = federation.processes["server"].process
    assert process is not None
    if process.poll() is not None:  # one that was killed would look like one that needs no memory
        raise SystemExit(f"the server ended with status {process.returncode}: nothing was measured")
    return round(psutil.Process(process.pid).memory_info().rss / 1e6, 1)


def study(root: Path, nodes: int, minutes: float, most: int = 2000) -> dict[str, Any]:
    """The record."""
    row = [{"text": "a", "label": "a"}]
    sites = {f"site-{number + 1:02d}": row for number in range(nodes)}
    federation = Federation(root, Setup("toy", "toy", sites, row, ()), max_rounds=100_000)
    for site in sites:
        path, values = root / site / "node.yaml", site_values(site, str(root / site))
        node = yaml.safe_load(path.read_text())
        node["data"] |= values["data"]
        node["permit"] |= {**values["permit"], "max_rounds": 100_000}
        node["budget"] |= {"epsilon": 1e6, "delta": 1e-2, "unit": "record"}
        path.write_text(yaml.safe_dump(node))
    try:
        federation.start_server()
        alone = server_memory(federation)
        federation.start("sites", "sites", root, script="fifty.py")
        federation.until("sites", "all have joined")
        time.sleep(20)
        joined, idle = server_memory(federation), _share(federation)
        federation.start("submit", "submitter", federation.server, root / "run", 2000, script="fifty.py")
        federation.until("submit", "round 1 ")
        by_round, end = [server_memory(federation)], time.monotonic() + 60 * minutes
        points = [(1, by_round[0])]
        submit = federation.processes["submit"].process
        assert submit is not None
        while time.monotonic() < end and submit.poll() is None and points[-1][0] < most:
            time.sleep(5)
            by_round.append(server_memory(federation))
            points.append((federation.log("submit").count("\nround "), by_round[-1]))
        lines = [line.split() for line in federation.log("submit").splitlines() if line.startswith("round ")]
    finally:
        federation.close()
    times = [float(line[2]) for line in lines]
    seconds = [after - before for before, after in pairwise(times)]
    later = points[len(points) // 3 :]  # after what the first rounds load
    growth, start = linear_regression(*zip(*later, strict=True))
    return {
        "nodes": nodes,
        "rounds": len(lines),
        "updates": sum(int(line[3]) for line in lines),
        "round_seconds": {
            "median": round(median(seconds), 2), "largest": round(max(seconds), 2),
            "over_the_slowest_training": "all of it: a toy's training takes no time",
        },
        "megabytes_of_the_server": {
            "before_any_joined": alone, "all_joined": joined, "after_round_1": by_round[0],
            "largest": max(by_round), "at_the_end": by_round[-1], "every_5_seconds": by_round,
        },
        "growth_of_the_server": {
            "megabytes_a_round": round(growth, 4), "fitted_from_round": later[0][0], "to_round": later[-1][0],
            f"megabytes_after_{A_DAY}_rounds_by_the_fit": round(start + growth * A_DAY, 1),
        },
        "server_percent_of_a_core_while_all_are_idle": idle,
        "said": federation.log("submit")[-300:] if not lines else "",
    }  # fmt: skip


def _share(federation: Federation) -> float:
    process = federation.processes["server"].process
    assert process is not None
    return float(psutil.Process(process.pid).cpu_percent(20.0))


def main() -> None:
    """Runs it and keeps the record."""
    if sys.argv[1] == "sites":
        be_sites(Path(sys.argv[2]))
        return
    if sys.argv[1] == "submitter":
        be_submitter(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--day", action="store_true", help=f"end after {A_DAY} rounds; a record of its own")
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    load = [round(x, 2) for x in os.getloadavg()]
    with quiet_folder(arguments.folder) as root:
        most = A_DAY if arguments.day else 2000
        found = study(root, arguments.nodes, arguments.minutes, most)
    write(
        f"{'day' if arguments.day else 'many'}_{arguments.nodes}",
        {
            "question": "many sites at one server: what does a round cost, and does the server's memory grow",
            "command": (
                f"python simulations/deployment/fifty.py --nodes {arguments.nodes} "
                f"--minutes {arguments.minutes:g}{' --day' if arguments.day else ''}"
            ),
            "target": "5 s over the slowest training; the server at most 300 MB after a day of rounds",
            "load_average_before": load,
            **found,
        },
    )


if __name__ == "__main__":
    main()
