"""Noised counts of what an exported model says on private texts, released once and charged.

`fedtune.serving.private_evaluation` asks for them. One release has four parts, each a histogram of the same
votes, and everything that is told (`fedtune.serving.private_measures`) is computed from them alone, which is
post-processing and costs no more:

    confusion [c, c]   a row a label, a column what was said
    bins [2, 20]       of two classes: a row a label, a column how probable the second class is;
                       of more: a row wrong or right, a column how probable what was said is
    offsets [20]       how far those probabilities are from the middles of their bins, in half widths, summed
    sites [s, 2]       of each site that was named: right, wrong

The mechanism. A unit's vote of a part is cut into equal steps, `steps` of that part, where the squares of
the parts' steps add up to at most `scale` squared (`SHARES` says how the budget is divided; a part has noise
of `noise_multiplier` over the root of its share). A record puts all of its vote into one cell; a person's
vote is shared out over the cells of their texts in equal parts, however many texts they have, so that nobody
weighs more than one; offsets lie within -1 and 1 and are multiplied with what the text weighs. So adding or
removing one unit changes a part by a vector v with |v|_2 <= |v|_1 <= steps, and all parts together, in L2, by
at most

    sqrt(sum over parts of steps^2) <= scale

which a unit in one cell of each part reaches, but for offsets: one vote is the L2 sensitivity of the release,
whatever the number of classes, bins and sites. Which sites there are is public, or it would be a release of
its own; a text of another site has no vote in that part. Each cell gets exact discrete Gaussian noise of
standard deviation 2^24 steps, and `scale` is chosen so that 2^24 is at least `noise_multiplier` times the
sensitivity. To the accountant that is one Gaussian of that multiplier, once: steps 4 and 5 of the argument in
`fedtune.privacy.mechanisms.discrete`, with one share, r = 4 and d the number of cells, hold with a slack
below 1e-136 a cell.

Shapes: n texts, c classes, s sites.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from fedtune.errors import PrivacyError
from fedtune.privacy.mechanisms.counts import STD, CountPlan
from fedtune.privacy.mechanisms.noise import MAX_LOG2_STD, Entropy, discrete_gaussian

__all__ = ["BINS", "ConfusionPlan", "Votes"]

BINS = 20  # of equal width, over the probabilities from 0 to 1
# Of the squared budget. Rates hang on the first; an offset is multiplied with half of a bin's width, so that
# its noise hardly shows.
SHARES: Mapping[str, float] = {"confusion": 2.0, "bins": 1.0, "offsets": 1 / 16, "sites": 1.0}

Int64Array = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Votes:
    """What each text says; each entry must follow from its own text alone.

    Attributes:
        labels: int64 [n], each in [0, c); n may be 0.
        said: int64 [n], as `labels`.
        probability: float64 [n], in [0, 1]: of two classes that of the second, else that of what was said.
        persons: int64 [n], whose each text is (needed for unit=person, else ignored).
        sites: int64 [n], the place of each text's site among those that were named, -1: of none; None: no
            site was named.
    """

    labels: Int64Array
    said: Int64Array
    probability: FloatArray
    persons: Int64Array | None = None
    sites: Int64Array | None = None


@dataclass(frozen=True, kw_only=True)
class ConfusionPlan(CountPlan):
    """One noised release about `classes` classes and `sites` named sites; the other fields as of every
    count."""

    purpose: ClassVar[str] = "confusion"

    classes: int
    sites: int = 0

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each part that is released."""
        found: dict[str, tuple[int, ...]] = {
            "confusion": (self.classes, self.classes), "bins": (2, BINS), "offsets": (BINS,),
        }  # fmt: skip
        return {**found, "sites": (self.sites, 2)} if self.sites else found

    def steps(self, part: str) -> int:
        """Into how many steps a unit's vote of `part` is cut."""
        whole = sum(SHARES[one] for one in self.shapes)
        return math.floor(self.scale * math.sqrt(SHARES[part] / whole) * (1.0 - 1e-12))

    def noise_of(self, part: str) -> float:
        """Standard deviation of the noise in each cell of `part`, in units; 0.0 without privacy."""
        return STD / self.steps(part) if self.is_private() else 0.0

    def totals(self, votes: Votes) -> dict[str, Int64Array]:
        """The parts without noise, in steps.

        Raises:
            PrivacyError: persons are protected, and it is not known whose each text is.
        """
        places = np.minimum((votes.probability * BINS).astype(np.int64), BINS - 1)
        within = np.clip(2.0 * (votes.probability * BINS - places) - 1.0, -1.0, 1.0)
        row = votes.labels if self.classes == 2 else (votes.labels == votes.said).astype(np.int64)
        cells = {
            "confusion": votes.labels * self.classes + votes.said,
            "bins": row * BINS + places,
            "offsets": places,
        }
        if self.sites and votes.sites is not None:
            cells["sites"] = votes.sites * 2 + (votes.labels != votes.said)
        found = {part: np.zeros(shape, dtype=np.int64) for part, shape in self.shapes.items()}
        for part, place in cells.items():
            weights = self._weights(self.steps(part), len(place), votes.persons)
            if part == "offsets":
                weights = np.trunc(weights * within).astype(np.int64)
            there = place >= 0
            np.add.at(found[part].reshape(-1), place[there], weights[there])
        return found

    def _weights(self, steps: int, texts: int, persons: Int64Array | None) -> Int64Array:
        """What each text weighs: whole steps, which add up to `steps` for each unit."""
        if self.unit != "person":
            return np.full(texts, steps, dtype=np.int64)
        if persons is None or len(persons) != texts:
            raise PrivacyError("Persons are protected, and it is not known whose each record is.")
        # A person's k-th of t texts weighs floor((k + 1) steps / t) - floor(k steps / t).
        order = np.argsort(persons, kind="stable")
        _, starts, counts = np.unique(persons[order], return_index=True, return_counts=True)
        place = np.arange(texts) - np.repeat(starts, counts)
        of_person = np.repeat(counts, counts)
        weights = np.empty(texts, dtype=np.int64)
        weights[order] = (place + 1) * steps // of_person - place * steps // of_person
        return weights

    def answer(self, votes: Votes, entropy: Entropy) -> dict[str, FloatArray]:
        """The noised parts in units; cells may be negative.

        Guarantee: one Gaussian of `noise_multiplier` in terms of one unit added or removed, which is what
        `terms(1)` accounts for. The caller must have reserved that in the ledger before it asked the model.
        """
        totals = self.totals(votes)
        whole = np.concatenate([total.reshape(-1) for total in totals.values()])
        if self.is_private():
            whole = whole + discrete_gaussian(whole.size, MAX_LOG2_STD, entropy)
        ends = np.cumsum([total.size for total in totals.values()])
        cells = np.split(whole, ends[:-1])
        return {
            part: one.reshape(self.shapes[part]) / self.steps(part)
            for part, one in zip(totals, cells, strict=True)
        }
