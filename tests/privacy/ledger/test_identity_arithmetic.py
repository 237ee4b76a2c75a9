"""Keys and marks as they are kept: another form would not know what was released before."""

from __future__ import annotations

import hashlib
import hmac
import stat
from pathlib import Path

import numpy as np
import pytest

from fedtune.errors import LedgerError
from fedtune.privacy.ledger.identity import Identity, keyed, mark_of
from fedtune.privacy.ledger.secret import check_of, check_secret, make_secret, read_secret

SECRET = bytes(range(32))


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


def test_a_secret_is_made_in_a_folder_of_the_owners(tmp_path: Path) -> None:
    path = tmp_path / "new" / "ledger.key"
    secret = make_secret(path)
    assert read_secret(path) == secret and len(secret) == 32
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    other = make_secret(path.with_name("other.key"))
    assert other != secret
    with pytest.raises(LedgerError, match="cannot be written"):
        make_secret(path)
    assert read_secret(path) == secret
    deep = tmp_path / "one" / "two" / "ledger.key"
    assert make_secret(deep) == read_secret(deep)


def test_a_secret_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    path = tmp_path / "ledger.key"
    path.mkdir()
    with pytest.raises(LedgerError, match="cannot be read"):
        read_secret(path)
    path.rmdir()
    for content, why in ((b"abc", "has 3 bytes instead of 32"), (bytes(32), "holds nothing but zeros")):
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(LedgerError, match=why):
            read_secret(path)
