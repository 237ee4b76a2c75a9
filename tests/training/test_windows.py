"""A text of several windows is one record: one vector, one gradient, clipped once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedtune.config.schema import AdapterConfig, ModelConfig, TrainConfig
from fedtune.data.corpus import TokenizedCorpus, offsets_of
from fedtune.data.windows import window_sizes
from fedtune.models.classifier import AdaptedModel, load_model
from fedtune.models.frozen_outputs import Features
from fedtune.training import example_gradients
from fedtune.training.dp_step import clipped_sum
from fedtune.training.evaluation import predict_probabilities
from fedtune.training.example_gradients import hooks_for
from fedtune.training.preflight import preflight
from tests.models.conftest import families  # noqa: F401
from tests.training.conftest import make_plan

WINDOW = 8
LENGTHS = [5, 30, 8, 9, 17, 24, 31, 6]  # tokens of the records: one to four windows
ADAPTERS: list[dict[str, Any]] = [
    {"name": "lora"}, {"name": "ffa_lora"}, {"name": "bitfit"}, {"name": "head"},
    {"name": "lora", "layers": 1},
]  # fmt: skip


def corpus(window: int | None = WINDOW) -> TokenizedCorpus:
    chance = np.random.default_rng(4)
    pieces = []
    for tokens in LENGTHS:
        for size in window_sizes(tokens, WINDOW):
            pieces += [2, *chance.integers(5, 12, size - 2).tolist(), 3]
    count = len(LENGTHS)
    return TokenizedCorpus(
        name="long", input_ids=np.array(pieces, dtype=np.int32), offsets=offsets_of(np.array(LENGTHS)),
        labels=chance.integers(0, 2, count), label_names=("no", "yes"), units=None, sites=None,
        digests=np.arange(32 * count, dtype=np.uint8).reshape(count, 32),
        marks=np.arange(32 * count, dtype=np.uint8).reshape(count, 32), source="long", window=window,
    )  # fmt: skip


def load(folder: Path, **adapter: Any) -> AdaptedModel:
    encoder = ModelConfig(name=str(folder), quantization="none")
    model = load_model(encoder, AdapterConfig(rank=2, **adapter), 2, 0, "cpu", ("no", "yes"))
    spread = np.random.default_rng(1).normal(0, 0.2, model.num_parameters)
    model.set_vector(model.initial + spread.astype(np.float32))
    return model


def logits(model: AdaptedModel, data: TokenizedCorpus, record: int) -> Tensor:
    """Of one record [1, c], window by window, by nothing that cuts, pads or batches."""
    ids, vectors, start = torch.from_numpy(data.tokens(record).astype(np.int64)), [], 0
    for size in window_sizes(len(ids), WINDOW):
        mask = torch.ones(1, size, dtype=torch.bool)
        hidden = model.base.encoder.embed(ids[None, start : start + size], mask)
        hidden = model.base.encoder.run(hidden, mask, 0, model.num_layers)
        vectors.append(hidden.mean(1))
        start += size
    return model.base(pooled=torch.stack(vectors).mean(0))


def gradient(model: AdaptedModel, data: TokenizedCorpus, record: int) -> np.ndarray:
    loss = nn.functional.cross_entropy(logits(model, data, record), torch.tensor([data.labels[record]]))
    found = torch.autograd.grad(loss, list(model.parameters.values()))
    return torch.cat([part.reshape(-1) for part in found]).double().numpy()


def total(model: AdaptedModel, data: TokenizedCorpus, records: list[int], clip: float) -> np.ndarray:
    features = Features.of(model, data, 64, precision="fp32")
    with hooks_for(model, features):
        return clipped_sum(
            model, features, np.array(records), None, make_plan(max_grad_norm=clip),
            micro_batch_tokens=64, precision="fp32",
        )  # fmt: skip


@pytest.mark.parametrize("family", ["bert", "modernbert", "deberta-v3"])  # merged, by hooks, one by one
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("clip", [0.05, 1e6])
def test_equals_one_text_at_a_time(
    families: dict[str, Path],  # noqa: F811
    family: str,
    adapter: dict[str, Any],
    clip: float,
) -> None:
    if family == "modernbert" and adapter["name"] == "bitfit":
        return  # refused
    model, data = load(families[family], **adapter), corpus()
    want = np.zeros(model.num_parameters)
    for record in range(len(LENGTHS)):
        own = gradient(model, data, record)
        want += own * min(1.0, clip / float(np.linalg.norm(own)))
    got = total(model, data, list(range(len(LENGTHS))), clip)
    tolerance = 5e-3 if model.first_layer else 2e-4  # kept outputs of frozen layers are float16
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


@pytest.mark.parametrize("adapter", [{"name": "lora"}, {"name": "head"}, {"name": "lora", "layers": 1}])
def test_a_text_of_many_windows_moves_the_sum_by_the_clip_and_no_more(
    families: dict[str, Path],  # noqa: F811
    adapter: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, data, clip = load(families["bert"], **adapter), corpus(), 0.01
    others = [0, 2, 3, 7]
    without = total(model, data, others, clip)
    for record in (1, 6):  # four windows each
        moved = float(np.linalg.norm(total(model, data, [*others, record], clip) - without))
        assert 0.99 * clip <= moved <= 1.0001 * clip  # it is clipped, so it moves it by all of that
    if adapter["name"] == "head":
        return  # whose vectors are one a text from the start
    # Windows that are clipped each by itself would move it by more.
    pieces = dataclasses.replace(
        data,
        offsets=np.concatenate([data.offsets[:1], *(
            start + np.cumsum(window_sizes(tokens, WINDOW))
            for start, tokens in zip(data.offsets, LENGTHS, strict=False)
        )]),
        labels=np.repeat(data.labels, [len(window_sizes(tokens, WINDOW)) for tokens in LENGTHS]),
        window=None,
    )  # fmt: skip
    windows = total(model, pieces, [1, 2, 3, 4], clip)
    assert np.linalg.norm(windows) > 1.5 * clip


def test_the_check_before_training_sees_texts_whose_windows_are_not_added_up(
    families: dict[str, Path],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fedtune.errors import PreflightError

    model, train = load(families["bert"], name="lora"), TrainConfig(sample_rate=0.5, local_steps=2)

    def check(window: int | None) -> None:
        model.gradients_checked = False
        features = Features.of(model, corpus(window), 64)
        preflight(model, features, make_plan(), nn.Parameter(model.theta), train)

    check(WINDOW)
    monkeypatch.setattr(example_gradients, "_by_text", lambda model, gradients, text_of: gradients)
    check(None)
    with pytest.raises(PreflightError, match="is wrong"):
        check(WINDOW)


def test_kept_outputs_are_of_the_text_as_it_was_cut(families: dict[str, Path]) -> None:  # noqa: F811
    model = load(families["bert"], name="head")
    data = corpus()
    rows = Features.of(model, data, 64, precision="fp32").rows
    other = Features.of(model, corpus(window=None), 64, precision="fp32").rows  # the same tokens in one piece
    assert rows is not None and other is not None
    for record, tokens in enumerate(LENGTHS):
        same = np.allclose(rows[record], other[record], atol=1e-3)
        assert same == (tokens <= WINDOW)
    again = Features.of(model, data.subset([6, 1]), 64, precision="fp32").rows
    assert again is not None and np.array_equal(again[0], rows[6]) and np.array_equal(again[1], rows[1])


@pytest.mark.parametrize("adapter", [{"name": "lora"}, {"name": "head"}])
def test_predictions_are_those_of_single_texts(
    families: dict[str, Path],  # noqa: F811
    adapter: dict[str, Any],
) -> None:
    model, data = load(families["bert"], **adapter), corpus()
    got = predict_probabilities(model, data, TrainConfig(micro_batch_tokens=64, precision="fp32"))
    with torch.no_grad():
        want = torch.cat([logits(model, data, record) for record in range(len(LENGTHS))]).softmax(1).numpy()
    assert np.allclose(got, want, atol=1e-3)
