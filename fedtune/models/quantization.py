"""Frozen layers whose weights really are stored in 8 or 4 bits.

Weight-only quantization: a weight is kept as integers with one float32 scale a row (int8) or a block
of 64 (nf4, Dettmers et al. 2023, QLoRA, section 3), and is expanded for the moment of a matrix
product. Activations stay in floating point, so no example's result depends on the other examples in
its batch; LLM.int8()'s activation quantization with outlier columns (Dettmers et al. 2022) has just
that dependence, which would break per-example sensitivity, and is not used.

The integers are those of bitsandbytes; the two lines of torch that make those of int8 stand here, for that
library takes two seconds to import. The layers are ours, and subclasses of `torch.nn.Linear` and
`torch.nn.Embedding`, for two reasons: PEFT wraps them like plain layers, so an adapter trained on any
quantization loads on any other; and bitsandbytes' 8-bit backward gives a bias gradient of the wrong shape for
sequences, which `bitfit` needs.

What it does not do: 8- or 4-bit arithmetic. It saves memory, not time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedtune.errors import ModelError

__all__ = [
    "QUANTIZATIONS",
    "Int8Embedding",
    "Int8Linear",
    "NF4Embedding",
    "NF4Linear",
    "as_stored",
    "dequantize",
    "quantize",
    "stored_bytes",
    "weight_of",
]

QUANTIZATIONS = ("none", "int8", "nf4")
_BLOCK = 64  # weights that share one nf4 scale; QLoRA's choice
_NF4 = (  # QLoRA, appendix E
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023,
    1.0,
)  # fmt: skip


def _to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric per-row quantization of `weight` [n, m] to int8 [n, m] and scale float32 [n].

    As bitsandbytes' `int8_vectorwise_quant` on a processor, rounding to float16 before included.
    """
    halves = weight.detach().to(torch.float16)
    largest = halves.abs().amax(1).to(torch.float32)
    # A row of zeros has integers 0, whatever it is multiplied by.
    steps = 127.0 / torch.where(largest > 0, largest, 1.0)
    return torch.round(halves * steps[:, None]).to(torch.int8), largest / 127.0


def as_stored(layer: nn.Linear | nn.Embedding, quantization: str) -> Tensor:
    """What the weight of a plain layer becomes by `quantize`, in float32: the numbers that are computed with.

    In torch alone, for whoever wants the numbers and not the memory.
    """
    weight = layer.weight.detach()
    if quantization == "none":
        return weight
    if quantization == "int8" or (isinstance(layer, nn.Embedding) and layer.embedding_dim % _BLOCK):
        integers, scale = _to_int8(weight)
        return integers.to(torch.float32) * scale[:, None]
    numbers, code = weight.to(torch.float32).reshape(-1), torch.tensor(_NF4)
    missing = -len(numbers) % _BLOCK
    blocks = nn.functional.pad(numbers, (0, missing)).view(-1, _BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    shares = blocks * (1.0 / largest.clamp(min=1e-38))
    if missing:
        shares[-1] = blocks[-1] / largest[-1].clamp(min=1e-38)
    nearest = torch.bucketize(shares.clamp(-1, 1), (code[:-1] + code[1:]) / 2)
    return (code[nearest] * largest).view(-1)[: len(numbers)].view_as(weight)


class _NF4Store:
    """Packs `weight` [n, m] as nf4 [ceil(n m / 2)] uint8 with one float32 scale a block of 64."""

    @staticmethod
    def pack(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        import bitsandbytes.functional as bnb

        packed, state = bnb.quantize_4bit(
            weight.detach().to(torch.float32).contiguous(),
            blocksize=_BLOCK,
            compress_statistics=False,
            quant_type="nf4",
        )
        return packed.reshape(-1), state.absmax.to(torch.float32), state.code.to(torch.float32)

    @staticmethod
    def unpack(
        packed: Tensor, absmax: Tensor, code: Tensor, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Tensor:
        import bitsandbytes.functional as bnb

        state = bnb.QuantState(
            absmax=absmax, shape=torch.Size(shape), code=code, blocksize=_BLOCK, quant_type="nf4", dtype=dtype
        )
        return bnb.dequantize_4bit(packed.reshape(-1, 1), state)


class _FrozenProduct(torch.autograd.Function):
    """y = x W^T with a frozen W that is expanded twice rather than kept between forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _FrozenLinear) -> Tensor:
        ctx.layer = layer
        ctx.dtype = x.dtype
        return torch.nn.functional.linear(x, layer.expanded(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        grad = grads[0]
        return grad @ ctx.layer.expanded(grad.dtype), None


class _FrozenLinear(nn.Linear):
    """A linear layer whose weight is stored compressed; the bias stays float32 and may be trained."""

    def __init__(self, source: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = source.in_features, source.out_features
        self.bias = None if source.bias is None else nn.Parameter(source.bias.detach().clone())
        self._store(source.weight)

    def _store(self, weight: Tensor) -> None:
        raise NotImplementedError

    def expanded(self, dtype: torch.dtype) -> Tensor:
        """The weight [out_features, in_features] as the floating point numbers that it stands for."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:
        """`input` [..., in_features] -> [..., out_features], in the input's type (autocast's, under it)."""
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        output: Tensor = _FrozenProduct.apply(input, self)
        return output if self.bias is None else output + self.bias.to(output.dtype)


class Int8Linear(_FrozenLinear):
    """Linear layer stored in int8 with a float32 scale an output row."""

    def _store(self, weight: Tensor) -> None:
        integers, scale = _to_int8(weight)
        self.weight = nn.Parameter(integers, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def expanded(self, dtype: torch.dtype) -> Tensor:
        return (self.weight.to(torch.float32) * self.scale[:, None]).to(dtype)


class NF4Linear(_FrozenLinear):
    """Linear layer stored in 4-bit NormalFloat with a float32 scale a block of 64 weights."""

    def _store(self, weight: Tensor) -> None:
        packed, absmax, code = _NF4Store.pack(weight)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.absmax = nn.Parameter(absmax, requires_grad=False)
        self.code = nn.Parameter(code, requires_grad=False)

    def expanded(self, dtype: torch.dtype) -> Tensor:
        shape = (self.out_features, self.in_features)
        return _NF4Store.unpack(self.weight, self.absmax, self.code, shape, torch.float32).to(dtype)


class _FrozenEmbedding(nn.Embedding):
    """An embedding table stored compressed; only the rows that are looked up are expanded."""

    def __init__(self, source: nn.Embedding) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = source.num_embeddings, source.embedding_dim
        self.padding_idx, self.max_norm, self.norm_type = source.padding_idx, None, 2.0
        self.scale_grad_by_freq, self.sparse = False, False
        self._store(source.weight)

    def _store(self, weight: Tensor) -> None:
        raise NotImplementedError


class Int8Embedding(_FrozenEmbedding):
    """Embedding stored in int8 with a float32 scale a row."""

    def _store(self, weight: Tensor) -> None:
        integers, scale = _to_int8(weight)
        self.weight = nn.Parameter(integers, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """`input` [...] of ids -> float32 [..., embedding_dim]."""
        return self.weight[input].to(torch.float32) * self.scale[input][..., None]


class NF4Embedding(_FrozenEmbedding):
    """Embedding stored in 4-bit NormalFloat; `embedding_dim` must be a multiple of 64."""

    def _store(self, weight: Tensor) -> None:
        packed, absmax, code = _NF4Store.pack(weight)
        self.weight = nn.Parameter(packed.reshape(self.num_embeddings, -1), requires_grad=False)
        self.absmax = nn.Parameter(absmax.reshape(self.num_embeddings, -1), requires_grad=False)
        self.code = nn.Parameter(code, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """`input` [...] of ids -> float32 [..., embedding_dim]."""
        flat = input.reshape(-1)
        if flat.numel() == 0:
            return torch.zeros(*input.shape, self.embedding_dim, device=input.device)
        shape = (flat.numel(), self.embedding_dim)
        rows = _NF4Store.unpack(
            self.weight[flat].reshape(-1), self.absmax[flat].reshape(-1), self.code, shape, torch.float32
        )
        return rows.reshape(*input.shape, self.embedding_dim)


def _replacement(module: nn.Module, quantization: str) -> nn.Module | None:
    if type(module) is nn.Linear:
        return Int8Linear(module) if quantization == "int8" else NF4Linear(module)
    if type(module) is nn.Embedding:
        # A row that is no whole number of blocks cannot be looked up alone: such tables (BERT-family models
        # with a width that 64 does not divide, and one-row tables) are stored in 8 bits instead.
        if quantization == "int8" or module.embedding_dim % _BLOCK:
            return Int8Embedding(module)
        return NF4Embedding(module)
    return None


def quantize(encoder: nn.Module, quantization: str) -> nn.Module:
    """Replaces every linear layer and embedding below `encoder` in place by its compressed form.

    Args:
        encoder: any module; its LayerNorms and biases stay float32 (under 1 percent of a BERT).
        quantization: `none`, `int8` or `nf4`.

    Returns:
        `encoder`.

    Raises:
        ModelError: `quantization` is another name.
    """
    if quantization not in QUANTIZATIONS:
        raise ModelError(
            f"model.quantization={quantization!r} is not known; it can be one of {', '.join(QUANTIZATIONS)}."
        )
    if quantization == "none":
        return encoder
    for parent in list(encoder.modules()):
        for name, child in list(parent.named_children()):
            replacement = _replacement(child, quantization)
            if replacement is not None:
                setattr(parent, name, replacement)
    return encoder


def dequantize(encoder: nn.Module) -> nn.Module:
    """Replaces every compressed layer below `encoder` in place by a plain one, float32, of the same numbers.

    Returns:
        `encoder`.
    """
    for parent in list(encoder.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, (_FrozenLinear, _FrozenEmbedding)):
                setattr(parent, name, _plain(child))
    return encoder


def _plain(layer: _FrozenLinear | _FrozenEmbedding) -> nn.Module:
    device = layer.weight.device
    if isinstance(layer, _FrozenLinear):
        linear = nn.Linear(
            layer.in_features, layer.out_features, bias=layer.bias is not None, device=device
        ).requires_grad_(False)
        linear.weight.copy_(weight_of(layer))
        if layer.bias is not None:
            linear.bias.copy_(layer.bias)
        return linear
    table = nn.Embedding(
        layer.num_embeddings, layer.embedding_dim, padding_idx=layer.padding_idx, device=device
    ).requires_grad_(False)
    table.weight.copy_(layer(torch.arange(layer.num_embeddings, device=device)))
    return table


def weight_of(linear: nn.Linear) -> Tensor:
    """The weight [out_features, in_features] of a plain or a compressed layer, in floating point."""
    return linear.expanded(torch.float32) if isinstance(linear, _FrozenLinear) else linear.weight.detach()


def stored_bytes(module: nn.Module) -> int:
    """Bytes that the parameters of `module` take in memory (non-persistent index buffers left out)."""
    return sum(p.numel() * p.element_size() for p in module.parameters())
