"""What LoRA and quantization cost in accuracy, against full fine-tuning: pooled `opinions`, no privacy.

    python simulations/quality/study.py              runs what is missing, then writes README.md
    python simulations/quality/study.py --seeds 0    some seeds only

Every arm sees the same number of examples in the same expected batch, on the same split; only what is
trained, the precision of what is frozen, and the learning rate that fits them differ. One record a run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedtune.config.schema import AdapterConfig, Config, ModelConfig
from fedtune.data.batches import micro_batches
from fedtune.data.prepare import PreparedData, prepare
from fedtune.models.classifier import AdaptedModel, load_model
from fedtune.models.encoder import load_tokenizer
from fedtune.models.hidden_states import Features
from fedtune.privacy.planning import make_plan
from fedtune.training.evaluation import Evaluation, evaluate
from fedtune.training.local import train_locally

HERE = Path(__file__).parent
STEPS, BATCH = 160, 64  # 10,240 examples, half an epoch
HEAD_STEPS, HEAD_BATCH = 100, 2000  # ten epochs: on kept features they take seconds


@dataclasses.dataclass(frozen=True)
class Arm:
    """What is trained, on what. Learning rates are customary: LoRA takes ten to twenty times that of full
    fine-tuning."""

    adapter: str
    quantization: str
    learning_rate: float
    steps: int = STEPS
    batch: int = BATCH


ARMS = {
    "full": Arm("lora", "none", 1e-4),
    "lora-none": Arm("lora", "none", 2e-3),
    "lora-int8": Arm("lora", "int8", 2e-3),
    "lora-nf4": Arm("lora", "nf4", 2e-3),
    "head-none": Arm("head", "none", 1e-2, HEAD_STEPS, HEAD_BATCH),
    "head-int8": Arm("head", "int8", 1e-2, HEAD_STEPS, HEAD_BATCH),
    "head-nf4": Arm("head", "nf4", 1e-2, HEAD_STEPS, HEAD_BATCH),
}


def _config(arm: str, seed: int) -> Config:
    config = Config(seed=seed)
    chosen = ARMS[arm]
    config.model = ModelConfig(quantization=chosen.quantization)
    config.adapter = AdapterConfig(name=chosen.adapter, layers=None, rank=8)
    config.partition.name, config.federation.nodes = "iid", 1
    config.federation.num_rounds = 1
    config.privacy.trust, config.privacy.epsilon = "none", None
    config.train.local_steps, config.train.learning_rate = chosen.steps, chosen.learning_rate
    return config


def _lora(config: Config, data: PreparedData, model: AdaptedModel) -> Evaluation:
    plan = make_plan(config, [data.shards[0].declared_size])
    train_locally(model, data.shards[0], plan, model.initial, config.train, round=1)
    return evaluate(model, data.test, config.train)


def _full(config: Config, data: PreparedData, model: AdaptedModel) -> Evaluation:
    """Every weight of the encoder and the head, plain AdamW; the same sampler and micro-batches as LoRA's."""
    plan = make_plan(config, [data.shards[0].declared_size])
    entropy = plan.entropy("node-0", 1, 0)
    base, shard = model.base, data.shards[0].data
    for name, parameter in base.named_parameters():
        parameter.requires_grad_("lora_" not in name and "original_module" not in name)
    trained = [p for p in base.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.train.learning_rate, weight_decay=0.01)
    features = Features.of(model, shard, config.train.micro_batch_tokens)
    for _ in range(STEPS):
        drawn = plan.sample(shard.num_records, entropy)
        optimizer.zero_grad()
        for batch in micro_batches(shard.lengths[drawn], config.train.micro_batch_tokens):
            rows = drawn[batch.records]
            logits = base(**features.inputs(rows, batch.rows, batch.length, model.device))[: len(rows)]
            target = torch.from_numpy(shard.labels[rows])
            (nn.functional.cross_entropy(logits, target, reduction="sum") / BATCH).backward()
        optimizer.step()
    return evaluate(model, data.test, config.train)


def run(arm: str, seed: int) -> dict[str, Any]:
    """One run; returns its record."""
    config = _config(arm, seed)
    tokenizer, identity = load_tokenizer(config.model)
    data = prepare(config, tokenizer, identity)
    config.train.sample_rate = ARMS[arm].batch / data.shards[0].declared_size
    model = load_model(config.model, config.adapter, len(data.label_names), seed, "cpu", data.label_names)
    start = time.time()
    result = (_full if arm == "full" else _lora)(config, data, model)
    scores = dataclasses.asdict(result)
    scores.pop("probabilities")
    trained = sum(p.numel() for p in model.base.parameters() if p.requires_grad)
    from fedtune.models import classifier

    classifier._load.cache_clear()  # full fine-tuning has changed the encoder that is kept
    return {
        "arm": arm,
        "seed": seed,
        "seconds": round(time.time() - start, 1),
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
        "Question: on pooled `opinions`, without privacy, how far is LoRA (r=8, query and value, all",
        "layers) from full fine-tuning, and int8 and nf4 from float32, at the same number of examples?",
        "",
        f"Command: `python simulations/quality/study.py`. Full and LoRA: {STEPS} steps of {BATCH}",
        f"expected examples, half an epoch. Head: {HEAD_STEPS} steps of {HEAD_BATCH}, on outputs of the",
        "frozen encoder that are computed once. Test split by person, another for each seed. Made from",
        "`records/`.",
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
    lines += ["", "Differences of means, in points (positive: the first is better):", ""]
    for first, second, target in (
        ("lora-none", "full", "at least -1"),
        ("lora-int8", "lora-none", "at least -0.5"),
        ("lora-nf4", "lora-none", "at least -1"),
        ("head-int8", "head-none", "at least -0.5"),
        ("head-nf4", "head-none", "at least -1"),
    ):
        if first in mean and second in mean:
            lines.append(
                f"- {first} - {second}: {100 * (mean[first] - mean[second]):+.2f} (target: {target})"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    options = parser.parse_args()
    (HERE / "records").mkdir(exist_ok=True)
    for seed in options.seeds:
        for arm in options.arms:
            path = HERE / "records" / f"{arm}-seed{seed}.json"
            if not path.exists():
                record = run(arm, seed)
                path.write_text(json.dumps(record, indent=2) + "\n")
                print(arm, seed, round(record["metrics"]["accuracy"], 4), record["seconds"], "s", flush=True)
                (HERE / "README.md").write_text(table())
    (HERE / "README.md").write_text(table())


if __name__ == "__main__":
    main()
