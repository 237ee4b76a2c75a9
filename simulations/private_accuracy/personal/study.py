#!/usr/bin/env python
"""Does any site lose by joining, if it keeps a part of the model of its own?

    python simulations/private_accuracy/personal/study.py              all runs, then the table in README.md
    python simulations/private_accuracy/personal/study.py --report     the table alone, from the records

Each site alone, the federation with one common model, and the federation with `train.personalize=head`, at
epsilon 8 for each record on each site (trust local), three seeds. A finished run is kept as
`records/NAME.json` and not run again.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
if str(HERE.parents[2]) not in sys.path:  # a checkout that is not installed
    sys.path.insert(0, str(HERE.parents[2]))

from simulations.cells import run_all, script  # noqa: E402
from simulations.first_federation.study import COMMON, SEEDS, SETTINGS, SITES  # noqa: E402

ARRANGEMENTS = ("personal", "common", *(f"alone_{site}" for site in SITES))
MARK = "<!-- table -->"


@dataclass(frozen=True)
class Cell:
    """One run of the study."""

    arrangement: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its record file and run folder."""
        return f"{self.arrangement}-seed{self.seed}"

    def overrides(self) -> list[str]:
        """What makes it this run and no other."""
        words = [*COMMON, *SETTINGS["epsilon8"]]
        words += [f"seed={self.seed}", "partition=natural"]
        if self.arrangement == "personal":
            words.append("train.personalize=head")
        if self.arrangement.startswith("alone_"):
            words.append(f"data.only_site={self.arrangement.removeprefix('alone_')}")
        return words


def accuracies(records: Path, seeds: tuple[int, ...] = SEEDS) -> dict[tuple[str, str], list[float]]:
    """(arrangement, site) -> the site's accuracy on its own test texts, one a seed.

    Raises:
        RecordError: a record is missing.
    """
    from fedtune.runs import record

    found: dict[tuple[str, str], list[float]] = {}
    for arrangement, seed in itertools.product(ARRANGEMENTS, seeds):
        rows = record.read(records / f"{Cell(arrangement, seed).name}.json")["metrics"]["per_site"]
        for site in SITES:
            if arrangement == "personal":
                value, base = rows[site]["personal"]["accuracy"], rows[site]["accuracy"]
                found.setdefault(("common part", site), []).append(base)
            else:
                value = rows[site]["accuracy"]
            found.setdefault((arrangement, site), []).append(value)
    return found


def table(records: Path) -> str:
    """The table of README.md: percent, and the paired difference with its standard error."""
    found = accuracies(records)
    lines = [
        "| site | its own model alone | common model | common part, for a new site | with its own part "
        "| joining, against alone |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for site in SITES:
        alone = found[f"alone_{site}", site]
        gains = [100 * (a - b) for a, b in zip(found["personal", site], alone, strict=True)]
        error = statistics.stdev(gains) / math.sqrt(len(gains))
        parts = [found[name, site] for name in ("common", "common part", "personal")]
        cells = [f"{100 * statistics.fmean(values):.1f}" for values in (alone, *parts)]
        lines.append(f"| {site} | {' | '.join(cells)} | {statistics.fmean(gains):+.1f} \u00b1 {error:.1f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--report", action="store_true", help="run nothing; make the table of the records")
    parser.add_argument("--records", type=Path, default=HERE / "records", help="where the record files are")
    parser.add_argument("--work", type=Path, default=Path("outputs") / "personal", help="run folders")
    options = parser.parse_args(arguments)
    if not options.report:
        cells = [Cell(arrangement, seed) for seed, arrangement in itertools.product(SEEDS, ARRANGEMENTS)]
        run_all(cells, options.records, options.work, [])
    text = table(options.records)
    print(text)
    page = HERE / "README.md"
    if options.records.resolve() == (HERE / "records").resolve() and page.exists():
        before, _, after = page.read_text(encoding="utf-8").split(MARK)
        page.write_text(f"{before}{MARK}\n{text}\n{MARK}{after}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    script(main)
