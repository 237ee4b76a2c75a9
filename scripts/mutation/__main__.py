"""python -m scripts.mutation [MODULE ...]: see `scripts/mutate`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import pytest

from scripts.mutation.record import write_page, write_record
from scripts.mutation.runner import MutationRun, Options, Source

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "simulations" / "mutation"
TESTS = [
    "tests/privacy",
    "tests/statistical",
    "tests/training/test_dp_step.py",
    "tests/regressions/test_pitfalls_privacy.py",
    "tests/regressions/test_pitfalls_training.py",
]
# Tests of speed fail on a busy machine, mutant or not.
LEFT_OUT = "not milliseconds and not seconds"


def all_sources() -> list[Source]:
    """`fedtune/privacy` and the training step with its examples' gradients."""
    paths = [
        *sorted((ROOT / "fedtune" / "privacy").rglob("*.py")),
        ROOT / "fedtune" / "training" / "dp_step.py",
        ROOT / "fedtune" / "training" / "example_gradients.py",
    ]
    return [
        Source(".".join(path.relative_to(ROOT).with_suffix("").parts), path)
        for path in paths
        if path.name != "__init__.py"
    ]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/mutate", description="Mutation testing of the privacy code."
    )
    parser.add_argument("modules", nargs="*", help="such as noise or plan; all by default")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="also what earlier runs have decided")
    parser.add_argument("--alive", action="store_true", help="also those that have survived earlier runs")
    parser.add_argument(
        "--enough", type=float, default=20.0, help="seconds of tests that a mutant must survive at most"
    )
    parser.add_argument("--only", default="", help="mutants whose name holds this")
    parser.add_argument("--page", action="store_true", help="only write the page from the record anew")
    parser.add_argument("--tests", nargs="*", default=TESTS)
    options = parser.parse_args(arguments)
    sources = all_sources()
    by_name = {s.path.stem: s for s in sources}
    chosen = [by_name[name] for name in options.modules if name in by_name] or sources
    unknown = set(options.modules) - by_name.keys()
    if unknown:
        print(f"There is no module {', '.join(sorted(unknown))}.", file=sys.stderr)
        return 2
    os.environ.pop("FEDTUNE_TEST_CACHE", None)
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.dont_write_bytecode = True
    os.chdir(ROOT)
    state = ROOT / "build" / "mutation"
    if options.page:
        return _page(sources)
    how = Options(
        options.jobs, options.again, options.alive, options.only, options.enough, options.tests, LEFT_OUT
    )
    run = MutationRun(chosen, sources, state, how)
    command = ["-q", "-s", "-p", "no:cacheprovider", "-m", "", "-k", LEFT_OUT, *options.tests]
    status = int(pytest.main(command, plugins=[run]))
    if status not in (0, 5):
        return status
    if options.only:
        return 0  # a part, for whoever is writing a test; no record
    write_record(RECORD, run)
    return _page(sources)


def _page(sources: list[Source]) -> int:
    complaints = write_page(RECORD, sources)
    for complaint in complaints:
        print(complaint, file=sys.stderr)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
