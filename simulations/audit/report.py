"""figure.png and README.md of the audit study, from its record files and from nothing else."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedtune.runs.figures import alike

Record = dict[str, Any]
COLORS = {"sampled": "#0072B2", "every step": "#009E73", "distributed": "#CC79A7"}
MARKERS = {"sampled": "o", "every step": "^", "distributed": "s"}
WORDS = {
    "sampled": "DP-SGD, rate 0.05, 120 steps",
    "every step": "DP-SGD, rate 1, 12 steps",
    "distributed": "distributed, rate 0.05, 30 rounds",
}
_FLOOR = 0.06  # where the figure's logarithmic axis has its 0
METHODS = ("one-run", "two-sample", "curve")


def read(folder: Path) -> list[Record]:
    """All records, in the order of their names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def bound(record: Record, method: str) -> float:
    """The lower bound of one method."""
    return next(float(one["epsilon_lower"]) for one in record["audit"]["bounds"] if one["method"] == method)


def right(records: Sequence[Record], plan: str, epsilon: float) -> list[Record]:
    """Audits of the right mechanism, one a seed."""
    return [
        one
        for one in records
        if one["bug"] is None and one["cell"]["plan"] == plan and one["cell"]["epsilon"] == epsilon
    ]


def budgets(records: Sequence[Record]) -> list[float]:
    """The claimed budgets there are records of."""
    return sorted({one["cell"]["epsilon"] for one in records if one["bug"] is None})


def bugs(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Audits by bug, the least visible first."""
    found: dict[str, list[Record]] = {}
    for one in records:
        if one["bug"]:
            found.setdefault(one["bug"], []).append(one)
    return dict(sorted(found.items(), key=lambda item: _lowest(item[1])))


def _lowest(records: Sequence[Record]) -> float:
    return min(float(one["audit"]["epsilon_lower"]) for one in records)


@alike()
def figure(records: Sequence[Record], path: Path) -> None:
    """Left: measured against claimed, right mechanisms. Right: bugs, at one claim."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, (left, bars) = plt.subplots(
        1, 2, figsize=(10.8, 4.8), layout="constrained", width_ratios=(1.0, 1.05)
    )
    values = budgets(records)
    ends = (values[0] / 1.5, values[-1] * 1.5)
    left.plot(ends, ends, color="black", lw=1.4)
    left.fill_between(ends, ends, (20 * ends[1],) * 2, color="#D55E00", alpha=0.10, lw=0)
    left.text(
        ends[0] * 1.1, 1.1 * values[-2], "above the line:\nthe claim is wrong", fontsize=9, color="#A04000"
    )
    for i, plan in enumerate(WORDS):
        for method, filled in (("curve", True), ("one-run", False)):
            for value in values:
                at = value * (1.0 + 0.03 * (i - 1))
                found = [bound(one, method) for one in right(records, plan, value)]
                shown = [max(one, _FLOOR) for one in found]
                face = COLORS[plan] if filled else "white"
                left.scatter(
                    [at] * len(shown), shown, s=26, marker=MARKERS[plan], facecolor=face,
                    edgecolor=COLORS[plan], linewidths=1.1, alpha=0.85, zorder=3 if filled else 2,
                )  # fmt: skip
    left.set(xscale="log", yscale="log", xlim=ends, ylim=(0.9 * _FLOOR, 2 * values[-1]))
    left.set_xticks(values, [f"{value:g}" for value in values])
    ticks = [_FLOOR, 0.125, 0.25, 0.5, 1, 2, 4, 8]
    left.set_yticks(ticks, ["0", *[f"{tick:g}" for tick in ticks[1:]]])
    left.minorticks_off()
    left.set_xlabel("claimed epsilon (an upper bound)")
    left.set_ylabel("measured epsilon (a lower bound)")
    left.set_title("The right mechanism", loc="left", fontsize=11, fontweight="bold")
    left.legend(handles=_legend(), fontsize=8, frameon=False, loc="lower right")
    _bars(bars, bugs(records), records)
    for axes in (left, bars):
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    drawn.savefig(path, dpi=150)
    plt.close(drawn)


def _legend() -> list[Any]:
    from matplotlib.lines import Line2D

    plans = [
        Line2D([], [], color=COLORS[plan], marker=MARKERS[plan], ls="", ms=6, label=words)
        for plan, words in WORDS.items()
    ]
    grey = {"color": "#555555", "marker": "o", "ls": "", "ms": 6}
    whole = Line2D([], [], **grey, label="by the whole curve")
    single = Line2D([], [], **grey, markerfacecolor="white", label="one-run bound (any mechanism)")
    return [*plans, whole, single]


def _bars(axes: Any, found: dict[str, list[Record]], records: Sequence[Record]) -> None:
    some = next(iter(found.values()))[0]
    plan, claimed = some["cell"]["plan"], some["cell"]["epsilon"]
    rows = {"nothing: the right mechanism": right(records, plan, claimed), **found}
    for place, ones in enumerate(rows.values()):
        color = "#0072B2" if place == 0 else "#D55E00"
        values = [float(one["audit"]["epsilon_lower"]) for one in ones]
        axes.barh(place, statistics.median(values), height=0.55, color=color, alpha=0.85)
        axes.scatter(values, [place] * len(values), s=9, color="black", zorder=3)
        axes.annotate(
            f"{statistics.median(values):.1f}",
            (max(values), place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            zorder=4,
        )
    axes.axvline(claimed, color="black", lw=1.4)
    axes.annotate(
        f"claimed: {claimed:g}",
        (claimed, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(4, -2),
        textcoords="offset points",
        va="top",
        fontsize=9,
    )
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(-0.6, len(rows) - 0.1)
    axes.set(xscale="log", xlim=(1.0, 150.0))
    axes.set_xticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
    axes.minorticks_off()
    axes.set_xlabel(f"measured epsilon (a lower bound; dots: seeds)\n{WORDS[plan]}", fontsize=9)
    axes.set_title("Broken mechanisms", loc="left", fontsize=11, fontweight="bold")


README = """\
# Claimed against measured epsilon

**Question.** Does the code do what the accountant is told that it does? For a right mechanism an attack must
never show more than is claimed; how near does it come? And are bugs that such frameworks have shipped seen?

```
python simulations/audit/study.py
```

makes everything ({audits} audits, {minutes:.0f} minutes of one busy core) and writes this page; `--report`
writes it from `records/` alone. Each audit is what `fedtune audit RUN_DIR` does: the plan's own sampler,
clipping, noise and averaging run on {canaries:,} gradient canaries, each in or out by a fair coin, and an
attacker who sees every release guesses the coins. No data, no model. Unit record, add or remove one, delta
{delta:g}; all bounds of an audit hold together with {confidence:g} percent confidence. Seeds: {seeds}.

![claimed against measured epsilon](figure.png)

## The right mechanism: median lower bound over the seeds

| plan | claimed | one-run | two-sample | curve | curve / claimed | largest of all bounds and seeds |
|---|---|---|---|---|---|---|
{table}

`one-run` (Steinke, Nasr and Jagielski 2023) assumes nothing about the mechanism; `two-sample`
(Clopper-Pearson) assumes that canaries are independent; `curve` refutes the plan's whole privacy curve down
to some noise multiplier, and gives the epsilon that the plan would have with that. More is said in
`fedtune/audit/verdict.py`. A bound of 0 is an attack that showed nothing.

## Bugs, switched on in the plan "{buggy}" that claims epsilon {claim:g}

| what is broken | one-run | two-sample | curve | convicted |
|---|---|---|---|---|
{bug_table}

## What was learnt

{learnt}
"""


def write(folder: Path, target: Path) -> str:
    """Makes figure.png and README.md in `target`; returns what to tell the person."""
    records = read(folder)
    if not records:
        return f"no records in {folder} yet"
    figure(records, target / "figure.png")
    found = bugs(records)
    some = next(iter(found.values()))[0]
    first = records[0]["audit"]
    text = README.format(
        audits=len(records),
        minutes=sum(one["seconds"] for one in records) / 60,
        canaries=first["canaries"],
        delta=first["delta"],
        confidence=100 * first["confidence"],
        seeds=", ".join(str(seed) for seed in sorted({one["cell"]["seed"] for one in records})),
        table="\n".join(_rows(records)),
        buggy=WORDS[some["cell"]["plan"]],
        claim=some["cell"]["epsilon"],
        bug_table="\n".join(_bug_rows(found)),
        learnt=learnt(records),
    )
    (target / "README.md").write_text(text, encoding="utf-8")
    return f"{len(records)} records; wrote {target / 'README.md'} and {target / 'figure.png'}"


def _medians(records: Sequence[Record]) -> list[float]:
    return [statistics.median(bound(one, method) for one in records) for method in METHODS]


def _rows(records: Sequence[Record]) -> list[str]:
    rows = []
    for plan, words in WORDS.items():
        for value in budgets(records):
            ones = right(records, plan, value)
            if not ones:
                continue
            claimed = ones[0]["audit"]["epsilon_claimed"]
            one, two, whole = _medians(ones)
            most = max(bound(each, method) for each in ones for method in METHODS)
            rows.append(
                f"| {words} | {claimed:.2f} | {one:.2f} | {two:.2f} | {whole:.2f} | "
                f"{100 * whole / claimed:.0f} % | {most:.2f} |"
            )
    return rows


def _bug_rows(found: dict[str, list[Record]]) -> list[str]:
    rows = []
    for words, ones in found.items():
        one, two, whole = _medians(ones)
        guilty = sum(each["audit"]["epsilon_lower"] > each["audit"]["epsilon_claimed"] for each in ones)
        rows.append(f"| {words} | {one:.2f} | {two:.2f} | {whole:.2f} | {guilty} of {len(ones)} |")
    return rows


def learnt(records: Sequence[Record]) -> str:
    """What the records say, in words; every number in it is counted from them."""
    acquitted = [one for one in records if one["bug"] is None]
    over = sum(
        bound(one, method) > one["audit"]["epsilon_claimed"] for one in acquitted for method in METHODS
    )
    shares = {
        method: [bound(one, method) / one["audit"]["epsilon_claimed"] for one in acquitted]
        for method in METHODS
    }
    said = [
        f"**{over} of {len(METHODS) * len(acquitted)} bounds on right mechanisms are above the claim.** At "
        "95 percent confidence for the three of an audit together, a few could be, by chance.",
        f"**The curve is what makes an audit sharp.** In the median it shows "
        f"{100 * statistics.median(shares['curve']):.0f} percent of the claim (one-run bound: "
        f"{100 * statistics.median(shares['one-run']):.0f} percent). A single pair (epsilon, delta) is hard "
        "to break: to show epsilon 8 an attacker would have to be wrong less than once in 3,000 guesses.",
    ]
    sharp = {
        plan: statistics.median(
            bound(one, "curve") / one["audit"]["epsilon_claimed"]
            for one in acquitted
            if one["cell"]["plan"] == plan
        )
        for plan in WORDS
    }
    best, worst = max(sharp, key=lambda plan: sharp[plan]), min(sharp, key=lambda plan: sharp[plan])
    said.append(
        f"**Where the gap is.** It is smallest for {WORDS[best]} ({100 * sharp[best]:.0f} percent of the "
        f"claim is shown) and largest for {WORDS[worst]} ({100 * sharp[worst]:.0f} percent). A gap "
        "is the attack's, or the accountant's: a lower bound that is far below proves nothing about either."
    )
    found = bugs(records)
    all_guilty = {
        words: all(one["audit"]["epsilon_lower"] > one["audit"]["epsilon_claimed"] for one in ones)
        for words, ones in found.items()
    }
    seen = [words for words, guilty in all_guilty.items() if guilty]
    unseen = [words for words, guilty in all_guilty.items() if not guilty]
    said.append(
        f"**{len(seen)} of {len(found)} bugs are convicted with every seed**"
        + (f"; not with every seed: {', '.join(unseen)}." if unseen else ".")
        + " By the one-run bound alone it would be "
        + str(
            sum(
                all(bound(one, "one-run") > one["audit"]["epsilon_claimed"] for one in ones)
                for ones in found.values()
            )
        )
        + ".\n\n   Cyclic batches need patience: the attacker knows that they repeat, and not which of them "
        "a canary is in, so that the leak must add up over several passes (6 here; 3 were too few in a "
        "try-out)."
    )
    return "\n\n".join(f"{number}. {text}" for number, text in enumerate(said, start=1))
