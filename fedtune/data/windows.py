"""Long texts in windows: how a text of many tokens becomes pieces that an encoder takes, and their rows.

With `data.long_text=window` a text has up to `data.max_windows` windows of `data.max_length` tokens or less,
each with the special tokens around it, as even as they can be. Its vector is the mean of its windows': one
text stays one record, with one gradient that is clipped once. So nothing about sensitivity changes, however
many windows a text has; all of them are in one micro-batch.

A record's tokens are those of its windows one after the other, and how they are cut follows from how many
they are: n = ceil(tokens / max_length) windows, the first of which have one token more where it does not come
out even. So a corpus needs one number more, and what is shorter than a window is stored and run as ever.

Shapes: n records, w windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedtune.data.corpus import Int32Array, Int64Array, TokenizedCorpus, offsets_of

__all__ = ["Windows", "in_windows", "window_sizes"]


def window_sizes(tokens: int, most: int) -> list[int]:
    """How many tokens each window of a record of `tokens` tokens has, at most `most`."""
    count = -(-tokens // most)
    each, longer = divmod(tokens, count)
    return [each + 1] * longer + [each] * (count - longer)


def in_windows(ids: Sequence[int], before: int, after: int, most: int) -> list[int]:
    """A text's token ids with `before` and `after` special ones around it -> those of its windows, one after
    the other."""
    if len(ids) <= most:
        return list(ids)
    begin, content, end = ids[:before], ids[before : len(ids) - after], ids[len(ids) - after :]
    special = before + after
    count = -(-len(content) // (most - special))
    found: list[int] = []
    start = 0
    for size in window_sizes(len(content) + count * special, most):
        stop = start + size - special
        found += [*begin, *content[start:stop], *end]
        start = stop
    return found


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of a corpus, as rows that `batches.pad` takes.

    Attributes:
        input_ids: int32 [t], of the corpus.
        offsets: int64 [w + 1]; window j is `input_ids[offsets[j]:offsets[j + 1]]`.
        first: int64 [n + 1]; record i has the windows `first[i]` to `first[i + 1] - 1`.
        pad_id: the tokenizer's padding token.
    """

    input_ids: Int32Array
    offsets: Int64Array
    first: Int64Array
    pad_id: int

    @classmethod
    def of(cls, corpus: TokenizedCorpus) -> Windows | None:
        """The windows of a corpus; None where each record has one."""
        if corpus.window is None or not corpus.num_records:
            return None
        lengths = corpus.lengths
        counts = -(-lengths // corpus.window)
        if counts.max() == 1:
            return None
        each, longer = np.repeat(lengths // counts, counts), np.repeat(lengths % counts, counts)
        first = offsets_of(counts)
        place = np.arange(first[-1]) - np.repeat(first[:-1], counts)
        return cls(corpus.input_ids, offsets_of(each + (place < longer)), first, corpus.pad_id)

    @property
    def lengths(self) -> Int64Array:
        """Tokens of each window: int64 [w]."""
        return np.diff(self.offsets)

    def of_records(self, records: Int64Array) -> tuple[Int64Array, Int64Array]:
        """The windows of `records` [r], in turn, and the place in `records` of the one that each is of."""
        counts = np.diff(self.first)[records]
        whose = np.repeat(np.arange(len(records)), counts)
        within = np.arange(len(whose)) - np.repeat(offsets_of(counts)[:-1], counts)
        return self.first[records][whose] + within, whose
