#!/usr/bin/env python
r"""What does a recipe that nobody tuned reach? Corpora, adapters, trust models and epsilons.

    python simulations/private_accuracy/study.py --corpora FOLDER     all runs, then table and figure
    python simulations/private_accuracy/study.py --report             from the records there are
    python simulations/private_accuracy/study.py --corpora FOLDER --only banking77 --adapters head

FOLDER holds banking77, clinc150 and sms_spam, each with train.csv and test.csv; `opinions` needs none. No
setting of training is given but the adapter: all of it is `train=auto`. A finished run is kept as
`records/NAME.json` and skipped the next time; words at the end (`name=value`) are overrides for all runs.
Epsilon is per record (add or remove one), delta the default.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedtune.config.schema import Config

HERE = Path(__file__).resolve().parent
if str(HERE.parents[1]) not in sys.path:  # a checkout that is not installed
    sys.path.insert(0, str(HERE.parents[1]))
sys.path.insert(0, str(HERE))  # whoever loads this script finds its neighbours too

import table  # noqa: E402
from table import ADAPTERS, CORPORA, EPSILONS, TRUSTS  # noqa: E402

from simulations.cells import differences, run_all, script  # noqa: E402

SEEDS = (0, 1, 2)
_FILES = ("data=files", "data.text=text", "data.test_split=test", "data.test_public=true", "data.public=true")
DATA = {
    "banking77": (*_FILES, "data.label=category", "partition=iid", "federation.nodes=4"),
    "clinc150": (*_FILES, "data.label=intent", "data.site=domain", "partition=natural"),
    "sms_spam": (*_FILES, "data.label=label", "partition=iid", "federation.nodes=4"),
    "sms_spam_50": (*_FILES, "data.label=label", "partition=iid", "federation.nodes=50"),
    "opinions": (),
}


@dataclass(frozen=True)
class Cell:
    """One run of the study; `epsilon` None is without privacy, for which trust is `none`."""

    corpus: str
    adapter: str
    trust: str
    epsilon: int | None
    seed: int
    folder: Path | None = None

    @property
    def name(self) -> str:
        """Name of its record file and run folder."""
        privacy = "none" if self.epsilon is None else f"epsilon{self.epsilon}"
        return f"{self.corpus}-{self.adapter}-{self.trust}-{privacy}-seed{self.seed}"

    def overrides(self) -> list[str]:
        """What makes it this run and no other."""
        words = [*DATA[self.corpus], f"adapter={self.adapter}", "privacy.unit=record", f"seed={self.seed}"]
        if self.folder is not None and self.corpus != "opinions":
            name = self.corpus.removesuffix("_50")
            words += [f"data.path={self.folder / name}", f"data.name={name}"]
        if self.epsilon is None:
            return [*words, "privacy=none"]
        return [*words, f"privacy={self.trust}", f"privacy.epsilon={self.epsilon}"]


def cells(options: argparse.Namespace) -> list[Cell]:
    """The runs, one seed after the other, so that a study that is cut short is complete for fewer seeds."""
    seeds = [int(seed) for seed in options.seeds.split(",")]
    found = []
    for seed, corpus, adapter in itertools.product(
        seeds, options.only.split(","), options.adapters.split(",")
    ):
        for trust, epsilon in itertools.product(
            options.trusts.split(","), map(int, options.epsilons.split(","))
        ):
            found.append(Cell(corpus, adapter, trust, epsilon, seed, options.corpora))
        if options.open:
            found.append(Cell(corpus, adapter, "none", None, seed, options.corpora))
    return found


def earlier(records: Path) -> dict[table.Key, list[str]]:
    """By cell: the settings in which one of its records is not what the recipe, as it is now, would run."""
    from fedtune.config.loader import load
    from fedtune.runs import record

    found: dict[table.Key, list[str]] = {}
    today: dict[table.Key, Config] = {}
    for path in sorted(records.glob("*.json")):
        kept, (corpus, adapter, trust, *_) = record.read(path), path.stem.split("-")
        epsilon = kept["privacy"]["target_epsilon"]
        key = (corpus, adapter, trust, None if epsilon is None else int(epsilon))
        if key not in today:
            today[key] = load(Cell(*key, seed=0, folder=HERE).overrides())
        different = differences({**kept["config"], "seed": 0}, today[key])
        if different == ["train.damped"] and not damped(kept, today[key]):
            continue  # a rule that came later, and says nothing for it: what was computed is the same
        if different:
            found[key] = different
    return found


def damped(kept: dict[str, Any], config: Config) -> bool:
    """Whether `train.damped` takes less than the whole rate in a run of `config` with the noise of `kept`."""
    from fedtune.federation.server.optimizers import damping
    from fedtune.privacy.plan import make_plan

    sizes, noise = kept["data"]["declared_sizes"], kept["privacy"]["noise_multiplier"]
    if config.privacy.epsilon is not None:
        privacy = dataclasses.replace(config.privacy, epsilon=None, noise_multiplier=noise)
        config = dataclasses.replace(config, privacy=privacy)
    plan = make_plan(config, list(sizes.values()))
    numbers, classes = kept["cost"]["num_parameters"], len(kept["data"]["labels"])
    return damping(config.train, plan, sizes, numbers, classes) < 1.0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpora", type=Path, help="folder of banking77, clinc150 and sms_spam")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), metavar="N,N", help="default: 0,1,2")
    parser.add_argument("--only", default=",".join(CORPORA), metavar="NAME,NAME", help="corpora")
    parser.add_argument("--adapters", default=",".join(ADAPTERS), metavar="NAME,NAME", help="adapters")
    parser.add_argument("--trusts", default=",".join(TRUSTS), metavar="NAME,NAME", help="trust models")
    parser.add_argument("--epsilons", default=",".join(map(str, EPSILONS)), metavar="N,N", help="epsilons")
    parser.add_argument(
        "--no-open", dest="open", action="store_false", help="without the runs without privacy"
    )
    parser.add_argument(
        "--part", default="1/1", metavar="I/N", help="every Nth run (start the others beside it)"
    )
    parser.add_argument("--records", type=Path, default=HERE / "records", help="where the records are kept")
    parser.add_argument("--work", type=Path, default=Path("outputs") / "private_accuracy", help="run folders")
    parser.add_argument("--report", action="store_true", help="run nothing; make table and figure")
    parser.add_argument("overrides", nargs="*", help="name=value, for every run")
    options = parser.parse_args(arguments)
    if not options.report:
        part, parts = map(int, options.part.split("/"))
        wanted = cells(options)[part - 1 :: parts]
        run_all(wanted, options.records, options.work, options.overrides)
    place = HERE if options.records == HERE / "records" else options.records
    print(f"\n{table.write(options.records, place, earlier(options.records))}")
    return 0


if __name__ == "__main__":
    script(main)
