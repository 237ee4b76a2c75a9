"""`python -m scripts.simulator`: see `scripts/simulate`."""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.simulator.mutants import MUTANTS
from scripts.simulator.simulation import simulate


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/simulate", description=__doc__)
    parser.add_argument("--seed", type=int, help="this one alone, and all that happens in it")
    parser.add_argument("--seeds", type=int, default=10_000, help="how many (default: 10,000)")
    parser.add_argument("--first", type=int, default=0, help="the first of them (default: 0)")
    parser.add_argument(
        "--mutant", choices=sorted(MUTANTS), help="with a fault in fedtune, which must be found"
    )
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="end after so many, with what was tried"
    )
    parser.add_argument("--keep-going", action="store_true", help="do not end at the first seed that fails")
    parser.add_argument(
        "--record", type=Path, help="a JSON file that keeps what was tried, beside what is in it"
    )
    options = parser.parse_args()
    with MUTANTS[options.mutant]() if options.mutant else nullcontext():
        if options.seed is not None:
            outcome = simulate(options.seed)
            print(f"seed {outcome.seed}: {outcome.scenario}")
            print("\n".join(outcome.trace))
            print(outcome.problem or f"nothing wrong (digest {outcome.digest})")
            return 1 if outcome.problem else 0
        seeds = range(options.first, options.first + options.seeds)
        tried = many(seeds, options.keep_going, 60.0 * options.minutes)
        if options.record:
            keep(options.record, tried)
        return 1 if tried.failed else 0


@dataclass
class Tried:
    """Seeds that were run, one after another."""

    first: int
    seeds: int
    seconds: float
    failed: dict[int, str]
    """What was wrong, by seed."""
    ends: Counter[str]
    failures: Counter[str]


def many(seeds: range, keep_going: bool, most_seconds: float) -> Tried:
    """Tries all, or as many as fit into the time; prints which failed, and what happened in all of them."""
    ends, failures, failed, began = Counter[str](), Counter[str](), dict[int, str](), time.monotonic()
    # What the libraries made stays, and is not looked through again and again.
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)
    for number, seed in enumerate(seeds, 1):
        outcome = simulate(seed)
        ends[f"{outcome.scenario}: {outcome.end or 'FAILED'}"] += 1
        failures.update(outcome.failures)
        if outcome.problem:
            failed[seed] = outcome.problem
            print(f"seed {seed} ({outcome.scenario}): {outcome.problem}", flush=True)
            print(f"    scripts/simulate --seed {seed}", flush=True)
            if not keep_going:
                break
        if time.monotonic() - began > most_seconds:
            break
        if number % 500 == 0:
            print(
                f"{number} seeds, {len(failed)} failed, {time.monotonic() - began:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    seconds = time.monotonic() - began
    tried = sum(ends.values())
    each = f"{1000 * seconds / tried:.0f} ms each, {1000 * time.process_time() / tried:.0f} of the processor"
    print(f"{tried} seeds from {seeds.start} on in {seconds:.0f} s ({each}), {len(failed)} failed")
    for name, counted in (("ended", ends), ("failures", failures)):
        print(f"{name}: " + ", ".join(f"{what} {count}" for what, count in sorted(counted.items())))
    return Tried(seeds.start, tried, seconds, failed, ends, failures)


def keep(file: Path, tried: Tried) -> None:
    """Adds a stretch of seeds to a record, with the commit; the totals are made of the stretches."""
    kept: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"stretches": []}
    kept["stretches"].append(
        {
            "commit": subprocess.run(
                ["git", "describe", "--always", "--dirty"], check=True, capture_output=True, text=True
            ).stdout.strip(),
            "first": tried.first,
            "seeds": tried.seeds,
            "seconds": round(tried.seconds, 1),
            "processor_seconds": round(time.process_time(), 1),
            "load_average": round(os.getloadavg()[0], 1),
            "failed": {str(seed): problem for seed, problem in tried.failed.items()},
            "ends": dict(sorted(tried.ends.items())),
            "failures": dict(sorted(tried.failures.items())),
        }
    )
    stretches = kept["stretches"]
    kept["totals"] = {
        "seeds": sum(each["seeds"] for each in stretches),
        "failed": sum(len(each["failed"]) for each in stretches),
        "seconds": round(sum(each["seconds"] for each in stretches)),
        "processor_seconds": round(sum(each["processor_seconds"] for each in stretches)),
        "failures": dict(sorted(sum((Counter(each["failures"]) for each in stretches), Counter()).items())),
    }
    file.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
