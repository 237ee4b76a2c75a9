"""What an evaluation plan computes, recomputed by hand: votes, noise, cost, the estimate and its error."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from fedtune.config.schema import Config
from fedtune.errors import CalibrationError, PrivacyError
from fedtune.privacy.accounting.calibration import noise_multiplier_for
from fedtune.privacy.accounting.epsilon import Term, epsilon_of_terms
from fedtune.privacy.mechanisms import counts as evaluation
from fedtune.privacy.mechanisms.counts import (
    EvaluationPlan,
    estimate,
    evaluation_epsilon,
    evaluation_noise,
    evaluation_rounds,
    evaluation_settings,
)
from fedtune.privacy.mechanisms.noise import Entropy, discrete_gaussian
from tests.support.golden import Golden


def about(**changes: Any) -> EvaluationPlan:
    values: dict[str, Any] = {
        "trust": "local", "unit": "record", "share": 0.2, "num_rounds": 3, "noise_multiplier": 4.0,
        "delta": 1e-5, **changes,
    }  # fmt: skip
    return EvaluationPlan(**values)


@pytest.mark.parametrize("noise", [0.3, 1.0, 4.0, 77.7])
def test_a_vote_has_as_many_steps_as_the_noise_covers(noise: float) -> None:
    plan = about(noise_multiplier=noise)
    exact = math.sqrt(2**48 - 16) / noise
    assert plan.scale == math.floor(exact * (1 - 1e-12)) and isinstance(plan.scale, int)
    assert plan.scale <= exact
    assert plan.noise_std == 2**24 / plan.scale


def test_without_privacy_there_is_no_noise_and_no_cost() -> None:
    plan = about(trust="none", noise_multiplier=0.0)
    assert (plan.scale, plan.noise_std) == (2**24, 0.0)
    assert (plan.terms(2), plan.terms(0)) == (None, {})
    assert not plan.is_private() and about().is_private()
    same = Entropy.reproducible(0, "n/evaluation", 2, 3).words(4)
    assert np.array_equal(plan.entropy("n", 2, 3).words(4), same)


def test_answers_cost_one_gaussian_each() -> None:
    plan = about()
    assert plan.purpose == "evaluation" and not plan.reproducible_noise
    assert plan.terms(2, after=7) == {Term(1.0, 4.0): 2}
    assert plan.terms(1) == {Term(1.0, 4.0): 1} and plan.terms(0) == {}
    assert plan.epsilon(2) == pytest.approx(epsilon_of_terms({Term(1.0, 4.0): 2}, 1e-5))
    assert plan.epsilon(0) == 0.0
    assert plan.epsilon() == plan.epsilon(3) > plan.epsilon(2)


def test_reproducible_noise_belongs_to_seed_node_round_and_attempt() -> None:
    plan = about(reproducible_noise=True, seed=5)
    same = Entropy.reproducible(5, "n/evaluation", 2, 3).words(4)
    assert np.array_equal(plan.entropy("n", 2, 3).words(4), same)
    assert not about(seed=5).entropy("n", 2, 3).is_reproducible


def test_votes_of_records_and_of_persons(golden: Golden) -> None:
    plan = about()
    right = np.array([True, False, True, True, False])
    whole = plan.scale
    assert plan.votes(right, None).tolist() == [[whole if r else 0, 0 if r else whole] for r in right]
    persons = np.array([7, 7, 7, 2, 9])
    shared = dataclasses.replace(plan, unit="person").votes(right, persons)
    # In the order of their names: 2, 7, 9.
    assert shared.tolist() == [[whole, 0], [2 * whole // 3, whole - 2 * whole // 3], [0, whole]]
    with pytest.raises(PrivacyError) as raised:
        dataclasses.replace(plan, unit="person").votes(right, persons[:4])
    golden(raised)


def test_an_answer_is_the_sum_of_votes_and_exact_noise() -> None:
    plan = about()
    right = np.array([True, False, True])
    answer = plan.answer(right, None, Entropy.reproducible(1, "n", 0, 0))
    noise = discrete_gaussian(2, 24, Entropy.reproducible(1, "n", 0, 0))
    assert answer == (2 * plan.scale + int(noise[0]), plan.scale + int(noise[1]))
    assert [type(part) for part in answer] == [int, int]
    public = dataclasses.replace(plan, trust="none", noise_multiplier=0.0)
    assert public.answer(right, None, Entropy.reproducible(1, "n", 0, 0)) == (2 * 2**24, 2**24)


@pytest.mark.parametrize(
    ("right", "wrong", "answers", "noise"),
    [
        (80.0, 20.0, 1, 3.0),
        (50.0, 70.0, 4, 2.0),
        (120.0, -5.0, 2, 1.5),
        (-3.0, 90.0, 1, 1.0),
        (3.0, 1.0, 1, 0.0),
    ],
)
def test_the_estimate_is_the_share_and_its_error_that_of_noise_and_numbers(
    right: float, wrong: float, answers: int, noise: float
) -> None:
    found = estimate(right, wrong, answers, noise)
    n = right + wrong
    p = min(max(right / n, 0.0), 1.0)
    middle = (p * n + 2) / (n + 4)  # Agresti and Coull (1998)
    variance = answers * noise**2 / n**2 * (p**2 + (1 - p) ** 2) + middle * (1 - middle) / n
    assert found.accuracy == p and found.units == n
    assert found.standard_error == pytest.approx(math.sqrt(variance), rel=1e-12)


def test_accuracy_is_known_from_four_standard_deviations_on() -> None:
    least = 4.0 * (2.5 * math.sqrt(3)) * math.sqrt(2.0)  # of the sum of both cells over three answers
    assert estimate(least, 0.0, 3, 2.5).accuracy == 1.0
    hidden = estimate(np.nextafter(least, 0.0), 0.0, 3, 2.5)
    assert hidden.accuracy is hidden.standard_error is None and hidden.units < least
    assert estimate(-1e-9, 0.0, 1, 0.0).accuracy is None
    assert estimate(0.25, 0.25, 1, 0.0).accuracy == 0.5


def asking(epsilon: float | None = 8.0, **changes: Any) -> Config:
    config = Config()
    config.privacy.epsilon = epsilon
    config.federation.num_rounds = 10
    for name, value in {"evaluation": "private", "evaluation_rounds": 2, **changes}.items():
        setattr(config.federation, name, value)
    return config


def test_settings_of_an_evaluation_that_is_not_private_are_nothing() -> None:
    assert evaluation_settings(asking(evaluation="public", evaluation_share=0.3)) == (0.0, 0)
    assert evaluation_settings(asking(evaluation="none")) == (0.0, 0)
    chosen = asking(evaluation="auto", evaluation_share=0.3)  # of private data: private
    assert evaluation_settings(chosen) == (0.3, 2)
    chosen.data.public = True
    assert evaluation_settings(chosen) == (0.0, 0)
    assert evaluation_settings(asking(evaluation_share=0.3)) == (0.3, 2)
    assert evaluation_settings(asking(evaluation_share=0.3, evaluation_rounds=12)) == (0.3, 10)


def test_rounds_of_answers_are_the_ends_of_equal_parts() -> None:
    for rounds, answers in ((10, 4), (7, 3), (5, 5), (9, 1)):
        ends = {math.ceil(i * rounds / answers) for i in range(1, answers + 1)}
        assert evaluation_rounds(rounds, answers) == ends


def test_answers_may_cost_a_quarter_or_what_is_set(golden: Golden) -> None:
    assert evaluation_epsilon(asking(8.0)) == 2.0
    assert evaluation_epsilon(asking(8.0, evaluation_epsilon=3.0)) == 3.0
    assert evaluation_epsilon(asking(None, evaluation_epsilon=3.0)) == 3.0
    with pytest.raises(PrivacyError) as raised:
        evaluation_epsilon(asking(None))
    golden(raised)
    for all_of_it in (8.0, 9.0):
        with pytest.raises(PrivacyError) as raised:
            evaluation_epsilon(asking(8.0, evaluation_epsilon=all_of_it))
        assert "privacy.epsilon=8" in str(raised.value)
        golden(raised)


def test_the_noise_of_answers_is_calibrated_without_sampling() -> None:
    config = asking(8.0, evaluation_epsilon=1.5)
    assert evaluation_noise(config, 1e-5, 3) == noise_multiplier_for(1.5, 1e-5, sample_rate=1.0, steps=3)


def test_answers_that_no_noise_allows_are_refused_in_their_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **settings: object) -> float:
        raise CalibrationError("of training")

    monkeypatch.setattr(evaluation, "noise_multiplier_for", refuse)
    for asked, words, setting in (
        ({}, "may cost epsilon 2, a quarter of privacy.epsilon=8. of training", "privacy.epsilon"),
        ({"evaluation_epsilon": 3.0}, "epsilon 3, as set. of training", "federation.evaluation_epsilon"),
    ):
        with pytest.raises(CalibrationError, match=words) as raised:
            evaluation_noise(asking(8.0, **asked), 1e-5, 3)
        assert raised.value.setting == setting
        assert "federation.evaluation=none" in str(raised.value)
