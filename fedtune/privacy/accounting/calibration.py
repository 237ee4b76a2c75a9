"""From a target epsilon to the noise that meets it.

Noise is found on the accountant's own upper bound, so the epsilon that is reported later never exceeds
the target; it lands within 2 percent below it, mostly within 0.5.

    >>> from fedtune.privacy.accounting.epsilon import epsilon_of_terms
    >>> noise = noise_multiplier_for(3.0, delta=1e-5, sample_rate=0.05, steps=60)
    >>> 0.98 * 3.0 <= epsilon_of_terms({Term(0.05, noise): 60}, delta=1e-5) <= 3.0
    True

The search runs on a rough grid and then on a coarse one, whose results are upper bounds too, and the last
word is `epsilon_of_terms` itself.

Results are pure functions of their arguments and are cached on disk between processes (`cached`, and
`cached_epsilon` for the ledger). Each has one small file, written whole or not at all, with its arguments,
the version of the accountant and a checksum: a damaged file is ignored and made again, never believed. Losing
the folder costs time and nothing else, and so does being unable to write.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from fedtune.config.files import cache_dir, replace_whole
from fedtune.errors import CalibrationError, PrivacyError, ResourceError
from fedtune.privacy.accounting import epsilon as accounting
from fedtune.privacy.accounting.epsilon import Term
from fedtune.privacy.accounting.pld import width

__all__ = ["MAX_NOISE_MULTIPLIER", "MIN_NOISE_MULTIPLIER", "cached", "cached_epsilon", "noise_multiplier_for"]

MIN_NOISE_MULTIPLIER = 0.05  # below it epsilon is in the hundreds and says nothing
MAX_NOISE_MULTIPLIER = 1000.0  # above it nothing is learnt, whatever epsilon says

_LOW, _HIGH = 0.98, 1.0  # of the target: where the result must land
_GOAL = math.log(0.996)  # where it is aimed at: a grid's own error is a few parts in a thousand
_COARSE_POINTS = 40_000  # of one step's losses, in the search

_FORMAT = 3  # raise it when any cached function changes its results
_memory: dict[str, float] = {}

_Point = tuple[float, float]


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

    Guarantee: `epsilon_of_terms` of these steps, composed with `also`, is at most the target.

    Args:
        target_epsilon: above 0.
        delta: in (0, 1).
        sample_rate: probability of one unit in one step, in (0, 1].
        steps: of the whole run (local steps times rounds).
        also: what else is released, with noise that is fixed already, and must fit into the target too.
        use_cache: whether a result on disk may be taken.

    Returns:
        The noise multiplier: standard deviation over `max_grad_norm`.

    Raises:
        CalibrationError: no noise multiplier between 0.05 and 1000 meets the target; it names the epsilon
            that can be reached.
        PrivacyError: a value has no meaning.
    """
    _check(target_epsilon, delta, sample_rate, steps)
    arguments = (float(target_epsilon), float(delta), float(sample_rate), int(steps))
    others = dict(also or {})
    if not use_cache:
        return _search(*arguments, others)
    key: list[object] = list(arguments)
    if others:
        key.append([[*term, count] for term, count in sorted(others.items())])
    return cached("calibration", key, lambda: _search(*arguments, others))


def _check(target_epsilon: float, delta: float, sample_rate: float, steps: int) -> None:
    for name, value in (("epsilon", target_epsilon), ("delta", delta), ("sample_rate", sample_rate)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise PrivacyError(f"{name} must be a finite number, not {value!r}.", setting=name)
    if target_epsilon <= 0.0:
        raise PrivacyError(
            f"privacy.epsilon must be above 0, not {target_epsilon}. For a run without privacy, say so: "
            "privacy.trust=none.",
            setting="privacy.epsilon",
        )
    if not 0.0 < delta < 1.0:
        raise PrivacyError(
            f"privacy.delta must lie strictly between 0 and 1, not {delta}.", setting="privacy.delta"
        )
    if not 0.0 < sample_rate <= 1.0:
        raise PrivacyError(
            f"train.sample_rate is a probability in (0, 1], not {sample_rate}.", setting="train.sample_rate"
        )
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise PrivacyError(f"steps must be a whole number of 1 or more, not {steps!r}.")


def _search(
    target_epsilon: float, delta: float, sample_rate: float, steps: int, also: Mapping[Term, int]
) -> float:
    low, high = math.log(MIN_NOISE_MULTIPLIER), math.log(MAX_NOISE_MULTIPLIER)

    def everything(sigma: float) -> dict[Term, int]:
        step = Term(sample_rate, sigma)
        return {**also, step: steps + also.get(step, 0)}

    def on_grid(interval: float) -> Callable[[float], float]:
        """log(epsilon / target) of log noise, on one grid for all noise multipliers, so that it is smooth."""

        def value(log_sigma: float) -> float:
            epsilon = accounting.epsilon_on_grid(everything(math.exp(log_sigma)), delta, interval)
            return math.log(max(epsilon, 1e-300) / target_epsilon) if epsilon < math.inf else 700.0

        return value

    def fine(sigma: float) -> float:
        return accounting.epsilon_of_terms(everything(sigma), delta)

    # In the central limit epsilon is nearly a function of mu: where to look first, on a rough grid.
    start = min(max(math.log(_guess(target_epsilon, delta, sample_rate, steps)), low), high)
    rough = on_grid(_interval(target_epsilon, 30.0, 2.0, steps))
    above, below = _between(rough, start, low, high, step=0.15, near=0.05)
    start = _interpolated(above, below) if above and below else (below or above or (start, 0.0))[0]
    # Each composition adds rounding, so the grid is finer where there are many; what it leaves is part of
    # the 2 percent. A step with a far tail and next to no privacy loss otherwise gets only so many points.
    widest = width((sample_rate, math.exp(start), False)) / _COARSE_POINTS
    coarse = on_grid(max(_interval(target_epsilon, 200.0, 10.0, steps), widest))
    above, below = _between(coarse, start, low, high, step=0.02, near=0.002)
    if above is None:  # the finer grid says even less
        _refuse_large(target_epsilon, delta, sample_rate, steps, fine(MIN_NOISE_MULTIPLIER))
    if below is None and (reached := fine(MAX_NOISE_MULTIPLIER)) > target_epsilon:
        _refuse_small(target_epsilon, delta, sample_rate, steps, reached)
    assert above is not None
    # Of log epsilon over log noise.
    slope = min((below[1] - above[1]) / (below[0] - above[0]), -0.3) if below else -1.0
    # The last word is the accountant's own. Mostly the first guess lands; else its errors lead to the next.
    log_sigma, above, below = (below or above)[0], None, None
    for _ in range(12):
        ratio = fine(math.exp(log_sigma)) / target_epsilon
        if _LOW <= ratio <= _HIGH:
            return math.exp(log_sigma)
        value = math.log(max(ratio, 1e-300))
        if ratio > _HIGH:
            above = (log_sigma, value)
        else:
            below = (log_sigma, value)
        if above and below:
            log_sigma = _interpolated(above, below)
        else:
            log_sigma += min(max((_GOAL - value) / slope, -0.5), 0.5)
        if not low <= log_sigma <= high:
            break
    raise CalibrationError(
        f"No noise multiplier lands between {_LOW:g} and {_HIGH:g} of epsilon {target_epsilon:g} at delta "
        f"{delta:g} with sample rate {sample_rate:g} and {steps} steps: so little is released that epsilon "
        "falls to 0 in one leap. Lower privacy.delta, or set privacy.noise_multiplier and "
        "privacy.epsilon=null."
    )


def _between(
    value: Callable[[float], float], start: float, low: float, high: float, *, step: float, near: float
) -> tuple[_Point | None, _Point | None]:
    """Two points (log noise, `value` there) around value 0, the second at or below 0 and within `near` of the
    goal where `value` allows it. None for a side that is not reached between `low` and `high`.

    `value` falls; it is looked for from `start` outwards, by at least `step` at first.
    """
    above: _Point | None = None  # too little noise: epsilon over the target
    below: _Point | None = None
    x, moves = start, 0
    while above is None or below is None:
        y = value(x)
        if y > 0.0:
            above = (x, y)
        else:
            below = (x, y)
        if (y > 0.0 and x >= high) or (y <= 0.0 and x <= low):
            break
        move = min(max(abs(y) * 1.1, step * 2.0**moves), 3.0)
        x, moves = (min(x + move, high) if y > 0.0 else max(x - move, low)), moves + 1
    for _ in range(25):
        if above is None or below is None or below[1] >= _GOAL - near or below[0] - above[0] < 1e-9:
            break
        x = _interpolated(above, below)
        y = value(x)
        if y > 0.0:
            above = (x, y)
        else:
            below = (x, y)
    return above, below


def _interpolated(above: _Point, below: _Point) -> float:
    """Where a line between two points meets the goal; halfway where epsilon falls too steeply for a line."""
    share = (_GOAL - above[1]) / (below[1] - above[1]) if below[1] > -1.0 and above[1] < 1.0 else 0.5
    return above[0] + min(max(share, 0.05), 0.95) * (below[0] - above[0])


def _interval(target_epsilon: float, least: float, more: float, steps: int) -> float:
    """Grid of losses with `least` + `more` sqrt(steps) points up to the target."""
    return min(max(target_epsilon / (least + more * math.sqrt(steps)), 1e-6), 1.0)


def _guess(target_epsilon: float, delta: float, sample_rate: float, steps: int) -> float:
    """Noise multiplier in the central limit (Bu et al. 2020): where the search starts, nothing more."""
    target_epsilon = min(max(target_epsilon, 1e-6), 1e6)
    tail = math.sqrt(2.0 * math.log(1.0 / delta))
    mu = math.sqrt(tail * tail + 2.0 * target_epsilon) - tail  # of mu^2/2 + mu*tail = epsilon
    if sample_rate == 1.0:
        return math.sqrt(steps) / mu
    return 1.0 / math.sqrt(math.log1p((mu / sample_rate) ** 2 / steps))


def _refuse_small(target: float, delta: float, sample_rate: float, steps: int, reached: float) -> None:
    raise CalibrationError(
        f"No noise meets epsilon {target:g} at delta {delta:g}: with sample rate {sample_rate:g} and {steps} "
        f"steps the smallest that can be reached is {reached:.3g}, at noise multiplier "
        f"{MAX_NOISE_MULTIPLIER:g}, where nothing would be learnt. Raise privacy.epsilon well above that, or "
        "lower train.sample_rate, train.local_steps or federation.num_rounds.",
        setting="privacy.epsilon",
    )


def _refuse_large(target: float, delta: float, sample_rate: float, steps: int, reached: float) -> None:
    raise CalibrationError(
        f"epsilon {target:g} at delta {delta:g} needs less noise than the least allowed, "
        f"{MIN_NOISE_MULTIPLIER:g}, which gives {reached:.3g} with sample rate {sample_rate:g} and {steps} "
        "steps. An epsilon of that size protects nobody: lower privacy.epsilon, or say that there is no "
        "privacy with privacy.trust=none.",
        setting="privacy.epsilon",
    )


# --- cached on disk ---------------------------------------------------------------------------------


def cached_epsilon(terms: Mapping[Term, int] | None, delta: float) -> float:
    """`epsilon_of_terms`, cached on disk, so that a new process need not even load the accountant."""
    if terms is None:
        return math.inf
    arguments = [[list(term), count] for term, count in sorted(terms.items())]
    return cached("epsilon", [arguments, delta], lambda: accounting.epsilon_of_terms(terms, delta))


def cached(kind: str, arguments: list[Any], compute: Callable[[], float]) -> float:
    """`compute()`, or what it gave for the same arguments before.

    Args:
        kind: what is computed; it names the folder.
        arguments: everything that the number depends on, as JSON values.
        compute: called where no number is cached.
    """
    key = json.dumps([kind, _FORMAT, _accountant(), arguments])
    # The folder belongs to the memory's key, so that whoever moves FEDTUNE_HOME gets files there too.
    remembered = f"{os.environ.get('FEDTUNE_HOME', '')}\n{key}"
    if remembered in _memory:
        return _memory[remembered]
    path = _path(kind, key)
    value = _read(path, key) if path else None
    if value is None:
        value = compute()
        if path:
            _write(path, key, value)
    if len(_memory) > 10_000:
        _memory.clear()
    _memory[remembered] = value
    return value


@lru_cache(maxsize=1)
def _accountant() -> str:
    return metadata.version("dp-accounting")


def _path(kind: str, key: str) -> Path | None:
    try:
        return cache_dir() / kind / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    except ResourceError:
        return None


def _checksum(key: str, value: float) -> str:
    return hashlib.sha256(f"{key} {value!r}".encode()).hexdigest()


def _read(path: Path, key: str) -> float | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        value = content["value"]
        # The checksum binds the value to its arguments: a wrong noise multiplier here would break a
        # guarantee without a sound.
        if type(value) is float and content["key"] == key and content["checksum"] == _checksum(key, value):
            return value
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _write(path: Path, key: str, value: float) -> None:
    content = json.dumps({"key": key, "value": value, "checksum": _checksum(key, value)})
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_whole(path, content.encode(), mode=0o600)
