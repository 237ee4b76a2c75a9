"""ONNX files whose weights alone are small: `write_weights` in int8 or nf4, from a float32 one.

Matrices and tables are kept as integers with scales, as `fedtune.models.quantization` stores those of a
training base, and the graph expands them by standard operators. onnxruntime does so once, when it opens the
file: what is saved is disk and download, not memory or time. While it opens an nf4 file it takes several
times the memory of the float32 model (measured: 0.95 GB for 22.6 million numbers, which take 0.2 GB in
float32). Unlike the integer products of `fedtune.models.onnx_files`, activations stay float32, so a text's
logits differ by what the weights lost and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedtune.models.quantization import Int8Linear, NF4Linear

__all__ = ["WEIGHTS", "write_weights"]

WEIGHTS = ("int8", "nf4")
_BLOCK = 64


def write_weights(source: Path, target: Path, kind: str) -> None:
    """Writes the float32 model in `source` with its matrices stored as `kind`, `int8` or `nf4`."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(source)
    graph = model.graph
    tables = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    kept, nodes = [], []
    for one in graph.initializer:
        value = numpy_helper.to_array(one)
        if value.ndim != 2 or value.dtype != np.float32 or value.shape[0] < 2:
            kept.append(one)
            continue
        stored, expansion = (
            _nf4(one.name, value) if kind == "nf4" else _int8(one.name, value, rows=one.name in tables)
        )
        kept += [numpy_helper.from_array(array, name) for name, array in stored.items()]
        nodes += expansion
    rest = list(graph.node)
    del graph.node[:], graph.initializer[:]
    graph.initializer.extend(kept)
    graph.node.extend([*nodes, *rest])
    onnx.checker.check_model(model)
    onnx.save(model, target)


Stored = tuple[dict[str, NDArray[Any]], list[Any]]


def _node(operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> Any:
    from onnx import helper

    return helper.make_node(operator, list(inputs), [output], **attributes)


def _linear(value: NDArray[np.float32]) -> nn.Linear:
    linear = nn.Linear(value.shape[1], value.shape[0], bias=False)
    linear.weight.data = torch.from_numpy(value.copy())
    return linear


def _int8(name: str, value: NDArray[np.float32], *, rows: bool) -> Stored:
    """value = integers * scale: one scale a row of a table, or a column of a matrix W in x W."""
    from onnx import TensorProto

    made = Int8Linear(_linear(value if rows else value.T))
    integers, scale = made.weight.numpy(), made.scale.numpy()[:, None]
    stored = {f"{name}_int8": integers, f"{name}_scale": scale}
    return {part: array if rows else array.T.copy() for part, array in stored.items()}, [
        _node("Cast", [f"{name}_int8"], f"{name}_float", to=TensorProto.FLOAT),
        _node("Mul", [f"{name}_float", f"{name}_scale"], name),
    ]


def _nf4(name: str, value: NDArray[np.float32]) -> Stored:
    """value = code[four bits] * scale, one scale a block of 64 numbers, in the order of memory."""
    from onnx import TensorProto

    made: Any = NF4Linear(_linear(value))
    size = value.size
    stored = {
        f"{name}_nf4": made.weight.numpy().reshape(-1),
        f"{name}_scale": made.absmax.numpy()[:, None],
        f"{name}_code": made.code.numpy(),
        f"{name}_four": np.array(4, np.uint8),
        f"{name}_low": np.array(15, np.uint8),
        f"{name}_last": np.array([1], np.int64),
        f"{name}_blocks": np.array([-1, _BLOCK], np.int64),
        f"{name}_pad": np.array([0, -(size + size % 2) % _BLOCK], np.int64),
        f"{name}_flat": np.array([-1], np.int64),
        f"{name}_from": np.array([0], np.int64),
        f"{name}_size": np.array([size], np.int64),
        f"{name}_shape": np.array(value.shape, np.int64),
    }
    n = name
    return stored, [
        _node("BitShift", [f"{n}_nf4", f"{n}_four"], f"{n}_first", direction="RIGHT"),  # the first is above
        _node("BitwiseAnd", [f"{n}_nf4", f"{n}_low"], f"{n}_second"),
        _node("Unsqueeze", [f"{n}_first", f"{n}_last"], f"{n}_first_column"),
        _node("Unsqueeze", [f"{n}_second", f"{n}_last"], f"{n}_second_column"),
        _node("Concat", [f"{n}_first_column", f"{n}_second_column"], f"{n}_pairs", axis=1),
        _node("Reshape", [f"{n}_pairs", f"{n}_flat"], f"{n}_codes"),
        _node("Cast", [f"{n}_codes"], f"{n}_places", to=TensorProto.INT32),
        _node("Gather", [f"{n}_code", f"{n}_places"], f"{n}_numbers"),
        _node("Pad", [f"{n}_numbers", f"{n}_pad"], f"{n}_padded"),
        _node("Reshape", [f"{n}_padded", f"{n}_blocks"], f"{n}_blocked"),
        _node("Mul", [f"{n}_blocked", f"{n}_scale"], f"{n}_scaled"),
        _node("Reshape", [f"{n}_scaled", f"{n}_flat"], f"{n}_whole"),
        _node("Slice", [f"{n}_whole", f"{n}_from", f"{n}_size"], f"{n}_cut"),
        _node("Reshape", [f"{n}_cut", f"{n}_shape"], name),
    ]
