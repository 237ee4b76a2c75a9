"""`frontier.png`: accuracy against epsilon, for a README or a slide; matplotlib, without a display."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedtune.report.frontier import Point
from fedtune.report.words import format_number, short_names
from fedtune.runs.figures import COLORS, MARKERS, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "draw_on", "series_setting"]

_MOST_SERIES = len(COLORS)


def series_setting(points: Sequence[Point], names: Sequence[str]) -> str | None:
    """The setting to tell apart by colour: the first of `names` that has a few values and is not epsilon."""
    for name in names:
        if name in ("privacy.epsilon", "privacy.noise_multiplier", "privacy.max_grad_norm"):
            continue
        private = [point for point in points if math.isfinite(point.epsilon)] or points
        if 2 <= len({repr(point.settings.get(name)) for point in private}) <= _MOST_SERIES:
            return name
    return None


def draw(points: Sequence[Point], names: Sequence[str], promise: str) -> bytes:
    """The picture of one group of points as PNG; `promise` is the line of small print below it."""

    def fill(figure: Figure, axes: list[Axes]) -> None:
        draw_on(axes[0], points, names)
        figure.supxlabel(promise, fontsize=7.5, color="#555555")

    return picture(fill, (7.2, 4.5))


def draw_on(axes: Axes, points: Sequence[Point], names: Sequence[str]) -> None:
    """Draws one group of points on `axes`, told apart by the first of `names` that has a few values."""
    rated = [point for point in points if point.accuracy is not None]
    place = _places(rated)
    by = series_setting(rated, names)
    values = list(dict.fromkeys(str(point.settings.get(by)) for point in rated)) if by else [""]
    values.sort(key=_order)
    for i, value in enumerate(values):
        members = [point for point in rated if not by or str(point.settings.get(by)) == value]
        dodge = 1.0 + 0.035 * (i - (len(values) - 1) / 2.0)
        label = f"{short_names([by])[by].removesuffix('.name')} {value}" if by else ""
        _series(axes, members, place, dodge, i, label)
    _front(axes, rated, place)
    _dress(axes, rated, place)
    if by:
        axes.legend(frameon=False, loc="lower right")


def _order(value: str) -> tuple[float, str]:
    try:
        return float(value), value
    except ValueError:
        return math.inf, value


def _places(points: Sequence[Point]) -> dict[float, float]:
    """Where on a logarithmic axis each epsilon lies; infinity a little right of the largest."""
    finite = sorted({point.epsilon for point in points if 0 < point.epsilon < math.inf}) or [1.0]
    found = {value: value for value in finite}
    found[math.inf] = finite[-1] * max(2.2, (finite[-1] / finite[0]) ** 0.22)
    found[0.0] = finite[0] / 2.0
    return found


def _series(
    axes: Axes, points: Sequence[Point], place: dict[float, float], dodge: float, i: int, label: str
) -> None:
    color, marker = COLORS[i % _MOST_SERIES], MARKERS[i % _MOST_SERIES]
    for best in (False, True):
        some = [point for point in points if point.best["epsilon"] is best and point.accuracy]
        if not some:
            continue
        axes.errorbar(
            [place[point.epsilon] * dodge for point in some],
            [100 * point.accuracy.mean for point in some if point.accuracy],
            yerr=[100 * (point.accuracy.error or 0.0) for point in some if point.accuracy],
            linestyle="none",
            marker=marker,
            markersize=8 if best else 6,
            color=color,
            markeredgecolor="black" if best else color,
            markerfacecolor=color if best else "white",
            elinewidth=1.2,
            capsize=2.5,
            alpha=1.0 if len(points) < 200 or best else 0.4,
            zorder=3 if best else 2,
        )
    if label:
        axes.plot([], [], linestyle="none", marker=marker, color=color, label=label)


def _front(axes: Axes, points: Sequence[Point], place: dict[float, float]) -> None:
    best = sorted((p for p in points if p.best["epsilon"] and p.accuracy), key=lambda p: p.epsilon)
    x = [place[point.epsilon] for point in best]
    y = [100 * point.accuracy.mean for point in best if point.accuracy]
    ends = len(best) - (1 if best and math.isinf(best[-1].epsilon) else 0)
    axes.step(x[:ends], y[:ends], where="post", color="#888888", linewidth=1.0, zorder=1)
    # Dotted where the axis leaps to infinity.
    x, y = x[max(ends - 1, 0) :], y[max(ends - 1, 0) :]
    axes.step(x, y, where="post", color="#888888", linewidth=1.0, linestyle=":", zorder=1)


def _dress(axes: Axes, points: Sequence[Point], place: dict[float, float]) -> None:
    axes.set_xscale("log")
    shown = sorted({point.epsilon for point in points})
    if len(shown) > 9:
        shown = [shown[round(k * (len(shown) - 1) / 8)] for k in range(9)]
    ticks: list[float] = []
    for value in shown:  # labels that would touch are left out
        if not ticks or place[value] / place[ticks[-1]] > 1.22:
            ticks.append(value)
    axes.set_xticks(
        [place[value] for value in ticks],
        ["no privacy" if math.isinf(value) else format_number(value) for value in ticks],
    )
    axes.minorticks_off()
    axes.margins(x=0.08, y=0.1)
    axes.set_xlabel("epsilon: smaller is more private")
    axes.set_ylabel("accuracy on the test split, percent")
    axes.set_title("What privacy costs in accuracy", loc="left", fontweight="bold")
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
