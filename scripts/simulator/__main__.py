"""`python -m scripts.simulator`: see `scripts/simulate`."""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections import Counter
from contextlib import nullcontext

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
    options = parser.parse_args()
    with MUTANTS[options.mutant]() if options.mutant else nullcontext():
        if options.seed is not None:
            outcome = simulate(options.seed)
            print(f"seed {outcome.seed}: {outcome.scenario}")
            print("\n".join(outcome.trace))
            print(outcome.problem or f"nothing wrong (digest {outcome.digest})")
            return 1 if outcome.problem else 0
        seeds = range(options.first, options.first + options.seeds)
        return many(seeds, options.keep_going, 60.0 * options.minutes)


def many(seeds: range, keep_going: bool, most_seconds: float) -> int:
    """Tries all, or as many as fit into the time; prints which failed, and what happened in all of them."""
    ends, failures, failed, began = Counter[str](), Counter[str](), 0, time.monotonic()
    # What the libraries made stays, and is not looked through again and again.
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)
    for number, seed in enumerate(seeds, 1):
        outcome = simulate(seed)
        ends[f"{outcome.scenario}: {outcome.end or 'FAILED'}"] += 1
        failures.update(outcome.failures)
        if outcome.problem:
            failed += 1
            print(f"seed {seed} ({outcome.scenario}): {outcome.problem}", flush=True)
            print(f"    scripts/simulate --seed {seed}", flush=True)
            if not keep_going:
                break
        if time.monotonic() - began > most_seconds:
            break
        if number % 500 == 0:
            print(
                f"{number} seeds, {failed} failed, {time.monotonic() - began:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    seconds = time.monotonic() - began
    tried = sum(ends.values())
    each = f"{1000 * seconds / tried:.0f} ms each, {1000 * time.process_time() / tried:.0f} of the processor"
    print(f"{tried} seeds from {seeds.start} on in {seconds:.0f} s ({each}), {failed} failed")
    for name, counted in (("ended", ends), ("failures", failures)):
        print(f"{name}: " + ", ".join(f"{what} {count}" for what, count in sorted(counted.items())))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
