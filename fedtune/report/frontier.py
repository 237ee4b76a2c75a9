"""Runs as points (accuracy, epsilon, cost), with the non-dominated ones marked; priced, and as a table.

Runs that differ in nothing but the seed are one configuration: one `Point`, with mean and standard error
over its seeds. Epsilon is not averaged: the largest of the seeds counts. A point is dominated if another one
of the same task and unit of privacy is at least as accurate, at most as large in epsilon and at most as
expensive, and better in one of them. A missing cost is no cost of 0: it can dominate nobody in that cost.
Accuracy is compared by its mean, over the seeds that all of them have where there are two or more such seeds;
points within each other's error may still dominate one another, and the report draws the errors.

Prices are usage times price, and no run is repeated for them. A record keeps the usage and the book that it
was priced with. `fedtune report DIR pricing=NAME` takes another book, and every amount follows. Without one
each run is priced by its own book; if those differ in currency, amounts cannot be compared, and no money is
shown until one book is named.

The table has one row a configuration, as CSV and Parquet. An infinite epsilon is an empty cell in CSV and
null in Parquet, with `private` beside it, so that no program takes a missing number for a promise.

Does not do: charge for the choice (`fedtune.report.tuning`).
"""

from __future__ import annotations

import hashlib
import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.config.files import save
from fedtune.config.schema import PricingConfig
from fedtune.cost.prices import Money, check, price
from fedtune.errors import ConfigError
from fedtune.report.collect import Collection, Run, collect
from fedtune.report.difference import by_seed
from fedtune.report.words import repeat_command
from fedtune.runs.record import flatten

__all__ = [
    "COSTS",
    "Comparison",
    "Point",
    "PriceBook",
    "Stat",
    "compare",
    "named_settings",
    "non_dominated",
    "parse_prices",
    "points_of",
    "price_book",
    "table_rows",
    "varied_settings",
    "write_table",
]

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
    """Mean and standard error of one number over runs, and the number of each; no error for a single one."""

    mean: float
    error: float | None
    values: tuple[float, ...]

    @property
    def count(self) -> int:
        """Of how many runs."""
        return len(self.values)

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Stat | None:
        """None if any value is unknown: a mean over the known ones would be another quantity."""
        known = [value for value in values if value is not None]
        if not known or len(known) < len(values):
            return None
        error = statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else None
        return cls(statistics.fmean(known), error, tuple(known))


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
    personal: dict[str, Stat]
    costs: dict[str, Stat | None]
    money: Money | None
    best: dict[str, bool] = field(default_factory=dict)

    @property
    def left_out(self) -> Counter[str]:
        """By site that had no part in the model of some of its runs, of how many."""
        return Counter(site for run in self.runs for site in run.left_out)

    @property
    def seeds(self) -> list[int]:
        """Seeds of its runs, each once."""
        return sorted({run.seed for run in self.runs})


def points_of(runs: Sequence[Run], book: PriceBook) -> list[Point]:
    """One point for each configuration, in the order of their first runs, non-dominated ones marked.

    Runs that a search ended early are left out: a mean with them would be that of no configuration.
    """
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        if run.pruned:
            continue
        # A configuration of another data set's labels is another task; hence the task in the key.
        grouped.setdefault(f"{run.task}\n{run.unit}\n{run.key}", []).append(run)
    several_tasks = len({run.task for run in runs}) > 1
    several_units = len({run.unit for run in runs if run.is_private}) > 1
    points = [_point(key, members, book, several_tasks, several_units) for key, members in grouped.items()]
    by_group: dict[str, list[Point]] = {}
    for point in points:
        by_group.setdefault(point.group, []).append(point)
    for members in by_group.values():
        _mark(members)
    return points


@dataclass(frozen=True)
class Comparison:
    """What reports and plans are made of: the runs below some folders, priced, as points.

    Attributes:
        names: settings that differ between the points.
    """

    collection: Collection
    book: PriceBook
    points: list[Point]
    names: list[str]


def compare(folders: Sequence[Path], prices: Sequence[str] = (), *, local: bool = False) -> Comparison:
    """Reads all runs below `folders`, prices them and makes points of them.

    Args:
        prices: `pricing=NAME` and single prices; empty: each run by its own book.
        local: include what depends on private records and was not charged; for the owner of the data alone.

    Raises:
        RecordError: no usable record below `folders`.
        ConfigError: the prices mean nothing.
    """
    chosen = parse_prices(prices)
    collection = collect(folders, local=local)
    book = price_book(collection.runs, chosen)
    points = points_of(collection.runs, book)
    return Comparison(collection, book, points, varied_settings(points))


def _point(key: str, runs: list[Run], book: PriceBook, several_tasks: bool, several_units: bool) -> Point:
    first = runs[0]
    parts = ([first.task] if several_tasks else []) + ([f"unit {first.unit}"] if several_units else [])
    amounts = [_money_of(run, book) for run in runs]
    sites = sorted({site for run in runs for site in (*run.per_site, *run.personal)})
    deltas = [run.delta for run in runs if run.delta is not None]
    per_site = {site: Stat.of([run.per_site.get(site) for run in runs]) for site in sites}
    personal = {site: Stat.of([run.personal.get(site) for run in runs]) for site in sites}
    return Point(
        id=hashlib.sha256(key.encode()).hexdigest()[:8],
        runs=runs,
        group=", ".join(parts) or first.task,
        settings=flatten(first.config),
        accuracy=Stat.of([run.accuracy for run in runs]),
        epsilon=max(run.epsilon for run in runs),
        delta=max(deltas) if deltas else None,
        per_site={site: stat for site, stat in per_site.items() if stat is not None},
        personal={site: stat for site, stat in personal.items() if stat is not None},
        costs={
            name: Stat.of([_cost(name, run, amount) for run, amount in zip(runs, amounts, strict=True)])
            for name in COSTS
        },
        money=_mean_money(amounts),
    )


def _cost(name: str, run: Run, amount: Money | None) -> float | None:
    if name == "money":
        return None if amount is None else amount.total
    if name == "bytes":
        return run.cost.bytes_up + run.cost.bytes_down
    value: float | None = getattr(run.cost, name)
    return value


def _mean_money(amounts: Sequence[Money | None]) -> Money | None:
    known = [amount for amount in amounts if amount is not None]
    if not known or len(known) < len(amounts):
        return None

    parts = ("compute", "network", "energy", "data", "total")
    stats = (Stat.of([getattr(amount, part) for amount in known]) for part in parts)
    return Money(known[0].currency, *(None if stat is None else stat.mean for stat in stats))


def _mark(points: Sequence[Point]) -> None:
    rated = [point for point in points if point.accuracy is not None]
    loss = -np.array(_comparable(rated))
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
        optimal = non_dominated(np.stack([loss, epsilon, cost], axis=1))
        for point, stat, best in zip(rated, stats, optimal, strict=True):
            point.best[name] = bool(best) and stat is not None


def _comparable(points: Sequence[Point]) -> list[float]:
    """The accuracy of each: over the seeds that all have, if these are two or more; else over its own."""
    seeds = [by_seed(point) for point in points]
    common = set.intersection(*(set(one) for one in seeds)) if seeds else set()
    if len(common) < 2:
        return [point.accuracy.mean for point in points if point.accuracy is not None]
    return [statistics.fmean(one[seed] for seed in sorted(common)) for one in seeds]


def non_dominated(values: np.ndarray) -> np.ndarray:
    """Which rows no other row dominates, that is: is nowhere larger and somewhere smaller.

    Equal rows do not dominate each other. Infinity is a value like any other.

    Example:
        >>> non_dominated(np.array([[1.0, 9.0], [2.0, 8.0], [2.0, 9.0]])).tolist()
        [True, True, False]

    Args:
        values: `[n, d]`, of which less is better in every column.

    Returns:
        bool `[n]`.

    Raises:
        ValueError: a value is NaN.
    """
    if np.isnan(values).any():
        raise ValueError("non_dominated cannot order NaN")
    count = len(values)
    optimal = np.ones(count, dtype=bool)
    # Rows that dominate come first in this order, so each is compared with those that are still in.
    order = np.lexsort(values.T[::-1])
    front = np.empty_like(values)
    size = 0
    for row in order:
        rivals = front[:size]
        here = values[row]
        if bool(np.any(np.all(rivals <= here, axis=1) & np.any(rivals < here, axis=1))):
            optimal[row] = False
        else:
            front[size] = here
            size += 1
    return optimal


def varied_settings(points: Sequence[Point]) -> list[str]:
    """Settings that are not the same everywhere, in the order of the configuration."""
    names = dict.fromkeys(name for point in points for name in point.settings)
    return [name for name in names if len({repr(point.settings.get(name)) for point in points}) > 1]


def named_settings(names: Sequence[str], points: Sequence[Point]) -> list[str]:
    """Of the settings that vary, those to describe a point by: the trust model only if there are several."""
    trusts = {point.runs[0].trust for point in points if point.runs[0].is_private}
    return [name for name in names if name != "privacy.trust" or len(trusts) > 1]


# --- prices -------------------------------------------------------------------------------------

_CURRENCY = re.compile("[A-Z]{3}")  # the form of an ISO 4217 code


@dataclass(frozen=True)
class PriceBook:
    """The price book of a report.

    Attributes:
        pricing: the one book; None: each run by its own.
        currency: of all amounts; None: they cannot be compared, and there is no money.
        name: what to call it.
        notes: what a reader of the amounts should know.
    """

    pricing: PricingConfig | None
    currency: str | None
    name: str
    notes: tuple[str, ...] = ()


def parse_prices(words: Sequence[str]) -> PricingConfig | None:
    """The book that `pricing=NAME` and `pricing.PRICE=NUMBER` ask for; None if nothing was asked.

    Raises:
        ConfigError: another setting, an unknown book, a price or a currency that means nothing.
    """
    for word in words:
        name = word.partition("=")[0]
        if name != "pricing" and not name.startswith("pricing."):
            raise ConfigError(
                f"{word!r}: only prices can be changed after a run, by pricing=NAME or pricing.PRICE=NUMBER."
            )
    if not words:
        return None
    from fedtune.config.loader import load

    chosen = load(words).pricing
    check(chosen)
    _check_currency(chosen)
    return chosen


def price_book(runs: Sequence[Run], chosen: PricingConfig | None) -> PriceBook:
    """The book to report `runs` with: `chosen`, or each run's own.

    Raises:
        ConfigError: `chosen` lacks a price, or a currency.
    """
    if chosen is not None:
        check(chosen)
        _check_currency(chosen)
        return PriceBook(chosen, chosen.currency, _title(chosen), (_dated(chosen),))
    currencies = sorted({run.pricing.currency for run in runs} - {""})
    names = sorted({run.pricing.name for run in runs})
    if len(currencies) != 1:
        why = (
            f"the runs were priced in {', '.join(currencies)}" if currencies else "no run names a price book"
        )
        return PriceBook(None, None, "none", (f"Money is left out: {why}. Name one book: pricing=NAME.",))
    notes = []
    if not _CURRENCY.fullmatch(currencies[0]):
        notes.append(f"The currency {currencies[0]!r} of the price book is no ISO 4217 code.")
    if len(names) == 1:
        first = max(runs, key=lambda run: run.started).pricing
        if any(run.pricing != first for run in runs):
            notes.append(
                f"The price book '{names[0]}' changed between runs; each is priced by its own. "
                f"pricing={names[0]} prices all of them by today's."
            )
        return PriceBook(None, currencies[0], _title(first), (*notes, _dated(first)))
    notes.append(
        f"The runs were priced by different books ({', '.join(names)}), so amounts compare only in part. "
        "pricing=NAME prices all of them by one."
    )
    return PriceBook(None, currencies[0], "several", tuple(notes))


def _money_of(run: Run, book: PriceBook) -> Money | None:
    """What `run` costs by that book; None without a common currency, or if a price is missing."""
    if book.currency is None:
        return None
    try:
        return price(book.pricing or run.pricing, run.cost, records=run.records)
    except ConfigError:
        return None  # a record may come from elsewhere; a missing price is no price of 0


def _title(pricing: PricingConfig) -> str:
    return f"{pricing.name} ({pricing.date})" if pricing.date else pricing.name


def _dated(pricing: PricingConfig) -> str:
    return (
        f"Prices: book '{pricing.name}', {pricing.currency}, of {pricing.date or 'unknown date'}; source: "
        + (f"{pricing.source}." if pricing.source else "unknown.")
    )


def _check_currency(pricing: PricingConfig) -> None:
    if not _CURRENCY.fullmatch(pricing.currency):
        raise ConfigError(
            f"The price book '{pricing.name}' counts in {pricing.currency!r}, which is no ISO 4217 currency "
            "(USD, EUR, CHF, ...). Set pricing.currency."
        )


# --- as a table ---------------------------------------------------------------------------------


def table_rows(points: Sequence[Point], names: Sequence[str], currency: str | None) -> list[dict[str, Any]]:
    """One row a point: promise, accuracy with its error, costs, marks, settings that vary, command."""
    return [_row(point, names, currency) for point in points]


def _row(point: Point, names: Sequence[str], currency: str | None) -> dict[str, Any]:
    first, accuracy = point.runs[0], point.accuracy
    private = math.isfinite(point.epsilon)
    row: dict[str, Any] = {
        "configuration": point.id,
        "group": point.group,
        "runs": len(point.runs),
        "seeds": " ".join(str(seed) for seed in point.seeds),
        "private": private,
        "epsilon": point.epsilon if private else None,
        "delta": point.delta if private else None,
        "unit": first.unit,
        "adjacency": first.adjacency,
        "trust": first.trust,
        "left_out": " ".join(sorted(point.left_out)),
        "accuracy": None if accuracy is None else accuracy.mean,
        "accuracy_error": None if accuracy is None else accuracy.error,
        "currency": currency,
    }
    for name, stat in point.costs.items():
        row[name] = None if stat is None else float(stat.mean)
        row[f"{name}_error"] = None if stat is None else stat.error
    row |= {f"accuracy_{site}": stat.mean for site, stat in point.per_site.items()}
    row |= {f"own_accuracy_{site}": stat.mean for site, stat in point.personal.items()}
    row["non_dominated_epsilon"] = point.best["epsilon"]
    row |= {f"non_dominated_{name}": point.best[name] for name in COSTS}
    row |= {name: _cell(point.settings.get(name)) for name in names}
    row["command"] = repeat_command(point.settings, point.seeds)
    return row


def _cell(value: Any) -> str | None:
    """Settings as text: one of them may be a number in one row and null or a list in another."""
    return None if value is None else str(value)


def write_table(table: Sequence[dict[str, Any]], csv: Path, parquet: Path, *, mode: int = 0o666) -> None:
    """Writes `table` as CSV (RFC 4180, UTF-8) and as Parquet.

    Raises:
        ResourceError: a file cannot be written.
    """
    import pandas as pd

    frame = pd.DataFrame(table)  # columns in the order of their first row; sites may differ between data sets
    frame.insert(len(frame.columns) - 1, "command", frame.pop("command"))
    save(csv, frame.to_csv(index=False).encode(), mode=mode)
    save(parquet, frame.to_parquet(index=False), mode=mode)
