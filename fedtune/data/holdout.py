"""Which of a node's units are kept out of training, to be evaluated on.

The rule looks at one unit alone: a hash of the person's name (of the record's text, where the data names no
persons) is below the declared share, or not. So one unit more or less moves no other unit from one part to
the other, and both parts change by that unit only, as the accounting needs; a random deal of the whole shard
would not do that. All texts of a person, and all copies of a text, are in one part. No seed enters: whatever
the run, seed, round or partition, the same persons are held out, and those of a smaller share are among
those of a larger one. A server that asks twice with one share does not get the one half tested on a model
that was trained on it.

How large the parts really are follows from who is in the data, so it is private; only the share is public.
A part may be empty.
"""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
import numpy.typing as npt

from fedtune.data.corpus import Shard, TokenizedCorpus

__all__ = ["hold_out", "is_held_out", "parts_of"]


def is_held_out(data: TokenizedCorpus, share: float) -> npt.NDArray[np.bool_]:
    """For each record, whether its unit is held out at `share`: bool [n]."""
    if data.units is None:
        drawn = [_place(row.tobytes()) for row in data.digests]
    else:
        places = {name: _place(str(name).encode("utf-8", "surrogatepass")) for name in set(data.units)}
        drawn = [places[name] for name in data.units]
    return np.array(drawn, dtype=np.float64) < share


def hold_out(shard: Shard, share: float) -> tuple[Shard, Shard]:
    """(what is trained on, what is evaluated on) of `shard`; no unit is in both.

    Both parts remember the whole, so that a release from either is charged to all of it. Declared
    sizes are the declared share of the declared size, never a count, and at least 1.
    """
    kept_out = is_held_out(shard.data, share)
    trained, held = parts_of(shard.declared_size, share)
    return (
        _part(shard, np.flatnonzero(~kept_out), trained),
        _part(shard, np.flatnonzero(kept_out), held),
    )


def parts_of(declared_size: int, share: float) -> tuple[int, int]:
    """The sizes to declare of what is trained on and of what is held out, of a whole of `declared_size`."""
    held = max(1, round(declared_size * share))
    return max(1, declared_size - held), held


def _part(shard: Shard, rows: npt.NDArray[np.int64], declared_size: int) -> Shard:
    return dataclasses.replace(
        shard,
        data=shard.data.subset(rows),
        record_index=shard.record_index[rows],
        declared_size=declared_size,
        whole=shard.data if shard.whole is None else shard.whole,
    )


def _place(unit: bytes) -> float:
    """Where a unit lies in [0, 1), evenly."""
    digest = hashlib.sha256(b"fedtune held out 1|" + unit).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
