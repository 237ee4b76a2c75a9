"""Grades at their very limits, and the two lines of every pair."""

from __future__ import annotations

import math

import pytest

from fedtune.privacy.accounting import strength
from fedtune.privacy.accounting.epsilon import Term, epsilon_of_terms
from fedtune.privacy.accounting.strength import WRONG, TradeOff, caution, grade, percent, trade_off


class Known(TradeOff):
    """A curve of which two numbers are known."""

    def __init__(self, found: float, advantage: float) -> None:
        object.__setattr__(self, "known", (found, advantage))

    def found(self, wrong: float) -> float:
        assert wrong == WRONG[0] == 0.001
        return self.known[0]  # type: ignore[attr-defined, no-any-return]

    def advantage(self) -> float:
        return self.known[1]  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize(
    ("found", "advantage", "delta", "word"),
    [
        (0.004, 0.5, 1e-3, "strong"),
        (0.0041, 0.5, 1e-3, "moderate"),
        (0.004, 0.51, 1e-3, "moderate"),
        (0.004, 0.5, 1.1e-3, "moderate"),
        (0.1, 0.95, 1e-2, "moderate"),
        (0.101, 0.95, 1e-2, "weak"),
        (0.1, 0.951, 1e-2, "weak"),
        (0.1, 0.95, 1.01e-2, "weak"),
    ],
)
def test_words_are_given_up_to_their_limits(found: float, advantage: float, delta: float, word: str) -> None:
    assert grade(Known(found, advantage), delta) == word


@pytest.mark.parametrize(
    "pairs", [((1.0, 0.01),), ((0.2, 0.1), (2.0, 1e-4)), ((0.0, 0.3),), ((800.0, 1e-9),), ()]
)
def test_what_is_found_is_below_both_lines_of_every_pair(pairs: tuple[tuple[float, float], ...]) -> None:
    curve = TradeOff(pairs, own=True)
    for wrong in (0.0, 0.001, 0.3, 0.99, 1.0):
        lines = [1.0]
        for epsilon, delta in pairs:
            lines.append(1 - math.exp(-epsilon) * (1 - delta - wrong))
            lines.append(delta + math.exp(min(epsilon, 700.0)) * wrong if wrong else delta)
        if pairs == ((800.0, 1e-9),):
            lines = lines[:2]  # e^800 is no float, and its line is far above 1 but for wrong = 0
        expected = min(max(min(lines), wrong), 1.0)
        assert expected <= curve.found(wrong) <= expected * (1 + 2e-12)
    meets = [1 - 2 * (1 - delta) / (1 + math.exp(min(epsilon, 700.0))) for epsilon, delta in pairs]
    expected = max(min(meets, default=1.0), 0.0)
    assert expected <= curve.advantage() <= min(1.0, expected * (1 + 2e-12))


def test_the_curve_goes_up_to_where_delta_is_next_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[float], int]] = []
    real = strength.deltas_of_terms

    def deltas(terms: object, epsilons: object, *, resolution: int) -> object:
        asked.append((list(epsilons), resolution))  # type: ignore[call-overload]
        return real(terms, epsilons, resolution=resolution)  # type: ignore[arg-type]

    monkeypatch.setattr(strength, "deltas_of_terms", deltas)
    for terms, last in (({Term(1.0, 5.0): 1}, 12.0), ({Term(1.0, 1.0): 4}, None)):
        epsilon = epsilon_of_terms(terms, 1e-5)
        curve = trade_off(terms, epsilon, 1e-5)
        assert curve.own is True and curve.pairs[0] == (epsilon, 1e-5) and len(curve.pairs) == 161
        points, resolution = asked.pop()
        assert (points[0], points[39], points[40], resolution) == (0.0, 1.0, 1.02, 2000)
        assert points[-1] == pytest.approx(last or 3 * epsilon) and points == sorted(points)
        assert [e for e, _ in curve.pairs[1:]] == points


def test_a_pair_that_is_a_hundredth_above_its_steps_is_taken_alone() -> None:
    terms = {Term(1.0, 2.0): 1}
    epsilon = epsilon_of_terms(terms, 1e-5)
    assert trade_off(terms, epsilon / 0.9901, 1e-5).own
    for unknown in (None, {}):
        assert trade_off(unknown, epsilon, 1e-5) == TradeOff(((epsilon, 1e-5),), own=False)
    assert not trade_off(terms, epsilon / 0.9899, 1e-5).own
    assert not trade_off(terms, math.inf, 1e-5).own


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (0.0, "0.00 percent"),
        (0.001, "0.10 percent"),
        (0.009999, "1.00 percent"),
        (0.01, "1.0 percent"),
        (0.0123, "1.3 percent"),
        (0.07, "7.0 percent"),  # 7.000000000000001 in floats is no reason to round up
        (0.123456, "12.4 percent"),
        (0.98999, "99.0 percent"),
        (0.99, "99.00 percent"),
        (0.99994, "100.00 percent"),
        (0.99995, "more than 99.99 percent"),
        (1.0, "more than 99.99 percent"),
    ],
)
def test_a_bound_in_percent_is_rounded_up(share: float, said: str) -> None:
    assert percent(share) == said


def test_a_caution_names_what_may_be_recognised() -> None:
    said = caution(Known(0.1234, 0.99), 9.87654, 1e-5)
    assert said is not None
    assert said.startswith("A weak protection at best, epsilon 9.877 at delta 1e-05: an attacker")
    assert said.endswith("may recognise 12.4 percent of those in it.")
    assert caution(Known(0.1, 0.95), 9.0, 1e-5) is None


def test_a_curve_of_its_own_says_so() -> None:
    terms = {Term(1.0, 30.0): 1}
    assert trade_off(terms, epsilon_of_terms(terms, 1e-5), 1e-5).own is True
