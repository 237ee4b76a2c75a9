"""ONNX files of a standalone model: `write_fp32` by torch's exporter, `write_int8` and `write_int8_static`
from that one.

Inputs are the tokenizer's (`input_ids`, `attention_mask`, for BERT `token_type_ids`), int64 [batch, tokens];
output `logits`, float32 [batch, classes]; both axes of the inputs are dynamic.

In int8, weights are integers with one scale an output (of an embedding: a row), and so are the inputs of
every matrix product with one range a *token*, found as the model runs. onnxruntime's own dynamic quantizer
takes one range for the whole batch: measured on the default model it keeps 97.1 percent of the labels where
this keeps 99, and what it says of a text depends on the texts beside it. The integer product is onnxruntime's
own (`MatMulIntegerToFloat`, which multiplies with the weights' scales as it goes), and a token's range is an
axis of `QuantizeLinear`: by standard operators alone it takes a fifth longer. The
head, layer norms and products of two activations stay float32.

Static int8 (`write_int8_static`) fixes the range of each input once and for all, from what calibration texts
gave (`fedtune.serving.calibration`), so that nothing is looked for while the model runs. One range for all
columns of an input would be set by the few that are large in a BERT; so columns are first divided by a number
of their own, which goes into the rows of the matrix (Xiao et al. 2023, SmoothQuant, alpha 1/2). Such a file
holds the ranges, which are those of the calibration texts: they have to be public. It has standard operators
alone, and so runs elsewhere too.

Does not do: other processors than the one that checked it: an x86 without VNNI adds pairs of products in 16
bits, where large ones saturate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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

__all__ = [
    "OPSET",
    "Ranges",
    "require_onnx",
    "with_product_inputs",
    "write_fp32",
    "write_int8",
    "write_int8_static",
]

# Of the input of a product, by its name in the graph: the least and the largest of each column, float32 [n].
Ranges = Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]

OPSET = 18
_CONTRIB = "com.microsoft"  # onnxruntime's own operators
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
    _write(source, target, _Quantizer)


def write_int8_static(source: Path, target: Path, ranges: Ranges) -> None:
    """Writes the float32 model in `source` with integer weights, and integer products of fixed `ranges`.

    Raises:
        KeyError: `ranges` lacks an input that `with_product_inputs` names.
    """
    _write(source, target, lambda model: _StaticQuantizer(model, ranges))


def _write(source: Path, target: Path, quantizer: Callable[[Any], _Quantizer]) -> None:
    import onnx

    model = onnx.load(source)
    quantizer(model).run()
    onnx.checker.check_model(model)
    onnx.save(model, target)


def with_product_inputs(source: Path) -> tuple[bytes, list[str]]:
    """The float32 model in `source` with every input of a product among its outputs, and their names."""
    import onnx
    from onnx import TensorProto, helper

    model = onnx.load(source)
    names = _Quantizer(model).product_inputs()
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    return model.SerializeToString(), list(names)


class _Quantizer:
    """Replaces, in an ONNX graph, products with constant matrices and look-ups in constant tables.

    A product x W, x [b, s, n] and W [n, m], becomes, with integers Q = round(W / w) in -127..127, w [m] from
    the largest of each column, and u in 0..255,

        u = round(x / a) + 128       a [b, s, 1]: the largest |x| of a token over 127
        x W ~ a ((u - 128) Q w)

    or, where m < n and two passes more over the output cost little, as of a feed-forward part's inputs, which
    are mostly above 0,

        u = round(x / a) + z         a, z [b, s, 1]: from the range of a token's x, with 0 in it
        x W ~ a (u Q w - z sum(Q) w)         sum(Q) [m]: of each column
    """

    def __init__(self, model: Any) -> None:
        from onnx import numpy_helper

        self.model, self.graph = model, model.graph
        self.constants = {one.name: one for one in self.graph.initializer}
        self.array: Callable[[Any], NDArray[Any]] = numpy_helper.to_array
        self.nodes: list[Any] = []
        self.made: set[str] = set()
        self.gone: set[str] = set()

    def product_inputs(self) -> dict[str, list[str]]:
        """The inputs of products with constant matrices, each with the names of its matrices."""
        found: dict[str, list[str]] = {}
        for node in self.graph.node:
            if node.op_type == "MatMul" and self.is_matrix(node.input[1]):
                found.setdefault(node.input[0], []).append(node.input[1])
        return found

    def run(self) -> None:
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

    def own(self, operator: str, inputs: Sequence[str], output: str) -> str:
        """As `add`, of an operator that onnxruntime alone has."""
        from onnx import helper

        if all(one.domain != _CONTRIB for one in self.model.opset_import):
            self.model.opset_import.append(helper.make_opsetid(_CONTRIB, 1))
        return self.add(operator, inputs, output, domain=_CONTRIB)

    def weights(self, name: str) -> NDArray[np.float32]:
        found: NDArray[np.float32] = self.array(self.constants[name]).astype(np.float32)
        return found

    def matrix(self, name: str, axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
        """Constants NAME_int8 and NAME_scale, one scale for all that `axis` runs over; and what they hold."""
        weights = self.weights(name)
        scale = np.abs(weights).max(axis, keepdims=True) / 127.0
        scale[scale == 0] = 1.0  # of zeros the integers are 0 as well
        integers = np.rint(weights / scale).astype(np.int8)
        scale = scale if axis else scale[0]
        self.constant(f"{name}_int8", integers)
        self.constant(f"{name}_scale", scale)
        self.gone.add(name)
        return integers, scale

    def look_up(self, table: str, rows: str, output: str) -> None:
        self.matrix(table, axis=1)
        found = self.add("Gather", [f"{table}_int8", rows], f"{output}_int8", axis=0)
        scale = self.add("Gather", [f"{table}_scale", rows], f"{output}_scale", axis=0)
        self.add("Mul", [self.cast(found, f"{output}_float"), scale], output)

    def product(self, x: str, weights: str, output: str) -> None:
        integers, scale = self.matrix(weights, axis=0)
        even = integers.shape[1] >= integers.shape[0]
        name = self.tokens(x, integers.shape[0], even=even)
        self.constant("int8_one", np.array(1.0, np.float32))
        self.constant("int8_middle", np.array(128, np.uint8))
        zero = ["int8_middle"] if even else []
        inputs = [f"{name}_int8", f"{weights}_int8", "int8_one", f"{weights}_scale", *zero]
        found = self.own("MatMulIntegerToFloat", inputs, f"{output}_units")
        if not even:
            self.constant(f"{weights}_sum", integers.astype(np.float32).sum(0) * scale)
            shift = self.add("Mul", [f"{name}_zero", f"{weights}_sum"], f"{output}_shift")
            found = self.add("Sub", [found, shift], f"{output}_moved")
        self.add("Mul", [found, f"{name}_scale"], output)

    def tokens(self, x: str, width: int, *, even: bool) -> str:
        """NAME_int8 (0..255) and NAME_scale of an input [b, s, width], once for all products that share it;
        unless the range is to be `even` around 0 also NAME_zero, what 0 becomes. Returns NAME."""
        name = f"{x}_even" if even else x
        if f"{name}_int8" in self.made:
            return name
        self.made.add(f"{name}_int8")
        self.constant("int8_axis", np.array([-1], np.int64))
        self.constant("int8_least", np.array(1e-12, np.float32))
        self.constant("int8_flat", np.array([-1], np.int64))
        self.constant(f"int8_rows_{width}", np.array([-1, width], np.int64))
        if even:
            self.constant("int8_levels", np.array(127.0, np.float32))
            size = self.add("Abs", [x], f"{name}_size")
            span = self.add("ReduceMax", [size, "int8_axis"], f"{name}_span", keepdims=1)
            self.scale(name, span, "int8_levels")
            count = self.add("Shape", [f"{name}_scales"], f"{name}_count")
            zeros = self.add("Expand", ["int8_middle", count], f"{name}_zeros")
        else:
            self.constant("int8_all_levels", np.array(255.0, np.float32))
            self.constant("int8_zero", np.array(0.0, np.float32))
            largest = self.add("ReduceMax", [x, "int8_axis"], f"{name}_largest", keepdims=1)
            least = self.add("ReduceMin", [x, "int8_axis"], f"{name}_least", keepdims=1)
            top = self.add("Max", [largest, "int8_zero"], f"{name}_top")
            bottom = self.add("Min", [least, "int8_zero"], f"{name}_bottom")
            span = self.add("Sub", [top, bottom], f"{name}_span")
            self.scale(name, span, "int8_all_levels")
            lowest = self.add("Div", [bottom, f"{name}_scale"], f"{name}_lowest")
            zero = self.add("Neg", [self.add("Round", [lowest], f"{name}_rounded")], f"{name}_zero")
            integers = self.cast(zero, f"{name}_zero_int8", "UINT8")
            zeros = self.add("Reshape", [integers, "int8_flat"], f"{name}_zeros")
        rows = self.add("Reshape", [x, f"int8_rows_{width}"], f"{name}_rows")
        steps = self.add("QuantizeLinear", [rows, f"{name}_scales", zeros], f"{name}_steps", axis=0)
        shape = self.add("Shape", [x], f"{name}_shape")
        self.add("Reshape", [steps, shape], f"{name}_int8")
        return name

    def scale(self, name: str, span: str, levels: str) -> None:
        """NAME_scale [b, s, 1], a token's `span` over the number of `levels`; NAME_scales [b s], the same."""
        some = self.add("Max", [span, "int8_least"], f"{name}_some")
        scale = self.add("Div", [some, levels], f"{name}_scale")
        self.add("Reshape", [scale, "int8_flat"], f"{name}_scales")

    def cast(self, value: str, output: str, to: str = "FLOAT") -> str:
        from onnx import TensorProto

        return self.add("Cast", [value], output, to=getattr(TensorProto, to))


class _StaticQuantizer(_Quantizer):
    """As `_Quantizer`, with one range for all tokens, fixed beforehand: with d [n] and numbers a and z

    u = round(x / d / a) + z    in 0..255      from the range of x / d over all texts of a calibration
    Q = round(d W / w)          in -127..127   w [m]: from the largest of each column
    x W ~ a (u - z) Q w
    """

    def __init__(self, model: Any, ranges: Ranges) -> None:
        super().__init__(model)
        self.divided: dict[str, NDArray[np.float32]] = {}  # the d of each matrix
        self.steps: dict[str, np.float32] = {}  # the a of each input
        products = self.product_inputs()
        uses = Counter(one for matrices in products.values() for one in matrices)
        for x, matrices in products.items():
            least, largest = ranges[x]
            rows = np.max([np.abs(self.weights(one)).max(1) for one in matrices], axis=0)
            columns = np.maximum(np.abs(least), np.abs(largest))
            # A column that was 0 in all texts, or that no row looks at, stays as it is.
            even = np.sqrt(columns / np.maximum(rows, 1e-12))
            # A matrix that several inputs share (ALBERT) has rows of one size alone.
            own = max(uses[one] for one in matrices) == 1
            divisor = np.where((columns > 0) & (rows > 0) & own, even, 1.0)
            bottom = min(float((least / divisor).min()), 0.0)
            top = max(float((largest / divisor).max()), 0.0)
            step = max(top - bottom, 1e-12) / 255.0
            self.steps[x] = np.float32(step)
            self.divided |= dict.fromkeys(matrices, divisor.astype(np.float32))
            self.constant(f"{x}_divisor", (1.0 / divisor).astype(np.float32))
            self.constant(f"{x}_step", np.array(step, np.float32))
            self.constant(f"{x}_zero", np.array(np.clip(round(-bottom / step), 0, 255), np.uint8))

    def weights(self, name: str) -> NDArray[np.float32]:
        found = super().weights(name)
        return found * self.divided[name][:, None] if name in self.divided else found

    def product(self, x: str, weights: str, output: str) -> None:
        if f"{x}_int8" not in self.made:
            self.made.add(f"{x}_int8")
            even = self.add("Mul", [x, f"{x}_divisor"], f"{x}_even")
            self.add("QuantizeLinear", [even, f"{x}_step", f"{x}_zero"], f"{x}_int8")
        _, scale = self.matrix(weights, axis=0)
        self.constant(f"{output}_scale", scale * self.steps[x])
        integers = self.add("MatMulInteger", [f"{x}_int8", f"{weights}_int8", f"{x}_zero"], f"{output}_int32")
        self.add("Mul", [self.cast(integers, f"{output}_float"), f"{output}_scale"], output)
