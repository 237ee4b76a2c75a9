"""What a ledger knows of the book beside it: the head of a node's audit log, in rows of the ledger's own
chain.

A hash chain shows what was changed within it, and not that its end was cut off, nor that all of it was
written anew. Of two books that name one another's heads, each shows it of the other: a ledger that was rolled
back lacks a row that the audit log knows, and an audit log that was cut, rotated or removed lacks a line that
the ledger knows. What neither shows is that both were rolled back together: for that a head is kept elsewhere
(`fedtune.federation.client.audit_log`).

A head is a number and a hash. It holds no text, and says how many rows or lines there are, which count
releases and questions: whoever sends the questions knows that too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedtune.privacy.ledger.chain import GENESIS, Chain

__all__ = ["Head", "Witness", "ledger_head", "ledger_row", "note_witness", "witnesses"]

_KIND = "witness"


@dataclass(frozen=True)
class Head:
    """The last entry of a book: its number (0: none yet) and its hash, in hex."""

    number: int
    hash: str


@dataclass(frozen=True)
class Witness:
    """A row of the ledger that names the audit log's head as it was then."""

    row: int
    time: str
    log: Head


def note_witness(ledger: Path, log: Head) -> None:
    """Has the ledger name the audit log's head, durably. Raises LedgerError. Without a ledger, nothing."""
    if not ledger.exists():
        return
    chain = Chain(ledger)
    try:
        with chain.writing() as connection:
            last = chain.latest_of_kind(connection, _KIND, 1)
            if last and Head(last[0].body["line"], last[0].body["hash"]) == log:
                return
            _, previous = chain.last(connection)
            body = {"line": log.number, "hash": log.hash}
            chain.append(connection, _KIND, body, run=None, previous=previous)
    finally:
        chain.close()


def witnesses(ledger: Path, count: int = -1) -> list[Witness]:
    """The latest `count` heads of the audit log that the ledger names (-1: all), oldest first.

    Raises LedgerError.
    """
    chain = Chain(ledger)
    try:
        with chain.reading() as connection:
            rows = [] if connection is None else chain.latest_of_kind(connection, _KIND, count)
    finally:
        chain.close()
    return [Witness(row.seq, row.time, Head(row.body["line"], row.body["hash"])) for row in rows]


def ledger_head(ledger: Path) -> Head:
    """The ledger's own head; (0, GENESIS) where there is none yet. Raises LedgerError."""
    chain = Chain(ledger)
    try:
        with chain.reading() as connection:
            return Head(0, GENESIS) if connection is None else Head(*chain.last(connection))
    finally:
        chain.close()


def ledger_row(ledger: Path, numbers: list[int]) -> dict[int, str | None]:
    """The hash of each of these rows; None for one that is not there. Raises LedgerError."""
    chain = Chain(ledger)
    try:
        with chain.reading() as connection:
            if connection is None:
                return {number: GENESIS if number == 0 else None for number in numbers}
            return {number: chain.hash_of(connection, number) for number in numbers}
    finally:
        chain.close()
