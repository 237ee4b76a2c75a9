"""The engine's overhead, memory over nodes and rounds, and how long a person waits for --help."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from scripts.benchmarks.common import seconds, write

_MEMORY = """
import json, psutil, resource, sys
from fedtune.config.loader import load
from fedtune.engines import run
from pathlib import Path
rss, rounds = [], []
class Watch:
    def on_start(self, *a, **k): pass
    def on_client(self, *a, **k): pass
    def on_finish(self, *a, **k): pass
    def on_round(self, summary):
        rss.append(psutil.Process().memory_info().rss)
        rounds.append(summary.seconds)
result = run(load(sys.argv[2:]), Path(sys.argv[1]), Watch())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
times = {'seconds': result.seconds, 'train_seconds': result.train_seconds, 'rounds': rounds}
print('RESULT', json.dumps({'peak': peak, 'after_round': rss, **times}))
"""


def _federation(*overrides: str) -> dict[str, Any]:
    """Runs a federation in a process of its own; returns its peak memory, memory by round, and seconds."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [
                sys.executable,
                "-W",
                "ignore",
                "-c",
                _MEMORY,
                str(Path(folder) / "run"),
                "privacy.unit=record",
                *overrides,
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"the federation failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(lines[-1][7:])
    return result


def engine() -> None:
    """Time of a run in the local engine over the time that its clients train."""
    runs = [
        _federation(
            "adapter=lora",
            "federation.num_rounds=3",
            "train.local_steps=4",
            "train.sample_rate=0.05",
            "federation.evaluation=none",  # the final one would count as the engine's
        )
        for _ in range(3)
    ]
    ratios = [sum(r["rounds"]) / r["train_seconds"] for r in runs[1:]]
    write(
        "engine",
        {
            "question": "seconds of all rounds over the seconds that clients train (4 nodes, warm cache)",
            "runs": runs[1:],
            "start_seconds": [round(r["seconds"] - sum(r["rounds"]), 2) for r in runs[1:]],
            "ratio_median": round(statistics.median(ratios), 4),
            "target": "ratio_median at most 1.05",
        },
    )


def memory() -> None:
    """Peak memory of 4 and of 100 nodes on the same data, and memory after each round."""
    common = ("partition=iid", "adapter=lora", "train.local_steps=1", "train.sample_rate=0.05")
    few = _federation(*common, "federation.nodes=4", "federation.num_rounds=12")
    many = _federation(*common, "federation.nodes=100", "federation.num_rounds=12")
    write(
        "memory",
        {
            "question": "peak memory of 100 nodes over 4 nodes; memory after round 12 over round 3",
            "nodes_4": few,
            "nodes_100": many,
            "ratio_peak": round(many["peak"] / few["peak"], 3),
            "ratio_rounds": round(many["after_round"][-1] / many["after_round"][2], 3),
            "target": "ratio_peak at most 1.10",
        },
    )


def startup() -> None:
    """Seconds of `fedtune --help` and of `fedtune run --help`."""
    command = str(Path(sys.executable).with_name("fedtune"))
    figures = {}
    for name in ("--help", "run --help"):
        arguments = [command, *name.split()]

        def page(arguments: list[str] = arguments) -> None:
            subprocess.run(arguments, capture_output=True, check=True)

        page()
        times = [seconds(page) for _ in range(5)]
        figures[name] = {
            "seconds": [round(t, 3) for t in times],
            "median": round(statistics.median(times), 3),
        }
    write(
        "startup",
        {"question": "seconds of the help pages", "commands": figures, "target": "--help at most 1 s"},
    )
