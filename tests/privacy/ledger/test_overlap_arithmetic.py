"""The pool, the classes and what is asked once, by hand."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from fedtune.privacy.ledger import overlap
from fedtune.privacy.ledger.identity import KeyArray
from fedtune.privacy.ledger.overlap import Membership, Pool, contained, digest_of


def keys(*numbers: int) -> KeyArray:
    return np.array(numbers, dtype=np.uint64)


def test_a_digest_is_over_the_length_and_both_kinds_of_keys() -> None:
    def of(content: bytes) -> str:
        return hashlib.sha256(content).hexdigest()

    assert digest_of(b"abc", None) == of(b"fedtune keys 1|3|abc-")
    assert digest_of(b"abc", b"de") == of(b"fedtune keys 1|3|abc+de")


def test_a_pool_takes_a_set_in_once_and_no_more_than_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "_POOLED", 5)
    pool = Pool()
    assert pool.add("a", keys(1, 2, 3)) is True and pool.add("a", keys(1, 2, 3)) is True
    assert len(pool._waiting) == 1
    assert pool.add("b", keys(3, 4)) is True  # five then, which is no more than it holds
    assert pool.add("c", keys(7)) is True
    assert pool.add("d", keys(8)) is False
    found = pool.columns(keys(0, 2, 3, 4))
    assert {name: column.tolist() for name, column in found.items()} == {
        "a": [False, True, True, False], "b": [False, False, True, True],
    }  # fmt: skip
    assert pool._waiting == [] and len(pool._keys) == len(pool._owners) == 6
    assert pool.add("d", keys(8)) is False  # six lie there now, and none waits
    assert pool.columns(keys(9)) == {} and pool.columns(keys()) == {}


def test_a_full_pool_counts_what_lies_there_and_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "_POOLED", 5)
    pool = Pool()
    assert pool.add("a", keys(1, 2, 3)) is True
    pool.columns(keys(1))
    assert pool.add("b", keys(3, 4, 5)) is True
    assert pool.add("c", keys(7)) is False


def test_each_set_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for few in (0, 2, 64):
        monkeypatch.setattr(overlap, "_FEW", few)
        asked: list[str] = []
        sets = {"a": keys(1), "b": keys(1, 2), "c": keys(9)}

        def keys_of(name: str, asked: list[str] = asked, sets: dict[str, KeyArray] = sets) -> KeyArray:
            asked.append(name)
            return sets[name]

        member, pool = Membership(keys(1, 2, 3)), Pool()
        first = member.classes(["a", "b"], keys_of, pool)
        assert member.classes(["a", "b"], keys_of, pool) is first
        second = member.classes(["a", "b", "c"], keys_of, pool)
        assert sorted(asked) == ["a", "b", "c"] and set(second.columns) == {"a", "b"}
        assert len(pool._known) == {0: 3, 2: 0, 64: 0}[few]  # few are looked up one by one


def test_what_the_pool_does_not_hold_is_looked_up_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "_FEW", 0)
    monkeypatch.setattr(overlap, "_SMALL", 2)
    sets = {"small": keys(1), "large": keys(1, 2, 5)}
    member, pool = Membership(keys(1, 2, 3)), Pool()
    asked = member._from_pool(["small", "large"], sets.__getitem__, pool)
    assert set(asked) == {"small"} and asked["small"] is not None
    classes = member.classes(["small", "large"], sets.__getitem__, pool)
    assert {name: column.tolist() for name, column in classes.columns.items()} == {
        "small": [False, False, True], "large": [False, True, True],
    }  # fmt: skip
    assert classes.sizes.tolist() == [1, 1, 1]


@pytest.mark.parametrize("count", [1, 8, 9, 63, 64, 65])
def test_keys_are_told_apart_by_every_set(count: int) -> None:
    """One set for each key: so many classes, and a last one of the keys in none."""
    sets = {f"s{i}": keys(i) for i in range(count)}
    body = keys(*range(count + 2))
    classes = Membership(body).classes(list(sets), sets.__getitem__, Pool())
    assert sorted(classes.sizes.tolist()) == [1] * count + [2]
    for column in classes.columns.values():
        assert column.sum() == 1 and classes.sizes[column].sum() == 1


def test_keys_that_no_set_tells_apart_are_one_class() -> None:
    sets = {"all": keys(1, 2, 3), "none": keys(8)}
    classes = Membership(keys(1, 2)).classes(list(sets), sets.__getitem__, Pool())
    assert isinstance(classes.sizes, np.ndarray) and classes.sizes.tolist() == [2]
    assert {name: column.tolist() for name, column in classes.columns.items()} == {"all": [True]}


def test_which_keys_are_contained() -> None:
    assert contained(keys(1, 5, 9), keys(1, 2, 9)).tolist() == [True, False, True]
    assert contained(keys(7, 8), keys(3)).tolist() == [False, False]  # beyond the last
    assert contained(keys(1), keys()).tolist() == [False]
