"""`fedtune report`: all runs below some folders on one page, with the frontier as picture and as table.

Writes `report.html` (one file that needs nothing else and no network), `frontier.png`, `frontier.csv` and
`frontier.parquet`. All numbers and sentences of the page are made here, as one JSON value; its scripts draw.
That value is kept small, since it lies inside the page: settings that are the same everywhere are written
once, numbers have six significant digits, learning curves four decimals. An infinite epsilon is null.
"""

from __future__ import annotations

import dataclasses
import datetime
import html
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from fedtune import __version__
from fedtune.config.files import save
from fedtune.privacy.statement.words import few
from fedtune.report import figure
from fedtune.report.adoption import serving_numbers
from fedtune.report.advice import Advice, advise
from fedtune.report.collect import Collection, Run
from fedtune.report.constraints import CUTS, count_adoption, default_constraints
from fedtune.report.difference import difference, site_difference
from fedtune.report.frontier import (
    COSTS,
    Comparison,
    Point,
    Stat,
    compare,
    named_settings,
    table_rows,
    write_table,
)
from fedtune.report.panels import equal_costs, noisy_costs
from fedtune.report.tuning import Tuning, describe_search, tuning_cards, tuning_of, tuning_text
from fedtune.report.words import describe_settings, format_number, repeat_command, short_names

__all__ = ["Report", "page_data", "promise_line", "write_report"]

_FOR_OWNERS = (
    "Not for publication: this page shows times, energy and prices that depend on private records and are in "
    "no guarantee. Make it without --local for others."
)
# Observable Plot draws, and D3 under it; both lie in `templates/vendor` with their licences, as published.
_LIBRARY = ("vendor/d3.min.js", "vendor/plot.min.js")
_MOST_SITES = 7  # with a colour and a shape of their own
_SCRIPTS = ("page.js", "charts.js")


@dataclass(frozen=True)
class Report:
    """What was written, and what to say on the terminal."""

    page: Path
    picture: Path
    csv: Path
    parquet: Path
    text: str
    groups: Sequence[Mapping[str, Any]]
    notes: Sequence[str]

    def to_json(self) -> dict[str, Any]:
        """For a program: the files, and what is said of each group; the numbers are in the CSV."""
        said = ("name", "chosen", "advice", "promise", "caveats")
        return {
            **{name: str(getattr(self, name)) for name in ("page", "picture", "csv", "parquet")},
            "groups": [{name: group[name] for name in said} for group in self.groups],
            "notes": list(self.notes),
        }


def write_report(
    folders: Sequence[Path],
    prices: Sequence[str] = (),
    output: Path | None = None,
    *,
    local: bool = False,
) -> Report:
    """Writes the report of all runs below `folders` into `output` (default: the first of them).

    Args:
        prices: `pricing=NAME` and single prices; empty: each run by its own book.
        local: show also what depends on private records and was not charged, on a page that says so, in files
            of their own (`local-report.html` and so on) that only their owner can read.

    Raises:
        RecordError: no usable record below `folders`.
        ConfigError: the prices mean nothing.
        ResourceError: the report cannot be written.
    """
    comparison = compare(folders, prices, local=local)
    points, names = comparison.points, comparison.names
    if local:
        comparison.collection.notes.insert(0, _FOR_OWNERS)
    data = page_data(comparison)
    data["serving"] = serving_numbers(folders, prices)
    data["command"] = " ".join(["fedtune", "report", *(shlex.quote(str(f)) for f in folders), *prices])
    if local:
        data["command"] += " --local"
    data["made"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    data["version"] = __version__
    data["local"] = local
    target = output or _folder_of(folders[0])
    # For the owner alone: never in the place of what may be published, and readable by nobody else.
    prefix, mode = ("local-", 0o600) if local else ("", 0o666)
    files = Report(
        target / f"{prefix}report.html",
        target / f"{prefix}frontier.png",
        target / f"{prefix}frontier.csv",
        target / f"{prefix}frontier.parquet",
        _summary(comparison, data),
        data["groups"],
        data["notes"],
    )
    table = table_rows(points, names, comparison.book.currency)
    write_table(table, files.csv, files.parquet, mode=mode)
    main = [point for point in points if point.group == data["groups"][0]["name"]]
    save(files.picture, figure.draw(main, names, _small_print(main, data)), mode=mode)
    save(files.page, page(data).encode(), mode=mode)
    return files


def page(data: dict[str, Any]) -> str:
    """The page for `data`, whole: markup, style, scripts and numbers in one text."""
    parts = resources.files("fedtune.report") / "templates"

    def read(name: str) -> str:
        return (parts / name).read_text(encoding="utf-8")

    # Inside a script element only '<' could end it; escaped it is still the same JSON.
    numbers = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )
    text = read("report.html")
    for name, content in (
        ("TITLE", html.escape(_title(data))),
        ("STYLE", read("report.css")),
        ("LIBRARY", "\n".join(read(name) for name in _LIBRARY)),
        ("SCRIPT", "\n".join(read(name) for name in _SCRIPTS)),
        ("NUMBERS", numbers),
    ):
        text = text.replace(f"%{name}%", content, 1)
    return text


def _title(data: dict[str, Any]) -> str:
    runs = sum(len(point["runs"]) for point in data["points"])
    mark = " (not for publication)" if data.get("local") else ""
    return f"{data['groups'][0]['name']}: {runs} runs{mark}"


def _folder_of(folder: Path) -> Path:
    return folder if folder.is_dir() else folder.parent


def _small_print(points: Sequence[Point], data: dict[str, Any]) -> str:
    """The promise in one line; and the error bars, if there are any."""
    first = next((point for point in points if point.delta is not None), points[0])
    seeds = max((point.accuracy.count for point in points if point.accuracy), default=0)
    promise = (
        f"delta {first.delta:.2g}, {first.runs[0].adjacency}" if first.delta is not None else "no privacy"
    )
    bars = f"; bars: standard error over up to {seeds} seeds" if seeds > 1 else "; one seed each"
    return f"{data['groups'][0]['name']}; {promise}{bars}; filled: not dominated"


def _summary(comparison: Comparison, data: dict[str, Any]) -> str:
    lines = [f"{len(comparison.collection.runs):,} runs of {len(comparison.points):,} configurations"]
    for group in data["groups"]:
        head = f"{group['name']}: " if len(data["groups"]) > 1 else ""
        lines += ["", head + group["advice"], group["promise"], *group["caveats"]]
    lines += [""] + [f"Note: {note}" for note in data["notes"]]
    return "\n".join(lines).rstrip()


# --- the numbers of the page --------------------------------------------------------------------


def page_data(comparison: Comparison) -> dict[str, Any]:
    """Everything that the page shows; groups in the order of their size."""
    points, names, book = comparison.points, comparison.names, comparison.book
    groups = sorted(
        dict.fromkeys(point.group for point in points),
        key=lambda group: -sum(len(point.runs) for point in points if point.group == group),
    )
    settings, named = points[0].settings, named_settings(names, points)
    about = [_group(group, comparison) for group in groups]
    chosen = {one["name"]: point for one in about for point in points if point.id == one["chosen"]}
    base = {name: value for name, value in settings.items() if name not in names}
    return {
        "groups": about,
        "base": base,
        "varied": list(names),
        "short": {name: short.removesuffix(".name") for name, short in short_names(names).items()},
        "costs": [
            {
                "key": name,
                "label": label,
                "unit": (book.currency or "") if name == "money" else unit,
            }
            for name, (label, unit) in COSTS.items()
            if any(point.costs[name] is not None for point in points)
        ],
        "points": [
            _point(point, groups.index(point.group), names, named)
            | {"beside": _beside(point, chosen.get(point.group))}
            for point in points
        ],
        "currency": book.currency,
        "book": book.name,
        "cuts": list(CUTS),
        "notes": [*comparison.collection.notes, *book.notes, *_remarks(points, groups)],
    }


def _group(group: str, comparison: Comparison) -> dict[str, Any]:
    points, names = [point for point in comparison.points if point.group == group], comparison.names
    advice = advise(points, named_settings(names, points), comparison.book.currency)
    wanted = default_constraints(points, advice.chosen)
    tuning = _tuning(advice, points, comparison.collection)
    equal = equal_costs(points)
    return {
        "name": group,
        "chosen": advice.chosen.id if advice.chosen else None,
        "advice": advice.text,
        "caveats": list(advice.caveats),
        "family": [point.id for point in advice.family],
        "promise": promise_line(advice.chosen, tuning) if advice.chosen else promises_line(points),
        "tuning": None if tuning is None else _tuning_json(tuning),
        **_sites(advice.family),
        "series": figure.series_setting(points, names),
        "equal": equal,
        "noise": noisy_costs(points, equal),
        "adoption": None if wanted is None or len(points) == 1 else {
            "accuracy": wanted.accuracy,
            "epsilon": None if wanted.epsilon is None else _finite(wanted.epsilon),
            "money": wanted.money,
            **dataclasses.asdict(count_adoption(points, wanted)),
        },
    }  # fmt: skip


def _tuning(advice: Advice, points: Sequence[Point], collection: Collection) -> Tuning | None:
    """Of the chosen point, the seed that would be published: the most accurate one."""
    if advice.chosen is None:
        return None
    rated = [run for run in advice.chosen.runs if run.accuracy is not None]
    chosen = max(rated, key=lambda run: run.accuracy or 0.0)
    # A run that a search ended early is in no point, and has used the data all the same.
    rivals = [run for point in points for run in point.runs] + [run for run in collection.runs if run.pruned]
    return tuning_of(rivals, chosen, collection.sweeps)


def promises_line(points: Sequence[Point]) -> str:
    """Of what epsilon, delta, unit and adjacency the runs are, where none of them is chosen."""
    private = [point for point in points if point.delta is not None]
    if not private or len(points) == 1:
        return promise_line(points[0], None)
    epsilons = _range([format_number(point.epsilon) for point in sorted(private, key=lambda p: p.epsilon)])
    deltas = _range([f"{delta:.2g}" for delta in sorted(point.delta or 0.0 for point in private)])
    rules = sorted({f"{run.adjacency}, trust {run.trust}" for point in private for run in point.runs})
    without = len(points) - len(private)
    more = f"; {without} of {len(points)} configurations have no guarantee" if without else ""
    return (
        f"Epsilon {epsilons} at delta {deltas}, unit {private[0].runs[0].unit}, {' or '.join(rules)}, "
        f"by configuration: the table has each{more}."
    )


def _range(texts: Sequence[str]) -> str:
    """The first and the last, or one where they are the same."""
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]} to {texts[-1]}"


def promise_line(chosen: Point | None, tuning: Tuning | None) -> str:
    """Epsilon with delta, unit and adjacency, and what it does not say: never one without the others."""
    if chosen is None or chosen.delta is None:
        return "No run here has a privacy guarantee: epsilon is infinite."
    first = chosen.runs[0]
    parts = [
        f"Epsilon {format_number(chosen.epsilon)} at delta {chosen.delta:.2g}, unit {first.unit}, "
        f"{first.adjacency}, trust {first.trust}"
    ]
    if any(run.reproducible_noise for run in chosen.runs):
        parts.append("its noise is reproducible from the seed, so it protects nobody")
    if tuning is not None and tuning.runs > 1:
        composed, best = tuning.epsilon_composed, tuning.epsilon_best
        by_search = f" ({tuning.searched} of them chosen by a search)" if tuning.searched else ""
        parts.append(
            f"over all {tuning.runs} private runs of this report: epsilon {format_number(composed)}"
            f"{by_search}"
        )
        if best is not None and best < composed:
            parts.append(f"if only the best run of its sweep is published: epsilon {format_number(best)}")
    return "; ".join(parts) + "."


def _tuning_json(tuning: Tuning) -> dict[str, Any]:
    return {
        "alone": _digits(tuning.epsilon_alone),
        "composed": _finite(tuning.epsilon_composed),
        "best_of": None if tuning.epsilon_best is None else _finite(tuning.epsilon_best),
        "cards": [dataclasses.asdict(card) for card in tuning_cards(tuning)],
        "text": tuning_text(tuning),
        "search": describe_search(tuning),
    }


def _sites(family: Sequence[Point]) -> dict[str, Any]:
    """The sites, those that the chart names (of many, the least accurate ones), and a text."""
    rated = [point for point in family if point.accuracy is not None]
    sites = sorted({site for point in rated for site in point.per_site})
    if not sites:
        return {"sites": [], "sites_named": [], "sites_text": "These runs measured no accuracy by site."}
    named, low, high = sites, rated[0], rated[-1]
    text = "The recommended configuration at each epsilon that was run."
    loss = {
        site: site_difference(high, low, site)
        for site in sites
        if site in low.per_site and site in high.per_site
        and site not in low.left_out and site not in high.left_out
    }  # fmt: skip
    if len(rated) > 1 and loss:
        start = f"epsilon {format_number(high.epsilon)}" if math.isfinite(high.epsilon) else "no privacy"
        text += f" From {start} down to epsilon {format_number(low.epsilon)}"
        order = sorted(loss, key=lambda site: -loss[site].mean)
        for site in dict.fromkeys((order[0], order[-1])):
            text += f", {site} loses {loss[site].points() if loss[site].mean > 0 else 'nothing'}"
        text += "."
    if absent := sorted({site for point in rated for site in point.left_out}):
        text += (
            f" {few(absent)} took no part in some of these runs: its accuracy there is that of a model "
            "without its data."
        )
    if len(sites) > _MOST_SITES:
        first = {
            site: next(point.per_site[site].mean for point in rated if site in point.per_site)
            for site in sites
        }
        named = sorted(sites, key=first.__getitem__)[:_MOST_SITES]
        text += (
            f" Named are the {len(named)} of {len(sites)} sites with the lowest accuracy at the smallest "
            "epsilon."
        )
    return {"sites": sites, "sites_named": named, "sites_text": text}


def _point(point: Point, group: int, names: Sequence[str], named: Sequence[str]) -> dict[str, Any]:
    first, money = point.runs[0], point.money
    return {
        "id": point.id,
        "group": group,
        "label": describe_settings(point.settings, named) or "the only configuration",
        "eps": _finite(point.epsilon),
        "delta": point.delta,
        "unit": first.unit,
        "adjacency": first.adjacency,
        "trust": first.trust,
        "acc": _stat(point.accuracy),
        "cost": {name: _stat(stat) for name, stat in point.costs.items() if stat is not None},
        "money": None if money is None else [
            None if part is None else _digits(part)
            for part in (money.compute, money.energy, money.network, money.data)
        ],
        "sites": {site: _stat(stat) for site, stat in point.per_site.items()},
        "absent": dict(point.left_out),
        "own": {site: _stat(stat) for site, stat in point.personal.items()},
        "set": {name: point.settings.get(name) for name in names},
        "best": [name for name, best in point.best.items() if best],
        "cmd": repeat_command(point.settings, point.seeds),
        "runs": [_run(run) for run in point.runs],
    }  # fmt: skip


def _beside(point: Point, chosen: Point | None) -> list[float | int | None] | None:
    """By how much it is more accurate than the recommended one, with the error, and over how many seeds."""
    if chosen is None or point is chosen or point.accuracy is None:
        return None
    found = difference(point, chosen)
    return [_digits(found.mean), None if found.error is None else _digits(found.error), found.seeds]


def _run(run: Run) -> dict[str, Any]:
    return {
        "seed": run.seed,
        "acc": None if run.accuracy is None else round(run.accuracy, 5),
        "path": str(_relative(run.path.parent)),
        "curve": [[step.round, round(step.accuracy, 4)] for step in run.rounds if step.accuracy is not None],
    }


def _relative(path: Path) -> Path:
    try:
        return path.resolve().relative_to(Path.cwd())
    except ValueError:
        return path


def _stat(stat: Stat | None) -> list[float | int | None] | None:
    if stat is None:
        return None
    return [_digits(stat.mean), None if stat.error is None else _digits(stat.error), stat.count]


def _digits(value: float) -> float:
    return float(f"{value:.6g}")


def _finite(value: float) -> float | None:
    return _digits(value) if math.isfinite(value) else None


def _remarks(points: Sequence[Point], groups: Sequence[str]) -> list[str]:
    remarks = []
    if len(groups) > 1:
        remarks.append(
            f"These runs answer {len(groups)} different questions ({'; '.join(groups)}): their accuracies or "
            "their epsilons do not compare, so each has its own frontier."
        )
    runs = [run for point in points for run in point.runs]
    deltas = {run.delta for run in runs if run.delta is not None}
    if deltas and max(deltas) > 10 * min(deltas):
        remarks.append(
            f"Deltas range from {min(deltas):.1g} to {max(deltas):.1g}: an epsilon at the larger "
            "one promises less."
        )
    trusts = sorted({run.trust for run in runs if run.is_private})
    if len(trusts) > 1:
        remarks.append(
            f"Trust models differ ({', '.join(trusts)}): an equal epsilon asks for trust in "
            "different parties."
        )
    reproducible = sum(run.reproducible_noise for run in runs)
    if reproducible:
        remarks.append(
            f"{reproducible} of {len(runs)} runs drew their noise from the seed: simulations that "
            "protect nobody."
        )
    if without := [run for run in runs if run.left_out]:
        sites = sorted({site for run in without for site in run.left_out})
        remarks.append(
            f"{len(without)} of {len(runs)} runs went on without {few(sites)}, which refused or sent "
            "nothing: federation.left_out in their records says why."
        )
    unrated = sum(point.accuracy is None for point in points)
    if unrated:
        remarks.append(
            f"{unrated} configurations have no accuracy and are in no chart; the table and the CSV have them."
        )
    return remarks
