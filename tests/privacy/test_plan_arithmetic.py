"""A plan's defaults, its limits on both sides, and what it computes, recomputed by hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import dp_accounting as dp
import numpy as np
import pytest

from fedtune.errors import PrivacyError, SeparationError
from fedtune.privacy.accounting.epsilon import Term
from fedtune.privacy.checks import number, whole
from fedtune.privacy.clipping import clip_factors
from fedtune.privacy.mechanisms.central import Central
from fedtune.privacy.mechanisms.counts import EvaluationPlan
from fedtune.privacy.mechanisms.distributed import Distributed
from fedtune.privacy.mechanisms.noise import Entropy
from fedtune.privacy.mechanisms.registry import MECHANISMS, mechanism_from_json
from fedtune.privacy.plan import PrivacyPlan
from tests.support.golden import Golden
from tests.support.plans import central_plan, distributed_plan, event_of, local_plan, plan_of, public_plan


def ftrl(**changes: Any) -> PrivacyPlan:
    values = {"method": "dp_ftrl", "num_rounds": 40, "bands": 10, "min_separation": 10, "cohort_size": 20}
    return central_plan(**{**values, **changes})


def test_what_is_not_said_is_harmless() -> None:
    plan = local_plan()
    said = {
        "trust", "unit", "sample_rate", "local_steps", "num_rounds", "noise_multiplier", "max_grad_norm",
        "declared_size", "delta",
    }  # fmt: skip
    rest = {k: v for k, v in plan.settings().items() if k not in said}
    assert rest == {
        "records_per_unit": 1, "target_epsilon": None, "reproducible_noise": False, "seed": 0,
        "weighting": "uniform", "nodes": 1, "evaluation_share": 0.0, "evaluation_answers": 0,
        "evaluation_noise": 0.0, "size_noise": 0.0, "head_norm": 0.0, "head_share": 0.0,
        "head_rounds": 0,
        "centre_rounds": 0,
    }  # fmt: skip
    assert Distributed(sample_rate=0.5) == Distributed(sample_rate=0.5, max_dropouts=0, max_colluders=0)
    assert Central() == Central(
        cohort_size=1, training_sample_rate=1.0, training_steps=1, adaptive_clipping=False,
        clip_quantile=0.5, quantile_noise=0.0, method="gaussian", bands=1, min_separation=1,
    )  # fmt: skip
    assert plan.purpose == "training"


@pytest.mark.parametrize(
    "make",
    [
        lambda: local_plan(sample_rate=1.0),
        lambda: local_plan(local_steps=1, num_rounds=1, declared_size=2, delta=0.49),
        lambda: local_plan(delta=math.nextafter(1e-3, 0.0)),
        lambda: local_plan(seed=-3),
        lambda: central_plan(clip_quantile=1e-9),
        lambda: local_plan(target_epsilon=1e-9),
        lambda: local_plan(max_grad_norm=1e-20),
        lambda: central_plan(cohort_size=200),
        lambda: central_plan(adaptive_clipping=True, quantile_noise=math.nextafter(0.5, 1.0)),
        lambda: ftrl(num_rounds=10, cohort_size=20),
        lambda: ftrl(num_rounds=10, bands=10, min_separation=2),
        lambda: distributed_plan(max_dropouts=3 - 1),
        lambda: local_plan(evaluation_answers=1, evaluation_share=0.9, evaluation_noise=1e-6),
        lambda: public_plan(evaluation_answers=1, evaluation_share=0.001),
        lambda: public_plan(weighting="declared", local_steps=7),
        lambda: local_plan(size_noise=1e-9),
        lambda: distributed_plan(size_noise=20.0),
    ],
)
def test_the_last_value_that_is_allowed(make: Callable[[], PrivacyPlan]) -> None:
    make()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: central_plan(training_sample_rate=0.0), r"^train.sample_rate is a probability in \(0, 1\]"),
        (lambda: central_plan(training_sample_rate=1.1), r"^train.sample_rate is a probability in \(0, 1\]"),
        (lambda: local_plan(sample_rate=0.0), r"^train.sample_rate is a probability in \(0, 1\]"),
        (lambda: local_plan(noise_multiplier=math.nan), "^privacy.noise_multiplier must be a number"),
        (lambda: local_plan(max_grad_norm=math.nan), "^privacy.max_grad_norm must be a number"),
        (lambda: local_plan(delta=math.nan), "^privacy.delta must be a number"),
        (lambda: local_plan(target_epsilon=math.nan), "^privacy.epsilon must be a number"),
        (lambda: central_plan(clip_quantile=math.nan), "^privacy.clip_quantile must be a number"),
        (lambda: local_plan(evaluation_share=math.nan), "^federation.evaluation_share must be a number"),
        (lambda: local_plan(evaluation_noise=math.nan), "^evaluation_noise "),
        (
            lambda: local_plan(evaluation_answers=-1),
            "^federation.evaluation_rounds must be a whole number of 0",
        ),
        (lambda: local_plan(size_noise=math.nan), "^size_noise must be a number"),
        (lambda: local_plan(size_noise=-1e-9), "^size_noise must be finite and 0 or more"),
        (lambda: local_plan(size_noise=math.inf), "^size_noise must be finite and 0 or more"),
        (lambda: central_plan(size_noise=20.0), "A plan with trust=central has sizes told with noise"),
        (lambda: central_plan(training_steps=0), "training_steps must be a whole number of 1 or more"),
        (
            lambda: distributed_plan(max_dropouts=-1),
            "privacy.max_dropouts must be a whole number of 0 or more",
        ),
        (
            lambda: distributed_plan(max_colluders=-1),
            "privacy.max_colluders must be a whole number of 0 or more",
        ),
        (lambda: local_plan(delta=1e-3), "is not below 1/n = 0.001, with n = 1000 units"),
        (lambda: local_plan(delta=1.0), "strictly between 0 and 1"),
        (lambda: central_plan(bands=0), "privacy.bands must be a whole"),
        (lambda: central_plan(min_separation=0), "privacy.min_separation must be a whole"),
        (lambda: central_plan(bands=2), "are settings of privacy.mechanism=dp_ftrl"),
        (lambda: central_plan(method="tree"), "privacy.mechanism must be one of gaussian, dp_ftrl"),
        (lambda: central_plan(quantile_noise=math.nan), "^quantile_noise must be a number"),
        (lambda: public_plan(delta=1e-9), "promises what nothing keeps"),
        (lambda: public_plan(target_epsilon=3.0), "promises what nothing keeps"),
        (lambda: public_plan(noise_multiplier=1e-9), "promises what nothing keeps"),
        (lambda: public_plan(evaluation_share=0.1), "without answers"),
        (lambda: central_plan(cohort_size=201), "cohort_size=201 is more than the 200 clients"),
        (lambda: central_plan(unit="record"), "cannot protect privacy.unit=record"),
        (lambda: local_plan(unit="client"), "cannot protect privacy.unit=client"),
        (lambda: central_plan(adaptive_clipping=True, quantile_noise=0.5), "must be above 0.5"),
        (lambda: ftrl(num_rounds=9, bands=9), "min_separation=10 is more than federation.num_rounds=9"),
        (lambda: ftrl(num_rounds=9, min_separation=9), "bands=10 is more than federation.num_rounds=9"),
        (lambda: ftrl(cohort_size=21), "ask for 210 clients to fill every round, and there are 200"),
        (lambda: ftrl(adaptive_clipping=True, quantile_noise=3.0), "does not fit privacy.mechanism=dp_ftrl"),
        (
            lambda: local_plan(evaluation_answers=1, evaluation_share=0.5),
            "evaluation_noise must be finite and above 0, not 0.0",
        ),
        (
            lambda: public_plan(evaluation_answers=1, evaluation_share=0.5, evaluation_noise=1.0),
            "trust=none has no noise; evaluation_noise is 1.0",
        ),
        (lambda: local_plan(evaluation_noise=1.0), "evaluation_share of 0 and an evaluation_noise of 1"),
    ],
)
def test_the_first_value_that_is_not(make: Callable[[], PrivacyPlan], said: str) -> None:
    with pytest.raises(PrivacyError, match=said):
        make()


@pytest.mark.parametrize(
    ("trust", "settings"),
    [
        ("distributed", {"sample_rate": 0.1, "local_steps": 2}), ("central", {"local_steps": 2}),
        ("distributed", {"sample_rate": 0.1, "weighting": "uniform"}), ("central", {"weighting": "uniform"}),
        ("local", {"sample_rate": 0.1, "local_steps": 1, "adaptive_clipping": True}),
        ("local", {"sample_rate": 0.1, "local_steps": 1, "method": "dp_ftrl"}),
    ],
)  # fmt: skip
def test_a_mechanism_has_no_setting_of_another(trust: str, settings: dict[str, Any], golden: Golden) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        MECHANISMS[trust](**settings)
    with pytest.raises(PrivacyError) as raised:
        mechanism_from_json({"trust": trust, **settings})
    golden(raised)


def test_a_large_delta_among_few_clients_gets_advice_and_among_records_none() -> None:
    with pytest.raises(PrivacyError, match="With 5 clients a delta below 0.2"):
        central_plan(declared_size=5, cohort_size=5, delta=0.3)
    with pytest.raises(PrivacyError, match=r"leave it out\.$"):
        local_plan(declared_size=5, delta=0.3)


def test_numbers_and_counts() -> None:
    assert (number(3, "x"), number(math.inf, "x")) == (3.0, math.inf) and isinstance(number(3, "x"), float)
    assert whole(np.int64(3), "n") == 3 and type(whole(np.int64(3), "n")) is int
    assert whole(0, "n", 0) == 0
    for value, least in ((0, 1), (True, 1), (1.0, 1), (None, 1), (-1, 0), (6, 7)):
        with pytest.raises(PrivacyError, match=f"n must be a whole number of {least} or more"):
            whole(value, "n", least)


# --- what it computes --------------------------------------------------------------------------------


def test_factors_are_the_bound_over_the_norm() -> None:
    plan = local_plan(max_grad_norm=0.5)
    found = plan.clip_factors([0.0, 0.25, 0.5, 0.6, 5.0, 1e289, 1e291, math.inf, math.nan, -math.inf])
    assert found.tolist() == [1.0, 1.0, 1.0, 0.5 / 0.6, 0.1, 0.5 / 1e289, 0.0, 0.0, 0.0, 0.0]
    assert plan.clip_factors(5e-324).tolist() == 1.0
    assert clip_factors(1.0, 1e-290).tolist() == 1e-290  # the last one


def test_an_average_lies_on_the_grid_of_its_noise() -> None:
    plan = local_plan(noise_multiplier=3.0, max_grad_norm=0.5)  # noise of 1.5: between 1 and 2
    values = np.random.default_rng(0).normal(size=50)
    averaged = plan.average(values)
    steps = averaged * 50.0 * 2.0**30
    assert np.array_equal(np.round(steps), steps.round(6)) and not np.array_equal(averaged, values / 50.0)
    assert averaged == pytest.approx(values / 50.0, abs=2.0**-30 / 50.0)


def test_noise_and_samples_are_those_of_the_given_entropy() -> None:
    plan = local_plan(noise_multiplier=3.0, max_grad_norm=0.5)
    assert plan.noise_std() == 1.5
    one, two = (Entropy.reproducible(1, "n", 2, 3) for _ in range(2))
    assert np.array_equal(plan.noise(5, one), two.gaussian(5, 1.5))
    one, two = (Entropy.reproducible(1, "n", 2, 3) for _ in range(2))
    drawn = plan.sample(500, one)
    assert drawn.tolist() == np.flatnonzero(two.bernoulli(500, 0.05)).tolist() and drawn.dtype == np.int64


def test_reproducible_draws_belong_to_seed_node_round_and_repetition() -> None:
    plan = local_plan(reproducible_noise=True, seed=4)
    for repetition in (0, 7):
        same = Entropy.reproducible(4, "n", 2, repetition).words(3)
        assert np.array_equal(plan.entropy("n", 2, repetition).words(3), same)
    assert np.array_equal(plan.entropy("n", 2).words(3), Entropy.reproducible(4, "n", 2, 0).words(3))
    assert np.array_equal(public_plan().entropy("n", 2).words(3), Entropy.reproducible(0, "n", 2, 0).words(3))


def test_steps_and_batches() -> None:
    plan = local_plan(local_steps=5, num_rounds=12)
    assert (plan.steps(), plan.steps(0), plan.steps(3)) == (60, 0, 15)
    assert plan.expected_batch_size() == 50.0
    assert central_plan().expected_batch_size() == 20.0 and isinstance(
        central_plan().expected_batch_size(), float
    )


def answering(**changes: Any) -> PrivacyPlan:
    return local_plan(evaluation_share=0.2, evaluation_answers=3, evaluation_noise=4.0, **changes)


def test_answers_obey_the_plan_in_everything() -> None:
    assert local_plan().evaluation() is None
    plan = answering(reproducible_noise=True, seed=9)
    assert plan.evaluation() == EvaluationPlan(
        trust="local", unit="record", share=0.2, num_rounds=3, noise_multiplier=4.0, delta=1e-5,
        reproducible_noise=True, seed=9,
    )  # fmt: skip


def test_terms_and_events_of_rounds_and_answers() -> None:
    plan = answering()
    assert plan.terms(2, 1) == {Term(0.05, 1.0): 10, Term(1.0, 4.0): 1}
    assert plan.terms(0, 2) == {Term(1.0, 4.0): 2} and plan.terms(2) == {Term(0.05, 1.0): 10}
    event = event_of(plan, 2, 1)
    assert isinstance(event, dp.ComposedDpEvent) and len(event.events) == 2
    assert event.events == [
        dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(0.05, dp.GaussianDpEvent(1.0)), 10),
        dp.SelfComposedDpEvent(dp.GaussianDpEvent(4.0), 1),
    ]
    assert event_of(plan, 2) == event.events[0]
    assert plan.epsilon(2) < plan.epsilon(2, 1) < plan.epsilon() == plan.epsilon(12, 3)
    for releases in (-1, True):
        with pytest.raises(PrivacyError, match="releases must be 0 or more"):
            plan.terms(releases)


def test_terms_of_correlated_noise_depend_on_what_came_before() -> None:
    plan = ftrl(bands=20)
    root = plan.root()
    assert root is not None and (root.num_rounds, root.bands, root.min_separation) == (40, 20, 10)
    assert plan.terms(1, after=2) == root.terms(1.0, 1, 2) != plan.terms(1)
    assert central_plan().root() is None
    assert plan.update_noise_multiplier() == root.sensitivity()
    assert plan.noise_std() == root.sensitivity()


def test_adaptive_clipping_moves_the_norm_by_the_noised_share(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = central_plan(
        adaptive_clipping=True, quantile_noise=2.0, cohort_size=4, max_grad_norm=1.5, clip_quantile=0.7,
        reproducible_noise=True,
    )  # fmt: skip
    spread = (1.0**-2 - 4.0**-2) ** -0.5
    assert plan.update_noise_multiplier() == pytest.approx(spread)

    class Known(Entropy):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def gaussian(self, size: int, std: float) -> np.ndarray:
            assert (size, std) == (1, 2.0)
            return np.array([self.value])

    norms = [0.0, 1.5, 1.6, 0.2, math.nan]  # votes: 0, +, -, +, -
    for noise, fraction in ((0.0, 0.5), (0.4, 0.6), (99.0, 1.0), (-99.0, 0.0)):
        moved = plan.adapt_clip(norms, Known(noise)).max_grad_norm
        assert moved == pytest.approx(1.5 * math.exp(-0.2 * (fraction - 0.7)), rel=1e-12)
    faster = plan.adapt_clip(norms, Known(0.0), learning_rate=1.0).max_grad_norm
    assert faster == pytest.approx(1.5 * math.exp(0.2), rel=1e-12)
    assert central_plan().adapt_clip(norms, Known(0.0)) == central_plan()


def test_a_client_of_a_trusted_server_trains_without_privacy() -> None:
    plan = central_plan(seed=3, num_rounds=7)
    assert plan.training_plan(500) == plan_of(
        "none", unit="record", sample_rate=0.05, local_steps=5, num_rounds=7, noise_multiplier=0.0,
        max_grad_norm=math.inf, declared_size=500, delta=0.0, seed=3,
    )  # fmt: skip
    for make in (central_plan, distributed_plan, local_plan, public_plan):
        with pytest.raises(PrivacyError, match="^declared_size must be") as raised:
            make().for_shard(0)
        assert raised.value.setting == "declared_size"
    with pytest.raises(PrivacyError, match="^declared_size must be") as raised:
        plan.training_plan(0)
    assert raised.value.setting == "declared_size"
    assert central_plan().for_shard(3) == central_plan()
    assert public_plan().for_shard(3).declared_size == 3


def test_neighbours_are_said_in_words() -> None:
    assert local_plan().adjacency() == "add or remove one record"
    assert local_plan(unit="person").adjacency() == "add or remove one person"
    assert central_plan().adjacency().startswith("replace all that one client holds by nothing")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: local_plan(), []),
        # not by epsilon alone (3.6 and 26 here): by what an attacker may recognise
        (lambda: local_plan(noise_multiplier=0.9, target_epsilon=99.0), []),
        (lambda: local_plan(noise_multiplier=0.4), ["A weak protection at best, epsilon "]),
        (lambda: local_plan(noise_multiplier=8.0, delta=9e-4), []),
        (lambda: local_plan(reproducible_noise=True), ["Noise comes from `seed`"]),
        (lambda: central_plan(declared_size=100, noise_multiplier=4.0), []),
        (
            lambda: central_plan(declared_size=99, noise_multiplier=4.0),
            ["With 99 clients no client hides among many"],
        ),
        (lambda: local_plan(declared_size=99), []),
        (lambda: ftrl(), []),
        (lambda: ftrl(bands=1), ["dp_ftrl with 1 bands"]),
    ],
)
def test_cautions_are_given_where_they_are_due(make: Callable[[], PrivacyPlan], words: list[str]) -> None:
    found = make().cautions()
    assert len(found) == len(words)
    assert all(text.startswith(start) for text, start in zip(found, words, strict=True))


def test_the_most_units_are_those_held_out_too_and_what_noise_may_hide() -> None:
    assert local_plan().most_units() == 1000.0
    held = local_plan(evaluation_share=0.2, evaluation_answers=1, evaluation_noise=4.0)
    assert held.most_units() == pytest.approx(1000.0 / 0.8)
    assert local_plan(size_noise=20.0, nodes=9).most_units() == pytest.approx(1000.0 + 5 * 20.0)
    assert distributed_plan(size_noise=20.0, nodes=9).most_units() == pytest.approx(1000.0 + 5 * 20.0 * 3)


def test_a_round_too_soon_names_node_and_run() -> None:
    ftrl().check_round("clinic", "run-7", 20, [1])
    central_plan().check_round("clinic", "run-7", 2, [1])
    with pytest.raises(SeparationError, match="node 'clinic' refuses round 5 of run 'run-7'"):
        ftrl().check_round("clinic", "run-7", 5, [1])


def test_towards_the_server_the_shares_of_all_that_arrive_count() -> None:
    plan = distributed_plan(nodes=6, max_dropouts=2, noise_multiplier=0.9)
    assert plan.mechanism.honest_shares(plan) == 3
    towards = dataclasses.replace(plan, noise_multiplier=0.9 * math.sqrt(4 / 3)).epsilon()
    assert plan.epsilon_towards_server() == pytest.approx(towards, rel=1e-6) and towards < plan.epsilon()


def test_the_quantile_is_paid_for_at_any_noise() -> None:
    plan = central_plan(adaptive_clipping=True, noise_multiplier=0.8, quantile_noise=1.5)
    assert plan.update_noise_multiplier() == pytest.approx((0.8**-2 - 3.0**-2) ** -0.5, rel=1e-12)
