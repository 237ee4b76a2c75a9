"""Noised counts: how many units a node has, and how often a model is right on those that it holds out.

(Which labels an exported model takes for which: `fedtune.privacy.mechanisms.confusion`.)

A count is a release like any other, beside the training of every trust model: charged to the node's ledger
before anything is counted, one Gaussian to the accountant, and inside the run's target epsilon. Every node
adds all of the noise by itself, also where training relies on secure aggregation. Two kinds:

**A size** (`SizePlan`), where no owner declares one that is public. A plan needs the size of each shard: the
expected batch follows from it, which every sum is divided by. At a real site the owner declares it; in a
simulation of private data nobody may have, and the true count would be a release beside the noise. So each
node tells it once, with noise of `SIZE_NOISE` units (one unit more or less moves the count by 1): next to
nothing for a thousand records, and much for thirty. Nothing that a release's noise follows from is taken from
it, so that the run is fixed before its first release: the default delta is a constant (`DELTA`), and a run is
refused if it is not below 1/n for the largest n that is plausible (`largest`).

**An answer** (`EvaluationPlan`), where there is no public test data: each node holds out a part of its own
units and, in few rounds, says how many of them are right, and how many wrong. Nothing else leaves: no size,
no loss, no histogram. Who is held out is decided unit by unit (`fedtune.data.partition`), so that one unit
more or less moves no other from one part to the other.

The mechanism. A unit's vote is cut into `scale` equal steps. A held-out record puts all of it into `right` or
into `wrong`; a person puts the share of their texts that are right into one and the rest into the other,
however many texts they have. Adding or removing one unit changes the two cells by (a, b) with a, b >= 0 and
a + b = scale, so by at most `scale` in L2; a size has one cell. Exact discrete Gaussian noise of standard
deviation 2^24 steps is added to each (`fedtune.privacy.mechanisms.noise`), and `scale` is chosen so that 2^24
is at least `noise_multiplier` times the sensitivity. That is a Gaussian of that multiplier to the accountant,
with nothing lost: steps 4 and 5 of the argument in `fedtune.privacy.mechanisms.discrete`, with one share and
r = 4, hold here with a slack far below 1e-100.

Charged how. A unit is either trained on or held out, so parallel composition would charge it for one of the
two alone. It is not used: the ledger knows data by its fingerprint and not by which part of it was used for
what, another run may cut with another share, and a node cannot prove to itself that none ever did. So answers
compose with training as if they were about the same units.

What it does not do: hide how long a node takes to answer, which tells about how much is held out
(`answer-after` in the node's configuration does); or work for unit=client, where one client is all there is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from fedtune.config.choices import resolved
from fedtune.errors import CalibrationError, PrivacyError
from fedtune.privacy.accounting.calibration import noise_multiplier_for
from fedtune.privacy.accounting.epsilon import Term, epsilon_of_terms
from fedtune.privacy.mechanisms.noise import MAX_LOG2_STD, Entropy, discrete_gaussian, steps_of_one
from fedtune.privacy.mechanisms.registry import mechanism_of

if TYPE_CHECKING:
    from fedtune.config.schema import Config

__all__ = [
    "CLEAR",
    "DELTA",
    "SIZE_NOISE",
    "STD",
    "CountPlan",
    "Estimate",
    "EvaluationPlan",
    "SizePlan",
    "check_told",
    "estimate",
    "evaluation_epsilon",
    "evaluation_noise",
    "evaluation_rounds",
    "evaluation_settings",
    "largest",
    "size_noise",
    "size_plan",
]

SIZE_NOISE = 20.0  # standard deviation in units; epsilon 0.16 at delta 1e-5 by itself
DELTA = 1e-6  # by default, where no size is known when the noise is chosen: below n^-1.1 up to 285,000 units
DEFAULT_PART = 0.25  # of privacy.epsilon: Gaussians compose by squares, so training hardly feels it
_PLAUSIBLE = 5.0  # standard deviations: the noise is larger once in three million counts
STD = 2**MAX_LOG2_STD  # of the noise, in steps; a power of two, as exact sampling wants it
CLEAR = 4.0  # a count below so many standard deviations of its noise says nothing


@dataclass(frozen=True, kw_only=True)
class CountPlan:
    """What one kind of noised count promises. The fields that a ledger reads are called as a PrivacyPlan's.

    Attributes:
        trust: of the run that counts belong to.
        unit: what is counted: `record` or `person`.
        noise_multiplier: standard deviation over the L2 sensitivity of one count; 0.0 without privacy.
        num_rounds: counts that a node agrees to, at most (resumed and repeated ones included).
    """

    purpose: ClassVar[str]
    shares_noise: ClassVar[bool] = False  # each node's noise is enough by itself

    trust: str
    unit: str
    noise_multiplier: float
    delta: float
    num_rounds: int = 1
    reproducible_noise: bool = False
    seed: int = 0

    def is_private(self) -> bool:
        """False exactly where there is no noise (trust `none`)."""
        return self.noise_multiplier > 0.0

    def terms(self, releases: int, *, after: int = 0) -> dict[Term, int] | None:
        """What `releases` counts cost, in the accountant's own form; None without privacy.

        However many came before (`after`): each costs the same.
        """
        if releases == 0:
            return {}
        return {Term(1.0, self.noise_multiplier): releases} if self.is_private() else None

    def epsilon(self, releases: int | None = None) -> float:
        """Upper bound on epsilon of `releases` counts alone (default: `num_rounds`)."""
        terms = self.terms(self.num_rounds if releases is None else releases)
        return math.inf if terms is None else epsilon_of_terms(terms, self.delta)

    @property
    def scale(self) -> int:
        """Steps that one unit's vote has: the L2 sensitivity of what is counted."""
        return steps_of_one(self.noise_multiplier) if self.is_private() else STD

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise in each cell, in units; 0.0 without privacy."""
        return STD / self.scale if self.is_private() else 0.0

    def entropy(self, node: str, round: int = 0, attempt: int = 0) -> Entropy:
        """Randomness of one count, never that of a training round; see `PrivacyPlan.entropy`."""
        if self.is_private() and not self.reproducible_noise:
            return Entropy.system()
        return Entropy.reproducible(self.seed, f"{node}/{self.purpose}", round, attempt)


@dataclass(frozen=True, kw_only=True)
class SizePlan(CountPlan):
    """A node tells its size, once a run: a resumed run takes the count that it has."""

    purpose: ClassVar[str] = "size"

    def told(self, units: int, entropy: Entropy) -> int:
        """The size to tell of a shard that holds `units`: noised, rounded, at least 1.

        Guarantee: one Gaussian of `noise_multiplier` in terms of one unit added or removed, as `terms(1)`
        accounts for. The caller must have reserved that in the node's ledger before it counted.
        """
        noised = units * self.scale + int(discrete_gaussian(1, MAX_LOG2_STD, entropy)[0])
        return max(1, round(noised / self.scale))


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan(CountPlan):
    """One run's answers about held-out data; `PrivacyPlan.evaluation` makes it. `share`: of the node's units
    that are held out."""

    purpose: ClassVar[str] = "evaluation"

    share: float

    def votes(
        self, right: npt.NDArray[np.bool_], persons: npt.NDArray[np.int64] | None
    ) -> npt.NDArray[np.int64]:
        """The votes of the held-out units, without noise, in steps: int64 [units, 2], (right, wrong).

        Args: `right` [n], whether each record's label was predicted; `persons` [n], whose each record is
        (needed for unit=person, where each of them has one vote; else ignored). Rows add up to `scale`.
        """
        if self.unit != "person":
            first = right.astype(np.int64) * self.scale
        else:
            if persons is None or len(persons) != len(right):
                raise PrivacyError("Persons are protected, and it is not known whose each record is.")
            _, index = np.unique(persons, return_inverse=True)
            texts = np.bincount(index)
            first = np.bincount(index, weights=right).astype(np.int64) * self.scale // np.maximum(texts, 1)
        return np.stack([first, self.scale - first], axis=1)

    def answer(
        self, right: npt.NDArray[np.bool_], persons: npt.NDArray[np.int64] | None, entropy: Entropy
    ) -> tuple[int, int]:
        """What leaves the node: (right, wrong) over all held-out units, noised, in steps; may be negative.

        Guarantee: one Gaussian of `noise_multiplier` in terms of one unit added or removed, which is what
        `terms(1)` accounts for. The caller must have reserved that in the node's ledger before it computed
        `right`. n may be 0.
        """
        total = self.votes(right, persons).sum(axis=0)
        if self.is_private():
            total = total + discrete_gaussian(2, MAX_LOG2_STD, entropy)
        return int(total[0]), int(total[1])


# --- sizes -------------------------------------------------------------------------------------------


def size_noise(config: Config) -> float:
    """The noise multiplier of the sizes that the nodes of `config` tell; 0.0 where none is told with noise.

    At a real site (or with `data.declared_size`) the size is its owner's word; of public data it is counted;
    under a trusted server it does not leave the node, and without privacy nothing is noised.
    """
    data, kind = config.data, mechanism_of(config.privacy.trust)
    if config.engine.name == "deployment" or data.public or data.declared_size is not None:
        return 0.0
    return SIZE_NOISE if kind.tells_size and kind.is_private else 0.0


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


def check_told(given: float | None, delta: float, target: float | None, most: float) -> None:
    """What is asked of a run whose sizes are told with noise. Raises PrivacyError, CalibrationError."""
    way_out = "Declare a size, which is then public: data.declared_size=N, about how many there are in all"
    if given is None and most**-1.1 < delta:
        raise PrivacyError(
            f"There may be {most:,.0f} units, and the default delta of {delta:g}, which is fixed before any "
            f"size is told, is too large for so many. Set privacy.delta (below {most**-1.1:.1g}). "
            f"Or: {way_out}."
        )
    cost = epsilon_of_terms({Term(1.0, SIZE_NOISE): 1}, delta)
    if target is not None and cost >= target:
        raise CalibrationError(
            f"Nobody declared how much data each node has, and to tell it with noise costs epsilon "
            f"{cost:.2g}, which leaves nothing of privacy.epsilon={target:g} for training. {way_out}. "
            "Or raise privacy.epsilon well above that.",
            setting="privacy.epsilon",
        )


# --- answers -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """Accuracy as far as noised counts tell it.

    Attributes:
        accuracy: share of right units, in [0, 1]; None where the noise hides it.
        standard_error: of `accuracy`, from the known noise and the finite number of units.
        units: noised number of units that were evaluated.
    """

    accuracy: float | None
    standard_error: float | None
    units: float


def estimate(
    right: float, wrong: float, answers: int, noise_std: float, cells: tuple[int, int] = (1, 1)
) -> Estimate:
    """Accuracy from the sum of `answers` noised answers, in units, each with noise `noise_std` in each cell.

    `cells`: how many of them `right` and `wrong` are the sums of (one that enters twice counts for four). The
    divisor is right + wrong, which is noised itself: the real number of units is known to nobody here. With N
    of them and accuracy p the noise adds m s^2 (b p^2 + a (1-p)^2) / N^2 to the variance (m answers of noise
    s in a and b cells; first order), the finite number p (1-p) / N at most, taken at the p of Agresti and
    Coull (1998) so that it is not zero where all are right. Where N is not 4 standard deviations of its
    noise, the first order means nothing, and accuracy is unknown. Post-processing: costs nothing.
    """
    units = right + wrong
    noise = noise_std * math.sqrt(answers)
    if units <= 0.0 or units < CLEAR * noise * math.sqrt(sum(cells)):
        return Estimate(None, None, units)
    share = min(max(right / units, 0.0), 1.0)
    middle = (share * units + 2.0) / (units + 4.0)
    spread = cells[1] * share**2 + cells[0] * (1.0 - share) ** 2
    variance = (noise / units) ** 2 * spread + middle * (1.0 - middle) / units
    return Estimate(share, math.sqrt(variance), units)


def evaluation_settings(config: Config) -> tuple[float, int]:
    """(share of the units that is held out, answers a node), both 0 where evaluation is not private."""
    federation = resolved(config).federation
    if federation.evaluation != "private":
        return 0.0, 0
    return federation.evaluation_share, min(federation.evaluation_rounds, federation.num_rounds or 1)


def evaluation_rounds(num_rounds: int, answers: int) -> frozenset[int]:
    """The rounds in which nodes are asked: `answers` of them, evenly spread, the last always among them."""
    return frozenset(-(-i * num_rounds // answers) for i in range(1, answers + 1))


def evaluation_epsilon(config: Config) -> float:
    """What all of a node's answers may cost, inside of privacy.epsilon: as set, or a quarter of that.

    Raises `PrivacyError` if neither is set, or nothing would be left for training.
    """
    asked, target = config.federation.evaluation_epsilon, config.privacy.epsilon
    if asked is None and target is None:
        raise PrivacyError(
            "federation.evaluation=private needs to know what its answers may cost, and with "
            "privacy.epsilon=null there is nothing to take a part of. Set federation.evaluation_epsilon.",
            setting="federation.evaluation_epsilon",
        )
    epsilon = DEFAULT_PART * target if asked is None and target is not None else asked
    assert epsilon is not None
    if target is not None and epsilon >= target:
        raise PrivacyError(
            f"federation.evaluation_epsilon={epsilon:g} leaves nothing of privacy.epsilon={target:g} for "
            "training, which it is a part of. Lower it (a quarter costs training little), or raise "
            "privacy.epsilon.",
            setting="federation.evaluation_epsilon",
        )
    return epsilon


def evaluation_noise(config: Config, delta: float, answers: int) -> float:
    """The noise multiplier with which `answers` answers stay within `evaluation_epsilon` at `delta`.

    Raises `CalibrationError` if none does, `PrivacyError` as `evaluation_epsilon`.
    """
    epsilon = evaluation_epsilon(config)
    try:
        return noise_multiplier_for(epsilon, delta, sample_rate=1.0, steps=answers)
    except CalibrationError as error:
        of_all = config.federation.evaluation_epsilon is None
        whence = f"a quarter of privacy.epsilon={config.privacy.epsilon:g}" if of_all else "as set"
        raise CalibrationError(
            f"Answers about held-out data (federation.evaluation=private; {answers} of each node) may cost "
            f"epsilon {epsilon:g}, {whence}. {error} Or evaluate nothing: federation.evaluation=none.",
            setting="privacy.epsilon" if of_all else "federation.evaluation_epsilon",
        ) from error
