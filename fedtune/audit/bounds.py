"""From guesses to epsilon: lower bounds with a confidence, and one estimate, which is no bound.

Three answers, from the one that assumes least to the one that assumes most:

- `epsilon_lower_one_run` (Steinke, Nasr and Jagielski 2023, theorem 5.2 and appendix D): certified for any
  mechanism. Each of m canaries is in or out by a fair coin of its own; an auditor who sees the output may
  abstain, and guesses the coins of r of them. If the mechanism is (epsilon, delta)-DP towards adding or
  removing one canary, the number of right guesses is dominated by a binomial of success rate
  1 / (1 + exp(-epsilon)), but for a term in m * delta. The guesses may depend on one another in any way.
- `epsilon_lower_two_sample`: certified if the canaries are independent trials of one experiment (they are
  where their directions are orthogonal and the noise has no correlations). Clopper-Pearson bounds on true
  and false positive rates, put into TPR <= exp(epsilon) FPR + delta and its mirror image.
- `epsilon_one_shot` (Andrew et al. 2024): an *estimate*, no bound. It fits a Gaussian to the canaries'
  cosines, and asks for the epsilon of telling it from the cosine of a direction that was not used. Right if
  both are Gaussian, as they are for the Gaussian mechanism in many dimensions; it may be above the truth, and
  for a small epsilon it is: chance in the fitted spread looks like a leak.

All are for add-or-remove adjacency: a coin of a canary is whether that unit exists. Pure functions of counts
and numbers; where the guesses come from is
`fedtune.audit.canaries`, and how several are tried without cheating `fedtune.audit.verdict`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy import stats

__all__ = [
    "epsilon_lower_one_run",
    "epsilon_lower_two_sample",
    "epsilon_of_gaussians",
    "epsilon_one_shot",
    "p_value_one_run",
]

_EPSILON_LIMIT = 50.0  # no number of canaries that fits into a computer shows more
_BISECTIONS = 32  # to a hundred-millionth of an epsilon


def p_value_one_run(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Probability, at most, of `correct` or more right guesses under (epsilon, delta)-DP.

    Steinke et al. 2023, corollary 5.4: P[B >= v] + 2 m delta max_i P[v > B >= v - i] / i with B binomial of
    r guesses and rate 1 / (1 + exp(-epsilon)). Args: `canaries` m, each in or out by its own fair coin;
    `guesses` r of them; `correct` v. Raises `ValueError` unless 0 <= v <= r <= m, m >= 1, epsilon >= 0 and
    0 <= delta <= 1.
    """
    m, r, v = canaries, guesses, correct
    if not (0 <= v <= r <= m and m >= 1):
        raise ValueError(f"0 <= correct <= guesses <= canaries must hold, not {v}, {r}, {m}")
    if not (epsilon >= 0.0 and 0.0 <= delta <= 1.0):
        raise ValueError(f"epsilon must be 0 or more and delta in [0, 1], not {epsilon}, {delta}")
    rate = 1.0 / (1.0 + math.exp(-epsilon))
    tail = float(stats.binom.sf(v - 1, r, rate))
    if delta == 0.0 or v == 0:
        return min(tail, 1.0)
    # Below 40 standard deviations under the mean nothing is left to add, so i need not go further.
    lowest = max(0, math.floor(min(v - 1, r * rate) - 40.0 * math.sqrt(r * rate * (1.0 - rate)) - 40.0))
    masses = stats.binom.pmf(np.arange(v - 1, lowest - 1, -1), r, rate)
    slope = float((np.cumsum(masses) / np.arange(1, masses.size + 1)).max(initial=0.0))
    return min(tail + 2.0 * m * delta * slope, 1.0)


def epsilon_lower_one_run(
    canaries: int, guesses: int, correct: int, *, delta: float, confidence: float = 0.95
) -> float:
    """Largest epsilon that `correct` right guesses of `guesses` rule out; 0.0 if they rule out none.

    Guarantee: if the mechanism is (epsilon, delta)-DP, the result exceeds epsilon with probability at
    most 1 - confidence, provided that `guesses` was fixed before looking at the coins (see
    `fedtune.audit.verdict.one_run` for several at once). Raises `ValueError` as `p_value_one_run` does.
    """
    level = _level(confidence)

    def rejected(epsilon: float) -> bool:
        return p_value_one_run(canaries, guesses, correct, epsilon, delta) < level

    return _largest(rejected)


def epsilon_lower_two_sample(
    true_positives: int,
    positives: int,
    false_positives: int,
    negatives: int,
    *,
    delta: float,
    confidence: float = 0.95,
) -> float:
    """Lower bound on epsilon from one threshold test: `positives` canaries in, of which it called
    `true_positives` in, and `negatives` out, of which it called `false_positives` in.

    Certified at `confidence` if the trials are independent and the threshold was not chosen by them:
    half of the error goes to each of two Clopper-Pearson bounds, and the better of the two directions
    TPR <= exp(epsilon) FPR + delta and 1 - FPR <= exp(epsilon) (1 - TPR) + delta uses the same two. 0.0 if
    nothing is ruled out. Raises `ValueError` on counts that cannot be.
    """
    if not (0 <= true_positives <= positives and 0 <= false_positives <= negatives):
        raise ValueError(
            f"counts cannot be: {true_positives} of {positives}, {false_positives} of {negatives}"
        )
    half = _level(confidence) / 2.0
    if positives == 0 or negatives == 0:
        return 0.0
    found = _at_least(true_positives, positives, half)
    false = 1.0 - _at_least(negatives - false_positives, negatives, half)
    first = _log_ratio(found - delta, false)
    second = _log_ratio((1.0 - false) - delta, 1.0 - found)
    return min(max(first, second, 0.0), _EPSILON_LIMIT)


def epsilon_of_gaussians(
    mean_out: float, std_out: float, mean_in: float, std_in: float, delta: float
) -> float:
    """Smallest epsilon at which N(mean_out, std_out^2) and N(mean_in, std_in^2) are (epsilon,
    delta)-indistinguishable, in both directions; `math.inf` if above 50.

    Exact: where the log density ratio exceeds epsilon is bounded by the roots of a quadratic. Raises
    `ValueError` unless both standard deviations are above 0 and 0 < delta < 1.
    """
    if not (std_out > 0.0 and std_in > 0.0 and 0.0 < delta < 1.0):
        raise ValueError(f"standard deviations and delta must be above 0: {std_out}, {std_in}, {delta}")
    out, inside = (mean_out, std_out), (mean_in, std_in)

    def distinguished(epsilon: float) -> bool:
        return max(_hockey_stick(inside, out, epsilon), _hockey_stick(out, inside, epsilon)) > delta

    if distinguished(_EPSILON_LIMIT):
        return math.inf
    return _largest(distinguished)


def epsilon_one_shot(cosines: npt.ArrayLike, dimension: int, delta: float) -> float:
    """Andrew et al. 2024: the epsilon at `delta` of telling the canaries' cosines from a stranger's.

    An estimate and no bound; see the module's docstring. Args: `cosines` [k], each of a canary's random unit
    direction with what was released, all of them included; `dimension` d, of the directions: the cosine of
    one that was not included is N(0, 1/d). 0.0 only if the fitted Gaussian is that one. Raises
    `ValueError` for fewer than two cosines or a value that is not finite.
    """
    values = np.asarray(cosines, dtype=np.float64)
    if values.size < 2 or not np.isfinite(values).all() or dimension < 2:
        raise ValueError(f"{values.size} cosines in {dimension} dimensions allow no estimate")
    spread = max(float(values.std(ddof=1)), 1e-12)
    return epsilon_of_gaussians(0.0, 1.0 / math.sqrt(dimension), float(values.mean()), spread, delta)


# --- inside --------------------------------------------------------------------------------------


def _level(confidence: float) -> float:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie strictly between 0 and 1, not {confidence}")
    return 1.0 - confidence


def _largest(holds: Callable[[float], bool]) -> float:
    """The largest epsilon in [0, 50] up to which `holds`, from below; 0.0 if it does not even at 0."""
    low, high = 0.0, _EPSILON_LIMIT
    if not holds(low):
        return 0.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2.0
        if holds(middle):
            low = middle
        else:
            high = middle
    return low


def _at_least(successes: int, trials: int, level: float) -> float:
    """Clopper-Pearson: a lower bound on the success rate, wrong with probability at most `level`."""
    if successes == 0:
        return 0.0
    return float(stats.beta.ppf(level, successes, trials - successes + 1))


def _log_ratio(numerator: float, denominator: float) -> float:
    return -math.inf if numerator <= 0.0 else math.log(numerator / max(denominator, 1e-300))


def _hockey_stick(p: tuple[float, float], q: tuple[float, float], epsilon: float) -> float:
    """sup over sets of P - exp(epsilon) Q for two Gaussians (mean, standard deviation)."""
    (mp, sp), (mq, sq) = p, q
    # log p(x) - log q(x) - epsilon = a x^2 + b x + c
    a = 0.5 / sq**2 - 0.5 / sp**2
    b = mp / sp**2 - mq / sq**2
    c = 0.5 * (mq / sq) ** 2 - 0.5 * (mp / sp) ** 2 + math.log(sq / sp) - epsilon
    if abs(a) * max(sp, sq) ** 2 < 1e-12:  # equal spread: one threshold
        if b == 0.0:
            return 0.0
        ends = [-c / b]
    else:
        root = b * b - 4.0 * a * c
        if root <= 0.0:
            # Nowhere, or everywhere; and where everywhere, P - exp(epsilon) Q is 1 - exp(epsilon).
            return 0.0
        # The stable pair: the naive formula loses one root to cancellation.
        t = -0.5 * (b + math.copysign(math.sqrt(root), b))
        ends = sorted([t / a, c / t] if t != 0.0 else [-math.sqrt(-c / a), math.sqrt(-c / a)])
    edges = [-math.inf, *ends, math.inf]
    total = 0.0
    for left, right in itertools.pairwise(edges):
        probe = _inner(left, right)
        if a * probe * probe + b * probe + c > 0.0:
            total += _mass(left, right, mp, sp) - math.exp(epsilon) * _mass(left, right, mq, sq)
    return max(0.0, total)


def _inner(left: float, right: float) -> float:
    """A point strictly between two ends, of which one may be infinite."""
    if math.isinf(left) and math.isinf(right):
        return 0.0
    if math.isinf(left):
        return right - 1.0 - abs(right)
    return left + 1.0 + abs(left) if math.isinf(right) else (left + right) / 2.0


def _mass(left: float, right: float, mean: float, std: float) -> float:
    low, high = (left - mean) / std, (right - mean) / std
    if low > 0.0:  # the upper tail, where 1 - cdf would cancel
        return float(stats.norm.sf(low) - stats.norm.sf(high))
    return float(stats.norm.cdf(high) - stats.norm.cdf(low))
