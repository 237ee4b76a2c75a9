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
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if str(HERE.parents[1]) not in sys.path:  # a checkout that is not installed
    sys.path.insert(0, str(HERE.parents[1]))
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


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """What two runs must share to be the same run: all but where its files are."""
    return {key: value for key, value in config.items() if key not in ("output", "resume")}


def run_cell(cell: Cell, records: Path, work: Path, extra: list[str]) -> bool:
    """Runs one cell unless its record is there; returns whether it ran. Raises FedtuneError."""
    from fedtune.config.loader import load
    from fedtune.errors import RecordError
    from fedtune.runs import record, run

    config = load([*cell.overrides(), *extra])
    path = records / f"{cell.name}.json"
    if path.exists():
        kept = settings_of(record.read(path)["config"])
        wanted = settings_of(record.clean(asdict(config)))
        if kept != wanted:
            raise RecordError(
                f"{path} was made with other settings ({', '.join(differences(kept, wanted))}), and a study "
                "mixes no settings. Delete it to run it again, or choose another folder with --records."
            )
        return False
    folder = work / cell.name
    if (folder / "checkpoint").exists():
        config = load([f"resume={folder}"])
    else:
        config.output = str(folder)
    write_record(record.read(run.run(config)), path)
    return True


def write_record(finished: dict[str, Any], path: Path) -> None:
    """Writes a study's copy of a record: small, a line for each section, without what no study reads."""
    finished["config"]["output"] = None  # where it ran says nothing to others
    finished["privacy"].pop("ledger", None)
    sections = (
        f"{json.dumps(name)}: {json.dumps(finished[name], separators=(',', ':'))}" for name in finished
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(sections) + "\n}\n", encoding="utf-8")


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    """Dotted names of the settings in which two configurations differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        found = [differences(one.get(key), other.get(key), f"{name}.{key}") for key in {**one, **other}]
        return list(itertools.chain.from_iterable(found))
    return [] if one == other else [name.removeprefix(".")]


def _known(words: str, allowed: tuple[str, ...]) -> list[str]:
    chosen = words.split(",")
    for word in chosen:
        if word not in allowed:
            raise SystemExit(f"there is no {word!r}; choose from {', '.join(allowed)}")
    return chosen


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
            _known(options.only, ARRANGEMENTS),
            _known(options.privacy, PRIVACY),
        )[index - 1 :: count]
        work = options.work or Path("outputs") / "first_federation"
        ran = 0
        for number, cell in enumerate(wanted, start=1):
            if options.max_runs is not None and ran >= options.max_runs:
                print(f"stopped after {ran} runs; call again to go on")
                return 0
            print(f"\n[{number}/{len(wanted)}] {cell.name}", flush=True)
            if run_cell(cell, options.records, work, options.overrides):
                ran += 1
            else:
                print("  done before", flush=True)
    target = HERE if options.records.resolve() == HERE / "records" else options.records
    print(f"\n{report.write(options.records, target)}")
    return 0


if __name__ == "__main__":
    from fedtune.errors import FedtuneError

    try:
        sys.exit(main())
    except FedtuneError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt as interrupt:
        print(f"\n{interrupt}", file=sys.stderr)
        sys.exit(130)
