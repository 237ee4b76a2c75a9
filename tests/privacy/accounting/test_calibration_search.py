"""The search for noise, on accountants that are formulas: where it looks, where it lands, what it refuses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from fedtune.errors import CalibrationError, PrivacyError
from fedtune.privacy.accounting import calibration
from fedtune.privacy.accounting.calibration import (
    _GOAL,
    _between,
    _guess,
    _interpolated,
    _interval,
    noise_multiplier_for,
)
from fedtune.privacy.accounting.epsilon import Term
from tests.support.golden import Golden


class Formula:
    """Stands in for the accountant: epsilon is a function of the noise that is looked for."""

    def __init__(self, epsilon: Callable[[float], float], error: float = 0.1) -> None:
        self._epsilon, self._error = epsilon, error
        self.asked: list[tuple[float, float, Mapping[Term, int]]] = []  # noise, interval (0: exactly), steps

    def _of(self, terms: Mapping[Term, int], interval: float) -> float:
        sigma = next(reversed(terms)).noise_multiplier
        self.asked.append((sigma, interval, dict(terms)))
        # A coarser grid says more.
        return self._epsilon(sigma) * (1.0 + interval * self._error)

    def epsilon_on_grid(self, terms: Mapping[Term, int], delta: float, interval: float) -> float:
        assert delta == 1e-5 and interval > 0.0
        return self._of(terms, interval)

    def epsilon_of_terms(self, terms: Mapping[Term, int], delta: float) -> float:
        assert delta == 1e-5
        return self._of(terms, 0.0)


def searched(
    monkeypatch: pytest.MonkeyPatch,
    epsilon: Callable[[float], float],
    target: float = 2.0,
    rate: float = 0.05,
    steps: int = 60,
    also: Mapping[Term, int] | None = None,
    error: float = 0.1,
) -> tuple[float, Formula]:
    formula = Formula(epsilon, error)
    monkeypatch.setattr(calibration, "accounting", formula)
    sigma = noise_multiplier_for(target, 1e-5, sample_rate=rate, steps=steps, also=also, use_cache=False)
    return sigma, formula


def cliff(edge: float, before: float, after: float) -> Callable[[float], float]:
    return lambda sigma: before if sigma < edge else after


# How often each grid and at last the accountant itself is asked, and the result: the search as it is. Results
# are cached on disk, so whoever changes these raises `calibration._FORMAT` as well.
PATHS: list[tuple[Callable[[float], float], dict[str, Any], list[int], float]] = [
    (lambda s: 2.0 / s, {}, [3, 3, 1], 1.0047397846271904),
    (lambda s: 2.0 / s, {"error": 10.0}, [2, 3, 2], 1.0040160642570282),
    (lambda s: 3.0 / s**0.2, {"error": 10.0}, [7, 8, 3], 8.05291402444899),
    (lambda s: 90.0 / s**3, {"error": 3.0}, [7, 3, 2], 3.561648515104794),
    (lambda s: 0.5 / s, {"target": 0.01, "rate": 1.0, "steps": 12}, [5, 2, 1], 50.20216262920047),
    (
        lambda s: 300.0 / s**1.5,
        {"target": 20.0, "steps": 100000, "error": 1.0},
        [3, 3, 1],
        6.1226354510656495,
    ),
    (
        lambda s: 0.1 * (0.06 / s) ** 0.5,
        {"target": 0.1, "rate": 0.0001, "error": 5.0},
        [5, 4, 2],
        0.06048289543717037,
    ),
    (lambda s: 1999.0 / s, {"error": 0.0}, [4, 2, 1], 999.9999999999998),
    (lambda s: 0.101 / s, {"error": 0.0}, [4, 2, 1], 0.05066743720552541),
    (lambda s: 2.0 / s**12, {"error": 20.0}, [7, 6, 2], 1.0003340575679343),
    (lambda s: math.inf if s < 0.9 else 1.9 / s, {}, [3, 3, 1], 0.9545027953958307),
    (lambda s: 2.0 * math.exp(-((math.log(s) - 3) / 2)), {"error": 30.0}, [6, 6, 2], 20.247190492076424),
    (lambda s: 40.0 / s**0.31, {"target": 8.0, "error": 20.0}, [5, 6, 4], 182.1197254026079),
    (lambda s: 500.0 * math.exp(-s), {"error": 4.0, "target": 0.3}, [7, 3, 1], 7.4267599149933385),
]


@pytest.mark.parametrize(("epsilon", "settings", "asked", "result"), PATHS)
def test_the_search_goes_its_way_and_lands(
    monkeypatch: pytest.MonkeyPatch,
    epsilon: Callable[[float], float],
    settings: dict[str, Any],
    asked: list[int],
    result: float,
) -> None:
    sigma, formula = searched(monkeypatch, epsilon, **settings)
    target = settings.get("target", 2.0)
    assert 0.98 * target <= epsilon(sigma) <= target
    assert sigma == pytest.approx(result, rel=1e-9)
    intervals = [interval for _, interval, _ in formula.asked]
    assert [len(list(group)) for _, group in itertools.groupby(intervals)] == asked
    assert calibration._FORMAT == 3, "the paths above were written down for this format"


def test_what_is_released_besides_is_counted_with_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def epsilon(sigma: float) -> float:
        return 2.0 / sigma

    also = {Term(1.0, 7.0): 3}
    sigma, formula = searched(monkeypatch, epsilon, also=also)
    assert all(terms == {**also, Term(0.05, s): 60} for s, _, terms in formula.asked)
    # Also where it is the very step that is looked for.
    same = {Term(0.05, sigma): 4}
    _, formula = searched(monkeypatch, epsilon, also=same)
    assert [terms for s, _, terms in formula.asked if s == sigma][-1] == {Term(0.05, sigma): 64}


def test_a_target_below_what_the_most_noise_gives_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        CalibrationError,
        match="meets epsilon 2 at delta 1e-05: .* that can be reached is 3, at noise multiplier 1000",
    ):
        searched(monkeypatch, lambda sigma: 3.0)
    # Only a grid says so, and the accountant itself does not: found after all.
    formula = Formula(lambda sigma: 2.5 * (1000.0 / sigma) ** 0.1)
    real = formula.epsilon_of_terms
    formula.epsilon_of_terms = lambda terms, delta: 0.79 * real(terms, delta)  # type: ignore[method-assign]
    monkeypatch.setattr(calibration, "accounting", formula)
    sigma = noise_multiplier_for(2.0, 1e-5, sample_rate=0.05, steps=60, use_cache=False)
    assert 0.98 * 2.0 <= 0.79 * 2.5 * (1000.0 / sigma) ** 0.1 <= 2.0


def apart(
    monkeypatch: pytest.MonkeyPatch, grids: Callable[[float], float], exactly: Callable[[float], float]
) -> tuple[float, list[float]]:
    """Where a search ends whose grids say another epsilon than the accountant, and what that was asked."""
    formula, asked = Formula(grids), []

    def epsilon_of_terms(terms: Mapping[Term, int], delta: float) -> float:
        asked.append(next(reversed(terms)).noise_multiplier)
        return exactly(asked[-1])

    formula.epsilon_of_terms = epsilon_of_terms  # type: ignore[method-assign]
    monkeypatch.setattr(calibration, "accounting", formula)
    return noise_multiplier_for(2.0, 1e-5, sample_rate=0.05, steps=60, use_cache=False), asked


def test_without_a_slope_the_search_supposes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The grids say that no noise is enough; the accountant, that less than the most is."""
    sigma, asked = apart(
        monkeypatch, lambda s: 2.5 * (1000.0 / s) ** 0.5, lambda s: 1.8 * (1000.0 / s) ** 0.5
    )
    assert 0.98 * 2.0 <= 1.8 * (1000.0 / sigma) ** 0.5 <= 2.0
    # Half of what is missing at each step, where it supposes a slope of 1 and there is one of 1/2.
    log = math.log(1000.0)
    expected = [1000.0, 1000.0]
    for _ in range(3):
        log -= _GOAL - math.log(0.9 * (1000.0 / math.exp(log)) ** 0.5)
        expected.append(math.exp(log))
    assert asked == pytest.approx(expected)


def test_noise_beyond_the_most_is_not_taken(monkeypatch: pytest.MonkeyPatch, golden: Golden) -> None:
    with pytest.raises(CalibrationError) as raised:
        apart(monkeypatch, lambda s: 2.0 * 900.0 / s, lambda s: 3.0 * 900.0 / s)
    golden(raised)
    with pytest.raises(CalibrationError) as raised:
        apart(monkeypatch, lambda s: 2.0 * 0.06 / s, lambda s: 1.0 * 0.06 / s)
    golden(raised)


def test_a_target_above_what_the_least_noise_gives_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        CalibrationError,
        match=r"epsilon 2 at delta 1e-05 needs less noise than the least allowed, 0.05, which gives 1 with",
    ):
        searched(monkeypatch, lambda sigma: 1.0)


def test_an_epsilon_that_leaps_over_the_target_is_refused(
    monkeypatch: pytest.MonkeyPatch, golden: Golden
) -> None:
    with pytest.raises(CalibrationError) as raised:
        searched(monkeypatch, cliff(3.0, 100.0, 0.0))
    golden(raised)
    with pytest.raises(CalibrationError) as raised:
        searched(monkeypatch, cliff(3.0, math.inf, 1e-9))
    golden(raised)


@pytest.mark.parametrize("steps", [1, 400])
@pytest.mark.parametrize("rate", [0.01, 1.0])
def test_the_first_guess_is_that_of_the_central_limit(rate: float, steps: int) -> None:
    sigma = _guess(3.0, 1e-5, rate, steps)
    squared = steps / sigma**2 if rate == 1.0 else steps * rate**2 * math.expm1(1 / sigma**2)
    # Gaussian DP's tail: epsilon = mu^2 / 2 + mu sqrt(2 log(1 / delta))
    assert squared / 2 + math.sqrt(2 * squared * math.log(1e5)) == pytest.approx(3.0)


def test_the_grid_of_a_search() -> None:
    assert _interval(3.0, 30.0, 2.0, 16) == pytest.approx(3.0 / 38.0)
    assert _interval(1e-6, 30.0, 2.0, 16) == 1e-6
    assert _interval(1e6, 30.0, 2.0, 16) == 1.0


def test_interpolation_meets_the_goal_on_a_line() -> None:
    above, below = (1.0, 0.4), (3.0, -0.8)
    x = _interpolated(above, below)
    assert 0.4 + (x - 1.0) * (-1.2 / 2.0) == pytest.approx(_GOAL)
    # Never nearer to an end than a twentieth.
    assert _interpolated((1.0, 0.9), (3.0, _GOAL - 1e-6)) == pytest.approx(2.9)
    assert _interpolated((1.0, 1e-9), (3.0, -0.9)) == pytest.approx(1.1)
    # Halfway where it falls too steeply.
    for steep in (((1.0, 1.0), (3.0, -0.2)), ((1.0, 0.2), (3.0, -1.0)), ((1.0, 700.0), (3.0, -700.0))):
        assert _interpolated(*steep) == 2.0
    assert _interpolated((1.0, 0.999), (3.0, -0.999)) != 2.0


def line(slope: float, zero: float) -> Callable[[float], float]:
    return lambda x: -slope * (x - zero)


@pytest.mark.parametrize("start", [-3.0, -2.9, 0.0, 2.0, 6.0, 7.0])
@pytest.mark.parametrize("slope", [0.2, 1.0, 30.0])
def test_points_on_both_sides_the_second_near_the_goal(start: float, slope: float) -> None:
    above, below = _between(line(slope, 1.3), start, -3.0, 7.0, step=0.15, near=0.05)
    assert above is not None and below is not None
    assert above[0] < 1.3 <= below[0] and above[1] > 0.0 >= below[1] >= _GOAL - 0.05
    assert (above[1], below[1]) == pytest.approx((-slope * (above[0] - 1.3), -slope * (below[0] - 1.3)))


def test_a_side_that_is_out_of_reach_is_none() -> None:
    assert _between(lambda x: 1.0, 0.0, -3.0, 7.0, step=0.15, near=0.05) == ((7.0, 1.0), None)
    assert _between(lambda x: -1.0, 0.0, -3.0, 7.0, step=0.15, near=0.05) == (None, (-3.0, -1.0))
    # A value of exactly 0 is the target itself: it is met.
    assert _between(lambda x: 0.0, 0.0, -3.0, 7.0, step=0.15, near=0.05) == (None, (-3.0, 0.0))


def places(value: Callable[[float], float], start: float, step: float, near: float) -> list[float]:
    asked: list[float] = []

    def noted(x: float) -> float:
        asked.append(x)
        return value(x)

    _between(noted, start, -3.0, 7.0, step=step, near=near)
    return asked


def test_the_search_widens_its_steps_until_it_has_both_sides() -> None:
    # By 1.1 times the value, at least by the step, which doubles; at most by 3.
    assert places(line(0.001, 6.0), 0.0, 0.25, 9.0) == pytest.approx([0.0, 0.25, 0.75, 1.75, 3.75, 6.75])
    assert places(line(0.001, -2.0), 3.0, 0.25, 9.0) == pytest.approx([3.0, 2.75, 2.25, 1.25, -0.75, -3.0])
    assert places(line(1.0, 2.0), 0.0, 0.25, 9.0) == pytest.approx([0.0, 2.2])
    assert places(line(9.0, 5.0), 0.0, 0.25, 99.0) == pytest.approx([0.0, 3.0, 6.0])


def test_a_leap_is_closed_in_on_and_then_left() -> None:
    asked = places(cliff(1.0, 0.5, -5.0), 0.0, 0.15, 0.05)
    assert len(asked) == 3 + 25  # halves the gap as often as it may
    assert asked[-1] == pytest.approx(1.0, abs=1e-6)
    # Nobody needs noise to a part in a billion.
    assert len(places(cliff(0.0, 1e-12, -5.0), -5e-10, 9e-10, 0.05)) == 2
    assert len(places(cliff(0.0, 1e-12, -5.0), -5e-10, 1.9e-9, 0.05)) == 3


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"target_epsilon": math.nan}, "^epsilon must be a finite number, not nan"),
        ({"target_epsilon": True}, "^epsilon must be a finite"),
        ({"target_epsilon": "8"}, "^epsilon must be a finite number, not '8'"),
        ({"delta": math.inf}, "^delta must be a finite"),
        ({"sample_rate": math.nan}, "^sample_rate must be a finite"),
        ({"target_epsilon": 0.0}, "above 0"),
        ({"target_epsilon": -1}, "above 0"),
        ({"delta": 0.0}, "privacy.delta must lie strictly between 0 and 1, not 0.0"),
        ({"delta": 1.0}, "privacy.delta must lie strictly between 0 and 1, not 1.0"),
        ({"delta": 1.5}, "privacy.delta must lie strictly between 0 and 1, not 1.5"),
        ({"sample_rate": 0.0}, r"a probability in \(0, 1\]"),
        ({"sample_rate": 1.5}, r"a probability in \(0, 1\]"),
        ({"steps": 0}, "whole number of 1 or more"),
        ({"steps": True}, "whole number of 1 or more"),
        ({"steps": 2.0}, "whole number of 1 or more"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(settings: dict[str, Any], said: str) -> None:
    values: dict[str, Any] = {
        "target_epsilon": 8.0,
        "delta": 1e-5,
        "sample_rate": 0.1,
        "steps": 5,
        **settings,
    }
    with pytest.raises(PrivacyError, match=said):
        noise_multiplier_for(values.pop("target_epsilon"), values.pop("delta"), **values)


def test_a_cached_result_belongs_to_all_of_the_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[list[object]] = []
    monkeypatch.setattr(calibration, "cached", lambda kind, key, compute: keys.append([kind, *key]) or 1.5)
    also = {Term(1.0, 7.0): 3, Term(0.5, 2.0, True): 1}
    assert noise_multiplier_for(8, 1e-5, sample_rate=1, steps=60) == 1.5
    noise_multiplier_for(8, 1e-5, sample_rate=1, steps=60, also=also)
    noise_multiplier_for(8, 1e-5, sample_rate=1, steps=60, also=dict(reversed(also.items())))
    plain = ["calibration", 8.0, 1e-5, 1.0, 60]
    more = [*plain, [[0.5, 2.0, True, 1], [1.0, 7.0, False, 3]]]
    assert keys == [plain, more, more]
    assert [type(part) for part in keys[0]] == [str, float, float, float, int]


@pytest.mark.parametrize("epsilon", [1.96, 2.0])
def test_both_ends_of_the_range_are_in_it(
    monkeypatch: pytest.MonkeyPatch, epsilon: float, golden: Golden
) -> None:
    _, asked = apart(monkeypatch, lambda s: 2.0 * 30.0 / s, lambda s: epsilon)
    assert len(asked) == 1
    with pytest.raises(CalibrationError) as raised:
        apart(
            monkeypatch, lambda s: 2.0 * 30.0 / s, lambda s: math.nextafter(epsilon, 100 * (epsilon - 1.98))
        )
    golden(raised)


def test_a_target_that_only_the_most_noise_meets_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    sigma, _ = apart(monkeypatch, lambda s: 3.0, lambda s: 2.0)
    assert sigma == pytest.approx(1000.0)


def test_values_exactly_at_a_limit() -> None:
    assert _between(lambda x: 0.0, 7.0, -3.0, 7.0, step=0.15, near=0.05) == (None, (-3.0, 0.0))
    assert len(places(cliff(0.3, 0.5, _GOAL - 0.05), 0.0, 0.15, 0.05)) == 2
    assert len(places(cliff(5e-10, 1e-12, -5.0), 0.0, 1e-9, 0.05)) == 3
    met = _between(
        lambda x: {0.0: 0.5, 0.55: -5.0}.get(round(x, 9), 0.0), 0.0, -3.0, 7.0, step=0.15, near=0.05
    )
    assert met == ((0.0, 0.5), (pytest.approx(0.275), 0.0))
