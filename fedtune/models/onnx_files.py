"""ONNX files of a standalone model: `write_fp32` by torch's exporter, `write_int8` from that one.

Inputs are the tokenizer's (`input_ids`, `attention_mask`, for BERT `token_type_ids`), int64 [batch, tokens];
output `logits`, float32 [batch, classes]; both axes of the inputs are dynamic.

In int8, weights are integers with one scale an output (of an embedding: a row), and so are the inputs of
every matrix product with one range a *token*, found as the model runs. onnxruntime's own dynamic quantizer
takes one range for the whole batch: measured on the default model it keeps 97.1 percent of the labels where
this keeps 99, and what it says of a text depends on the texts beside it. Speed is the same, and the integer
product is onnxruntime's own (`MatMulInteger`). The head, layer norms and products of two activations stay
float32.

Does not do: calibration, or other processors than the one that checked it: an x86 without VNNI adds pairs of
products in 16 bits, where large ones saturate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedtune.config.quiet import hushed
from fedtune.errors import ConfigError
from fedtune.models.encoder import max_positions
from fedtune.models.modeling_fedtune import FedtuneForSequenceClassification

__all__ = ["OPSET", "require_onnx", "write_fp32", "write_int8"]

OPSET = 18
_NEEDED = ("onnx", "onnxruntime", "onnxscript")


def require_onnx() -> None:
    """Raises `ConfigError`, with the command that installs it, if something to make ONNX files is missing."""
    from importlib.util import find_spec

    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"ONNX files need {' and '.join(missing)}, which this Python lacks. Install with "
            f"`pip install {' '.join(_NEEDED)}`, or export without: --format hf,adapter."
        )


class _Logits(nn.Module):
    """The model with its inputs by place, as the exporter calls it."""

    def __init__(self, model: FedtuneForSequenceClassification, inputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, *values: Tensor) -> Tensor:
        logits: Tensor = self.model(**dict(zip(self.inputs, values, strict=True))).logits
        return logits


def write_fp32(model: FedtuneForSequenceClassification, inputs: Sequence[str], path: Path) -> None:
    """Writes the model in float32.

    Args:
        inputs: names of the tokenizer's outputs, in its order.
    """
    import onnx

    longest = max_positions(model.config.encoder)
    batch, tokens = torch.export.Dim("batch", min=1), torch.export.Dim("tokens", min=2, max=longest)
    example = tuple(torch.ones(2, 7, dtype=torch.int64) for _ in inputs)
    kernel = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the plainest graph
    try:
        with hushed("torch.onnx", warned=False):
            program = torch.onnx.export(
                _Logits(model, inputs).eval(),
                example,
                input_names=list(inputs),
                output_names=["logits"],
                dynamic_shapes=(tuple({0: batch, 1: tokens} for _ in inputs),),
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    finally:
        model.set_attn_implementation(kernel)
    assert program is not None
    made = program.model_proto
    _strip(made)
    onnx.save(made, path)


def _strip(made: Any) -> None:
    """Takes out what the exporter notes of where each node comes from: it names files of this machine."""
    graph = made.graph
    values = (*graph.value_info, *graph.input, *graph.output, *graph.initializer)
    for part in (made, graph, *graph.node, *values):
        part.doc_string = ""
        del part.metadata_props[:]


def write_int8(source: Path, target: Path) -> None:
    """Writes the float32 model in `source` with integer weights and integer products."""
    import onnx

    model = onnx.load(source)
    _Quantizer(model).run()
    onnx.checker.check_model(model)
    onnx.save(model, target)


class _Quantizer:
    """Replaces, in an ONNX graph, products with constant matrices and look-ups in constant tables.

    A product x W, x [b, s, n] and W [n, m], becomes

        u = round(x / a) - z   in 0..255       a, z [b, s, 1]: from the range of a token's x, with 0 in it
        Q = round(W / w)       in -127..127    w [m]: from the largest of each column
        x W ~ a (u Q + z sum(Q)) w             sum(Q) [m]: of each column
    """

    def __init__(self, model: Any) -> None:
        from onnx import numpy_helper

        self.graph = model.graph
        self.constants = {one.name: one for one in self.graph.initializer}
        self.array: Callable[[Any], NDArray[Any]] = numpy_helper.to_array
        self.nodes: list[Any] = []
        self.made: set[str] = set()
        self.gone: set[str] = set()

    def run(self) -> None:
        self.constant("int8_axis", np.array([-1], np.int64))
        self.constant("int8_levels", np.array(255.0, np.float32))
        self.constant("int8_least", np.array(1e-12, np.float32))
        self.constant("int8_zero", np.array(0.0, np.float32))
        for node in list(self.graph.node):
            if node.op_type == "MatMul" and self.is_matrix(node.input[1]):
                self.product(node.input[0], node.input[1], node.output[0])
            elif node.op_type == "Gather" and self.is_matrix(node.input[0]):
                self.look_up(node.input[0], node.input[1], node.output[0])
            else:
                self.nodes.append(node)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        kept = [one for one in self.graph.initializer if one.name not in self.gone]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)

    def is_matrix(self, name: str) -> bool:
        return name in self.constants and len(self.constants[name].dims) == 2

    def constant(self, name: str, value: NDArray[Any]) -> None:
        from onnx import numpy_helper

        if name not in self.made:
            self.made.add(name)
            self.graph.initializer.append(numpy_helper.from_array(value, name))

    def add(self, operator: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        from onnx import helper

        self.nodes.append(helper.make_node(operator, list(inputs), [output], **attributes))
        return output

    def matrix(self, name: str, axis: int) -> None:
        """Constants NAME_int8 and NAME_scale, one scale for all that `axis` runs over."""
        weights = self.array(self.constants[name]).astype(np.float32)
        scale = np.abs(weights).max(axis, keepdims=True) / 127.0
        scale[scale == 0] = 1.0  # of zeros the integers are 0 as well
        integers = np.rint(weights / scale).astype(np.int8)
        self.constant(f"{name}_int8", integers)
        self.constant(f"{name}_scale", scale if axis else scale[0])
        self.constant(f"{name}_sum", integers.astype(np.float32).sum(0)) if axis == 0 else None
        self.gone.add(name)

    def look_up(self, table: str, rows: str, output: str) -> None:
        self.matrix(table, axis=1)
        found = self.add("Gather", [f"{table}_int8", rows], f"{output}_int8", axis=0)
        scale = self.add("Gather", [f"{table}_scale", rows], f"{output}_scale", axis=0)
        self.add("Mul", [self.cast(found, f"{output}_float"), scale], output)

    def product(self, x: str, weights: str, output: str) -> None:
        self.matrix(weights, axis=0)
        self.tokens(x)
        integers = self.add("MatMulInteger", [f"{x}_int8", f"{weights}_int8"], f"{output}_int32")
        shift = self.add("Mul", [f"{x}_shift", f"{weights}_sum"], f"{output}_shift")
        moved = self.add("Add", [self.cast(integers, f"{output}_float"), shift], f"{output}_moved")
        # One scale after the other: of both at once onnxruntime makes a kernel that takes x's for a scalar.
        scaled = self.add("Mul", [moved, f"{x}_scale"], f"{output}_scaled")
        self.add("Mul", [scaled, f"{weights}_scale"], output)

    def tokens(self, x: str) -> None:
        """X_int8 (0..255), X_scale and X_shift of an input, once for all products that share it."""
        if f"{x}_int8" in self.made:
            return
        self.made.add(f"{x}_int8")
        largest = self.add("ReduceMax", [x, "int8_axis"], f"{x}_largest", keepdims=1)
        least = self.add("ReduceMin", [x, "int8_axis"], f"{x}_least", keepdims=1)
        top = self.add("Max", [largest, "int8_zero"], f"{x}_top")
        bottom = self.add("Min", [least, "int8_zero"], f"{x}_bottom")
        span = self.add("Sub", [top, bottom], f"{x}_span")
        some = self.add("Max", [span, "int8_least"], f"{x}_some")
        scale = self.add("Div", [some, "int8_levels"], f"{x}_scale")
        lowest = self.add("Div", [bottom, scale], f"{x}_lowest")
        shift = self.add("Round", [lowest], f"{x}_shift")
        steps = self.add("Round", [self.add("Div", [x, scale], f"{x}_steps")], f"{x}_rounded")
        self.cast(self.add("Sub", [steps, shift], f"{x}_levels"), f"{x}_int8", "UINT8")

    def cast(self, value: str, output: str, to: str = "FLOAT") -> str:
        from onnx import TensorProto

        return self.add("Cast", [value], output, to=getattr(TensorProto, to))
