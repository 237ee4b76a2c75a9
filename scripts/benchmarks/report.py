"""How long `fedtune report` takes over many runs, and how large its page is."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from scripts.benchmarks.common import OUTPUT, seconds, write

COUNTS = (1_000, 10_000)
SEEDS = 3


def _fill(folder: Path, count: int) -> None:
    """`count` runs like those of the frontier studies, `SEEDS` of each configuration, a hundred a folder."""
    studies = sorted(OUTPUT.parent.glob("*_frontier/records/*/record.json"))
    originals = [json.loads(path.read_text(encoding="utf-8")) for path in studies]
    for i in range(count):
        made = copy.deepcopy(originals[i // SEEDS % len(originals)])
        made["run"]["id"], made["run"]["seed"] = f"{i:016x}", i % SEEDS
        made["config"]["seed"] = i % SEEDS
        made["config"]["train"]["learning_rate"] = round(1e-4 * (1 + i // SEEDS), 4)
        run = folder / str(i // 100) / str(i)
        run.mkdir(parents=True)
        (run / "record.json").write_text(json.dumps(made), encoding="utf-8")


def _measure(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "fedtune.cli.app", "report", str(folder)]
    before = os.times()
    took = seconds(lambda: subprocess.run(command, check=True, capture_output=True))
    after = os.times()
    busy = after.children_user + after.children_system - before.children_user - before.children_system
    return {
        "seconds": round(took, 1),
        "processor_seconds": round(busy, 1),
        "page_megabytes": round((folder / "report.html").stat().st_size / 1e6, 2),
    }


def report() -> None:
    """Seconds of the whole command, from a cold start of Python to the last file."""
    sizes = {}
    for count in COUNTS:
        with tempfile.TemporaryDirectory() as folder:
            _fill(Path(folder), count)
            sizes[f"{count:,} runs"] = _measure(Path(folder))
    write(
        "report",
        {
            "question": "seconds of `fedtune report`, and megabytes of its page",
            "sizes": sizes,
            "target": "1,000 runs: under 10 s, page below 10 MB",
        },
    )
