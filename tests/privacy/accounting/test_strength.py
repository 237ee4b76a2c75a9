"""How strong a guarantee is: against closed forms, and each grade on both sides of its edge."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from scipy import stats

from fedtune.privacy.accounting import strength
from fedtune.privacy.accounting.epsilon import Term, epsilon_of_terms
from fedtune.privacy.accounting.strength import WRONG, TradeOff, caution, grade, percent, trade_off
from fedtune.privacy.statement.picture import picture


def of(terms: dict[Term, int], delta: float = 1e-5) -> TradeOff:
    return trade_off(terms, epsilon_of_terms(terms, delta), delta)


@pytest.mark.parametrize("mu", [0.2, 0.7, 1.5, 3.0])
def test_without_sampling_it_is_the_gaussian_trade_off_function(mu: float) -> None:
    """Dong, Roth and Su 2022, equation 6: found = Phi(Phi^-1(wrong) + mu); advantage 2 Phi(mu / 2) - 1."""
    curve = of({Term(1.0, 10.0 / mu): 100})
    assert curve.own
    for wrong in (1e-4, *WRONG, 0.5, 0.9):
        exact = stats.norm.cdf(stats.norm.ppf(wrong) + mu)
        assert exact <= curve.found(wrong) <= 1.01 * exact + 1e-5
    exact = 2 * stats.norm.cdf(mu / 2) - 1
    assert exact <= curve.advantage() <= 1.01 * exact


@pytest.mark.slow
def test_the_best_attack_on_sampled_steps_is_below_the_curve_and_near_it() -> None:
    """The likelihood ratio of every output, over many runs: no other attack finds more (Neyman, Pearson)."""
    random, rate, noise, steps, runs = np.random.default_rng(1), 0.3, 1.0, 20, 200_000

    def log_ratio(values: np.ndarray) -> np.ndarray:
        return np.log1p(rate * np.expm1((2 * values - 1) / (2 * noise**2))).sum(axis=0)

    without = log_ratio(random.normal(0.0, noise, (steps, runs)))
    drawn = random.random((steps, runs)) < rate
    with_it = log_ratio(random.normal(0.0, noise, (steps, runs)) + drawn)
    curve = of({Term(rate, noise): steps})
    for wrong in WRONG:
        found = float(np.mean(with_it > np.quantile(without, 1 - wrong)))
        error = 5 * math.sqrt(found * (1 - found) / runs) + 5 * found * math.sqrt(1 / (wrong * runs))
        assert found - error <= curve.found(wrong) <= found + error + 0.04
    best = stats.ks_2samp(with_it, without, method="asymp").statistic
    assert best - 0.01 <= curve.advantage() <= best + 0.04
    # the mutant: epsilon at its delta alone says almost nothing, and half of it is too little
    half = TradeOff(tuple((epsilon / 2, delta) for epsilon, delta in curve.pairs), own=True)
    assert half.found(0.001) < float(np.mean(with_it > np.quantile(without, 0.999))) * 0.8


def test_one_pair_is_the_textbook_line() -> None:
    """Kairouz, Oh and Viswanath 2015: found <= delta + e^epsilon wrong; the other line by symmetry."""
    curve = trade_off(None, 1.0, 0.01)
    assert not curve.own
    assert curve.found(0.001) == pytest.approx(0.01 + 0.001 * math.e)
    assert curve.found(0.9) == pytest.approx(1 - (1 - 0.01 - 0.9) / math.e)
    assert curve.found(0.0) == pytest.approx(0.01) and curve.found(1.0) == 1.0
    best = max(curve.found(wrong) - wrong for wrong in np.linspace(0, 1, 20_001))
    assert curve.advantage() == pytest.approx(best, abs=1e-4)


def test_steps_that_are_not_all_give_no_curve() -> None:
    terms = {Term(0.1, 1.5): 20}
    epsilon = epsilon_of_terms(terms, 1e-5)
    assert trade_off(terms, epsilon, 1e-5).own
    assert not trade_off(terms, 1.05 * epsilon, 1e-5).own
    assert not trade_off({}, 1.0, 1e-5).own
    unbounded = trade_off(None, math.inf, 1e-5)
    assert unbounded.found(0.001) == unbounded.advantage() == 1.0


@pytest.mark.parametrize(
    ("epsilon", "delta", "word"),
    [
        (0.5, 1e-5, "strong"), (1.0, 1e-5, "strong"), (3.0, 1e-5, "moderate"), (8.0, 1e-5, "moderate"),
        (15.0, 1e-5, "weak"), (0.996, 1 / 8, "weak"), (0.1, 1 / 8, "weak"), (1.0, 5e-3, "moderate"),
    ],
)  # fmt: skip
def test_38_grades_read_epsilon_and_delta_together(epsilon: float, delta: float, word: str) -> None:
    from fedtune.privacy.accounting.calibration import noise_multiplier_for

    noise = noise_multiplier_for(epsilon, delta, sample_rate=0.1, steps=48)
    assert grade(of({Term(0.1, noise): 48}, delta), delta) == word


def test_a_pair_alone_is_graded_lower_than_its_curve() -> None:
    assert [grade(trade_off(None, e, 1e-5), 1e-5) for e in (1.0, 2.0, 8.0)] == ["strong", "moderate", "weak"]


def test_the_picture_counts_squares_upwards() -> None:
    for curve, count in ((trade_off(None, 0.1, 1e-5), 2), (trade_off(None, 99.0, 1e-5), 1000)):
        root = ElementTree.fromstring(picture(curve, "nodes <a>", "small & print"))
        (found,) = [one for one in root if one.tag.endswith("path") and one.get("fill") == "#D55E00"]
        assert (found.get("d") or "").count("M") == count
        texts = [one.text for one in root if one.tag.endswith("text")]
        assert (
            f"he recognises at most {count:,} of 1,000 nodes <a> in it" in texts and "small & print" in texts
        )


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
