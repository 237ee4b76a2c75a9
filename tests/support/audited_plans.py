"""Plans for audits, and plans that break their promise in one way each: every one a bug that has shipped.

A mutant claims what the right plan claims and does something else: what an audit is there to notice.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from fedtune.privacy.mechanisms.noise import Entropy
from fedtune.privacy.plan import PrivacyPlan
from tests.support.plans import plan_of

__all__ = [
    "CyclicBatches",
    "FixedBatch",
    "HalfNoise",
    "HeadNotNoised",
    "NoClipping",
    "NoiseInTheFirstStepOnly",
    "SensitivityOfOneRound",
    "central",
    "correlated",
    "distributed",
    "local",
    "mutated",
]

_COMMON: dict[str, Any] = {
    "unit": "record",
    "max_grad_norm": 0.5,
    "declared_size": 10_000,
    "delta": 1e-5,
    "reproducible_noise": True,
}


def local(**changes: Any) -> PrivacyPlan:
    """Two rounds of two steps at rate a half: epsilon 3.4 at delta 1e-5."""
    values = {
        "trust": "local",
        "sample_rate": 0.5,
        "local_steps": 2,
        "num_rounds": 2,
        "noise_multiplier": 1.6,
    }
    return plan_of(**{**_COMMON, **values, **changes})


def distributed(**changes: Any) -> PrivacyPlan:
    """Four rounds over the union of four shards; one node may drop out and one collude."""
    nodes = {"nodes": 4, "max_dropouts": 1, "max_colluders": 1}
    values = {
        "trust": "distributed", "sample_rate": 0.5, "num_rounds": 4, "noise_multiplier": 1.6,
    }  # fmt: skip
    return plan_of(**{**_COMMON, **values, **nodes, **changes})


def central(**changes: Any) -> PrivacyPlan:
    """Two rounds of a trusted server over 1,000 clients."""
    values = {
        "trust": "central", "unit": "client", "num_rounds": 2,
        "declared_size": 1000, "nodes": 1000, "cohort_size": 1000, "noise_multiplier": 1.6,
    }  # fmt: skip
    return plan_of(**{**_COMMON, **values, **changes})


def correlated(**changes: Any) -> PrivacyPlan:
    """Twelve rounds of dp_ftrl; a client takes part in one of four, three times in all."""
    values = {
        "method": "dp_ftrl", "num_rounds": 12, "bands": 4, "min_separation": 4, "cohort_size": 250,
    }  # fmt: skip
    return central(**{**values, **changes})


def mutated(plan: PrivacyPlan, kind: type[PrivacyPlan]) -> PrivacyPlan:
    """The same settings in a plan that does not keep its promise."""
    return kind(**{field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)})


class HalfNoise(PrivacyPlan):
    """Noise at half of the accounted scale."""

    def noise(self, size: int, entropy: Entropy) -> Any:
        return super().noise(size, entropy) / 2.0


class NoClipping(PrivacyPlan):
    """Clipping left out."""

    def clip_factors(self, norms: Any, most: float | None = None) -> Any:
        return np.ones(len(np.asarray(norms)))


class HeadNotNoised(PrivacyPlan):
    """The last tenth of the parameters (a head, say) is trained and published without noise."""

    def noise(self, size: int, entropy: Entropy) -> Any:
        values = super().noise(size, entropy)
        values[-(size // 10) :] = 0.0
        return values


class NoiseInTheFirstStepOnly(PrivacyPlan):
    """The engine is made once, and after a restart training goes on without it."""

    def noise(self, size: int, entropy: Entropy) -> Any:
        values = super().noise(size, entropy)
        before = getattr(self, "_noised", False)
        object.__setattr__(self, "_noised", True)
        return values * (1e-3 if before else 1.0)


class SensitivityOfOneRound(PrivacyPlan):
    """dp_ftrl noised for one participation, where a client takes part several times."""

    def noise(self, size: int, entropy: Entropy) -> Any:
        root = self.root()
        assert root is not None
        return super().noise(size, entropy) * root.sensitivity(1) / root.sensitivity()


class FixedBatch(PrivacyPlan):
    """The same units in every step."""

    def sample(self, num_units: int, entropy: Entropy) -> Any:
        return np.arange(num_units)[: round(self.sample_rate * num_units)]


class CyclicBatches(PrivacyPlan):
    """Batches in turn, as from a data loader that does not shuffle."""

    def sample(self, num_units: int, entropy: Entropy) -> Any:
        step = getattr(self, "_step", 0)
        object.__setattr__(self, "_step", step + 1)
        period = round(1.0 / self.sample_rate)
        return np.flatnonzero(np.arange(num_units) % period == step % period)
