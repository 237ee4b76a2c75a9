"""Adoption: how many configurations that are good enough come under a budget, as they get cheaper.

"Good enough" is a wanted accuracy and a wanted epsilon. Two ways to get cheaper: all prices fall, or
compression cuts the computation, which takes the same share off what is paid for devices and energy and
leaves network and data as they are. The page of the report computes the same from the same parts, so that a
reader can move the three numbers; a test holds the two to each other.

Does not do: say that prices will fall, or that a compressed model keeps its accuracy. It counts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from fedtune.cost.prices import Money
from fedtune.report.frontier import Point

__all__ = ["CUTS", "Adoption", "Wanted", "adoption", "amount_after", "default_wanted"]

CUTS = (0.0, 0.1, 0.3, 0.5, 0.7)


@dataclass(frozen=True)
class Wanted:
    """Accuracy at least, epsilon at most (may be infinite), money at most."""

    accuracy: float
    epsilon: float
    money: float


@dataclass(frozen=True)
class Adoption:
    """Counts of configurations.

    Attributes:
        good_enough: how many reach accuracy and epsilon, at any cost, of those whose cost is known.
        by_price: for each of `CUTS`, how many of them come under the budget when all prices fall by it.
        by_compute: the same when the computation falls by it.
    """

    wanted: Wanted
    good_enough: int
    by_price: tuple[int, ...]
    by_compute: tuple[int, ...]


def amount_after(money: Money, *, price_cut: float = 0.0, compute_cut: float = 0.0) -> float | None:
    """The total after prices fell by `price_cut`, computation by `compute_cut` (shares); None if unknown."""
    parts = (money.compute, money.energy, money.network, money.data)
    if any(part is None for part in parts):
        return None
    compute, energy, network, data = (part or 0.0 for part in parts)
    return (1.0 - price_cut) * ((1.0 - compute_cut) * (compute + energy) + network + data)


def adoption(points: Sequence[Point], wanted: Wanted) -> Adoption:
    """Counts how many of `points` are good enough and come under the budget, at each of `CUTS`."""
    good = [
        point.money
        for point in points
        if point.money is not None
        and point.money.total is not None
        and point.accuracy is not None
        and point.accuracy.mean >= wanted.accuracy
        and point.epsilon <= wanted.epsilon
    ]

    def under(amounts: Sequence[float | None]) -> int:
        # A cent's millionth of slack: a budget that was copied from a table should include its row.
        return sum(amount is not None and amount <= wanted.money * (1.0 + 1e-9) for amount in amounts)

    return Adoption(
        wanted,
        len(good),
        tuple(under([amount_after(money, price_cut=cut) for money in good]) for cut in CUTS),
        tuple(under([amount_after(money, compute_cut=cut) for money in good]) for cut in CUTS),
    )


def default_wanted(points: Sequence[Point], chosen: Point | None) -> Wanted | None:
    """A question to begin with: a little below the chosen point's accuracy, at its epsilon, for half the
    median amount of those that are good enough. None where no point has accuracy and amount."""
    priced = [point for point in points if point.accuracy and point.money and point.money.total is not None]
    if not priced:
        return None
    start = chosen if chosen is not None and chosen in priced else priced[0]
    assert start.accuracy is not None
    # Rounded to half percents, downwards: a reader can say such a number.
    accuracy = math.floor((start.accuracy.mean - 0.02) * 200.0) / 200.0
    amounts = [
        point.money.total
        for point in priced
        if point.money and point.money.total is not None and point.accuracy
        and point.accuracy.mean >= accuracy and point.epsilon <= start.epsilon
    ]  # fmt: skip
    return Wanted(max(accuracy, 0.0), start.epsilon, float(f"{0.5 * statistics.median(amounts):.2g}"))
