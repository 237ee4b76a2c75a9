"""The noised confusion matrix: its sensitivity, its noise, what it costs, and what is made of it."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import PrivacyError
from fedtune.privacy.mechanisms.confusion import ConfusionPlan, rates
from fedtune.privacy.mechanisms.counts import EvaluationPlan
from fedtune.privacy.mechanisms.noise import Entropy

DELTA = 1e-5


def plan_of(**changes: object) -> ConfusionPlan:
    values: dict[str, object] = {
        "trust": "local", "unit": "person", "noise_multiplier": 4.0, "delta": DELTA, "classes": 3, **changes,
    }  # fmt: skip
    return ConfusionPlan(**values)  # type: ignore[arg-type]


@st.composite
def records(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n = draw(st.integers(1, 25))
    column = lambda most: np.array(  # noqa: E731
        draw(st.lists(st.integers(0, most), min_size=n, max_size=n)), dtype=np.int64
    )
    return column(2), column(2), column(5)


def by_hand(plan: ConfusionPlan, labels: np.ndarray, said: np.ndarray, persons: np.ndarray) -> np.ndarray:
    """The matrix in units, one unit and one text after the other, in fractions."""
    found = np.zeros((plan.classes, plan.classes))
    for person in np.unique(persons) if plan.unit == "person" else np.arange(len(labels)):
        rows = np.flatnonzero(persons == person) if plan.unit == "person" else np.array([person])
        for row in rows:
            found[labels[row], said[row]] += 1 / len(rows)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["record", "person"])
@given(records())
def test_it_is_what_one_counts_by_hand(unit: str, columns: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    plan = plan_of(unit=unit)
    totals = plan.totals(*columns)
    assert np.allclose(totals / plan.scale, by_hand(plan, *columns), atol=1e-5)
    units = len(np.unique(columns[2])) if unit == "person" else len(columns[0])
    assert totals.sum() == units * plan.scale  # not a step is lost


def moved(plan: ConfusionPlan, columns: tuple[np.ndarray, np.ndarray, np.ndarray]) -> float:
    """By how much taking any one unit away moves the whole matrix, in L2, as measured."""
    whole = plan.totals(*columns)
    units = columns[2] if plan.unit == "person" else np.arange(len(columns[0]))
    without = (plan.totals(*(column[units != one] for column in columns)) for one in np.unique(units))
    return max(float(np.linalg.norm(whole - other)) for other in without)


@pytest.mark.parametrize("unit", ["record", "person"])
@given(records())
def test_one_unit_moves_the_matrix_by_one_vote_at_most(
    unit: str, columns: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    plan = plan_of(unit=unit)
    assert moved(plan, columns) <= plan.scale


def test_a_unit_in_one_cell_reaches_the_sensitivity() -> None:
    """So the bound is no smaller than it must be: a third of it less would be a broken promise."""
    plan = plan_of()
    one = (np.array([1, 1, 1]), np.array([2, 2, 2]), np.array([7, 7, 7]))
    assert moved(plan, one) == plan.scale


def test_mutant_a_person_whose_texts_all_count_is_caught() -> None:
    class Unclipped(ConfusionPlan):
        """Counts texts and calls them persons."""

        def totals(self, labels: np.ndarray, said: np.ndarray, persons: np.ndarray | None) -> np.ndarray:
            return dataclasses.replace(plan_of(), unit="record").totals(labels, said, None)

    many = (np.ones(50, dtype=np.int64), np.ones(50, dtype=np.int64), np.zeros(50, dtype=np.int64))
    assert moved(plan_of(), many) <= plan_of().scale
    assert moved(Unclipped(**dataclasses.asdict(plan_of())), many) > 10 * plan_of().scale


def test_persons_must_be_known_where_they_are_protected() -> None:
    with pytest.raises(PrivacyError, match="not known whose"):
        plan_of().totals(np.array([0]), np.array([0]), None)


# --- noise and cost ------------------------------------------------------------------------------


def spread(plan: ConfusionPlan) -> float:
    """Standard deviation of the noise in matrices about nobody, over the sensitivity: 900 cells."""
    nobody, entropy = np.zeros(0, dtype=np.int64), Entropy.reproducible(1, "test", 0, 0)
    cells = np.array([plan.answer(nobody, nobody, nobody, entropy) for _ in range(100)])
    return float(cells.std())


def test_the_noise_is_what_is_accounted_in_every_cell_and_two_thirds_of_it_is_noticed() -> None:
    plan = plan_of()
    tolerance = 5.0 / math.sqrt(2 * 900)
    assert abs(spread(plan) / plan.noise_multiplier - 1.0) < tolerance
    assert plan.noise_std == pytest.approx(plan.noise_multiplier, rel=1e-3)

    class Little(ConfusionPlan):
        @property
        def scale(self) -> int:
            return super().scale * 3 // 2

    mutant = Little(**dataclasses.asdict(plan))
    assert abs(spread(mutant) / plan.noise_multiplier - 1.0) > tolerance


def test_each_cell_has_noise_of_its_own_and_it_is_the_system_s() -> None:
    plan = plan_of()
    assert not plan.entropy("n").is_reproducible
    nobody = np.zeros(0, dtype=np.int64)
    cells = plan.answer(nobody, nobody, nobody, plan.entropy("n"))
    assert len(np.unique(cells)) == 9
    assert not np.array_equal(cells, plan.answer(nobody, nobody, nobody, plan.entropy("n")))


@pytest.mark.parametrize("noise", [0.7, 4.0, 20.0])
def test_epsilon_is_that_of_the_closed_form(noise: float) -> None:
    """One Gaussian, however many classes (Balle and Wang 2018, theorem 8)."""
    epsilon = plan_of(noise_multiplier=noise, classes=50).epsilon()

    def delta_at(epsilon: float) -> float:
        def phi(x: float) -> float:
            return 0.5 * math.erfc(-x / math.sqrt(2.0))

        mu = 1.0 / noise
        return phi(mu / 2 - epsilon / mu) - math.exp(epsilon) * phi(-mu / 2 - epsilon / mu)

    assert delta_at(epsilon) <= DELTA < delta_at(0.99 * epsilon)


def test_what_is_observed_is_no_likelier_without_a_unit_than_epsilon_allows() -> None:
    """Independent of the accountant: the privacy loss of matrices with and without a person, drawn."""
    plan = plan_of(noise_multiplier=1.0, classes=2)
    labels, said, persons = np.array([0, 0, 1]), np.array([0, 1, 1]), np.array([1, 1, 2])
    whole, entropy = plan.totals(labels, said, persons) / plan.scale, Entropy.reproducible(2, "test", 0, 0)
    less = plan.totals(labels[2:], said[2:], persons[2:]) / plan.scale
    drawn = np.array([plan.answer(labels, said, persons, entropy) for _ in range(4000)])
    apart = lambda centre: ((drawn - centre) ** 2).sum(axis=(1, 2)) / (2 * plan.noise_std**2)  # noqa: E731
    loss = apart(less) - apart(whole)
    # Of a Gaussian with |whole - less| = mu standard deviations it is normal with mean mu^2 / 2.
    mu = float(np.linalg.norm(whole - less)) / plan.noise_std
    assert mu <= 1.0 / plan.noise_multiplier * (1 + 1e-3)
    assert loss.mean() == pytest.approx(mu**2 / 2, abs=5 * mu / math.sqrt(4000))
    assert (loss > plan.epsilon()).mean() <= 10 * DELTA + 1e-9


def test_right_and_wrong_are_the_two_counts_of_a_run_s_evaluation() -> None:
    """The older mechanism, which counts right and wrong alone, is the check of the trace."""
    chance = np.random.default_rng(0)
    labels, said, persons = (chance.integers(0, top, 200) for top in (3, 3, 20))
    plan = plan_of()
    totals = plan.totals(labels, said, persons)
    two = EvaluationPlan(trust="local", unit="person", share=0.2, noise_multiplier=4.0, delta=DELTA)
    right = int(two.votes(labels == said, persons).sum(axis=0)[0])
    assert abs(int(np.trace(totals)) - right) <= 20 * 9  # a step of rounding a person and cell


# --- rates ---------------------------------------------------------------------------------------

EXACT = np.array([[80.0, 15.0, 5.0], [10.0, 60.0, 0.0], [2.0, 8.0, 20.0]])


def test_without_noise_they_are_the_rates_that_everybody_knows() -> None:
    from fedtune.serving.measures import measure

    labels = np.repeat(np.repeat(np.arange(3), 3), EXACT.ravel().astype(int))
    said = np.repeat(np.tile(np.arange(3), 3), EXACT.ravel().astype(int))
    known = measure(np.eye(3, dtype=np.float32)[said], labels, ["a", "b", "c"])
    found = rates(EXACT, 0.0, ["a", "b", "c"])
    assert found["accuracy"]["value"] == pytest.approx(known["accuracy"])
    for name in ("precision_macro", "recall_macro", "f1_macro"):
        assert found[name] == pytest.approx(known[name])
    for name, one in known["per_class"].items():
        for rate in ("precision", "recall", "f1"):
            assert found["per_class"][name][rate]["value"] == pytest.approx(one[rate])
    assert found["confusion"] == EXACT.tolist() and found["hidden"] == []


def test_the_standard_errors_are_those_of_drawn_matrices() -> None:
    """Units are drawn anew and noised anew, 4,000 times; what is said may be larger, by a fifth."""
    chance, noise, size = np.random.default_rng(1), 8.0, 20
    drawn = chance.multinomial(int(EXACT.sum()) * size, EXACT.ravel() / EXACT.sum(), 4000).reshape(-1, 3, 3)
    noised = drawn + chance.normal(0.0, noise, drawn.shape)
    said = rates(EXACT * size, noise, ["a", "b", "c"])
    made = [rates(one, noise, ["a", "b", "c"]) for one in noised]
    pairs = [(said["accuracy"], [one["accuracy"] for one in made])]
    for name in "abc":
        for rate in ("precision", "recall", "f1"):
            pairs.append((said["per_class"][name][rate], [one["per_class"][name][rate] for one in made]))
    for one, others in pairs:
        values = np.array([other["value"] for other in others])
        assert values.mean() == pytest.approx(one["value"], abs=0.01)
        assert 0.93 * values.std() <= one["standard_error"] <= 1.2 * values.std()


def test_what_the_noise_hides_is_not_told_and_the_means_are_of_the_others() -> None:
    cells = np.array([[9000.0, 10.0, -3.0], [20.0, 7000.0, 4.0], [-8.0, 2.0, 1.0]])
    found = rates(cells, 10.0, ["a", "b", "rare"])
    rare = found["per_class"]["rare"]
    assert rare["precision"] is rare["recall"] is rare["f1"] is None
    assert found["hidden"] == ["rare"]
    assert found["f1_macro"] == pytest.approx(
        np.mean([found["per_class"][name]["f1"]["value"] for name in "ab"])
    )
    nothing = rates(np.zeros((2, 2)), 10.0, ["a", "b"])
    assert nothing["accuracy"] is None and nothing["f1_macro"] is None
