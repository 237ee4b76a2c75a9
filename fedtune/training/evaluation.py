"""Accuracy and its relatives on a test split that is public, or that a node evaluates for itself.

Shapes: n records, c classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from fedtune.config.schema import TrainConfig
from fedtune.data.batches import MicroBatch
from fedtune.data.corpus import TokenizedCorpus
from fedtune.models.classifier import AdaptedModel
from fedtune.models.frozen_outputs import Features, Progress

__all__ = ["Evaluation", "answers_alone", "evaluate", "predict_probabilities", "score"]


@dataclass(frozen=True)
class Evaluation:
    """Rates in [0, 1]; `loss` is the mean cross-entropy in nats; `probabilities` float32 [n, c]."""

    accuracy: float
    precision_macro: float
    recall_macro: float
    f1_macro: float
    loss: float
    per_site: dict[str, float] = field(default_factory=dict)
    probabilities: NDArray[np.float32] = field(
        default_factory=lambda: np.zeros((0, 0), np.float32), repr=False
    )


@torch.no_grad()
def predict_probabilities(
    model: AdaptedModel, data: TokenizedCorpus, train: TrainConfig, progress: Progress | None = None
) -> NDArray[np.float32]:
    """Class probabilities, float32 [n, c], of the model as it stands."""
    features = Features.of(model, data, train.micro_batch_tokens, progress, precision=train.precision)
    result = np.zeros((data.num_records, model.base.num_labels), dtype=np.float32)
    layers = model.merged_layers(train.precision)

    def work(batch: MicroBatch) -> tuple[MicroBatch, torch.Tensor]:
        arguments = features.inputs(batch.records, batch.rows, batch.length, model.device)
        with model.flops.counting(("predict", *batch.shape)):
            return batch, model.logits(arguments, train.precision, layers)

    batches = features.batches(np.arange(data.num_records), train.micro_batch_tokens)
    for batch, logits in model.each("predict", work, batches, layers):
        result[batch.records] = logits.softmax(-1).cpu().numpy()[: len(batch.records)]
    return result


@torch.no_grad()
def answers_alone(model: AdaptedModel, data: TokenizedCorpus, train: TrainConfig) -> NDArray[np.int64]:
    """The class that the model as it stands gives each record, int64 [n], each asked by itself.

    Guarantee: what is said of a record follows from that record alone. In a batch, and in outputs that are
    kept of one, the others set the shape, by which kernels round: where two classes are nearly equal, one
    record more could then turn the votes of others, and a noised count would move by more than its
    sensitivity.
    """
    features = Features(data, None, False, model.base.encoder.width, 0)
    layers = model.merged_layers(train.precision, first=0)
    said = np.zeros(data.num_records, dtype=np.int64)
    for record in range(data.num_records):
        one = np.array([record])
        arguments = features.inputs(one, *features.shape(one), model.device)
        said[record] = int(model.logits(arguments, train.precision, layers)[0].argmax())
    return said


def score(
    probabilities: NDArray[np.float32], labels: NDArray[np.int64], sites: NDArray[np.str_] | None
) -> Evaluation:
    """Metrics of `probabilities` [n, c] against `labels` [n]; macro averages are over the classes that
    occur in `labels`; a class that is never predicted has precision 0.

    Raises:
        ValueError: n is 0.
    """
    if len(labels) == 0:
        raise ValueError("there is nothing to score")
    predicted = probabilities.argmax(1)
    classes = np.unique(labels)
    hits = np.array([np.sum((predicted == c) & (labels == c)) for c in classes], dtype=float)
    predictions = np.array([np.sum(predicted == c) for c in classes], dtype=float)
    support = np.array([np.sum(labels == c) for c in classes], dtype=float)
    precision = np.divide(hits, predictions, out=np.zeros_like(hits), where=predictions > 0)
    recall = hits / support
    both = precision + recall
    f1 = np.divide(2 * precision * recall, both, out=np.zeros_like(both), where=both > 0)
    chosen = probabilities[np.arange(len(labels)), labels].astype(float)
    right = predicted == labels
    per_site = {} if sites is None else {str(s): float(right[sites == s].mean()) for s in np.unique(sites)}
    return Evaluation(
        accuracy=float(right.mean()),
        precision_macro=float(precision.mean()),
        recall_macro=float(recall.mean()),
        f1_macro=float(f1.mean()),
        loss=float(-np.log(np.maximum(chosen, 1e-12)).mean()),
        per_site=per_site,
        probabilities=probabilities,
    )


def evaluate(
    model: AdaptedModel, data: TokenizedCorpus, train: TrainConfig, progress: Progress | None = None
) -> Evaluation:
    """Scores the model, with the adapter that it holds now, on all of `data` (n at least 1)."""
    return score(predict_probabilities(model, data, train, progress), data.labels, data.sites)
