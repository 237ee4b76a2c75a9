"""Which finished configurations meet constraints on accuracy, epsilon and money, now and if it were cheaper.

`fedtune plan` asks for the cheapest configuration that meets all constraints, or, if none does, how far one
of them (or a pair) must be relaxed. Adoption counts how many configurations that are good enough come under a
budget as all prices fall. The page of the report makes the same counts from the same parts, so that a reader
can change the three numbers; a test compares the two. What compression does is measured, not assumed
(`fedtune.report.adoption`).

Only what was run is known: an answer is one of the configurations in the records, never an interpolation.
Does not do: predict that prices fall.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from fedtune.cost.prices import Money
from fedtune.errors import ConfigError
from fedtune.report.frontier import (
    Point,
    compare,
    named_settings,
)
from fedtune.report.words import (
    describe_settings,
    format_money,
    format_number,
    format_percent,
    repeat_command,
)

__all__ = [
    "CUTS",
    "Adoption",
    "Answer",
    "Constraints",
    "Relaxation",
    "answer",
    "answer_json",
    "answer_text",
    "count_adoption",
    "default_constraints",
    "money_after",
    "plan",
]

CUTS = (0.0, 0.1, 0.3, 0.5, 0.7)  # shares by which prices fall
_NAMES = ("accuracy", "epsilon", "money")


@dataclass(frozen=True)
class Constraints:
    """Accuracy at least (a share), epsilon at most, money a run at most; None: no constraint.

    Raises:
        ConfigError: there is no constraint at all, or a value has no meaning.
    """

    accuracy: float | None = None
    epsilon: float | None = None
    money: float | None = None

    def __post_init__(self) -> None:
        if not self.names():
            raise ConfigError("There is no constraint: give --accuracy, --epsilon or --money, or several.")
        if self.accuracy is not None and not 0.0 <= self.accuracy <= 1.0:
            raise ConfigError(
                f"--accuracy {self.accuracy:g} is not a share: give one from 0 to 1 (0.8 for 80 percent)."
            )
        for name in ("epsilon", "money"):
            value = getattr(self, name)
            if value is not None and (math.isnan(value) or value < 0.0):
                raise ConfigError(f"--{name} {value:g} is not allowed: give a number of 0 or more.")

    def names(self) -> tuple[str, ...]:
        """Names of the constraints that are set."""
        return tuple(name for name in _NAMES if getattr(self, name) is not None)

    def met_by(self, point: Point, names: Sequence[str] = _NAMES) -> bool:
        """Whether `point` meets the constraints `names`, where they are set; an unknown value meets none."""
        return all(self._met(name, point) for name in names)

    def _met(self, name: str, point: Point) -> bool:
        limit, value = getattr(self, name), _value(name, point)
        if limit is None:
            return True
        if value is None:
            return False
        return bool(value >= limit if name == "accuracy" else value <= limit)


@dataclass(frozen=True)
class Relaxation:
    """A way out: `point` meets all constraints if those of `names` are relaxed to `values`."""

    names: tuple[str, ...]
    values: tuple[float, ...]
    point: Point


@dataclass(frozen=True)
class Answer:
    """The cheapest `point` that meets all constraints; None, with relaxations, if there is none."""

    constraints: Constraints
    point: Point | None
    relaxations: tuple[Relaxation, ...] = ()


def answer(points: Sequence[Point], constraints: Constraints) -> Answer:
    """The cheapest of `points` that meets `constraints`, or the least relaxations that let one meet them.

    Each constraint is relaxed by itself first; pairs, and all of them, are tried only if none suffices.
    """
    rated = [point for point in points if point.accuracy is not None]
    good = [point for point in rated if constraints.met_by(point)]
    if good:
        return Answer(constraints, min(good, key=_price_order))
    for size in range(1, len(constraints.names()) + 1):
        relaxations = [
            _relaxed(rated, constraints, names) for names in combinations(constraints.names(), size)
        ]
        if any(relaxations):
            return Answer(constraints, None, tuple(one for one in relaxations if one is not None))
    return Answer(constraints, None)


def _relaxed(points: Sequence[Point], constraints: Constraints, names: tuple[str, ...]) -> Relaxation | None:
    others = [name for name in _NAMES if name not in names]
    candidates = [
        point
        for point in points
        if constraints.met_by(point, others) and all(_value(name, point) is not None for name in names)
    ]
    if not candidates:
        return None

    def distance(point: Point) -> tuple[float, ...]:
        """How far the limits move, each relative to itself, so that accuracy and money can be added."""
        total = 0.0
        for name in names:
            value, limit = _value(name, point), getattr(constraints, name)
            assert value is not None
            excess = max(0.0, limit - value if name == "accuracy" else value - limit)
            total += excess / max(abs(limit), 1e-9)
        return (total, *_price_order(point))

    nearest = min(candidates, key=distance)
    return Relaxation(names, tuple(_value(name, nearest) or 0.0 for name in names), nearest)


def _value(name: str, point: Point) -> float | None:
    if name == "accuracy":
        return None if point.accuracy is None else point.accuracy.mean
    if name == "epsilon":
        return point.epsilon
    stat = point.costs["money"]
    return None if stat is None else stat.mean


def _price_order(point: Point) -> tuple[float, float, float, float]:
    """Cheapest first; by training time where money is unknown; then smaller epsilon, higher accuracy."""
    money, seconds = point.costs["money"], point.costs["train_seconds"]
    return (
        math.inf if money is None else money.mean,
        math.inf if seconds is None else seconds.mean,
        point.epsilon,
        -(point.accuracy.mean if point.accuracy else 0.0),
    )


# --- adoption ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adoption:
    """Counts of configurations.

    Attributes:
        good_enough: how many meet accuracy and epsilon at any cost, of those whose cost is known.
        by_price: for each of `CUTS`, how many of them come under the budget when all prices fall by it.
    """

    good_enough: int
    by_price: tuple[int, ...]


def money_after(money: Money, *, price_cut: float = 0.0) -> float | None:
    """The total once all prices fell by `price_cut`, a share; None if unknown."""
    parts = (money.compute, money.energy, money.network, money.data)
    if any(part is None for part in parts):
        return None
    return (1.0 - price_cut) * sum(part or 0.0 for part in parts)


def count_adoption(points: Sequence[Point], constraints: Constraints) -> Adoption:
    """Counts the `points` that meet accuracy and epsilon, and those under the budget at each of `CUTS`."""
    budget = math.inf if constraints.money is None else constraints.money
    good = [
        point.money
        for point in points
        if point.money is not None
        and point.money.total is not None
        and point.accuracy is not None
        and constraints.met_by(point, ("accuracy", "epsilon"))
    ]

    def under_budget(amounts: Sequence[float | None]) -> int:
        # A billionth of slack: a budget that was copied from a table should include its row.
        return sum(amount is not None and amount <= budget * (1.0 + 1e-9) for amount in amounts)

    return Adoption(
        len(good),
        tuple(under_budget([money_after(money, price_cut=cut) for money in good]) for cut in CUTS),
    )


def default_constraints(points: Sequence[Point], chosen: Point | None) -> Constraints | None:
    """Constraints to begin with: two points below the accuracy of `chosen`, at its epsilon, for half the
    median amount of those that are good enough. None where no point has accuracy and amount.
    """
    priced = [point for point in points if point.accuracy and point.money and point.money.total is not None]
    if not priced:
        return None
    start = chosen if chosen is not None and chosen in priced else priced[0]
    assert start.accuracy is not None
    # Rounded to half percents, downwards: numbers that are easy to read and to type.
    accuracy = max(0.0, math.floor((start.accuracy.mean - 0.02) * 200.0) / 200.0)
    amounts = [
        point.money.total
        for point in priced
        if point.money and point.money.total is not None
        and point.accuracy and point.accuracy.mean >= accuracy and point.epsilon <= start.epsilon
    ]  # fmt: skip
    return Constraints(accuracy, start.epsilon, float(f"{0.5 * statistics.median(amounts):.2g}"))


# --- fedtune plan --------------------------------------------------------------------------------


def plan(
    folders: Sequence[Path], prices: Sequence[str], constraints: Constraints
) -> tuple[str, list[dict[str, Any]]]:
    """Answers from the records below `folders`: text, and JSON values, one for each group of points.

    Raises:
        RecordError: no usable records.
        ConfigError: the prices mean nothing, or money is constrained and has no common currency.
    """
    comparison = compare(folders, prices, local=True)  # shown on the terminal, to the owner of the data
    points, book = comparison.points, comparison.book
    if constraints.money is not None and book.currency is None:
        raise ConfigError(f"--money cannot be answered. {book.notes[0]}")
    names = named_settings(comparison.names, points)
    groups = sorted({point.group for point in points})
    texts, values = [], []
    for group in groups:
        members = [point for point in points if point.group == group]
        result = answer(members, constraints)
        head = f"{group}:\n" if len(groups) > 1 else ""
        texts.append(head + answer_text(result, names, book.currency, len(members)))
        values.append({"group": group, **answer_json(result, book.currency)})
    notes = [f"Note: {note}" for note in (*comparison.collection.notes, *book.notes)]
    return "\n\n".join([*texts, *notes]), values


def answer_text(result: Answer, names: Sequence[str], currency: str | None, count: int) -> str:
    """The answer for a reader, with the command that repeats the configuration."""
    limits = result.constraints
    wanted = ", ".join(_limit_text(name, getattr(limits, name), currency) for name in limits.names())
    if result.point is not None:
        return (
            f"The cheapest of {count} configurations with {wanted}:\n\n"
            f"{_describe(result.point, names, currency)}"
        )
    if not result.relaxations:
        return f"None of {count} configurations has {wanted}, and none has a measured accuracy to go by."
    lines = [f"None of {count} configurations has {wanted}. Relax one of these:"]
    if len(result.relaxations[0].names) > 1:
        lines[0] = f"None of {count} configurations has {wanted}, and relaxing one of these is not enough:"
    for relaxation in result.relaxations:
        change = " and ".join(
            _change_text(name, getattr(limits, name), value, currency)
            for name, value in zip(relaxation.names, relaxation.values, strict=True)
        )
        lines.append(f"\n* {change}:\n\n{_describe(relaxation.point, names, currency)}")
    return "\n".join(lines)


def _limit_text(name: str, limit: float, currency: str | None) -> str:
    if name == "accuracy":
        return f"accuracy at least {format_percent(limit)}"
    if name == "epsilon":
        return f"epsilon at most {format_number(limit)}"
    return f"at most {format_money(limit, currency)}"


def _change_text(name: str, limit: float, value: float, currency: str | None) -> str:
    if name == "accuracy":
        return f"accuracy lower by {100 * (limit - value):.1f} points, {format_percent(value)}"
    if name == "epsilon":
        if math.isinf(value):
            return "no limit on epsilon: without privacy"
        return f"epsilon higher by {format_number(value - limit)}, {format_number(value)}"
    return f"money higher by {format_money(value - limit, currency)}, {format_money(value, currency)}"


def _describe(point: Point, names: Sequence[str], currency: str | None) -> str:
    accuracy, money, seconds = point.accuracy, point.costs["money"], point.costs["train_seconds"]
    assert accuracy is not None
    first = point.runs[0]
    error = (
        f" ± {100 * accuracy.error:.1f} (standard error over {accuracy.count} runs)"
        if accuracy.error is not None
        else " (one run: the error is not known)"
    )
    guarantee = (
        "no privacy, epsilon is infinite"
        if math.isinf(point.epsilon)
        else f"epsilon {format_number(point.epsilon)} at delta {point.delta:.2g}, {first.adjacency}, "
        f"trust {first.trust}"
    )
    lines = [
        describe_settings(point.settings, names) or "the default configuration",
        f"accuracy {format_percent(accuracy.mean)}{error}",
        guarantee,
        "money unknown" if money is None else f"{format_money(money.mean, currency)} a run",
        "" if seconds is None else f"training {seconds.mean:.0f} s, summed over the nodes",
        repeat_command(point.settings, point.seeds),
    ]
    return "\n".join(f"    {line}" for line in lines if line)


def answer_json(result: Answer, currency: str | None) -> dict[str, Any]:
    """The answer for a program; an infinite epsilon is null."""
    return {
        "met": result.point is not None,
        "configuration": None if result.point is None else _point_json(result.point, currency),
        "relaxations": [
            {
                "constraints": {
                    name: None if math.isinf(value) else value
                    for name, value in zip(relaxation.names, relaxation.values, strict=True)
                },
                "configuration": _point_json(relaxation.point, currency),
            }
            for relaxation in result.relaxations
        ],
    }


def _point_json(point: Point, currency: str | None) -> dict[str, Any]:
    money = point.costs["money"]
    return {
        "id": point.id,
        "accuracy": None if point.accuracy is None else point.accuracy.mean,
        "accuracy_error": None if point.accuracy is None else point.accuracy.error,
        "epsilon": None if math.isinf(point.epsilon) else point.epsilon,
        "delta": point.delta,
        "unit": point.runs[0].unit,
        "money": None if money is None else money.mean,
        "currency": currency,
        "command": repeat_command(point.settings, point.seeds),
    }
