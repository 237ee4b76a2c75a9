"""A Run: what a comparison needs of one record, and no more.

Ten thousand records with all their keys take more memory than a report should, so that each is cut down as
soon as it is read. What epsilon was made of is kept in the accountant's own form, by node, so that runs can
be composed later.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.config.schema import PricingConfig
from fedtune.cost.meter import Cost
from fedtune.errors import RecordError
from fedtune.privacy.accounting.epsilon import Term
from fedtune.privacy.mechanisms.matrix import BandedRoot

__all__ = ["Round", "Run", "run_of"]

# What does not make two runs different experiments: the seed, where files lie, prices, who is told.
_NOT_COMPARED = ("seed", "resume", "output", "pricing", "tracker")


@dataclass(frozen=True)
class Round:
    """One point of a learning curve."""

    round: int
    accuracy: float | None
    epsilon: float | None


@dataclass(frozen=True)
class Run:
    """What a comparison needs of one record.

    Attributes:
        config: resolved configuration without seed, folders and prices.
        task: what accuracy was measured on; numbers of two tasks cannot be compared.
        epsilon: infinite without privacy, or where the record does not know.
        terms: by node, what its releases cost the accountant; None for a node without privacy.
        nodes_fixed: a record lies on the same node in every run (the natural partition).
        dataset: the name of the data; runs on data of one name are taken to share records.
    """

    path: Path
    id: str
    seed: int
    started: str
    config: Mapping[str, Any]
    task: str
    public: bool
    unit: str
    adjacency: str
    trust: str
    epsilon: float
    delta: float | None
    reproducible_noise: bool
    accuracy: float | None
    majority_rate: float | None
    per_site: Mapping[str, float]
    rounds: tuple[Round, ...]
    cost: Cost
    records: int | None
    pricing: PricingConfig
    terms: Mapping[str, Mapping[Term, int] | None]
    nodes_fixed: bool
    dataset: str
    pruned: bool = False  # given up by a search: not comparable, but what it released is released
    key: str = field(repr=False, default="")  # equal for runs that differ in seed only


def run_of(values: Mapping[str, Any], path: Path, shared: dict[str, dict[str, Any]]) -> Run:
    """The Run of a validated record; equal configurations are kept once, in `shared`.

    Raises:
        RecordError: a value makes no sense.
    """
    try:
        return _cut(values, path, shared)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        kind = type(error).__name__
        raise RecordError(f"{path} holds a value that makes no sense ({kind}: {error}).") from error


def _cut(values: Mapping[str, Any], path: Path, shared: dict[str, dict[str, Any]]) -> Run:
    privacy, metrics, data = values["privacy"], values["metrics"], values.get("data") or {}
    config = {name: value for name, value in values["config"].items() if name not in _NOT_COMPARED}
    # A setting that an older record does not have yet is one that is null in a newer one.
    key = json.dumps(_given(config), sort_keys=True)
    config = shared.setdefault(key, config)  # thousands of runs share a few configurations
    trust, private = str(privacy["trust"]), privacy["trust"] != "none"
    epsilon = privacy["epsilon"] if private else None
    settings = config["data"]
    return Run(
        path=path,
        id=str(values["run"]["id"]),
        seed=int(values["run"]["seed"]),
        started=str(values["run"]["started"]),
        config=config,
        task=_task(settings, data) + (", measured by the nodes" if _by_nodes(metrics) else ""),
        public=bool(privacy.get("data_public", settings.get("public", False))),
        unit=str(privacy["unit"]),
        adjacency=str(privacy["adjacency"]),
        trust=trust,
        epsilon=math.inf if epsilon is None else float(epsilon),
        delta=None if privacy["delta"] is None else float(privacy["delta"]),
        reproducible_noise=bool(privacy["reproducible_noise"]),
        accuracy=None if metrics["accuracy"] is None else float(metrics["accuracy"]),
        majority_rate=metrics.get("majority_rate"),
        per_site=_per_site(metrics["per_site"]),
        rounds=tuple(
            Round(int(one["round"]), one.get("accuracy"), one.get("epsilon")) for one in metrics["by_round"]
        ),
        cost=_cost(values["cost"], values["run"]),
        records=_records(privacy["unit"], data),
        pricing=_pricing(values["cost"]["pricing"]),
        terms=_terms(privacy),
        nodes_fixed=config["partition"]["name"] == "natural",
        dataset=str(data.get("name") or settings["name"]),
        pruned=values["run"].get("status") == "pruned",
        key=key,
    )


def _given(config: Any) -> Any:
    """`config` without what is null."""
    if not isinstance(config, Mapping):
        return config
    return {name: _given(value) for name, value in config.items() if value is not None}


def _task(settings: Mapping[str, Any], data: Mapping[str, Any]) -> str:
    name = str(settings["name"])
    if settings.get("subset"):
        name += f" ({settings['subset']})"
    labels = data.get("labels")
    return f"{name}, {len(labels)} labels" if labels else name


def _by_nodes(metrics: Mapping[str, Any]) -> bool:
    """Whether accuracy comes from nodes' own data: not to be compared with that on a public test split."""
    return bool((metrics.get("evaluation") or {}).get("data") == "private")


def _per_site(values: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for site, row in values.items():
        accuracy = row.get("accuracy") if isinstance(row, Mapping) else row
        if accuracy is not None:
            found[str(site)] = float(accuracy)
    return found


def _cost(values: Mapping[str, Any], run: Mapping[str, Any]) -> Cost:
    def number(name: str) -> Any:
        value = values.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise ValueError(f"cost.{name} is {value!r}")
        return value

    return Cost(
        seconds=_seconds(run["seconds"]),
        train_seconds=number("train_seconds"),  # null of private data: what was measured stays with its owner
        flops=number("flops"),
        peak_memory_bytes=number("peak_memory_bytes"),
        bytes_up=number("bytes_up") or 0,
        bytes_down=number("bytes_down") or 0,
        energy_kwh=number("energy_kwh"),
    )


def _seconds(value: Any) -> float | None:
    return None if value is None else float(value)


def _records(unit: str, data: Mapping[str, Any]) -> int | None:
    """Declared records in all, which data is bought by; unknown where persons or clients are declared."""
    sizes = data.get("declared_sizes")
    return sum(int(size) for size in sizes.values()) if unit == "record" and sizes else None


def _pricing(values: Mapping[str, Any] | None) -> PricingConfig:
    if values is None:
        return PricingConfig(name="none", currency="")
    known = PricingConfig.__dataclass_fields__
    return PricingConfig(**{name: value for name, value in values.items() if name in known})


def _terms(privacy: Mapping[str, Any]) -> dict[str, Mapping[Term, int] | None]:
    """By node: the steps that its releases were, in the accountant's own form."""
    if privacy["trust"] == "none" or privacy["epsilon"] is None or not privacy["noise_multiplier"]:
        return {str(one["node"]): None if one["releases"] else {} for one in privacy["per_node"]}
    if privacy.get("matrix"):
        root = BandedRoot(**privacy["matrix"])
        return {
            str(one["node"]): root.merged(float(privacy["noise_multiplier"]), int(one["releases"]))
            for one in privacy["per_node"]
        }
    # As the plan accounts it: clients are seen to take part, so for them no sampling is counted.
    rate = 1.0 if privacy["trust"] == "central" else float(privacy["sample_rate"])
    most = max((int(one["releases"]) for one in privacy["per_node"]), default=0)
    steps = int(privacy["local_steps"]) if "local_steps" in privacy else int(privacy["steps"]) // max(most, 1)
    term = Term(rate, float(privacy["noise_multiplier"]))
    about = privacy.get("evaluation") or {}
    answered = Term(1.0, float(about["noise_multiplier"])) if about else None
    found: dict[str, Mapping[Term, int] | None] = {}
    for one in privacy["per_node"]:
        terms = {term: steps * int(one["releases"])} if one["releases"] else {}
        if answered is not None and one.get("answers"):
            terms[answered] = terms.get(answered, 0) + int(one["answers"])
        found[str(one["node"])] = terms
    return found
