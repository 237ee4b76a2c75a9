"""Hash chains: the rule, and the durable, append-only log in one SQLite file that a ledger is.

**The rule** (`hash_entry`, `broken_link`) holds for the rows of a ledger and for the lines of a node's audit
log (`fedtune.federation.client.audit_log`). The hash of an entry is SHA-256 over all of its content, in which
the hash of the entry before it stands; the first names `GENESIS`. So an entry which is edited, moved or
removed in the middle breaks the chain at that place. A chain alone cannot show that its end was cut off: for
that its head, the number and hash of its last entry, is noted elsewhere (`Head`).

**The log.** Rows cut off the end are noticed by SQLite's own counter too, unless that is edited as well.

Durability: a write-ahead log with `synchronous=FULL`, so a row that `writing` has let go survives a power
cut, and a process killed at any instruction leaves either the whole row or none. After each row the log is
written back into the one file, so that whoever copies that file alone has every row: a copy that lacks the
latest would say that less was released. (A reader that is in the middle of reading, or a kill, may leave
the last rows in the `-wal` file until the next row is written; a backup is of the folder.) Writers take
SQLite's lock first (`BEGIN IMMEDIATE`) and wait for one another. A connection is never carried over a fork,
and threads of one process take turns.

Beside the log lie the keys of each set of records that releases were made from
(`fedtune.privacy.ledger.identity`), written in the transaction of the row that names the set and holds the
digest of its keys.

Reading is incremental: a reader that knows the log up to some row verifies and reads only what came after.
The clock is written down for people and never used: rows are ordered by their number.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedtune.errors import LedgerError

__all__ = ["GENESIS", "Chain", "Head", "Row", "broken_link", "hash_entry"]

GENESIS = "0" * 64  # what the first entry names as its predecessor
_BUSY_SECONDS = 60.0
_APPLICATION_ID = 0x66746C68  # 'ftlh': tells a ledger from any other SQLite file
_OLD_APPLICATION_ID = (
    0x66746C67  # of version 0.1, which knew no keys: it must not write to this file any more
)

_SCHEMA = (
    "CREATE TABLE log (seq INTEGER PRIMARY KEY AUTOINCREMENT, time TEXT NOT NULL, kind TEXT NOT NULL, "
    "run TEXT, body TEXT NOT NULL, previous TEXT NOT NULL, hash TEXT NOT NULL)",
    "CREATE INDEX log_by_run ON log (run) WHERE run IS NOT NULL",
    "CREATE INDEX log_by_kind ON log (kind, seq)",
    "CREATE TRIGGER log_is_not_edited BEFORE UPDATE ON log BEGIN SELECT RAISE(ABORT, 'append-only'); END",
    "CREATE TRIGGER log_is_not_cut BEFORE DELETE ON log BEGIN SELECT RAISE(ABORT, 'append-only'); END",
)
# Beside the log: the keys of each set that a row of the log names, with their digest.
_SET_SCHEMA = (
    "CREATE TABLE sets (id TEXT PRIMARY KEY, records BLOB NOT NULL, persons BLOB)",
    "CREATE TRIGGER sets_are_not_edited BEFORE UPDATE ON sets BEGIN SELECT RAISE(ABORT, 'append-only'); END",
    "CREATE TRIGGER sets_are_not_cut BEFORE DELETE ON sets BEGIN SELECT RAISE(ABORT, 'append-only'); END",
)
_inherited: list[sqlite3.Connection] = []  # held against the collector, which would close them
_COLUMNS = "seq, time, kind, run, body, previous, hash"


@dataclass(frozen=True)
class Head:
    """The last entry of a chain. It holds no text; the number counts releases or questions.

    Attributes:
        number: of the entry; 0: none yet.
        hash: of the entry, in hex.
    """

    number: int
    hash: str


def hash_entry(content: bytes) -> str:
    """Hash of an entry, in hex; `GENESIS` of none (no bytes)."""
    return hashlib.sha256(content).hexdigest() if content else GENESIS


def broken_link(before: Head, number: int, previous: object, *, kind: str = "row") -> str | None:
    """What is wrong with entry `number`, which names the hash `previous`, as the one that follows `before`.

    None if nothing is. `kind`: what the entries of this chain are called.
    """
    expected = before.number + 1
    if number == expected + 1:
        return f"{kind} {expected} is missing"
    if number != expected:
        return f"{kind}s {expected} to {number - 1} are missing"
    if previous is None:
        return f"{kind} {number} does not say which {kind} it follows"
    if previous != before.hash:
        return f"{kind} {number} does not follow {kind} {before.number}: one of them was replaced"
    return None


@dataclass(frozen=True)
class Row:
    """One row; `body` is what was appended, as JSON values."""

    seq: int
    time: str
    kind: str
    run: str | None
    body: dict[str, Any]
    previous: str
    hash: str


class Chain:
    """The log in one file. All methods raise `LedgerError` where the file cannot be used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.turn = threading.RLock()  # of the thread that uses the file
        self._open: tuple[sqlite3.Connection, int, tuple[int, int]] | None = None
        self._view: tuple[sqlite3.Connection | None] | None = None  # that is being read

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """A transaction that holds the writer's lock; durable when the block ends, gone if it raises."""
        with self.turn, self._errors():
            if self._view is not None:
                raise RuntimeError("A ledger is written to while it is read: what is read would not hold.")
            connection = self._connected(create=True)
            connection.execute("BEGIN IMMEDIATE")
            try:
                self._upgrade(connection)
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            # The row is durable, whatever becomes of this: it waits for nobody, and the next row does it too.
            with suppress(sqlite3.Error):
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection | None]:
        """A consistent view; None where there is no file yet. Whoever reads within it has the same view."""
        with self.turn, self._errors():
            if self._view is not None:
                yield self._view[0]
                return
            connection = self._connected(create=False) if self.path.exists() else None
            if connection is not None:
                connection.execute("BEGIN")
            self._view = (connection,)
            try:
                yield connection
            finally:
                self._view = None
                if connection is not None and connection.in_transaction:
                    connection.execute("ROLLBACK")

    def close(self) -> None:
        """Lets go of the file; the next use opens it again."""
        with self.turn:
            if self._open is not None and self._open[1] == os.getpid():
                self._open[0].close()
            self._open = None

    def copy(self, target: Path) -> None:
        """Writes the log as it is now, whole, to the new file `target`; whoever writes meanwhile waits."""
        with self.turn, self._errors():
            copied = sqlite3.connect(target)
            try:
                self._connected(create=False).backup(copied)
            finally:
                copied.close()

    def append(
        self,
        connection: sqlite3.Connection,
        kind: str,
        body: dict[str, Any],
        *,
        run: str | None,
        previous: str,
    ) -> Row:
        """Adds a row after the row with hash `previous`, within the caller's transaction."""
        last = self._counter(connection)
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
        digest = _digest(last + 1, time, kind, run, text, previous)
        connection.execute(
            f"INSERT INTO log ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (last + 1, time, kind, run, text, previous, digest),
        )
        return Row(last + 1, time, kind, run, json.loads(text), previous, digest)

    def rows(self, connection: sqlite3.Connection, after: int, previous: str) -> Iterator[Row]:
        """Rows after number `after`, each verified to follow the one before; `previous` is the hash of
        row `after`.

        Raises:
            LedgerError: a row does not fit; it names the first one.
        """
        query = f"SELECT {_COLUMNS} FROM log WHERE seq > ? ORDER BY seq"
        head = Head(after, previous)
        for raw in connection.execute(query, (after,)):
            row = self.checked(raw)
            if wrong := broken_link(head, row.seq, row.previous):
                raise self.broken(wrong)
            yield row
            head = Head(row.seq, row.hash)
        counter = self._counter(connection)
        if counter != head.number:
            raise self.broken(f"row {head.number + 1} is missing (rows up to {counter} were written)")

    def audit(self, connection: sqlite3.Connection) -> tuple[list[Row], list[str]]:
        """All rows that can be read, and everything that is wrong with the chain, not just the first."""
        rows: list[Row] = []
        problems: list[str] = []
        head = Head(0, GENESIS)
        for raw in connection.execute(f"SELECT {_COLUMNS} FROM log ORDER BY seq"):
            seq, time, kind, run, text, follows, digest = raw
            if wrong := broken_link(head, seq, follows):
                problems.append(wrong)
            if digest != _digest(seq, time, kind, run, text, follows):
                problems.append(f"row {seq} was changed after it was written")
            try:
                rows.append(Row(seq, time, kind, run, json.loads(text), follows, digest))
            except ValueError:
                problems.append(f"row {seq} cannot be read")
            head = Head(seq, digest)
        counter = self._counter(connection)
        if counter > head.number:
            problems.append(f"row {counter} is missing: rows were cut off the end")
        elif counter < head.number:
            problems.append(f"row {head.number} was added without the ledger's counter")
        found = {sql for (sql,) in connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL")}
        schema = {*_SCHEMA, *(_SET_SCHEMA if self._has_sets(connection) else ())}
        if schema - found:
            problems.append("the locks against editing were taken off the table")
        if found - {*schema, "CREATE TABLE sqlite_sequence(name,seq)"}:
            problems.append("there is something in the file that a ledger does not have")
        return rows, problems

    def run_rows(self, connection: sqlite3.Connection, run: str, *, after: int = 0) -> Iterator[Row]:
        """The rows of one run after number `after`, each verified by itself."""
        query = f"SELECT {_COLUMNS} FROM log WHERE run = ? AND seq > ? ORDER BY seq"
        for raw in connection.execute(query, (run, after)):
            yield self.checked(raw)

    def latest_of_kind(self, connection: sqlite3.Connection, kind: str, count: int) -> list[Row]:
        """The latest `count` rows of `kind`, oldest first, each verified by itself."""
        query = f"SELECT {_COLUMNS} FROM log WHERE kind = ? ORDER BY seq DESC LIMIT ?"
        return [self.checked(raw) for raw in connection.execute(query, (kind, count))][::-1]

    # --- sets of keys -------------------------------------------------------------------------------

    def add_set(
        self, connection: sqlite3.Connection, name: str, records: bytes, persons: bytes | None
    ) -> None:
        """Stores the keys of a set, within the caller's transaction, which appends the row that names it."""
        connection.execute(
            "INSERT INTO sets (id, records, persons) VALUES (?, ?, ?)", (name, records, persons)
        )

    def set_of(self, connection: sqlite3.Connection, name: str) -> tuple[bytes, bytes | None] | None:
        """The keys of records and persons of set `name` as they were stored; None if there are none."""
        if not self._has_sets(connection):
            return None
        found = connection.execute("SELECT records, persons FROM sets WHERE id = ?", (name,)).fetchone()
        return None if found is None else (bytes(found[0]), None if found[1] is None else bytes(found[1]))

    def set_names(self, connection: sqlite3.Connection) -> set[str]:
        """The names of all sets whose keys are stored."""
        if not self._has_sets(connection):
            return set()
        return {str(name) for (name,) in connection.execute("SELECT id FROM sets")}

    def _has_sets(self, connection: sqlite3.Connection) -> bool:
        return bool(connection.execute("PRAGMA application_id").fetchone()[0] == _APPLICATION_ID)

    def _upgrade(self, connection: sqlite3.Connection) -> None:
        """Makes a file of version 0.1 one of this version, within the caller's transaction; rows stay."""
        if not self._has_sets(connection):
            for statement in _SET_SCHEMA:
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id={_APPLICATION_ID}")

    def is_old(self) -> bool:
        """Whether the file is a ledger that version 0.1 wrote, and this version has not written to."""
        with self.reading() as connection:
            return connection is not None and not self._has_sets(connection)

    def _counter(self, connection: sqlite3.Connection) -> int:
        found = connection.execute("SELECT seq FROM sqlite_sequence WHERE name = 'log'").fetchone()
        return int(found[0]) if found else 0

    def hash_of(self, connection: sqlite3.Connection, seq: int) -> str | None:
        """Hash of row `seq`; None if there is no such row."""
        if seq == 0:
            return GENESIS
        found = connection.execute("SELECT hash FROM log WHERE seq = ?", (seq,)).fetchone()
        return None if found is None else str(found[0])

    def head(self, connection: sqlite3.Connection) -> Head:
        """The last row; (0, GENESIS) before the first."""
        last = connection.execute("SELECT seq, hash FROM log ORDER BY seq DESC LIMIT 1").fetchone()
        return Head(0, GENESIS) if last is None else Head(int(last[0]), str(last[1]))

    def checked(self, raw: tuple[Any, ...]) -> Row:
        """`raw` as a Row, or `LedgerError` naming it if its content does not give its hash."""
        seq, time, kind, run, text, previous, digest = raw
        if digest != _digest(seq, time, kind, run, text, previous):
            raise self.broken(f"row {seq} was changed after it was written")
        try:
            body = json.loads(text)
        except ValueError as error:
            raise self.broken(f"row {seq} cannot be read") from error
        return Row(seq, time, kind, run, body, previous, digest)

    def broken(self, what: str) -> LedgerError:
        """The error of a log that was tampered with or damaged."""
        return LedgerError(
            f"The privacy ledger {self.path} cannot be trusted: {what}. No release is made. Restore the file "
            "from a backup, or ask whoever edited it; `fedtune budget verify` lists every such row, and at a "
            "site `fedtune node proof --config node.yaml`."
        )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise LedgerError(
                f"The privacy ledger {self.path} cannot be used ({error}). No release is made, because it "
                "could not be written down first. Check that the file and its folder may be written, that "
                "the disk has space, and that no other process holds the file for minutes."
            ) from error

    def _connected(self, *, create: bool) -> sqlite3.Connection:
        if create:
            self._make_file()
        found = self.path.stat()
        if found.st_mode & stat.S_IWOTH:
            raise LedgerError(
                f"The privacy ledger {self.path} can be written by every user of this machine, so what it "
                f"says proves nothing. No release is made. Run: chmod o-w {self.path}"
            )
        identity = (found.st_dev, found.st_ino)
        if self._open is not None:
            connection, process, was = self._open
            if process == os.getpid() and was == identity:
                return connection
            if process == os.getpid():
                connection.close()
            else:
                _inherited.append(connection)  # another process's: not ours to close
            self._open = None
        address = self.path.absolute().as_uri()
        if create or os.access(self.path, os.W_OK):
            address += "?mode=rw"
        elif Path(f"{self.path}-wal").exists():
            address += "?mode=ro"  # its latest rows are in the side file
        else:
            # A copy that may not be written (an auditor's) is read as it stands, without side files.
            address += "?mode=ro&immutable=1"
        connection = sqlite3.connect(
            address, uri=True, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            self._ensure_schema(connection)
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA trusted_schema=OFF")
        except BaseException:
            connection.close()
            raise
        self._open = (connection, os.getpid(), identity)
        return connection

    def _make_file(self) -> None:
        if self.path.exists():
            return
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        except FileExistsError:
            return
        # The name itself must survive a power cut.
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _ensure_schema(self, connection: sqlite3.Connection) -> None:
        """Makes the tables where there are none: the file is new, or its maker was killed before them."""
        if self._is_ledger(connection):
            return
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.execute("BEGIN IMMEDIATE")
        try:
            # Another process may have been first; the lock is ours now, so look again.
            if not self._is_ledger(connection):
                for statement in (*_SCHEMA, *_SET_SCHEMA):
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id={_APPLICATION_ID}")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _is_ledger(self, connection: sqlite3.Connection) -> bool:
        # In this order: tables and identity are committed together, perhaps by another process just now.
        (objects,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        (found,) = connection.execute("PRAGMA application_id").fetchone()
        if found in (_APPLICATION_ID, _OLD_APPLICATION_ID):
            return True
        if found != 0 or objects:
            raise LedgerError(
                f"{self.path} is an SQLite file, but no privacy ledger. Nothing was written to it."
            )
        return False


def _digest(seq: int, time: str, kind: str, run: str | None, body: str, previous: str) -> str:
    fields = json.dumps([seq, time, kind, run, body, previous], separators=(",", ":"))
    return hash_entry(fields.encode())
