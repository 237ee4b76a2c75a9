#!/usr/bin/env python
r"""What does a node cost that has nothing to do: share of a core, and memory over the encoder.

    python simulations/deployment/idle.py default

Three nodes take part in a run of two rounds, so that encoder and data are loaded, and are then watched while
nothing is asked of them: in the minute right after the last round and in one later. A node is two processes,
`fedtune node` (Flower's SuperNode) and its worker; both are counted. After `limits.idle_seconds` (made short
here) the worker has ended; what is left is measured too, and a second run, which starts it again.

Memory is PSS: pages that processes share are divided among them, so for one node
alone on its machine RSS is shown too.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from processes import Federation, default, quiet_folder, record_of, tiny, write


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, in seconds."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def memory(pid: int) -> dict[str, int]:
    """Bytes of a process: resident, its share of them, and what only it has."""
    found = psutil.Process(pid).memory_full_info()
    return {"rss": found.rss, "pss": found.pss, "private": found.uss}


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [child.pid for child in psutil.Process(pid).children()]


def watch(processes: dict[str, int], seconds: float) -> dict[str, float]:
    """Percent of a core that each process used in the next `seconds`."""
    before = {name: cpu_seconds(pid) for name, pid in processes.items()}
    started = time.monotonic()
    time.sleep(seconds)
    passed = time.monotonic() - started
    return {
        name: round(100 * (cpu_seconds(pid) - before[name]) / passed, 3) for name, pid in processes.items()
    }


def bare(imports: str) -> int:
    """Resident bytes of an interpreter that has imported this and nothing else."""
    code = f"import {imports}, psutil\nprint(psutil.Process().memory_info().rss)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    return int(done.stdout.split()[-1])


def main() -> None:
    """Runs it and keeps the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("setup", choices=("default", "tiny"))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("settings", nargs="*")
    arguments = parser.parse_args()
    load = [round(x, 2) for x in os.getloadavg()]
    with quiet_folder(arguments.folder) as root:
        setup = tiny(root, 3) if arguments.setup == "tiny" else default(3)
        federation = Federation(root, setup, idle_seconds=2 * arguments.seconds + 30.0)
        try:
            federation.start_server()
            federation.start_nodes()
            folder, awake = federation.submit("run", "federation.num_rounds=2", *arguments.settings)
            ended = time.monotonic()
            processes: dict[str, int] = {}
            for site in setup.sites:
                process = federation.processes[site].process
                assert process is not None
                (worker,) = children(process.pid)
                processes |= {f"{site} node": process.pid, f"{site} worker": worker}
            server = federation.processes["server"].process
            assert server is not None
            first = watch({**processes, "server": server.pid}, arguments.seconds)
            bytes_of = {name: memory(pid) for name, pid in processes.items()}
            later = watch({**processes, "server": server.pid}, arguments.seconds)
            since = time.monotonic() - ended
            encoder = record_of(folder)["cost"]["encoder_bytes"]
            for site in setup.sites:
                federation.until(site, "the worker has ended")
            resting = {name: memory(pid) for name, pid in processes.items() if psutil.pid_exists(pid)}
            _, rested = federation.submit("again", "federation.num_rounds=2", *arguments.settings)
        finally:
            federation.close()
    nodes: dict[str, dict[str, Any]] = {}
    for site in setup.sites:
        mine = [f"{site} node", f"{site} worker"]
        nodes[site] = {
            "percent_of_a_core_first": round(sum(first[name] for name in mine), 3),
            "percent_of_a_core_later": round(sum(later[name] for name in mine), 3),
            "pss": sum(bytes_of[name]["pss"] for name in mine),
            "rss": sum(bytes_of[name]["rss"] for name in mine),
            "rss_over_encoder": sum(bytes_of[name]["rss"] for name in mine) - encoder,
            "pss_over_encoder": sum(bytes_of[name]["pss"] for name in mine) - encoder,
        }
    write(
        f"idle_{setup.name}",
        {
            "question": "share of a core and memory of a node that waits between rounds",
            "command": f"python simulations/deployment/idle.py {' '.join(sys.argv[1:])}",
            "target": "under 1 percent of a core; memory at most the encoder plus 400 MB",
            "load_average_before": load,
            "seconds_watched": arguments.seconds,
            "seconds_since_the_run": round(since, 1),
            "encoder_bytes": encoder,
            "nodes": nodes,
            "processes": {
                name: {"percent_first": first[name], "percent_later": later[name], **bytes_of[name]}
                for name in processes
            },
            "resting": resting,
            "submit_seconds": {"first": round(awake, 1), "of_resting_nodes": round(rested, 1)},
            "server_percent": {"first": first["server"], "later": later["server"]},
            "for_comparison_rss": {
                "python": bare("sys"),
                "flwr.supernode": bare("flwr.supernode.start_client_internal"),
                "torch": bare("torch"),
                "torch and transformers' BERT": bare("transformers.models.bert.modeling_bert"),
                "torch, BERT and peft": bare("peft, transformers.models.bert.modeling_bert"),
            },
        },
    )


if __name__ == "__main__":
    main()
