"""Cuts a drawn batch into micro-batches of like length and few shapes, and pads them.

Texts are short and uneven, so padding all to one length wastes most of the work; but CPU kernels keep
memory for every tensor shape they meet, so shapes must not be free either. Therefore lengths are
rounded up to a multiple of 8 and rows to a small set (powers of two and the fullest that
`max_tokens` allows); rows that a micro-batch lacks are dummies of weight zero. Where to cut is found
by dynamic programming over the records sorted by length: padded tokens plus a fixed price for each
micro-batch are least.

For unit=person the cut is along persons: all records of one group are in one micro-batch, so that a
person's gradients are summed before they are clipped.

Cutting is deterministic and changes neither who is drawn nor any weight: it is not sampling.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedtune.data.corpus import Int64Array, TokenizedCorpus
from fedtune.data.windows import Windows

__all__ = ["LENGTH_STEP", "MicroBatch", "micro_batches", "pad"]

LENGTH_STEP = 8
LEAST_ROWS = 8
# What one micro-batch costs besides its tokens (kernel starts, reading the weights, Python), in tokens: about
# 20 ms, at 0.14 (bf16) to 0.37 (fp32) ms a token. The cut is nearly the same for anything from 50 to 150.
OVERHEAD_TOKENS = 96


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """One tensor's worth of records.

    Attributes:
        records: int64 [r], positions in the `lengths` that were cut.
        rows: rows of the tensor, r or more; the last `rows - r` are dummies and must get weight zero.
        length: tokens of each row.
    """

    records: Int64Array
    rows: int
    length: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.length


def micro_batches(
    lengths: npt.ArrayLike, max_tokens: int, groups: npt.ArrayLike | None = None
) -> list[MicroBatch]:
    """Cuts records into micro-batches of at most `max_tokens` padded tokens, longest first.

    Args:
        lengths: int [n], tokens of each drawn record; n may be 0.
        max_tokens: bound on rows x padded length.
        groups: int [n]; records with equal numbers stay in one micro-batch.

    Returns:
        Every position 0..n-1 exactly once. A record, or a group, that is too large for `max_tokens` by
        itself gets a micro-batch of its own that is over the bound.

    Raises:
        ValueError: `max_tokens` or a length is below 1, or `groups` has another length.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.ndim != 1 or (len(sizes) and sizes.min() < 1) or max_tokens < 1:
        raise ValueError("micro_batches needs lengths [n] of at least 1, and max_tokens of at least 1")
    if len(sizes) == 0:
        return []
    padded = -(-sizes // LENGTH_STEP) * LENGTH_STEP
    if groups is None:
        order = np.argsort(-sizes, kind="stable")
        starts = np.arange(len(sizes) + 1)
    else:
        order, starts = _order_groups(sizes, np.asarray(groups, dtype=np.int64))
    longest = padded[order[starts[:-1]]]
    return [
        MicroBatch(records=order[starts[first] : starts[last]], rows=rows, length=int(longest[first]))
        for first, last, rows in _cut(starts, longest, max_tokens)
    ]


def _order_groups(sizes: Int64Array, groups: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Records sorted by (their group's longest record, group, own length), and where groups start."""
    if groups.shape != sizes.shape:
        raise ValueError(f"groups has shape {groups.shape} for {len(sizes)} records")
    _, codes = np.unique(groups, return_inverse=True)
    longest = np.zeros(codes.max() + 1, dtype=np.int64)
    np.maximum.at(longest, codes, sizes)
    order = np.lexsort((-sizes, codes, -longest[codes]))
    new = np.flatnonzero(np.diff(codes[order])) + 1
    return order, np.concatenate([[0], new, [len(sizes)]])


def _row_counts(max_tokens: int, length: int) -> list[int]:
    """Allowed rows at this padded length: powers of two from 8, and as many as fit (a multiple of 8)."""
    full = max(1, max_tokens // length)
    if full > LEAST_ROWS:
        full -= full % LEAST_ROWS
    # Fewer rows than 8 would save little and double the number of shapes.
    counts = [min(LEAST_ROWS, full)]
    while counts[-1] * 2 <= full:
        counts.append(counts[-1] * 2)
    return counts if counts[-1] == full else [*counts, full]


def _cut(starts: Int64Array, longest: Int64Array, max_tokens: int) -> list[tuple[int, int, int]]:
    """Cheapest cut of the groups 0..m-1, sorted by length: [(first, last, rows)].

    `starts` [m + 1], first record of each group; `longest` [m], padded length, descending.
    """
    num_groups = len(longest)
    options = {int(length): _row_counts(max_tokens, int(length)) for length in np.unique(longest)}
    bounds, lengths = starts.tolist(), longest.tolist()
    # fits[r][i]: the first group that no longer fits if r rows start at group i.
    widths = sorted({rows for counts in options.values() for rows in counts})
    fits = {rows: (np.searchsorted(starts, starts[:-1] + rows, side="right") - 1).tolist() for rows in widths}
    best = [0.0] * (num_groups + 1)
    choice: list[tuple[int, int]] = [(0, 0)] * num_groups
    for first in range(num_groups - 1, -1, -1):
        length = lengths[first]
        least = float("inf")
        for rows in options[length]:
            last = fits[rows][first]
            if last == first:
                continue
            price = rows * length + OVERHEAD_TOKENS + best[last]
            if price <= least:
                least, choice[first] = price, (last, rows)
        if least == float("inf"):
            # One group alone is larger than max_tokens allows.
            needed = bounds[first + 1] - bounds[first]
            rows = 1 << (needed - 1).bit_length()
            least, choice[first] = rows * length + OVERHEAD_TOKENS + best[first + 1], (first + 1, rows)
        best[first] = least
    cuts = []
    first = 0
    while first < num_groups:
        last, rows = choice[first]
        cuts.append((first, last, rows))
        first = last
    return cuts


def pad(
    data: TokenizedCorpus | Windows, indices: npt.ArrayLike, length: int, rows: int | None = None
) -> tuple[Int64Array, npt.NDArray[np.bool_]]:
    """Token ids int64 [b, s] and mask bool [b, s] (True: a token) of the records, or windows, at
    `indices`.

    `s` is `length` and `b` is `rows`, or the number of indices. Dummy rows, which follow the records,
    hold padding only; their first position is unmasked, because attention over nothing is NaN.

    Raises:
        ValueError: a record is longer than `length`, or there are more indices than rows.
    """
    records = np.asarray(indices, dtype=np.int64)
    lengths = data.lengths[records]
    count = len(records)
    rows = count if rows is None else rows
    if count > rows or (count and lengths.max() > length):
        raise ValueError(f"{count} records of up to {lengths.max()} tokens do not fit into {rows} x {length}")
    ids = np.full((rows, length), data.pad_id, dtype=np.int64)
    mask = np.zeros((rows, length), dtype=np.bool_)
    mask[:count] = np.arange(length) < lengths[:, None]
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    ids[:count][mask[:count]] = data.input_ids[np.repeat(data.offsets[records], lengths) + within]
    mask[count:, 0] = True
    return ids, mask
