"""Records of runs that never were: whole, valid, and plausible enough to look at in a report.

Accuracy rises with epsilon and falls with coarser quantization, sites differ, seeds scatter; epsilon is what
the accountant says of the noise in the record. `write_grid` fills a folder as a sweep would.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedtune.config.choices import resolved
from fedtune.config.schema import Config, DataConfig, PricingConfig
from fedtune.privacy.accounting.epsilon import Term, epsilon_of_terms

DELTA = 5.555555555555556e-05
SITES = {"editorials": -0.03, "movies": 0.0, "products": 0.02, "tweets": -0.01}
SAMPLE_RATE, STEPS, ROUNDS = 0.05, 5, 6
# Noise multipliers (standard deviation over the norm) of about these epsilons; None: without privacy.
NOISE = {0.5: 2.35, 1.0: 1.42, 2.0: 0.98, 4.0: 0.74, 8.0: 0.575, None: 0.0}
PRICING = PricingConfig(
    name="cloud_cpu",
    currency="USD",
    date="2026-11-01",
    source="example prices",
    device="2 virtual CPUs",
    device_hour=0.1,
    gigabyte_down=0.09,
    carbon_kg_per_kwh=0.4,
)


@functools.cache
def epsilon_for(noise: float, rounds: int = ROUNDS) -> float:
    """What the accountant says of a node that took part in every round."""
    return epsilon_of_terms({Term(SAMPLE_RATE, noise): STEPS * rounds}, DELTA)


def make_record(
    *,
    epsilon: float | None = 8.0,
    seed: int = 0,
    quantization: str = "int8",
    adapter: str = "lora",
    trust: str = "local",
    unit: str = "record",
    dataset: str = "opinions",
    pricing: PricingConfig = PRICING,
    accuracy: float | None = None,
    public: bool = True,
    noise: float | None = None,
    curve: bool = True,
    left_out: Mapping[str, str] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """One whole record. `left_out`: sites that took no part, and why; `settings` are further dotted settings,
    with '__' for the dot."""
    left_out = left_out or {}
    config = resolved(Config(seed=seed, output="/somewhere", pricing=pricing, data=DataConfig(public=True)))
    config.data.name = dataset
    config.data.unit, config.data.site, config.data.public = "unit", "site", public
    config.model.quantization, config.adapter.name = quantization, adapter
    config.privacy.trust = trust = "none" if epsilon is None else trust
    config.privacy.epsilon, config.privacy.unit = epsilon, unit
    config.federation.num_rounds, config.train.head_rounds, config.privacy.head_norm = ROUNDS, 2, 0.0
    for name, value in settings.items():
        part, _, last = name.rpartition("__")
        setattr(getattr(config, part) if part else config, last, value)
    name = json.dumps(dataclasses.asdict(config), sort_keys=True)
    identity = hashlib.sha256(name.encode()).hexdigest()[:16]
    chance = random.Random(identity)
    noise = NOISE.get(epsilon, NOISE[8.0]) if noise is None else noise
    private = epsilon is not None
    spent = epsilon_for(noise) if private else None
    if accuracy is None:
        accuracy = _accuracy(epsilon, quantization, adapter, trust) + chance.gauss(0.0, 0.004)
    speed = {"none": 1.0, "int8": 0.62, "nf4": 0.78}[quantization] * {"head": 0.3, "bitfit": 0.8}.get(
        adapter, 1.0
    )
    train_seconds = 420.0 * speed * chance.uniform(0.95, 1.05)
    moved = {"head": 60_000, "bitfit": 180_000, "ffa_lora": 620_000}.get(adapter, 1_194_000) * ROUNDS
    amounts = {
        "currency": pricing.currency,
        "compute": pricing.device_hour * train_seconds / 3600,
        "network": pricing.gigabyte_down * moved / 1e9,
        "energy": 0.0,
        "data": 0.0,
    }
    amounts["total"] = amounts["compute"] + amounts["network"]
    nodes = list(SITES)
    return {
        "schema": 1,
        "run": {
            "id": identity,
            "started": f"2026-11-21T{seed % 24:02d}:00:00+00:00",
            "seconds": train_seconds * 1.2,
            "engine": "local",
            "seed": seed,
            "versions": {"fedtune": "0.1.0", "torch": "2.13.0"},
            "commit": "dc69134461c86b5d4f57d6fc791943527afbfc47",
            "dirty": False,
            "hardware": {"cores": 2, "device": "cpu"},
            "status": "finished",
            "attempt": 1,
        },
        "config": dataclasses.asdict(config),
        "data": {
            "name": dataset,
            "source": "opinions",
            "public": public,
            "labels": ["negative", "positive"],
            "declared_sizes": {"editorials": 4400, "movies": 9000, "products": 3200, "tweets": 3600},
            "test_records": 3570,
            "only_site": None,
            "notes": [],
        },
        "federation": {
            "nodes": 4, "node_names": nodes, "rounds": ROUNDS, "cohort_size": 4,
            "dropped": [{"node": node, "round": 0, "reason": why} for node, why in left_out.items()],
            "left_out": [{"node": node, "reason": why} for node, why in left_out.items()],
        },
        "privacy": {
            "unit": unit,
            "adjacency": f"add or remove one {unit}",
            "trust": trust,
            "mechanism": "DP-SGD on each node" if private else "none",
            "noise_multiplier": noise if private else 0.0,
            "max_grad_norm": 1.0 if private else None,
            "sample_rate": SAMPLE_RATE,
            "local_steps": STEPS,
            "steps": STEPS * ROUNDS,
            "accountant": "PLD (fedtune 0.1.0, checked against dp-accounting)" if private else None,
            "epsilon": spent,
            "delta": DELTA if private else None,
            "epsilon_rdp": spent * 1.2 if spent is not None else None,
            "target_epsilon": epsilon,
            "per_node": [
                {"node": node, "epsilon": spent, "delta": DELTA if private else None,
                 "releases": 0 if node in left_out else ROUNDS}
                for node in nodes
            ],
            "ledger": [
                {"node": node, "dataset": dataset, "fingerprint": f"print of {dataset}", "releases": ROUNDS,
                 "epsilon": spent, "delta": DELTA}
                for node in nodes
            ],
            "reproducible_noise": False,
            "data_public": public,
            "cautions": [],
            "audit": None,
        },
        "metrics": {
            "accuracy": accuracy,
            "precision_macro": accuracy,
            "recall_macro": accuracy,
            "f1_macro": accuracy,
            "loss": 1.2 - accuracy,
            "chance": 0.5,
            "majority_rate": 0.527,
            "num_records": 3570,
            "by_round": _rounds(accuracy, noise, private, chance) if curve else [],
            "per_site": {
                site: {"accuracy": accuracy + off * (1 + 2 / (epsilon or 16)), "num_records": 800}
                for site, off in SITES.items()
            },
        },
        "cost": {
            "seconds": train_seconds * 1.2,
            "train_seconds": train_seconds,
            "flops": int(2.8e13 * speed),
            "peak_memory_bytes": int(1.2e9 + 6e8 * speed),
            "encoder_bytes": {"none": 90_000_000, "int8": 22_864_624, "nf4": 13_000_000}[quantization],
            "adapter_bytes": 297_992,
            "bytes_up": moved,
            "bytes_down": moved,
            "energy_kwh": 7.7e-06 * train_seconds,
            "carbon_kg": 3e-6 * train_seconds,
            "money": amounts,
            "pricing": dataclasses.asdict(pricing),
        },
        "artifacts": {"adapter": "adapter", "statement": "statement.md"},
    }  # fmt: skip


def _accuracy(epsilon: float | None, quantization: str, adapter: str, trust: str) -> float:
    effective = 64.0 if epsilon is None else epsilon * (4.0 if trust == "distributed" else 1.0)
    height = 0.83 - 0.11 * math.exp(-0.55 * math.log1p(2 * effective))
    return (
        height - {"none": 0.0, "int8": 0.002, "nf4": 0.008}[quantization] - {"head": 0.03}.get(adapter, 0.0)
    )


def _rounds(accuracy: float, noise: float, private: bool, chance: random.Random) -> list[dict[str, Any]]:
    found = []
    for i in range(1, ROUNDS + 1):
        last = i == ROUNDS
        value = accuracy if last else accuracy - 0.2 * math.exp(-i) + chance.gauss(0, 0.003)
        found.append(
            {
                "round": i,
                "seconds": 10.0,
                "accuracy": value,
                "loss": 1.2 - value,
                "epsilon": epsilon_for(noise) * math.sqrt(i / ROUNDS) if private else None,
            }
        )
    return found


def write(folder: Path, record: dict[str, Any]) -> Path:
    """Writes `record` as the record.json of the run folder `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "record.json"
    path.write_text(json.dumps(record, allow_nan=False), encoding="utf-8")
    return path


def write_grid(root: Path, seeds: int = 3, **axes: list[Any]) -> int:
    """One record for each combination of `axes` and each seed, in numbered folders; returns how many."""
    axes = axes or {"epsilon": list(NOISE), "quantization": ["none", "int8", "nf4"]}
    count = 0
    for values in itertools.product(*axes.values()):
        for seed in range(seeds):
            write(root / str(count), make_record(seed=seed, **dict(zip(axes, values, strict=True))))
            count += 1
    return count


def write_compressed(folder: Path, original: float = 100.0, **formats: tuple[float, float | None]) -> Path:
    """A folder as `fedtune compress` makes it: speeds of original and formats, and accuracies of formats."""

    def one(speed: float, accuracy: float | None) -> dict[str, Any]:
        return {"texts_per_second": speed, "accuracy": accuracy}

    folder.mkdir(parents=True)
    made = {
        "schema": 1,
        "processor": "AVX512",
        "settings": {"threads": 1},
        "original": one(original, 0.80),
        "steps": [{"step": "distill", **one(2 * original, 0.79)}],
        "formats": {name: one(*values) for name, values in formats.items()},
    }
    (folder / "compression.json").write_text(json.dumps(made))
    return folder
