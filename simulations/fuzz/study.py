"""What `scripts/fuzz` was given and what it found, kept: one record a seed, and the page made of them.

    python simulations/fuzz/study.py 1500 1 2 3      1,500 inputs each of the seeds 1, 2 and 3
    python simulations/fuzz/study.py                 only writes README.md

How many inputs were tried is what hypothesis counted, not what was asked: a search ends at its first find.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from fedtune.runs.environment import hardware

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def search(inputs: int, seed: int) -> dict[str, Any]:
    """One call of `scripts/fuzz`; returns its record."""
    environment = os.environ | {"PYTHON": sys.executable, "PYTEST_ADDOPTS": "--hypothesis-show-statistics"}
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.gmtime()
    command = ["scripts/fuzz", str(inputs), str(seed)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "command": " ".join(command),
        "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", began),
        "commit": _git("rev-parse", "--short=10", "HEAD")
        + ("+" if _git("status", "--porcelain", "-uno") else ""),
        "seed": seed,
        "status": done.returncode,
        **counted(done.stdout),
        "processor_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "processor": hardware()["processor"],
    }


def counted(printed: str) -> dict[str, Any]:
    """Inputs that were drawn in a search, and what it found, as pytest and hypothesis print them."""
    drawn = re.findall(
        r"during (?:generate|reuse) phase.*\n(?:.*\n)*?.*- (\d+) passing, (\d+) failing, and \d+ invalid",
        printed,
    )
    return {
        "inputs": sum(int(passed) + int(failed) for passed, failed in drawn),
        "finds": re.findall(r"^FAILED \S+::(.*)$", printed, re.MULTILINE),
    }


def _git(*words: str) -> str:
    return subprocess.run(
        ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()


def page(records: list[dict[str, Any]]) -> str:
    """README.md."""
    tried = sum(one["inputs"] for one in records)
    finds = sum(bool(one["finds"]) for one in records)
    lines = [
        "# What people bring: the search for inputs that end badly",
        "",
        "Question: is there a file, a setting, a run, a record or a model folder that ends with a traceback,",
        "an exit status of 70, a hang, or a charge for nothing?",
        "",
        "Command: `python simulations/fuzz/study.py 1500 SEED...`, which calls `scripts/fuzz` once a seed.",
        "Each find is mended, and stands from then on as an example in `tests/regressions`. A `+` behind a",
        "commit: with changes that are committed later. Made from `records/`.",
        "",
        f"**{tried:,} inputs** in searches of {len(records)} seeds; ended by a find: {finds}.",
        "",
        "| commit | seed | inputs | processor seconds | found |",
        "|---|---|---|---|---|",
    ]
    for one in sorted(records, key=lambda one: (one["measured"], one["seed"])):
        found = "; ".join(f"`{find[:150]}`" for find in one["finds"]).replace("|", "/")
        counts = f"{one['inputs']:,} | {one['processor_seconds']:g}"
        lines.append(f"| {one['commit']} | {one['seed']} | {counts} | {found or '-'} |")
    processors = sorted({one["processor"] for one in records})
    lines += ["", "Processor: " + "; ".join(processors) + ", one thread, beside other work."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", type=int, nargs="?")
    parser.add_argument("seeds", type=int, nargs="*")
    options = parser.parse_args()
    folder = HERE / "records"
    folder.mkdir(exist_ok=True)
    for seed in options.seeds:
        record = search(options.inputs, seed)
        name = f"{record['commit'].rstrip('+')}-{seed}.json"
        (folder / name).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print(f"seed {seed}: {record['inputs']} inputs, {record['finds'] or 'no find'}", flush=True)
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    (HERE / "README.md").write_text(page(records), encoding="utf-8")


if __name__ == "__main__":
    main()
