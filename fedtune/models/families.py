"""The families of encoders that fedtune runs, one row each: where a model's parts are, how its layers run.

Most run as BERT does: embeddings, then layers that take a bias on attention's scores. What differs is in a
row's functions: MPNet's bias has the tokens' distance in it, ALBERT's layers share their weights and are run
many times, ModernBERT turns queries and keys by their positions and looks at a window, DeBERTa weighs
distances by embeddings of their own.

Those of BERT's make, MPNet and ALBERT are trained merged (`fedtune.models.merged_layers`); ModernBERT as it
is, with Opacus' hooks; of DeBERTa an example's gradient is taken by itself (`one_by_one`), for its layers use
the same weights on words, which have a row an example, and on distances, which have none. That is slower.

To add a family: a row here, and in `tests/models/test_families.py`.

Shapes: b examples, s tokens, d width, h heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FAMILIES", "Family", "attention_bias", "family_of"]


def attention_bias(mask: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What is added to attention's scores so that padding is not seen, [b, 1, 1, s]; None without padding."""
    if bool(mask.all()):
        return None
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill(~mask, torch.finfo(dtype).min)[:, None, None, :]


def _by_distance(stack: Any, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """MPNet's bias [b, h, s, s]: of the distance between two tokens, and of padding."""
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

    places = torch.arange(mask.shape[1], device=mask.device)
    distance = MPNetEncoder.relative_position_bucket(places[None, :] - places[:, None])
    bias: Tensor = stack.rest["relative_attention_bias"](distance).permute(2, 0, 1)[None].to(dtype)
    padding = attention_bias(mask, dtype)
    return bias if padding is None else bias + padding


def _blocks(stack: Any, index: int) -> list[nn.Module]:
    return [stack.layer[index]]


def _shared_blocks(stack: Any, index: int) -> list[nn.Module]:
    """ALBERT's: the layers of a group, as many times as the group is run."""
    groups, layers = len(stack.layer), stack.config.num_hidden_layers
    times = sum(int(layer / (layers / groups)) == index for layer in range(layers))
    return [*stack.layer[index].albert_layers] * times


def _run(stack: Any, hidden: Tensor, mask: Tensor, first: int, last: int) -> Tensor:
    bias = stack.bias(mask, hidden.dtype)
    for index in range(first, last):
        for block in stack.blocks(index):
            output = block(hidden, bias)
            hidden = output[0] if isinstance(output, tuple) else output
    return hidden


def _run_modernbert(stack: Any, hidden: Tensor, mask: Tensor, first: int, last: int) -> Tensor:
    from transformers.masking_utils import create_bidirectional_mask, create_bidirectional_sliding_window_mask

    places = torch.arange(mask.shape[1], device=mask.device)[None]
    about = {"config": stack.config, "inputs_embeds": hidden, "attention_mask": mask}
    masks = {
        "full_attention": create_bidirectional_mask(**about),
        "sliding_attention": create_bidirectional_sliding_window_mask(**about),
    }
    turns = {kind: stack.rest["rotary_emb"](hidden, places, kind) for kind in set(stack.config.layer_types)}
    for index in range(first, last):
        layer = stack.layer[index]
        kind = layer.attention_type
        hidden = layer(hidden, attention_mask=masks[kind], position_embeddings=turns[kind])
    return stack.rest["final_norm"](hidden) if last == len(stack.layer) else hidden


def _run_deberta(stack: Any, hidden: Tensor, mask: Tensor, first: int, last: int) -> Tensor:
    from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

    config, rest = stack.config, stack.rest
    distances = embedded = None
    if config.relative_attention:
        most = config.max_relative_positions
        most = most if most >= 1 else config.max_position_embeddings
        buckets = getattr(config, "position_buckets", -1)
        distances = build_relative_position(hidden, hidden, bucket_size=buckets, max_position=most)
        # Looked up, not read: a compressed table's `weight` holds integers.
        table = rest["rel_embeddings"]
        embedded = table(torch.arange(table.num_embeddings, device=mask.device))
        embedded = rest["LayerNorm"](embedded) if "LayerNorm" in rest else embedded
    seen = mask[:, None, None, :] & mask[:, None, :, None]
    for index in range(first, last):
        output = stack.layer[index](hidden, seen, relative_pos=distances, rel_embeddings=embedded)[0]
        if index == 0 and "conv" in rest:
            output = rest["conv"](hidden, output, mask.long())
        hidden = output
    return hidden


@dataclass(frozen=True)
class Family:
    """How a model of transformers' is taken apart, and run.

    Attributes:
        body: where in the model its list of layers is; empty: in the model itself.
        layers: the name of that list.
        run: layers `first` to `last - 1` of an `EncoderStack` on `hidden` [b, s, d] with `mask` [b, s].
        blocks: the layers that are run one after the other at a place of that list.
        bias: what is added to attention's scores, where that is more than padding.
        from_padding: positions are counted from the padding's id.
        projects: the layer that brings narrow embeddings to the layers' width, by its name in its body or
            beside it; empty: there is none, or the embeddings have it in them.
        sdpa: it has transformers' kernel of that name.
        one_by_one: an example's gradient must be taken by itself.
    """

    body: str = "encoder"
    layers: str = "layer"
    run: Callable[[Any, Tensor, Tensor, int, int], Tensor] = _run
    blocks: Callable[[Any, int], list[nn.Module]] = _blocks
    bias: Callable[[Any, Tensor, torch.dtype], Tensor] | None = None
    from_padding: bool = False
    projects: str = ""
    sdpa: bool = True
    one_by_one: bool = False

    def body_of(self, model: nn.Module) -> nn.Module:
        """The module of `model` that holds its list of layers."""
        return model.get_submodule(self.body)

    def name_in_transformers(self, name: str) -> str:
        """The name that transformers' model has for a parameter below an `EncoderStack` called `encoder`."""
        prefix = f"encoder.{self.body}." if self.body else "encoder."
        name = name.replace(f"encoder.rest.{_BESIDE}.", f"encoder.{_BESIDE}.")
        return name.replace("encoder.layer.", f"{prefix}{self.layers}.").replace("encoder.rest.", prefix)

    def beside_body(self, model: nn.Module) -> dict[str, nn.Module]:
        """The module that `projects` names, by its name, if `model` has it beside its body."""
        return {name: part for name, part in model.named_children() if name == self.projects}


_BESIDE = "embeddings_project"  # a small ELECTRA's, which is no part of its body
_ROBERTA = Family(from_padding=True)
FAMILIES: dict[str, Family] = {
    "bert": Family(),
    "roberta": _ROBERTA,
    "distilbert": Family(body="transformer"),
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": Family(projects=_BESIDE),
    "mpnet": Family(bias=_by_distance, from_padding=True, sdpa=False),
    "albert": Family(
        layers="albert_layer_groups", blocks=_shared_blocks, projects="embedding_hidden_mapping_in"
    ),
    "modernbert": Family(body="", layers="layers", run=_run_modernbert),
    "deberta-v2": Family(run=_run_deberta, sdpa=False, one_by_one=True),
}


def family_of(config: Any) -> Family:
    """The family of a configuration of transformers', which `soundness.check_kind` has let pass."""
    return FAMILIES[config.model_type]
