"""How many units a node has, told with noise: where no owner declares a size that is public.

A plan needs the size of each shard: the expected batch, which every sum is divided by, and delta follow from
it. At a real site the owner declares it. In a simulation of private data nobody may have, and then the true
count would be a release beside the noise. So it is one release like any other: charged to the node's ledger
before anything is counted, one Gaussian of `SIZE_NOISE` units to the accountant (one unit more or less moves
the count by 1), and a part of the run's own epsilon. Exact discrete Gaussian noise is added on a grid as fine
as in `fedtune.privacy.evaluation`, whose argument holds here with one cell in place of two.

The noise is a few units whatever the size of the shard: next to nothing for a thousand records, and much for
thirty. A size is never told below 1. Nothing that a release's noise follows from is taken from it, so that
the run is fixed before its first release: the default delta is a constant (`DELTA`), and a run is refused if
it is not below 1/n for the largest n that is plausible (`largest`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedtune.privacy.accounting.epsilon import Term
from fedtune.privacy.mechanisms.exact import MAX_LOG2_STD, discrete_gaussian, steps_of_one
from fedtune.privacy.mechanisms.noise import Entropy

if TYPE_CHECKING:
    from fedtune.config.schema import Config

__all__ = ["DELTA", "SIZE_NOISE", "SizePlan", "largest", "size_noise", "size_plan"]

SIZE_NOISE = 20.0  # standard deviation in units; epsilon 0.16 at delta 1e-5 by itself
DELTA = 1e-6  # by default, where no size is known when the noise is chosen: below n^-1.1 up to 285,000 units
_PLAUSIBLE = 5.0  # standard deviations: the noise is larger once in three million counts


@dataclass(frozen=True, kw_only=True)
class SizePlan:
    """What it promises that a node tells its size once. The fields that the ledger reads are called as a
    PrivacyPlan's."""

    purpose: ClassVar[str] = "size"

    trust: str
    unit: str  # record | person: what is counted
    noise_multiplier: float  # standard deviation over the sensitivity, which is one unit
    delta: float
    num_rounds: int = 1  # a run counts once; a resumed one takes the count that it has
    reproducible_noise: bool = False
    seed: int = 0

    def is_private(self) -> bool:
        """Always: without privacy nothing is told by this plan."""
        return True

    def terms(self, releases: int, *, after: int = 0) -> dict[Term, int]:
        """What `releases` counts cost, in the accountant's own form, however many came before."""
        return {Term(1.0, self.noise_multiplier): releases} if releases else {}

    def epsilon(self, releases: int | None = None) -> float:
        """Upper bound on epsilon of one count alone, or of `releases` of them."""
        from fedtune.privacy.accounting.epsilon import epsilon_of_terms

        return epsilon_of_terms(self.terms(self.num_rounds if releases is None else releases), self.delta)

    def entropy(self, node: str) -> Entropy:
        """Randomness of the count, never that of a round; see `PrivacyPlan.entropy`."""
        if not self.reproducible_noise:
            return Entropy.system()
        return Entropy.reproducible(self.seed, f"{node}/size", 0, 0)

    def told(self, units: int, entropy: Entropy) -> int:
        """The size to tell of a shard that holds `units`: noised, rounded, at least 1.

        Guarantee: one Gaussian of `noise_multiplier` in terms of one unit added or removed, as `terms(1)`
        accounts for. The caller must have reserved that in the node's ledger before it counted.
        """
        scale = steps_of_one(self.noise_multiplier)
        noised = units * scale + int(discrete_gaussian(1, MAX_LOG2_STD, entropy)[0])
        return max(1, round(noised / scale))


def size_noise(config: Config) -> float:
    """The noise multiplier of the sizes that the nodes of `config` tell; 0.0 where none is told with noise.

    At a real site (or with `data.declared_size`) the size is its owner's word; of public data it is counted;
    under trust=central it does not leave the node, and without privacy nothing is noised.
    """
    data, trust = config.data, config.privacy.trust
    if config.engine.name == "deployment" or data.public or data.declared_size is not None:
        return 0.0
    return SIZE_NOISE if trust in ("local", "distributed") else 0.0


def size_plan(config: Config) -> SizePlan | None:
    """By which the nodes of `config` tell their sizes before the run has a plan; None: they tell none."""
    noise = size_noise(config)
    if not noise:
        return None
    privacy = config.privacy
    return SizePlan(
        trust=privacy.trust,
        unit=privacy.unit,
        noise_multiplier=noise,
        delta=DELTA if privacy.delta is None else privacy.delta,
        reproducible_noise=privacy.reproducible_noise,
        seed=config.seed,
    )


def largest(told: float, noise: float, nodes: int) -> float:
    """The most units that `nodes` nodes may have which told `told` in all with `noise` each."""
    return told + _PLAUSIBLE * noise * math.sqrt(nodes)
