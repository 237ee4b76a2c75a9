"""Which words of a text speak for a label: by leaving each out (Li, Monroe and Jurafsky 2016,
arXiv:1612.08220).

The model is asked about the text, and about the text without each of its words, in one go. A word's weight is
by how much the log-odds of the label fall without it: above 0 it speaks for the label, below 0 against it.
Log-odds, because probabilities near 0 and 1 hide differences; add up weights only as a rough guide, for words
act together and each is left out alone. Texts of more words than `Limits.parts` are cut into so many parts of
neighbouring words, so that an explanation never costs more than that many texts.

What this is not: a reason. It tells what the model's answer to this text hangs on, not what is true of the
text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["METHOD", "Cut", "cut", "weights"]

METHOD = (
    "leave one word out: a weight is by how much the log-odds of the label fall when the model reads the "
    "text without that word; above 0 it speaks for the label"
)


@dataclass(frozen=True)
class Cut:
    """A text, cut into parts.

    Attributes:
        spans: (start, end) of each part in the text, in characters; v parts.
        ids: v + 1 lists of token ids: the whole text, and the text without each part.
        end: how many characters of the text the model reads.
    """

    spans: list[tuple[int, int]]
    ids: list[list[int]]
    end: int


def cut(tokenizer: Any, text: str, parts: int) -> Cut:
    """Cuts `text` at its words, into at most `parts` parts of about equally many words.

    Args:
        tokenizer: of the `tokenizers` library; it cuts to the model's length.
    """
    encoded = tokenizer.encode(text)
    words: dict[int, list[int]] = {}  # places of the tokens of each word
    for place, word in enumerate(encoded.word_ids):
        if word is not None and not encoded.special_tokens_mask[place]:
            words.setdefault(word, []).append(place)
    groups = [list(chain(*group)) for group in _split(list(words.values()), parts)]
    spans = [(encoded.offsets[group[0]][0], encoded.offsets[group[-1]][1]) for group in groups]
    without = [
        [token for place, token in enumerate(encoded.ids) if place not in set(group)] for group in groups
    ]
    return Cut(spans, [encoded.ids, *without], spans[-1][1] if spans else 0)


def _split(words: Sequence[list[int]], parts: int) -> list[Sequence[list[int]]]:
    """`words` in at most `parts` runs of about the same length."""
    count = min(parts, len(words))
    edges = [len(words) * number // count for number in range(count + 1)] if count else [0]
    return [words[start:end] for start, end in pairwise(edges)]


def weights(logits: NDArray[np.float32], label: int) -> list[float]:
    """The weight of each of v parts.

    Args:
        logits: [v + 1, c] of a `Cut`'s ids.
        label: the class whose weights are asked for.
    """
    raised = logits.astype(float)
    others = np.delete(raised, label, axis=1)
    most = others.max(1, keepdims=True)
    odds = raised[:, label] - (most[:, 0] + np.log(np.exp(others - most).sum(1)))
    return [float(odds[0] - one) for one in odds[1:]]
