"""Small plans for tests: every field has a harmless value, and a test names the one it is about.

Fields are given flat, whichever of plan and mechanism has them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import dp_accounting as dp

from fedtune.privacy.accounting.epsilon import compose_terms
from fedtune.privacy.mechanisms.registry import MECHANISMS
from fedtune.privacy.plan import PrivacyPlan

__all__ = ["central_plan", "changed", "distributed_plan", "event_of", "local_plan", "plan_of", "public_plan"]

_PLAN = {field.name for field in dataclasses.fields(PrivacyPlan)} - {"mechanism"}

_COMMON: dict[str, Any] = {
    "unit": "record",
    "num_rounds": 12,
    "noise_multiplier": 1.0,
    "max_grad_norm": 1.0,
    "declared_size": 1000,
    "delta": 1e-5,
}


def plan_of(trust: str, **values: Any) -> PrivacyPlan:
    """A plan from all of its fields."""
    own = {name: value for name, value in values.items() if name not in _PLAN}
    rest = {name: value for name, value in values.items() if name in _PLAN}
    return PrivacyPlan(mechanism=MECHANISMS[trust](**own), **rest)


def changed(plan: PrivacyPlan, **values: Any) -> PrivacyPlan:
    """The same plan but for some of its fields."""
    own = {name: value for name, value in values.items() if name not in _PLAN}
    rest = {name: value for name, value in values.items() if name in _PLAN}
    mechanism: Any = plan.mechanism
    return dataclasses.replace(plan, mechanism=dataclasses.replace(mechanism, **own), **rest)


def local_plan(**changes: Any) -> PrivacyPlan:
    """DP-SGD on a node of 1,000 records."""
    return plan_of("local", **{**_COMMON, "sample_rate": 0.05, "local_steps": 5, **changes})


def distributed_plan(**changes: Any) -> PrivacyPlan:
    """One step a round over the union of four shards."""
    return plan_of("distributed", **{**_COMMON, "sample_rate": 0.05, "nodes": 4, **changes})


def central_plan(**changes: Any) -> PrivacyPlan:
    """A trusted server over 200 clients, 20 a round."""
    values = {
        "unit": "client", "declared_size": 200, "nodes": 200, "cohort_size": 20, "delta": 1e-3,
        "training_sample_rate": 0.05, "training_steps": 5,
    }  # fmt: skip
    return plan_of("central", **{**_COMMON, **values, **changes})


def public_plan(**changes: Any) -> PrivacyPlan:
    """No noise, no promise."""
    values = {"noise_multiplier": 0.0, "max_grad_norm": float("inf"), "delta": 0.0}
    return plan_of("none", **{**_COMMON, "sample_rate": 0.05, "local_steps": 5, **values, **changes})


def event_of(plan: PrivacyPlan, releases: int, answers: int = 0) -> dp.DpEvent:
    """What `releases` rounds and `answers` answers of a plan cost, as dp_accounting's own event."""
    root = plan.root()
    trained = plan.terms(releases) if root is None else root.merged(plan.noise_multiplier, releases)
    terms = compose_terms(trained, plan.everything(0, answers))
    if terms is None:
        return dp.NonPrivateDpEvent()
    parts: list[dp.DpEvent] = []
    for term, count in terms.items():
        step: dp.DpEvent = dp.GaussianDpEvent(term.noise_multiplier)
        if term.sample_rate < 1.0:
            step = dp.PoissonSampledDpEvent(term.sample_rate, step)
        parts.append(dp.SelfComposedDpEvent(step, count))
    return parts[0] if len(parts) == 1 else dp.ComposedDpEvent(parts)
