"""The audit acquits the right mechanism, and convicts each of the mutants: a test that can fail both ways."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedtune.audit.attack import audit_mechanism, audit_model
from fedtune.audit.canaries import GradientCanaries, canary_sum, one_shot_cosines, released_sum
from fedtune.errors import PrivacyError
from fedtune.privacy.plan import PrivacyPlan
from tests.support import audited_plans as plans
from tests.support.golden import Golden

DEFAULT = {"sample_rate": 0.05, "local_steps": 5, "num_rounds": 12, "noise_multiplier": 0.66}


def audited(plan: PrivacyPlan, canaries: int = 6000, claimed: float | None = None) -> object:
    return audit_mechanism(
        plan, plan.num_rounds, claimed=plan.epsilon() if claimed is None else claimed, canaries=canaries
    )


@pytest.mark.slow
def test_no_bound_exceeds_the_claim_of_the_right_mechanism_over_20_seeds() -> None:
    found = [audited(plans.local(seed=seed), canaries=3000) for seed in range(20)]
    assert not any(result.violated or result.understated for result in found)
    claim = found[0].claimed
    assert {bound.method for bound in found[0].bounds} == {"one-run", "two-sample", "curve"}
    # The attack is a real one: nearly half of the claim is shown, as a rule.
    assert np.median([result.best.epsilon_lower for result in found]) > 0.35 * claim


@pytest.mark.slow
@pytest.mark.parametrize("make", [plans.distributed, plans.central, lambda: plans.local(**DEFAULT)])
def test_the_other_right_mechanisms_are_acquitted_too(make: object) -> None:
    result = audited(make(), canaries=4000)
    assert 0.2 * result.claimed < result.best.epsilon_lower <= result.claimed


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [plans.HalfNoise, plans.NoClipping, plans.HeadNotNoised, plans.NoiseInTheFirstStepOnly],
)
def test_each_broken_mechanism_is_exposed(kind: type[PrivacyPlan]) -> None:
    result = audited(plans.mutated(plans.local(), kind))
    assert result.violated, result.bounds


@pytest.mark.slow
@pytest.mark.parametrize("kind", [plans.HalfNoise, plans.NoClipping, plans.HeadNotNoised])
def test_a_trusted_server_that_is_broken_is_exposed(kind: type[PrivacyPlan]) -> None:
    result = audited(plans.mutated(plans.central(), kind), canaries=4000)
    assert result.violated, result.bounds


@pytest.mark.slow
def test_correlated_noise_is_acquitted_and_its_mutants_are_exposed() -> None:
    plan = plans.correlated()
    right = audited(plan, canaries=4000)
    assert 0.2 * right.claimed < right.best.epsilon_lower <= right.claimed
    for kind in (plans.HalfNoise, plans.SensitivityOfOneRound):
        assert audited(plans.mutated(plan, kind), canaries=4000).violated
    assert right.estimate is not None
    assert right.estimate < 1.5 * right.claimed


def test_the_model_is_not_audited_under_correlated_noise(golden: Golden) -> None:
    from fedtune.config.schema import Config

    with pytest.raises(PrivacyError) as raised:
        audit_model(Config(), plans.correlated(), 3, claimed=1.0)
    assert "--model" in str(raised.value)
    golden(raised)


def test_default_settings_with_half_of_the_noise_are_exposed() -> None:
    """Epsilon 8 is more than any one pair of rates can break; the whole curve is broken all the same."""
    result = audited(plans.mutated(plans.local(**DEFAULT), plans.HalfNoise))
    curve = next(bound for bound in result.bounds if bound.method == "curve")
    assert curve.epsilon_lower > 1.5 * result.claimed


@pytest.mark.parametrize("kind", [plans.CyclicBatches, plans.FixedBatch])
def test_batches_that_are_not_poisson_are_exposed(kind: type[PrivacyPlan]) -> None:
    """With many steps at a low rate, where most of the claim rests on amplification."""
    plan = plans.local(sample_rate=0.05, local_steps=20, num_rounds=5, noise_multiplier=1.0)
    assert not audited(plan, canaries=12_000).violated
    result = audited(plans.mutated(plan, kind), canaries=12_000)
    assert result.violated, result.bounds


def test_an_accountant_that_is_reset_each_round_is_exposed() -> None:
    plan = plans.local(sample_rate=1.0, local_steps=1, num_rounds=10, noise_multiplier=2.0)
    result = audited(plan, claimed=plan.epsilon(1))
    assert result.violated and result.understated
    assert not audited(plan).violated


def test_noise_shares_that_do_not_add_up_are_exposed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of four nodes adds a quarter of the variance, but two of them cannot be counted on."""
    from fedtune.privacy.mechanisms import discrete

    right = discrete.DiscreteMechanism.for_plan.__func__

    def all_are_honest(cls: type, plan: PrivacyPlan, dimension: int) -> discrete.DiscreteMechanism:
        promised = right(cls, plan, dimension)
        everyone = cls.design(
            dimension=dimension,
            nodes=plan.nodes,
            shares=plan.nodes,
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.max_grad_norm,
            sample_rate=plan.sample_rate,
            expected_batch_size=plan.expected_batch_size(),
        )
        object.__setattr__(everyone, "shares", promised.shares)
        return everyone

    plan = plans.distributed(sample_rate=1.0)
    assert not audited(plan).violated
    monkeypatch.setattr(discrete.DiscreteMechanism, "for_plan", classmethod(all_are_honest))
    assert audited(plan).violated


def test_without_privacy_nearly_every_canary_is_found() -> None:
    plan = plans.local(trust="none", noise_multiplier=0.0, max_grad_norm=math.inf, delta=0.0,
                       reproducible_noise=False)  # fmt: skip
    result = audit_mechanism(plan, 2, claimed=None, canaries=2000)
    assert result.best.epsilon_lower > 4.0 and not result.violated
    assert result.to_json()["epsilon_claimed"] is None


def test_canaries_are_clipped_by_the_plan_and_drawn_by_it() -> None:
    plan = plans.local()
    placed = GradientCanaries.spread(100, 200, np.random.default_rng(0))
    total = canary_sum(plan, placed, placed.members[:3])
    assert np.flatnonzero(total).tolist() == sorted(placed.coordinates[placed.members[:3]].tolist())
    assert total.max() == pytest.approx(plan.max_grad_norm)
    assert not canary_sum(plan, placed, placed.members[:0]).any()


def test_distributed_sum_has_the_noise_that_may_be_counted_on() -> None:
    plan = plans.distributed(noise_multiplier=3.0)
    entropy = plan.entropy("audit", 1, 0)
    noise = released_sum(plan, np.zeros(4000), entropy)
    assert noise.std() == pytest.approx(3.0 * plan.max_grad_norm, rel=0.05)


def test_one_shot_estimate_is_near_the_claim_and_sees_half_noise() -> None:
    from fedtune.audit.bounds import epsilon_one_shot

    plan = plans.central(noise_multiplier=1.4)
    rng = np.random.default_rng(1)
    right = epsilon_one_shot(one_shot_cosines(plan, 2, 400, 8000, rng), 8000, plan.delta)
    wrong = epsilon_one_shot(
        one_shot_cosines(plans.mutated(plan, plans.HalfNoise), 2, 400, 8000, rng), 8000, plan.delta
    )
    assert 0.6 * plan.epsilon() < right < 1.6 * plan.epsilon()
    assert wrong > 1.6 * plan.epsilon()


@pytest.mark.slow
def test_adaptive_clipping_is_audited_with_its_moving_norm() -> None:
    plan = plans.central(adaptive_clipping=True, quantile_noise=50.0)
    result = audited(plan, canaries=2000)
    assert not result.violated and result.best.epsilon_lower > 0.25 * result.claimed


def test_result_says_what_it_is_and_is_json() -> None:
    import json

    result = audit_mechanism(plans.local(), 2, claimed=3.0, canaries=400, repeats=2, confidence=0.9)
    found = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert found["canaries"] == 400 and found["repeats"] == 2 and len(result.included) == 800
    assert found["delta"] == 1e-5 and found["adjacency"] == "add or remove one record"
    assert found["epsilon_lower"] == max(bound["epsilon_lower"] for bound in found["bounds"])
    # All bounds together are wrong with probability at most 0.1.
    assert sum(1.0 - bound["confidence"] for bound in found["bounds"]) <= 0.1 + 1e-12


@pytest.mark.parametrize(
    "changes", [{"canaries": 5}, {"repeats": 0}, {"confidence": 1.0}, {"confidence": 0.1}]
)
def test_numbers_that_allow_no_audit_are_refused(changes: dict[str, float], golden: Golden) -> None:
    with pytest.raises(PrivacyError):
        audit_mechanism(plans.local(), 2, claimed=3.0, **changes)
    with pytest.raises(PrivacyError) as raised:
        audit_mechanism(plans.local(), 0, claimed=3.0)
    golden(raised)
