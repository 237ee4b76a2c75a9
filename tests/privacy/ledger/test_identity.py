"""Keys of records and persons: what is known again, what nobody else can test, and the secret behind it."""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedtune.errors import LedgerError
from fedtune.privacy.ledger.budget import PrivacyBudget
from fedtune.privacy.ledger.identity import (
    Identity,
    check_of,
    check_secret,
    keyed,
    make_secret,
    mark_of,
    marks_of,
    normalised,
    read_secret,
)
from fedtune.privacy.ledger.ledger import PrivacyLedger
from tests.support.golden import Golden
from tests.support.ledgers import identity
from tests.support.plans import local_plan

SECRET, OTHER = bytes(range(32)), b"b" * 32


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


def test_33_a_second_text_is_no_fresh_budget() -> None:
    """The same visits, with another column named as the second text, or as the first."""
    texts, others = [f"visit {i}" for i in range(20)], [f"plan {i // 2}" for i in range(20)]

    def keys(first: list[str], second: list[str] | None) -> set[int]:
        marks = marks_of(first, second)
        assert marks.shape == (20, 1 if second is None else 3, 32)
        return set(keyed(Identity(marks.reshape(-1, 32), None, "f"), SECRET).records.tolist())

    single, pairs, swapped = keys(texts, None), keys(texts, others), keys(others, texts)
    assert single < pairs and len(single & swapped) == 20 and len(pairs & swapped) == 30
    assert len(keys(others, None) & pairs) == 10
    assert keys(texts, ["HOW was it?"] * 20) >= single
    # A question that is put to all tells of none: other patients' answers are other data.
    question, new = ["how was it?"] * 20, [f"answer {i}" for i in range(20)]
    assert not keys(texts, question) & keys(new, question)
    assert mark_of(("visit 0", "plan 0")) in marks_of(texts, others).tobytes()  # as ledgers of before knew it


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


def hashed(*parts: bytes) -> bytes:
    return hashlib.sha256(b"fedtune record 1" + b"".join(parts)).digest()


def key_of(message: bytes) -> int:
    return int.from_bytes(hmac.new(SECRET, message, "sha256").digest()[:8], "little")


def test_a_mark_is_of_every_part_with_its_length() -> None:
    assert mark_of(("  Ab C", None)) == hashed(b"4:ab c", b"-")
    assert mark_of(("a", "bc")) == hashed(b"1:a", b"2:bc")
    assert mark_of((None, "a")) == hashed(b"-", b"1:a")
    assert mark_of((chr(0xD800),)) == hashed(b"3:\xed\xa0\x80")  # half a character, as some exports have it


def test_keys_are_hmacs_under_the_secret() -> None:
    marks = [mark_of((text, None)) for text in ("one", "two")]
    held = Identity(np.frombuffer(b"".join(marks), dtype=np.uint8).reshape(2, 32), ["Eve", chr(0xD800)], "x")
    keys = keyed(held, SECRET)
    records = sorted(key_of(b"fedtune record|" + mark) for mark in marks)
    persons = sorted(key_of(b"fedtune person|" + name) for name in (b"eve", b"\xed\xa0\x80"))
    assert keys.records.tolist() == records
    assert keys.persons is not None and keys.persons.tolist() == persons

    def id_of(*parts: bytes) -> str:
        return hmac.new(SECRET, b"fedtune set|" + b"".join(parts), "sha256").hexdigest()[:32]

    kept = [b"".join(key.to_bytes(8, "little") for key in part) for part in (records, persons)]
    assert keys.id == id_of(b"2:", kept[0], b"2:", kept[1])
    assert keyed(Identity(held.records, None, "x"), SECRET).id == id_of(b"2:", kept[0], b"-")


def test_only_the_keys_of_the_last_secret_are_kept() -> None:
    held = Identity(np.zeros((1, 32), dtype=np.uint8), None, "x")
    first = keyed(held, SECRET)
    keyed(held, b"o" * 32)
    assert len(held._keyed) == 1
    assert keyed(held, SECRET) is not first and keyed(held, SECRET).id == first.id


def test_the_check_of_a_secret_is_an_hmac_under_it() -> None:
    assert check_of(SECRET) == hmac.new(SECRET, b"fedtune ledger|", "sha256").hexdigest()[:32]
    assert check_secret(Path("x.key"), SECRET, check_of(SECRET)) == SECRET


def test_a_secret_is_made_in_a_folder_of_the_owners(tmp_path: Path, golden: Golden) -> None:
    path = tmp_path / "new" / "ledger.key"
    secret = make_secret(path)
    assert read_secret(path) == secret and len(secret) == 32
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    other = make_secret(path.with_name("other.key"))
    assert other != secret
    with pytest.raises(LedgerError) as raised:
        make_secret(path)
    golden(raised)
    assert read_secret(path) == secret
    deep = tmp_path / "one" / "two" / "ledger.key"
    assert make_secret(deep) == read_secret(deep)


def test_a_secret_that_cannot_be_used_says_why(tmp_path: Path, golden: Golden) -> None:
    path = tmp_path / "ledger.key"
    path.mkdir()
    with pytest.raises(LedgerError) as raised:
        read_secret(path)
    golden(raised)
    path.rmdir()
    for content, why in ((b"abc", "has 3 bytes instead of 32"), (bytes(32), "holds nothing but zeros")):
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(LedgerError, match=why):
            read_secret(path)


DATA = identity(range(20), ["p1", "p2"])


def reserve(path: Path, run: str = "run", round: int = 0) -> None:
    PrivacyLedger(path).reserve(
        dataset="visits", fingerprint=DATA, node="clinic", run=run, round=round, plan=local_plan()
    )


@pytest.fixture
def used(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.sqlite"
    reserve(path)
    return path


def test_it_is_made_with_the_first_release_for_the_owner_alone(used: Path) -> None:
    key = used.with_suffix(".key")
    assert len(key.read_bytes()) == 32 and stat.S_IMODE(key.stat().st_mode) == 0o600
    before = key.read_bytes()
    reserve(used, round=1)
    assert key.read_bytes() == before
    assert sorted(path.name for path in used.parent.glob("ledger.*") if "-" not in path.name) == [
        "ledger.key", "ledger.sqlite"
    ]  # fmt: skip


def test_asking_makes_none(tmp_path: Path) -> None:
    ledger = PrivacyLedger(tmp_path / "ledger.sqlite")
    assert ledger.epsilon(dataset="visits", fingerprint=DATA) == 0.0
    ledger.check_run(dataset="visits", fingerprint=DATA, node="n", run="r", plans=[local_plan()])
    assert not list(tmp_path.glob("*.key"))
    ledger.set_budget(PrivacyBudget(8.0, 1e-5))  # this is no question
    assert list(tmp_path.glob("*.key")) == [ledger.secret_path]


@pytest.mark.parametrize("content", [None, b"", b"short", bytes(32), b"x" * 33, bytes(range(32))])
def test_a_lost_torn_or_other_secret_is_refused_with_the_way_out(
    used: Path, content: bytes | None, golden: Golden
) -> None:
    """Under another one every record would look new, and what was spent would be forgotten."""
    key = used.with_suffix(".key")
    whole = key.read_bytes()
    key.unlink()
    if content is not None:
        key.write_bytes(content)
        key.chmod(0o600)
    for act in (
        lambda: PrivacyLedger.open(used),
        lambda: reserve(used, "run-2"),
        lambda: PrivacyLedger(used).epsilon(dataset="visits", fingerprint=DATA),
    ):
        with pytest.raises(LedgerError) as raised:
            act()
        assert "ledger.key" in str(raised.value)
        golden(raised)
    assert (key.read_bytes() if key.exists() else None) == content  # never replaced
    assert len(PrivacyLedger(used).releases()) == 1  # what was spent can still be shown
    key.write_bytes(whole)
    key.chmod(0o600)
    reserve(used, "run-2")


@pytest.mark.parametrize("content", [b"", b"short", bytes(32)])
def test_a_torn_secret_is_not_begun_with(tmp_path: Path, content: bytes) -> None:
    key = tmp_path / "ledger.key"
    key.write_bytes(content)
    key.chmod(0o600)
    with pytest.raises(LedgerError, match="torn"):
        reserve(tmp_path / "ledger.sqlite")
    assert key.read_bytes() == content and PrivacyLedger(tmp_path / "ledger.sqlite").releases() == []


def test_a_secret_that_others_may_read_is_refused(used: Path) -> None:
    key = used.with_suffix(".key")
    for mode in (0o644, 0o640, 0o602):
        key.chmod(mode)
        with pytest.raises(LedgerError, match=f"chmod 600 {key}"):
            reserve(used, "run-2")


_FULL = """
import resource, signal, sys
from pathlib import Path
from fedtune.errors import LedgerError
from fedtune.privacy.ledger.identity import make_secret
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    make_secret(Path(sys.argv[1]))
except LedgerError as error:
    print("cannot be written" in str(error))
"""


@pytest.mark.parametrize("limit", [0, 31])
def test_pitfall_41_a_full_disk_leaves_no_torn_secret(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "ledger.key"
    done = subprocess.run(
        [sys.executable, "-c", _FULL, str(path), str(limit)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True"]
    assert list(tmp_path.iterdir()) == []


def test_what_is_kept_of_it_says_nothing(used: Path) -> None:
    key = used.with_suffix(".key").read_bytes()
    books = used.read_bytes()
    assert key not in books and key.hex().encode() not in books
    assert check_of(key).encode() in books
