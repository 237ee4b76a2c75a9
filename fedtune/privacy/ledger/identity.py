"""How a ledger knows records and persons again: keyed hashes that only its own node can make.

A data set's name, its file and its columns change from export to export; what was spent belongs to the
records and persons in it. So each record is known by its text, each person by their value in the unit column.
Of a pair of texts both are known, together and each by itself, so that naming a second column is no fresh
budget (a text that most records share, as a question put to all, tells of none of them). All are normalised
first (`normalised`), so that a new export with other capitals, spaces or look-alike characters is known
again.

Whoever guesses a text can test an unkeyed hash of it, so a ledger stores a keyed one: HMAC-SHA256 with a
secret of the node's, records and persons in separate domains. It is cut to 8 bytes: of ten million keys two
collide with a probability of 3e-6, and then each of the two is charged for both, which is the safe side.

The secret is 32 bytes from the operating system, in a file beside the ledger (`ledger.sqlite` has
`ledger.key`) that only its owner may read. It is written whole or not at all, and a file that is short,
empty, all zero (what a power cut may leave) or readable by others is refused, never replaced: under another
secret every record would look new, and what was spent would be forgotten. For the same reason the ledger
stores a value that only this secret gives (`check_of`), and refuses another one. A backup is of the folder,
which has both.

What it does not do: know a text again that was rewritten, or a person under a new pseudonym. That stays with
the owner.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedtune.config.files import create_whole
from fedtune.errors import LedgerError

__all__ = [
    "Identity",
    "KeyArray",
    "KeySet",
    "check_of",
    "check_secret",
    "keyed",
    "make_secret",
    "mark_of",
    "marks_of",
    "normalised",
    "read_secret",
]

ByteArray = npt.NDArray[np.uint8]
KeyArray = npt.NDArray[np.uint64]

_KEY_BYTES = 8
_SECRET_BYTES = 32


def normalised(text: str) -> str:
    """`text` in Unicode form NFKC, case folded, every run of white space one space, none at the ends."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def mark_of(parts: Iterable[str | None]) -> bytes:
    """SHA-256 of one record's normalised text and pair, 32 bytes. Private: a short text can be guessed back.

    Each part carries its length, so that no two records can run together.
    """
    mark = hashlib.sha256(b"fedtune record 1")
    for part in parts:
        if part is None:
            mark.update(b"-")
        else:
            data = normalised(part).encode("utf-8", "surrogatepass")
            mark.update(b"%d:" % len(data))
            mark.update(data)
    return mark.digest()


def marks_of(texts: Sequence[str], pairs: Sequence[str] | None) -> ByteArray:
    """What n records are known by: uint8 [n, 1, 32], of pairs [n, 3, 32]; private."""
    if pairs is None:
        return _stacked([[mark_of((text, None))] for text in texts], 1)
    joint = [mark_of(record) for record in zip(texts, pairs, strict=True)]
    columns = [[mark_of((text, None)) for text in column] for column in (texts, pairs)]
    shared = {mark for marks in columns for mark, count in Counter(marks).items() if 2 * count > len(texts)}
    return _stacked(
        [
            [both, *(both if one in shared else one for one in alone)]
            for both, *alone in zip(joint, *columns, strict=True)
        ],
        3,
    )


def _stacked(marks: Sequence[Sequence[bytes]], each: int) -> ByteArray:
    joined = b"".join(mark for of_record in marks for mark in of_record)
    return np.frombuffer(joined, dtype=np.uint8).reshape(-1, each, 32)


@dataclass(frozen=True, eq=False)
class Identity:
    """Whose data a release touches, before it is keyed. Private, and never stored or sent.

    Attributes:
        records: marks of all records, uint8 [m, 32].
        persons: their names, each once or more often; None where the data names nobody.
        fingerprint: unkeyed SHA-256 of the data, by which ledgers of version 0.1 know it.
    """

    records: ByteArray
    persons: Sequence[str] | None
    fingerprint: str

    @cached_property
    def _keyed(self) -> dict[bytes, KeySet]:
        return {}


@dataclass(frozen=True, eq=False)
class KeySet:
    """The keys of one body of data.

    Attributes:
        id: a keyed digest of both kinds, 32 hex digits: the same for the same records and persons in any
            order, under any name.
        records: sorted and distinct, uint64 [n].
        persons: sorted and distinct, uint64; None where the data names nobody.
        fingerprint: as in `Identity`.
    """

    id: str
    records: KeyArray
    persons: KeyArray | None
    fingerprint: str


def keyed(identity: Identity, secret: bytes) -> KeySet:
    """The keys of `identity` under a node's `secret`; computed once and cached on the identity."""
    known = identity._keyed
    if secret not in known:
        known.clear()
        records = _keys(secret, b"fedtune record|", (row.tobytes() for row in identity.records))
        persons = None
        if identity.persons is not None:
            names = {normalised(str(name)).encode("utf-8", "surrogatepass") for name in identity.persons}
            persons = _keys(secret, b"fedtune person|", names)
        content = hmac.new(secret, b"fedtune set|", "sha256")
        for part in (records, persons):
            content.update(b"-" if part is None else b"%d:" % len(part))
            content.update(b"" if part is None else part.astype("<u8").tobytes())
        known[secret] = KeySet(content.hexdigest()[:32], records, persons, identity.fingerprint)
    return known[secret]


def _keys(secret: bytes, domain: bytes, values: Iterable[bytes]) -> KeyArray:
    joined = b"".join(hmac.digest(secret, domain + value, "sha256")[:_KEY_BYTES] for value in values)
    return np.unique(np.frombuffer(joined, dtype="<u8").astype(np.uint64))


# --- the secret -------------------------------------------------------------------------------------


def check_of(secret: bytes) -> str:
    """What a ledger stores to know this secret again; it says nothing about the secret."""
    return hmac.digest(secret, b"fedtune ledger|", "sha256").hex()[:32]


def read_secret(path: Path) -> bytes | None:
    """The secret in `path`, None if there is no such file.

    Raises:
        LedgerError: it cannot be used.
    """
    try:
        mode = path.stat().st_mode
        secret = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LedgerError(
            f"The ledger's secret {path} cannot be read ({error}). No release is made."
        ) from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise LedgerError(
            f"The ledger's secret {path} can be read by other users of this machine (mode "
            f"{stat.S_IMODE(mode):o}), who could then test which records this node holds. No release is "
            f"made. Run: chmod 600 {path}"
        )
    if len(secret) != _SECRET_BYTES or not any(secret):
        what = f"has {len(secret)} bytes" if len(secret) != _SECRET_BYTES else "holds nothing but zeros"
        raise LedgerError(
            f"The ledger's secret {path} {what} instead of {_SECRET_BYTES} random ones: it was torn. No "
            "release is made, for without it no record that was released before is known again. "
            f"{_way_out(path)}"
        )
    return secret


def make_secret(path: Path) -> bytes:
    """Writes a new secret to `path`, where there must be none.

    Raises:
        LedgerError: it cannot be written.
    """
    secret = secrets.token_bytes(_SECRET_BYTES)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        create_whole(path, secret)
    except OSError as error:
        raise LedgerError(
            f"The ledger's secret {path} cannot be written ({error}). Nothing was released."
        ) from error
    return secret


def check_secret(path: Path, secret: bytes | None, check: str) -> bytes:
    """`secret` if it is the one that gave `check`.

    Raises:
        LedgerError: it is missing, or another.
    """
    if secret is None:
        raise LedgerError(
            f"The ledger's secret {path} is missing, and without it no record that was released before is "
            f"known again. No release is made. {_way_out(path)}"
        )
    if not hmac.compare_digest(check_of(secret), check):
        raise LedgerError(
            f"The ledger's secret {path} is not the one that its ledger was written with, so no record that "
            f"was released before would be known again. No release is made. {_way_out(path)}"
        )
    return secret


def _way_out(path: Path) -> str:
    ledger = path.with_suffix(".sqlite")
    return (
        "Restore it from a backup of its folder. Without one, what each record has spent cannot be told any "
        "more: do not use this data again. If its owner accepts in writing that the earlier spending, which "
        f"{ledger} lists, counts no more, move all files {ledger.stem}.* of that folder away."
    )
