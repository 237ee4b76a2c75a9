"""Puts a RunRecord together from what ran.

From the plan that sampled and noised, the releases that the ledgers hold, the rounds that were done, the
measured cost. Nothing is copied from a target: `privacy.epsilon` is accounted over the releases that were
made. It is the largest over all who see the output (under `distributed` the other nodes, who know their own
noise) and over the nodes whose data it protects (shards are disjoint), never an average. For `trust=none`
epsilon is null, not infinity, for JSON has none; the same goes for a ledger whose data was ever used without
noise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedtune.config.recipe import in_words
from fedtune.data.sources.load import LABELS_TAKEN
from fedtune.runs import record

if TYPE_CHECKING:
    from fedtune.config.schema import Config
    from fedtune.cost.meter import Cost, EnergyReading
    from fedtune.cost.prices import Money
    from fedtune.federation.events import FederationResult, RoundSummary
    from fedtune.privacy.plan import PrivacyPlan

__all__ = ["Metrics", "NodePrivacy", "RunFacts", "assemble"]

_EVALUATED_ON = {
    "public": "public test split; not covered by the guarantee",
    "held_out": "held-out part of data that nobody declared public, without noise: this run has no privacy",
    "private": "data that the nodes hold out; two noised counts an answer, inside epsilon",
    "none": "none: the model was not evaluated",
}


@dataclass(frozen=True)
class RunFacts:
    """Who, when and where: the `run` part of the record."""

    id: str
    started: str  # ISO 8601, UTC
    seconds: float
    engine: str
    seed: int
    versions: Mapping[str, str]
    commit: str | None
    dirty: bool | None
    hardware: Mapping[str, Any]
    status: str = "finished"  # or "pruned": a search gave it up after some rounds
    attempt: int = 1  # how often it was started; more than 1 means that it was resumed


@dataclass(frozen=True)
class NodePrivacy:
    """What one node's ledger says: this run's releases, and everything its data was ever used for.

    Attributes:
        epsilon: over this run's releases; None for trust none.
        total_epsilon: composed over all releases of this data that the ledger knows, this run's included.
        total_unit: what that is about: the finest unit that any of them protects.
    """

    node: str
    epsilon: float | None
    epsilon_rdp: float | None
    delta: float | None
    releases: int
    dataset: str | None
    fingerprint: str | None
    total_epsilon: float | None = None
    total_releases: int | None = None
    total_unit: str | None = None
    answers: int = 0  # of `releases` beside: about held-out data


@dataclass(frozen=True)
class Metrics:
    """Quality, with what guessing would give beside it; `evaluation` says whose data it was measured on."""

    accuracy: float | None
    precision_macro: float | None = None
    recall_macro: float | None = None
    f1_macro: float | None = None
    loss: float | None = None
    per_site: Mapping[str, Any] = field(default_factory=dict)
    personal: Mapping[str, Any] | None = None  # of each site with its own part, on its own records
    num_records: int | None = 0  # None: private
    majority_rate: float | None = None
    evaluation: Mapping[str, Any] = field(default_factory=lambda: {"data": "public"})


def assemble(
    *,
    config: Config,
    facts: RunFacts,
    result: FederationResult,
    nodes: Sequence[NodePrivacy],
    metrics: Metrics,
    data: Mapping[str, Any],
    cost: Cost,
    energy: EnergyReading,
    money: Money | None,
    carbon_kg: float | None,
    memory_note: str,
    encoder_bytes: int,
    adapter_bytes: int,
    num_parameters: int,
    expected_flops: float | None = None,
    artifacts: Mapping[str, str],
    accountant: str | None,
    evaluation: Mapping[str, Any] | None = None,
    sizes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All that is known of one run, fit for JSON and not yet for publication: `record.publish` splits it.

    Raises `RecordError` if it would not pass `validate`.
    """
    plan = result.plan
    private, settings = plan.is_private(), plan.settings()
    made = {
        "schema": record.SCHEMA,
        "run": dataclasses.asdict(facts),
        "config": dataclasses.asdict(config),
        "data": dict(data),
        "federation": {
            "nodes": len(nodes),
            "node_names": [one.node for one in nodes],
            "rounds": len(result.history),
            "cohort_size": config.federation.cohort_size or len(nodes),
            "recipe": in_words(config),
            "dropped": [dataclasses.asdict(one) for one in result.dropped],
            "left_out": [{"node": node, "reason": why} for node, why in result.left_out.items()],
            "unusable": [dataclasses.asdict(one) for one in result.unusable],
            "void_rounds": [one.round for one in result.history if one.void],
            "ended_early": result.ended_early,
            "notices": list(result.notices),
        },
        "privacy": {
            "unit": plan.unit,
            "adjacency": plan.adjacency(),
            "trust": plan.trust,
            "mechanism": plan.mechanism.describe(plan),
            "noise_multiplier": plan.noise_multiplier,
            "max_grad_norm": plan.max_grad_norm,
            "head_norm": plan.head_norm,
            "head_share": plan.head_share,
            "head_rounds": plan.head_rounds,
            "centre_rounds": plan.centre_rounds,
            "sample_rate": plan.sample_rate,
            "local_steps": plan.local_steps,
            "steps": plan.local_steps * max((one.releases for one in nodes), default=0),
            "matrix": None if (root := plan.root()) is None else dataclasses.asdict(root),
            "accountant": accountant,
            "epsilon": _worst(one.epsilon for one in nodes) if private else None,
            "delta": plan.delta if private else None,
            "epsilon_rdp": _worst(one.epsilon_rdp for one in nodes) if private else None,
            "epsilon_towards_server": _towards_server(plan, nodes),
            "epsilon_towards_nodes": _worst(one.epsilon for one in nodes) if private else None,
            "target_epsilon": plan.target_epsilon,
            "per_node": [
                {
                    "node": one.node,
                    "epsilon": one.epsilon if private else None,
                    "delta": one.delta if private else None,
                    "releases": one.releases,
                    "answers": one.answers,
                }
                for one in nodes
            ],
            "ledger": [
                {
                    "node": one.node,
                    "dataset": one.dataset,
                    "fingerprint": one.fingerprint,
                    "releases": one.total_releases,
                    "epsilon": one.total_epsilon,
                    "delta": one.delta if private else None,
                    "unit": one.total_unit,
                }
                for one in nodes
            ],
            "records_per_unit": plan.records_per_unit,
            "reproducible_noise": plan.reproducible_noise,
            "data_public": data["public"],
            "cautions": list(
                dict.fromkeys(
                    [
                        *plan.cautions(),
                        *([] if data.get("labels_declared", True) else [LABELS_TAKEN]),
                        *(data["notes"] if data["public"] else ()),
                        *result.notices,
                    ]
                )
            ),
            "max_dropouts": settings.get("max_dropouts", 0),
            "max_colluders": settings.get("max_colluders", 0),
            "adaptive_clipping": settings.get("adaptive_clipping", False),
            "evaluation_data": _EVALUATED_ON[metrics.evaluation["data"]],
            "evaluation": None if evaluation is None else dict(evaluation),
            "sizes": None if sizes is None else dict(sizes),
            "audit": None,
        },
        "metrics": {
            "accuracy": metrics.accuracy,
            "precision_macro": metrics.precision_macro,
            "recall_macro": metrics.recall_macro,
            "f1_macro": metrics.f1_macro,
            "loss": metrics.loss,
            "chance": 1.0 / len(data["labels"]),
            "majority_rate": metrics.majority_rate,
            "num_records": metrics.num_records,
            "by_round": [_round(one) for one in result.history],
            "per_site": dict(metrics.per_site),
            "personal": metrics.personal,
            "evaluation": {**metrics.evaluation, **(evaluation or {})},
        },
        "cost": {
            "seconds": cost.seconds,
            "train_seconds": cost.train_seconds,
            # Of private data what the plan expects; what was counted depends on who was drawn.
            "flops": cost.flops if data["public"] else expected_flops,
            "flops_counted": cost.flops,
            "flops_source": "counted"
            if data["public"]
            else "expected: data.max_length tokens a record, the plan's records a step",
            "peak_memory_bytes": cost.peak_memory_bytes,
            "peak_memory_note": memory_note,
            "peak_device_bytes": cost.peak_device_bytes,
            "encoder_bytes": encoder_bytes,
            "adapter_bytes": adapter_bytes,
            "num_parameters": num_parameters,
            "bytes_up": cost.bytes_up,
            "bytes_down": cost.bytes_down,
            "energy_kwh": cost.energy_kwh,
            "energy": {**dataclasses.asdict(energy), "estimate": True},
            "carbon_kg": carbon_kg,
            "money": None if money is None else money.to_json(),
            "pricing": dataclasses.asdict(config.pricing),
        },
        "artifacts": dict(artifacts),
    }
    cleaned: dict[str, Any] = record.clean(made)
    record.validate(cleaned, "the record of this run")
    return cleaned


def _towards_server(plan: PrivacyPlan, nodes: Sequence[NodePrivacy]) -> float | None:
    """Epsilon towards the server alone: smaller under `distributed`, none where it sees raw updates."""
    worst = _worst(one.epsilon for one in nodes)
    if worst is None:
        return None
    releases, answers = max(one.releases for one in nodes), max(one.answers for one in nodes)
    towards = plan.epsilon_towards_server(releases, answers)
    if math.isinf(towards):
        return None  # it sees raw updates
    return min(worst, towards) if plan.shares_noise else worst


def _round(summary: RoundSummary) -> dict[str, Any]:
    kept = (
        "round",
        "seconds",
        "accuracy",
        "accuracy_error",
        "loss",
        "epsilon",
        "bytes_up",
        "bytes_down",
        "updates",
        "train_seconds",
    )
    return {name: getattr(summary, name) for name in kept}


def _worst(values: Any) -> float | None:
    """The maximum; None if any is unknown, for a maximum over the known ones could be too low."""
    listed = list(values)
    return None if not listed or any(value is None for value in listed) else max(listed)
