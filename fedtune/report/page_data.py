"""What the page of a report shows, as one JSON value: all numbers are made here, the page only draws them.

Kept small, since it lies inside the page: settings that are the same everywhere are said once, numbers have
six significant digits, learning curves four decimals. An infinite epsilon is null, for JSON has none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedtune.report.adoption import CUTS, adoption, default_wanted
from fedtune.report.advice import Advice, advise
from fedtune.report.collect import Collection
from fedtune.report.commands import command
from fedtune.report.compared import Run
from fedtune.report.figure import series_setting
from fedtune.report.frontier import COSTS, Point, Stat, telling
from fedtune.report.repricing import Book
from fedtune.report.tuning import Tuning, search_words, tuning_of
from fedtune.report.words import number, setting_words, short_names

__all__ = ["page_data", "promise_line"]


def page_data(
    found: Collection, points: Sequence[Point], names: Sequence[str], using: Book
) -> dict[str, Any]:
    """Everything that the page shows of `points`; groups in the order of their size."""
    groups = sorted(
        dict.fromkeys(point.group for point in points),
        key=lambda group: -sum(len(point.runs) for point in points if point.group == group),
    )
    settings, said = points[0].settings, telling(names, points)
    base = {name: value for name, value in settings.items() if name not in names}
    return {
        "groups": [
            _group(group, [point for point in points if point.group == group], names, using, found)
            for group in groups
        ],
        "base": base,
        "varied": list(names),
        "short": {name: said.removesuffix(".name") for name, said in short_names(names).items()},
        "costs": [
            {
                "key": name,
                "label": label,
                "unit": (using.currency or "") if name == "money" else unit,
            }
            for name, (label, unit) in COSTS.items()
            if any(point.costs[name] is not None for point in points)
        ],
        "points": [_point(point, groups.index(point.group), names, said) for point in points],
        "currency": using.currency,
        "book": using.name,
        "cuts": list(CUTS),
        "notes": [*found.notes, *using.notes, *_remarks(points, groups)],
    }


def _group(
    group: str, points: Sequence[Point], names: Sequence[str], using: Book, found: Collection
) -> dict[str, Any]:
    advice = advise(points, telling(names, points), using.currency)
    wanted = default_wanted(points, advice.chosen)
    tuning = _tuning(advice, points, found)
    return {
        "name": group,
        "chosen": advice.chosen.id if advice.chosen else None,
        "advice": advice.text,
        "doubts": list(advice.doubts),
        "family": [point.id for point in advice.family],
        "promise": promise_line(advice.chosen, tuning),
        "tuning": None if tuning is None else _tuning_json(tuning),
        "series": series_setting(points, names),
        "adoption": None if wanted is None else {
            "accuracy": wanted.accuracy,
            "epsilon": _finite(wanted.epsilon),
            "money": wanted.money,
            "by_price": list(adoption(points, wanted).by_price),
            "by_compute": list(adoption(points, wanted).by_compute),
        },
    }  # fmt: skip


def _tuning(advice: Advice, points: Sequence[Point], found: Collection) -> Tuning | None:
    """Of the chosen point, the seed that would be published: the most accurate one."""
    if advice.chosen is None:
        return None
    rated = [run for run in advice.chosen.runs if run.accuracy is not None]
    chosen = max(rated, key=lambda run: run.accuracy or 0.0)
    # What a search gave up is in no point, and has used the data all the same.
    rivals = [run for point in points for run in point.runs] + [run for run in found.runs if run.pruned]
    return tuning_of(rivals, chosen, found.sweeps)


def promise_line(chosen: Point | None, tuning: Tuning | None) -> str:
    """Epsilon with delta, unit and adjacency, and what it does not say: never one without the others."""
    if chosen is None or chosen.delta is None:
        return "No run here has a privacy guarantee: epsilon is infinite."
    first = chosen.runs[0]
    line = (
        f"Epsilon {number(chosen.epsilon)} at delta {chosen.delta:.2g}, unit {first.unit}, "
        f"{first.adjacency}, trust {first.trust}"
    )
    if any(run.reproducible_noise for run in chosen.runs):
        line += "; its noise is reproducible from the seed, so it protects nobody"
    if tuning is not None and tuning.runs > 1:
        line += f"; over all {tuning.runs} private runs of this report: epsilon {number(tuning.composed)}"
        if tuning.searched:
            line += f" ({tuning.searched} of them chosen by a search)"
    if tuning is not None and tuning.best_of is not None and tuning.best_of < tuning.composed:
        line += f"; if only the best run of its sweep is published: epsilon {number(tuning.best_of)}"
    return line + "."


def _tuning_json(tuning: Tuning) -> dict[str, Any]:
    return {
        "alone": _digits(tuning.alone),
        "composed": _finite(tuning.composed),
        "best_of": None if tuning.best_of is None else _finite(tuning.best_of),
        "trials": None if tuning.trials is None else
        f"{tuning.trials.name}, mean {number(tuning.trials.mean)}",
        "delta": tuning.delta,
        "unit": tuning.unit,
        "adjacency": tuning.adjacency,
        "runs": tuning.runs,
        "without_privacy": tuning.without_privacy,
        "public": tuning.public,
        "search": search_words(tuning),
        "seed": tuning.chosen.seed,
    }  # fmt: skip


def _point(point: Point, group: int, names: Sequence[str], said: Sequence[str]) -> dict[str, Any]:
    first, money = point.runs[0], point.money
    return {
        "id": point.id,
        "group": group,
        "label": setting_words(point.settings, said) or "the only configuration",
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
        "set": {name: point.settings.get(name) for name in names},
        "best": [name for name, best in point.best.items() if best],
        "cmd": command(point.settings, point.seeds),
        "runs": [_run(run) for run in point.runs],
    }  # fmt: skip


def _run(run: Run) -> dict[str, Any]:
    return {
        "seed": run.seed,
        "acc": None if run.accuracy is None else round(run.accuracy, 5),
        "path": str(_relative(run.path.parent)),
        "curve": [[one.round, round(one.accuracy, 4)] for one in run.rounds if one.accuracy is not None],
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
    found = []
    if len(groups) > 1:
        found.append(
            f"These runs answer {len(groups)} different questions ({'; '.join(groups)}): their accuracies or "
            "their epsilons do not compare, so each has its own frontier."
        )
    runs = [run for point in points for run in point.runs]
    deltas = {run.delta for run in runs if run.delta is not None}
    if deltas and max(deltas) > 10 * min(deltas):
        found.append(
            f"Deltas range from {min(deltas):.1g} to {max(deltas):.1g}: an epsilon at the larger "
            "one promises less."
        )
    trusts = sorted({run.trust for run in runs if run.trust != "none"})
    if len(trusts) > 1:
        found.append(
            f"Trust models differ ({', '.join(trusts)}): an equal epsilon asks for trust in "
            "different parties."
        )
    reproducible = sum(run.reproducible_noise for run in runs)
    if reproducible:
        found.append(
            f"{reproducible} of {len(runs)} runs drew their noise from the seed: simulations that "
            "protect nobody."
        )
    unrated = sum(point.accuracy is None for point in points)
    if unrated:
        found.append(
            f"{unrated} configurations have no accuracy and are in no chart; the table and the CSV have them."
        )
    return found
