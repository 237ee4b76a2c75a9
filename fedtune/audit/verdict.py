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

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from fedtune.audit.bounds import epsilon_lower_one_run, epsilon_lower_two_sample
from fedtune.privacy.accounting import Term, deltas_of_terms, epsilon_of_terms

__all__ = ["Bound", "curve", "limit", "one_run", "two_sample"]

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

SHARES = (0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 1.0)  # of the canaries that are guessed
SIDES = ("both", "in")  # the most extreme on both sides, or only those that look most like being in
_THRESHOLDS = 48  # tried on the first half
_EASIEST, _HARDEST = 0.2, 4.0  # noise multipliers that `curve` tries, over the plan's
_STEPS = 14  # of the bisection between them


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

    def tried(choice: tuple[str, float, str], which: BoolArray) -> tuple[float, int, int]:
        name, share, side = choice
        coins = included[which][np.argsort(scores[name][which], kind="stable")]
        guesses = math.floor(share * len(coins))
        outs = guesses // 2 if side == "both" else 0
        correct = int(coins[len(coins) - (guesses - outs) :].sum()) + int((~coins[:outs]).sum())
        bound = epsilon_lower_one_run(
            max(1, len(coins)), guesses, correct, delta=delta, confidence=confidence
        )
        return bound, guesses, correct

    choices = [(name, share, side) for name in scores for share in SHARES for side in SIDES]
    best = max(choices, key=lambda choice: tried(choice, first)[0])
    epsilon, guesses, correct = tried(best, ~first)
    counts = {"canaries": int((~first).sum()), "guesses": guesses, "correct": correct}
    return Bound("one-run", epsilon, confidence, best[0], counts, _NOTHING)


def two_sample(
    scores: Mapping[str, FloatArray], included: BoolArray, *, delta: float, confidence: float
) -> Bound:
    """The best threshold of one half, tested on the other by Clopper-Pearson; args as `one_run`."""
    half = _Half(scores, included)

    def value(counts: tuple[int, int, int, int]) -> float:
        # The same error on the half that chooses: a choice that looks good only by luck is not taken.
        return epsilon_lower_two_sample(*counts, delta=delta, confidence=confidence)

    attack, counts = half.choose(value)
    return Bound("two-sample", value(counts), confidence, attack, _named(counts), _INDEPENDENT)


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
    coarse = [_scaled(terms, factor) for factor in np.geomspace(_EASIEST, _HARDEST, 8)]

    def value(counts: tuple[int, int, int, int]) -> float:
        rates = _rates(counts, level)
        refuted = sum(_refutes(rates, one) for one in coarse)
        # Among thresholds that refute equally many the one that is nearest to the next.
        return refuted + 0.5 * (1.0 + _excess(rates, coarse[max(len(coarse) - 1 - refuted, 0)]))

    attack, counts = half.choose(value)
    rates = _rates(counts, level)
    low, high = math.log(_EASIEST), math.log(_HARDEST)
    # More noise promises more and is refuted first: what is sought lies between not refuted and refuted.
    if not _refutes(rates, _scaled(terms, _HARDEST)):
        epsilon = 0.0
    elif _refutes(rates, _scaled(terms, _EASIEST)):
        epsilon = epsilon_of_terms(_scaled(terms, _EASIEST), delta)
    else:
        for _ in range(_STEPS):
            middle = (low + high) / 2.0
            if _refutes(rates, _scaled(terms, math.exp(middle))):
                high = middle
            else:
                low = middle
        epsilon = epsilon_of_terms(_scaled(terms, math.exp(high)), delta)
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


def _scaled(terms: Mapping[Term, int], factor: float) -> dict[Term, int]:
    """The same steps with `factor` times the noise."""
    return {term._replace(noise_multiplier=term.noise_multiplier * factor): n for term, n in terms.items()}


_GRID = np.concatenate([np.linspace(0.0, 6.0, 121), np.linspace(6.2, 40.0, 170)])


@lru_cache(maxsize=64)
def _deltas(key: tuple[tuple[Term, int], ...]) -> FloatArray:
    return deltas_of_terms(dict(key), _GRID, resolution=1000)


def _excess(rates: tuple[float, float], terms: Mapping[Term, int]) -> float:
    """By how much the two rates break the curve of `terms`, at the epsilon where they do most; <= 0: not."""
    found, wrong = rates
    deltas = _deltas(tuple(sorted(terms.items())))
    factor = np.exp(_GRID)
    one = found - factor * wrong - deltas
    other = (1.0 - wrong) - factor * (1.0 - found) - deltas
    return float(max(one.max(), other.max(), -1.0))


def _refutes(rates: tuple[float, float], terms: Mapping[Term, int]) -> bool:
    return _excess(rates, terms) > 0.0
