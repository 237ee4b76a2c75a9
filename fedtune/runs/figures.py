"""The look of every picture that fedtune draws: one type, one size for each kind of word, one palette.

PNG, by matplotlib, without a display.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLORS", "MARKERS", "STYLE", "alike", "picture"]

# Okabe and Ito 2008: told apart by all common kinds of colour vision; a marker says the same again.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#4D4D4D")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # matplotlib brings it: the same on every machine
    "font.size": 9.0,
    "axes.titlesize": 11.0,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@contextmanager
def alike() -> Iterator[None]:
    """Within it, or within a function that it decorates, matplotlib draws in this look."""
    import matplotlib
    from matplotlib.rcsetup import cycler

    with matplotlib.rc_context({**STYLE, "axes.prop_cycle": cycler(color=COLORS)}):
        yield


def picture(draw: Callable[[Figure, list[Axes]], None], size: tuple[float, float], columns: int = 1) -> bytes:
    """A PNG of `columns` panels side by side, of `size` in inches together; `draw` fills them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with alike():
        figure = Figure(figsize=size, dpi=160, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure, list(figure.subplots(1, columns, squeeze=False)[0]))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        return buffer.getvalue()
