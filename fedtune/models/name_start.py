"""A head that knows the names of the classes before it has seen a record: public knowledge, for nothing.

A row of the head is the direction in which the frozen encoder puts the name of a class (`card_arrival`), from
the mean of all names. On 77 classes that alone is right on most texts; where noise is heavy it is worth a
point or more after training, and nothing where it is not (`simulations/LOG.md`).

What it does not do: look at a text. Where names say nothing (`0`, `1`), the head starts at zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedtune.models.classifier import AdaptedModel

__all__ = ["start_by_names", "words_of"]

_NORM = 4.0 / 3.0  # of a row, beside texts of length 3: a logit of 4 where a text points as a name does
_MOST_TOKENS = 32  # of a name


def words_of(names: tuple[str, ...]) -> list[str] | None:
    """Names as words; None if some are no words, or two are the same."""
    words = [" ".join(name.replace("_", " ").replace("-", " ").split()) for name in names]
    told = all(any(letter.isalpha() for letter in word) for word in words)
    return words if told and len({word.lower() for word in words}) == len(words) > 1 else None


@torch.no_grad()
def start_by_names(model: AdaptedModel, tokenizer: Any) -> NDArray[np.float32]:
    """The adapter to start from, float32 [P]: `model.initial` with the head made of the classes' names."""
    start = model.initial.copy()
    words = words_of(model.label_names)
    if words is None:
        return start
    limit = min(_MOST_TOKENS, model.base.encoder.max_positions)
    vectors = []
    for word in words:
        ids = tokenizer(word, truncation=True, max_length=limit)["input_ids"]
        tokens = torch.tensor([ids], device=model.device)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        hidden = model.base.encoder.embed(tokens, mask)
        hidden = model.base.encoder.run(hidden, mask, 0, model.num_layers)
        vectors.append(torch.nn.functional.normalize(model.base.pool(hidden, mask).float(), dim=-1)[0])
    rows = torch.stack(vectors)
    rows = _NORM * torch.nn.functional.normalize(rows - rows.mean(0), dim=-1)
    offset = 0
    for name, parameter in model.parameters.items():
        if ".classifier." in f".{name}" and name.endswith(".weight"):
            start[offset : offset + parameter.numel()] = rows.cpu().numpy().reshape(-1)
        offset += parameter.numel()
    return start
