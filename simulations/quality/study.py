"""What LoRA and quantization cost in accuracy, against full fine-tuning: pooled `opinions`, no privacy.

    python simulations/quality/study.py              runs what is missing, then writes README.md
    python simulations/quality/study.py --seeds 0    some seeds only
    python simulations/quality/study.py --arms full --threads 1 &
    python simulations/quality/study.py --arms lora-none --threads 1    two at a time, on two cores

`full` and the `lora` arms go through one loop: the same examples in the same order, one epoch, AdamW with a
linear warm-up and decay; only what is trained, the precision of what is frozen, and the learning rate differ.
LoRA is on every matrix of every layer, with alpha 32 and ten times the learning rate of full fine-tuning, as
in Schulman et al. 2025 (LoRA Without Regret); nothing that was tried beside it on seed 3 was better (LOG.md).
The `head` arms train as `fedtune run` does, on outputs of the frozen encoder that are computed once. A record
for each run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedtune.config.schema import AdapterConfig, Config, ModelConfig
from fedtune.data.batches import micro_batches
from fedtune.data.corpus import TokenizedCorpus
from fedtune.data.prepare import PreparedData, prepare
from fedtune.models.classifier import AdaptedModel, forget_models, load_model
from fedtune.models.encoder import load_tokenizer
from fedtune.models.frozen_outputs import Features
from fedtune.privacy.plan import make_plan
from fedtune.training.evaluation import evaluate
from fedtune.training.local import train_locally

HERE = Path(__file__).parent
BATCH, WARM_UP = 32, 0.06  # examples of a step; share of the steps until the full learning rate
ALPHA = 32.0
MATRICES = ["query", "key", "value", "dense"]  # every linear layer of a BERT's encoder
HEAD_STEPS, HEAD_BATCH = 100, 2000  # ten epochs: on kept features they take seconds


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is trained (`full`, or an adapter of fedtune's), on what, and how fast."""

    trained: str
    quantization: str
    learning_rate: float


ARMS = {
    "full": Arm("full", "none", 1e-4),
    "lora-none": Arm("lora", "none", 1e-3),
    "lora-int8": Arm("lora", "int8", 1e-3),
    "lora-nf4": Arm("lora", "nf4", 1e-3),
    "head-none": Arm("head", "none", 1e-2),
    "head-int8": Arm("head", "int8", 1e-2),
    "head-nf4": Arm("head", "nf4", 1e-2),
}


def _config(arm: Arm, seed: int) -> Config:
    config = Config(seed=seed)
    config.model = ModelConfig(quantization=arm.quantization)
    # `full` needs LoRA's wrapping and not LoRA: its product starts at zero, and is not trained.
    name, rank = ("lora", 1) if arm.trained == "full" else (arm.trained, 8)
    matrices = MATRICES if arm.trained == "lora" else None
    config.adapter = AdapterConfig(name, layers=None, rank=rank, alpha=ALPHA, target_modules=matrices)
    config.partition.name, config.federation.nodes = "iid", 1
    config.federation.num_rounds = 1
    config.privacy.trust, config.privacy.epsilon = "none", None
    config.train.local_steps, config.train.learning_rate = HEAD_STEPS, arm.learning_rate
    return config


def _head(config: Config, data: PreparedData, model: AdaptedModel) -> int:
    """Trains as a node does; the number of steps."""
    config.train.sample_rate = HEAD_BATCH / data.shards[0].declared_size
    plan = make_plan(config, [data.shards[0].declared_size])
    train_locally(model, data.shards[0], plan, model.initial, config.train, round=1)
    return HEAD_STEPS


def _order(lengths: NDArray[np.int64], seed: int) -> Iterator[NDArray[np.int64]]:
    """One epoch of batches, of texts of like length: within each hundred batches they are sorted."""
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(lengths))
    batches = []
    for start in range(0, len(shuffled), 100 * BATCH):
        part = shuffled[start : start + 100 * BATCH]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[i : i + BATCH] for i in range(0, len(part), BATCH)]
    for i in rng.permutation(len(batches)):
        yield batches[i]


def _epoch(arm: Arm, config: Config, shard: TokenizedCorpus, model: AdaptedModel, say: str) -> int:
    """One epoch of AdamW over what the arm trains; the number of steps."""
    base = model.base
    if arm.trained == "full":
        for name, parameter in base.named_parameters():
            parameter.requires_grad_("lora_" not in name and "original_module" not in name)
    trained = [p for p in base.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=arm.learning_rate, weight_decay=0.01)
    batches = list(_order(shard.lengths, config.seed))
    warm = round(WARM_UP * len(batches))
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (len(batches) - step) / (len(batches) - warm))
    )
    features = Features.of(model, shard, config.train.micro_batch_tokens, precision="fp32")
    lost, began = 0.0, time.time()
    for step, drawn in enumerate(batches, 1):
        optimizer.zero_grad()
        for batch in micro_batches(shard.lengths[drawn], config.train.micro_batch_tokens):
            rows = drawn[batch.records]
            logits = base(**features.inputs(rows, batch.rows, batch.length, model.device))[: len(rows)]
            target = torch.from_numpy(shard.labels[rows])
            loss = nn.functional.cross_entropy(logits, target, reduction="sum") / len(drawn)
            loss.backward()
            lost += loss.item()
        optimizer.step()
        decay.step()
        if step % 50 == 0:
            speed = step * BATCH / (time.time() - began)
            print(f"{say}: step {step} of {len(batches)}, loss {lost / 50:.4f}, {speed:.1f}/s", flush=True)
            lost = 0.0
    return len(batches)


def run(name: str, seed: int) -> dict[str, Any]:
    """One run; returns its record."""
    arm = ARMS[name]
    config = _config(arm, seed)
    tokenizer, identity = load_tokenizer(config.model)
    data = prepare(config, tokenizer, identity)
    model = load_model(config.model, config.adapter, len(data.label_names), seed, "cpu", data.label_names)
    began = time.time()
    if arm.trained == "head":
        steps, batch = _head(config, data, model), HEAD_BATCH
    else:
        steps, batch = _epoch(arm, config, data.shards[0].data, model, f"{name} seed {seed}"), BATCH
    seconds = time.time() - began
    scores = dataclasses.asdict(evaluate(model, data.test, config.train))
    scores.pop("probabilities")
    trained = sum(p.numel() for p in model.base.parameters() if p.requires_grad)
    forget_models()  # full fine-tuning has changed the encoder that is kept
    return {
        "arm": name,
        "seed": seed,
        "steps": steps,
        "batch": batch,
        "learning_rate": arm.learning_rate,
        "training_seconds": round(seconds, 1),
        "training_examples": data.shards[0].data.num_records,
        "test_examples": data.test.num_records,
        "trained_parameters": trained,
        "encoder_bytes": model.encoder_bytes,
        "config": dataclasses.asdict(config),
        "metrics": scores,
        "torch": torch.__version__,
    }


def table() -> str:
    """README.md, from the records."""
    records = [json.loads(path.read_text()) for path in sorted((HERE / "records").glob("*.json"))]
    arms = {arm: [r for r in records if r["arm"] == arm] for arm in ARMS}
    mean = {a: statistics.mean(r["metrics"]["accuracy"] for r in rs) for a, rs in arms.items() if rs}
    lines = [
        "# What LoRA and quantization cost in accuracy",
        "",
        "Question: on pooled `opinions`, without privacy, how far is LoRA (r=8, alpha=32, every matrix)",
        "from full fine-tuning, and int8 and nf4 from float32, at the same examples in the same order?",
        "",
        f"Command: `python simulations/quality/study.py`. Full and LoRA: one epoch, batches of {BATCH},",
        "AdamW, linear warm-up and decay; the learning rate of LoRA is ten times that of full fine-tuning.",
        f"Head: {HEAD_STEPS} steps of {HEAD_BATCH}, on outputs of the frozen encoder that are computed once.",
        "Test split by person, another for each seed. Made from `records/`.",
        "",
        "| arm | seeds | accuracy, mean | by seed | trained parameters | encoder MB |",
        "|---|---|---|---|---|---|",
    ]
    for arm, found in arms.items():
        if found:
            by_seed = ", ".join(f"{r['metrics']['accuracy']:.4f}" for r in found)
            lines.append(
                f"| {arm} | {len(found)} | {mean[arm]:.4f} | {by_seed} | {found[0]['trained_parameters']:,} "
                f"| {found[0]['encoder_bytes'] / 1e6:.1f} |"
            )
    lines += ["", "Differences in points, over the seeds that both have (positive: the first is better):", ""]
    for first, second, target in (
        ("lora-none", "full", "at least -1"),
        ("lora-int8", "lora-none", "at least -0.5"),
        ("lora-nf4", "lora-none", "at least -1"),
        ("head-int8", "head-none", "at least -0.5"),
        ("head-nf4", "head-none", "at least -1"),
    ):
        scores = [{r["seed"]: r["metrics"]["accuracy"] for r in arms[name]} for name in (first, second)]
        gaps = [100 * (scores[0][seed] - scores[1][seed]) for seed in sorted(scores[0].keys() & scores[1])]
        if gaps:
            by_seed = ", ".join(f"{gap:+.2f}" for gap in gaps)
            lines.append(f"- {first} - {second}: {statistics.mean(gaps):+.2f} ({by_seed}; target: {target})")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch; default: all cores")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    (HERE / "records").mkdir(exist_ok=True)
    for seed in options.seeds:
        for arm in options.arms:
            path = HERE / "records" / f"{arm}-seed{seed}.json"
            if not path.exists():
                record = run(arm, seed)
                path.write_text(json.dumps(record, indent=2) + "\n")
                print(arm, seed, round(record["metrics"]["accuracy"], 4), flush=True)
                (HERE / "README.md").write_text(table())
    (HERE / "README.md").write_text(table())


if __name__ == "__main__":
    main()
