"""Which words of a text speak for a label: by leaving each out (Li, Monroe and Jurafsky 2016,
arXiv:1612.08220).

The model is asked about the text, and about the text without each of its words, in one go. A word's weight is
by how much the log-odds of the label fall without it: above 0 it speaks for the label, below 0 against it.
Log-odds, because probabilities near 0 and 1 hide differences; add up weights only as a rough guide, for words
act together and each is left out alone. Texts of more words than `Limits.parts` are cut into so many parts of
neighbouring words, so that an explanation never costs more than that many texts; of a pair each text gets its
share of them.

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

from fedtune.runs.predict import Asked

__all__ = ["METHOD", "Cut", "cut", "weights"]

METHOD = (
    "leave one word out: a weight is by how much the log-odds of the label fall when the model reads the "
    "text without that word; above 0 it speaks for the label"
)


@dataclass(frozen=True)
class Cut:
    """A text, or a pair, cut into parts.

    Attributes:
        spans: (start, end) of each part in its text, in characters; v parts.
        texts: which text each part is of: 0, or 1 for the second of a pair.
        ids: v + 1 lists of token ids: all of it, and it without each part.
        ends: how many characters of each text the model reads.
    """

    spans: list[tuple[int, int]]
    texts: list[int]
    ids: list[list[int]]
    ends: list[int]


def cut(tokenizer: Any, asked: Asked, parts: int) -> Cut:
    """Cuts `asked` at its words, into at most `parts` parts of about equally many words.

    Args:
        tokenizer: of the `tokenizers` library; it cuts to the model's length.
        parts: 2 or more.
    """
    both = asked if isinstance(asked, tuple) else (asked,)
    encoded = tokenizer.encode(*both)
    words: list[dict[int, list[int]]] = [{} for _ in both]  # of each text, the places of each word's tokens
    for place, (text, word) in enumerate(zip(encoded.sequence_ids, encoded.word_ids, strict=True)):
        if word is not None and not encoded.special_tokens_mask[place]:
            words[text or 0].setdefault(word, []).append(place)
    most = _shares([len(one) for one in words], parts)
    groups = [
        (text, list(chain(*group)))
        for text, own in enumerate(words)
        for group in _split(list(own.values()), most[text])
    ]
    spans = [(encoded.offsets[group[0]][0], encoded.offsets[group[-1]][1]) for _, group in groups]
    without = [
        [token for place, token in enumerate(encoded.ids) if place not in set(group)] for _, group in groups
    ]
    texts = [text for text, _ in groups]
    ends = [
        max((end for (_, end), of in zip(spans, texts, strict=True) if of == text), default=0)
        for text in range(len(both))
    ]
    return Cut(spans, texts, [encoded.ids, *without], ends)


def _shares(counts: Sequence[int], parts: int) -> list[int]:
    """Into how many parts each text is cut at most, by its words."""
    if len(counts) == 1 or sum(counts) <= parts:
        return [parts] * len(counts)
    first = min(max(round(parts * counts[0] / sum(counts)), 1), parts - 1)
    return [first, parts - first]


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
