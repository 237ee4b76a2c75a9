"""The sets of keys that one ledger keeps, and the accounts that follow from them.

A set is written once, in the transaction of its first release; its row of the log has the digest of its keys,
against which they are checked whenever they are read. Accounts are kept from one release to the next: only a
body of data that is new to the ledger changes which keys are where.
"""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Callable

import numpy as np

from fedtune.privacy.ledger.accounts import Account, account_of, account_without_keys
from fedtune.privacy.ledger.chain import Chain
from fedtune.privacy.ledger.identity import KeyArray, KeySet
from fedtune.privacy.ledger.overlap import Membership, Pool, array_of, bytes_of, digest_of
from fedtune.privacy.ledger.state import KnownSet, LedgerState

__all__ = ["KeySets"]

_KEPT = 256  # bodies of data whose accounts a process keeps
_NONE: KeyArray = np.empty(0, dtype=np.uint64)


class KeySets:
    """The sets in one ledger's file."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._pools = {"record": Pool(), "person": Pool()}
        self._members: dict[str, dict[str, Membership]] = {}
        self._accounts: dict[tuple[str, str, str], tuple[tuple[int, int], Account]] = {}

    def account(
        self, connection: sqlite3.Connection | None, state: LedgerState, dataset: str, data: KeySet | str
    ) -> Account:
        """The account of `data` (keys, the id of a kept set, or a name without keys), called `dataset`.

        Raises `LedgerError` if the keys of a set in the ledger were changed.
        """
        name = data.id if isinstance(data, KeySet) else data
        version = (len(state.releases), len(state.sets))
        # Equal keys may have other fingerprints of version 0.1, which saw every space.
        asked = (dataset, name, data.fingerprint if isinstance(data, KeySet) else "")
        kept = self._accounts.get(asked)
        if kept is None or kept[0] != version:
            account = self._account(connection, state, dataset, name, data)
            while len(self._accounts) >= _KEPT:
                self._accounts.pop(next(iter(self._accounts)))
            self._accounts[asked] = kept = (version, account)
        return dataclasses.replace(kept[1], state=state)

    def add(self, connection: sqlite3.Connection, keys: KeySet, state: LedgerState) -> dict[str, object]:
        """Keeps `keys`, within the caller's transaction; returns the body of the row that must name them."""
        records = bytes_of(keys.records)
        persons = None if keys.persons is None else bytes_of(keys.persons)
        self._chain.add_set(connection, keys.id, records, persons)
        old = {body.fingerprint for body in state.releases} - set(state.sets)
        return {
            "id": keys.id,
            "records": len(keys.records),
            "persons": None if keys.persons is None else len(keys.persons),
            "digest": digest_of(records, persons),
            "old": sorted(old & {keys.fingerprint}),
        }

    def problems(self, connection: sqlite3.Connection, state: LedgerState) -> list[str]:
        """What is wrong with the keys that are kept, by the rows that name them."""
        there = self._chain.set_names(connection)
        found = [
            f"the keys of set {name} are there, and no row names them"
            for name in sorted(there - set(state.sets))
        ]
        for name, known in sorted(state.sets.items()):
            if wrong := self._read(connection, name, known)[1]:
                found.append(wrong)
        return found

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
            while len(self._members) >= _KEPT:
                self._members.pop(next(iter(self._members)))
            members = {unit: Membership(keys) for unit, keys in mine.items()}
            self._members[name] = members
        others = [other for other in state.sets if other != name]
        classes = {
            unit: member.classes(others, self._reader(connection, state, unit), self._pools[unit])
            for unit, member in members.items()
        }
        return account_of(state, dataset, name, old, classes)

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
        kept, wrong = self._read(connection, name, known)
        if kept is None:
            raise self._chain.broken(wrong)
        return array_of(kept[0]), None if kept[1] is None else array_of(kept[1])

    def _read(
        self, connection: sqlite3.Connection, name: str, known: KnownSet
    ) -> tuple[tuple[bytes, bytes | None] | None, str]:
        """The keys of a set as they are kept, or what is wrong with them."""
        kept = self._chain.set_of(connection, name)
        if kept is None:
            return None, f"the keys of set {name} are missing"
        if digest_of(*kept) != known.digest:
            return None, f"the keys of set {name} were changed after they were written"
        return kept, ""
