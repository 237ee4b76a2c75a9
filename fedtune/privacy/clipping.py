"""To what a unit's contribution is scaled, so that it changes a sum by at most one L2 norm C.

Either all of it together (Abadi et al. 2016, Algorithm 1), or head and rest each by itself (by layers, as in
McMahan et al. 2018, "Learning differentially private recurrent language models"): the head's part, clipped at
H, is multiplied by C sqrt(s) / H, and the rest is clipped at C sqrt(1 - s). The squares of the two add up to
that of C, so sensitivity, noise and accounting are those of one norm. Whoever takes the step divides the
head's part by that factor again, which is post-processing: the head so has a norm of its own (a small one
teaches it to be too sure of itself) beside the share s of the sensitivity.

Shapes: m units, p parameters (tensors), P numbers in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedtune.privacy.mechanisms.noise import FloatArray, IntArray

__all__ = ["Clipping", "Group", "clip_factors"]


@dataclass(frozen=True)
class Group:
    """Parameters (their positions) that are clipped together at the L2 norm `most`, and then multiplied."""

    members: IntArray
    most: float
    factor: float


@dataclass(frozen=True)
class Clipping:
    """How one unit's contribution is bounded: `norm` is C, `head_norm` H (0.0: one group), `head_share` s."""

    norm: float
    head_norm: float = 0.0
    head_share: float = 0.0

    @property
    def whole(self) -> float:
        """All that a unit may contribute: C; 1 where nothing is clipped."""
        return self.norm if math.isfinite(self.norm) else 1.0

    def groups(self, heads: Sequence[bool]) -> list[Group]:
        """Each parameter in one of them, given which of the parameters [p] are the head's.

        The squares of most times factor add up to that of C. A head without anything beside it has all of it.
        """
        of_head = np.asarray(heads, dtype=np.bool_)
        if self.head_norm == 0.0 or not of_head.any():
            return [Group(np.arange(len(of_head)), self.norm, 1.0)]
        head = Group(np.flatnonzero(of_head), self.head_norm, self.head_factor(bool(of_head.all())))
        if of_head.all():
            return [head]
        return [head, Group(np.flatnonzero(~of_head), self.norm * math.sqrt(1.0 - self.head_share), 1.0)]

    def head_factor(self, alone: bool) -> float:
        """What the head's clipped part is multiplied by; `alone`: where nothing else is trained."""
        if self.head_norm == 0.0:
            return 1.0
        return self.norm * math.sqrt(1.0 if alone else self.head_share) / self.head_norm

    def undone(self, average: FloatArray, head: npt.NDArray[np.bool_], alone: bool = False) -> FloatArray:
        """A noised average [P] without the factor of the head's part (bool [P]); `alone` as `head_factor`."""
        if self.head_norm == 0.0:
            return average
        return np.where(head, average / self.head_factor(alone or bool(head.all())), average)


def clip_factors(norms: npt.ArrayLike, norm: float) -> FloatArray:
    """Factors [m] that scale contributions of L2 norm `norms` [m] to at most `norm`.

    min(1, C / norm); 1 for a norm of 0; 0 for a norm that is not finite: a contribution that cannot be
    measured contributes nothing. (The caller must then replace NaN by 0, for 0 times NaN is NaN.)
    """
    values = np.asarray(norms, dtype=np.float64)
    finite = np.isfinite(values)
    safe = np.where(finite & (values > 0.0), values, 1.0)
    if math.isinf(norm):
        return np.where(finite, 1.0, 0.0)
    with np.errstate(over="ignore"):  # a tiny norm: the quotient is infinite and 1 is the minimum
        factors = np.minimum(1.0, norm / safe)
    # Below that floats lose digits, and the scaled norm could end up above the bound.
    factors = np.where(factors < 1e-290, 0.0, factors)
    return np.where(finite, np.where(values > 0.0, factors, 1.0), 0.0)
