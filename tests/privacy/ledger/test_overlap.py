"""Which keys are in which sets: against the same asked one key at a time."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from fedtune.privacy.ledger import overlap
from fedtune.privacy.ledger.identity import KeyArray
from fedtune.privacy.ledger.overlap import Membership, Pool, array_of, bytes_of, digest_of


def some(chance: np.random.Generator, size: int, below: int = 80) -> KeyArray:
    return np.unique(chance.integers(0, below, size).astype(np.uint64) + np.uint64(2**63))


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("count", [1, 7, 70, 130])
def test_classes_are_those_of_one_key_at_a_time(
    monkeypatch: pytest.MonkeyPatch, pooled: bool, count: int
) -> None:
    monkeypatch.setattr(overlap, "_FEW", 0 if pooled else 1000)
    chance = np.random.default_rng(count)
    sets = {f"set-{i}": some(chance, 30) for i in range(count)}
    sets["empty"], sets["far"] = some(chance, 0), np.array([1, 2], dtype=np.uint64)
    body = some(chance, 40)
    member, pool = Membership(body), Pool()
    names = list(sets)
    member.classes(names[: len(names) // 2], sets.__getitem__, pool)  # what came first
    classes = member.classes(names, sets.__getitem__, pool)
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
    monkeypatch.setattr(overlap, "_SMALL", 10)
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
