"""Every run below some folders: finds record.json files and keeps of each what a comparison needs.

A folder of ten thousand runs holds many files that are no records (checkpoints, adapters), so the walk
enters none of those, and a record is cut down to a `Run` as soon as it is read. A file that cannot be used
becomes a note that says which file and why: one bad record must not cost the other 999, nor vanish
silently.

Does not do: compare and price (`fedtune.report.frontier`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.config.files import meant_path
from fedtune.config.schema import PricingConfig
from fedtune.config.shapes import read_as
from fedtune.cost.meter import Cost
from fedtune.errors import RecordError
from fedtune.privacy.accounting.epsilon import Term
from fedtune.privacy.mechanisms.matrix import BandedRoot
from fedtune.privacy.mechanisms.registry import adds_noise, mechanism_of
from fedtune.privacy.statement.words import left_out
from fedtune.runs import record

__all__ = [
    "FAILURE_NAME",
    "SWEEP_NAME",
    "Collection",
    "Round",
    "Run",
    "collect",
    "configuration_key",
    "run_of",
]

# What does not make two runs different experiments: the seed, where files lie, prices, trackers.
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
        per_site: of the common model on each site's records.
        personal: on the same, of each site's own model (`train.personalize`); empty without such.
        nodes_fixed: a record lies on the same node in every run (the natural partition).
        left_out: sites that should have taken part and have no part in the model.
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
    per_site: Mapping[str, float]
    personal: Mapping[str, float]
    rounds: tuple[Round, ...]
    cost: Cost
    records: int | None
    pricing: PricingConfig
    terms: Mapping[str, Mapping[Term, int] | None]
    nodes_fixed: bool
    dataset: str
    left_out: tuple[str, ...] = ()
    pruned: bool = False  # ended early by a search: not comparable, but what it released is released
    key: str = field(repr=False, default="")  # equal for runs that differ in seed only

    @property
    def is_private(self) -> bool:
        """Whether its trust model adds noise at all."""
        return adds_noise(self.trust)


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
    config, key = _compared(values["config"]), configuration_key(values["config"])
    config = shared.setdefault(key, config)  # thousands of runs share a few configurations
    trust = str(privacy["trust"])
    epsilon = privacy["epsilon"] if adds_noise(trust) else None
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
        per_site=_per_site(metrics["per_site"]),
        personal=_per_site({site: _own(row) for site, row in metrics["per_site"].items()}),
        rounds=tuple(
            Round(int(row["round"]), row.get("accuracy"), row.get("epsilon")) for row in metrics["by_round"]
        ),
        cost=_cost(values["cost"], values["run"]),
        records=record.bought_records(values),
        pricing=_pricing(values["cost"]["pricing"]),
        terms=_terms(privacy),
        nodes_fixed=config["partition"]["name"] == "natural",
        dataset=str(data.get("name") or settings["name"]),
        left_out=tuple(left_out(values)),
        pruned=values["run"].get("status") == "pruned",
        key=key,
    )


def _compared(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in _NOT_COMPARED}


def configuration_key(config: Mapping[str, Any]) -> str:
    """Equal for the configurations of records that differ in nothing but seed, folders, prices and trackers.

    A setting that an older record does not have yet is one that is null in a newer one.
    """
    return json.dumps(_given(_compared(config)), sort_keys=True)


def _given(config: Any) -> Any:
    """`config` without settings that are null."""
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
    accuracies = {}
    for site, row in values.items():
        accuracy = row.get("accuracy") if isinstance(row, Mapping) else row
        if accuracy is not None:
            accuracies[str(site)] = float(accuracy)
    return accuracies


def _own(row: Any) -> Any:
    """What a site's row says of its own model."""
    return (row.get("personal") if isinstance(row, Mapping) else None) or {}


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


def _pricing(values: Mapping[str, Any] | None) -> PricingConfig:
    if values is None:
        return PricingConfig(name="none", currency="")
    known = PricingConfig.__dataclass_fields__
    return PricingConfig(**{name: value for name, value in values.items() if name in known})


def _terms(privacy: Mapping[str, Any]) -> dict[str, Mapping[Term, int] | None]:
    """By node: the steps that its releases were, in the accountant's own form."""
    if not adds_noise(privacy["trust"]) or privacy["epsilon"] is None or not privacy["noise_multiplier"]:
        return {str(one["node"]): None if one["releases"] else {} for one in privacy["per_node"]}
    if privacy.get("matrix"):
        root = BandedRoot(**privacy["matrix"])
        return {
            str(one["node"]): root.merged(float(privacy["noise_multiplier"]), int(one["releases"]))
            for one in privacy["per_node"]
        }
    rate = mechanism_of(privacy["trust"]).recorded_rate(privacy)
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


# --- all runs below some folders ----------------------------------------------------------------

FAILURE_NAME = "failure.json"  # what a sweep writes instead of a record where a run failed
SWEEP_NAME = "sweep.json"  # what a sweep writes about itself
_SKIPPED = frozenset({"adapter", "checkpoint", "checkpoints", "__pycache__", ".git"})


@dataclass
class Collection:
    """Runs, and what a person should know about what was not read.

    Attributes:
        notes: one sentence each, about files that were left out or numbers that need care.
        sweeps: contents of the sweep.json files that were met, by folder.
    """

    runs: list[Run]
    notes: list[str]
    sweeps: dict[Path, dict[str, Any]] = field(default_factory=dict)


def collect(folders: Sequence[Path], *, local: bool = False) -> Collection:
    """All finished runs below `folders` (a folder, or a record.json itself), oldest first.

    Args:
        local: with what their folders keep for the owner of the data alone; what is made of it must not be
            published.

    Raises:
        RecordError: a folder does not exist, or no usable record lies below any of them.
    """
    collection = Collection([], [])
    problems: list[str] = []
    failures: list[str] = []
    unfinished: list[str] = []
    copies = 0
    seen: dict[str, Path] = {}
    shared: dict[str, dict[str, Any]] = {}
    visited: set[Path] = set()
    for path in _files(folders):
        real = path.resolve()
        if real in visited:
            continue  # folders that lie in one another
        visited.add(real)
        if path.name == SWEEP_NAME:
            _read_sweep(path, collection, problems)
        elif path.name == FAILURE_NAME:
            if not (path.parent / record.RECORD_NAME).exists():
                failures.append(_failure(path))
        elif path.name == "config.yaml":
            unfinished.append(str(path.parent))
        else:
            try:
                values = record.whole(path.parent) if local and path.name == record.RECORD_NAME else None
                run = run_of(values or record.read(path), path, shared)
            except RecordError as error:
                problems.append(str(error))
                continue
            if run.id in seen:
                copies += 1
                continue
            seen[run.id] = path
            collection.runs.append(run)
    pruned = sum(run.pruned for run in collection.runs)
    if pruned == len(collection.runs):
        if pruned:
            problems.append(f"{pruned} runs were ended early by a search")
        raise RecordError(_nothing(folders, problems, failures, unfinished))
    collection.runs.sort(key=lambda run: run.started)  # stable: within a second, by folder
    collection.notes += _listed(problems, "record could not be used", "records could not be used")
    collection.notes += _listed(failures, "run failed", "runs failed")
    collection.notes += _listed(
        unfinished,
        "run is not finished (fedtune run resume=FOLDER goes on with it)",
        "runs are not finished (fedtune run resume=FOLDER goes on with one)",
    )
    if pruned:
        collection.notes.append(
            f"{pruned} runs were ended early by a search (pruned): they are in no chart and no "
            "table, and count among the runs that used the data."
        )
    if held := sum(run.cost.seconds is None for run in collection.runs):
        collection.notes.append(
            f"{held:,} of these runs used data that is not declared public: their times, energy, memory and "
            "the prices of them depend on private records, so they are '-' here and lie in local.json of the "
            "run folders; `fedtune report --local` shows them to the owner of the data."
        )
    if copies:
        collection.notes.append(f"{copies} further copies of the same runs (equal run.id) were left out.")
    return collection


def _files(folders: Sequence[Path]) -> Iterator[Path]:
    for folder in folders:
        folder = Path(folder)
        if folder.is_file():
            yield folder
        elif folder.is_dir():
            yield from _walk(folder)
        else:
            raise RecordError(
                f"There is no folder {folder}. Name one that 'fedtune run' has written to."
                + meant_path(folder)
            )


def _walk(folder: Path) -> Iterator[Path]:
    """Files of interest, folders in the order of their names. Links to folders are not followed."""
    stack = [str(folder)]
    while stack:
        current = stack.pop()
        try:
            entries = list(os.scandir(current))
        except OSError as error:
            raise RecordError(f"Cannot read the folder {current}: {error.strerror or error}.") from error
        names = {entry.name for entry in entries}
        for name in (SWEEP_NAME, FAILURE_NAME, record.RECORD_NAME):
            if name in names:
                yield Path(current, name)
        if "checkpoint" in names and "config.yaml" in names and record.RECORD_NAME not in names:
            yield Path(current, "config.yaml")
        below = [e for e in entries if e.name not in _SKIPPED and e.is_dir(follow_symlinks=False)]
        stack += [entry.path for entry in sorted(below, key=lambda e: e.name, reverse=True)]


def _nothing(folders: Sequence[Path], problems: list[str], failures: list[str], unfinished: list[str]) -> str:
    where = ", ".join(str(folder) for folder in folders)
    rest = problems + failures
    if unfinished and not rest:
        return (
            f"No run below {where} is finished ({len(unfinished)} are not, for instance {unfinished[0]}). "
            f"Finish it with 'fedtune run resume={unfinished[0]}'."
        )
    if not rest:
        return (
            f"There is no record.json below {where}, so there is nothing to report. Make some runs first: "
            "fedtune run -m privacy.epsilon=1,2,4,8 hydra.sweep.dir=FOLDER"
        )
    more = f" (and {len(rest) - 1} more like it)" if len(rest) > 1 else ""
    return f"None of the records below {where} can be used. {rest[0]}{more}"


def _listed(items: list[str], singular: str, plural: str) -> list[str]:
    if not items:
        return []
    head = f"{len(items):,} {singular if len(items) == 1 else plural}: "
    shown = items[:3]
    more = f"; and {len(items) - 3:,} more." if len(items) > 3 else ""
    return [head + "; ".join(shown) + more]


def _read_sweep(path: Path, collection: Collection, problems: list[str]) -> None:
    try:
        collection.sweeps[path.parent] = read_as("sweep", path)
    except (OSError, ValueError) as error:
        problems.append(f"{path} cannot be read: {error}")


def _failure(path: Path) -> str:
    try:
        return f"{path.parent} ({read_as('failure', path)['error']})"
    except (OSError, ValueError):
        return f"{path.parent} (its {FAILURE_NAME} cannot be read)"
