"""From a target epsilon to the noise that meets it.

Noise is found on the accountant's own upper bound, so the epsilon that is reported later never exceeds
the target; it lands within 2 percent below it (in practice within 0.3). The search runs on a coarse grid,
whose result is an upper bound too, and the last word is `accounting.epsilon_of_terms` itself.

A result is a pure function of its arguments and is kept on disk (`fedtune.privacy.cache`), so that the
second call, in this process or another, costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from fedtune.errors import CalibrationError, PrivacyError
from fedtune.privacy import accounting
from fedtune.privacy.accounting import Term
from fedtune.privacy.cache import kept

__all__ = ["MAX_NOISE_MULTIPLIER", "MIN_NOISE_MULTIPLIER", "noise_multiplier_for"]

MIN_NOISE_MULTIPLIER = 0.05  # below it epsilon is in the hundreds and says nothing
MAX_NOISE_MULTIPLIER = 1000.0  # above it nothing is learnt, whatever epsilon says

_LOW, _HIGH = 0.98, 1.0  # of the target: where the result must land


def noise_multiplier_for(
    target_epsilon: float,
    delta: float,
    *,
    sample_rate: float,
    steps: int,
    also: Mapping[Term, int] | None = None,
    use_cache: bool = True,
) -> float:
    """The least noise, up to 2 percent of epsilon, with which `steps` steps stay within the target.

    Args: `target_epsilon` above 0; `delta` in (0, 1); `sample_rate` in (0, 1], the probability of one unit
    in one step; `steps` over the whole run (local steps times rounds); `also`, what else is released with
    noise that is fixed already, and must fit into the target too. Returns the noise multiplier:
    standard deviation over `max_grad_norm`. Guarantee: `epsilon_of` of that event, composed with `also`, is
    at most the target.
    Raises `CalibrationError` if no noise multiplier between 0.05 and 1000 meets the target, with the
    epsilon that can be reached; `PrivacyError` on a value that has no meaning.
    """
    _check(target_epsilon, delta, sample_rate, steps)
    arguments = (float(target_epsilon), float(delta), float(sample_rate), int(steps))
    others = dict(also or {})
    if not use_cache:
        return _search(*arguments, others)
    key: list[object] = list(arguments)
    if others:
        key.append([[*term, count] for term, count in sorted(others.items())])
    return kept("calibration", key, lambda: _search(*arguments, others))


def _check(target_epsilon: float, delta: float, sample_rate: float, steps: int) -> None:
    for name, value in (("epsilon", target_epsilon), ("delta", delta), ("sample_rate", sample_rate)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise PrivacyError(f"{name} must be a finite number, not {value!r}.")
    if target_epsilon <= 0.0:
        raise PrivacyError(
            f"privacy.epsilon must be above 0, not {target_epsilon}. For a run without privacy, say so: "
            "privacy.trust=none."
        )
    if not 0.0 < delta < 1.0:
        raise PrivacyError(f"privacy.delta must lie strictly between 0 and 1, not {delta}.")
    if not 0.0 < sample_rate <= 1.0:
        raise PrivacyError(f"train.sample_rate is a probability in (0, 1], not {sample_rate}.")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise PrivacyError(f"steps must be a whole number of 1 or more, not {steps!r}.")


def _search(
    target_epsilon: float, delta: float, sample_rate: float, steps: int, also: Mapping[Term, int]
) -> float:
    # Each composition adds rounding, so the grid is finer where there are many.
    interval = min(max(target_epsilon / (100.0 + 5.0 * math.sqrt(steps)), 2e-6), 1.0)

    def everything(sigma: float) -> dict[Term, int]:
        step = Term(sample_rate, sigma)
        return {**also, step: steps + also.get(step, 0)}

    def coarse(log_sigma: float) -> float:
        """log(epsilon / target), on one grid for all noise multipliers, so that it is smooth."""
        epsilon = accounting.epsilon_on_grid(everything(math.exp(log_sigma)), delta, interval)
        return math.log(max(epsilon, 1e-300) / target_epsilon) if epsilon < math.inf else 700.0

    def fine(sigma: float) -> float:
        return accounting.epsilon_of_terms(everything(sigma), delta)

    low, high = math.log(MIN_NOISE_MULTIPLIER), math.log(MAX_NOISE_MULTIPLIER)
    # In the central limit epsilon is nearly a function of mu: where to look first.
    start = _guess(target_epsilon, delta, sample_rate, steps)
    log_sigma = min(max(math.log(start), low), high)
    value = coarse(log_sigma)
    # Walk outwards until the target lies between two noise multipliers.
    step = 0.15
    above: tuple[float, float] | None = None  # too little noise: epsilon over the target
    below: tuple[float, float] | None = None
    while True:
        if value > 0.0:
            above = (log_sigma, value)
        else:
            below = (log_sigma, value)
        if above and below:
            break
        if (value > 0.0 and log_sigma >= high) or (value <= 0.0 and log_sigma <= low):
            break
        move = min(max(abs(value) * 1.1, step), 3.0)
        log_sigma = min(log_sigma + move, high) if value > 0.0 else max(log_sigma - move, low)
        value = coarse(log_sigma)
        step *= 2.0
    if below is None:
        _refuse_small(target_epsilon, delta, sample_rate, steps, fine(MAX_NOISE_MULTIPLIER))
    if above is None:
        _refuse_large(target_epsilon, delta, sample_rate, steps, fine(MIN_NOISE_MULTIPLIER))
    assert above is not None and below is not None
    # Aim a little under the target: the two grids differ by a few parts in ten thousand.
    goal = math.log(0.998)
    for _ in range(25):
        if goal - 0.002 <= below[1] <= 0.0 or below[0] - above[0] < 1e-9:
            break
        slope = (below[1] - above[1]) / (below[0] - above[0])
        guess = above[0] + (goal - above[1]) / slope
        width = below[0] - above[0]
        guess = min(max(guess, above[0] + 0.02 * width), below[0] - 0.02 * width)
        if below[1] < -3.0:
            guess = above[0] + 0.5 * width  # epsilon falls steeply to 0 there: a line says nothing
        value = coarse(guess)
        if value > 0.0:
            above = (guess, value)
        else:
            below = (guess, value)
    sigma = math.exp(below[0])
    slope = (below[1] - above[1]) / (below[0] - above[0])  # of log epsilon over log noise: negative
    for _ in range(8):
        ratio = fine(sigma) / target_epsilon
        if _LOW <= ratio <= _HIGH:
            return sigma
        if ratio == 0.0:
            break
        sigma *= math.exp((goal - math.log(ratio)) / min(slope, -0.3))
        if not MIN_NOISE_MULTIPLIER <= sigma <= MAX_NOISE_MULTIPLIER:
            break
    raise CalibrationError(
        f"No noise multiplier lands between {_LOW:g} and {_HIGH:g} of epsilon {target_epsilon:g} at delta "
        f"{delta:g} with sample rate {sample_rate:g} and {steps} steps: so little is released that epsilon "
        "falls to 0 in one leap. Lower privacy.delta, or set privacy.noise_multiplier and "
        "privacy.epsilon=null."
    )


def _guess(target_epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """Noise multiplier in the central limit (Bu et al. 2020): where the search starts, nothing more."""
    tail = math.sqrt(2.0 * math.log(1.0 / delta))
    mu = math.sqrt(tail * tail + 2.0 * target_epsilon) - tail  # of mu^2/2 + mu*tail = epsilon
    if sample_rate == 1.0:
        return math.sqrt(steps) / mu
    return 1.0 / math.sqrt(math.log1p((mu / sample_rate) ** 2 / steps))


def _refuse_small(target: float, delta: float, sample_rate: float, steps: int, reached: float) -> None:
    raise CalibrationError(
        f"No noise meets epsilon {target:g} at delta {delta:g}: with sample rate {sample_rate:g} and {steps} "
        f"steps the smallest that can be reached is {reached:.3g}, at noise multiplier "
        f"{MAX_NOISE_MULTIPLIER:g}, where nothing would be learnt. Raise privacy.epsilon, or lower "
        "train.sample_rate, train.local_steps or federation.num_rounds."
    )


def _refuse_large(target: float, delta: float, sample_rate: float, steps: int, reached: float) -> None:
    raise CalibrationError(
        f"epsilon {target:g} at delta {delta:g} needs less noise than the least allowed, "
        f"{MIN_NOISE_MULTIPLIER:g}, which gives {reached:.3g} with sample rate {sample_rate:g} and {steps} "
        "steps. An epsilon of that size protects nobody: lower privacy.epsilon, or say that there is no "
        "privacy with privacy.trust=none."
    )
