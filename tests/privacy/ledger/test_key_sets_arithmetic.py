"""Sets of keys that are kept, and how long their accounts are, with a chain that is written down by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedtune.errors import LedgerError
from fedtune.privacy.ledger import key_sets
from fedtune.privacy.ledger.identity import KeySet
from fedtune.privacy.ledger.key_sets import KeySets
from fedtune.privacy.ledger.overlap import bytes_of, digest_of
from fedtune.privacy.ledger.state import Body, KnownSet, LedgerState


class Books:
    """In place of the chain: sets by name."""

    def __init__(self) -> None:
        self.sets: dict[str, tuple[bytes, bytes | None]] = {}

    def add_set(self, connection: Any, name: str, records: bytes, persons: bytes | None) -> None:
        self.sets[name] = (records, persons)

    def set_of(self, connection: Any, name: str) -> tuple[bytes, bytes | None] | None:
        return self.sets.get(name)

    def set_names(self, connection: Any) -> set[str]:
        return set(self.sets)

    def broken(self, what: str) -> LedgerError:
        return LedgerError(what)


def keys(name: str, records: list[int], persons: list[int] | None = None, fingerprint: str = "") -> KeySet:
    there = None if persons is None else np.array(persons, dtype=np.uint64)
    return KeySet(name, np.array(records, dtype=np.uint64), there, fingerprint)


def with_sets(books: Books, *held: KeySet) -> LedgerState:
    """A state in which each set was released once, under its own name."""
    state = LedgerState()
    for one in held:
        said = KeySets(books).add(None, one, state)  # type: ignore[arg-type]
        state.sets[one.id] = KnownSet(len(one.records), None, str(said["digest"]), ())
        state.releases[Body(f"data {one.id}", one.id)] = 1
    return state


@pytest.fixture
def books() -> Books:
    return Books()


@pytest.fixture
def sets(books: Books) -> KeySets:
    return KeySets(books)  # type: ignore[arg-type]


ANY: Any = object()  # a connection


def test_a_set_is_kept_as_its_row_says(books: Books, sets: KeySets) -> None:
    state = LedgerState(
        releases={Body("a", "print"): 1, Body("b", "s"): 1, Body("c", "another"): 1},
        sets={"s": KnownSet(1, None, "", ())},
    )
    one = keys("x", [1, 2, 3], [7, 8], "print")
    records, persons = bytes_of(one.records), bytes_of(np.array([7, 8], dtype=np.uint64))
    assert sets.add(ANY, one, state) == {
        "id": "x", "records": 3, "persons": 2, "digest": digest_of(records, persons), "old": ["print"],
    }  # fmt: skip
    assert books.sets == {"x": (records, persons)}
    said = sets.add(ANY, keys("y", [1], None, "s"), state)
    assert (said["persons"], said["old"]) == (None, [])  # `s` is a set here, and no old fingerprint
    assert books.sets["y"] == (bytes_of(np.array([1], dtype=np.uint64)), None)


def test_classes_follow_from_the_sets_of_either_kind(books: Books, sets: KeySets) -> None:
    one, other = keys("one", [1, 2, 3], [7, 8]), keys("other", [3, 4], [8, 9])
    unnamed = keys("unnamed", [1])
    state = with_sets(books, one, other, unnamed)
    account = sets.account(ANY, state, "visits", one)
    records, persons = account.domains
    assert (records.unit, sorted(records.sizes.tolist())) == ("record", [1, 1, 1])
    assert (persons.unit, sorted(persons.sizes.tolist())) == ("person", [1, 1])
    assert persons.columns[Body("data other", "other")].sum() == 1
    assert Body("data unnamed", "unnamed") not in persons.columns and not key_sets._NONE.size
    assert account.names == {"visits", "data one", "data other", "data unnamed"}
    # By the id of the set alone, from the keys that are kept: the same.
    again = KeySets(books).account(ANY, state, "visits", "one")  # type: ignore[arg-type]
    assert [domain.sizes.tolist() for domain in again.domains] == [
        records.sizes.tolist(),
        persons.sizes.tolist(),
    ]
    assert [one.unit for one in sets.account(ANY, state, "visits", unnamed).domains] == ["record"]


def test_an_account_is_kept_until_the_ledger_has_something_new(
    books: Books, sets: KeySets, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    real = sets._account

    def counting(connection: Any, state: Any, dataset: str, name: str, data: Any) -> Any:
        made.append(dataset)
        return real(connection, state, dataset, name, data)

    monkeypatch.setattr(sets, "_account", counting)
    monkeypatch.setattr(key_sets, "_KEPT", 2)
    state = with_sets(books, keys("one", [1, 2]))
    for _ in range(3):
        sets.account(ANY, state, "a", "x")
        account = sets.account(ANY, later := state.copy(), "b", "x")
        assert account.state is later
    assert made == ["a", "b"]
    sets.account(ANY, state, "c", "x")
    assert [asked[0] for asked in sets._accounts] == ["b", "c"]  # the oldest went
    sets.account(ANY, state, "b", "x")
    assert made == ["a", "b", "c"]
    more = state.copy()
    more.releases[Body("new", "x")] = 1
    assert "new" in sets.account(ANY, more, "b", "x").names
    more = more.copy()
    more.sets["s2"] = KnownSet(0, None, digest_of(b"", None), ())
    sets.account(ANY, more, "b", "x")
    assert made == ["a", "b", "c", "b", "b"]
    # Equal keys under another old fingerprint are another question.
    for print_ in ("f1", "f2", "f1"):
        sets.account(ANY, state, "a", keys("one", [1, 2], None, print_))
    assert made[5:] == ["a", "a"]


def test_members_of_so_many_sets_are_kept(
    books: Books, sets: KeySets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_sets, "_KEPT", 2)
    state = LedgerState()
    for name in ("one", "two", "one", "three"):
        sets.account(ANY, state, name + str(len(sets._accounts)), keys(name, [1, 2]))
    assert list(sets._members) == ["two", "three"]


def test_old_data_is_known_by_its_fingerprint(books: Books, sets: KeySets) -> None:
    state = with_sets(books, keys("one", [1, 2]))
    state.releases[Body("letters", "print")] = 1
    assert "letters" in sets.account(ANY, state, "a", keys("one", [1, 2], None, "print")).names
    assert "letters" not in sets.account(ANY, state, "a", keys("one", [1, 2], None, "else")).names
    state.sets["one"] = state.sets["one"]._replace(old=("print",))
    assert "letters" in KeySets(books).account(ANY, state, "a", "one").names  # type: ignore[arg-type]


def test_what_is_wrong_with_kept_keys_is_named(books: Books, sets: KeySets) -> None:
    state = with_sets(books, keys("two", [2]), keys("one", [1]), keys("three", [3]), keys("four", [4]))
    assert sets.problems(ANY, state) == []
    del books.sets["two"], state.sets["three"]
    books.sets |= {f"stray {i}": (b"", None) for i in range(9)}
    books.sets["one"] = (b"12345678", None)
    assert sets.problems(ANY, state) == [
        *(f"the keys of set stray {i} are there, and no row names them" for i in range(9)),
        "the keys of set three are there, and no row names them",
        "the keys of set one were changed after they were written",
        "the keys of set two are missing",
    ]
    for name, why in (("one", "changed"), ("two", "missing")):
        with pytest.raises(LedgerError, match=f"set {name} .*{why}"):
            sets.account(ANY, state, "visits", name)
    with pytest.raises(LedgerError, match="set two are missing"):
        sets.account(ANY, state, "visits", keys("five", [4]))
