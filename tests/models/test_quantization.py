"""Weights are stored in the bits that are claimed, stand for nearly the same numbers, and carry gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fedtune.errors import ModelError
from fedtune.models.quantization import (
    QUANTIZATIONS,
    Int8Embedding,
    Int8Linear,
    NF4Embedding,
    NF4Linear,
    as_stored,
    dequantize,
    quantize,
    stored_bytes,
)
from tests.support.golden import Golden

BITS = {"int8": (Int8Linear, Int8Embedding, 0.26, 0.01), "nf4": (NF4Linear, NF4Embedding, 0.15, 0.12)}


@pytest.fixture
def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {"linear": nn.Linear(128, 64), "table": nn.Embedding(50, 128), "norm": nn.LayerNorm(64)}
    )


@pytest.mark.parametrize("name", BITS)
def test_layers_are_replaced_and_small(layers: nn.Module, name: str) -> None:
    linear, table, most, _ = BITS[name]
    before = stored_bytes(layers["linear"]) + stored_bytes(layers["table"])
    quantize(layers, name)
    assert type(layers["linear"]) is linear
    assert type(layers["table"]) is table
    assert type(layers["norm"]) is nn.LayerNorm
    after = stored_bytes(layers["linear"]) + stored_bytes(layers["table"])
    # Not an allowance that float16 would meet.
    assert after < (most + 0.01) * before


@pytest.mark.parametrize("name", BITS)
def test_values_are_near_and_not_equal(layers: nn.Module, name: str) -> None:
    inputs, ids = torch.randn(3, 5, 128), torch.randint(0, 50, (3, 5))
    exact, rows = layers["linear"](inputs), layers["table"](ids)
    quantize(layers, name)
    error = BITS[name][3]
    for got, want in ((layers["linear"](inputs), exact), (layers["table"](ids), rows)):
        assert got.shape == want.shape
        difference = (got - want).norm() / want.norm()
        assert 1e-5 < difference < error


@pytest.mark.parametrize("name", BITS)
def test_gradient_is_that_of_the_expanded_weight(layers: nn.Module, name: str) -> None:
    quantize(layers, name)
    linear = layers["linear"]
    x = torch.randn(4, 6, 128, requires_grad=True)
    y = torch.randn(4, 6, 64)
    (linear(x) * y).sum().backward()
    reference = x.detach().clone().requires_grad_(True)
    (nn.functional.linear(reference, linear.expanded(torch.float32), linear.bias) * y).sum().backward()
    assert torch.allclose(x.grad, reference.grad, atol=1e-5)
    # The bias' gradient has the bias' shape: bitsandbytes' own 8-bit layer fails here for sequences.
    assert torch.allclose(linear.bias.grad, 2 * y.sum((0, 1)), atol=1e-4)


def test_one_example_does_not_depend_on_the_others(layers: nn.Module) -> None:
    for name in BITS:
        torch.manual_seed(1)
        linear = nn.ModuleDict({"linear": nn.Linear(128, 64)})
        quantize(linear, name)
        batch = torch.randn(4, 128)
        alone = linear["linear"](batch[:1])
        batch[1:] *= 1000.0  # outliers, which LLM.int8() would treat by columns of the whole batch
        assert torch.allclose(linear["linear"](batch)[:1], alone, atol=1e-5)


def test_rows_of_zeros_and_odd_widths() -> None:
    zero = nn.ModuleDict({"linear": nn.Linear(64, 2, bias=False), "odd": nn.Embedding(4, 100)})
    nn.init.zeros_(zero["linear"].weight)
    quantize(zero, "nf4")
    assert torch.equal(zero["linear"](torch.ones(1, 64)), torch.zeros(1, 2))
    # 64 does not divide 100: such a table is kept in 8 bits rather than refused.
    assert type(zero["odd"]) is Int8Embedding


def test_empty_lookup(layers: nn.Module) -> None:
    quantize(layers, "nf4")
    assert layers["table"](torch.zeros(0, 3, dtype=torch.long)).shape == (0, 3, 128)


def test_unknown_name_is_refused(layers: nn.Module, golden: Golden) -> None:
    with pytest.raises(ModelError) as raised:
        quantize(layers, "int4")
    golden(raised)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize(
    "layer", [nn.Linear(192, 40), nn.Linear(50, 33), nn.Embedding(30, 128), nn.Embedding(9, 40)]
)
def test_what_is_stored_can_be_told_without_storing_it(
    quantization: str, layer: nn.Linear | nn.Embedding
) -> None:
    layer.weight.data[3] = 0.0
    wanted = as_stored(layer, quantization)
    stored = quantize(nn.ModuleDict({"one": copy.deepcopy(layer)}), quantization)
    found = dequantize(stored)["one"]  # type: ignore[index]
    assert torch.equal(found.weight.detach(), wanted)


def test_integers_are_those_of_bitsandbytes() -> None:
    import bitsandbytes.functional as bnb

    layer = nn.Linear(96, 50)
    integers, largest, _ = bnb.int8_vectorwise_quant(layer.weight.detach().to(torch.float16))
    stored = Int8Linear(layer)
    assert torch.equal(stored.weight, integers)
    assert torch.equal(stored.scale, largest.to(torch.float32) / 127.0)
