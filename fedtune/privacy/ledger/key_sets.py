"""The sets of keys in one ledger: which records and persons data sets share, and the accounts that follow.

Data that was released from is a set of keys (`fedtune.privacy.ledger.identity`). A set is written once, in
the transaction of its first release; its row of the log has the digest of its keys, against which they are
checked whenever they are read.

For one body of data this finds, for every other set in the ledger, which of its keys are in that too, and
puts keys together that are in the same sets: they were charged alike, so that an account of a million records
is one of a few groups. Sets are many where a sweep cuts the same data anew for each seed; then the small
ones are looked up together in one sorted array. Accounts are cached from one release to the next: only a body
of data that is new to the ledger changes which keys are where.

Shapes: n keys of the body, g groups of keys.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sqlite3
from collections.abc import Callable, Collection, Mapping

import numpy as np
import numpy.typing as npt

from fedtune.privacy.ledger.accounts import Account, KeyGroups, account_of, account_without_keys
from fedtune.privacy.ledger.chain import Chain
from fedtune.privacy.ledger.identity import KeyArray, KeySet
from fedtune.privacy.ledger.state import KnownSet, LedgerState

__all__ = ["KeySets", "Membership", "Pool", "array_of", "bytes_of", "digest_of"]

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

_SMALL = 65_536  # keys of a set that is pooled
_POOLED = 8_000_000  # keys in the pool at most: 100 MB
_FEW = 64  # sets that are looked up one by one, rather than through the pool
_CACHED = 256  # bodies of data whose accounts a process remembers
_NONE: KeyArray = np.empty(0, dtype=np.uint64)


class KeySets:
    """The sets of keys in one ledger's file."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._pools = {"record": Pool(), "person": Pool()}
        self._members: dict[str, dict[str, Membership]] = {}
        self._accounts: dict[tuple[str, str, str], tuple[tuple[int, int], Account]] = {}

    def account(
        self, connection: sqlite3.Connection | None, state: LedgerState, dataset: str, data: KeySet | str
    ) -> Account:
        """The account of `data` (keys, the id of a stored set, or a name without keys), called `dataset`.

        Raises:
            LedgerError: the keys of a set in the ledger were changed.
        """
        name = data.id if isinstance(data, KeySet) else data
        version = (len(state.releases), len(state.sets))
        # Equal keys may have other fingerprints of version 0.1, which saw every space.
        key = (dataset, name, data.fingerprint if isinstance(data, KeySet) else "")
        cached = self._accounts.get(key)
        if cached is None or cached[0] != version:
            account = self._account(connection, state, dataset, name, data)
            while len(self._accounts) >= _CACHED:
                self._accounts.pop(next(iter(self._accounts)))
            self._accounts[key] = cached = (version, account)
        return dataclasses.replace(cached[1], state=state)

    def add(self, connection: sqlite3.Connection, keys: KeySet, state: LedgerState) -> dict[str, object]:
        """Stores `keys`, within the caller's transaction; returns the body of the row that must name them."""
        records = bytes_of(keys.records)
        persons = None if keys.persons is None else bytes_of(keys.persons)
        self._chain.add_set(connection, keys.id, records, persons)
        old = {body.fingerprint for body in state.without_keys()}
        return {
            "id": keys.id,
            "records": len(keys.records),
            "persons": None if keys.persons is None else len(keys.persons),
            "digest": digest_of(records, persons),
            "old": sorted(old & {keys.fingerprint}),
        }

    def problems(self, connection: sqlite3.Connection, state: LedgerState) -> list[str]:
        """What is wrong with the stored keys, by the rows that name them."""
        stored = self._chain.set_names(connection)
        problems = [
            f"the keys of set {name} are there, and no row names them"
            for name in sorted(stored - set(state.sets))
        ]
        for name, known in sorted(state.sets.items()):
            if wrong := self._read(connection, name, known)[1]:
                problems.append(wrong)
        return problems

    def _account(
        self, connection: sqlite3.Connection | None, state: LedgerState, dataset: str, name: str,
        data: KeySet | str,
    ) -> Account:  # fmt: skip
        known = state.sets.get(name)
        if known is None and isinstance(data, str):
            return account_without_keys(state, dataset, data)
        old = set(known.old) if known else set()
        if isinstance(data, KeySet):
            old.add(data.fingerprint)
        members = self._members.get(name)
        if members is None:
            mine = self._mine(connection, name, known, data)
            while len(self._members) >= _CACHED:
                self._members.pop(next(iter(self._members)))
            members = {unit: Membership(keys) for unit, keys in mine.items()}
            self._members[name] = members
        groups = {
            unit: member.groups(state.sets, self._reader(connection, state, unit), self._pools[unit])
            for unit, member in members.items()
        }
        return account_of(state, dataset, name, old, groups)

    def _mine(
        self, connection: sqlite3.Connection | None, name: str, known: KnownSet | None, data: KeySet | str
    ) -> dict[str, KeyArray]:
        if isinstance(data, KeySet):
            records, persons = data.records, data.persons
        else:
            assert known is not None
            records, persons = self._keys(connection, name, known)
        return {"record": records} if persons is None else {"record": records, "person": persons}

    def _reader(
        self, connection: sqlite3.Connection | None, state: LedgerState, unit: str
    ) -> Callable[[str], KeyArray]:
        def keys_of(name: str) -> KeyArray:
            records, persons = self._keys(connection, name, state.sets[name])
            if unit == "record":
                return records
            return _NONE if persons is None else persons

        return keys_of

    def _keys(
        self, connection: sqlite3.Connection | None, name: str, known: KnownSet
    ) -> tuple[KeyArray, KeyArray | None]:
        assert connection is not None
        stored, wrong = self._read(connection, name, known)
        if stored is None:
            raise self._chain.broken(wrong)
        records, persons = stored
        return array_of(records), None if persons is None else array_of(persons)

    def _read(
        self, connection: sqlite3.Connection, name: str, known: KnownSet
    ) -> tuple[tuple[bytes, bytes | None] | None, str]:
        """The keys of a set as they are stored, or what is wrong with them."""
        stored = self._chain.set_of(connection, name)
        if stored is None:
            return None, f"the keys of set {name} are missing"
        if digest_of(*stored) != known.digest:
            return None, f"the keys of set {name} were changed after they were written"
        return stored, ""


def bytes_of(keys: KeyArray) -> bytes:
    """Keys as they are stored: 8 bytes each, little-endian, sorted."""
    return keys.astype("<u8").tobytes()


def array_of(stored: bytes) -> KeyArray:
    """The keys in `stored`, uint64."""
    return np.frombuffer(stored, dtype="<u8").astype(np.uint64)


def digest_of(records: bytes, persons: bytes | None) -> str:
    """SHA-256 over the keys of a set as they are stored, by which its row of the log vouches for them."""
    content = hashlib.sha256(b"fedtune keys 1|%d|" % len(records) + records)
    content.update(b"-" if persons is None else b"+" + persons)
    return content.hexdigest()


class Pool:
    """The small sets of a ledger in sorted arrays, each key with the set that it is of.

    What comes is merged into what is there when it is half as large, so there are few arrays, and a set among
    thousands costs no more than it would alone.
    """

    def __init__(self) -> None:
        self.apart: list[str] = []  # sets that it does not hold
        self._learnt: set[str] = set()
        self._names: list[str] = []
        self._known: set[str] = set()
        self._held = 0  # keys
        self._parts: list[tuple[KeyArray, npt.NDArray[np.int32]]] = []

    @property
    def version(self) -> int:
        """Of how many sets it has heard."""
        return len(self._learnt)

    def learn(self, names: Collection[str], keys_of: Callable[[str], KeyArray]) -> None:
        """Takes in those of `names` that it has not heard of; these came last, where `names` only grow."""
        missing, new = len(names) - len(self._learnt), list[str]()
        for name in reversed(list(names) if not isinstance(names, Mapping) else names):
            if name not in self._learnt:
                new.append(name)
            elif len(new) >= missing:
                break
        for name in reversed(new):
            self._learnt.add(name)
            if not self.add(name, keys_of(name)):
                self.apart.append(name)

    def add(self, name: str, keys: KeyArray) -> bool:
        """Takes a set in, once; False if it is too large, or the pool full."""
        if name in self._known:
            return True
        if len(keys) > _SMALL or self._held > _POOLED:
            return False
        self._parts.append((keys, np.full(len(keys), len(self._names), dtype=np.int32)))
        self._known.add(name)
        self._names.append(name)
        self._held += len(keys)
        while len(self._parts) > 1 and len(self._parts[-2][0]) <= 2 * len(self._parts[-1][0]):
            last, before = self._parts.pop(), self._parts.pop()
            all_keys = np.concatenate([before[0], last[0]])
            order = np.argsort(all_keys, kind="stable")
            self._parts.append((all_keys[order], np.concatenate([before[1], last[1]])[order]))
        return True

    def columns(self, keys: KeyArray) -> dict[str, BoolArray]:
        """By set of the pool, which of `keys` [n] are in it, bool [n]; only sets that have one of them."""
        found: dict[str, BoolArray] = {}
        for held, of in self._parts:
            low = np.searchsorted(held, keys, "left")
            counts = np.searchsorted(held, keys, "right") - low
            if not counts.any():
                continue
            rows = np.repeat(np.arange(len(keys)), counts)
            # Where each hit lies: its key's first place plus how many hits of that key came before it.
            places = np.arange(len(rows)) + np.repeat(low - (np.cumsum(counts) - counts), counts)
            owners = of[places]
            order = np.argsort(owners, kind="stable")
            owners, rows = owners[order], rows[order]
            ends = np.flatnonzero(np.diff(owners)) + 1
            for part in np.split(np.arange(len(rows)), ends):
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
        self._version = 0  # of the pool, as it was asked
        self._groups: KeyGroups | None = None

    def groups(self, names: Collection[str], keys_of: Callable[[str], KeyArray], pool: Pool) -> KeyGroups:
        """The groups of this body's keys by the sets `names`; `keys_of` gives the keys of one.

        A few sets are looked up one by one; where there are more, or were, those that `pool` holds at once.
        """
        alone = names
        if len(names) > _FEW or pool.version:
            pool.learn(names, keys_of)
            alone = pool.apart
        new = [name for name in alone if name not in self._asked]
        if new or pool.version != self._version or self._groups is None:
            if pool.version != self._version:
                self._columns |= pool.columns(self.keys)
                self._version = pool.version
            for name in new:
                self._asked.add(name)
                column = contained(self.keys, keys_of(name))
                if column.any():
                    self._columns[name] = column
            self._groups = self._grouped()
        return self._groups

    def _grouped(self) -> KeyGroups:
        count = len(self.keys)
        telling = [name for name, column in self._columns.items() if not column.all()]
        if not telling:
            return KeyGroups(np.array([count]), {name: np.ones(1, dtype=np.bool_) for name in self._columns})
        packed = np.zeros((count, -(-len(telling) // 64) * 8), dtype=np.uint8)
        for start in range(0, len(telling), 8):
            byte = np.zeros(count, dtype=np.uint8)
            for place, name in enumerate(telling[start : start + 8]):
                byte |= self._columns[name].astype(np.uint8) << place
            packed[:, start // 8] = byte
        words = packed.view(np.uint64)
        patterns = words[:, 0] if words.shape[1] == 1 else packed.view(f"V{packed.shape[1]}")[:, 0]
        _, first, sizes = np.unique(patterns, return_index=True, return_counts=True)
        return KeyGroups(sizes, {name: column[first] for name, column in self._columns.items()})


def contained(keys: KeyArray, others: KeyArray) -> BoolArray:
    """Which of `keys` [n] are among `others`, bool [n]; both sorted."""
    if not len(others):
        return np.zeros(len(keys), dtype=np.bool_)
    places = np.searchsorted(others, keys)
    places[places == len(others)] = 0
    return np.asarray(others[places] == keys)
