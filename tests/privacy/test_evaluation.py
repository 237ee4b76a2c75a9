"""The noised counts of private evaluation: what they cost, their noise, and what they tell."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from fedtune.config.schema import Config, DataConfig, FederationConfig, PrivacyConfig, TrainConfig
from fedtune.errors import BudgetExhausted, PrivacyError
from fedtune.privacy.ledger.budget import PrivacyBudget
from fedtune.privacy.ledger.ledger import PrivacyLedger
from fedtune.privacy.mechanisms.counts import EvaluationPlan, estimate, evaluation_rounds
from fedtune.privacy.mechanisms.noise import Entropy
from fedtune.privacy.plan import PrivacyPlan, make_plan
from tests.support.events import epsilon_of
from tests.support.golden import Golden
from tests.support.plans import central_plan, event_of, local_plan, public_plan

DELTA = 1e-5


def about(**changes: object) -> EvaluationPlan:
    values: dict[str, object] = {
        "trust": "local", "unit": "record", "share": 0.2, "num_rounds": 3, "noise_multiplier": 4.0,
        "delta": DELTA, **changes,
    }  # fmt: skip
    return EvaluationPlan(**values)  # type: ignore[arg-type]


def asking(epsilon: float | None = 8.0, **changes: object) -> Config:
    trust = str(changes.pop("trust", "local"))
    given = changes.pop("noise_multiplier", None)
    settings: dict[str, object] = {
        "num_rounds": 10,
        "evaluation": "private",
        "evaluation_rounds": 2,
        **changes,
    }
    return Config(
        data=DataConfig(declared_size=1000),  # else sizes are noised, and paid for
        privacy=PrivacyConfig(trust=trust, epsilon=epsilon, noise_multiplier=given),  # type: ignore[arg-type]
        train=TrainConfig(sample_rate=0.1, local_steps=2),
        federation=FederationConfig(**settings),  # type: ignore[arg-type]
    )


# --- sensitivity ---------------------------------------------------------------------------------


def sensitivity(plan: EvaluationPlan, right: np.ndarray, persons: np.ndarray) -> float:
    """By how much taking any one unit away moves the two cells, in L2, as measured."""
    whole = plan.votes(right, persons).sum(axis=0)
    units = np.unique(persons) if plan.unit == "person" else np.arange(len(right))
    worst = 0.0
    for unit in units:
        keep = persons != unit if plan.unit == "person" else np.arange(len(right)) != unit
        moved = whole - plan.votes(right[keep], persons[keep]).sum(axis=0)
        worst = max(worst, float(np.linalg.norm(moved)))
    return worst


@pytest.mark.parametrize("unit", ["record", "person"])
def test_one_unit_more_or_less_moves_the_counts_by_the_sensitivity_at_most(unit: str) -> None:
    plan = about(unit=unit)
    chance = np.random.default_rng(0)
    for _ in range(20):
        n = int(chance.integers(1, 60))
        right = chance.random(n) < 0.7
        persons = chance.integers(0, 7, n)  # some of them with many texts
        assert sensitivity(plan, right, persons) <= plan.scale


def test_a_person_with_all_the_texts_counts_as_one() -> None:
    plan = about(unit="person")
    right = np.array([True] * 999 + [False])
    persons = np.zeros(1000, dtype=np.int64)
    votes = plan.votes(right, persons)
    assert votes.shape == (1, 2)
    assert votes.sum() == plan.scale
    assert votes[0, 0] / plan.scale == pytest.approx(0.999, abs=1e-6)


def test_mutant_a_person_whose_texts_all_count_is_caught() -> None:
    """What the bound is for: counting texts and calling it persons breaks the sensitivity above."""

    class Unbounded(EvaluationPlan):
        def votes(self, right: np.ndarray, persons: np.ndarray | None) -> np.ndarray:
            first = right.astype(np.int64) * self.scale
            return np.stack([first, self.scale - first], axis=1)

    plan = Unbounded(**dataclasses.asdict(about(unit="person")))
    right, persons = np.ones(50, dtype=bool), np.zeros(50, dtype=np.int64)
    assert sensitivity(about(unit="person"), right, persons) <= plan.scale
    assert sensitivity(plan, right, persons) > 10 * plan.scale


def test_persons_must_be_known_where_they_are_protected(golden: Golden) -> None:
    with pytest.raises(PrivacyError) as raised:
        about(unit="person").votes(np.ones(3, dtype=bool), None)
    golden(raised)


# --- noise ---------------------------------------------------------------------------------------


def spread(plan: EvaluationPlan, draws: int = 150) -> float:
    """Standard deviation of the noise in answers about nothing, over the sensitivity."""
    nobody = np.zeros(0, dtype=bool)
    entropy = Entropy.reproducible(1, "test", 0, 0)
    cells = np.array([plan.answer(nobody, nobody.astype(np.int64), entropy) for _ in range(draws)])
    return float(cells.std() / plan.scale)


def test_the_noise_is_what_is_accounted_and_half_of_it_is_noticed() -> None:
    noise = 4.0
    tolerance = 5.0 / math.sqrt(2 * 300)  # five standard errors of a standard deviation of 300 draws
    measured = spread(about(noise_multiplier=noise)) / noise
    assert abs(measured - 1.0) < tolerance

    class HalfScale(EvaluationPlan):
        """The mutant: half of the noise that is accounted."""

        @property
        def scale(self) -> int:
            return 2 * super().scale

    mutant = HalfScale(**dataclasses.asdict(about(noise_multiplier=noise)))
    assert abs(spread(mutant) / noise - 1.0) > tolerance


def test_the_multiplier_is_met_and_hardly_more() -> None:
    for noise in (0.1, 1.0, 4.0, 50.0, 900.0):
        plan = about(noise_multiplier=noise)
        effective = math.sqrt(2.0**48 - 16.0) / plan.scale
        assert noise <= effective <= noise * (1 + 1e-3)


def test_answers_are_whole_numbers_of_steps_and_system_noise_never_repeats() -> None:
    plan = about()
    assert not plan.entropy("n", 1, 1).is_reproducible
    right = np.ones(100, dtype=bool)
    answers = {plan.answer(right, None, plan.entropy("n", 1, 1)) for _ in range(20)}
    assert len(answers) == 20


def test_reproducible_noise_is_not_that_of_training() -> None:
    plan = local_plan(
        reproducible_noise=True, evaluation_share=0.2, evaluation_answers=1, evaluation_noise=2.0
    )
    evaluation = plan.evaluation()
    assert evaluation is not None
    same = evaluation.entropy("n", 1, 1).words(4), evaluation.entropy("n", 1, 1).words(4)
    assert np.array_equal(*same)
    assert not np.array_equal(same[0], plan.entropy("n", 1, 1).words(4))


def test_without_privacy_the_counts_are_exact() -> None:
    plan = about(trust="none", noise_multiplier=0.0, delta=0.0)
    right = np.array([True, True, False])
    cells = plan.answer(right, None, plan.entropy("n", 1, 1))
    assert (cells[0] / plan.scale, cells[1] / plan.scale) == (2.0, 1.0)
    assert plan.terms(1) is None
    assert plan.epsilon() == math.inf


# --- what it costs -------------------------------------------------------------------------------


def closed_form(noise: float, answers: int, epsilon: float) -> float:
    """delta of `answers` Gaussians of noise multiplier `noise` at `epsilon` (Balle and Wang 2018)."""
    mu = math.sqrt(answers) / noise

    def phi(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2.0))

    return phi(mu / 2 - epsilon / mu) - math.exp(epsilon) * phi(-mu / 2 - epsilon / mu)


@pytest.mark.parametrize(("noise", "answers"), [(4.0, 1), (4.0, 3), (1.0, 2), (20.0, 10)])
def test_epsilon_is_that_of_the_closed_form(noise: float, answers: int) -> None:
    epsilon = about(noise_multiplier=noise, num_rounds=answers).epsilon()
    assert closed_form(noise, answers, epsilon) <= DELTA  # never below the truth
    assert closed_form(noise, answers, 0.99 * epsilon) > DELTA  # and close to it


@pytest.mark.slow  # Opacus takes its time to be imported
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_epsilon_is_that_of_an_independent_accountant() -> None:
    """dp_accounting's own composition, and Opacus' for training and evaluation together."""
    import dp_accounting as dp
    from dp_accounting.pld import PLDAccountant
    from opacus.accountants import PRVAccountant

    plan = local_plan(
        noise_multiplier=0.9, num_rounds=4, evaluation_share=0.2, evaluation_answers=3, evaluation_noise=4.0
    )
    ours = plan.epsilon()
    theirs = PLDAccountant(value_discretization_interval=1e-3)
    step = dp.PoissonSampledDpEvent(plan.sample_rate, dp.GaussianDpEvent(plan.noise_multiplier))
    theirs.compose(dp.SelfComposedDpEvent(step, plan.steps()))
    theirs.compose(dp.SelfComposedDpEvent(dp.GaussianDpEvent(plan.evaluation_noise), 3))
    assert ours == pytest.approx(theirs.get_epsilon(plan.delta), rel=5e-3)

    opacus = PRVAccountant()
    opacus.history = [
        (plan.noise_multiplier, plan.sample_rate, plan.steps()),
        (plan.evaluation_noise, 1.0, 3),
    ]
    assert ours == pytest.approx(opacus.get_epsilon(plan.delta, eps_error=0.01), rel=0.02)


def test_answers_and_training_compose_and_neither_is_free() -> None:
    plan = local_plan(evaluation_share=0.2, evaluation_answers=3, evaluation_noise=4.0)
    training, both = plan.epsilon(12), plan.epsilon(12, 3)
    evaluation = plan.evaluation()
    assert evaluation is not None
    assert both == plan.epsilon()
    assert training < both < training + evaluation.epsilon()
    assert plan.epsilon(0, 3) == pytest.approx(evaluation.epsilon())
    assert epsilon_of(event_of(plan, 12, 3), plan.delta) == pytest.approx(both)
    assert plan.epsilon(12, 1) < both


def test_the_target_includes_the_evaluation() -> None:
    plan = make_plan(asking(epsilon=3.0), [1000, 800])
    evaluation = plan.evaluation()
    assert evaluation is not None
    assert 0.98 * 0.75 <= evaluation.epsilon() <= 0.75  # a quarter of 3
    assert 0.98 * 3.0 <= plan.epsilon() <= 3.0
    alone = make_plan(asking(epsilon=3.0, evaluation="public"), [1000, 800])
    assert plan.noise_multiplier > alone.noise_multiplier
    # Squares add up, so a quarter of epsilon is far from a quarter of the noise.
    assert plan.noise_multiplier < 1.06 * alone.noise_multiplier


def test_mutant_answers_that_are_not_charged_exceed_the_target() -> None:
    """Noise that was calibrated as if the answers were free breaks the promise once they are composed."""
    honest = make_plan(asking(epsilon=3.0, evaluation_epsilon=1.5), [1000])
    free = make_plan(asking(epsilon=3.0, evaluation="public"), [1000])
    mutant = dataclasses.replace(
        free,
        evaluation_share=honest.evaluation_share,
        evaluation_answers=honest.evaluation_answers,
        evaluation_noise=honest.evaluation_noise,
        delta=honest.delta,
    )
    assert honest.epsilon() <= 3.0
    assert mutant.epsilon() > 3.0


def test_delta_is_for_all_units_also_those_that_are_held_out() -> None:
    plan = make_plan(asking(evaluation_share=0.5), [5000])
    assert plan.delta == pytest.approx(10_000**-1.1)


def test_a_given_noise_needs_a_given_evaluation_epsilon() -> None:
    with pytest.raises(PrivacyError) as raised:
        make_plan(asking(epsilon=None, noise_multiplier=1.0), [1000])
    assert raised.value.setting == "federation.evaluation_epsilon" and raised.value.setting in str(
        raised.value
    )
    plan = make_plan(asking(epsilon=None, noise_multiplier=1.0, evaluation_epsilon=0.5), [1000])
    evaluation = plan.evaluation()
    assert evaluation is not None
    assert evaluation.epsilon() <= 0.5


def test_a_plan_with_answers_survives_json() -> None:
    plan = make_plan(asking(), [1000])
    assert PrivacyPlan.from_json(plan.to_json()) == plan
    assert plan.evaluation_answers == 2


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"evaluation_answers": 1, "evaluation_share": 0.0, "evaluation_noise": 1.0}, "evaluation_share"),
        ({"evaluation_answers": 1, "evaluation_share": 1.0, "evaluation_noise": 1.0}, "evaluation_share"),
        ({"evaluation_answers": 1, "evaluation_share": 0.2, "evaluation_noise": 0.0}, "evaluation_noise"),
        (
            {"evaluation_answers": 1, "evaluation_share": 0.2, "evaluation_noise": math.inf},
            "evaluation_noise",
        ),
        ({"evaluation_answers": True, "evaluation_share": 0.2, "evaluation_noise": 1.0}, "evaluation_rounds"),
        ({"evaluation_share": 0.2}, "without answers"),
        ({"evaluation_noise": 1.0}, "without answers"),
    ],
)
def test_settings_without_meaning_are_refused(changes: dict[str, object], word: str) -> None:
    with pytest.raises(PrivacyError) as raised:
        local_plan(**changes)
    assert word in str(raised.value)
    assert word == "without answers" or (raised.value.setting or "").rpartition(".")[2] == word


def test_trust_central_is_refused_and_none_has_no_noise(golden: Golden) -> None:
    with pytest.raises(PrivacyError, match="trust=central"):
        central_plan(evaluation_share=0.2, evaluation_answers=1, evaluation_noise=1.0)
    with pytest.raises(PrivacyError) as raised:
        public_plan(evaluation_share=0.2, evaluation_answers=1, evaluation_noise=1.0)
    golden(raised)
    assert public_plan(evaluation_share=0.2, evaluation_answers=1).terms(0, 1) is None


# --- the ledger ----------------------------------------------------------------------------------


def reserve(
    ledger: PrivacyLedger, plan: PrivacyPlan | EvaluationPlan, round: int = 1, run: str = "run"
) -> None:
    ledger.reserve(dataset="d", fingerprint="f", node="clinic", run=run, round=round, plan=plan)


@pytest.fixture
def both() -> tuple[PrivacyPlan, EvaluationPlan]:
    plan = local_plan(num_rounds=2, evaluation_share=0.2, evaluation_answers=1, evaluation_noise=2.0)
    evaluation = plan.evaluation()
    assert evaluation is not None
    return plan, evaluation


def test_the_ledger_charges_answers_and_composes_them(
    tmp_path: Path, both: tuple[PrivacyPlan, EvaluationPlan]
) -> None:
    plan, evaluation = both
    ledger = PrivacyLedger.open(tmp_path / "ledger.sqlite")
    reserve(ledger, plan)
    before = ledger.epsilon(dataset="d", fingerprint="f", delta=plan.delta)
    assert before == pytest.approx(plan.epsilon(1))
    reserve(ledger, evaluation)
    assert ledger.epsilon(dataset="d", fingerprint="f", delta=plan.delta) == pytest.approx(plan.epsilon(1, 1))
    assert [release.purpose for release in ledger.releases()] == ["training", "evaluation"]
    assert len(ledger.releases(run="run", purpose="training")) == 1
    assert ledger.verify() == (2, [])


def test_what_a_run_may_is_counted_for_each_purpose(
    tmp_path: Path, both: tuple[PrivacyPlan, EvaluationPlan]
) -> None:
    plan, evaluation = both
    ledger = PrivacyLedger.open(tmp_path / "ledger.sqlite")
    reserve(ledger, evaluation)
    with pytest.raises(BudgetExhausted, match=r"allows 1 answers about held-out data, and 1\s+were made"):
        reserve(ledger, evaluation, round=2)
    reserve(ledger, plan, round=1)
    reserve(ledger, plan, round=2)
    with pytest.raises(BudgetExhausted, match=r"allows 2 releases, and 2\s+were made"):
        reserve(ledger, plan, round=3)


def test_the_ledger_refuses_an_answer_over_the_budget(
    tmp_path: Path, both: tuple[PrivacyPlan, EvaluationPlan]
) -> None:
    plan, evaluation = both
    ledger = PrivacyLedger.open(tmp_path / "ledger.sqlite")
    # Enough for the training, and not for the answer.
    ledger.set_budget(PrivacyBudget(1.01 * plan.epsilon(2), plan.delta))
    reserve(ledger, plan, round=1)
    reserve(ledger, plan, round=2)
    spent = ledger.epsilon(dataset="d", fingerprint="f")
    with pytest.raises(
        BudgetExhausted, match=r"refuses the evaluation after round 2: it would raise epsilon"
    ):
        reserve(ledger, evaluation, round=2)
    assert ledger.epsilon(dataset="d", fingerprint="f") == spent


# --- what the counts tell ------------------------------------------------------------------------


def test_rounds_are_spread_and_the_last_is_always_among_them() -> None:
    assert evaluation_rounds(12, 1) == {12}
    assert evaluation_rounds(12, 3) == {4, 8, 12}
    assert evaluation_rounds(10, 4) == {3, 5, 8, 10}
    for rounds in range(1, 15):
        for answers in range(1, rounds + 1):
            chosen = evaluation_rounds(rounds, answers)
            assert len(chosen) == answers
            assert max(chosen) == rounds
            assert min(chosen) >= 1


def test_the_standard_error_covers_as_often_as_it_says() -> None:
    """Accuracy 0.8 on 300 units a node, three nodes, noise of 10 units: two errors around hold 95 percent."""
    chance = np.random.default_rng(5)
    truth, nodes, units, noise = 0.8, 3, 300, 10.0
    inside, errors = 0, []
    for _ in range(2000):
        hits = chance.binomial(units, truth, nodes)
        right = float((hits + chance.normal(0, noise, nodes)).sum())
        wrong = float((units - hits + chance.normal(0, noise, nodes)).sum())
        found = estimate(right, wrong, nodes, noise)
        assert found.accuracy is not None
        assert found.standard_error is not None
        errors.append(found.accuracy - truth)
        inside += abs(errors[-1]) <= 1.96 * found.standard_error
    assert abs(float(np.mean(errors))) < 0.005
    assert 0.92 < inside / 2000 < 0.985


def test_the_estimate_knows_when_it_knows_nothing() -> None:
    assert estimate(3.0, 1.0, 1, 10.0).accuracy is None
    assert estimate(-30.0, 10.0, 1, 1.0).accuracy is None
    assert estimate(0.0, 0.0, 1, 0.0).accuracy is None
    clamped = estimate(101.0, -1.0, 1, 1.0)
    assert clamped.accuracy == 1.0
    assert clamped.standard_error is not None
    assert clamped.standard_error > 0.0


def test_the_real_number_of_units_is_nowhere_in_the_estimate() -> None:
    """The divisor is the noised count: the same answers give the same estimate whatever was held out."""
    assert estimate(80.0, 20.0, 1, 2.0).units == 100.0
