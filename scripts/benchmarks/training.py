"""Training speed: against what a user would write with the same libraries, and against no privacy."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import nn

from fedtune.data.batches import micro_batches
from fedtune.models.encoder import model_location
from fedtune.training.dp_step import clipped_sum
from fedtune.training.example_gradients import per_example_gradients
from fedtune.training.local import ShardView, train_locally
from scripts.benchmarks.common import CLIP, NOISE_MULTIPLIER, in_turn, plan_for, pooled, take, write

EXAMPLES, RATE = 512, 0.5  # shard size and sampling rate: 256 expected examples a step, in both programs


def _naive(texts: list[str], labels: np.ndarray, physical_batch: int) -> Any:
    """DP-SGD as the libraries' own tutorials write it; returns a function that takes one epoch's steps."""
    from opacus import PrivacyEngine
    from opacus.utils.batch_memory_manager import BatchMemoryManager
    from peft import LoraConfig, TaskType, get_peft_model
    from torch.utils.data import DataLoader, TensorDataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    location = model_location("embedded:minilm")
    tokens = AutoTokenizer.from_pretrained(location)(
        texts, padding="max_length", truncation=True, max_length=64, return_tensors="pt"
    )
    model = AutoModelForSequenceClassification.from_pretrained(location, num_labels=2)
    model = get_peft_model(
        model, LoraConfig(task_type=TaskType.SEQ_CLS, r=8, lora_alpha=16, target_modules=["query", "value"])
    ).train()
    dataset = TensorDataset(tokens["input_ids"], tokens["attention_mask"], torch.from_numpy(labels))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model, optimizer, loader = PrivacyEngine().make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(dataset, batch_size=int(EXAMPLES * RATE)),
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=CLIP,
    )

    def steps() -> None:
        with BatchMemoryManager(
            data_loader=loader, max_physical_batch_size=physical_batch, optimizer=optimizer
        ) as batches:
            for ids, mask, target in batches:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(input_ids=ids, attention_mask=mask).logits, target)
                loss.backward()
                optimizer.step()

    return steps


def throughput(repeats: int = 3) -> None:
    """Examples a second of DP-SGD, LoRA r=8 on query and value of all layers, fp32 weights in both."""
    warnings.simplefilter("ignore")
    _, model, shard, config = pooled("none")
    small = take(shard, EXAMPLES)
    steps = round(1 / RATE)
    config.train.sample_rate, config.train.local_steps = RATE, steps
    plan = plan_for(EXAMPLES, RATE, steps)

    def ours() -> None:
        train_locally(model, small, plan, model.initial, config.train, round=1)

    from fedtune.data.sources.load import load_corpus

    corpus, _ = load_corpus(config.data, config.seed)
    rows = [int(i) for i in small.record_index]
    texts = [corpus.texts[i] for i in rows]
    # The tutorial program gets the best of three physical batch sizes.
    measured = {
        size: in_turn(_naive(texts, corpus.labels[rows], size), ours, 1 if size != 32 else repeats)
        for size in (16, 64, 32)
    }
    best = min(measured, key=lambda size: min(measured[size]["seconds_first"]))
    result = (
        measured[best] if best == 32 else in_turn(_naive(texts, corpus.labels[rows], best), ours, repeats)
    )
    write(
        "throughput",
        {
            "question": "examples a second: fedtune over Hugging Face + PEFT + Opacus, padded to 64",
            "expected_examples": EXAMPLES,
            "mean_tokens": round(float(small.data.lengths.mean()), 2),
            "naive_physical_batch": best,
            "naive_examples_per_second": [round(EXAMPLES / s, 1) for s in result["seconds_first"]],
            "fedtune_examples_per_second": [round(EXAMPLES / s, 1) for s in result["seconds_second"]],
            "speedup_by_physical_batch": {str(k): v["ratio_median"] for k, v in measured.items()},
            **result,
            "target": "ratio_median at least 5",
        },
    )


def step(repeats: int = 5) -> None:
    """One DP step over the same examples, with and without per-example gradients, clipping and noise."""
    results = {}
    for name, layers in (("all layers", None), ("top 2 layers", 2)):
        _, model, shard, config = pooled("none", layers)
        small = take(shard, 256)
        plan = plan_for(256, 1.0, 1)
        view = ShardView(model, small, "record", config.train)
        records = np.arange(256)
        entropy = plan.entropy("bench", 1, 0)

        def private(
            model: Any = model,
            view: Any = view,
            records: Any = records,
            plan: Any = plan,
            entropy: Any = entropy,
        ) -> None:
            with per_example_gradients(model):
                total = clipped_sum(model, view.features, records, None, plan, micro_batch_tokens=2048)
            plan.average(total + plan.noise(model.num_parameters, entropy))

        def plain(model: Any = model, view: Any = view, records: Any = records) -> None:
            corpus = view.features.corpus
            for batch in micro_batches(corpus.lengths[records], 2048):
                rows = records[batch.records]
                logits = model.base(**view.features.inputs(rows, batch.rows, batch.length, model.device))
                target = torch.from_numpy(corpus.labels[rows])
                nn.functional.cross_entropy(logits[: len(rows)], target, reduction="sum").backward()
            for parameter in model.parameters.values():
                parameter.grad = None

        results[name] = in_turn(private, plain, repeats)
    write(
        "step",
        {
            "question": "seconds of a DP step over the same step without privacy (256 examples)",
            "target": "ratio_median at most 1.15",
            "adapters": results,
        },
    )
