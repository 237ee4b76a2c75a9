"""To what a unit's contribution is scaled, so that it changes a sum by at most one L2 norm C.

Either all of it together (Abadi et al. 2016, Algorithm 1), or head and rest each by itself, to norms whose
squares add up to that of C (McMahan et al. 2018, "Learning differentially private recurrent language models",
per-layer clipping). Sensitivity is C in both cases, so noise and accounting are the same.

Shapes: m units, P parameters (tensors, not numbers).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedtune.privacy.mechanisms.noise import FloatArray, IntArray

__all__ = ["clip_factors", "clip_groups"]


def clip_groups(heads: Sequence[bool], norm: float, head_share: float) -> list[tuple[IntArray, float]]:
    """Groups of parameters that are clipped together: the positions of each, and its L2 norm.

    They hold each parameter once, and the squares of their norms add up to that of `norm`. Where there is but
    one group, it has all of it.

    Args:
        heads: [P] which parameters are the head's.
        norm: of a whole contribution.
        head_share: of its square, that is the head's; 0.0: head and rest are one group.
    """
    of_head = np.asarray(heads, dtype=np.bool_)
    if head_share == 0.0 or of_head.all() or not of_head.any():
        return [(np.arange(len(of_head)), norm)]
    shares = ((of_head, head_share), (~of_head, 1.0 - head_share))
    return [(np.flatnonzero(who), norm * math.sqrt(share)) for who, share in shares]


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
