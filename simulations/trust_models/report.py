"""Figure and README of the study, from its record files alone; `study.py --report` runs this by itself.

A seed fixes the split into training and test texts, and the split moves accuracy more than anything studied
here; so arrangements are compared seed by seed, and a standard error stands beside every mean.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from arrangements import ARRANGEMENTS, EPSILONS

from fedtune.runs.figures import alike
from simulations.first_federation import report as _first

COLORS = {"local": "#1f5fa8", "distributed": "#b5651d", "pooled": "#4a4a4a", "central": "#2e8b57"}
MARKERS = {"local": "o", "distributed": "D", "pooled": "s", "central": "^"}
# Two-sided 95 percent quantiles of Student's t by degrees of freedom: three values have two.
_T95 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 11: 2.201}


def error_of(values: Iterable[float]) -> float | None:
    """Standard error of the mean; None for a single value."""
    known = list(values)
    return statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else None


def half_interval(values: Iterable[float]) -> float | None:
    """Half the 95 percent confidence interval of the mean, by Student's t; None for a single value."""
    known = list(values)
    error = error_of(known)
    return None if error is None else _T95.get(len(known) - 1, 2.2 if len(known) > 9 else 12.71) * error


def points(values: Iterable[float], sign: bool = False) -> str:
    """Mean ± standard error, in percent."""
    known = list(values)
    error = error_of(known)
    mean = 100 * statistics.fmean(known)
    number = f"{mean:+.2f}" if sign else f"{mean:.1f}"
    return number if error is None else f"{number} ± {100 * error:.{2 if sign else 1}f}"


def against(table: Any, one: str, other: str, epsilon: int) -> list[float]:
    """Differences in accuracy, one for each seed that both have."""
    keys = [(name, f"epsilon{epsilon}", "all") for name in (one, other)]
    return list(table[keys[0]].minus(table[keys[1]]).values) if all(key in table for key in keys) else []


def table_markdown(table: Any) -> str:
    """Rows: arrangements. Columns: epsilons. Central comes last, under its own heading."""
    heads = " | ".join(f"epsilon {epsilon}" for epsilon in EPSILONS)
    lines = [f"| arrangement | protects | {heads} |", "|---|---|" + "---:|" * len(EPSILONS)]
    for name in ARRANGEMENTS:
        unit = "**a client** (another promise)" if name == "central" else "a record"
        found = (table.get((name, f"epsilon{epsilon}", "all")) for epsilon in EPSILONS)
        row = ["-" if of is None else points(of.values) for of in found]
        lines.append(f"| {name} | {unit} | " + " | ".join(row) + " |")
    for one, other in (("distributed", "pooled"), ("local", "distributed")):
        row = [points(of, sign=True) if (of := against(table, one, other, e)) else "-" for e in EPSILONS]
        lines.append(f"| *{one} minus {other}* | | " + " | ".join(row) + " |")
    return "\n".join(lines)


def plan_markdown(records: list[dict[str, Any]]) -> str:
    """What each arrangement did for its epsilon: noise, promise as accounted, traffic, time. First seed."""
    lines = [
        "| arrangement | steps | noise multiplier at epsilon " + ", ".join(map(str, EPSILONS)) + " | delta | "
        "KB sent, a node | seconds a run |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for name in ARRANGEMENTS:
        mine = [one for one in records if one["name"] == name and one["config"]["privacy"]["epsilon"]]
        if not mine:
            continue
        mine.sort(key=lambda one: (one["run"]["seed"], one["config"]["privacy"]["epsilon"]))
        noise: dict[float, float] = {}
        for one in mine:
            noise.setdefault(one["config"]["privacy"]["epsilon"], one["privacy"]["noise_multiplier"])
        sent = mine[0]["cost"]["bytes_up"] / mine[0]["federation"]["nodes"] / 1000
        seconds = statistics.median(one["run"]["seconds"] for one in mine)
        train, rounds = mine[0]["config"]["train"], mine[0]["config"]["federation"]["num_rounds"]
        steps = rounds if name == "distributed" else rounds * train["local_steps"]
        multipliers = ", ".join(f"{value:.2f}" for value in noise.values())
        lines.append(
            f"| {name} | {steps} in {rounds} round{'s' * (rounds > 1)} | {multipliers} | "
            f"{mine[0]['privacy']['delta']:g} | {sent:,.0f} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def claim(table: Any) -> str:
    """Whether distributed equals pooled: per epsilon, and over all pairs."""
    pairs = {epsilon: against(table, "distributed", "pooled", epsilon) for epsilon in EPSILONS}
    every = [value for of in pairs.values() for value in of]
    half = half_interval(every)
    if half is None:
        return "**Distributed against pooled**: too few runs to say anything."
    mean = statistics.fmean(every)
    rows = ", ".join(f"{points(of, sign=True)} at epsilon {epsilon}" for epsilon, of in pairs.items() if of)
    text = (
        f"**Distributed against pooled.** Distributed minus pooled is {rows}; over all {len(every)} pairs "
        f"{points(every, sign=True)} percentage points, {_interval(every)}. "
    )
    if abs(mean) <= half:
        text += (
            "So the two are equal within noise, and differences beyond the interval are excluded: that the "
            "server sees only a masked sum costs no accuracy that could be seen here."
        )
    else:
        text += f"So distributed is {'better' if mean > 0 else 'worse'} by more than the noise explains."
    for epsilon, of in pairs.items():
        if len(of) > 1 and _clear(of) == "clear of zero":
            text += (
                f" Taken alone, epsilon {epsilon} is clear of zero ({_interval(of)}), as one of three "
                "comparisons with three seeds may be by chance."
            )
    return text


def _interval(values: list[float]) -> str:
    mean, half = statistics.fmean(values), half_interval(values)
    assert half is not None
    return f"95 percent interval {100 * (mean - half):+.2f} to {100 * (mean + half):+.2f}"


def _clear(values: list[float]) -> str:
    half = half_interval(values)
    if half is None:
        return "one seed"
    return "clear of zero" if abs(statistics.fmean(values)) > half else "not clear of zero"


def _noise_norms(records: list[dict[str, Any]]) -> str | None:
    """Norm of central's noise on a round's average, over the clipping norm, by epsilon."""
    found = {}
    for one in records:
        if one["config"]["privacy"]["trust"] == "central":
            spread = one["privacy"]["noise_multiplier"] / one["federation"]["nodes"]
            found[one["config"]["privacy"]["epsilon"]] = spread * math.sqrt(one["cost"]["num_parameters"])
    rows = (f"{found[epsilon]:.1f} at epsilon {epsilon:g}" for epsilon in sorted(found))
    return ", ".join(rows) if found else None


def learnt(table: Any, records: Iterable[dict[str, Any]] = ()) -> str:
    """Paragraphs made of the numbers; one whose runs are missing is left out."""
    said = [claim(table)]
    gaps = {epsilon: against(table, "local", "distributed", epsilon) for epsilon in EPSILONS}
    plain = [table.get((name, "none", "all")) for name in ("local", "pooled")]
    if all(gaps.values()):
        rows = ", ".join(
            f"{points(of, sign=True)} at epsilon {epsilon} ({_clear(of)})" for epsilon, of in gaps.items()
        )
        every = [value for of in gaps.values() for value in of]
        first, last = (gaps[epsilon] for epsilon in (EPSILONS[0], EPSILONS[-1]))
        change = [b - a for a, b in zip(first, last, strict=False)]
        text = (
            "**What trusting nobody costs.** Local minus distributed is "
            f"{rows}, over all {points(every, sign=True)} ({_clear(every)}); from epsilon {EPSILONS[0]} to "
            f"{EPSILONS[-1]} it changes by {points(change, sign=True)} ({_clear(change)})."
        )
        if all(plain):
            shift = list(plain[0].minus(plain[1]).values)
            text += (
                " Without privacy the federation minus the pool is "
                f"{points(shift, sign=True)} ({_clear(shift)})."
            )
        said.append(text)
    free = table.get(("pooled", "none", "all"))
    costs = {
        epsilon: list(free.minus(table[key]).values)
        for epsilon in EPSILONS
        if free is not None and (key := ("pooled", f"epsilon{epsilon}", "all")) in table
    }
    if free is not None and costs:
        rows = ", ".join(f"{points(of, sign=True)} at epsilon {epsilon}" for epsilon, of in costs.items())
        said.append(
            f"**What privacy costs at all.** The pool without privacy reaches {points(free.values)} percent "
            f"with the same steps; this minus the private pool is {rows}. With 20,000 records and an "
            "adapter of a thousand numbers privacy is cheap, which leaves little room for arrangements to "
            "differ: a weakness that shows only with large adapters or small data would not show here."
        )
    rows = ", ".join(
        f"{points(table[key].values)} at epsilon {epsilon}"
        for epsilon in EPSILONS
        if (key := ("central", f"epsilon{epsilon}", "all")) in table
    )
    if rows:
        said.append(
            f"**Central** reaches, in percent, {rows}. Its epsilon hides from everyone but the server that a "
            "whole client with all its 200 records took part, among only 100 clients and at delta 0.005; "
            "the others' hides one record among 20,000 at delta 0.000025."
        )
        if (norms := _noise_norms(list(records))) is not None:
            said[-1] += (
                f" The noise on a round's average update has a norm of about {norms}, against at most 1 for "
                "the average itself: with 100 clients it is not averaged away, which is why client-level "
                "privacy wants many."
            )
        said[-1] += (
            " It does not follow that a record is hidden with the same epsilon: another record makes another "
            "update, which moves the sum by up to twice the norm."
        )
    return "\n\n".join(f"{number}. {text}" for number, text in enumerate(said, start=1))


@alike()
def figure(table: Any, path: Path) -> None:
    """Left: the three that protect a record. Right: central. Dots are seeds, bars standard errors."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawing, axes = plt.subplots(
        1, 2, figsize=(9.5, 4.4), sharey=True, width_ratios=(2, 1), layout="constrained"
    )
    panels = (
        ("local", "distributed", "pooled"),
        ("central",),
    )
    titles = (
        "A record is protected\n(20,000 records, delta 2.5e-5)",
        "A client is protected\n(100 clients, delta 0.005)",
    )
    free = table.get(("pooled", "none", "all"))
    for axis, names, title in zip(axes, panels, titles, strict=True):
        for place, name in enumerate(names):
            shift = 0.17 * (place - (len(names) - 1) / 2)
            at, means, errors = [], [], []
            for column, epsilon in enumerate(EPSILONS):
                of = table.get((name, f"epsilon{epsilon}", "all"))
                if of is None:
                    continue
                values = [100 * value for value in of.values]
                at.append(column + shift)
                means.append(statistics.fmean(values))
                errors.append(error_of(values) or math.nan)
                axis.scatter(
                    [column + shift] * len(values), values, s=14, color=COLORS[name], alpha=0.35, linewidths=0
                )
            axis.errorbar(
                at,
                means,
                yerr=errors,
                color=COLORS[name],
                marker=MARKERS[name],
                ms=6,
                lw=1.2,
                capsize=3,
                label=name,
            )
        if free is not None:
            mean = 100 * statistics.fmean(free.values)
            axis.axhline(mean, color="#999999", lw=1, ls=":", label="pooled, no privacy")
        axis.set_xticks(range(len(EPSILONS)), [str(epsilon) for epsilon in EPSILONS])
        axis.set_xlim(-0.4, len(EPSILONS) - 0.6)
        axis.set_xlabel("epsilon" + (" of a client" if names == ("central",) else " of a record"))
        axis.set_title(title, fontsize=11)
        axis.grid(axis="y", color="#eeeeee")
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        handles, labels = axis.get_legend_handles_labels()  # lines come before error bars
        axis.legend(
            [*handles[1:], handles[0]] if free is not None else handles,
            [*labels[1:], labels[0]] if free is not None else labels,
            fontsize=9,
            loc="lower right",
            frameon=False,
        )
    axes[0].set_ylabel("accuracy on the test texts, percent")
    drawing.savefig(path, dpi=150)
    plt.close(drawing)


README = """\
# Trust models: what does it cost not to trust the server?

**Question.** Who adds the noise decides whom one must trust. *Local*: each node makes its own update private.
*Distributed*: each round is one DP-SGD step over the union of all nodes' data, and the server sees only a
masked sum that contains every node's share of the noise. *Pooled*: DP-SGD on all data in one place, which
nobody may do, and which distributed should equal. *Central*: the server sees every update and adds the noise.
What accuracy does each reach at epsilon 1, 3 and 8?

```
python simulations/trust_models/study.py
```

makes all runs ({runs}, in {minutes} minutes on {hardware}) and writes this page;
`--report` writes it from the record files alone. Data: `opinions`, of which a seed holds out about {test}
texts for the test; to say always the commonest label is right on {majority:.1f} percent of them. Local and
distributed: the four natural sites. Central: 100 clients with 200 records each, drawn alike.

Settings of all: {settings}; everything else is what `train=auto` chooses:

{recipes}

The recipe was not tuned for this study, though it was measured on this corpus among others.

## Accuracy, percent (mean ± standard error over {seeds})

{table}

**Central's epsilon is not the others'.** It protects a whole client, and the others' a record, at another
delta: the numbers are not comparable, and the last row is not a rank among the rows above it.

**Distributed's epsilon is towards the other nodes**, who see most: each knows its own share of the noise, a
quarter of the variance here, and can take it off. So its noise is 15 percent more than the pool's at the same
epsilon; the multiplier below is that of what remains.

![accuracy by epsilon](figure.png)

A pale mark is a seed, a bar the standard error. A seed's split moves all arrangements together, so the paired
differences in the table are more exact than the bars suggest.

## What each did

{plan}

A local node's noise is on the sum of its own batch, distributed's on the sum over all four nodes. What is
sent includes the exchanges of secure aggregation. That one distributed round is the step that the pool would
take, with everybody sampled and next to no noise, is a test
(`tests/federation/secagg/test_distributed_round.py`); this study is about whole runs.

## What was learnt

{learnt}

Intervals are Student's, and take the pairs of one seed at different epsilons as independent: they share a
split, and each draws its own noise from the operating system. Three seeds are weak evidence for any single
epsilon.
"""


def write(records_folder: Path, target: Path) -> str:
    """Makes figure.png and README.md in `target`; returns what to tell the person."""
    table, records = _first.read(records_folder)
    if not records:
        return f"no records in {records_folder} yet"
    names = [path.stem.split("-")[0] for path in sorted(records_folder.glob("*-seed*.json"))]
    for one, name in zip(records, names, strict=True):
        one["name"] = name
    target.mkdir(parents=True, exist_ok=True)
    figure(table, target / "figure.png")
    seeds = sorted({one["run"]["seed"] for one in records})
    first, hardware = records[0], records[0]["run"]["hardware"]
    text = README.format(
        runs=len(records),
        minutes=round(sum(one["run"]["seconds"] for one in records) / 60),
        hardware=f"{hardware['usable_cores']} shared cores of {hardware['processor']}",
        test=100 * round(statistics.fmean(one["data"]["test_records"] for one in records) / 100),
        majority=100 * (_first.majority_rate(records) or math.nan),
        settings=settings_line(first["config"]),
        seeds=f"{len(seeds)} seeds" if len(seeds) > 1 else "one seed",
        table=table_markdown(table),
        plan=plan_markdown(records),
        learnt=learnt(table, records),
        recipes="\n".join(recipes_of(records)),
    )
    (target / "README.md").write_text(text, encoding="utf-8")
    return f"{len(records)} records; wrote {target / 'README.md'} and {target / 'figure.png'}"


def recipes_of(records: list[dict[str, Any]]) -> list[str]:
    """A line for each arrangement: how it was trained, as the record of one of its private runs says."""
    said = {
        one["name"]: f"- {one['name']}: {one['federation']['recipe']}"
        for one in records
        if one["config"]["privacy"]["epsilon"]
    }
    return [said[name] for name in ARRANGEMENTS if name in said]


def settings_line(config: dict[str, Any]) -> str:
    """The settings that all runs share, as overrides."""
    names = {
        "model": ("name", "quantization"),
        "adapter": ("name",),
    }
    words = [
        f"{group}.{key}={json.dumps(config[group][key]).strip(chr(34))}"
        for group, keys in names.items()
        for key in keys
    ]
    return "`" + " ".join(words) + "`"
