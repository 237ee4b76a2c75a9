"""Small plans for tests: every field has a harmless value, and a test names the one it is about."""

from __future__ import annotations

from typing import Any

from fedtune.privacy.plan import PrivacyPlan

__all__ = ["central_plan", "distributed_plan", "local_plan", "public_plan"]

_LOCAL: dict[str, Any] = {
    "trust": "local",
    "unit": "record",
    "sample_rate": 0.05,
    "local_steps": 5,
    "num_rounds": 12,
    "noise_multiplier": 1.0,
    "max_grad_norm": 1.0,
    "declared_size": 1000,
    "delta": 1e-5,
}


def local_plan(**changes: Any) -> PrivacyPlan:
    """DP-SGD on a node of 1,000 records."""
    return PrivacyPlan(**{**_LOCAL, **changes})


def distributed_plan(**changes: Any) -> PrivacyPlan:
    """One step a round over the union of four shards."""
    return PrivacyPlan(**{**_LOCAL, "trust": "distributed", "local_steps": 1, "nodes": 4, **changes})


def central_plan(**changes: Any) -> PrivacyPlan:
    """A trusted server over 200 clients, 20 a round."""
    values = {
        "trust": "central",
        "unit": "client",
        "sample_rate": 1.0,
        "local_steps": 1,
        "declared_size": 200,
        "nodes": 200,
        "cohort_size": 20,
        "delta": 1e-3,
        "training_sample_rate": 0.05,
        "training_steps": 5,
    }
    return PrivacyPlan(**{**_LOCAL, **values, **changes})


def public_plan(**changes: Any) -> PrivacyPlan:
    """No noise, no promise."""
    values = {"trust": "none", "noise_multiplier": 0.0, "max_grad_norm": float("inf"), "delta": 0.0}
    return PrivacyPlan(**{**_LOCAL, **values, **changes})
