"""What of a model matters least, by how much its answers on public texts would change without it.

Of a head or unit with output m h (m = 1): taking it out (m = 0) changes the answers, to second order, by
half of the Fisher information of m,

    F = E [ (d log p(y | x) / d m)^2 ],   y drawn from what the model itself says of x

(the first derivative of the Kullback-Leibler divergence is 0 where both models are the same). No label is
looked at. A bare encoder says no probabilities: there, log p is the product of its mean token state, at
length one, with a random direction, and F is how far that state moves. The gradients by text are of masks,
one for each text (Michel et al. 2019 take the mean of absolute ones, with labels).

Whole layers go one after the other: each time the one without which the answers change least, asked with the
model as it then is.

Shapes: b texts, l layers, n heads or units of a layer, c classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedtune.compress.transfer import Inputs, forward
from fedtune.models.modeling_fedtune import layers_of
from fedtune.models.surgery import Anatomy, anatomy, encoder_of, masked

__all__ = ["choose", "importance", "least_layers"]

_ROWS = 16
_DRAWS = 4  # of y, for each text


def importance(
    model: nn.Module, ids: Sequence[Sequence[int]], inputs: Inputs, seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Of each layer, the information of its heads and of its units, on the texts `ids`."""
    whole = anatomy(model)
    heads = [torch.zeros(count) for count in whole.heads]
    units = [torch.zeros(count) for count in whole.units]
    chance = torch.Generator().manual_seed(seed)
    model.eval().requires_grad_(False)
    for start in range(0, len(ids), _ROWS):
        part = ids[start : start + _ROWS]
        with masked(model, len(part)) as (of_heads, of_units):
            logits, states = forward(model, inputs.batch(part), [] if _says(model) else [whole.layers - 1])
            for draw in range(_DRAWS):
                score = _score(logits, states, chance)
                last = draw == _DRAWS - 1
                grads = torch.autograd.grad(score, [*of_heads, *of_units], retain_graph=not last)
                for layer in range(whole.layers):
                    heads[layer] += grads[layer].square().sum(0)
                    units[layer] += grads[whole.layers + layer].square().sum(0)
    number = _DRAWS * len(ids)
    return [one / number for one in heads], [one / number for one in units]


def _says(model: nn.Module) -> bool:
    return encoder_of(model) is not model


def _score(logits: Tensor | None, states: Tensor | None, chance: torch.Generator) -> Tensor:
    """The sum over texts of log p(y | x), so that each text's mask gets its own gradient."""
    if logits is not None:
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=chance)
        return logits.log_softmax(-1).gather(1, drawn).sum()
    assert states is not None
    return (states[:, 0] * torch.randn(states.shape[0], states.shape[2], generator=chance)).sum()


def choose(found: Sequence[Tensor], share: float, *, even: bool = False) -> tuple[tuple[int, ...], ...]:
    """Places that stay when `share` of all, the least important, go; a layer keeps one or more.

    Args:
        found: by layer, the importance of each of its parts.
        even: the same share of every layer.
    """
    if even:
        goes = [one.argsort()[: min(len(one) - 1, round(share * len(one)))] for one in found]
    else:
        flat = torch.cat(list(found))
        # The most important of each layer stays, whatever the others are.
        places = torch.cat([torch.arange(len(one)) for one in found])
        layer = torch.cat([torch.full((len(one),), number) for number, one in enumerate(found)])
        for number, one in enumerate(found):
            flat[(layer == number) & (places == int(one.argmax()))] = torch.inf
        least = flat.argsort()[: min(len(flat) - len(found), round(share * len(flat)))]
        goes = [places[least][layer[least] == number] for number in range(len(found))]
    return tuple(
        tuple(sorted(set(range(len(one))) - set(gone.tolist())))
        for one, gone in zip(found, goes, strict=True)
    )


def least_layers(
    model: nn.Module, count: int, ids: Sequence[Sequence[int]], inputs: Inputs
) -> tuple[int, ...]:
    """The layers that stay when the `count` least important go."""
    whole: Anatomy = anatomy(model)
    stay = list(range(whole.layers))
    with torch.inference_mode():
        wanted = _answers(model, ids, inputs)
        for _ in range(count):
            moved = {}
            for layer in stay:
                with _only(model, [one for one in stay if one != layer]):
                    moved[layer] = _distance(model, wanted, _answers(model, ids, inputs))
            stay.remove(min(moved, key=lambda one: moved[one]))
    return tuple(stay)


@contextlib.contextmanager
def _only(model: nn.Module, layers: Sequence[int]) -> Iterator[None]:
    """Inside, the model runs these layers alone."""
    encoder: Any = encoder_of(model)
    body = encoder.transformer if hasattr(encoder, "transformer") else encoder.encoder
    before = body.layer
    body.layer = nn.ModuleList(before[layer] for layer in layers)
    try:
        yield
    finally:
        body.layer = before


def _answers(model: nn.Module, ids: Sequence[Sequence[int]], inputs: Inputs) -> Tensor:
    """Log-probabilities [b, c]; of a bare encoder the mean token states [b, d]."""
    last = [] if _says(model) else [len(layers_of(encoder_of(model))) - 1]
    found = []
    for start in range(0, len(ids), _ROWS):
        logits, states = forward(model, inputs.batch(ids[start : start + _ROWS]), last)
        if logits is not None:
            found.append(logits.log_softmax(-1))
        elif states is not None:
            found.append(states[:, 0])
    return torch.cat(found)


def _distance(model: nn.Module, wanted: Tensor, got: Tensor) -> float:
    if _says(model):
        return float(functional.kl_div(got, wanted, reduction="batchmean", log_target=True))
    return float((wanted - got).square().sum(1).mean())
