"""Records and persons are known again after trivial edits, and by nobody without the node's secret."""

from __future__ import annotations

import hashlib
import os

import numpy as np
import pytest

from fedtune.privacy.ledger.identity import Identity, keyed, mark_of, normalised
from tests.support.ledgers import identity

SECRET, OTHER = b"a" * 32, b"b" * 32


@pytest.mark.parametrize(
    "edited",
    [
        "  The pain is back. ",
        "the PAIN is back.",
        "The\tpain\n is  back.",
        "Ｔｈｅ pain is back.",
        "The pain is\u00a0back.",
    ],
)
def test_a_text_that_was_trivially_edited_is_the_same_record(edited: str) -> None:
    assert normalised(edited) == "the pain is back."
    assert mark_of((edited, None)) == mark_of(("The pain is back.", None))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("a", "b"), ("ab", None)), (("a", "b"), ("b", "a")), (("a", ""), ("a", None)),
        (("The pain is back.", None), ("The pain is black.", None)), (("1:a", "b"), ("1", "1:a")),
    ],
)  # fmt: skip
def test_different_records_have_different_marks(
    one: tuple[str, str | None], other: tuple[str, str | None]
) -> None:
    assert mark_of(one) != mark_of(other)


def test_keys_follow_from_content_alone() -> None:
    first = keyed(identity(range(50), ["p1", "p2"]), SECRET)
    shuffled = keyed(identity([*reversed(range(50)), 3, 3], ["P2 ", "p1", "p1"], "another"), SECRET)
    assert first.id == shuffled.id and len(first.id) == 32
    assert np.array_equal(first.records, shuffled.records) and np.array_equal(first.persons, shuffled.persons)
    assert len(first.records) == 50 and first.persons is not None and len(first.persons) == 2
    changed = keyed(identity([*range(49), "other"], ["p1", "p2"]), SECRET)
    assert changed.id != first.id and len(np.intersect1d(changed.records, first.records)) == 49
    unnamed = keyed(identity(range(50)), SECRET)
    assert unnamed.persons is None and unnamed.id != first.id


def test_pitfall_31_nobody_without_the_secret_can_test_a_guess() -> None:
    """Whoever guesses a text can hash it; what a ledger keeps agrees with no hash of it."""
    held = identity(["guess"], ["guess"])
    mine, theirs = keyed(held, SECRET), keyed(identity(["guess"], ["guess"]), OTHER)
    assert mine.id != theirs.id
    assert not np.intersect1d(mine.records, theirs.records).size
    unkeyed = {hashlib.sha256(mark).digest()[:8] for mark in (held.records[0].tobytes(), b"guess")}
    unkeyed.add(held.records[0].tobytes()[:8])
    assert int(mine.records[0]).to_bytes(8, "little") not in unkeyed


def test_a_person_is_no_record() -> None:
    """Separate domains: the same bytes have another key as a record than as a person."""
    same = b"p" * 32
    both = keyed(Identity(np.frombuffer(same, dtype=np.uint8).reshape(1, 32), [same.decode()], "x"), SECRET)
    assert both.persons is not None and both.records[0] != both.persons[0]


def test_keys_are_made_once_for_one_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    held = identity(range(10))
    assert keyed(held, SECRET) is keyed(held, SECRET)
    assert keyed(held, os.urandom(32)).id != keyed(held, SECRET).id
