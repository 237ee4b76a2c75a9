"""Training speed against no privacy; against other programs: `peers`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from fedtune.data.batches import micro_batches
from fedtune.training.dp_step import clipped_sum
from fedtune.training.example_gradients import per_example_gradients
from fedtune.training.local import ShardView
from scripts.benchmarks.common import in_turn, plan_for, pooled, take, write


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
