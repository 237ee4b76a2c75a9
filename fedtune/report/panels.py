"""Which costs get a panel beside accuracy: those that a choice among the configurations changes.

On an axis of its own a cost that is the same everywhere, or moves with the machine alone, would look as if a
choice changed it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fedtune.report.frontier import COSTS, Point

__all__ = ["equal_costs", "noisy_costs"]


def equal_costs(points: Sequence[Point]) -> list[str]:
    """Costs that differ by a percent at most between several configurations."""
    amounts = {name: [cost.mean for point in points if (cost := point.costs[name])] for name in COSTS}
    return [name for name, seen in amounts.items() if len(seen) > 1 and max(seen) <= 1.01 * min(seen)]


def noisy_costs(points: Sequence[Point], equal: Sequence[str]) -> list[str]:
    """Costs that differ between configurations no more than between runs of one, by an F test at 5 percent.

    Times, energy and memory depend on what else the machine did and on what a process did before: they drift
    over a sweep, whose runs of one configuration are neighbours. So a line by the order of the runs, as steep
    as within configurations, is taken out of both sides (analysis of covariance), where it can be told.

    A cost of which no configuration has two runs is not judged.
    """
    return [
        name for name in COSTS if name not in equal and _is_noise([p for p in points if p.costs[name]], name)
    ]


def _is_noise(points: Sequence[Point], name: str) -> bool:
    from scipy.special import fdtrc

    stats = [cost for point in points if (cost := point.costs[name])]
    values = np.array([value for one in stats for value in one.values])
    own = np.repeat(np.eye(len(stats)), [one.count for one in stats], axis=0)  # [runs, configurations]
    begun = [run.started for point in points for run in point.runs]
    order = np.searchsorted(np.sort(np.array(begun)), begun).astype(float)[:, None]
    same = np.ones((len(values), 1))
    if np.linalg.matrix_rank(np.hstack([own, order])) == len(stats) + 1 < len(values):
        own, same = np.hstack([own, order]), np.hstack([same, order])
    between, within = len(stats) - 1, len(values) - own.shape[1]
    if between < 1 or within < 1:
        return False
    inner, outer = _unexplained(values, own), _unexplained(values, same)
    if inner <= 1e-12 * float(values @ values):
        return False
    return bool(fdtrc(between, within, (outer - inner) / between / (inner / within)) > 0.05)


def _unexplained(values: NDArray[np.float64], by: NDArray[np.float64]) -> float:
    """The sum of squares that a linear model `by` [runs, terms] leaves of `values` [runs]."""
    rest = values - by @ np.linalg.lstsq(by, values, rcond=None)[0]
    return float(rest @ rest)
