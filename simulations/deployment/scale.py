#!/usr/bin/env python
"""Twenty nodes, each two processes, on one machine: do they finish, how long, how many bytes.

python simulations/deployment/scale.py --nodes 20
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from idle import children, memory
from processes import Federation, quiet_folder, record_of, tiny, write


def main() -> None:
    """Runs it and keeps the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("settings", nargs="*")
    arguments = parser.parse_args()
    load = [round(x, 2) for x in os.getloadavg()]
    with quiet_folder(arguments.folder) as root:
        setup = tiny(root, arguments.nodes)
        federation = Federation(root, setup)
        try:
            started = time.monotonic()
            federation.start_server()
            federation.start_nodes()
            joined = time.monotonic() - started
            folder, seconds = federation.submit(
                "run", f"federation.num_rounds={arguments.rounds}", *arguments.settings
            )
            record, books = record_of(folder), federation.books()
            share = 0
            for site in setup.sites:
                process = federation.processes[site].process
                assert process is not None
                share += sum(memory(pid)["pss"] for pid in (process.pid, *children(process.pid)))
        finally:
            federation.close()
    rounds = record["metrics"]["by_round"]
    write(
        f"scale_{arguments.nodes}",
        {
            "question": f"{arguments.nodes} nodes as processes on one machine",
            "command": f"python simulations/deployment/scale.py {' '.join(sys.argv[1:])}",
            "setup": setup.name,
            "load_average_before": load,
            "seconds_until_all_joined": round(joined, 1),
            "submit_seconds": round(seconds, 1),
            "rounds": record["federation"]["rounds"],
            "seconds_by_round": [round(one["seconds"], 2) for one in rounds],
            "updates": arguments.nodes * arguments.rounds - len(record["federation"]["dropped"]),
            "dropped": record["federation"]["dropped"],
            "accuracy": record["metrics"]["accuracy"],
            "bytes_up": record["cost"]["bytes_up"],
            "bytes_down": record["cost"]["bytes_down"],
            "pss_of_all_nodes": share,
            "all_books_verify": all(
                one["ledger_verifies"] and one["audit_log_verifies"] for one in books.values()
            ),
        },
    )


if __name__ == "__main__":
    main()
