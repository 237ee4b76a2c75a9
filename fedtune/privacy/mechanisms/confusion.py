"""A noised confusion matrix: how an exported model does on private texts, released once and charged.

`fedtune.serving.private_evaluation` asks for it. Every cell (label, what was said) counts units, and all
rates (accuracy, precision, recall and F1 of each class, their means) are computed from the noised cells
alone, which is post-processing and costs no more.

The mechanism. A unit's vote is cut into `scale` equal steps. A record puts all of it into one cell; a
person's vote is shared out over the cells of their texts in equal parts, however many texts they have, so
that nobody weighs more than one. Adding or removing one unit therefore changes the c x c cells by a vector v
>= 0 whose entries add up to `scale`, and |v|_2 <= |v|_1 = scale, with equality where a unit lies in one cell:
one vote is the L2 sensitivity of the whole matrix, whatever the number of classes. Each cell gets exact
discrete Gaussian noise of standard deviation 2^24 steps, and `scale` is chosen so that 2^24 is at least
`noise_multiplier` times the sensitivity. To the accountant that is one Gaussian of that multiplier, once:
steps 4 and 5 of the argument in `fedtune.privacy.mechanisms.discrete`, with one share, r = 4 and d = c^2,
hold with a slack below 1e-136 a cell.

More classes cost no privacy and much accuracy: a row's sum has the noise of c cells. Where a denominator is
not four standard deviations of its noise a rate says nothing, and is None.

Shapes: n texts, c classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from fedtune.errors import PrivacyError
from fedtune.privacy.mechanisms.counts import CountPlan, estimate
from fedtune.privacy.mechanisms.noise import MAX_LOG2_STD, Entropy, discrete_gaussian

__all__ = ["ConfusionPlan", "rates"]

Int64Array = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class ConfusionPlan(CountPlan):
    """One noised confusion matrix of `classes` classes; the other fields as of every count."""

    purpose: ClassVar[str] = "confusion"

    classes: int

    def totals(self, labels: Int64Array, said: Int64Array, persons: Int64Array | None) -> Int64Array:
        """The matrix without noise, in steps: int64 [c, c], a row a label, a column what was said.

        Args:
            labels: int64 [n], each in [0, c); n may be 0.
            said: int64 [n], as `labels`; each must follow from its own text alone.
            persons: int64 [n], whose each text is (needed for unit=person, else ignored).

        Returns:
            Its sum is `scale` times the number of units, exactly.

        Raises:
            PrivacyError: persons are protected, and it is not known whose each text is.
        """
        cells = labels * self.classes + said
        if self.unit != "person":
            weights = np.full(len(cells), self.scale, dtype=np.int64)
        elif persons is None or len(persons) != len(cells):
            raise PrivacyError("Persons are protected, and it is not known whose each record is.")
        else:
            # A person's k-th of t texts weighs floor((k + 1) scale / t) - floor(k scale / t): whole steps
            # that add up to the scale.
            order = np.argsort(persons, kind="stable")
            cells = cells[order]
            _, starts, texts = np.unique(persons[order], return_index=True, return_counts=True)
            place = np.arange(len(cells)) - np.repeat(starts, texts)
            of_person = np.repeat(texts, texts)
            weights = (place + 1) * self.scale // of_person - place * self.scale // of_person
        found = np.zeros(self.classes**2, dtype=np.int64)
        np.add.at(found, cells, weights)
        return found.reshape(self.classes, self.classes)

    def answer(
        self, labels: Int64Array, said: Int64Array, persons: Int64Array | None, entropy: Entropy
    ) -> FloatArray:
        """The noised matrix in units, float64 [c, c]; cells may be negative. Arguments as of `totals`.

        Guarantee: one Gaussian of `noise_multiplier` in terms of one unit added or removed, which is what
        `terms(1)` accounts for. The caller must have reserved that in the ledger before it computed `said`.
        """
        total = self.totals(labels, said, persons)
        if self.is_private():
            noise = discrete_gaussian(self.classes**2, MAX_LOG2_STD, entropy)
            total = total + noise.reshape(total.shape)
        return total / self.scale


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
