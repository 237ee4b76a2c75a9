#!/usr/bin/env python
r"""What is a start on public texts worth? Some of the training texts are taken as public, the rest federated.

    python simulations/private_accuracy/public/study.py --corpora FOLDER     all runs, then the table
    python simulations/private_accuracy/public/study.py --report             from the records there are

FOLDER holds banking77, clinc150 and sms_spam, each with train.csv and test.csv. A cell has a number of public
texts a class (0: none), which the seed chooses. What remains of train.csv, without the texts that are among
the public ones too, is federated: the same with and without the start, so that nothing else differs.
`weak`: the public texts are labelled by the class whose name is nearest, as the frozen encoder sees both, and
not by a person. No setting of training is given.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import random
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if str(HERE.parents[2]) not in sys.path:  # a checkout that is not installed
    sys.path.insert(0, str(HERE.parents[2]))

from simulations.cells import known, run_all, script  # noqa: E402
from simulations.private_accuracy.study import DATA  # noqa: E402

TRUSTS, EPSILONS, SEEDS = ("local", "distributed"), (1, 8), (0, 1)
CORPORA = {"banking77": "category", "clinc150": "intent", "sms_spam": "label"}  # and the column of labels
TAKEN = (1, 5, 20)  # public texts a class; what remains without 20 is federated, whatever the cell takes


@dataclass(frozen=True)
class Cell:
    """One run: `taken` public texts a class, labelled by a person or (`weak`) by the names of the classes."""

    corpus: str
    taken: int
    weak: bool
    trust: str
    epsilon: int
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """Name of its record file and run folder."""
        start = f"{'weak' if self.weak else 'public'}{self.taken}" if self.taken else "without"
        return f"{self.corpus}-{start}-{self.trust}-epsilon{self.epsilon}-seed{self.seed}"

    def overrides(self) -> list[str]:
        """What makes it this run and no other."""
        made = self.folder / f"{self.corpus}-seed{self.seed}"
        words = [word for word in DATA[self.corpus] if word != "data.public=true"]
        words += [
            f"data.path={made}", f"data.name={self.corpus}", f"data.declared_size={_size(made)}",
            _labels(made), "adapter=head", "privacy.unit=record", f"privacy={self.trust}",
            f"privacy.epsilon={self.epsilon}",
            "data.max_length=64", f"seed={self.seed}",
        ]  # fmt: skip
        if self.taken:
            kind = "weak" if self.weak else "public"
            words.append(f"public.path={made / 'public' / f'{kind}{self.taken}.csv'}")
        return words


def _size(made: Path) -> int:
    return len(_read(made / "train.csv"))


def _labels(made: Path) -> str:
    from fedtune.config.convert import value_text

    return "data.labels=" + value_text((made / "labels.txt").read_text(encoding="utf-8").split("\n"))


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def make(source: Path, made: Path, label: str, seed: int) -> None:
    """train.csv without the public texts, test.csv as it is, and `public/publicN.csv`, `public/weakN.csv`."""
    rows, test = _read(source / "train.csv"), _read(source / "test.csv")
    chance, by_class = random.Random(seed), dict[str, list[dict[str, str]]]()
    tested = {_plain(row["text"]) for row in test}
    for row in chance.sample(rows, len(rows)):
        if _plain(row["text"]) not in tested:
            by_class.setdefault(row[label], []).append(row)
    public = {name: of[: TAKEN[-1]] for name, of in sorted(by_class.items())}
    gone = {_plain(row["text"]) for of in public.values() for row in of}
    _write(made / "train.csv", [row for row in rows if _plain(row["text"]) not in gone])
    _write(made / "test.csv", test)
    names = sorted(public)
    (made / "labels.txt").write_text("\n".join(names), encoding="utf-8")
    for count in TAKEN:
        some = [row for of in public.values() for row in of[:count]]
        _write(made / "public" / f"public{count}.csv", some)
        guessed = nearest_names([row["text"] for row in some], names)
        weak = [{**row, label: name} for row, name in zip(some, guessed, strict=True)]
        right = sum(one[label] == other[label] for one, other in zip(some, weak, strict=True)) / len(some)
        print(f"  {made.name}: {len(some)} public texts, {right:.1%} of the weak labels right")
        if len({row[label] for row in weak}) == len(names):
            _write(made / "public" / f"weak{count}.csv", weak)


def nearest_names(texts: list[str], names: list[str]) -> list[str]:
    """The name that the frozen encoder puts nearest each text, both seen from their own mean."""
    import numpy as np

    from fedtune.config.loader import load
    from fedtune.models.classifier import load_model
    from fedtune.models.encoder import load_tokenizer
    from fedtune.models.name_start import words_of

    config = load(["adapter=head"])
    model = load_model(config.model, config.adapter, 2, 0, "cpu")
    tokenizer = load_tokenizer(config.model)[0]

    def vectors(of: list[str]) -> Any:
        import torch

        found = []
        with torch.no_grad():
            for text in of:
                ids = torch.tensor([tokenizer(text, truncation=True, max_length=64)["input_ids"]])
                mask = torch.ones_like(ids, dtype=torch.bool)
                hidden = model.base.encoder.run(
                    model.base.encoder.embed(ids, mask), mask, 0, model.num_layers
                )
                found.append(torch.nn.functional.normalize(model.base.pool(hidden, mask), dim=-1)[0].numpy())
        seen = np.stack(found)
        seen = seen - seen.mean(0)
        return seen / np.linalg.norm(seen, axis=1, keepdims=True)

    words = words_of(tuple(names)) or names
    return [names[i] for i in (vectors(texts) @ vectors(words).T).argmax(1)]


def cells(options: argparse.Namespace) -> list[Cell]:
    """The runs; those without a start beside each."""
    found = []
    for seed, corpus in itertools.product(map(int, options.seeds.split(",")), options.only.split(",")):
        taken = list(map(int, options.taken.split(",")))
        made = options.work / f"{corpus}-seed{seed}"
        if not made.exists():
            make(options.corpora / corpus, made, CORPORA[corpus], seed)
        for count, trust, epsilon in itertools.product(taken, TRUSTS, map(int, options.epsilons.split(","))):
            for weak in (False, True) if count and options.weak else (False,):
                if count and not (made / "public" / f"{'weak' if weak else 'public'}{count}.csv").exists():
                    continue  # some class has no text that is nearest its name
                found.append(Cell(corpus, count, weak, trust, epsilon, seed, options.work))
    return found


def table(records: Path) -> str:
    """Accuracy by corpus, trust and epsilon; a column for each start."""
    from fedtune.runs import record

    found: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    alone: dict[tuple[str, str], list[float]] = {}
    for path in sorted(records.glob("*.json")):
        corpus, start, trust, epsilon, _ = path.stem.split("-")
        kept = record.read(path)
        found.setdefault((corpus, trust, epsilon[7:]), {}).setdefault(start, []).append(
            100 * kept["metrics"]["accuracy"]
        )
        if begun := kept["data"].get("public_start"):
            alone.setdefault((corpus, start), []).append(100 * begun["accuracy"])
    starts = sorted(
        {start for by in found.values() for start in by},
        key=lambda one: (one[0] != "w" or one[1] != "i", one),
    )
    lines = ["| corpus | trust | epsilon | " + " | ".join(starts) + " |", "|---" * (3 + len(starts)) + "|"]
    for (corpus, trust, epsilon), by in sorted(found.items()):
        shown = [f"{statistics.mean(by[one]):.1f}" if one in by else "" for one in starts]
        lines.append(f"| {corpus} | {trust} | {epsilon} | " + " | ".join(shown) + " |")
    for corpus in sorted({corpus for corpus, _ in alone}):
        shown = [
            f"{statistics.mean(alone[corpus, one]):.1f}" if (corpus, one) in alone else "" for one in starts
        ]
        lines.append(f"| {corpus} | the start alone | | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpora", type=Path, help="folder of banking77, clinc150 and sms_spam")
    parser.add_argument("--only", default=",".join(CORPORA), metavar="NAME,NAME", help="corpora")
    parser.add_argument("--taken", default="0,1,5,20", metavar="N,N", help="public texts a class")
    parser.add_argument("--epsilons", default=",".join(map(str, EPSILONS)), metavar="N,N", help="epsilons")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), metavar="N,N", help="default: 0,1")
    parser.add_argument("--weak", action="store_true", help="with labels by names too")
    parser.add_argument("--records", type=Path, default=HERE / "records", help="where the records are kept")
    parser.add_argument(
        "--work", type=Path, default=Path("outputs") / "public_start", help="data, run folders"
    )
    parser.add_argument("--max-runs", type=int, metavar="N", help="stop after so many")
    parser.add_argument("--report", action="store_true", help="run nothing; make the table")
    parser.add_argument("overrides", nargs="*", help="name=value, for every run")
    options = parser.parse_args(arguments)
    known(options.only, list(CORPORA))
    if not options.report:
        options.work = options.work.absolute()
        run_all(cells(options), options.records, options.work / "runs", options.overrides, options.max_runs)
    print(f"\n{table(options.records)}")
    return 0


if __name__ == "__main__":
    script(main)
