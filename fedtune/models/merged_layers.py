"""A BERT's layers as they are run in training: weights ready for many batches, adapters merged into them.

Within one private step, one evaluation or one pass over frozen layers nothing of the model changes. So what
transformers, PEFT, autocast and quantized layers do anew in every product is done once here: weights are
expanded and cast to the precision of products, query, key and value are one product, and an adapter is part
of the weight that it adapts, W + s B A. Nothing is kept longer than that: the copy takes the memory of the
plain encoder (in bfloat16 half of it) while it lives.

Per-example gradients need no gradient of a weight. With y = x W^T + b and g the loss' derivative by y, which
autograd gives, an example's gradient is, summed over its tokens t (Goodfellow 2015, arXiv 1510.01799):

    W        sum_t g_t x_t^T
    bias     sum_t g_t
    B        s sum_t g_t (A x_t)^T
    A        s sum_t (B^T g_t) x_t^T

What it gives equals transformers' own layers with PEFT's adapters, up to the rounding of the precision
(tests; and the preflight compares gradients on every node, before its first step). Layers of another make
are not taken (`MergedLayers.of` is None): they run as they are, with Opacus' hooks.

Shapes: b examples, s tokens, d width, r rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedtune.models.encoder import EncoderStack
from fedtune.models.quantization import weight_of

__all__ = ["MergedLayers", "Seen"]

# Where a layer keeps its parts: of BERT and those that took its layer, of DistilBERT, MPNet and ALBERT.
_BERT = (
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    ("attention.output.dense", "attention.output.LayerNorm"),
    ("intermediate.dense", "intermediate.intermediate_act_fn", "output.dense", "output.LayerNorm"),
)
_DISTILBERT = (
    ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    ("attention.out_lin", "sa_layer_norm"),
    ("ffn.lin1", "ffn.activation", "ffn.lin2", "output_layer_norm"),
)
_MPNET = (
    ("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    ("attention.attn.o", "attention.LayerNorm"),
    _BERT[2],
)
_ALBERT = (
    ("attention.query", "attention.key", "attention.value"),
    ("attention.dense", "attention.LayerNorm"),
    ("ffn", "activation", "ffn_output", "full_layer_layer_norm"),
)
_PARTS = {
    "BertLayer": _BERT,
    "RobertaLayer": _BERT,
    "XLMRobertaLayer": _BERT,
    "CamembertLayer": _BERT,
    "ElectraLayer": _BERT,
    "TransformerBlock": _DISTILBERT,
    "MPNetLayer": _MPNET,
    "AlbertLayer": _ALBERT,
}

_Gradients = list[tuple[nn.Parameter, Tensor]]


@dataclass(frozen=True)
class _LowRank:
    """PEFT's LoRA on a linear layer: y += scale B A x."""

    a: nn.Parameter
    b: nn.Parameter
    scale: float

    def per_example(self, x: Tensor, g: Tensor) -> _Gradients:
        """Of x [b, s, in] and g [b, s, out]: the gradients [b, out, r] of B and, if it trains, [b, r, in]."""
        low = functional.linear(x, self.a.detach().to(x.dtype))
        found = [(self.b, self.scale * torch.bmm(g.transpose(1, 2), low))]
        if self.a.requires_grad:
            back = g @ self.b.detach().to(g.dtype)
            found.append((self.a, self.scale * torch.bmm(back.transpose(1, 2), x)))
        return found


@dataclass(frozen=True)
class _Part:
    """What of an operation's output [b, s, out] (columns `begin` to `end`) comes from trained parameters."""

    begin: int
    end: int
    bias: nn.Parameter | None
    adapter: _LowRank | None
    weight: nn.Parameter | None = None

    def per_example(self, x: Tensor, g: Tensor) -> _Gradients:
        g = g[..., self.begin : self.end]
        found = [] if self.adapter is None else self.adapter.per_example(x, g)
        if self.weight is not None:
            found.append((self.weight, torch.bmm(g.transpose(1, 2), x)))
        return found if self.bias is None else [*found, (self.bias, g.sum(1))]


@dataclass(frozen=True)
class Seen:
    """One operation of a forward pass that has trained parameters: its input, its output, and whose it is."""

    x: Tensor
    y: Tensor
    parts: tuple[_Part, ...]

    @classmethod
    def of_linear(cls, linear: nn.Module, x: Tensor, y: Tensor) -> Seen:
        """Of a linear layer that is trained itself: `x` [b, s, in] and what it gave, `y` [b, s, out]."""
        found = dict[str, nn.Parameter]()
        for name, parameter in linear.named_parameters():
            if parameter.requires_grad:  # PEFT keeps the frozen one that it copied beside it
                found[name.rpartition(".")[2]] = parameter
        return cls(x.detach(), y, (_Part(0, y.shape[-1], found["bias"], None, found["weight"]),))

    def per_example(self, g: Tensor) -> _Gradients:
        """From the loss' derivative by `y`: each trained parameter and its gradients, float32 [b, *shape]."""
        return [(p, v.float()) for part in self.parts for p, v in part.per_example(self.x, g)]


@dataclass(frozen=True)
class _Operation:
    """`compute(x)`, and what of it is trained."""

    compute: Callable[[Tensor], Tensor]
    parts: tuple[_Part, ...] = ()

    def __call__(self, x: Tensor, seen: list[Seen] | None) -> Tensor:
        y = self.compute(x)
        if seen is not None and self.parts:
            if not y.requires_grad:  # nothing below is trained
                y.requires_grad_()
            seen.append(Seen(x.detach(), y, self.parts))
        return y


@dataclass(frozen=True)
class _Layer:
    qkv: _Operation
    out: _Operation
    norm: _Operation
    up: _Operation
    activation: Callable[[Tensor], Tensor]
    down: _Operation
    last_norm: _Operation
    heads: int

    def __call__(self, hidden: Tensor, bias: Tensor | None, seen: list[Seen] | None) -> Tensor:
        rows, length, _ = hidden.shape
        q, k, v = self.qkv(hidden, seen).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scale = float(q.shape[-1]) ** -0.5
        if hidden.device.type == "cpu":  # there faster than sdpa, for short texts
            scores = (q * scale) @ k.transpose(-1, -2)
            if bias is not None:
                scores = scores + bias
            mixed = torch.softmax(scores, -1) @ v
        else:
            mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        mixed = mixed.transpose(1, 2).reshape(rows, length, -1)
        hidden = self.norm(hidden + self.out(mixed, seen), seen)
        return self.last_norm(hidden + self.down(self.activation(self.up(hidden, seen)), seen), seen)


def _find(layer: nn.Module, name: str) -> Any:
    found: Any = layer
    for step in name.split("."):
        found = getattr(found, step)
    return found


def _adapter(linear: nn.Module) -> _LowRank | None:
    if not hasattr(linear, "lora_A"):
        return None
    name = "default"  # PEFT's, of the one adapter that `add_adapter` makes
    parts: Any = linear
    return _LowRank(parts.lora_A[name].weight, parts.lora_B[name].weight, parts.scaling[name])


def _linear(linears: tuple[nn.Module, ...], dtype: torch.dtype) -> _Operation:
    """Linear layers of one input as one product."""
    weights, biases, parts, begin = [], [], [], 0
    for linear in linears:
        base: Any = getattr(linear, "base_layer", linear)
        weight, adapter = weight_of(base).float(), _adapter(linear)
        if adapter is not None:
            weight = weight + adapter.scale * (adapter.b.detach() @ adapter.a.detach())
        weights.append(weight.to(dtype))
        biases.append(base.bias.detach().to(dtype))
        end, bias = begin + len(weight), base.bias if base.bias.requires_grad else None
        if adapter is not None or bias is not None:
            parts.append(_Part(begin, end, bias, adapter))
        begin = end
    together, bias = torch.cat(weights), torch.cat(biases)
    return _Operation(lambda x: functional.linear(x, together, bias), tuple(parts))


def _norm(norm: nn.LayerNorm, dtype: torch.dtype) -> _Operation:
    weight, bias, eps = norm.weight.detach().to(dtype), norm.bias.detach().to(dtype), norm.eps
    parts = (_Part(0, len(bias), norm.bias, None),) if norm.bias.requires_grad else ()
    return _Operation(lambda x: functional.layer_norm(x, bias.shape, weight, bias, eps), parts)


def _is_known(layer: nn.Module) -> bool:
    kind = type(layer)
    known = kind.__name__ in _PARTS and kind.__module__.startswith("transformers.models.")
    return known and not getattr(layer, "is_decoder", False)


def _merged(layer: nn.Module, dtype: torch.dtype) -> _Layer:
    attention, after, ffn = _PARTS[type(layer).__name__]
    part = lambda name: _find(layer, name)  # noqa: E731
    holder: Any = part(attention[0].rpartition(".")[0])
    return _Layer(
        qkv=_linear(tuple(part(name) for name in attention), dtype),
        out=_linear((part(after[0]),), dtype),
        norm=_norm(part(after[1]), dtype),
        up=_linear((part(ffn[0]),), dtype),
        activation=part(ffn[1]),
        down=_linear((part(ffn[2]),), dtype),
        last_norm=_norm(part(ffn[3]), dtype),
        heads=getattr(holder, "num_attention_heads", None) or holder.n_heads,
    )


@dataclass(frozen=True)
class MergedLayers:
    """Layers `first` to `last - 1` of an encoder, with its adapter as it is now, in `dtype`."""

    first: int
    last: int
    dtype: torch.dtype
    layers: list[_Layer] = field(repr=False)
    bias: Callable[[Tensor, torch.dtype], Tensor | None] = field(repr=False)

    @classmethod
    @torch.no_grad()
    def of(cls, encoder: EncoderStack, first: int, last: int, dtype: torch.dtype) -> MergedLayers | None:
        """None if a layer is of a make that is not known here."""
        if not cls.takes(encoder, first, last):
            return None
        places = [encoder.blocks(index) for index in range(first, last)]
        # By layer: those that share their weights are merged once.
        made = {block: _merged(block, dtype) for blocks in places for block in dict.fromkeys(blocks)}
        return cls(first, last, dtype, [made[block] for blocks in places for block in blocks], encoder.bias)

    @staticmethod
    def takes(encoder: EncoderStack, first: int, last: int) -> bool:
        """Whether these layers are all of a make that is known here."""
        return all(_is_known(block) for index in range(first, last) for block in encoder.blocks(index))

    def run(self, hidden: Tensor, mask: Tensor, seen: list[Seen] | None = None) -> Tensor:
        """All of its layers on `hidden` [b, s, d] with `mask` [b, s]; float32 [b, s, d].

        Operations with trained parameters are added to `seen`, and the outputs of those, and what follows
        from them, require gradients; nothing does without it.
        """
        hidden, bias = hidden.to(self.dtype), self.bias(mask, self.dtype)
        for layer in self.layers:
            hidden = layer(hidden, bias, seen)
        return hidden.float()
