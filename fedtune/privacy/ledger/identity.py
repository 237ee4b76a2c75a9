"""By what a ledger knows records and persons again: keyed hashes that only its own node can make.

A data set's name, its file and its columns change from export to export; what was spent belongs to the
records and persons in it. So each record is known by its text (and pair), each person by their value in the
unit column. Both are normalised first (`normalised`), so that a new export with other capitals, spaces or
look-alike characters is known again.

Whoever guesses a text can test an unkeyed hash of it, so what a ledger keeps is a keyed one: HMAC-SHA256
with a secret of the node's (`fedtune.privacy.ledger.secret`), records and persons in separate domains. It
is cut to 8 bytes: of ten million keys two collide with a probability of 3e-6, and then each of the two is
charged for both, which is the safe side.

What it does not do: know a text again that was rewritten, or a person under a new pseudonym. That stays with
the owner.
"""

from __future__ import annotations

import hashlib
import hmac
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

__all__ = ["Identity", "KeySet", "keyed", "mark_of", "normalised"]

ByteArray = npt.NDArray[np.uint8]
KeyArray = npt.NDArray[np.uint64]

_KEY_BYTES = 8


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


@dataclass(frozen=True, eq=False)
class Identity:
    """Whose data a release touches, before it is keyed. Private, and never stored or sent.

    Attributes:
        records: `mark_of` each record, uint8 [n, 32].
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
    """The keys of one body of data: `records` and `persons`, each sorted and distinct, uint64.

    `persons` is None where the data names nobody. `id` is a keyed digest of both, 32 hex digits: the same
    for the same records and persons in any order, under any name. `fingerprint`: as in `Identity`.
    """

    id: str
    records: KeyArray
    persons: KeyArray | None
    fingerprint: str


def keyed(identity: Identity, secret: bytes) -> KeySet:
    """The keys of `identity` under a node's `secret`; computed once and kept on the identity."""
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
