"""Figure and README of the study, from its record files alone; `study.py --report` runs this by itself.

Every number in the README comes from `records/*.json`. What a seed does to a result is shown as the
standard deviation over the seeds, and a difference counts only where it exceeds two standard errors.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.runs.figures import alike

SITES = ("editorials", "movies", "products", "tweets")
PRIVACY = {"none": "without privacy", "epsilon8": "epsilon 8 per record"}
COLORS = {"alone": "#b5651d", "federation": "#1f5fa8", "pooled": "#4a4a4a"}


@dataclass(frozen=True)
class Values:
    """One number for each seed, in the order of the seeds."""

    seeds: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None for a single one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def points(self) -> str:
        """In percent, as `78.1 ± 0.4`."""
        spread = "" if self.spread is None else f" ± {100 * self.spread:.1f}"
        return f"{100 * self.mean:.1f}{spread}"

    def minus(self, other: Values) -> Values:
        """Difference seed by seed (a seed fixes test split and start, so the difference is paired)."""
        mine, its = (
            dict(zip(self.seeds, self.values, strict=True)),
            dict(zip(other.seeds, other.values, strict=True)),
        )
        shared = tuple(seed for seed in self.seeds if seed in its)
        return Values(shared, tuple(mine[seed] - its[seed] for seed in shared))

    def verdict(self) -> str:
        """`better`, `worse` or `no clear difference`, for a difference."""
        if self.spread is None:
            return "better" if self.mean > 0 else "worse"
        error = self.spread / math.sqrt(len(self.values))
        if abs(self.mean) <= 2 * error:
            return "no clear difference"
        return "better" if self.mean > 0 else "worse"


Table = dict[tuple[str, str, str], Values]  # (arrangement, privacy, site or 'all') -> accuracy


def read(folder: Path) -> tuple[Table, list[dict[str, Any]]]:
    """Accuracies and the records themselves. Raises RecordError for a record that cannot be read."""
    from fedtune.runs import record

    found: dict[tuple[str, str, str], dict[int, float]] = defaultdict(dict)
    records = []
    for path in sorted(folder.glob("*-seed*.json")):
        arrangement, privacy, seed = path.stem.rsplit("-", 2)
        one = record.read(path)
        records.append(one)
        number = int(seed.removeprefix("seed"))
        found[arrangement, privacy, "all"][number] = one["metrics"]["accuracy"]
        for site, row in one["metrics"]["per_site"].items():
            found[arrangement, privacy, site][number] = row["accuracy"]
    table = {key: Values(tuple(sorted(of)), tuple(of[s] for s in sorted(of))) for key, of in found.items()}
    return table, records


def table_markdown(table: Table) -> str:
    """Rows: trained on what, with which privacy. Columns: tested where. A site's own cell is bold."""
    lines = ["| trained on | privacy | all sites | " + " | ".join(SITES) + " |", "|---|---|" + "---:|" * 5]
    for privacy, words in PRIVACY.items():
        for arrangement in (*(f"alone_{site}" for site in SITES), "federation", "pooled"):
            cells = []
            for where in ("all", *SITES):
                value = table.get((arrangement, privacy, where))
                text = "-" if value is None else value.points()
                cells.append(f"**{text}**" if arrangement == f"alone_{where}" else text)
            name = arrangement.replace("alone_", "") + (" alone" if arrangement.startswith("alone") else "")
            lines.append(f"| {name} | {words} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def learnt(table: Table) -> str:
    """Three sentences, each from the numbers; a comparison whose runs are missing is left out."""
    said = []
    for privacy, words in PRIVACY.items():
        together = table.get(("federation", privacy, "all"))
        if together is None:
            continue
        gains = {}
        for site in SITES:
            alone, joined = (
                table.get((f"alone_{site}", privacy, site)),
                table.get(("federation", privacy, site)),
            )
            if alone is not None and joined is not None:
                gains[site] = joined.minus(alone)
        parts = [
            f"**{words[0].upper()}{words[1:]}**, the federation is right on {together.points()} percent "
            "of all test texts"
        ]
        everywhere = {
            site: table[key] for site in SITES if (key := (f"alone_{site}", privacy, "all")) in table
        }
        if everywhere:
            best = max(everywhere, key=lambda site: everywhere[site].mean)
            parts.append(f"the best site alone ({best}) on {everywhere[best].points()}")
        pooled = table.get(("pooled", privacy, "all"))
        if pooled is not None:
            parts.append(f"and one model on the pooled data, which nobody may make, on {pooled.points()}")
        text = ", ".join(parts) + "."
        if gains:
            text += " Against a site's own model on the site's own texts, joining means "
            text += ", ".join(
                f"{100 * gain.mean:+.1f} points for {site} ({gain.verdict()})" for site, gain in gains.items()
            )
            text += "."
        said.append(text)
    costs = []
    for arrangement in ("federation", "pooled"):
        keys = [(arrangement, privacy, "all") for privacy in PRIVACY]
        if all(key in table for key in keys):
            cost = table[keys[0]].minus(table[keys[1]])
            costs.append(
                f"{100 * cost.mean:.1f} points in the {'pool' if arrangement == 'pooled' else arrangement}"
            )
    lost = [
        table["alone_" + site, "none", site].minus(table["alone_" + site, "epsilon8", site])
        for site in SITES
        if ("alone_" + site, "none", site) in table and ("alone_" + site, "epsilon8", site) in table
    ]
    if lost:
        shares = [100 * one.mean for one in lost]
        costs.append(f"{min(shares):.1f} to {max(shares):.1f} points to a site alone, on its own texts")
    if costs:
        said.append(f"**The price of privacy** at epsilon 8 is {', '.join(costs)}.")
    return "\n\n".join(f"{number}. {text}" for number, text in enumerate(said, start=1))


@alike()
def figure(table: Table, path: Path, majority: float | None) -> None:
    """One panel a privacy setting: accuracy at each site, alone, federated and pooled, every seed shown."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    places = (*SITES, "all")
    figure, axes = plt.subplots(1, len(PRIVACY), figsize=(10.5, 4.6), sharey=True, layout="constrained")
    for axis, (privacy, words) in zip(axes, PRIVACY.items(), strict=True):
        for offset, kind in zip((-0.22, 0.0, 0.22), COLORS, strict=True):
            for column, place in enumerate(places):
                values = _shown(table, kind, privacy, place)
                at, color = column + offset, COLORS[kind]
                axis.scatter([at] * len(values), values, s=16, color=color, alpha=0.45, linewidths=0)
                # Over all texts "alone" is four models, and their mean is nobody's.
                if values and not (kind == "alone" and place == "all"):
                    axis.scatter(at, statistics.fmean(values), s=80, color=color, marker="_", linewidths=2.5)
        if majority is not None:
            axis.axhline(100 * majority, color="#999999", lw=1, ls=":")
        axis.axvline(len(SITES) - 0.5, color="#dddddd", lw=1)
        axis.set_xticks(range(len(places)), [*SITES, "all texts"])
        axis.set_title(words[0].upper() + words[1:], fontsize=11)
        axis.grid(axis="y", color="#eeeeee")
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_ylabel("accuracy on the site's test texts, percent")
    figure.legend(handles=_legend(), fontsize=9, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _legend() -> list[Any]:
    from matplotlib.lines import Line2D

    words = {"alone": "one site alone", "federation": "federation of the four", "pooled": "pooled data"}
    lines = [
        Line2D([], [], color=COLORS[kind], marker="_", ls="", ms=9, mew=2.5, label=label)
        for kind, label in words.items()
    ]
    guess = Line2D([], [], color="#999999", ls=":", lw=1, label="always the commonest label (all texts)")
    return [*lines, guess]


def _shown(table: Table, kind: str, privacy: str, place: str) -> list[float]:
    """Percent, one for each seed. Alone, over all texts: the mean over seeds of each of the four models."""
    if kind == "alone" and place == "all":
        each = (table.get((f"alone_{site}", privacy, "all")) for site in SITES)
        return [100 * values.mean for values in each if values is not None]
    values = table.get((f"alone_{place}" if kind == "alone" else kind, privacy, place))
    return [] if values is None else [100 * value for value in values.values]


def majority_rate(records: Sequence[dict[str, Any]]) -> float | None:
    """How often the commonest label of all test texts is right: the mean of what the records say."""
    rates = [one["metrics"].get("majority_rate") for one in records]
    known = [rate for rate in rates if rate is not None]
    return statistics.fmean(known) if known else None


README = """\
# First federation: what is joining good for?

**Question.** Four sites hold private opinions of different kinds: newspaper editorials, movie reviews,
product reviews, tweets. Each can train a sentiment classifier alone; together they can train one by federated
learning, in which no text moves; and if all texts could be put into one place, which is what nobody may do,
there would be a pooled model. How much better is the federation than being alone, how far is it from the
pool, and what does differential privacy change?

```
python simulations/first_federation/study.py
```

runs everything ({runs} runs, {minutes} minutes in all on {hardware}) and writes this page; `--report` writes
it from `records/` alone. Every arrangement has the same model, number of rounds and steps, and sampling rate,
so each sees its own data equally often. The test texts are those of all four sites, the same for every
arrangement with the same seed, and no person is in both parts. A seed fixes the split and the start. With
privacy: DP-SGD, one record as the unit, add or remove one, epsilon 8 over the whole run at delta 2.5e-5, on
each node by itself (trust local); the pool is one node.

Settings: {settings}; nothing but the adapter was given, the rest is what `train=auto` chooses.

## Accuracy, percent (mean ± standard deviation over {seeds})

Bold: a site's own model on the site's own texts.

{table}

![accuracy by site](figure.png)

A dot is a seed, a bar the mean; over all texts, the brown dots are the four sites' own models.

## What was learnt

{learnt}

"Better" and "worse" mean a paired difference of more than two standard errors over the seeds; with three
seeds that is weak evidence, and the records are there to look at.
Settings were not tuned for each arrangement.
"""


def write(records_folder: Path, target: Path) -> str:
    """Makes figure.png and README.md in `target`; returns what to tell the person."""
    table, records = read(records_folder)
    if not records:
        return f"no records in {records_folder} yet"
    target.mkdir(parents=True, exist_ok=True)
    figure(table, target / "figure.png", majority_rate(records))
    seeds = sorted({one["run"]["seed"] for one in records})
    first, hardware = records[0], records[0]["run"]["hardware"]
    text = README.format(
        runs=len(records),
        minutes=round(sum(one["run"]["seconds"] for one in records) / 60),
        hardware=f"{hardware['usable_cores']} cores of {hardware['processor']}",
        settings=settings_line(first["config"]),
        seeds=f"{len(seeds)} seeds" if len(seeds) > 1 else "one seed",
        table=table_markdown(table),
        learnt=learnt(table),
    )
    (target / "README.md").write_text(text, encoding="utf-8")
    return f"{len(records)} records; wrote {target / 'README.md'} and {target / 'figure.png'}"


def settings_line(config: dict[str, Any]) -> str:
    """The settings that all runs share, as overrides."""
    names = {
        "model": ("name", "quantization"),
        "adapter": ("name",),
        "train": ("sample_rate", "local_steps", "learning_rate", "optimizer"),
        "federation": ("num_rounds", "strategy"),
    }
    words = [
        f"{group}.{key}={json.dumps(config[group][key]).strip(chr(34))}"
        for group, keys in names.items()
        for key in keys
    ]
    return "`" + " ".join(words) + "`"
