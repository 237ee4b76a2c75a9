"""What a run's training should compute, from public numbers alone: for reports about private data.

How many operations were really done depends on who was drawn and how long the texts are, so that number is
the owner's. The expected one takes every record to be as long as texts are cut to (`data.max_length`) and
every batch to be as large as the plan expects, which are settings and declared sizes.
"""

from __future__ import annotations

import numpy as np

from fedtune.config.schema import TrainConfig
from fedtune.data.corpus import TokenizedCorpus
from fedtune.models.classifier import AdaptedModel
from fedtune.models.frozen_outputs import Features
from fedtune.privacy.plan import PrivacyPlan
from fedtune.training.dp_step import clipped_sum, per_example_gradients

__all__ = ["flops_of_record"]


def flops_of_record(model: AdaptedModel, plan: PrivacyPlan, max_length: int, train: TrainConfig) -> float:
    """Floating point operations of one step for one record of `max_length` tokens, made up, counted by torch.

    A full micro-batch of such records is worked on once; nothing of it is kept. What is computed once a text
    and kept (layers below the lowest adapted one) is not in it, as it is not in what is measured.
    """
    count = max(1, min(64, train.micro_batch_tokens // max_length))
    corpus = _made_up(count, max_length, model.base.num_labels)
    pooled = model.first_layer == model.num_layers
    width, kept = model.base.encoder.width, None
    if model.first_layer > 0:
        kept = [np.zeros((1 if pooled else max_length, width), dtype=np.float16)] * count
    features = Features(corpus, kept, pooled, width, model.first_layer)
    before = model.flops.total
    with per_example_gradients(model):
        tokens, precision = train.micro_batch_tokens, train.precision
        clipped_sum(
            model, features, np.arange(count), None, plan, micro_batch_tokens=tokens, precision=precision
        )
    return (model.flops.total - before) / count


def _made_up(count: int, length: int, num_labels: int) -> TokenizedCorpus:
    return TokenizedCorpus(
        name="made up",
        input_ids=np.ones(count * length, dtype=np.int32),
        offsets=np.arange(count + 1, dtype=np.int64) * length,
        labels=np.zeros(count, dtype=np.int64),
        label_names=tuple(str(i) for i in range(num_labels)),
        units=None,
        sites=None,
        digests=np.zeros((count, 32), dtype=np.uint8),
        marks=np.zeros((count, 32), dtype=np.uint8),
        source="made up",
    )
