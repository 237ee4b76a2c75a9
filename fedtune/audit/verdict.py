"""From scores and coins to what can be said about epsilon, without cheating in the choice of thresholds.

An attack gives each canary a score; a bound needs guesses. Which attack, and how many of the most extreme
scores are guessed, may be chosen, but the best of many tries proves less than it seems to. So one half of the
canaries, whose coins are looked at, makes every choice, and the other half is asked once. (For `one_run` this
is allowed whatever the mechanism: with the first half's coins fixed it is a mechanism on the other half.)

`curve` uses the whole claim. An accountant does not claim one pair (epsilon, delta) but all of them at once,
a curve, and a mechanism with too little noise may break the curve where no number of canaries could break the
one pair that is quoted. It asks down to which noise multiplier the plan's curve is refuted, and gives the
epsilon that the plan would have with it. That is a lower bound for mechanisms of the
plan's family (the same sampling and number of steps, another noise), and a refutation of the claim for any
mechanism, if it is above the claim.

`two_sample` and `curve` take the canaries as independent trials; `one_run` does not.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

from fedtune.audit.bounds import epsilon_lower_one_run, epsilon_lower_two_sample, p_value_one_run
from fedtune.privacy.accounting.epsilon import Term, deltas_of_terms, epsilon_of_terms

__all__ = ["Bound", "curve", "limit", "one_run", "two_sample"]

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

SHARES = (0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 1.0)
PARTS = (1.0, 0.2, 0.04)  # fewer where delta is large: the bound loses with canaries times delta
_THRESHOLDS = 48  # tried on the first half
_WARY = 0.01  # of the error, where a choice is made: what looks good only by luck is then not chosen
_FACTORS = np.geomspace(0.2, 4.0, 57)  # noise multipliers that `curve` tries, over the plan's


@dataclass(frozen=True)
class Bound:
    """What one method shows, jointly with the other methods at the confidence of the whole audit.

    `epsilon_lower` at the plan's delta; `attack` and the counts say by which guesses. For `one-run`
    `guesses` and `correct`; for the others true and false positives of their totals.
    """

    method: str
    epsilon_lower: float
    confidence: float
    attack: str
    counts: dict[str, int]
    assumes: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def one_run(
    scores: Mapping[str, FloatArray], included: BoolArray, *, delta: float, confidence: float
) -> Bound:
    """Steinke, Nasr and Jagielski 2023: the most extreme scores of a half are guessed; any mechanism.

    Args: `scores` by attack, each [m], larger for more likely in; `included` [m], the coins.
    """
    first = _first_half(len(included))

    def guessed(choice: _Choice, which: BoolArray) -> tuple[int, int, int]:
        kept = np.flatnonzero(which)[: max(1, math.floor(choice.part * which.sum()))]
        coins = included[kept][np.argsort(scores[choice.attack][kept], kind="stable")]
        guesses = math.floor(choice.share * len(coins))
        outs = guesses // 2 if choice.both_sides else 0
        correct = int(coins[len(coins) - (guesses - outs) :].sum()) + int((~coins[:outs]).sum())
        return len(coins), guesses, correct

    best, highest = None, 0.0
    for values in itertools.product(scores, PARTS, SHARES, (True, False)):
        choice = _Choice(*values)
        counts = guessed(choice, first)
        # One evaluation says whether it is worth finding out by how much.
        if best is None or p_value_one_run(*counts, highest, delta) < 1.0 - confidence:
            best, highest = choice, epsilon_lower_one_run(*counts, delta=delta, confidence=confidence)
    assert best is not None
    counts = guessed(best, ~first)
    epsilon = epsilon_lower_one_run(*counts, delta=delta, confidence=confidence)
    named = dict(zip(("canaries", "guesses", "correct"), counts, strict=True))
    return Bound("one-run", epsilon, confidence, best.attack, named, _NOTHING)


class _Choice(NamedTuple):
    attack: str
    part: float  # of the half that is asked; the other coins are given away
    share: float  # of those that are asked: the most extreme scores, which are guessed
    both_sides: bool  # or only those that look most like being in


def two_sample(
    scores: Mapping[str, FloatArray], included: BoolArray, *, delta: float, confidence: float
) -> Bound:
    """The best threshold of one half, tested on the other by Clopper-Pearson; args as `one_run`."""
    half = _Half(scores, included)

    def value(counts: tuple[int, int, int, int], error: float) -> float:
        return epsilon_lower_two_sample(*counts, delta=delta, confidence=1.0 - error)

    error = 1.0 - confidence
    # With few canaries nothing passes so wary a choice: then the less wary value decides.
    attack, counts = half.choose(lambda counts: value(counts, error * _WARY) + 1e-3 * value(counts, error))
    epsilon = value(counts, error)
    return Bound("two-sample", epsilon, confidence, attack, _named(counts), _INDEPENDENT)


def curve(
    scores: Mapping[str, FloatArray],
    included: BoolArray,
    terms: Mapping[Term, int],
    *,
    delta: float,
    confidence: float,
) -> Bound:
    """Epsilon at `delta` of the smallest noise multiplier with which the plan's curve is refuted.

    Args: as `one_run`; `terms`, the steps as they are accounted. 0.0 if not even four times the plan's noise
    is refuted; if all are, the epsilon of a fifth of it.
    """
    half = _Half(scores, included)
    level = (1.0 - confidence) / 2.0

    def value(counts: tuple[int, int, int, int]) -> float:
        rates = _rates(counts, level * _WARY)
        # The coarse part of the grid will do; among equals the one that is nearest to refuting the next.
        refuted = sum(_refutes(rates, terms, i) for i in range(0, len(_FACTORS), 8))
        following = max(len(_FACTORS) - 1 - 8 * refuted, 0)
        return refuted + 0.5 * (1.0 + _excess(rates, terms, following))

    attack, counts = half.choose(value)
    rates = _rates(counts, level)
    # More noise promises more and is refuted first: the smallest that is, by bisection of the grid.
    low, high = -1, len(_FACTORS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _refutes(rates, terms, middle) else (middle, high)
    epsilon = 0.0 if high == len(_FACTORS) else epsilon_of_terms(_scaled(terms, high), delta)
    return Bound("curve", epsilon, confidence, attack, _named(counts), _FAMILY)


def limit(terms: Mapping[Term, int], false_positives: FloatArray) -> FloatArray:
    """The largest true positive rate that the claimed curve allows at each false positive rate [k]."""
    deltas, factor = _deltas(tuple(sorted(terms.items()))), np.exp(_GRID)
    rates = np.asarray(false_positives, dtype=np.float64)[:, None]
    one = (factor * rates + deltas).min(axis=1)
    other = (1.0 - (1.0 - rates - deltas) / factor).min(axis=1)
    return np.asarray(np.clip(np.minimum(one, other), 0.0, 1.0), dtype=np.float64)


# --- inside --------------------------------------------------------------------------------------

_NOTHING = "nothing about the mechanism"
_INDEPENDENT = "independent canaries"
_FAMILY = "independent canaries, and the plan's sampling and steps with Gaussian noise of some scale"


def _first_half(count: int) -> BoolArray:
    """bool [count]. Canaries have random places and coins, so that every second one is a random half."""
    return np.arange(count) % 2 == 0


class _Half:
    """The canaries in two halves: one chooses attack and threshold, the other is asked once."""

    def __init__(self, scores: Mapping[str, FloatArray], included: BoolArray) -> None:
        self._scores, self._included = scores, included
        self._first = _first_half(len(included))

    def choose(self, value: Any) -> tuple[str, tuple[int, int, int, int]]:
        """The attack of the best `value` on the first half, with its counts on the second."""
        best: tuple[float, str, float] | None = None
        for name, scores in self._scores.items():
            mine = np.sort(scores[self._first])
            # Evenly spaced in the logarithm of the share from both ends, down to a single canary.
            tails = np.unique(np.geomspace(1, max(1, len(mine) // 2), _THRESHOLDS // 2).astype(int))
            for index in {*(len(mine) - tails).tolist(), *(tails - 1).tolist()}:
                found = value(self._counts(name, float(mine[index]), self._first))
                if best is None or found > best[0]:
                    best = (found, name, float(mine[index]))
        assert best is not None
        return best[1], self._counts(best[1], best[2], ~self._first)

    def _counts(self, name: str, threshold: float, which: BoolArray) -> tuple[int, int, int, int]:
        """(true positives, positives, false positives, negatives) of calling `threshold` and above in."""
        called = self._scores[name][which] >= threshold
        coins = self._included[which]
        return (
            int((called & coins).sum()),
            int(coins.sum()),
            int((called & ~coins).sum()),
            int((~coins).sum()),
        )


def _named(counts: tuple[int, int, int, int]) -> dict[str, int]:
    names = ("true_positives", "positives", "false_positives", "negatives")
    return dict(zip(names, counts, strict=True))


def _rates(counts: tuple[int, int, int, int], level: float) -> tuple[float, float]:
    """(true positive rate from below, false from above), each wrong with probability `level`."""
    hits, positives, false, negatives = counts
    found = float(stats.beta.ppf(level, hits, positives - hits + 1)) if hits else 0.0
    wrong = float(stats.beta.isf(level, false + 1, negatives - false)) if false < negatives else 1.0
    return found, wrong


def _scaled(terms: Mapping[Term, int], index: int) -> dict[Term, int]:
    """The same steps with `_FACTORS[index]` times the noise."""
    factor = float(_FACTORS[index])
    return {term._replace(noise_multiplier=term.noise_multiplier * factor): n for term, n in terms.items()}


_GRID = np.concatenate([np.linspace(0.0, 6.0, 121), np.linspace(6.2, 40.0, 170)])


@lru_cache(maxsize=256)
def _deltas(key: tuple[tuple[Term, int], ...]) -> FloatArray:
    return deltas_of_terms(dict(key), _GRID, resolution=500)


def _excess(rates: tuple[float, float], terms: Mapping[Term, int], index: int) -> float:
    """By how much the two rates break the curve of `_scaled(terms, index)` where they do most; <= 0: not."""
    found, wrong = rates
    deltas = _deltas(tuple(sorted(_scaled(terms, index).items())))
    factor = np.exp(_GRID)
    one = found - factor * wrong - deltas
    other = (1.0 - wrong) - factor * (1.0 - found) - deltas
    return float(max(one.max(), other.max(), -1.0))


def _refutes(rates: tuple[float, float], terms: Mapping[Term, int], index: int) -> bool:
    return _excess(rates, terms, index) > 0.0
