"""`fedtune plan`: the cheapest finished configuration that meets three wishes, or which wish must give.

Only what was run is known: the answer is one of the configurations in the records, never an interpolation
between them. If none meets accuracy, epsilon and money together, each wish in turn is let go while the other
two are kept, and the answer says how far it has to give; if no single one is enough, pairs are tried.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from fedtune.errors import ConfigError
from fedtune.report.commands import command
from fedtune.report.frontier import Point, points_of, telling, varied
from fedtune.report.words import money_text, number, percent, setting_words

__all__ = ["Answer", "Give", "Wish", "answer", "answer_json", "answer_text", "plan"]

_NAMES = ("accuracy", "epsilon", "money")


@dataclass(frozen=True)
class Wish:
    """Accuracy at least, epsilon at most, money at most; None: not asked for."""

    accuracy: float | None = None
    epsilon: float | None = None
    money: float | None = None

    def __post_init__(self) -> None:
        if self.accuracy is None and self.epsilon is None and self.money is None:
            raise ConfigError("Nothing is asked for: give --accuracy, --epsilon or --money, or several.")
        if self.accuracy is not None and not 0.0 <= self.accuracy <= 1.0:
            raise ConfigError(
                f"--accuracy {self.accuracy:g} is no share: give a number from 0 to 1 (0.8 for 80 percent)."
            )
        for name in ("epsilon", "money"):
            value = getattr(self, name)
            if value is not None and (math.isnan(value) or value < 0.0):
                raise ConfigError(f"--{name} {value:g} means nothing: give a number of 0 or more.")

    def asked(self) -> tuple[str, ...]:
        """Names of the wishes that were made."""
        return tuple(name for name in _NAMES if getattr(self, name) is not None)

    def met(self, name: str, point: Point) -> bool:
        """Does `point` meet that wish?"""
        limit, value = getattr(self, name), _value(name, point)
        if limit is None:
            return True
        if value is None:
            return False
        return value >= limit if name == "accuracy" else value <= limit


@dataclass(frozen=True)
class Give:
    """One way out: `point` meets all wishes but those of `names`, which must give to its `values`."""

    names: tuple[str, ...]
    values: tuple[float, ...]
    point: Point


@dataclass(frozen=True)
class Answer:
    """`found` if all wishes can be met; else the ways out, one for each wish (or pair) that could give."""

    wish: Wish
    found: Point | None
    gives: tuple[Give, ...] = ()


def answer(points: Sequence[Point], wish: Wish) -> Answer:
    """The cheapest of `points` that meets `wish`, or which wishes must give."""
    rated = [point for point in points if point.accuracy is not None]
    good = [point for point in rated if all(wish.met(name, point) for name in _NAMES)]
    if good:
        return Answer(wish, min(good, key=_price_order))
    asked = wish.asked()
    for size in range(1, len(asked) + 1):
        gives = [give for names in combinations(asked, size) if (give := _give(rated, wish, names))]
        if gives:
            return Answer(wish, None, tuple(gives))
    return Answer(wish, None)


def _give(points: Sequence[Point], wish: Wish, names: tuple[str, ...]) -> Give | None:
    kept = [
        point
        for point in points
        if all(wish.met(name, point) for name in _NAMES if name not in names)
        and all(_value(name, point) is not None for name in names)
    ]
    if not kept:
        return None

    def distance(point: Point) -> tuple[float, ...]:
        """How far the wishes give, each in parts of itself, so that points and money can be added."""
        total = 0.0
        for name in names:
            value, limit = _value(name, point), getattr(wish, name)
            assert value is not None
            short = max(0.0, limit - value if name == "accuracy" else value - limit)
            total += short / max(abs(limit), 1e-9)
        return (total, *_price_order(point))

    best = min(kept, key=distance)
    values = tuple(_value(name, best) or 0.0 for name in names)
    return Give(names, values, best)


def _value(name: str, point: Point) -> float | None:
    if name == "accuracy":
        return None if point.accuracy is None else point.accuracy.mean
    if name == "epsilon":
        return point.epsilon
    stat = point.costs["money"]
    return None if stat is None else stat.mean


def _price_order(point: Point) -> tuple[float, float, float, float]:
    """Cheapest first; by training time where money is unknown; then the smaller epsilon, the better one."""
    money, seconds = point.costs["money"], point.costs["train_seconds"]
    return (
        math.inf if money is None else money.mean,
        math.inf if seconds is None else seconds.mean,
        point.epsilon,
        -(point.accuracy.mean if point.accuracy else 0.0),
    )


# --- in words ------------------------------------------------------------------------------------


def plan(folders: Sequence[Path], prices: Sequence[str], wish: Wish) -> tuple[str, list[dict[str, Any]]]:
    """Answers `wish` from the records below `folders`: text, and JSON values, one for each group of points.

    Raises:
        RecordError: no usable records.
        ConfigError: a price book that means nothing.
    """
    from fedtune.report.collect import collect
    from fedtune.report.repricing import book, parse

    chosen = parse(prices)
    found = collect(folders, local=True)  # answered on the terminal, to the owner of the data
    using = book(found.runs, chosen)
    points = points_of(found.runs, using)
    if wish.money is not None and using.currency is None:
        raise ConfigError(f"--money cannot be answered. {using.notes[0]}")
    names = telling(varied(points), points)
    groups = sorted({point.group for point in points})
    texts, values = [], []
    for group in groups:
        members = [point for point in points if point.group == group]
        said = answer(members, wish)
        head = f"{group}:\n" if len(groups) > 1 else ""
        texts.append(head + answer_text(said, names, using.currency, len(members)))
        values.append({"group": group, **answer_json(said, using.currency)})
    remarks = [f"Note: {note}" for note in (*found.notes, *using.notes)]
    return "\n\n".join([*texts, *remarks]), values


def answer_text(said: Answer, names: Sequence[str], currency: str | None, count: int) -> str:
    """The answer in plain words, with the command that repeats the configuration."""
    wish = said.wish
    wanted = ", ".join(_wanted(name, getattr(wish, name), currency) for name in wish.asked())
    if said.found is not None:
        return (
            f"The cheapest of {count} configurations with {wanted}:\n\n"
            f"{_describe(said.found, names, currency)}"
        )
    if not said.gives:
        return f"None of {count} configurations has {wanted}, and none has a measured accuracy to go by."
    lines = [f"None of {count} configurations has {wanted}. One of these must give:"]
    if len(said.gives[0].names) > 1:
        lines[0] = f"None of {count} configurations has {wanted}, and one wish alone cannot give enough:"
    for give in said.gives:
        change = " and ".join(
            _change(name, getattr(wish, name), value, currency)
            for name, value in zip(give.names, give.values, strict=True)
        )
        lines.append(f"\n* {change}:\n\n{_describe(give.point, names, currency)}")
    return "\n".join(lines)


def _wanted(name: str, limit: float, currency: str | None) -> str:
    if name == "accuracy":
        return f"accuracy at least {percent(limit)}"
    if name == "epsilon":
        return f"epsilon at most {number(limit)}"
    return f"at most {money_text(limit, currency)}"


def _change(name: str, limit: float, value: float, currency: str | None) -> str:
    if name == "accuracy":
        return f"accuracy gives by {100 * (limit - value):.1f} points, to {percent(value)}"
    if name == "epsilon":
        if math.isinf(value):
            return "epsilon gives altogether: without privacy"
        return f"epsilon gives by {number(value - limit)}, to {number(value)}"
    return f"money gives by {money_text(value - limit, currency)}, to {money_text(value, currency)}"


def _describe(point: Point, names: Sequence[str], currency: str | None) -> str:
    accuracy, money, seconds = point.accuracy, point.costs["money"], point.costs["train_seconds"]
    assert accuracy is not None
    first = point.runs[0]
    error = (
        f" ± {100 * accuracy.error:.1f} (standard error over {accuracy.count} runs)"
        if accuracy.error is not None
        else " (one run: its luck is not known)"
    )
    promise = (
        "no privacy, epsilon is infinite"
        if math.isinf(point.epsilon)
        else f"epsilon {number(point.epsilon)} at delta {point.delta:.2g}, {first.adjacency}, "
        f"trust {first.trust}"
    )
    lines = [
        setting_words(point.settings, names) or "the default configuration",
        f"accuracy {percent(accuracy.mean)}{error}",
        promise,
        "money unknown" if money is None else f"{money_text(money.mean, currency)} a run",
        "" if seconds is None else f"training {seconds.mean:.0f} s, summed over the nodes",
        command(point.settings, point.seeds),
    ]
    return "\n".join(f"    {line}" for line in lines if line)


def answer_json(said: Answer, currency: str | None) -> dict[str, Any]:
    """The answer for a program; an infinite epsilon is null."""

    def shown(point: Point) -> dict[str, Any]:
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
            "command": command(point.settings, point.seeds),
        }

    return {
        "met": said.found is not None,
        "configuration": None if said.found is None else shown(said.found),
        "must_give": [
            {
                "wishes": {
                    name: None if math.isinf(value) else value
                    for name, value in zip(give.names, give.values, strict=True)
                },
                "configuration": shown(give.point),
            }
            for give in said.gives
        ],
    }
