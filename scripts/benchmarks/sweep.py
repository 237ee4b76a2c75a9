"""What a sweep adds to the training of its runs: seconds until each run trains, and overhead in all."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from typing import Any

from scripts.benchmarks.common import write

WORDS = ("privacy.unit=record", "privacy.epsilon=1,2,4,8", "seed=0,1,2,3,4")

# `fedtune run -m` itself, with a display that looks at the clock. A run starts when the one before it has
# returned, trains from `on_start` on, and its rounds end with the last `on_round`; evaluation is in a round.
_SWEEP = """
import json, sys, time
from fedtune.runs import run
from fedtune.runs.display import Display
from fedtune.sweeps.sweep import run_sweep

def now():
    return time.perf_counter(), time.process_time()

marks = [now()]
runs = []

class Watch(Display):
    def on_start(self, info):
        super().on_start(info)
        self.started = now()
    def on_round(self, summary):
        super().on_round(summary)
        self.trained = now()

def start(config, title, *_):
    view = Watch(title, brief=True)
    path = run.run(config, view=view)
    ended = now()
    made = json.loads(path.read_text())
    before = marks[-1]
    runs.append({
        "until_training": view.started[0] - before[0], "until_training_cpu": view.started[1] - before[1],
        "rounds": view.trained[0] - view.started[0], "rounds_cpu": view.trained[1] - view.started[1],
        "after": ended[0] - view.trained[0], "after_cpu": ended[1] - view.trained[1],
        "train_seconds": made["cost"]["train_seconds"],
    })
    marks.append(ended)
    return path

def describe(error):
    raise error

outcome = run_sweep(sys.argv[1:], start, describe=describe, say=lambda line: None, warn=print)
assert not outcome.failures
print("RESULT", json.dumps({"runs": runs, "seconds": now()[0] - marks[1][0]}))
"""


def measure(*words: str) -> dict[str, Any]:
    """Makes one sweep in a process of its own; returns the seconds of each of its runs."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", _SWEEP, *words, f"hydra.sweep.dir={folder}/sweep"],
            capture_output=True,
            text=True,
            check=False,
        )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"the sweep failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(lines[-1][7:])
    return found


def sweep() -> None:
    """Twenty runs, each with another split of the data than the one before it."""
    runs = measure(*WORDS)["runs"]
    later = runs[1:]  # the first also reads, tokenises and loads

    def overhead(suffix: str) -> float:
        spent = sum(one["until_training" + suffix] + one["after" + suffix] for one in later)
        return round(spent / sum(one["rounds" + suffix] for one in later), 4)

    figures = {}
    for suffix in ("", "_cpu"):
        waits = [one["until_training" + suffix] for one in later]
        figures["until_training" + suffix] = {
            "median": round(statistics.median(waits), 3),
            "max": round(max(waits), 3),
        }
    write(
        "sweep",
        {
            "question": "sweep of 20 runs: seconds until each but the first trains; all else over its rounds",
            "overrides": list(WORDS),
            "runs": [{name: round(value, 3) for name, value in one.items()} for one in runs],
            **figures,
            "overhead": overhead(""),
            "overhead_cpu": overhead("_cpu"),
            "target": "until_training max at most 1 s; overhead at most 0.10",
        },
    )
