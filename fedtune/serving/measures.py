"""How right a classifier is: rates, per class and per site, confusion, calibration, and where to set a
threshold.

Shapes: n texts, c classes. Everything is computed from given labels as they are, without noise: for data that
may be looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.training.evaluation import score

__all__ = ["measure"]

_BINS = 15  # of equal width, as usual for this error (Guo et al. 2017)


def measure(
    probabilities: NDArray[np.float32],
    labels: NDArray[np.int64],
    names: Sequence[str],
    sites: NDArray[np.str_] | None = None,
) -> dict[str, Any]:
    """All measures as JSON values.

    Args:
        probabilities: float32 [n, c].
        labels: int64 [n].
        names: of the c classes.
        sites: str [n], where each text comes from.

    Returns:
        accuracy, precision_macro, recall_macro, f1_macro, loss, num_records; `per_class` ({precision,
        recall, f1, num_records} by name); `confusion` (int [c, c], a row the label, a column what was
        said); `calibration_error` (expected, of the most probable label) and `calibration`, its bins;
        `threshold` (two classes only: which probability of the second class to ask for so that macro F1 is
        largest on these texts); `per_site`.

    Raises:
        ValueError: n is 0.
    """
    whole = score(probabilities, labels, sites)
    said = probabilities.argmax(1)
    confusion = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(confusion, (labels, said), 1)
    calibration = _calibration(probabilities, said == labels)
    found: dict[str, Any] = {
        "num_records": len(labels),
        "accuracy": whole.accuracy,
        "precision_macro": whole.precision_macro,
        "recall_macro": whole.recall_macro,
        "f1_macro": whole.f1_macro,
        "loss": whole.loss,
        # Expected: how far, on average, the probability is from the share that is right.
        "calibration_error": sum(
            one["num_records"] * abs(one["right"] - one["probability"]) for one in calibration
        )
        / len(labels),
        "calibration": calibration,
        "per_class": {name: _of_class(confusion, place) for place, name in enumerate(names)},
        "confusion": confusion.tolist(),
        "threshold": _threshold(probabilities[:, 1], labels) if len(names) == 2 else None,
        "per_site": {},
    }
    if sites is not None:
        for site in np.unique(sites):
            rows = sites == site
            part = score(probabilities[rows], labels[rows], None)
            found["per_site"][str(site)] = {
                "num_records": int(rows.sum()),
                "accuracy": part.accuracy,
                "f1_macro": part.f1_macro,
            }
    return found


def _of_class(confusion: NDArray[np.int64], place: int) -> dict[str, Any]:
    """Rates of one class; null where they have no meaning: nothing is, or was said to be, of it."""
    right, there, said = confusion[place, place], confusion[place].sum(), confusion[:, place].sum()
    return {
        "num_records": int(there),
        "precision": float(right / said) if said else None,
        "recall": float(right / there) if there else None,
        "f1": float(2 * right / (there + said)) if there + said else None,
    }


def _calibration(probabilities: NDArray[np.float32], right: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """By bins of the label's probability that hold any text: its mean, the share that is right, how many."""
    sure = probabilities.max(1).astype(float)
    bins = np.minimum((sure * _BINS).astype(int), _BINS - 1)
    return [
        {
            "num_records": int((bins == one).sum()),
            "probability": float(sure[bins == one].mean()),
            "right": float(right[bins == one].mean()),
        }
        for one in np.unique(bins)
    ]


def _threshold(second: NDArray[np.float32], labels: NDArray[np.int64]) -> dict[str, float]:
    """From which probability of the second class on to say it, for the largest macro F1 on these texts."""
    order = np.argsort(-second, kind="stable")
    truth = labels[order] == 1
    n, positives = len(labels), int(truth.sum())
    count = np.arange(n + 1)  # how many are said to be of the second class
    hits = np.concatenate([[0], np.cumsum(truth)])
    f1_second = 2 * hits / np.maximum(count + positives, 1)
    f1_first = 2 * (n - count - positives + hits) / np.maximum(2 * n - count - positives, 1)
    macro = (f1_second + f1_first) / 2
    sorted_second = second[order].astype(float)
    # Only where the probability changes can a threshold cut.
    cuts = np.concatenate([[True], sorted_second[1:] != sorted_second[:-1], [True]])
    best = int(np.flatnonzero(cuts)[macro[cuts].argmax()])
    above = 1.0 if best == 0 else sorted_second[best - 1]
    below = 0.0 if best == n else sorted_second[best]
    return {"probability": float((above + below) / 2), "f1_macro": float(macro[best])}
