"""Adapters over one base answer as they do alone, and the base is there once; other models stay apart."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from fedtune.models.onnx_base import share
from fedtune.serving.bundle import Bundle
from fedtune.serving.classifier import Classifier, onnx_forward, onnx_forwards

TEXTS = ["the film was good", "an awful day", "so very happy and nice food was it a film", "sad"]


def changed(path: Path, target: Path, names: tuple[str, ...], seed: int) -> Path:
    """The same model with other numbers in the constants whose names hold one of `names`."""
    model, chance = onnx.load(path), np.random.default_rng(seed)
    touched = 0
    for one in model.graph.initializer:
        value = numpy_helper.to_array(one)
        if any(name in one.name for name in names) and value.dtype == np.float32 and value.size > 1:
            drawn = chance.normal(0, 0.5, value.shape).astype(np.float32)
            one.CopyFrom(numpy_helper.from_array(drawn, one.name))
            touched += 1
    assert touched
    onnx.save(model, target)
    return target


@pytest.fixture(params=["onnx", "onnx-int8"])
def paths(exported: Path, tmp_path: Path, request: pytest.FixtureRequest) -> list[Path]:
    first = Bundle.open(exported).path(request.param)
    head = changed(first, tmp_path / "head.onnx", ("classifier",), 1)
    inside = changed(first, tmp_path / "inside.onnx", ("classifier", "query", "value"), 2)
    return [first, head, inside]


def answers(model: Classifier, forward: Any) -> np.ndarray:
    return Classifier(model.labels, model.tokenizer, forward, model.pad_id).logits(model.encode(TEXTS))


def test_each_answers_as_it_does_alone(exported: Path, paths: list[Path]) -> None:
    model = Classifier.open(Bundle.open(exported), "onnx", threads=1)
    together = [answers(model, forward) for forward in onnx_forwards(paths, 1)]
    alone = [answers(model, onnx_forward(path, 1)) for path in paths]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert np.abs(alone[0] - alone[1]).max() > 0.01 and np.abs(alone[1] - alone[2]).max() > 0.01


def test_the_base_is_there_once(paths: list[Path]) -> None:
    shared = share(paths)
    assert shared is not None
    base, constants = shared
    sizes = [sum(value.nbytes for value in one.values()) for one in constants]
    assert sizes[0] == sizes[1] == sizes[2]
    assert len(base) + sizes[0] == pytest.approx(paths[0].stat().st_size, rel=0.05)
    inputs = {one.name for one in onnx.load_from_string(base).graph.input}
    assert set(constants[0]) < inputs and "input_ids" in inputs
    heads = share(paths[:2])
    assert heads is not None
    assert all("classifier" in name for name in heads[1][0])


def test_another_graph_or_shape_shares_nothing(paths: list[Path], tmp_path: Path) -> None:
    model = onnx.load(paths[0])
    model.graph.node[0].op_type = "Identity"
    onnx.save(model, tmp_path / "graph.onnx")
    assert share([paths[0], tmp_path / "graph.onnx"]) is None
    model = onnx.load(paths[0])
    last = model.graph.initializer[0]
    value = numpy_helper.to_array(last)
    last.CopyFrom(numpy_helper.from_array(np.concatenate([value, value]), last.name))
    onnx.save(model, tmp_path / "shape.onnx")
    assert share([paths[0], tmp_path / "shape.onnx"]) is None


def test_without_onnx_each_is_by_itself(
    exported: Path, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    model = Classifier.open(Bundle.open(exported), "onnx", threads=1)
    first, second = (answers(model, forward) for forward in onnx_forwards(paths[:2], 1))
    assert np.abs(first - second).max() > 0.01


def test_bundles_of_several_formats(exported: Path) -> None:
    bundle = Bundle.open(exported)
    models = Classifier.open_all([bundle, bundle, bundle], "onnx", 1)
    logits = [model.logits(model.encode(TEXTS)) for model in models]
    np.testing.assert_allclose(logits[0], logits[2], atol=1e-6)
