"""A model, data and training that cost nothing, in the place of the real ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from fedtune.config.schema import (
    Config,
    DataConfig,
    FederationConfig,
    ModelConfig,
    PrivacyConfig,
    TrainConfig,
)
from fedtune.federation.server.evaluation import NodesEvaluation
from fedtune.privacy.ledger.identity import Identity, mark_of
from fedtune.privacy.mechanisms.discrete import DiscreteMechanism

__all__ = ["SCENARIOS", "SIZE", "Scenario", "ToyServer", "site_values", "toys"]

SIZE = 5  # numbers of the adapter
_RECORDS = 20


class Scenario(SimpleNamespace):
    """What a federation does. `sites`, `rounds`; `privacy` and `federation`: settings of the run."""

    sites: int
    rounds: int

    def larger(self, more: int) -> Scenario:
        """With more sites and rounds."""
        return Scenario(**{**vars(self), "sites": self.sites + more, "rounds": self.rounds + more})

    def config(self) -> Config:
        """The run's."""
        return Config(
            data=DataConfig(source="files", name="toy", labels=["a", "b"], declared_size=_RECORDS),
            model=ModelConfig(name="toy"),
            privacy=PrivacyConfig(**{"epsilon": 8.0, "delta": 1e-3, **self.privacy}),
            train=TrainConfig(sample_rate=0.5, local_steps=1, learning_rate=0.1, head_rounds=0),
            federation=FederationConfig(
                **{
                    "num_rounds": self.rounds, "round_timeout": 60.0, "evaluation": "none",
                    "strategy": "fedavg", **self.federation,
                }
            ),
        )  # fmt: skip


def _scenario(sites: int, rounds: int, privacy: dict[str, Any], **federation: Any) -> Scenario:
    return Scenario(sites=sites, rounds=rounds, privacy=privacy, federation=federation)


_CENTRAL = {"trust": "central", "unit": "client", "noise_multiplier": 1.0, "epsilon": None}
SCENARIOS = {
    "local": _scenario(2, 2, {"trust": "local"}),
    "local, two of three": _scenario(3, 2, {"trust": "local"}, cohort_size=2, strategy="fedadam"),
    "local, nodes evaluate": _scenario(2, 2, {"trust": "local"}, evaluation="private"),
    "distributed": _scenario(
        3, 2, {"trust": "distributed", "max_dropouts": 1, "max_colluders": 0}, strategy="fedsgd"
    ),
    "central": _scenario(2, 2, _CENTRAL, min_updates=2),
    "dp_ftrl": _scenario(
        4, 3, {**_CENTRAL, "mechanism": "dp_ftrl", "min_separation": 2, "bands": 2}, cohort_size=2
    ),
}


def site_values(name: str, folder: str) -> dict[str, Any]:
    """What a site's node.yaml says."""
    return {
        "federation": "simulated", "site": name, "server": "127.0.0.1:1", "ca": "ca.crt", "key": "node.key",
        "data": {"name": "toy", "declared_size": _RECORDS, "labels": ["a", "b"]},
        "ledger": f"{folder}/state/ledger.sqlite", "audit_log": f"{folder}/state/audit.jsonl",
        "budget_epsilon": 100.0, "budget_delta": 1e-2, "budget_unit": "record",
        "permit": {
            "trust": ["local", "distributed", "central"], "models": ["toy"], "min_colluders": 0,
            "min_noise_multiplier": 0.0,
        },
    }  # fmt: skip


class ToyServer:
    """A `ServerSide` without a model."""

    def digest(self) -> str:
        return "toy"

    def initial(self) -> np.ndarray:
        return np.zeros(SIZE, dtype=np.float32)

    def public_facts(self) -> dict[str, Any]:
        return {}

    def head(self) -> np.ndarray:
        return np.ones(SIZE, dtype=np.bool_)

    def centre_size(self) -> int:
        return 0

    def classes(self) -> int:
        return 2

    def evaluate(self, adapter: np.ndarray) -> Any:
        return NodesEvaluation(0, 0.5, None, 0.0, (), ())


class _Resources(ToyServer):
    """`fedtune.federation.resources.RunResources` of one site."""

    def __init__(self, name: str) -> None:
        marks = b"".join(mark_of((f"{name} {i}", None)) for i in range(_RECORDS))
        records = np.frombuffer(marks, dtype=np.uint8).reshape(-1, 32)
        data = SimpleNamespace(num_records=0, unit_index=np.zeros(0, dtype=np.int64))
        shard = SimpleNamespace(
            node=name, dataset="toy", declared_size=_RECORDS, fingerprint=name, data=data,
            identity=Identity(records, None, name),
        )  # fmt: skip
        self.prepared = SimpleNamespace(shards=[shard], held_out=(shard,), label_names=("a", "b"))

    @contextmanager
    def training_model(self, plan: Any, round: int) -> Iterator[tuple[None, None]]:
        yield None, None

    @contextmanager
    def model_at(self, adapter: np.ndarray) -> Iterator[None]:
        yield None


@functools.cache
def _resources_of(name: str) -> _Resources:
    return _Resources(name)


@contextmanager
def toys(trains: Callable[[str, str, int, np.ndarray | None], np.ndarray]) -> Iterator[None]:
    """Within it sites have toys. `trains(site, run, round, share)` is called where data is touched: for an
    update float32 [SIZE], or to note a `share`, uint32 [SIZE], of a secure sum."""
    from fedtune.federation import resources
    from fedtune.federation.secagg import client
    from fedtune.training import local

    current: list[str] = []  # the run that asks, which training is not told

    def run_resources(config: Config) -> _Resources:
        return _resources_of(str(config.data.only_site))

    def train_locally(model: None, shard: Any, plan: Any, start: np.ndarray, train: Any, **more: Any) -> Any:
        return SimpleNamespace(update=trains(shard.node, current[-1], more["round"], None), flops=0)

    def clipped_gradient_sum(release: Any, request: Any) -> tuple[np.ndarray, float]:
        plan = release.training
        mechanism = DiscreteMechanism.for_plan(plan, SIZE)
        total = np.linspace(-1.0, 1.0, SIZE) * request.round
        share = mechanism.share(total, plan.entropy(release.shard.node, request.round))
        return trains(release.shard.node, request.run, request.round, share), 0.0

    from fedtune.federation.client import app

    real_train, real_counts = app._train, app._noised_counts

    def train(release: Any, request: Any) -> Any:
        current.append(request.run)
        return real_train(release, request)

    def noised_counts(release: Any, request: Any) -> Any:
        trains(release.shard.node, request.run, -request.round, np.zeros(0))
        return real_counts(release, request)

    with ExitStack() as stack:
        for module, name, function in (
            (resources, "run_resources", run_resources), (local, "train_locally", train_locally),
            (client, "clipped_gradient_sum", clipped_gradient_sum), (app, "_train", train),
            (app, "_noised_counts", noised_counts),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(module, name, function))
        yield
