#!/usr/bin/env python
"""Is a federation worth it? Each site alone, the federation, and the pooled data, with and without privacy.

    python simulations/first_federation/study.py                 all runs, then the report
    python simulations/first_federation/study.py --report        the report alone, from the records there are
    python simulations/first_federation/study.py --seeds 0 --only federation,pooled
    python simulations/first_federation/study.py --part 1/2      every second run (start 2/2 beside it)
    python simulations/first_federation/study.py --records /tmp/try federation.num_rounds=2   a try-out

Every run goes through `fedtune.runs.run.run`, with the same number of rounds, steps and the same
sampling rate, so that every arrangement sees its data equally often. A finished run is kept as
`records/NAME.json` and skipped the next time; an interrupted one goes on from its checkpoint. Figure and
README table are made from the record files and from nothing else. Words at the end (`name=value`) are
overrides for all runs; a record that was made with other settings is refused, not mixed in.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
if str(HERE.parents[1]) not in sys.path:  # a checkout that is not installed
    sys.path.insert(0, str(HERE.parents[1]))

from simulations.cells import known, run_all, script  # noqa: E402

SITES = ("editorials", "movies", "products", "tweets")
ALONE = tuple(f"alone_{site}" for site in SITES)
ARRANGEMENTS = (*ALONE, "federation", "pooled")
PRIVACY = ("none", "epsilon8")
SEEDS = (0, 1, 2)

# What differs between the two columns of the study, and nothing else. One delta for all, below 1/n even for
# the pooled data: the default depends on a shard's size, and would give each arrangement another promise.
# Only the last adapter is evaluated: the test texts of four sites cost more than a round of one of them.
# The unit is one record, as this study's README says: by default persons would be protected, and sampled.
COMMON: tuple[str, ...] = ("adapter=head", "federation.evaluate_every=1000", "privacy.unit=record")
SETTINGS = {
    "none": ("privacy=none",),
    "epsilon8": ("privacy=local", "privacy.epsilon=8", "privacy.delta=2.5e-5"),
}


@dataclass(frozen=True)
class Cell:
    """One run of the study."""

    arrangement: str
    privacy: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its record file and run folder."""
        return f"{self.arrangement}-{self.privacy}-seed{self.seed}"

    def overrides(self) -> list[str]:
        """What makes it this run and no other."""
        words = [*COMMON, *SETTINGS[self.privacy], f"seed={self.seed}"]
        if self.arrangement == "pooled":
            return [*words, "partition=iid", "federation.nodes=1"]
        words.append("partition=natural")
        if self.arrangement in ALONE:
            words.append(f"data.only_site={self.arrangement.removeprefix('alone_')}")
        return words


def cells(seeds: list[int], only: list[str], privacy: list[str]) -> list[Cell]:
    """The runs, one seed after the other, so that a study that is cut short is complete for fewer seeds."""
    return [Cell(a, p, s) for s, p, a in itertools.product(seeds, privacy, only)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), metavar="N,N", help="default: 0,1,2")
    parser.add_argument(
        "--only", default=",".join(ARRANGEMENTS), metavar="NAME,NAME", help="arrangements to run"
    )
    parser.add_argument(
        "--privacy", default=",".join(PRIVACY), metavar="NAME,NAME", help=" or ".join(PRIVACY)
    )
    parser.add_argument("--part", default="1/1", metavar="I/N", help="run only each N-th cell, from the I-th")
    parser.add_argument(
        "--max-runs", type=int, default=None, help="stop after so many runs; the next call goes on"
    )
    parser.add_argument(
        "--records", type=Path, default=HERE / "records", help="where the record files are kept"
    )
    parser.add_argument(
        "--work", type=Path, default=None, help="run folders (default: outputs/first_federation)"
    )
    parser.add_argument(
        "--report", action="store_true", help="run nothing; make figure and README from the records"
    )
    parser.add_argument("overrides", nargs="*", help="name=value, for every run")
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(HERE))
    import report

    if not options.report:
        index, count = (int(part) for part in options.part.split("/"))
        wanted = cells(
            [int(seed) for seed in options.seeds.split(",")],
            known(options.only, ARRANGEMENTS),
            known(options.privacy, PRIVACY),
        )[index - 1 :: count]
        work = options.work or Path("outputs") / "first_federation"
        if not run_all(wanted, options.records, work, options.overrides, options.max_runs):
            return 0
    target = HERE if options.records.resolve() == HERE / "records" else options.records
    print(f"\n{report.write(options.records, target)}")
    return 0


if __name__ == "__main__":
    script(main)
