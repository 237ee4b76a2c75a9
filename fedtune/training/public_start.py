"""Trains the start of a run on public labelled texts, on the server: no clipping, no noise, no epsilon.

What a run starts from is public then, as the encoder is, and all that is accounted comes after (Yu et al.
2021, "Differentially Private Fine-tuning of Language Models"; Yu et al. 2023, "Selective Pre-training for
Private Fine-tuning"). The same texts and settings give the same start.

    head     on the encoder's outputs, which are computed once: all texts in every step
    the rest head and adapter together in small batches, where private rounds do not train the head alone
             first: those are computed on the encoder as it is

A model that centres its texts sees them from the mean of the public ones, until a round sets the centre.

Shapes: n texts, d width, c classes, P numbers of the adapter.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from fedtune.config.schema import TrainConfig
from fedtune.data.corpus import TokenizedCorpus
from fedtune.errors import ModelError
from fedtune.models.classifier import AdaptedModel
from fedtune.models.frozen_outputs import Features, Progress

__all__ = ["train_head", "train_inside"]

_HEAD_STEPS, _HEAD_RATE = 60, 0.05
_PULL = 1e-3  # towards the start: a class of few texts stays near its name
_EPOCHS, _BATCH, _RATE = 3, 32, 0.002
_MOST_STEPS = 400
_WARM = 0.1  # share of the steps in which the rate rises


def train_head(
    model: AdaptedModel,
    texts: TokenizedCorpus,
    start: NDArray[np.float32],
    train: TrainConfig,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """The adapter `start` [P] of a bare head, with head and centre by `texts`, float32 [P].

    Args:
        model: a bare head; its adapter is replaced.
        texts: public.
        start: where the head begins.
        train: how frozen layers are computed.
        progress: called with (texts done, texts to do) while they are.

    Raises:
        ModelError: it came to no finite numbers.
    """
    features = Features.of(model, texts, train.micro_batch_tokens, progress, precision=train.precision)
    vectors = torch.from_numpy(features.vectors(np.arange(texts.num_records)).astype(np.float32))
    vectors, labels = vectors.to(model.device), torch.from_numpy(texts.labels).to(model.device)
    start = start.copy()
    if model.centre_size:
        mean = functional.normalize(vectors, dim=-1).mean(0)
        start[-model.centre_size :] = mean.cpu().numpy()
    model.set_vector(start)
    with torch.no_grad():
        inputs = model.base.scaled(vectors)
    parameters = list(model.parameters.values())
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.Adam(parameters, lr=_HEAD_RATE)
    for _ in range(_HEAD_STEPS):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model.base.classifier(inputs), labels)
        for parameter, at in zip(parameters, before, strict=True):
            loss = loss + _PULL * (parameter - at).square().sum()
        loss.backward()
        optimizer.step()
    return _checked(model)


def train_inside(
    model: AdaptedModel,
    texts: TokenizedCorpus,
    start: NDArray[np.float32],
    train: TrainConfig,
    seed: int,
    progress: Progress | None = None,
) -> NDArray[np.float32]:
    """The adapter `start` [P], all of it trained on `texts`, float32 [P].

    Args:
        model: has something to train inside the encoder; its adapter is replaced.
        texts: public.
        start: with the head as it is to begin.
        train: precision and micro-batches.
        seed: of the order of the texts.
        progress: called with (texts done, texts to do).

    Raises:
        ModelError: it came to no finite numbers.
    """
    features = Features.of(model, texts, train.micro_batch_tokens, precision=train.precision)
    model.set_vector(start)
    parameters = list(model.parameters.values())
    optimizer = torch.optim.Adam(parameters, lr=_RATE)
    n, chance = texts.num_records, np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(2,)))
    steps = min(_MOST_STEPS, _EPOCHS * math.ceil(n / _BATCH))
    order = np.concatenate([chance.permutation(n) for _ in range(math.ceil(steps * _BATCH / n))])
    for step in range(steps):
        rows = order[step * _BATCH : (step + 1) * _BATCH]
        for group in optimizer.param_groups:
            group["lr"] = _RATE * min(
                (step + 1) / max(1.0, _WARM * steps), (steps - step) / (steps * (1 - _WARM))
            )
        optimizer.zero_grad()
        for batch in features.batches(rows, train.micro_batch_tokens):
            records = rows[batch.records]
            arguments = features.inputs(records, batch.rows, batch.length, model.device)
            logits = model.logits(arguments, train.precision, None)[: len(records)]
            wanted = torch.from_numpy(texts.labels[records]).to(model.device)
            loss = functional.cross_entropy(logits, wanted, reduction="sum") / len(rows)
            loss.backward()
        optimizer.step()
        if progress is not None:
            progress(min(n, (step + 1) * n // steps), n)
    return _checked(model)


def _checked(model: AdaptedModel) -> NDArray[np.float32]:
    for parameter in model.parameters.values():
        parameter.grad = None  # whoever has the model next begins without
    found = model.get_vector()
    if not np.isfinite(found).all():
        raise ModelError(
            f"Training on the texts of public.path ended with {int((~np.isfinite(found)).sum())} of "
            f"{found.size} numbers infinite or NaN. Leave public.path out, or look whether the encoder "
            "itself has weights that are no numbers."
        )
    return found
