"""What a ledger knows of the audit log beside it: the log's head, in rows of the ledger's own chain.

Of two logs that name one another's heads, each shows it where the other was cut or written anew: a ledger
that was rolled back lacks a row that the audit log knows, and an audit log that was cut, rotated or removed
lacks a line that the ledger knows. What neither shows is that both were rolled back together: for that a head
is kept elsewhere (`fedtune.federation.client.audit_log`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedtune.privacy.ledger.chain import GENESIS, Chain, Head

__all__ = ["AuditHead", "audit_heads", "ledger_head", "note_audit_head", "row_hashes"]

_KIND = "witness"  # of the rows


@dataclass(frozen=True)
class AuditHead:
    """A row of the ledger that names the audit log's head as it was then."""

    row: int
    time: str
    log: Head


def note_audit_head(ledger: Path, log: Head) -> None:
    """Has the ledger name the audit log's head, durably. Without a ledger, nothing happens.

    Raises:
        LedgerError: the ledger cannot be used.
    """
    if not ledger.exists():
        return
    with _opened(ledger) as chain, chain.writing() as connection:
        last = chain.latest_of_kind(connection, _KIND, 1)
        if last and Head(last[0].body["line"], last[0].body["hash"]) == log:
            return
        body = {"line": log.number, "hash": log.hash}
        chain.append(connection, _KIND, body, run=None, previous=chain.head(connection).hash)


def audit_heads(ledger: Path, count: int = -1) -> list[AuditHead]:
    """The latest `count` heads of the audit log that the ledger names (-1: all), oldest first.

    Raises:
        LedgerError: the ledger cannot be used.
    """
    with _opened(ledger) as chain, chain.reading() as connection:
        rows = [] if connection is None else chain.latest_of_kind(connection, _KIND, count)
    return [AuditHead(row.seq, row.time, Head(row.body["line"], row.body["hash"])) for row in rows]


def ledger_head(ledger: Path) -> Head:
    """The ledger's own head; (0, GENESIS) where there is none yet.

    Raises:
        LedgerError: the ledger cannot be used.
    """
    with _opened(ledger) as chain, chain.reading() as connection:
        return Head(0, GENESIS) if connection is None else chain.head(connection)


def row_hashes(ledger: Path, numbers: list[int]) -> dict[int, str | None]:
    """The hash of each of these rows of the ledger; None for one that is not there.

    Raises:
        LedgerError: the ledger cannot be used.
    """
    with _opened(ledger) as chain, chain.reading() as connection:
        if connection is None:
            return {number: GENESIS if number == 0 else None for number in numbers}
        return {number: chain.hash_of(connection, number) for number in numbers}


@contextmanager
def _opened(ledger: Path) -> Iterator[Chain]:
    chain = Chain(ledger)
    try:
        yield chain
    finally:
        chain.close()
