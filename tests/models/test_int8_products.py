"""Integer products of an ONNX file: each token is read by its own range, wide and narrow ones alike."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def ask(folder: Path, weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    """x W by a file of integers, made of one that has the product alone."""
    from onnx import TensorProto, helper, numpy_helper

    from fedtune.models.onnx_files import OPSET, write_int8
    from fedtune.serving.classifier import onnx_session

    n, m = weights.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "s", n])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "s", m])],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
    onnx.save(model, folder / "float.onnx")
    write_int8(folder / "float.onnx", folder / "int8.onnx")
    found: np.ndarray = onnx_session(str(folder / "int8.onnx"), folder, 1).run(None, {"x": x})[0]
    return found


def by_hand(weights: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The same in numpy, by the formula of `fedtune.models.onnx_files`."""
    w = np.abs(weights).max(0) / 127
    integers = np.rint(weights / w)
    if weights.shape[1] >= weights.shape[0]:
        a, zero = np.abs(x).max(-1, keepdims=True) / 127, np.zeros((1, 1, 1))
        u = np.clip(np.rint(x / a), -128, 127)
    else:
        bottom = np.minimum(x.min(-1, keepdims=True), 0)
        a = (np.maximum(x.max(-1, keepdims=True), 0) - bottom) / 255
        zero = np.rint(-bottom / a)
        u = np.clip(np.rint(x / a) + zero, 0, 255)
    return np.asarray(a * (((u - zero) @ integers) * w))


@pytest.mark.parametrize("shape", [(24, 24), (24, 60), (60, 24)], ids=["square", "wide", "narrow"])
def test_a_product_is_the_formula_s_and_a_token_s_own(tmp_path: Path, shape: tuple[int, int]) -> None:
    chance = np.random.default_rng(0)
    weights = chance.normal(size=shape).astype(np.float32)
    x = chance.normal(size=(2, 5, shape[0])).astype(np.float32)
    x[0, 1] *= 1000.0  # one range for all tokens would put the others to 0
    x[1, 2] = np.maximum(x[1, 2], 0.0)  # as after a feed-forward part's activation
    found = ask(tmp_path, weights, x)
    # Halves are rounded by what the last bit says: one level of one number, at most, here and there.
    level = np.abs(x).max(-1, keepdims=True) / 127 * np.abs(weights).max()
    assert (np.abs(found - by_hand(weights, x)) <= 2 * level).all()
    exact = x @ weights
    error = np.abs(found - exact).max(-1) / np.abs(exact).max(-1)
    assert error.max() < 0.03
    alone = ask(tmp_path, weights, x[1:, 2:3])
    np.testing.assert_allclose(alone[0, 0], found[1, 2], rtol=1e-5, atol=1e-5)
