"""The RunRecord: all that one run produced, as one JSON file (`record.json`, schema 1).

`build` puts it together from what ran: the plan that sampled and noised, the releases that the ledgers hold,
the rounds that were done, the measured cost. Nothing in it is copied from a target: `privacy.epsilon` is
accounted over the releases that were made, and is the maximum over the nodes (shards are disjoint), never an
average. For `trust=none` epsilon is null, not infinity, for JSON has none.

`read` refuses a file of another schema (both versions named), a half-written one, and one that lacks keys.
`write` is atomic: a reader sees the whole record or none. NaN and infinities become null, since JSON has no
numbers for them.

Does not do: judge a record (`fedtune.experiments.frontier`) or put it in words (`fedtune.privacy.statement`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.errors import RecordError, ResourceError

if TYPE_CHECKING:
    from fedtune.config.schema import Config
    from fedtune.cost.meter import Cost, EnergyReading
    from fedtune.cost.prices import Money
    from fedtune.federation.events import FederationResult, RoundSummary

__all__ = [
    "RECORD_NAME",
    "SCHEMA",
    "Metrics",
    "NodePrivacy",
    "RunFacts",
    "build",
    "clean",
    "read",
    "validate",
    "write",
]

SCHEMA = 1
RECORD_NAME = "record.json"

_REQUIRED: dict[str, tuple[str, ...]] = {
    "run": (
        "id",
        "started",
        "seconds",
        "engine",
        "seed",
        "versions",
        "commit",
        "dirty",
        "hardware",
        "status",
    ),
    "config": (),
    "federation": ("nodes", "rounds", "cohort_size", "dropped"),
    "privacy": (
        *(
            "unit",
            "adjacency",
            "trust",
            "mechanism",
            "noise_multiplier",
            "max_grad_norm",
            "sample_rate",
            "steps",
        ),
        *("accountant", "epsilon", "delta", "epsilon_rdp", "per_node", "reproducible_noise", "audit"),
    ),
    "metrics": ("accuracy", "precision_macro", "recall_macro", "f1_macro", "loss", "by_round", "per_site"),
    "cost": (
        *("train_seconds", "flops", "peak_memory_bytes", "encoder_bytes", "adapter_bytes"),
        *("bytes_up", "bytes_down", "energy_kwh", "money", "pricing"),
    ),
    "artifacts": ("adapter", "statement"),
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
    status: str = "finished"
    attempt: int = 1  # how often it was started; more than 1 means that it was resumed


@dataclass(frozen=True)
class NodePrivacy:
    """What one node's ledger says: this run's releases, and everything its data was ever used for.

    Attributes:
        epsilon: over this run's releases; None for trust none.
        total_epsilon: composed over all releases of this data that the ledger knows, this run's included.
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


@dataclass(frozen=True)
class Metrics:
    """Quality on the test split, with what guessing would give beside it."""

    accuracy: float | None
    precision_macro: float | None
    recall_macro: float | None
    f1_macro: float | None
    loss: float | None
    per_site: Mapping[str, Any] = field(default_factory=dict)
    num_records: int = 0
    majority_rate: float | None = None


def build(
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
    artifacts: Mapping[str, str],
    mechanism: str,
    accountant: str | None,
) -> dict[str, Any]:
    """The record of one run, fit for JSON. Raises `RecordError` if it would not pass `validate`."""
    plan = result.plan
    private = plan.trust != "none"
    record = {
        "schema": SCHEMA,
        "run": dataclasses.asdict(facts),
        "config": dataclasses.asdict(config),
        "data": dict(data),
        "federation": {
            "nodes": len(nodes),
            "node_names": [one.node for one in nodes],
            "rounds": len(result.history),
            "cohort_size": config.federation.cohort_size or len(nodes),
            "dropped": [dataclasses.asdict(one) for one in result.dropped],
            "void_rounds": [one.round for one in result.history if one.void],
            "ended_early": result.ended_early,
            "notices": list(result.notices),
        },
        "privacy": {
            "unit": plan.unit,
            "adjacency": plan.adjacency(),
            "trust": plan.trust,
            "mechanism": mechanism,
            "noise_multiplier": plan.noise_multiplier,
            "max_grad_norm": plan.max_grad_norm,
            "sample_rate": plan.sample_rate,
            "local_steps": plan.local_steps,
            "steps": plan.local_steps * max((one.releases for one in nodes), default=0),
            "accountant": accountant,
            "epsilon": _worst(one.epsilon for one in nodes) if private else None,
            "delta": plan.delta if private else None,
            "epsilon_rdp": _worst(one.epsilon_rdp for one in nodes) if private else None,
            "target_epsilon": plan.target_epsilon,
            "per_node": [
                {
                    "node": one.node,
                    "epsilon": one.epsilon if private else None,
                    "delta": one.delta if private else None,
                    "releases": one.releases,
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
                }
                for one in nodes
            ],
            "records_per_unit": plan.records_per_unit,
            "reproducible_noise": plan.reproducible_noise,
            "data_public": data["public"],
            "cautions": [*plan.cautions(), *data["notes"], *result.notices],
            "max_dropouts": plan.max_dropouts,
            "max_colluders": plan.max_colluders,
            "adaptive_clipping": plan.adaptive_clipping,
            "evaluation_data": "public test split; not covered by the guarantee",
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
        },
        "cost": {
            "seconds": cost.seconds,
            "train_seconds": cost.train_seconds,
            "flops": cost.flops,
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
    record = clean(record)
    validate(record, "the record of this run")
    return record


def _round(summary: RoundSummary) -> dict[str, Any]:
    kept = (
        "round",
        "seconds",
        "accuracy",
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


def clean(value: Any) -> Any:
    """`value` with only JSON's own types: NaN and infinities become None, numpy numbers plain ones."""
    if isinstance(value, Mapping):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    if isinstance(value, (str, bool)) or value is None:
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return clean(value.tolist())
    return str(value)


def write(record: Mapping[str, Any], path: Path) -> None:
    """Writes `record` to `path`, whole or not at all. Raises `ResourceError` if the disk does not take it."""
    text = json.dumps(clean(record), indent=2, allow_nan=False) + "\n"
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise ResourceError(
            f"Cannot write {path}: {error.strerror or error}. The run itself is done and its "
            "checkpoint is kept; make room, then resume the run to write its record."
        ) from error


def read(path: Path | str) -> dict[str, Any]:
    """The record at `path` (a file, or a run folder), validated. Raises `RecordError` with the way out."""
    path = Path(path)
    if path.is_dir():
        folder, path = path, path / RECORD_NAME
        if not path.exists():
            raise RecordError(_no_record(folder))
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecordError(
            f"There is no {path}. Name the folder of a finished run (it holds record.json)."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"Cannot read {path}: {error}.") from error
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecordError(
            f"{path} is half-written or damaged: {error.msg} at character {error.pos} of {len(text)}. If its "
            f"run folder still has a checkpoint, 'fedtune run resume={path.parent}' writes it again."
        ) from error
    validate(record, str(path))
    return record


def _no_record(folder: Path) -> str:
    if (folder / "checkpoint").exists():
        return (
            f"The run in {folder} is not finished: it has a checkpoint and no record.json. Finish it with "
            f"'fedtune run resume={folder}'."
        )
    return (
        f"{folder} is not the folder of a run: it has no record.json. "
        "Name one that 'fedtune run' has printed."
    )


def validate(record: Any, name: str = "record") -> None:
    """Raises `RecordError` unless `record` has this schema's version and all its keys."""
    if not isinstance(record, dict):
        raise RecordError(f"{name} is no record: it holds a {type(record).__name__}, not an object.")
    found = record.get("schema")
    if found != SCHEMA or isinstance(found, bool):
        raise RecordError(
            f"{name} has schema {found!r}, and this fedtune reads schema {SCHEMA}. Use the fedtune that "
            "wrote it (run.versions.fedtune in the file), or run it again."
        )
    missing = []
    for section, keys in _REQUIRED.items():
        part = record.get(section)
        if not isinstance(part, dict):
            missing.append(section)
        else:
            missing += [f"{section}.{key}" for key in keys if key not in part]
    if missing:
        raise RecordError(f"{name} is not a whole record: it lacks {', '.join(missing)}. Run it again.")
