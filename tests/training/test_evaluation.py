"""Metrics by hand, and that padding, order and batches do not matter to predictions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.config.schema import TrainConfig
from fedtune.models.encoder import autocast, fast_bf16
from fedtune.training.evaluation import answers_alone, evaluate, predict_probabilities, score
from tests.training.conftest import load, make_shard


def test_score_by_hand() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    chosen = np.array([0, 0, 1, 1, 1, 1])  # class 2 is never predicted
    probabilities = np.full((6, 3), 0.1, np.float32)
    probabilities[np.arange(6), chosen] = 0.8
    result = score(probabilities, labels, np.array(["a", "a", "a", "b", "b", "b"]))
    assert result.accuracy == pytest.approx(4 / 6)
    assert result.precision_macro == pytest.approx((1 + 2 / 4 + 0) / 3)
    assert result.recall_macro == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert result.f1_macro == pytest.approx((0.8 + 2 / 3 + 0) / 3)
    assert result.loss == pytest.approx(-(4 * math.log(0.8) + 2 * math.log(0.1)) / 6, rel=1e-5)
    assert result.per_site == {"a": pytest.approx(2 / 3), "b": pytest.approx(2 / 3)}


def test_a_class_without_records_does_not_count() -> None:
    result = score(np.array([[0.9, 0.05, 0.05]], np.float32), np.array([0]), None)
    assert (result.accuracy, result.f1_macro, result.per_site) == (1.0, 1.0, {})


def test_certainty_in_the_wrong_class_is_finite() -> None:
    assert math.isfinite(score(np.array([[1.0, 0.0]], np.float32), np.array([1]), None).loss)


def test_nothing_to_score() -> None:
    with pytest.raises(ValueError, match="nothing"):
        score(np.zeros((0, 2), np.float32), np.zeros(0, np.int64), None)


@pytest.mark.parametrize("options", [{}, {"layers": 1}, {"name": "head"}])
def test_predictions_are_those_of_single_texts(tiny_bert: Path, options: dict[str, object]) -> None:
    model, data = load(tiny_bert, **options), make_shard().data
    train = TrainConfig(micro_batch_tokens=48, precision="fp32")
    got = predict_probabilities(model, data, train)
    assert np.allclose(got.sum(1), 1.0, atol=1e-5)
    for record in range(12):
        ids = torch.from_numpy(data.tokens(record).astype(np.int64))[None]
        assert np.allclose(model.base(input_ids=ids).softmax(-1).detach().numpy()[0], got[record], atol=3e-3)
    assert evaluate(model, data, train).accuracy == np.mean(got.argmax(1) == data.labels)


@pytest.mark.parametrize("options", [{}, {"layers": 1}, {"name": "head"}])
def test_what_is_said_of_a_record_alone_follows_from_it_alone(
    tiny_bert: Path, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = load(tiny_bert, **options), make_shard().data
    model.set_vector(np.random.default_rng(5).normal(size=model.num_parameters))
    train = TrainConfig(micro_batch_tokens=48, precision="bf16")
    seen: list[torch.Tensor] = []
    logits = type(model).logits

    def watched(*arguments: Any, **options: Any) -> torch.Tensor:
        seen.append(logits(*arguments, **options))
        return seen[-1]

    monkeypatch.setattr(type(model), "logits", watched)
    said = answers_alone(model, data, train)
    whole = torch.cat(seen)
    assert whole.shape == (data.num_records, 2)  # a row each: nobody else is in it
    seen.clear()
    some = np.array([3, 7, 8])
    assert np.array_equal(answers_alone(model, data.subset(some), train), said[some])
    assert torch.equal(torch.cat(seen), whole[some])  # to the last bit
    assert np.mean(said == predict_probabilities(model, data, train).argmax(1)) > 0.9


def test_precision_follows_the_processor() -> None:
    cpu = torch.device("cpu")
    with autocast(cpu, "fp32"):
        assert not torch.is_autocast_enabled("cpu")
    with autocast(cpu, "bf16"):
        assert torch.get_autocast_dtype("cpu") is torch.bfloat16
        assert torch.is_autocast_enabled("cpu")
    with autocast(cpu, "auto"):
        assert torch.is_autocast_enabled("cpu") is fast_bf16("cpu")
    assert not fast_bf16("mps")


def test_flops_are_counted_once_a_shape_and_added_each_time(tiny_bert: Path) -> None:
    model, data = load(tiny_bert), make_shard().data
    train = TrainConfig(micro_batch_tokens=48, precision="fp32")
    model.flops.total = 0
    predict_probabilities(model, data, train)
    once = model.flops.total
    predict_probabilities(model, data, train)
    assert model.flops.total == 2 * once
    # Lower bound by hand: two layers of 12 d^2 multiply-adds a real token.
    assert once > 2 * 2 * 8 * 32 * 32 * int(data.lengths.sum())
