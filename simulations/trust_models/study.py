#!/usr/bin/env python
r"""What does it cost not to trust the server? Local, distributed, central and pooled privacy side by side.

    python simulations/trust_models/study.py                 all runs, then the report
    python simulations/trust_models/study.py --report        the report alone, from the records there are
    python simulations/trust_models/study.py --seeds 0 --only distributed,pooled
    python simulations/trust_models/study.py --records /tmp/try federation.num_rounds=2      a try-out

Every run goes through `fedtune.runs.run.run` and is kept as `records/NAME.json`; how a finished run is
skipped and an interrupted one resumed is in `simulations/cells.py`.
Nothing of the training is given: each arrangement takes what `train=auto` chooses for it. Only the encoder's
head is trained, so that all runs together take minutes. Words at the end (`name=value`) are overrides for all
runs.
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
sys.path.insert(0, str(HERE))  # whoever loads this script finds its neighbours too

from arrangements import ARRANGEMENTS, EPSILONS  # noqa: E402

from simulations.cells import known, run_all, script  # noqa: E402

ALL = ("none", *map(str, EPSILONS))
SEEDS = (0, 1, 2)
COMMON = (
    "adapter=head",
    "federation.evaluate_every=1000",
)

# What is lost to privacy at all, and what to being apart: the same steps, not noised.
REFERENCES = ("pooled", "local")


@dataclass(frozen=True)
class Cell:
    """One run of the study; `epsilon` None is the same training without privacy."""

    arrangement: str
    epsilon: int | None
    seed: int

    @property
    def name(self) -> str:
        """Name of its record file and run folder."""
        privacy = "none" if self.epsilon is None else f"epsilon{self.epsilon}"
        return f"{self.arrangement}-{privacy}-seed{self.seed}"

    def overrides(self) -> list[str]:
        """What makes it this run and no other."""
        seed = f"seed={self.seed}"
        words = ARRANGEMENTS[self.arrangement]
        if self.epsilon is None:
            how = [word for word in words if not word.startswith("privacy")]
            return [*COMMON, "privacy=none", "privacy.unit=record", *how, seed]  # sampled as with privacy
        return [*COMMON, *words, f"privacy.epsilon={self.epsilon}", seed]


def cells(seeds: list[int], only: list[str], epsilons: list[int | None]) -> list[Cell]:
    """The runs, one seed after the other, so that a study that is cut short is complete for fewer seeds."""
    return [
        Cell(name, epsilon, seed)
        for seed, epsilon, name in itertools.product(seeds, epsilons, only)
        if epsilon is not None or name in REFERENCES
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), metavar="N,N", help="default: 0,1,2")
    parser.add_argument("--epsilons", default=",".join(ALL), metavar="N,N", help="default: " + ",".join(ALL))
    parser.add_argument("--only", default=",".join(ARRANGEMENTS), metavar="NAME,NAME", help="what to run")
    parser.add_argument("--records", type=Path, default=HERE / "records", help="where the records are kept")
    parser.add_argument("--work", type=Path, default=Path("outputs") / "trust_models", help="run folders")
    parser.add_argument("--report", action="store_true", help="run nothing; make figure and README")
    parser.add_argument("overrides", nargs="*", help="name=value, for every run")
    options = parser.parse_args(arguments)
    import report

    if not options.report:
        wanted = cells(
            [int(seed) for seed in options.seeds.split(",")],
            known(options.only, tuple(ARRANGEMENTS)),
            [None if epsilon == "none" else int(epsilon) for epsilon in options.epsilons.split(",")],
        )
        run_all(wanted, options.records, options.work, options.overrides)
    target = HERE if options.records.resolve() == HERE / "records" else options.records
    print(f"\n{report.write(options.records, target)}")
    return 0


if __name__ == "__main__":
    script(main)
