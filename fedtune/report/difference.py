"""By how much one configuration differs from another: over the seeds that both were run with.

Two runs of one seed share partition, start and order of cohorts, so that much of what is luck in one is luck
in the other too, and cancels in their difference. The error of the difference is that of the paired
differences; adding the two errors, as if they were independent, would hide differences that every seed shows.
Only where no seed is common to both is the difference that of the means, with the errors added so.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedtune.report.collect import Run
    from fedtune.report.frontier import Point

__all__ = ["Difference", "accuracy_of", "by_seed", "difference", "paired", "site_difference"]

Value = Callable[["Run"], "float | None"]


@dataclass(frozen=True)
class Difference:
    """A mean difference.

    Attributes:
        mean: of the first over the second.
        error: its standard error; None where one seed or no spread is all there is.
        seeds: how many seeds both have; 0: the two were not paired.
    """

    mean: float
    error: float | None
    seeds: int

    def within(self, errors: float) -> bool:
        """Whether it is no larger than so many standard errors, of which an unknown one counts as 0."""
        return self.mean <= errors * (self.error or 0.0)

    def points(self) -> str:
        """`1.0 ± 0.1 points`, for a share such as accuracy."""
        error = "" if self.error is None else f" ± {100 * self.error:.1f}"
        return f"{100 * self.mean:.1f}{error} points"


def accuracy_of(run: Run) -> float | None:
    """What is compared where nothing else is said."""
    return run.accuracy


def by_seed(point: Point, value: Value = accuracy_of) -> dict[int, float]:
    """The value at each seed, the mean of several runs of one; of runs that have it."""
    known: dict[int, list[float]] = {}
    for run in point.runs:
        if (number := value(run)) is not None:
            known.setdefault(run.seed, []).append(number)
    return {seed: statistics.fmean(numbers) for seed, numbers in known.items()}


def difference(first: Point, second: Point, value: Value = accuracy_of) -> Difference:
    """How much larger `value` is of `first` than of `second`.

    Raises:
        ValueError: one of the two has it at no seed.
    """
    return paired(by_seed(first, value), by_seed(second, value))


def site_difference(first: Point, second: Point, site: str) -> Difference:
    """The same of the accuracy at one site."""
    return difference(first, second, lambda run: run.per_site.get(site))


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Difference:
    """The same of numbers by seed."""
    if not first or not second:
        raise ValueError("a difference needs a number on either side")
    if common := sorted(first.keys() & second.keys()):
        apart = [first[seed] - second[seed] for seed in common]
        return Difference(statistics.fmean(apart), _error(apart), len(common))
    errors = [_error(list(one.values())) for one in (first, second)]
    known = [error for error in errors if error is not None]
    mean = statistics.fmean(first.values()) - statistics.fmean(second.values())
    return Difference(mean, math.hypot(*known) if known else None, 0)


def _error(values: list[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
