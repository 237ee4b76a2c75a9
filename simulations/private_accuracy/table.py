"""Table, figure and README of the study, from its record files alone; `study.py --report` runs this."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from fedtune.runs.figures import alike

HERE = Path(__file__).resolve().parent
CORPORA = ("banking77", "clinc150", "sms_spam", "sms_spam_50", "opinions")
ADAPTERS = ("head", "ffa_lora", "lora", "bitfit")
TRUSTS = ("local", "distributed")
EPSILONS = (1, 3, 8)
WHAT = {
    "banking77": "banking77, 77 classes, 4 equal nodes",
    "clinc150": "clinc150, 150 classes, 10 nodes by domain",
    "sms_spam": "sms_spam, 4 equal nodes",
    "sms_spam_50": "sms_spam, 50 equal nodes",
    "opinions": "opinions, 2 classes, 4 natural sites",
}
_COLUMNS = 3  # panels in a row of the figure
_COLORS = {"local": "#1f5fa8", "distributed": "#b5651d", "none": "#4a4a4a"}
_NAMES = {
    "local": "local: nobody is trusted",
    "distributed": "distributed: secure sums",
    "none": "without privacy",
}

Key = tuple[str, str, str, int | None]  # corpus, adapter, trust, epsilon
Values = dict[Key, list[float]]


def read(records: Path) -> tuple[Values, dict[str, str]]:
    """Accuracies by (corpus, adapter, trust, epsilon), one a seed; and what each corpus was trained by."""
    values: Values = defaultdict(list)
    recipes: dict[str, str] = {}
    for path in sorted(records.glob("*.json")):
        record: dict[str, Any] = json.loads(path.read_text())
        corpus, adapter, trust, *_ = path.stem.split("-")
        epsilon = record["privacy"]["target_epsilon"]
        values[corpus, adapter, trust, None if epsilon is None else int(epsilon)].append(
            record["metrics"]["accuracy"]
        )
        if epsilon is not None:
            recipes[adapter] = record["federation"]["recipe"]
    return values, recipes


def cell(values: list[float] | None) -> str:
    """Mean in percent with its standard error, and how many seeds where that is not three."""
    if not values:
        return "not run"
    mean = f"{100 * statistics.fmean(values):.1f}"
    if len(values) == 1:
        return f"{mean} (one seed)"
    error = 100 * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean} ± {error:.1f}"


def table(values: Values, earlier: dict[Key, list[str]]) -> str:
    """Rows: corpus, adapter, trust. Columns: epsilons, and without privacy. Marked: what is in `earlier`, the
    cells with a record that was made with settings which the recipe does not choose any more."""
    heads = " | ".join(f"epsilon {epsilon}" for epsilon in EPSILONS)
    lines = [
        f"| corpus | adapter | trust | {heads} | none |",
        "|---|---|---|" + "---:|" * (len(EPSILONS) + 1),
    ]
    for corpus in CORPORA:
        for adapter in ADAPTERS:
            if not any(key[:2] == (corpus, adapter) for key in values):
                continue
            for trust in TRUSTS:
                keys: list[Key] = [(corpus, adapter, trust, epsilon) for epsilon in EPSILONS]
                keys.append((corpus, adapter, "none", None))
                row = [cell(values.get(key)) + (" †" if key in earlier else "") for key in keys]
                lines.append(f"| {WHAT[corpus]} | {adapter} | {trust} | {' | '.join(row)} |")
    if earlier:
        by_settings: dict[str, list[str]] = {}
        for (corpus, adapter, trust, epsilon), settings in earlier.items():
            which = f"{corpus} {adapter} {trust}" + (f" {epsilon}" if epsilon is not None else "")
            by_settings.setdefault(", ".join(f"`{name}`" for name in settings), []).append(which)
        marked = "; ".join(f"{', '.join(cells)}: {settings}" for settings, cells in by_settings.items())
        lines += ["", f"† with a record that was made before the recipe changed. {marked}."]
    return "\n".join(lines)


@alike()
def draw(values: Values, path: Path) -> None:
    """Accuracy against epsilon, a panel a corpus, of the best adapter there is for it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    best = {
        corpus: next((a for a in ("ffa_lora", "head") if (corpus, a, "local", 8) in values), None)
        for corpus in CORPORA
    }
    shown = [corpus for corpus in CORPORA if best[corpus] is not None]
    # Few panels a row, so that the numbers can be read where a page is 800 pixels wide.
    rows = math.ceil(len(shown) / _COLUMNS)
    figure, grid = pyplot.subplots(
        rows, _COLUMNS, figsize=(3.1 * _COLUMNS, 3.1 * rows), layout="constrained", squeeze=False
    )
    panels = [panel for row in grid for panel in row]
    for panel in panels[len(shown) :]:
        panel.axis("off")
    for panel, corpus in zip(panels, shown, strict=False):
        adapter = best[corpus] or ""
        if adapter != "head" and all((corpus, "head", t, e) in values for t in TRUSTS for e in EPSILONS):
            for trust in TRUSTS:
                heads = [100 * statistics.fmean(values[corpus, "head", trust, e]) for e in EPSILONS]
                panel.plot(EPSILONS, heads, color=_COLORS[trust], alpha=0.4, linewidth=1, linestyle=":")
            panel.annotate(
                "the head alone", (3, max(heads)), xytext=(0, -22), textcoords="offset points",
                ha="center", fontsize=8, color="#666666",
            )  # fmt: skip
        for trust in TRUSTS:
            found = [
                (e, values[corpus, adapter, trust, e])
                for e in EPSILONS
                if (corpus, adapter, trust, e) in values
            ]
            if not found:
                continue
            means = [100 * statistics.fmean(v) for _, v in found]
            errors = [100 * statistics.stdev(v) / math.sqrt(len(v)) if len(v) > 1 else 0.0 for _, v in found]
            panel.errorbar(
                [e for e, _ in found],
                means,
                errors,
                color=_COLORS[trust],
                marker="o",
                capsize=3,
                label=_NAMES[trust],
            )
            for (epsilon, _), mean in zip(found, means, strict=True):
                above = trust == "distributed"
                panel.annotate(
                    f"{mean:.1f}", (epsilon, mean), xytext=(0, 7 if above else -13),
                    textcoords="offset points",
                    ha="center", fontsize=9, color=_COLORS[trust],
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5, "alpha": 0.8},
                )  # fmt: skip
        if (corpus, adapter, "none", None) in values:
            limit = 100 * statistics.fmean(values[corpus, adapter, "none", None])
            panel.axhline(limit, color=_COLORS["none"], linestyle="--", linewidth=1, label=_NAMES["none"])
        what, _, how = WHAT[corpus].partition(", ")
        panel.set_title(f"{what}, {adapter}\n{how}", fontsize=9)
        panel.set_xscale("log")
        panel.set_xticks(EPSILONS, [str(e) for e in EPSILONS])
        panel.minorticks_off()
        panel.margins(x=0.12)
        # A range of a dozen points at least, so that noise does not look like a trend.
        low, high = panel.dataLim.ymin - 2.0, panel.dataLim.ymax + 1.5
        panel.set_ylim(min(low, high - 12.0), high)
        panel.set_xlabel("epsilon (one record)")
        panel.grid(alpha=0.25)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    for row in grid:
        row[0].set_ylabel("test accuracy, percent")
    handles, labels = panels[0].get_legend_handles_labels()
    if len(panels) > len(shown):
        panels[-1].legend(handles, labels, loc="center", frameon=False, fontsize=10)
    else:
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def write(records: Path, folder: Path, earlier: dict[Key, list[str]]) -> Path:
    """Writes figure.png, and the table into README.md between its marks."""
    values, recipes = read(records)
    if not values:
        raise SystemExit(f"There are no records in {records}.")
    draw(values, folder / "figure.png")
    readme = folder / "README.md"
    begin, end = "<!-- table -->", "<!-- end -->"
    text = readme.read_text() if readme.is_file() else f"{begin}\n{end}\n"
    head, _, rest = text.partition(begin)
    tail = rest.partition(end)[2]
    how = "\n".join(
        f"- `{adapter}` (of one of its runs): {recipes[adapter]}"
        for adapter in ADAPTERS
        if adapter in recipes
    )
    readme.write_text(f"{head}{begin}\n{table(values, earlier)}\n\n{how}\n{end}{tail}")
    return readme
