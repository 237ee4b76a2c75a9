"""The noised counts of a private evaluation: their sensitivity, their noise, and what they cost."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import PrivacyError
from fedtune.privacy.mechanisms.confusion import BINS, ConfusionPlan, Votes
from fedtune.privacy.mechanisms.counts import EvaluationPlan
from fedtune.privacy.mechanisms.noise import Entropy

DELTA = 1e-5


def plan_of(**changes: object) -> ConfusionPlan:
    values: dict[str, object] = {
        "trust": "local", "unit": "person", "noise_multiplier": 4.0, "delta": DELTA, "classes": 3, **changes,
    }  # fmt: skip
    return ConfusionPlan(**values)  # type: ignore[arg-type]


@st.composite
def records(draw: st.DrawFn) -> Votes:
    n = draw(st.integers(1, 25))
    column = lambda most, least=0: np.array(  # noqa: E731
        draw(st.lists(st.integers(least, most), min_size=n, max_size=n)), dtype=np.int64
    )
    sure = np.array(draw(st.lists(st.floats(0.0, 1.0), min_size=n, max_size=n)))
    return Votes(column(1), column(1), sure, column(5), column(1, -1))


def part_of(votes: Votes, rows: np.ndarray) -> Votes:
    values = {name: value[rows] for name, value in vars(votes).items() if value is not None}
    return Votes(**values)


def by_hand(plan: ConfusionPlan, votes: Votes) -> dict[str, np.ndarray]:
    """The parts in units, one unit and one text after the other."""
    found = {part: np.zeros(shape) for part, shape in plan.shapes.items()}
    assert votes.persons is not None and votes.sites is not None
    owners = votes.persons if plan.unit == "person" else np.arange(len(votes.labels))
    for row, (label, said, sure, site) in enumerate(
        zip(votes.labels, votes.said, votes.probability, votes.sites, strict=True)
    ):
        weight = 1 / np.sum(owners == owners[row])
        place = min(int(sure * BINS), BINS - 1)
        found["confusion"][label, said] += weight
        found["bins"][label if plan.classes == 2 else int(label == said), place] += weight
        found["offsets"][place] += weight * (sure - (place + 0.5) / BINS) * 2 * BINS
        if site >= 0:
            found["sites"][site, int(label != said)] += weight
    return found


@pytest.mark.slow
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("unit", ["record", "person"])
@given(records())
def test_it_is_what_one_counts_by_hand(unit: str, classes: int, votes: Votes) -> None:
    plan = plan_of(unit=unit, classes=classes, sites=2)
    totals, hand = plan.totals(votes), by_hand(plan, votes)
    assert set(totals) == set(hand) == {"confusion", "bins", "offsets", "sites"}
    for part, total in totals.items():
        assert np.allclose(total / plan.steps(part), hand[part], atol=1e-4), part
    units = len(np.unique(votes.persons)) if unit == "person" else len(votes.labels)
    for part in ("confusion", "bins"):
        assert totals[part].sum() == units * plan.steps(part)  # not a step is lost


def moved(plan: ConfusionPlan, votes: Votes) -> float:
    """By how much taking any one unit away moves all that is released, in L2, as measured."""

    def whole(votes: Votes) -> np.ndarray:
        return np.concatenate([one.reshape(-1) for one in plan.totals(votes).values()])

    units = np.asarray(votes.persons if plan.unit == "person" else np.arange(len(votes.labels)))
    without = (whole(part_of(votes, units != one)) for one in np.unique(units))
    return max(float(np.linalg.norm(whole(votes) - other)) for other in without)


@pytest.mark.parametrize("unit", ["record", "person"])
@given(records())
def test_one_unit_moves_everything_together_by_one_vote_at_most(unit: str, votes: Votes) -> None:
    for sites in (0, 2):
        plan = plan_of(unit=unit, classes=2, sites=sites)
        assert moved(plan, votes) <= plan.scale


def alone(texts: int, probability: float = 1.0) -> Votes:
    """One person, all of whose texts lie in one cell of each part."""
    one = np.ones(texts, dtype=np.int64)
    return Votes(one, one, np.full(texts, probability), 7 * one, 0 * one)


def test_a_unit_in_one_cell_of_each_part_reaches_the_sensitivity() -> None:
    """So the bound is no smaller than it must be: a third of it less would be a broken promise."""
    plan = plan_of(classes=2, sites=1)
    assert (1 - 1e-5) * plan.scale <= moved(plan, alone(3)) <= plan.scale
    steps = [plan.steps(part) for part in plan.shapes]
    assert sum(one**2 for one in steps) <= plan.scale**2


def test_mutant_a_person_whose_texts_all_count_is_caught() -> None:
    class Unclipped(ConfusionPlan):
        """Counts texts and calls them persons."""

        def _weights(self, steps: int, texts: int, persons: np.ndarray | None) -> np.ndarray:
            return np.full(texts, steps, dtype=np.int64)

    assert moved(plan_of(classes=2), alone(50)) <= plan_of().scale
    assert moved(Unclipped(**dataclasses.asdict(plan_of(classes=2))), alone(50)) > 10 * plan_of().scale


@pytest.mark.parametrize("sites", [0, 1])
def test_mutant_every_part_with_the_whole_budget_is_caught(sites: int) -> None:
    class Whole(ConfusionPlan):
        """Forgets that the parts are one release."""

        def steps(self, part: str) -> int:
            return self.scale

    plan = plan_of(classes=2, sites=sites)
    assert moved(plan, alone(1)) <= plan.scale
    assert moved(Whole(**dataclasses.asdict(plan)), alone(1)) > 1.7 * plan.scale


def test_mutant_offsets_in_bins_instead_of_half_widths_are_caught() -> None:
    """An offset of 1 is the most that fits its steps: multiplied by 20 it would not."""

    class Far(ConfusionPlan):
        def totals(self, votes: Votes) -> dict[str, np.ndarray]:
            found = super().totals(votes)
            return {**found, "offsets": found["offsets"] * BINS}

    plan = plan_of(classes=2)
    assert moved(Far(**dataclasses.asdict(plan)), alone(1)) > 1.5 * plan.scale


def test_persons_must_be_known_where_they_are_protected() -> None:
    zero = np.array([0])
    with pytest.raises(PrivacyError, match="not known whose"):
        plan_of().totals(Votes(zero, zero, np.array([0.5])))


# --- noise and cost ------------------------------------------------------------------------------


NOBODY = Votes(*(np.zeros(0, dtype=np.int64) for _ in range(2)), np.zeros(0), np.zeros(0, dtype=np.int64))


def spread(plan: ConfusionPlan) -> dict[str, float]:
    """Of each part, the standard deviation of what is added to nobody: 900 cells or more."""
    entropy = Entropy.reproducible(1, "test", 0, 0)
    drawn = [plan.answer(NOBODY, entropy) for _ in range(100)]
    return {part: float(np.array([one[part] for one in drawn]).std()) for part in plan.shapes}


@pytest.mark.slow
def test_the_noise_is_what_is_accounted_in_every_part_and_two_thirds_of_it_is_noticed() -> None:
    plan = plan_of(sites=5)
    tolerance = 5.0 / math.sqrt(2 * 900)
    found = spread(plan)
    for part, value in found.items():
        assert abs(value / plan.noise_of(part) - 1.0) < tolerance
    # Together they are one Gaussian of the plan's multiplier: precisions add up.
    whole = sum(1 / plan.noise_of(part) ** 2 for part in plan.shapes) ** -0.5
    assert whole == pytest.approx(plan.noise_multiplier, rel=1e-3) and whole >= plan.noise_multiplier

    class Little(ConfusionPlan):
        @property
        def scale(self) -> int:
            return super().scale * 3 // 2

    mutant = Little(**dataclasses.asdict(plan))
    assert abs(spread(mutant)["confusion"] / plan.noise_of("confusion") - 1.0) > tolerance


def test_each_cell_has_noise_of_its_own_and_it_is_the_system_s() -> None:
    plan = plan_of()
    assert not plan.entropy("n").is_reproducible
    cells = plan.answer(NOBODY, plan.entropy("n"))
    assert len(np.unique(np.concatenate([one.reshape(-1) for one in cells.values()]))) == 9 + 3 * BINS
    again = plan.answer(NOBODY, plan.entropy("n"))
    assert not np.array_equal(cells["confusion"], again["confusion"])


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


@pytest.mark.slow
def test_what_is_observed_is_no_likelier_without_a_unit_than_epsilon_allows() -> None:
    """Independent of the accountant: the privacy loss of matrices with and without a person, drawn."""
    plan = plan_of(noise_multiplier=1.0, classes=2, sites=1)
    labels, said, persons = np.array([0, 0, 1]), np.array([0, 1, 1]), np.array([1, 1, 2])
    votes = Votes(labels, said, np.array([0.0, 0.6, 1.0]), persons, 0 * labels)

    def flat(parts: dict[str, np.ndarray]) -> np.ndarray:
        """In steps, in all of which the noise is the same."""
        whole = np.concatenate([plan.steps(part) * one.reshape(-1) for part, one in parts.items()])
        return whole / plan.scale

    def exact(votes: Votes) -> np.ndarray:
        return flat({part: one / plan.steps(part) for part, one in plan.totals(votes).items()})

    whole, less = exact(votes), exact(part_of(votes, np.array([2])))
    entropy = Entropy.reproducible(2, "test", 0, 0)
    drawn = np.array([flat(plan.answer(votes, entropy)) for _ in range(400)])
    apart = lambda centre: ((drawn - centre) ** 2).sum(axis=1) / (2 * plan.noise_std**2)  # noqa: E731
    loss = apart(less) - apart(whole)
    # Of a Gaussian with |whole - less| = mu standard deviations it is normal with mean mu^2 / 2.
    mu = float(np.linalg.norm(whole - less)) / plan.noise_std
    assert 0.6 < mu <= 1.0 / plan.noise_multiplier * (1 + 1e-3)
    assert loss.mean() == pytest.approx(mu**2 / 2, abs=5 * mu / math.sqrt(400))
    assert (loss > plan.epsilon()).sum() == 0  # one in a hundred thousand would be


def test_right_and_wrong_are_the_two_counts_of_a_run_s_evaluation() -> None:
    """The older mechanism, which counts right and wrong alone, is the check of the trace."""
    chance = np.random.default_rng(0)
    labels, said, persons = (chance.integers(0, top, 200) for top in (3, 3, 20))
    plan = plan_of()
    totals = plan.totals(Votes(labels, said, np.zeros(200), persons))["confusion"]
    two = EvaluationPlan(trust="local", unit="person", share=0.2, noise_multiplier=4.0, delta=DELTA)
    right = int(two.votes(labels == said, persons).sum(axis=0)[0])
    # A step of rounding a person and cell.
    assert np.trace(totals) / plan.steps("confusion") == pytest.approx(right / two.scale, abs=180 / two.scale)
