"""What noised counts of a private evaluation say: rates, calibration, threshold and sites, each with how far
the noise may have moved it.

All of it is post-processing of one release (`fedtune.privacy.mechanisms.confusion`). Where the noise hides a
figure it is None: where a denominator is not four standard deviations of its noise, or the calibration error
could be off by more than `_BLURRED`.

Shapes: c classes, s sites.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtune.privacy.mechanisms.confusion import BINS, ConfusionPlan
from fedtune.privacy.mechanisms.counts import CLEAR, estimate

__all__ = ["calibration", "private_measures", "rates", "threshold"]

FloatArray = npt.NDArray[np.float64]
_BLURRED = 0.05  # a calibration error that the noise may move by more is not told


def private_measures(
    cells: Mapping[str, FloatArray], plan: ConfusionPlan, names: Sequence[str], sites: Sequence[str]
) -> dict[str, Any]:
    """All measures as JSON values.

    Args:
        cells: what `plan.answer` gave.
        names: of the c classes.
        sites: of the s sites that were named.

    Returns:
        What `rates`, `calibration` and `threshold` give, and `per_site` ({units, accuracy} by name).
    """
    return {
        **rates(cells["confusion"], plan.noise_of("confusion"), names),
        **calibration(cells, plan),
        "threshold": threshold(cells["bins"], plan.noise_of("bins")) if len(names) == 2 else None,
        "per_site": {
            name: {
                "units": float(right + wrong),
                "accuracy": _rate(float(right), float(wrong), plan.noise_of("sites"), (1, 1)),
            }
            for name, (right, wrong) in zip(sites, cells.get("sites", []), strict=True)
        },
    }


def rates(cells: FloatArray, noise_std: float, names: Sequence[str]) -> dict[str, Any]:
    """What a noised confusion matrix says, as JSON values.

    Args:
        cells: float64 [c, c], in units, each with noise of standard deviation `noise_std`.
        names: of the c classes.

    Returns:
        units, accuracy; precision_macro, recall_macro, f1_macro, over the classes whose rate is told;
        `per_class` ({units, precision, recall, f1} by name), where each rate is None or {value,
        standard_error}; `hidden`, the classes of which some rate is not told; `confusion`, the cells.
    """
    classes = len(names)
    right, there, said = np.diagonal(cells), cells.sum(axis=1), cells.sum(axis=0)
    others = classes - 1
    per_class: dict[str, dict[str, Any]] = {}
    for place, name in enumerate(names):
        hits = float(right[place])
        twice, misses = 2 * hits, float(there[place] + said[place]) - 2 * hits
        per_class[name] = {
            "units": float(there[place]),
            "precision": _rate(hits, float(said[place]) - hits, noise_std, (1, others)),
            "recall": _rate(hits, float(there[place]) - hits, noise_std, (1, others)),
            # 2 hits / (2 hits + misses): the hits' noise counts twice. The factor for the finite number of
            # units, whose hits enter twice too, is 2 - F1 (delta method).
            "f1": _rate(twice, misses, noise_std, (4, 2 * others), doubled=True),
        }
    told = {
        rate: [one[rate]["value"] for one in per_class.values() if one[rate] is not None]
        for rate in ("precision", "recall", "f1")
    }
    whole = float(cells.sum())
    hits = float(right.sum())
    return {
        "units": whole,
        "accuracy": _rate(hits, whole - hits, noise_std, (classes, classes * others)),
        **{f"{rate}_macro": float(np.mean(values)) if values else None for rate, values in told.items()},
        "per_class": per_class,
        "hidden": [
            name
            for name, one in per_class.items()
            if any(one[rate] is None for rate in ("precision", "recall", "f1"))
        ],
        "confusion": cells.tolist(),
    }


def _rate(
    part: float, rest: float, noise_std: float, cells: tuple[int, int], *, doubled: bool = False
) -> dict[str, float] | None:
    """part / (part + rest) and its standard error; None where noise hides it. `cells`: as of `estimate`."""
    found = estimate(part, rest, 1, noise_std, cells)
    if found.accuracy is None or found.standard_error is None:
        return None
    error = found.standard_error * (math.sqrt(2.0 - found.accuracy) if doubled else 1.0)
    return {"value": found.accuracy, "standard_error": error}


def calibration(cells: Mapping[str, FloatArray], plan: ConfusionPlan) -> dict[str, Any]:
    """How far the probabilities of what was said are to be believed.

    The error is the usual one (Guo et al. 2017), sum over bins of |right - what the probabilities add up to|
    over all units. The noise moves it by at most e = sum of |noise of a bin| over all units, whose mean and
    spread are known; told is e's mean and two standard deviations more.

    Returns:
        `calibration_error`: None, or {value, noise}; `calibration`, of bins that the noise does not hide:
        {probability, right, standard_error, units}.
    """
    noise, far = plan.noise_of("bins"), plan.noise_of("offsets")
    bins, offsets, half = cells["bins"], cells["offsets"], 0.5 / BINS
    middle = (np.arange(BINS) + 0.5) / BINS
    if plan.classes == 2:
        # From the probability of the second class to that of what was said: below one half the first was
        # said, and is right where it is the label.
        middle, upper = middle[BINS // 2 :], slice(BINS // 2, None)
        lower = slice(BINS // 2 - 1, None, -1)
        right, wrong = bins[1, upper] + bins[0, lower], bins[0, upper] + bins[1, lower]
        offsets = offsets[upper] - offsets[lower]
        noise, far = noise * math.sqrt(2.0), far * math.sqrt(2.0)
    else:
        possible = middle + half > 1.0 / plan.classes  # what is most probable has no less
        right, wrong, middle, offsets = (
            bins[1, possible],
            bins[0, possible],
            middle[possible],
            offsets[possible],
        )
    units = right + wrong
    gap = right - (middle * units + half * offsets)
    moved = np.sqrt(noise**2 * ((1 - middle) ** 2 + middle**2) + (half * far) ** 2)
    whole = float(units.sum())
    # |g| of a Gaussian has mean sqrt(2 / pi) and variance 1 - 2 / pi.
    mean, spread = math.sqrt(2 / math.pi) * moved.sum(), math.sqrt((1 - 2 / math.pi) * (moved**2).sum())
    bound = (mean + 2 * spread) / whole if whole > 0 else math.inf
    told = []
    for place in np.flatnonzero(units > 0):
        rate = _rate(float(right[place]), float(wrong[place]), noise, (1, 1))
        if rate is not None:
            shift = half * float(np.clip(offsets[place] / units[place], -1.0, 1.0))
            told.append(
                {
                    "probability": float(middle[place]) + shift,
                    "right": rate["value"],
                    "standard_error": rate["standard_error"],
                    "units": float(units[place]),
                }
            )
    error = {"value": float(np.abs(gap).sum()) / whole, "noise": bound} if bound <= _BLURRED else None
    return {"calibration_error": error, "calibration": told}


def threshold(bins: FloatArray, noise_std: float) -> dict[str, float] | None:
    """From which probability of the second class on to say it, for the largest macro F1.

    Args:
        bins: float64 [2, 20], a row a label, a column how probable the second class is.
        noise_std: of each cell.

    Returns:
        None where the noise hides how many there are of a class; else `probability` (an edge of the bins),
        `f1_macro` there with its `standard_error`, and `f1_macro_at_half`. The largest of several noised
        figures is too large rather than too small.
    """
    if min(bins.sum(axis=1)) < max(CLEAR * noise_std * math.sqrt(BINS), 1e-9):
        return None

    def counts(edge: int) -> FloatArray:
        """What is said from `edge` on: [hits, false alarms, misses, hits of the first class]."""
        return np.array(
            [bins[1, edge:].sum(), bins[0, edge:].sum(), bins[1, :edge].sum(), bins[0, :edge].sum()]
        )

    best = max(range(BINS + 1), key=lambda edge: _f1_macro(counts(edge)))
    found = counts(best)
    size = np.array([BINS - best, BINS - best, best, best])  # cells that each is the sum of
    step = 1e-4 * float(bins.sum())
    slope = [
        (_f1_macro(found + step * one) - _f1_macro(found - step * one)) / (2 * step) for one in np.eye(4)
    ]
    variance = float((np.square(slope) * (size * noise_std**2 + np.maximum(found, 1.0))).sum())
    return {
        "probability": best / BINS,
        "f1_macro": _f1_macro(found),
        "standard_error": math.sqrt(variance),
        "f1_macro_at_half": _f1_macro(counts(BINS // 2)),
    }


def _f1_macro(counts: FloatArray) -> float:
    """The mean of both classes' F1, in [0, 1]."""
    hits, alarms, misses, others = np.maximum(counts, 0.0)
    of_second = 2 * hits / max(2 * hits + alarms + misses, 1e-9)
    of_first = 2 * others / max(2 * others + alarms + misses, 1e-9)
    return float((of_second + of_first) / 2)
