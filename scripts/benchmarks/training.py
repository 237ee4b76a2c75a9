"""Training speed against no privacy; against other programs: `peers`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from fedtune.config.schema import TrainConfig
from fedtune.data.batches import micro_batches
from fedtune.models.merged_layers import Seen
from fedtune.training.dp_step import clipped_sum
from fedtune.training.example_gradients import hooks_for
from fedtune.training.local import ShardView
from scripts.benchmarks.common import in_turn, plan_for, pooled, take, write

_TOKENS = TrainConfig().micro_batch_tokens


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
            with hooks_for(model, view.features):
                total = clipped_sum(model, view.features, records, None, plan, micro_batch_tokens=_TOKENS)
            plan.average(total + plan.noise(model.num_parameters, entropy))

        def plain(model: Any = model, view: Any = view, records: Any = records) -> None:
            """The same products in the same precision; one gradient of a whole micro-batch, no hooks."""
            corpus, layers = view.features.corpus, model.merged_layers("auto")
            for batch in micro_batches(corpus.lengths[records], _TOKENS):
                rows = records[batch.records]
                arguments = view.features.inputs(rows, batch.rows, batch.length, model.device)
                seen: list[Seen] = []
                logits = model.logits(arguments, "auto", layers, seen)
                target = torch.from_numpy(corpus.labels[rows])
                loss = nn.functional.cross_entropy(logits[: len(rows)], target, reduction="sum")
                head = [p for n, p in model.parameters.items() if "classifier" in n]
                outputs = torch.autograd.grad(loss, [*head, *(operation.y for operation in seen)])
                for operation, g in zip(seen, outputs[len(head) :], strict=True):
                    Seen(operation.x.flatten(0, 1)[None], operation.y, operation.parts).per_example(
                        g.flatten(0, 1)[None]
                    )

        results[name] = in_turn(private, plain, repeats)
    write(
        "step",
        {
            "question": "seconds of a DP step over the same step without privacy (256 examples)",
            "target": "ratio_median at most 1.05",
            "adapters": results,
        },
    )
