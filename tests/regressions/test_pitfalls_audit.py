"""PITFALLS as an auditor sees them: each bug switched on, and found in what is published.

Other files of this folder show that the design does not have them. Here the plan has them, and claims what
it claimed before; `tests/audit/test_mechanism.py` shows that the right plan is acquitted.
"""

from __future__ import annotations

import pytest

from fedtune.audit.attack import AuditResult, audit_mechanism
from fedtune.privacy.plan import PrivacyPlan
from tests.support import audited_plans as plans


def attacked(plan: PrivacyPlan, claimed: float, canaries: int = 6000) -> AuditResult:
    return audit_mechanism(plan, plan.num_rounds, claimed=claimed, canaries=canaries)


@pytest.mark.parametrize("kind", [plans.CyclicBatches, plans.FixedBatch])
def test_01_batches_that_are_cyclic_or_fixed_under_poisson_accounting(kind: type[PrivacyPlan]) -> None:
    plan = plans.local(sample_rate=0.05, local_steps=20, num_rounds=5, noise_multiplier=1.0)
    assert attacked(plans.mutated(plan, kind), plan.epsilon(), 12_000).violated


def test_02_accountant_that_starts_afresh_every_round() -> None:
    plan = plans.local(sample_rate=1.0, local_steps=1, num_rounds=10, noise_multiplier=2.0)
    assert attacked(plan, plan.epsilon(1)).best.epsilon_lower > plan.epsilon(1)


def test_03_training_that_goes_on_without_the_engine_after_the_first_round() -> None:
    plan = plans.local()
    assert attacked(plans.mutated(plan, plans.NoiseInTheFirstStepOnly), plan.epsilon()).violated


def test_05_clip_and_sensitivity_that_disagree() -> None:
    """Gradients are clipped to twice the norm that the noise was made for."""

    class TwiceTheNorm(PrivacyPlan):
        def clip_factors(self, norms: object, most: float | None = None) -> object:
            return 2.0 * super().clip_factors(norms)

    plan = plans.local()
    assert attacked(plans.mutated(plan, TwiceTheNorm), plan.epsilon()).violated


def test_13_parameters_that_are_trained_and_not_noised() -> None:
    plan = plans.local()
    assert attacked(plans.mutated(plan, plans.HeadNotNoised), plan.epsilon()).violated


def test_21_noise_of_dropped_nodes_that_is_missing_from_the_sum() -> None:
    """Nodes that share the noise as if none could drop out, and two do."""
    short = plans.distributed(max_dropouts=0, max_colluders=0, sample_rate=1.0)
    plan = plans.distributed(max_dropouts=1, max_colluders=1, sample_rate=1.0)
    # Two of four shares are in the sum: half of the variance.
    worse = plans.distributed(
        max_dropouts=1, max_colluders=1, sample_rate=1.0, noise_multiplier=short.noise_multiplier / 2**0.5
    )
    assert not attacked(plan, plan.epsilon()).violated
    assert attacked(worse, plan.epsilon()).violated
