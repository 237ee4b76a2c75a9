#!/usr/bin/env python
r"""Five nodes behind bad lines: 100 ms latency each way, 1 percent of packets lost, 10 Mbit/s.

    sudo python simulations/deployment/lines.py

Each node runs in a network namespace of its own, and so does the server (`link.py` says how, and that the
machine's kernel had no netem). The same federation runs before over the loopback, for comparison.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from link import SERVER_ADDRESS, Lines
from processes import Federation, Setup, default, quiet_folder, record_of, tiny, write


def run(root: Path, setup: Setup, settings: list[str], lines: Lines | None) -> dict[str, Any]:
    """One run, over the loopback or over the lines."""
    federation = (
        Federation(root, setup)
        if lines is None
        else Federation(root, setup, host=SERVER_ADDRESS, prefix=lines.prefix)
    )
    try:
        started = time.monotonic()
        federation.start_server()
        federation.start_nodes()
        joined = time.monotonic() - started
        folder, seconds = federation.submit("run", *settings)
        record, books = record_of(folder), federation.books()
    finally:
        federation.close()
    rounds = record["metrics"]["by_round"]
    return {
        "seconds_until_all_joined": round(joined, 1),
        "submit_seconds": round(seconds, 1),
        "rounds": record["federation"]["rounds"],
        "seconds_by_round": [round(one["seconds"], 2) for one in rounds],
        "accuracy": record["metrics"]["accuracy"],
        "dropped": record["federation"]["dropped"],
        "bytes_up": record["cost"]["bytes_up"],
        "bytes_down": record["cost"]["bytes_down"],
        "all_books_verify": all(
            one["ledger_verifies"] and one["audit_log_verifies"] for one in books.values()
        ),
    }


def round_trips(prefix: list[str]) -> list[float]:
    """Seconds until the server's machine refuses a connection to a port where nobody listens, five times."""
    code = (
        "import socket, time\n"
        "for _ in range(5):\n"
        "    started = time.monotonic()\n"
        f"    socket.socket().connect_ex(('{SERVER_ADDRESS}', 9))\n"
        "    print(time.monotonic() - started)\n"
    )
    done = subprocess.run([*prefix, sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return [round(float(line), 3) for line in done.stdout.split()]


def main() -> None:
    """Runs it and keeps the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setup", choices=("default", "tiny"), default="tiny")
    parser.add_argument("--nodes", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--latency", type=float, default=0.1, help="seconds, each way")
    parser.add_argument("--loss", type=float, default=0.01, help="of packets")
    parser.add_argument("--rate", type=float, default=10e6, help="bits a second, each way")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("settings", nargs="*")
    arguments = parser.parse_args()
    load = [round(x, 2) for x in os.getloadavg()]
    settings = [f"federation.num_rounds={arguments.rounds}", *arguments.settings]
    with quiet_folder(arguments.folder) as root:
        setup = tiny(root, arguments.nodes) if arguments.setup == "tiny" else default(arguments.nodes)
        loopback = run(root / "loopback", setup, settings, None)
        lines = Lines(
            list(setup.sites),
            latency=arguments.latency,
            loss=arguments.loss,
            bits_per_second=arguments.rate,
        )
        try:
            there_and_back = round_trips(lines.prefix(next(iter(setup.sites))))
            far = run(root / "lines", setup, settings, lines)
        finally:
            lines.close()
        wire = {
            site: {
                "bytes_up": lines.up[site].bytes,
                "bytes_down": lines.down[site].bytes,
                "packets": lines.up[site].packets + lines.down[site].packets,
                "lost": lines.up[site].lost + lines.down[site].lost,
                "overflowed": lines.up[site].overflowed + lines.down[site].overflowed,
            }
            for site in setup.sites
        }
    write(
        "lines",
        {
            "question": "nodes behind bad lines: do they finish, how long, how many bytes",
            "command": f"python simulations/deployment/lines.py {' '.join(sys.argv[1:])}".strip(),
            "setup": setup.name,
            "load_average_before": load,
            "latency_seconds_each_way": arguments.latency,
            "loss": arguments.loss,
            "bits_per_second": arguments.rate,
            "round_trips_seconds": there_and_back,
            "over_lines": far,
            "over_loopback": loopback,
            "on_the_wire": wire,
        },
    )


if __name__ == "__main__":
    main()
