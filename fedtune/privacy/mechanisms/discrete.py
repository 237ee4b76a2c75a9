"""Discrete Gaussian noise, integers to carry it, and why their sum meets the plan.

Under `trust=distributed` no node adds enough noise by itself. Every node adds a share, secure aggregation
shows the server only the sum of integers, and the shares together are the plan's noise. This module is the
arithmetic of that: an encoding of a clipped sum as integers modulo 2^32, noised by the exact sampler in
`fedtune.privacy.mechanisms.noise`, and the argument that links both to the event that the accountant
counts. It is the distributed discrete Gaussian mechanism of Kairouz, Liu and Steinke 2021 (arXiv
2102.06387) with two changes. Their random rotation and conditional rounding make 8 to 16 bits a number do;
at 32 bits both are needless: the range holds the largest sum there can be, and plain rounding costs a
thousandth of noise. And epsilon comes from the privacy loss distribution rather than from their
concentrated DP bound, which cannot use Poisson sampling.

The argument. A node multiplies its clipped sum by the public `scale`, rounds to nearest, adds N_Z(0, std^2)
to each of d coordinates, where N_Z(m, v) has probability proportional to exp(-(k - m)^2 / 2v) on the
integers, and reduces modulo 2^32. All is stated for `shares` = h honest nodes that reach the sum; more
honest nodes add independent noise, and that and the reduction are post-processing.

1. Sensitivity. One unit more or less changes one node's sum by at most max_grad_norm. Rounding moves each
   difference of coordinates by at most 1, hence the integer vector by at most
   `sensitivity` = scale * max_grad_norm * (1 + FLOAT_MARGIN) + sqrt(d) in L2.
2. Smoothness. By Poisson summation sum_j exp(-(j - x)^2 / 2c^2) = c sqrt(2 pi) (1 + e) for every real x
   with |e| <= T(c) = 2 sum_{m>0} exp(-2 pi^2 c^2 m^2): it hardly depends on x.
3. Sum. The density of N_Z(0, a^2) + N_Z(0, b^2) at k is that of N_Z(0, a^2 + b^2) times such a sum with
   c^2 = a^2 b^2 / (a^2 + b^2), over a constant. Both add up to one, so their ratio is within a factor
   exp(+-2 artanh T(c)) of one at every k. By induction the sum of h shares is within exp(+-t1) of
   N_Z(0, h std^2), t1 = sum_{k<h} 2 artanh T(std sqrt(k / (k + 1))). (Kairouz et al. have the same with 10
   for the 4 that this comes to.)
4. From discrete to continuous. Let y ~ N(m, h std^2 - r^2), a continuous Gaussian about an integer m, and
   draw k from N_Z(y, r^2), on the integers about the real y. As in 3, k is within exp(+-t2) of N_Z(m, h
   std^2), t2 = 2 artanh T(r). (Peikert 2010, theorem 3.1.) So what the server sees is, up to a factor
   exp(+-t) at each point, t = d (t1 + t2), a post-processing of the continuous Gaussian mechanism of
   standard deviation sqrt(h std^2 - r^2) on inputs at most `sensitivity` apart. The post-processing knows
   no data, so this holds for mixtures too, those of Poisson sampling among them.
5. Hence a plan whose event is `rounds` Poisson-sampled Gaussian steps of noise multiplier
   sqrt(h std^2 - r^2) / sensitivity with delta(epsilon) bounds the real thing by
   exp(rounds t) delta(epsilon - 2 rounds t). `scale` is chosen so that this multiplier is the plan's, and
   std so large (r = 4) that t is below 1e-100: the plan's own event is the rigorous one, with nothing lost
   but the `inflation` of the noise, which is about a thousandth.

Towards whom. `shares` counts the noise that the strongest observer does not know: of the nodes whose noise is
in the sum one at least is taken off, for a node that looks at the published sums knows its own
(`PrivacyPlan.honest_shares`).

Approximations. FLOAT_MARGIN covers what float32 does to a clipped gradient and to the sum of a micro-batch
(relative errors near 1e-5); that other units' gradients do not depend on who is in the batch with them is
taken as exact beyond that, as everywhere in DP-SGD (`fedtune.training.dp_step` says how nearly it is true,
and a test holds the margin to it). A sum outside the range wraps around: that costs accuracy (a probability
below 1e-20 a round, for honest nodes) and no privacy. The time that sampling takes depends on the noise and
is not hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fedtune.errors import PrivacyError
from fedtune.privacy.mechanisms.distributed import Distributed
from fedtune.privacy.mechanisms.noise import MAX_LOG2_STD, discrete_gaussian

if TYPE_CHECKING:
    from fedtune.privacy.mechanisms.noise import Entropy
    from fedtune.privacy.plan import PrivacyPlan

__all__ = ["FLOAT_MARGIN", "DiscreteMechanism", "discrete_gaussian", "sum_divergence"]

FLOAT_MARGIN = 2.0**-10  # relative: by how much float32 clipping may overshoot max_grad_norm
MODULUS_BITS = 32
_RANGE = 2**31 - 1
_ROUNDING = 4.0  # r of the argument
_TAILS = 12.0  # standard deviations of noise that the range holds; beyond: 2 exp(-72) a coordinate
_MIN_LOG2_STD = 6  # of a node's noise: t below 1e-100
_MAX_INFLATION = 1.25

IntArray = npt.NDArray[np.int64]


def _unevenness(std: float) -> float:
    """T of the argument, from above: how much a sum of Gaussian values at the integers depends on an
    offset.
    """
    decay = math.exp(-2.0 * math.pi**2 * std * std)
    return 2.0 * decay / (1.0 - decay)


def sum_divergence(std: float, shares: int) -> float:
    """t1: bounds |log| of the ratio of two densities, that of a sum of `shares` independent N_Z(0, std^2) and
    that of N_Z(0, shares * std^2), at every integer (step 3 of the argument)."""
    return sum(2.0 * math.atanh(_unevenness(std * math.sqrt(k / (k + 1)))) for k in range(1, shares))


@dataclass(frozen=True)
class DiscreteMechanism:
    """How the nodes of one plan turn clipped sums of `dimension` numbers into noised integers and back.

    Everything follows from public numbers (`for_plan`), so that a node computes it and believes no server.

    `noise_multiplier`, `max_grad_norm`, `sample_rate`: the plan's. `nodes`: that take part. `shares`:
    honest nodes whose noise is counted on (`Distributed.honest_shares`). `log2_std`: each node's noise,
    in integer steps. `scale`: integer steps per unit of the gradient.
    """

    dimension: int
    nodes: int
    shares: int
    noise_multiplier: float
    max_grad_norm: float
    sample_rate: float
    log2_std: int
    scale: float

    @classmethod
    def for_plan(cls, plan: PrivacyPlan, dimension: int) -> DiscreteMechanism:
        """The mechanism that meets `plan` for updates of `dimension` numbers.

        Raises `PrivacyError` if the plan is of another trust model, if no honest node would be left, or if
        sums of so many units in so many dimensions do not fit into 32 bits beside a fine enough grid.
        """
        if not isinstance(plan.mechanism, Distributed):
            raise PrivacyError(f"Integer noise is for trust=distributed; this plan has trust={plan.trust}.")
        return cls.design(
            dimension=dimension,
            nodes=plan.nodes,
            shares=plan.mechanism.honest_shares(plan),
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.max_grad_norm,
            sample_rate=plan.sample_rate,
            expected_batch_size=plan.expected_batch_size(),
        )

    @classmethod
    def design(
        cls,
        *,
        dimension: int,
        nodes: int,
        shares: int,
        noise_multiplier: float,
        max_grad_norm: float,
        sample_rate: float,
        expected_batch_size: float,
    ) -> DiscreteMechanism:
        """Chooses the finest grid whose range holds every sum; see `for_plan`."""
        if dimension < 1:
            raise PrivacyError(f"There is nothing to aggregate: the update has {dimension} numbers.")
        if shares < 1:
            raise PrivacyError(
                f"Of {nodes} nodes none would be left to add noise that can be counted on: max_dropouts and "
                "max_colluders together must be smaller than the number of nodes."
            )
        for name, value in (("noise_multiplier", noise_multiplier), ("max_grad_norm", max_grad_norm)):
            if not (math.isfinite(value) and value > 0.0):
                raise PrivacyError(f"trust=distributed needs a finite {name} above 0, not {value}.")
        # Nobody draws more units than this (Bernstein: probability below 1e-20).
        units = expected_batch_size + 10.0 * math.sqrt(expected_batch_size) + 50.0
        for log2_std in range(MAX_LOG2_STD, _MIN_LOG2_STD - 1, -1):
            std = 2.0**log2_std
            reachable = math.sqrt(shares * std * std - _ROUNDING**2) / noise_multiplier
            # scale * max_grad_norm, a hair below, so that float rounding cannot take the multiplier under
            # the plan's
            steps = (1.0 - 1e-12) * (reachable - math.sqrt(dimension)) / (1.0 + FLOAT_MARGIN)
            if units * steps + _TAILS * std * math.sqrt(nodes) + nodes <= _RANGE:
                break
        else:
            steps = 0.0
        scale = steps / max_grad_norm
        chosen = cls(dimension, nodes, shares, noise_multiplier, max_grad_norm, sample_rate, log2_std, scale)
        if steps <= 0.0 or chosen.inflation > _MAX_INFLATION:
            raise PrivacyError(
                f"The sum of about {expected_batch_size:.0f} units in {dimension} dimensions over {nodes} "
                f"nodes does not fit into {MODULUS_BITS} bits with a grid fine enough for noise_multiplier "
                f"{noise_multiplier:g}. Lower train.sample_rate, or train fewer parameters (adapter.rank, "
                "adapter.layers)."
            )
        return chosen

    @property
    def std(self) -> float:
        """Standard deviation of one node's noise, in integer steps."""
        return float(2**self.log2_std)

    @property
    def sensitivity(self) -> float:
        """L2 bound on what one unit changes in the integer sum (step 1 of the argument)."""
        return self.scale * self.max_grad_norm * (1.0 + FLOAT_MARGIN) + math.sqrt(self.dimension)

    @property
    def effective_noise_multiplier(self) -> float:
        """The multiplier of the Gaussian mechanism that dominates this one; never below the plan's."""
        return math.sqrt(self.shares * self.std**2 - _ROUNDING**2) / self.sensitivity

    @property
    def inflation(self) -> float:
        """Noise of `shares` nodes over noise_multiplier * max_grad_norm: what integers cost, 1.0 is
        nothing.
        """
        if self.scale <= 0.0:
            return math.inf
        return math.sqrt(self.shares) * self.std / (self.scale * self.noise_multiplier * self.max_grad_norm)

    def slack(self, rounds: int) -> float:
        """rounds * t of the argument: log of the factor between the real mechanism and the accounted one."""
        each = sum_divergence(self.std, self.shares) + 2.0 * math.atanh(_unevenness(_ROUNDING))
        return rounds * self.dimension * each

    def noise_std(self, survivors: int) -> float:
        """Standard deviation of the noise in the sum of `survivors` nodes, in units of the gradient."""
        return math.sqrt(survivors) * self.std / self.scale

    def encode(self, clipped_sum: npt.NDArray[np.float64]) -> IntArray:
        """A node's clipped sum, float64 [d], as integers, int64 [d], without noise.

        Raises `PrivacyError` on a wrong shape or a number that is not finite: neither can come from clipped
        units. A coordinate out of range is clamped, which brings no two inputs further apart.
        """
        if clipped_sum.shape != (self.dimension,):
            raise PrivacyError(f"A clipped sum has shape {clipped_sum.shape}, not ({self.dimension},).")
        scaled = np.rint(np.asarray(clipped_sum, dtype=np.float64) * self.scale)
        if not np.isfinite(scaled).all():
            raise PrivacyError("A clipped sum is not finite, so its units were not clipped; nothing is sent.")
        limit = float(_RANGE - math.ceil(_TAILS * self.std * math.sqrt(self.nodes)))
        return np.clip(scaled, -limit, limit).astype(np.int64)

    def share(self, clipped_sum: npt.NDArray[np.float64], entropy: Entropy) -> npt.NDArray[np.uint32]:
        """What a node puts into the secure sum: encoded, noised, modulo 2^32; uint32 [d]. Errors as
        `encode`.
        """
        noised = self.encode(clipped_sum) + discrete_gaussian(self.dimension, self.log2_std, entropy)
        return noised.astype(np.uint32)  # keeps the low 32 bits

    def decode(self, total: npt.NDArray[np.uint32]) -> npt.NDArray[np.float64]:
        """The noised sum in units of the gradient, float64 [d], from the sum modulo 2^32, uint32 [d]."""
        return total.astype(np.uint32).view(np.int32).astype(np.float64) / self.scale
