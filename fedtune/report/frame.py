"""The frontier as a pandas frame that draws itself: what `fedtune.sweep(...).frontier()` returns."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from fedtune.errors import ConfigError
from fedtune.report.frontier import Comparison, Point, table_rows
from fedtune.report.words import short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Frontier"]

_RESULTS = ("epsilon", "delta", "promise", "accuracy", "runs", "money", "seconds", "not dominated")


class Frontier(pd.DataFrame):
    """One row a configuration, smallest epsilon first; runs that differ in the seed alone are one row.

    Columns: `epsilon` (the largest over the seeds; infinite without privacy) with the `delta`, `unit`,
    `adjacency` and `trust` that it belongs to; `accuracy`, the mean over `runs` seeds, with its standard
    error `accuracy_error`; the costs (`money` in `currency`, `seconds`, `bytes`, `energy_kwh`, ...), each
    with its error; `non_dominated_epsilon` and `non_dominated_COST`, whether no other configuration is at
    least as good in accuracy, epsilon and that cost, and better in one; the settings that vary; and the
    `command` that runs it again. What is cut out of it is a plain pandas frame.

    Choosing one of them by looking at all is itself a use of the data: what the choice costs is said by
    `fedtune report`.
    """

    _metadata = ["_points", "_names"]
    _points: Sequence[Point]
    _names: Sequence[str]

    @property
    def _constructor(self) -> type[pd.DataFrame]:
        return pd.DataFrame

    @classmethod
    def of(cls, compared: Comparison) -> Frontier:
        """The frame of all configurations that were compared."""
        points = sorted(compared.points, key=lambda point: (point.group, point.epsilon))
        table = table_rows(points, compared.names, compared.book.currency)
        for row, point in zip(table, points, strict=True):
            # Here and not in CSV: infinity sorts and compares as what it is, and NaN as nothing.
            row["epsilon"] = point.epsilon
        frame = cls(table)
        frame._points, frame._names = points, compared.names
        return frame

    def plot(self, ax: Axes | None = None, *, group: str | None = None) -> Axes:
        """Accuracy against epsilon with errors over seeds; what no other point dominates is filled.

        Args:
            ax: matplotlib axes to draw on; None: new ones.
            group: which of the column `group` (task and unit of privacy); None: the first.

        Returns:
            The axes.

        Raises:
            ConfigError: there is no such group.
        """
        from fedtune.report.figure import draw_on

        groups = list(dict.fromkeys(point.group for point in self._points))
        if group is not None and group not in groups:
            raise ConfigError(
                f"There is no group {group!r} in this frontier. There are: {', '.join(groups)}."
            )
        members = [point for point in self._points if point.group == (group or groups[0])]
        if ax is None:
            from matplotlib import pyplot

            ax = pyplot.subplots(figsize=(7.2, 4.5), layout="constrained")[1]
        draw_on(ax, members, self._names)
        promise = next((point for point in members if point.delta is not None), None)
        if promise is not None:
            ax.set_xlabel(f"epsilon at delta {promise.delta:.2g}, {promise.runs[0].adjacency}")
        return ax

    def __repr__(self) -> str:
        """The columns that answer most questions, as text; the frame has more."""
        width = shutil.get_terminal_size((110, 24)).columns
        return self._shown().to_string(index=False, na_rep="null", line_width=width)

    def _repr_html_(self) -> str:
        """The same as a table."""
        return str(self._shown().to_html(index=False, border=0, na_rep="null"))

    def _shown(self) -> pd.DataFrame:
        shown: list[dict[str, Any]] = []
        # The results are called epsilon and so on: a setting of that name keeps its whole one.
        heads = short_names(self._names)
        heads = {name: name if head in _RESULTS else head for name, head in heads.items()}
        for point in self._points:
            row: dict[str, Any] = {head: point.settings.get(name) for name, head in heads.items()}
            private = math.isfinite(point.epsilon)
            row["epsilon"] = f"{point.epsilon:.3f}" if private else "infinite"
            row["delta"] = f"{point.delta:.2e}" if private and point.delta is not None else "-"
            row["promise"] = point.runs[0].adjacency if private else "no privacy"
            stat = point.accuracy
            error = "" if stat is None or stat.error is None else f" \u00b1 {100 * stat.error:.1f}"
            row["accuracy"] = "-" if stat is None else f"{100 * stat.mean:.1f}{error} %"
            row["runs"] = len(point.runs)
            money, seconds = point.money, point.costs["seconds"]
            known = money is not None and money.total is not None
            row["money"] = f"{money.total:.4f} {money.currency}" if known and money is not None else "-"
            row["seconds"] = "-" if seconds is None else f"{seconds.mean:.1f}"
            row["not dominated"] = "yes" if point.best["epsilon"] else ""
            shown.append(row)
        return pd.DataFrame(shown)
