"""Private evaluation: how often a model is right on data that a node keeps back, as two noised counts.

Where there is no public test data, each node holds out a part of its own units and, in few rounds, answers
one question about them: how many are right, and how many wrong. Nothing else leaves: no size, no loss, no
histogram. An answer is a release like any other, charged to the node's ledger before it is computed.

The mechanism. Every held-out unit has one vote, cut into `scale` equal steps, and divides it between two
cells: a record puts all of it into `right` or into `wrong`; a person puts the share of their texts that are
right into one and the rest into the other, however many texts they have. Adding or removing one unit
changes the two cells by (a, b) with a, b >= 0 and a + b = scale, so by at most `scale` in L2. Exact
discrete Gaussian noise of standard deviation 2^24 steps is added to each
(`fedtune.privacy.mechanisms.exact`), and `scale` is chosen so that 2^24 is at least `noise_multiplier`
times the sensitivity. That is a Gaussian of that multiplier to the accountant, with nothing lost: steps 4
and 5 of the argument in `fedtune.privacy.mechanisms.discrete`, with one share and r = 4, hold here with a
slack far below 1e-100.

Who is held out is decided unit by unit (`data.partition`), so that one unit more or less moves no other
unit from one part to the other. Every node adds all of the noise by itself, under every trust model: an
answer is private when it leaves, also where training relies on secure aggregation. Under trust=none there is
no noise, as everywhere.

Charged how. A unit is either trained on or held out, so parallel composition would charge it for one
of the two alone. It is not used: the ledger knows data by its fingerprint and not by which part of it was
used for what, another run may cut with another share, and a node cannot prove to itself that none ever did.
So answers compose with training as if they were about the same units, and the plan's target epsilon covers
the sum of both.

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
from fedtune.privacy.accounting.epsilon import Term
from fedtune.privacy.mechanisms.exact import MAX_LOG2_STD, discrete_gaussian, steps_of_one
from fedtune.privacy.mechanisms.noise import Entropy

if TYPE_CHECKING:
    from fedtune.config.schema import Config

__all__ = [
    "Estimate",
    "EvaluationPlan",
    "estimate",
    "evaluation_epsilon",
    "evaluation_noise",
    "evaluation_rounds",
    "evaluation_settings",
]

DEFAULT_PART = 0.25  # of privacy.epsilon: Gaussians compose by squares, so training hardly feels it
_STD = 2**MAX_LOG2_STD  # of the noise, in steps; a power of two, as exact sampling wants it
_CLEAR = 4.0  # a count below so many standard deviations of its noise says nothing


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """What one run's answers about held-out data promise; `PrivacyPlan.evaluation` makes it.

    One *release* is one answer of one node. The fields that the ledger reads are called as a PrivacyPlan's.
    """

    purpose: ClassVar[str] = "evaluation"

    trust: str
    unit: str  # record | person
    share: float  # of the node's units that are held out
    num_rounds: int  # answers that a node agrees to, at most (resumed and repeated ones included)
    noise_multiplier: float  # standard deviation over the L2 sensitivity of one answer; 0.0 without privacy
    delta: float
    reproducible_noise: bool = False
    seed: int = 0

    def is_private(self) -> bool:
        """False exactly where there is no noise (trust `none`)."""
        return self.trust != "none"

    @property
    def scale(self) -> int:
        """Steps that one unit's vote has: the L2 sensitivity of the two cells."""
        if not self.is_private():
            return _STD
        return steps_of_one(self.noise_multiplier)

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise in each cell, in units; 0.0 without privacy."""
        return _STD / self.scale if self.is_private() else 0.0

    def terms(self, releases: int, *, after: int = 0) -> dict[Term, int] | None:
        """What `releases` answers cost, in the accountant's own form; None without privacy.

        However many came before (`after`): each costs the same.
        """
        if releases == 0:
            return {}
        return {Term(1.0, self.noise_multiplier): releases} if self.is_private() else None

    def epsilon(self, releases: int | None = None) -> float:
        """Upper bound on epsilon of `releases` answers alone (default: `num_rounds`)."""
        from fedtune.privacy.accounting.epsilon import epsilon_of_terms

        terms = self.terms(self.num_rounds if releases is None else releases)
        return math.inf if terms is None else epsilon_of_terms(terms, self.delta)

    def entropy(self, node: str, round: int, attempt: int) -> Entropy:
        """Randomness of one answer, never that of a training round; see `PrivacyPlan.entropy`."""
        if self.is_private() and not self.reproducible_noise:
            return Entropy.system()
        return Entropy.reproducible(self.seed, f"{node}/evaluation", round, attempt)

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


def estimate(right: float, wrong: float, answers: int, noise_std: float) -> Estimate:
    """Accuracy from the sum of `answers` noised answers, in units, each with noise `noise_std` in each cell.

    The divisor is right + wrong, which is noised itself: the real number of units is known to nobody here.
    With N of them and accuracy p the noise adds m s^2 (p^2 + (1-p)^2) / N^2 to the variance (m answers of
    noise s; first order), the finite number p (1-p) / N at most, taken at the p of Agresti and Coull (1998)
    so that it is not zero where all are right. Where N is not 4 standard deviations of its noise, the first
    order means nothing, and accuracy is unknown. Post-processing: costs nothing.
    """
    units = right + wrong
    noise = noise_std * math.sqrt(answers)
    if units <= 0.0 or units < _CLEAR * noise * math.sqrt(2.0):
        return Estimate(None, None, units)
    share = min(max(right / units, 0.0), 1.0)
    middle = (share * units + 2.0) / (units + 4.0)
    variance = (noise / units) ** 2 * (share**2 + (1.0 - share) ** 2) + middle * (1.0 - middle) / units
    return Estimate(share, math.sqrt(variance), units)


def evaluation_settings(config: Config) -> tuple[float, int]:
    """(share of the units that is held out, answers a node), both 0 where evaluation is not private."""
    federation = resolved(config).federation
    if federation.evaluation != "private":
        return 0.0, 0
    return federation.evaluation_share, min(federation.evaluation_rounds, federation.num_rounds)


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
            "privacy.epsilon=null there is nothing to take a part of. Set federation.evaluation_epsilon."
        )
    epsilon = DEFAULT_PART * target if asked is None and target is not None else asked
    assert epsilon is not None
    if target is not None and epsilon >= target:
        raise PrivacyError(
            f"federation.evaluation_epsilon={epsilon:g} leaves nothing of privacy.epsilon={target:g} for "
            "training, which it is a part of. Lower it (a quarter costs training little), or raise "
            "privacy.epsilon."
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
        raise CalibrationError(
            f"No noise lets {answers} answers about held-out data cost epsilon {epsilon:g} at delta "
            f"{delta:g}, as federation.evaluation=private asks. Set federation.evaluation_epsilon to another "
            "value, lower federation.evaluation_rounds, or use federation.evaluation=none."
        ) from error
