"""What the benchmarks share: the data and model of the default job, timing in pairs, and the record."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedtune.config.schema import AdapterConfig, Config, ModelConfig
from fedtune.data.corpus import Shard, TokenizedCorpus
from fedtune.data.prepare import PreparedData, prepare
from fedtune.models.classifier import AdaptedModel, load_model
from fedtune.models.encoder import fast_bf16, load_tokenizer
from fedtune.privacy.mechanisms.local import Local
from fedtune.privacy.mechanisms.none import NoPrivacy
from fedtune.privacy.plan import PrivacyPlan
from fedtune.runs.environment import hardware

OUTPUT = Path(__file__).resolve().parents[2] / "simulations" / "speed"
RECORDS = OUTPUT / "records"
NOISE_MULTIPLIER, CLIP = 0.8, 1.0


def pooled(
    quantization: str = "none",
    layers: int | None = None,
    *,
    adapter: str = "lora",
    name: str = "embedded:minilm",
) -> tuple[PreparedData, AdaptedModel, Shard, Config]:
    """All of `opinions` as one shard, and an encoder with LoRA r=8 on query and value, or another adapter."""
    config = Config(model=ModelConfig(name=name, quantization=quantization))
    config.adapter = AdapterConfig(name=adapter, layers=layers)
    config.partition.name, config.federation.nodes = "iid", 1
    tokenizer, identity = load_tokenizer(config.model)
    data = prepare(config, tokenizer, identity)
    model = load_model(config.model, config.adapter, len(data.label_names), 0, "cpu", data.label_names)
    return data, model, data.shards[0], config


def take(shard: Shard, size: int) -> Shard:
    """The first `size` records of a shard (its order is random), declared as they are."""
    data: TokenizedCorpus = shard.data.subset(range(size))
    return replace(shard, data=data, declared_size=size, record_index=shard.record_index[:size])


def plan_for(size: int, rate: float, steps: int, private: bool = True) -> PrivacyPlan:
    """A plan with a fixed noise multiplier: the benchmarks compare work, and calibrate nothing."""
    kind = Local if private else NoPrivacy
    return PrivacyPlan(
        mechanism=kind(sample_rate=rate, local_steps=steps),
        unit="record",
        num_rounds=1,
        noise_multiplier=NOISE_MULTIPLIER if private else 0.0,
        max_grad_norm=CLIP if private else float("inf"),
        declared_size=size,
        delta=1 / (2 * size) if private else 0.0,
    )


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turn(first: Callable[[], object], second: Callable[[], object], repeats: int) -> dict[str, Any]:
    """Times the two in turn after one uncounted call of each; the ratio is of pairs, first over second."""
    first(), second()
    pairs = [(seconds(first), seconds(second)) for _ in range(repeats)]
    return {
        "seconds_first": [round(a, 4) for a, _ in pairs],
        "seconds_second": [round(b, 4) for _, b in pairs],
        **ratios_of(pairs),
    }


def ratios_of(pairs: Iterable[tuple[float, float]]) -> dict[str, float]:
    """Least, median and largest of first over second."""
    ratios = sorted(a / b for a, b in pairs)
    return {
        "ratio_min": round(ratios[0], 3),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_max": round(ratios[-1], 3),
    }


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "processor": hardware()["processor"],
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def folder_of_records() -> Path:
    """Where records of such a processor go: `records/`, or `records/avx2` and the like without fast bf16."""
    return RECORDS if fast_bf16("cpu") else RECORDS / torch.backends.cpu.get_cpu_capability().lower()


def write(name: str, result: dict[str, Any]) -> None:
    """Keeps one benchmark's record, and prints it."""
    record = {"benchmark": name, "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **result}
    record["machine"] = machine()
    folder = folder_of_records()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2), flush=True)
