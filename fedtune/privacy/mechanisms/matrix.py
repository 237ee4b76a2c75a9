"""DP-FTRL by matrix factorisation: noise that is correlated over rounds, for many rounds without sampling.

A trusted server publishes, round by round, sums of clipped updates G_t, and what matters of them is their
running sum: FedAvg's model is its starting point plus all of them. With independent noise the error of a
running sum grows with every round. Here the prefix-sum matrix A (ones on and below the diagonal) is
factorised as A = B C, and round t publishes G_t + x_t where x = C^-1 z and z is white: up to an invertible
map, C G + z, one Gaussian mechanism whose sensitivity is that of C. The running sums then have the error
A x = B z, in which most of the noise of a round is taken back in the rounds after it.

- C is the banded square root of A: Toeplitz with c_k = binom(2k, k) / 4^k (Fichtenberger, Henzinger and
  Upadhyay 2023, equation 1) for k < `bands`, and 0 beyond (Kalinin and Lampert 2024, definition 1).
- A client takes part at most every `min_separation` rounds. c is not negative and does not increase, so that
  the worst pattern is rounds 1, 1 + b, 1 + 2b, ... and the sensitivity after k participations, the norm of
  the sum of those k columns (Kalinin and Lampert 2024, theorem 2). A column counts whole at once: what a
  client gave in round t is in the rows up to t + bands - 1.
- The mechanism stays a Gaussian one when updates depend on what was published (Denisov et al. 2022, theorem
  2.1): C is lower triangular. No amplification is claimed; the server sees who takes part.
- With one band C is the identity and the noise independent. With b = 1 (full participation) more bands only
  cost: the last running sum has sensitivity n by itself, and independent noise meets that already.

Adjacency is zero-out: all updates of one client are replaced by zeros; list, cohorts and divisor stay
(Kairouz et al. 2021). If every client is asked in every round and the divisor is a fixed number, taking a
client off the list changes nothing but its own updates, and the statement is one of add-or-remove as well;
with cohorts drawn from the list it is not, because the draw depends on the list.

What a crash may do. Noise of a published round must never meet other data: two sums under equal noise
subtract to the bare difference, and a round published twice is outside of C. So a round is published at most
once, ever, z comes anew from the system's generator, and nothing regenerates it from a key. A round that
is left out, or a past x that is lost, costs accuracy and no privacy: round t then publishes a row of C with
some of its entries zero, and since C is not negative no pattern's norm grows by that.

The libraries: dp_accounting 0.6.0 accounts the event, and of the mechanism knows only a single epoch of
trees. jax-privacy 2.0.0 has these matrices, at the price of jax for a few lines. It is not used.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fedtune.errors import PrivacyError, SeparationError
from fedtune.privacy.accounting.epsilon import Term
from fedtune.privacy.checks import whole

__all__ = ["BandedRoot", "CorrelatedNoise"]

FloatArray = npt.NDArray[np.float64]

_DIGITS = 10  # significant ones of a charge, rounded down: equal charges are then equal numbers


@dataclass(frozen=True)
class BandedRoot:
    """The strategy matrix C [num_rounds, num_rounds], and who may take part how often.

    `bands`: nonzero diagonals. `min_separation` (b): rounds between two participations of one client, at
    least; 1: it may take part in every round.
    """

    num_rounds: int
    bands: int
    min_separation: int

    def __post_init__(self) -> None:
        """Raises `PrivacyError` for a number that is not whole, or below 1."""
        for name in ("num_rounds", "bands", "min_separation"):
            whole(getattr(self, name), name)

    def coefficients(self) -> FloatArray:
        """First column of C down to its last nonzero entry, float64 [bands]: 1, 1/2, 3/8, 5/16, ..."""
        k = np.arange(1, min(self.bands, self.num_rounds))
        return np.concatenate([[1.0], np.cumprod((2.0 * k - 1.0) / (2.0 * k))])

    @property
    def participations(self) -> int:
        """Rounds that one client may take part in, at most."""
        return -(-self.num_rounds // self.min_separation)

    def sensitivity(self, participations: int | None = None) -> float:
        """L2 sensitivity of C to one client that takes part so often (None: as often as it may), over the
        clipping norm."""
        most = self.participations
        return math.sqrt(_squares(self)[most if participations is None else min(participations, most)])

    def terms(self, noise_multiplier: float, releases: int, after: int = 0) -> dict[Term, int]:
        """What participations number after + 1 ... after + releases of one client add to its account.

        `noise_multiplier`: standard deviation of z over the sensitivity of the whole run. The k-th costs a
        Gaussian of squared sensitivity S_k^2 - S_(k-1)^2, so that all k together cost exactly S_k (Gaussian
        mechanisms compose by adding squares; Dong, Roth and Su 2022, corollary 3.3). Those beyond
        `participations` cannot be and cost nothing. Noise is rounded down in the tenth digit.
        """
        squares, most = _squares(self), self.participations
        found: dict[Term, int] = {}
        for k in range(min(after, most), min(after + releases, most)):
            charge = noise_multiplier * math.sqrt(squares[-1] / (squares[k + 1] - squares[k]))
            term = Term(1.0, _down(charge))
            found[term] = found.get(term, 0) + 1
        return found

    def merged(self, noise_multiplier: float, releases: int) -> dict[Term, int]:
        """As `terms` from the first participation on, as the one Gaussian that they are together."""
        if releases == 0:
            return {}
        return {Term(1.0, _down(noise_multiplier * self.sensitivity() / self.sensitivity(releases))): 1}

    def check(self, node: str, run: str, round: int, earlier: Sequence[int]) -> None:
        """Raises `SeparationError` if a node that took part in rounds `earlier` may not do so in `round`."""
        if not 1 <= round <= self.num_rounds:
            raise SeparationError(
                f"node '{node}' refuses round {round} of run '{run}': its noise is made for rounds 1 to "
                f"{self.num_rounds}."
            )
        near = [one for one in earlier if abs(round - one) < self.min_separation]
        if near:
            raise SeparationError(
                f"node '{node}' refuses round {round} of run '{run}': it took part in round {near[-1]}, and "
                f"the noise of dp_ftrl is enough for one participation in {self.min_separation} rounds "
                "(privacy.min_separation). A server that asks so has lost its books: was the run folder "
                "copied, or restored from a backup? Start a new run."
            )

    def mean_square_error(self) -> float:
        """Mean over all rounds of the running sum's error variance, per coordinate, for the clipping norm and
        the noise multiplier both 1: squared sensitivity times the mean squared row norm of B = A C^-1."""
        coefficients = self.coefficients()
        inverse = np.zeros(self.num_rounds)
        inverse[0] = 1.0
        for t in range(1, self.num_rounds):
            past = inverse[max(0, t - len(coefficients) + 1) : t][::-1]
            inverse[t] = -float(coefficients[1 : len(past) + 1] @ past)
        rows = np.cumsum(np.square(np.cumsum(inverse)))  # squared norms of the rows of B
        return float(_squares(self)[-1] * rows.mean())

    def error_ratio(self) -> float:
        """Root mean squared error of the running sums over that of independent noise with equal epsilon."""
        independent = BandedRoot(self.num_rounds, 1, self.min_separation)
        return math.sqrt(self.mean_square_error() / independent.mean_square_error())


class CorrelatedNoise:
    """x = C^-1 z, row by row: x_t = z_t - c_1 x_(t-1) - ... , for which the last `bands` - 1 rows are kept.

    Those rows are secret: whoever has them takes the noise off what was published. Guarantee: no round gets
    noise twice.
    """

    def __init__(self, root: BandedRoot, size: int) -> None:
        self._coefficients = root.coefficients()[1:]
        # Newest first; None stands for a row that was never published, or whose noise is lost.
        self._rows: deque[FloatArray | None] = deque(maxlen=len(self._coefficients))
        self._size = size
        self.round = 0  # of the newest row

    def next(self, round: int, white: FloatArray) -> FloatArray:
        """The noise of `round` (from 1), float64 [P], made from fresh white noise of the same shape.

        Raises `PrivacyError` for a round that is not after the last one.
        """
        if round <= self.round:
            raise PrivacyError(
                f"Round {round} was published with noise before (the last was {self.round}), and a round is "
                "published once. Start a new run."
            )
        if white.shape != (self._size,):
            raise PrivacyError(
                f"The noise of a round has shape {white.shape}, and should be ({self._size},)."
            )
        self._rows.extendleft([None] * min(round - self.round - 1, len(self._coefficients)))
        noise = white.astype(np.float64, copy=True)
        for coefficient, row in zip(self._coefficients, self._rows, strict=False):
            if row is not None:
                noise -= coefficient * row
        self._rows.appendleft(noise.copy())
        self.round = round
        return noise

    def rows(self) -> FloatArray:
        """What `restore` needs, newest row first, float64 [rows, P]; secret."""
        kept = [np.zeros(self._size) if row is None else row for row in self._rows]
        return np.array(kept, dtype=np.float64).reshape(len(kept), self._size)

    def restore(self, round: int, rows: FloatArray) -> None:
        """Goes on after `round` with the `rows` that were kept then (none: they are lost).

        Raises `ValueError` for rows of another shape.
        """
        if rows.ndim != 2 or rows.shape[1] != self._size or len(rows) > len(self._coefficients):
            raise ValueError(
                f"rows of shape {rows.shape} are not those of {self._size} numbers and their bands"
            )
        self._rows = deque([np.array(row, dtype=np.float64) for row in rows], maxlen=len(self._coefficients))
        self.round = round


@lru_cache(maxsize=64)
def _squares(root: BandedRoot) -> tuple[float, ...]:
    """Squared sensitivity after 0, 1, ... participations."""
    column = root.coefficients()
    total = np.zeros(root.num_rounds)
    squares = [0.0]
    for start in range(0, root.num_rounds, root.min_separation):
        part = column[: root.num_rounds - start]
        there = total[start : start + len(part)]
        squares.append(squares[-1] + float(2.0 * there @ part + part @ part))
        there += part
    return tuple(squares)


def _down(value: float) -> float:
    """`value`, above 0, rounded down to `_DIGITS` significant digits."""
    unit = 10.0 ** (_DIGITS - 1 - math.floor(math.log10(value)))
    return math.floor(value * unit) / unit
