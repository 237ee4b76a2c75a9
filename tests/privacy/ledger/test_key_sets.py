"""Sets of keys: which two share, against one key at a time; and how long their accounts last."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import numpy as np
import pytest

from fedtune.errors import LedgerError
from fedtune.privacy.ledger import key_sets
from fedtune.privacy.ledger.identity import KeyArray, KeySet
from fedtune.privacy.ledger.key_sets import (
    KeySets,
    Membership,
    Pool,
    array_of,
    bytes_of,
    contained,
    digest_of,
)
from fedtune.privacy.ledger.state import KnownSet, LedgerState, NamedData
from tests.support.golden import Golden


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
        state.releases[NamedData(f"data {one.id}", one.id)] = 1
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
        releases={NamedData("a", "print"): 1, NamedData("b", "s"): 1, NamedData("c", "another"): 1},
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
    records, persons = account.keys
    assert (records.unit, sorted(records.sizes.tolist())) == ("record", [1, 1, 1])
    assert (persons.unit, sorted(persons.sizes.tolist())) == ("person", [1, 1])
    assert persons.columns[NamedData("data other", "other")].sum() == 1
    assert NamedData("data unnamed", "unnamed") not in persons.columns and not key_sets._NONE.size
    assert account.names == {"visits", "data one", "data other", "data unnamed"}
    # By the id of the set alone, from the keys that are kept: the same.
    again = KeySets(books).account(ANY, state, "visits", "one")  # type: ignore[arg-type]
    assert [domain.sizes.tolist() for domain in again.keys] == [
        records.sizes.tolist(),
        persons.sizes.tolist(),
    ]
    assert [one.unit for one in sets.account(ANY, state, "visits", unnamed).keys] == ["record"]


def test_an_account_is_kept_until_the_ledger_has_something_new(
    books: Books, sets: KeySets, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    real = sets._account

    def counting(connection: Any, state: Any, dataset: str, name: str, data: Any) -> Any:
        made.append(dataset)
        return real(connection, state, dataset, name, data)

    monkeypatch.setattr(sets, "_account", counting)
    monkeypatch.setattr(key_sets, "_CACHED", 2)
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
    more.releases[NamedData("new", "x")] = 1
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
    monkeypatch.setattr(key_sets, "_CACHED", 2)
    state = LedgerState()
    for name in ("one", "two", "one", "three"):
        sets.account(ANY, state, name + str(len(sets._accounts)), keys(name, [1, 2]))
    assert list(sets._members) == ["two", "three"]


def test_old_data_is_known_by_its_fingerprint(books: Books, sets: KeySets) -> None:
    state = with_sets(books, keys("one", [1, 2]))
    state.releases[NamedData("letters", "print")] = 1
    assert "letters" in sets.account(ANY, state, "a", keys("one", [1, 2], None, "print")).names
    assert "letters" not in sets.account(ANY, state, "a", keys("one", [1, 2], None, "else")).names
    state.sets["one"] = state.sets["one"]._replace(old=("print",))
    assert "letters" in KeySets(books).account(ANY, state, "a", "one").names  # type: ignore[arg-type]


def test_what_is_wrong_with_kept_keys_is_named(books: Books, sets: KeySets, golden: Golden) -> None:
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
    with pytest.raises(LedgerError) as raised:
        sets.account(ANY, state, "visits", keys("five", [4]))
    golden(raised)


def some(chance: np.random.Generator, size: int, below: int = 80) -> KeyArray:
    return np.unique(chance.integers(0, below, size).astype(np.uint64) + np.uint64(2**63))


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("count", [1, 7, 70, 130])
def test_classes_are_those_of_one_key_at_a_time(
    monkeypatch: pytest.MonkeyPatch, pooled: bool, count: int
) -> None:
    monkeypatch.setattr(key_sets, "_FEW", 0 if pooled else 1000)
    chance = np.random.default_rng(count)
    sets = {f"set-{i}": some(chance, 30) for i in range(count)}
    sets["empty"], sets["far"] = some(chance, 0), np.array([1, 2], dtype=np.uint64)
    body = some(chance, 40)
    member, pool = Membership(body), Pool()
    names = list(sets)
    member.groups(names[: len(names) // 2], sets.__getitem__, pool)  # what came first
    classes = member.groups(names, sets.__getitem__, pool)
    expected = Counter(
        frozenset(name for name, keys in sets.items() if int(key) in set(keys.tolist())) for key in body
    )
    found = Counter(
        {
            frozenset(name for name, column in classes.columns.items() if column[i]): int(size)
            for i, size in enumerate(classes.sizes)
        }
    )
    assert found == expected
    assert "empty" not in classes.columns and "far" not in classes.columns


def test_large_sets_stay_out_of_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_sets, "_SMALL", 10)
    pool = Pool()
    assert not pool.add("large", np.arange(11, dtype=np.uint64))
    assert pool.add("small", np.arange(10, dtype=np.uint64)) and pool.add(
        "small", np.arange(10, dtype=np.uint64)
    )
    assert list(pool.columns(np.arange(5, dtype=np.uint64))) == ["small"]


def test_keys_survive_being_kept() -> None:
    keys = some(np.random.default_rng(0), 50)
    assert np.array_equal(array_of(bytes_of(keys)), keys)
    kept = bytes_of(keys)
    digests = {digest_of(kept, None), digest_of(kept, b""), digest_of(kept, kept), digest_of(kept[8:], None),
               digest_of(b"", kept), digest_of(kept[:8], kept[8:])}  # fmt: skip
    assert len(digests) == 6


def key_array(*numbers: int) -> KeyArray:
    return np.array(numbers, dtype=np.uint64)


def test_a_digest_is_over_the_length_and_both_kinds_of_keys() -> None:
    def of(content: bytes) -> str:
        return hashlib.sha256(content).hexdigest()

    assert digest_of(b"abc", None) == of(b"fedtune keys 1|3|abc-")
    assert digest_of(b"abc", b"de") == of(b"fedtune keys 1|3|abc+de")


def test_a_pool_takes_a_set_in_once_and_no_more_than_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_sets, "_POOLED", 5)
    pool = Pool()
    assert pool.add("a", key_array(1, 2, 3)) is True and pool.add("a", key_array(1, 2, 3)) is True
    assert pool.add("b", key_array(3, 4)) is True  # five then, which is no more than it holds
    assert pool.add("c", key_array(7)) is True
    assert pool.add("d", key_array(8)) is False
    found = pool.columns(key_array(0, 2, 3, 4))
    assert {name: column.tolist() for name, column in found.items()} == {
        "a": [False, True, True, False], "b": [False, False, True, True],
    }  # fmt: skip
    assert sum(len(keys) for keys, _ in pool._parts) == sum(len(of) for _, of in pool._parts) == 6
    assert pool.add("d", key_array(8)) is False
    assert pool.columns(key_array(9)) == {} and pool.columns(key_array()) == {}


def test_a_full_pool_counts_what_lies_there_and_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_sets, "_POOLED", 5)
    pool = Pool()
    assert pool.add("a", key_array(1, 2, 3)) is True
    pool.columns(key_array(1))
    assert pool.add("b", key_array(3, 4, 5)) is True
    assert pool.add("c", key_array(7)) is False


def test_each_set_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for few in (0, 2, 64):
        monkeypatch.setattr(key_sets, "_FEW", few)
        asked: list[str] = []
        sets = {"a": key_array(1), "b": key_array(1, 2), "c": key_array(9)}

        def keys_of(name: str, asked: list[str] = asked, sets: dict[str, KeyArray] = sets) -> KeyArray:
            asked.append(name)
            return sets[name]

        member, pool = Membership(key_array(1, 2, 3)), Pool()
        first = member.groups(["a", "b"], keys_of, pool)
        assert member.groups(["a", "b"], keys_of, pool) is first
        second = member.groups(["a", "b", "c"], keys_of, pool)
        assert member.groups(["a", "b", "c"], keys_of, pool) is second
        assert set(second.columns) == {"a", "b"}
        # Few are looked up one by one; if they become more, the pool reads them, once.
        assert sorted(asked) == sorted(["a", "b", *({"c"} if few != 2 else {}), *("abc" if few == 2 else "")])
        assert len(pool._known) == {0: 3, 2: 3, 64: 0}[few]


def test_what_the_pool_does_not_hold_is_looked_up_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_sets, "_FEW", 0)
    monkeypatch.setattr(key_sets, "_SMALL", 2)
    sets = {"small": key_array(1), "large": key_array(1, 2, 5)}
    member, pool = Membership(key_array(1, 2, 3)), Pool()
    pool.learn(["small", "large"], sets.__getitem__)
    assert pool.apart == ["large"] and list(pool.columns(member.keys)) == ["small"]
    classes = member.groups(["small", "large"], sets.__getitem__, pool)
    assert {name: column.tolist() for name, column in classes.columns.items()} == {
        "small": [False, False, True], "large": [False, True, True],
    }  # fmt: skip
    assert classes.sizes.tolist() == [1, 1, 1]


@pytest.mark.parametrize("count", [1, 8, 9, 63, 64, 65])
def test_keys_are_told_apart_by_every_set(count: int) -> None:
    """One set for each key: so many classes, and a last one of the keys in none."""
    sets = {f"s{i}": key_array(i) for i in range(count)}
    body = key_array(*range(count + 2))
    classes = Membership(body).groups(list(sets), sets.__getitem__, Pool())
    assert sorted(classes.sizes.tolist()) == [1] * count + [2]
    for column in classes.columns.values():
        assert column.sum() == 1 and classes.sizes[column].sum() == 1


def test_keys_that_no_set_tells_apart_are_one_class() -> None:
    sets = {"all": key_array(1, 2, 3), "none": key_array(8)}
    classes = Membership(key_array(1, 2)).groups(list(sets), sets.__getitem__, Pool())
    assert isinstance(classes.sizes, np.ndarray) and classes.sizes.tolist() == [2]
    assert {name: column.tolist() for name, column in classes.columns.items()} == {"all": [True]}


def test_which_keys_are_contained() -> None:
    assert contained(key_array(1, 5, 9), key_array(1, 2, 9)).tolist() == [True, False, True]
    assert contained(key_array(7, 8), key_array(3)).tolist() == [False, False]  # beyond the last
    assert contained(key_array(1), key_array()).tolist() == [False]
