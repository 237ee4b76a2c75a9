"""Which records and persons two data sets share, from the keys that a ledger keeps of each.

Data that was released from is a set of keys (`fedtune.privacy.ledger.identity`). For one body of data this
finds, for every other set in the ledger, which of its keys are in that too, and puts keys together that are
in the same sets: they were charged alike, so that an account of a million records is one of a few classes.
Sets are many where a sweep cuts the same data anew for each seed; then the small ones are looked up
together in one sorted array.

Shapes: n keys of the body, h sets that share a key with it, c classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedtune.privacy.ledger.identity import KeyArray

__all__ = ["Classes", "Membership", "Pool", "array_of", "bytes_of", "digest_of"]

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

_SMALL = 65_536  # keys of a set that is pooled
_POOLED = 8_000_000  # keys in the pool at most: 100 MB
_FEW = 64  # sets that are looked up one by one, rather than through the pool


def bytes_of(keys: KeyArray) -> bytes:
    """Keys as they are kept: 8 bytes each, little-endian, sorted."""
    return keys.astype("<u8").tobytes()


def array_of(kept: bytes) -> KeyArray:
    """The keys in `kept`, uint64."""
    return np.frombuffer(kept, dtype="<u8").astype(np.uint64)


def digest_of(records: bytes, persons: bytes | None) -> str:
    """SHA-256 over the keys of a set as they are kept, by which its row of the log vouches for them."""
    content = hashlib.sha256(b"fedtune keys 1|%d|" % len(records) + records)
    content.update(b"-" if persons is None else b"+" + persons)
    return content.hexdigest()


@dataclass(frozen=True)
class Classes:
    """Keys of one body of data, those together that are in the same sets.

    Attributes:
        sizes: keys in each class, [c].
        columns: by set, which classes are in it, bool [c]; only sets that share a key with the body.
    """

    sizes: IntArray
    columns: Mapping[str, BoolArray]


class Pool:
    """The small sets of a ledger in one sorted array, each key with the set that it is of."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._known: set[str] = set()
        self._keys: KeyArray = np.empty(0, dtype=np.uint64)
        self._owners: npt.NDArray[np.int32] = np.empty(0, dtype=np.int32)
        self._waiting: list[KeyArray] = []

    def add(self, name: str, keys: KeyArray) -> bool:
        """Takes a set in, once; False if it is too large, or the pool full."""
        if name in self._known:
            return True
        if len(keys) > _SMALL or len(self._keys) + sum(map(len, self._waiting)) > _POOLED:
            return False
        self._known.add(name)
        self._names.append(name)
        self._waiting.append(keys)
        return True

    def columns(self, keys: KeyArray) -> dict[str, BoolArray]:
        """By set of the pool, which of `keys` [n] are in it, bool [n]; only sets that have one of them."""
        if self._waiting:
            first = len(self._names) - len(self._waiting)
            owners = np.repeat(
                np.arange(first, len(self._names), dtype=np.int32), [len(one) for one in self._waiting]
            )
            all_keys = np.concatenate([self._keys, *self._waiting])
            order = np.argsort(all_keys, kind="stable")
            self._keys, self._owners = all_keys[order], np.concatenate([self._owners, owners])[order]
            self._waiting = []
        low = np.searchsorted(self._keys, keys, "left")
        counts = np.searchsorted(self._keys, keys, "right") - low
        rows = np.repeat(np.arange(len(keys)), counts)
        # Where each hit lies: its key's first place plus how many hits of that key came before it.
        places = np.arange(len(rows)) + np.repeat(low - (np.cumsum(counts) - counts), counts)
        owners = self._owners[places]
        order = np.argsort(owners, kind="stable")
        owners, rows = owners[order], rows[order]
        found: dict[str, BoolArray] = {}
        for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(owners)) + 1) if len(rows) else ():
            column = np.zeros(len(keys), dtype=np.bool_)
            column[rows[part]] = True
            found[self._names[owners[part[0]]]] = column
        return found


class Membership:
    """The sets that each key of one body is in; learns of further sets as they come."""

    def __init__(self, keys: KeyArray) -> None:
        self.keys = keys
        self._columns: dict[str, BoolArray] = {}
        self._asked: set[str] = set()
        self._classes: Classes | None = None

    def classes(self, names: Iterable[str], keys_of: Callable[[str], KeyArray], pool: Pool) -> Classes:
        """The classes of this body's keys by the sets `names`; `keys_of` gives the keys of one."""
        new = [name for name in names if name not in self._asked]
        if new or self._classes is None:
            pooled = {} if len(new) <= _FEW else self._from_pool(new, keys_of, pool)
            for name in new:
                self._asked.add(name)
                column = pooled[name] if name in pooled else contained(self.keys, keys_of(name))
                if column is not None and column.any():
                    self._columns[name] = column
            self._classes = self._grouped()
        return self._classes

    def _from_pool(
        self, names: list[str], keys_of: Callable[[str], KeyArray], pool: Pool
    ) -> dict[str, BoolArray | None]:
        """The columns of those of `names` that the pool holds; None: no key in common."""
        held = [name for name in names if pool.add(name, keys_of(name))]
        columns = pool.columns(self.keys)
        return {name: columns.get(name) for name in held}

    def _grouped(self) -> Classes:
        count = len(self.keys)
        telling = [name for name, column in self._columns.items() if not column.all()]
        if not telling:
            return Classes(np.array([count]), {name: np.ones(1, dtype=np.bool_) for name in self._columns})
        packed = np.zeros((count, -(-len(telling) // 64) * 8), dtype=np.uint8)
        for start in range(0, len(telling), 8):
            byte = np.zeros(count, dtype=np.uint8)
            for place, name in enumerate(telling[start : start + 8]):
                byte |= self._columns[name].astype(np.uint8) << place
            packed[:, start // 8] = byte
        words = packed.view(np.uint64)
        patterns = words[:, 0] if words.shape[1] == 1 else packed.view(f"V{packed.shape[1]}")[:, 0]
        _, first, sizes = np.unique(patterns, return_index=True, return_counts=True)
        return Classes(sizes, {name: column[first] for name, column in self._columns.items()})


def contained(keys: KeyArray, others: KeyArray) -> BoolArray:
    """Which of `keys` [n] are among `others`, bool [n]; both sorted."""
    if not len(others):
        return np.zeros(len(keys), dtype=np.bool_)
    places = np.searchsorted(others, keys)
    places[places == len(others)] = 0
    return np.asarray(others[places] == keys)
