"""An encoder with layers, attention heads and feed-forward units taken out: a smaller model, not a masked
one.

`cut` gives a new model of the same class whose matrices lack the rows and columns of what went, with all
other numbers as they were. Which may go is for `fedtune.compress`; `masked` lets it ask what each of them
matters: inside it, heads and units are multiplied by masks that a gradient can be taken of.

Works on a `FedtuneForSequenceClassification` (whose configuration then says how many heads and units each
layer has) and on a bare encoder of transformers', whose own configuration has one number of units for all
layers and none for fewer heads of the same width: there, units are cut evenly and heads not at all.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.errors import ModelError
from fedtune.models.modeling_fedtune import FedtuneForSequenceClassification, layers_of

__all__ = ["Anatomy", "Kept", "anatomy", "cut", "encoder_of", "masked"]

# Of a layer, by its class: what gives heads, what takes them, what gives units, what takes them.
_BERT = (("attention.self.query", "attention.self.key", "attention.self.value"), "attention.output.dense",
         "intermediate.dense", "output.dense")  # fmt: skip
_DISTILBERT = (("attention.q_lin", "attention.k_lin", "attention.v_lin"), "attention.out_lin",
               "ffn.lin1", "ffn.lin2")  # fmt: skip
_LAYER = re.compile(r"^(.*\blayer\.)(\d+)\.(.*)\.(weight|bias)$")


@dataclass(frozen=True)
class Anatomy:
    """How large an encoder is.

    Attributes:
        heads: of each layer.
        units: feed-forward units of each layer.
        width: of a token's state.
        head_size: of one head.
    """

    heads: tuple[int, ...]
    units: tuple[int, ...]
    width: int
    head_size: int

    @property
    def layers(self) -> int:
        """How many there are."""
        return len(self.heads)


@dataclass(frozen=True)
class Kept:
    """What stays: places of layers, and of each of those the places of its heads and units, ascending."""

    layers: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]
    units: tuple[tuple[int, ...], ...]

    @classmethod
    def all_of(cls, layers: Sequence[int], whole: Anatomy) -> Kept:
        """These layers, uncut."""
        return cls(
            tuple(layers),
            tuple(tuple(range(whole.heads[layer])) for layer in layers),
            tuple(tuple(range(whole.units[layer])) for layer in layers),
        )


def encoder_of(model: nn.Module) -> nn.Module:
    """The encoder of a classifier, or `model` itself."""
    encoder: nn.Module = model.encoder if isinstance(model, FedtuneForSequenceClassification) else model
    return encoder


def _parts(layer: nn.Module) -> tuple[tuple[str, ...], str, str, str]:
    return _DISTILBERT if hasattr(layer, "ffn") else _BERT


def anatomy(model: nn.Module) -> Anatomy:
    """How large the encoder of `model` is.

    Raises:
        ModelError: its layers are of a make that is not known here.
    """
    encoder: Any = encoder_of(model)
    config = encoder.config
    try:
        layers = list(layers_of(encoder))
        heads, units = [], []
        head_size = config.hidden_size // config.num_attention_heads
        for layer in layers:
            given, _, units_of, _ = _parts(layer)
            query: Any = layer.get_submodule(given[0])
            up: Any = layer.get_submodule(units_of)
            heads.append(query.out_features // head_size)
            units.append(up.out_features)
    except AttributeError as error:
        raise ModelError(
            f"An encoder of type {config.model_type!r} cannot be cut: "
            "fedtune knows the layers of BERT, "
            "RoBERTa, ELECTRA and DistilBERT. Leave prune and distill.layers out: steps=[quantize]."
        ) from error
    return Anatomy(tuple(heads), tuple(units), config.hidden_size, head_size)


def cut(model: nn.Module, kept: Kept) -> Any:
    """A new model, in evaluation mode, of what is `kept` of `model`.

    Raises:
        ModelError: `model` is a bare encoder, and heads go, or layers would differ in their units.
    """
    whole = anatomy(model)
    about: Any = copy.deepcopy(model.config)
    classifier = isinstance(model, FedtuneForSequenceClassification)
    inner: Any = about.encoder if classifier else about
    setattr(inner, inner.attribute_map.get("num_hidden_layers", "num_hidden_layers"), len(kept.layers))
    heads, units = [len(one) for one in kept.heads], [len(one) for one in kept.units]
    if classifier:
        about.cut = {"heads": heads, "units": units}
    else:
        if any(count != whole.heads[layer] for layer, count in zip(kept.layers, heads, strict=True)):
            raise ModelError(
                "Attention heads cannot be cut out of a base encoder: transformers' configuration has no "
                "place for fewer heads of the same width, so nothing could load it. Prune units or layers "
                "(prune.heads=0 prune.units=0.33), or prune heads of a finished run."
            )
        if len(set(units)) > 1:
            raise ModelError("Layers of a base encoder must keep equally many units.")
        name = "hidden_dim" if inner.model_type == "distilbert" else "intermediate_size"
        setattr(inner, name, units[0])
    made = type(model)(about, **({} if classifier else _without_pooler(model)))
    made.load_state_dict(_sliced(model, kept, whole.head_size))
    return made.eval()


def _without_pooler(model: nn.Module) -> dict[str, bool]:
    return {"add_pooling_layer": False} if hasattr(model, "pooler") and model.pooler is None else {}


def _sliced(model: nn.Module, kept: Kept, head_size: int) -> dict[str, Tensor]:
    """The state of `model` without what goes, layers numbered anew."""
    place = {layer: number for number, layer in enumerate(kept.layers)}
    given, taken, units_of, units_to = _parts(next(iter(layers_of(encoder_of(model)))))
    state = {}
    for name, value in model.state_dict().items():
        found = _LAYER.match(name)
        if found is None:
            state[name] = value.clone()
            continue
        before, number, part, kind = found.groups()
        if int(number) not in place:
            continue
        at = place[int(number)]
        heads = torch.tensor([h * head_size + i for h in kept.heads[at] for i in range(head_size)])
        units = torch.tensor(kept.units[at])
        if part in given:
            value = value[heads]
        elif part == units_of:
            value = value[units]
        elif part == taken and kind == "weight":
            value = value[:, heads]
        elif part == units_to and kind == "weight":
            value = value[:, units]
        state[f"{before}{at}.{part}.{kind}"] = value.clone()
    return state


@contextlib.contextmanager
def masked(model: nn.Module, rows: int) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Inside, each text's heads and units are multiplied by masks of one: by layer, [rows, heads] and [rows,
    units], which require gradients. For batches of `rows` texts."""
    whole = anatomy(model)
    heads = [torch.ones(rows, count, requires_grad=True) for count in whole.heads]
    units = [torch.ones(rows, count, requires_grad=True) for count in whole.units]
    hooks = []
    for number, layer in enumerate(layers_of(encoder_of(model))):
        _, taken, _, units_to = _parts(layer)
        for name, mask, size in ((taken, heads[number], whole.head_size), (units_to, units[number], 1)):

            def multiply(module: Any, inputs: Any, mask: Tensor = mask, size: int = size) -> Any:
                return (inputs[0] * mask.repeat_interleave(size, 1)[:, None], *inputs[1:])

            hooks.append(layer.get_submodule(name).register_forward_pre_hook(multiply))
    try:
        yield heads, units
    finally:
        for hook in hooks:
            hook.remove()
