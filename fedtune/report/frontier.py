"""RunRecords as points (accuracy, epsilon, cost), with the non-dominated ones marked.

Runs that differ in nothing but the seed are one configuration: one `Point`, with mean and standard error
over its seeds. Epsilon is not averaged: the largest of the seeds counts. A point is dominated if another one
of the same task and unit of privacy is at least as accurate, at most as large in epsilon and at most as
expensive, and better in one of them. A missing cost is no cost of 0: it can dominate nobody in that cost.

Accuracy is compared by its mean, so points within each other's error may still dominate one another; the
report draws the errors. Does not do: charge for the choice (`fedtune.report.tuning`).
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedtune.cost.prices import Money
from fedtune.report.compared import Run
from fedtune.report.repricing import Book, money_of
from fedtune.runs.record import flatten

__all__ = ["COSTS", "Point", "Stat", "non_dominated", "points_of", "telling", "varied"]

COSTS: dict[str, tuple[str, str]] = {  # name: (what it is, unit)
    "money": ("money", ""),
    "train_seconds": ("training time of all nodes", "s"),
    "seconds": ("wall time of the run", "s"),
    "bytes": ("bytes sent, up and down", "B"),
    "energy_kwh": ("energy (estimate)", "kWh"),
    "flops": ("training computation", "FLOP"),
    "peak_memory_bytes": ("peak memory", "B"),
}


@dataclass(frozen=True)
class Stat:
    """Mean and standard error of one number over seeds; no error for a single seed."""

    mean: float
    error: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Stat | None:
        """None if any value is unknown: a mean over the known ones would be another quantity."""
        known = [value for value in values if value is not None]
        if not known or len(known) < len(values):
            return None
        error = statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else None
        return cls(statistics.fmean(known), error, len(known))


@dataclass
class Point:
    """One configuration over its seeds.

    Attributes:
        id: eight hexadecimal digits, the same wherever the configuration is met.
        group: what it may be compared with: task and unit of privacy.
        epsilon: the largest over the seeds; infinite without privacy.
        costs: by name in `COSTS`; None where unknown.
        money: parts of the mean amount; None where there is none.
        best: for each of "epsilon" (accuracy against epsilon alone) and the costs (accuracy, epsilon and that
            cost): is it non-dominated?
    """

    id: str
    runs: list[Run]
    group: str
    settings: Mapping[str, Any]  # flat: 'privacy.epsilon': 8.0
    accuracy: Stat | None
    epsilon: float
    delta: float | None
    per_site: dict[str, Stat]
    costs: dict[str, Stat | None]
    money: Money | None
    best: dict[str, bool] = field(default_factory=dict)

    @property
    def seeds(self) -> list[int]:
        """Seeds of its runs, each once."""
        return sorted({run.seed for run in self.runs})


def points_of(runs: Sequence[Run], using: Book) -> list[Point]:
    """One point for each configuration, in the order of their first runs, non-dominated ones marked.

    Runs that a search gave up are left out: a mean with them would be that of no configuration.
    """
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        if run.pruned:
            continue
        # A configuration of another data set's labels is another task; hence the task in the key.
        grouped.setdefault(f"{run.task}\n{run.unit}\n{run.key}", []).append(run)
    several_tasks = len({run.task for run in runs}) > 1
    several_units = len({run.unit for run in runs if run.trust != "none"}) > 1
    points = [_point(key, of, using, several_tasks, several_units) for key, of in grouped.items()]
    by_group: dict[str, list[Point]] = {}
    for point in points:
        by_group.setdefault(point.group, []).append(point)
    for members in by_group.values():
        _mark(members)
    return points


def _point(key: str, runs: list[Run], using: Book, several_tasks: bool, several_units: bool) -> Point:
    first = runs[0]
    parts = ([first.task] if several_tasks else []) + ([f"unit {first.unit}"] if several_units else [])
    amounts = [money_of(run, using) for run in runs]
    sites = sorted({site for run in runs for site in run.per_site})
    deltas = [run.delta for run in runs if run.delta is not None]
    per_site = {site: Stat.of([run.per_site.get(site) for run in runs]) for site in sites}
    return Point(
        id=hashlib.sha256(key.encode()).hexdigest()[:8],
        runs=runs,
        group=", ".join(parts) or first.task,
        settings=flatten(first.config),
        accuracy=Stat.of([run.accuracy for run in runs]),
        epsilon=max(run.epsilon for run in runs),
        delta=max(deltas) if deltas else None,
        per_site={site: stat for site, stat in per_site.items() if stat is not None},
        costs={
            "money": Stat.of([None if one is None else one.total for one in amounts]),
            "train_seconds": Stat.of([run.cost.train_seconds for run in runs]),
            "seconds": Stat.of([run.cost.seconds for run in runs]),
            "bytes": Stat.of([run.cost.bytes_up + run.cost.bytes_down for run in runs]),
            "energy_kwh": Stat.of([run.cost.energy_kwh for run in runs]),
            "flops": Stat.of([run.cost.flops for run in runs]),
            "peak_memory_bytes": Stat.of([run.cost.peak_memory_bytes for run in runs]),
        },
        money=_mean_money(amounts),
    )


def _mean_money(amounts: Sequence[Money | None]) -> Money | None:
    known = [one for one in amounts if one is not None]
    if not known or len(known) < len(amounts):
        return None

    def mean(part: Callable[[Money], float | None]) -> float | None:
        stat = Stat.of([part(one) for one in known])
        return None if stat is None else stat.mean

    return Money(
        known[0].currency,
        mean(lambda one: one.compute),
        mean(lambda one: one.network),
        mean(lambda one: one.energy),
        mean(lambda one: one.data),
        mean(lambda one: one.total),
    )


def _mark(points: Sequence[Point]) -> None:
    rated = [point for point in points if point.accuracy is not None]
    loss = np.array([-point.accuracy.mean for point in rated if point.accuracy is not None])
    epsilon = np.array([point.epsilon for point in rated])
    for point in points:
        point.best = dict.fromkeys(["epsilon", *COSTS], False)
    for point, best in zip(rated, non_dominated(np.stack([loss, epsilon], axis=1)), strict=True):
        point.best["epsilon"] = bool(best)
    for name in COSTS:
        stats = [point.costs[name] for point in rated]
        if all(stat is None for stat in stats):
            continue
        cost = np.array([math.inf if stat is None else stat.mean for stat in stats])
        kept = non_dominated(np.stack([loss, epsilon, cost], axis=1))
        for point, stat, best in zip(rated, stats, kept, strict=True):
            point.best[name] = bool(best) and stat is not None


def non_dominated(values: np.ndarray) -> np.ndarray:
    """Which rows [n, d] no other row dominates: nowhere larger and somewhere smaller. Returns bool [n].

    Equal rows do not dominate each other. Infinity is a value like any other; NaN is refused.
    """
    if np.isnan(values).any():
        raise ValueError("non_dominated cannot order NaN")
    count = len(values)
    kept = np.ones(count, dtype=bool)
    # Rows that dominate come first in this order, so each is compared with those that are still in.
    order = np.lexsort(values.T[::-1])
    front = np.empty_like(values)
    size = 0
    for row in order:
        rivals = front[:size]
        here = values[row]
        if bool(np.any(np.all(rivals <= here, axis=1) & np.any(rivals < here, axis=1))):
            kept[row] = False
        else:
            front[size] = here
            size += 1
    return kept


def varied(points: Sequence[Point]) -> list[str]:
    """Settings that are not the same everywhere, in the order of the configuration."""
    names = dict.fromkeys(name for point in points for name in point.settings)
    return [name for name in names if len({repr(point.settings.get(name)) for point in points}) > 1]


def telling(names: Sequence[str], points: Sequence[Point]) -> list[str]:
    """Of the settings that vary, those worth saying: the trust model only if there are several."""
    trusts = {point.runs[0].trust for point in points} - {"none"}
    return [name for name in names if name != "privacy.trust" or len(trusts) > 1]
