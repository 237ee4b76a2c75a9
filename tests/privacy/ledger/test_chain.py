"""The chain of rows, method by method, on files of a few rows that are edited by hand."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import LedgerError
from fedtune.privacy.ledger import chain as chain_module
from fedtune.privacy.ledger.chain import GENESIS, Chain, Head, Row
from tests.support.golden import Golden


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[Chain]:
    made = Chain(tmp_path / "a" / "b" / "log.sqlite")
    yield made
    made.close()


def filled(chain: Chain, count: int = 5) -> list[Row]:
    """Rows of kinds x, y, x, ...; of runs r0, r1, none, r0, ..."""
    rows: list[Row] = []
    with chain.writing() as writer:
        previous = GENESIS
        for i in range(count):
            run = (f"r{i % 3}", None)[i % 3 == 2]
            rows.append(chain.append(writer, "xy"[i % 2], {"b": i, "a": [1.5]}, run=run, previous=previous))
            previous = rows[-1].hash
    return rows


def edit(chain: Chain, *statements: str) -> None:
    """By hand, the locks put back as they were."""
    chain.close()
    with closing(sqlite3.connect(chain.path, isolation_level=None)) as connection:
        for name in ("log_is_not_edited", "log_is_not_cut"):
            connection.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            connection.execute(statement)
        for statement in chain_module._SCHEMA[3:]:
            connection.execute(statement)


def read(chain: Chain, after: int = 0, previous: str = GENESIS) -> list[Row]:
    with chain.reading() as view:
        assert view is not None
        return list(chain.rows(view, after, previous))


def problems(chain: Chain) -> list[str]:
    with chain.reading() as view:
        assert view is not None
        return chain.audit(view)[1]


def test_a_row_has_the_hash_of_its_content_and_of_the_row_before(chain: Chain) -> None:
    rows = filled(chain, 3)
    for i, row in enumerate(rows):
        text = '{"a":[1.5],"b":' + str(i) + "}"
        content = json.dumps([i + 1, row.time, row.kind, row.run, text, row.previous], separators=(",", ":"))
        assert row.hash == hashlib.sha256(content.encode()).hexdigest()
        assert row.body == {"a": [1.5], "b": i} and row.previous == (rows[i - 1].hash if i else "0" * 64)
        assert len(row.time) == len("2026-11-29T20:00:00.000+00:00")
    assert [(row.seq, row.kind, row.run) for row in rows] == [(1, "x", "r0"), (2, "y", "r1"), (3, "x", None)]
    assert read(chain) == rows
    with chain.writing() as writer, pytest.raises(ValueError, match="JSON compliant"):
        chain.append(writer, "x", {"a": float("nan")}, run=None, previous=rows[-1].hash)


def test_questions_to_a_log(chain: Chain) -> None:
    with chain.reading() as view:
        assert view is None
    assert not chain.path.parent.exists() and not chain.is_old()
    with chain.writing() as writer:
        assert chain.head(writer) == Head(0, GENESIS)
        assert list(chain.rows(writer, 0, GENESIS)) == [] and chain.audit(writer) == ([], [])
        assert chain.hash_of(writer, 0) == GENESIS and chain.hash_of(writer, 1) is None
    rows = filled(chain, 7)
    with chain.reading() as view:
        assert view is not None
        assert chain.head(view) == Head(7, rows[6].hash)
        assert [chain.hash_of(view, i) for i in (0, 1, 7, 8)] == [GENESIS, rows[0].hash, rows[6].hash, None]
        assert list(chain.run_rows(view, "r0")) == [rows[0], rows[3], rows[6]]
        assert list(chain.run_rows(view, "r0", after=1)) == [rows[3], rows[6]]
        assert list(chain.run_rows(view, "r0", after=0)) == [rows[0], rows[3], rows[6]]
        assert list(chain.run_rows(view, "none")) == []
        assert chain.latest_of_kind(view, "x", 2) == [rows[4], rows[6]]
        assert chain.latest_of_kind(view, "y", 9) == [rows[1], rows[3], rows[5]]
        assert chain.audit(view) == (rows, [])
    assert read(chain, 5, rows[4].hash) == rows[5:]
    assert not chain.is_old()


def test_sets_of_keys(chain: Chain) -> None:
    with chain.writing() as writer:
        assert chain.set_names(writer) == set()
        chain.add_set(writer, "one", b"12", None)
        chain.add_set(writer, "two", b"34", b"5")
        assert chain.set_names(writer) == {"one", "two"}
        assert chain.set_of(writer, "one") == (b"12", None) and chain.set_of(writer, "two") == (b"34", b"5")
        assert chain.set_of(writer, "three") is None


def test_a_file_of_the_first_version_has_no_sets_until_it_is_written_to(chain: Chain) -> None:
    rows = filled(chain, 2)
    old = 0x66746C67
    chain.close()
    with closing(sqlite3.connect(chain.path)) as connection:
        connection.executescript(f"DROP TABLE sets; PRAGMA application_id={old}")
    assert chain.is_old()
    with chain.reading() as view:
        assert view is not None
        assert chain.set_of(view, "one") is None and chain.set_names(view) == set()
        assert chain.audit(view) == (rows, [])
    with chain.writing() as writer:
        chain.add_set(writer, "one", b"12", None)
    assert not chain.is_old() and problems(chain) == []


@pytest.mark.parametrize(
    ("damage", "first", "all_of_them"),
    [
        (["DELETE FROM log WHERE seq = 3"], "row 3 is missing", ["row 3 is missing"]),
        (["DELETE FROM log WHERE seq IN (2, 3)"], "rows 2 to 3 are missing", ["rows 2 to 3 are missing"]),
        (["DELETE FROM log WHERE seq > 3"], "row 4 is missing (rows up to 5 were written)",
         ["row 5 is missing: rows were cut off the end"]),
        (["UPDATE sqlite_sequence SET seq = 4"], "row 6 is missing (rows up to 4 were written)",
         ["row 5 was added without the ledger's counter"]),
        (["DELETE FROM sqlite_sequence"], "row 6 is missing (rows up to 0 were written)",
         ["row 5 was added without the ledger's counter"]),
        (["UPDATE log SET run = 'other' WHERE seq = 2"], "row 2 was changed",
         ["row 2 was changed after it was written"]),
        (["UPDATE log SET body = '{' WHERE seq = 2"], "row 2 was changed",
         ["row 2 was changed after it was written", "row 2 cannot be read"]),
        (["UPDATE log SET previous = 'x' WHERE seq = 2"], "row 2 was changed",
         ["row 2 does not follow row 1: one of them was replaced", "row 2 was changed after it was written"]),
    ],
)  # fmt: skip
def test_everything_that_is_wrong_is_named(
    chain: Chain, damage: list[str], first: str, all_of_them: list[str]
) -> None:
    filled(chain)
    edit(chain, *damage)
    with pytest.raises(LedgerError) as raised:
        read(chain)
    assert f"cannot be trusted: {first}" in str(raised.value)
    assert problems(chain) == all_of_them


def rewritten(chain: Chain, seq: int, text: str) -> None:
    """Row `seq` with another body and the hash that belongs to it."""
    row = read(chain)[seq - 1]
    digest = chain_module._digest(seq, row.time, row.kind, row.run, text, row.previous)
    edit(chain, f"UPDATE log SET body = '{text}', hash = '{digest}' WHERE seq = {seq}")


def test_a_row_that_was_rewritten_with_its_hash_breaks_the_next_one(chain: Chain) -> None:
    filled(chain)
    rewritten(chain, 2, "{}")
    with pytest.raises(LedgerError, match="row 3 does not follow row 2: one of them was replaced"):
        read(chain)
    assert problems(chain) == ["row 3 does not follow row 2: one of them was replaced"]


def test_a_row_that_cannot_be_read_is_named(chain: Chain) -> None:
    filled(chain)
    rewritten(chain, 5, "{")
    with pytest.raises(LedgerError, match="row 5 cannot be read"):
        read(chain)
    with chain.reading() as view:
        assert view is not None
        rows, wrong = chain.audit(view)
    assert wrong == ["row 5 cannot be read"] and [row.seq for row in rows] == [1, 2, 3, 4]


def test_locks_and_strange_things(chain: Chain) -> None:
    filled(chain)
    chain.close()
    with closing(sqlite3.connect(chain.path)) as connection:
        connection.execute("DROP TRIGGER sets_are_not_cut")
    assert problems(chain) == ["the locks against editing were taken off the table"]
    chain.close()
    with closing(sqlite3.connect(chain.path)) as connection:
        connection.execute("CREATE TABLE more (x)")
    assert problems(chain) == [
        "the locks against editing were taken off the table",
        "there is something in the file that a ledger does not have",
    ]


def test_the_file_that_is_made(chain: Chain) -> None:
    filled(chain, 1)
    assert stat.S_IMODE(chain.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(chain.path.parent.stat().st_mode) == 0o700
    with chain.reading() as view:
        assert view is not None
        asked = {one: view.execute(f"PRAGMA {one}").fetchone()[0] for one in (
            "synchronous", "trusted_schema", "journal_mode", "application_id",
        )}  # fmt: skip
    assert asked == {
        "synchronous": 2, "trusted_schema": 0, "journal_mode": "wal", "application_id": 0x66746C68
    }  # fmt: skip
    # After each transaction the one file has every row.
    copy = Chain(chain.path.with_name("copy.sqlite"))
    copy.path.write_bytes(chain.path.read_bytes())
    assert len(read(copy)) == 1
    copy.close()


def test_a_transaction_is_whole_or_none(chain: Chain) -> None:
    filled(chain, 1)

    def is_interrupted() -> None:
        with chain.writing() as writer:
            chain.append(writer, "x", {}, run=None, previous=chain.head(writer).hash)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        is_interrupted()
    assert len(read(chain)) == 1
    with pytest.raises(ZeroDivisionError), chain.reading():
        raise ZeroDivisionError
    with chain.writing() as writer:
        assert writer.in_transaction
        chain.append(writer, "x", {}, run=None, previous=chain.head(writer).hash)
    assert len(read(chain)) == 2 and not writer.in_transaction


def test_one_connection_is_kept_until_the_file_is_another(chain: Chain) -> None:
    filled(chain, 1)
    with chain.reading() as first:
        assert first is not None
    with chain.reading() as second:
        assert first is second
    chain.close()
    chain.close()
    with pytest.raises(sqlite3.ProgrammingError):
        first.execute("SELECT 1")
    with chain.reading() as third:
        assert third is not None and third is not first
    other = Chain(chain.path.with_name("other.sqlite"))
    filled(other, 2)
    other.close()
    other.path.replace(chain.path)
    with chain.reading() as fourth:
        assert fourth is not None and len(list(chain.rows(fourth, 0, GENESIS))) == 2
    with pytest.raises(sqlite3.ProgrammingError):
        third.execute("SELECT 1")


def test_a_connection_of_another_process_is_let_go_and_not_closed(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(chain, 1)
    with chain.reading() as first:
        assert first is not None
    here = os.getpid()
    monkeypatch.setattr("fedtune.privacy.ledger.chain.os.getpid", lambda: here + 1)
    before = len(chain_module._inherited)
    with chain.reading() as second:
        assert second is not None and second is not first
    assert chain_module._inherited[before:] == [first]
    assert first.execute("SELECT 1").fetchone() == (1,)
    monkeypatch.undo()
    chain.close()  # that of the other process: only forgotten
    assert second.execute("SELECT 1").fetchone() == (1,)
    second.close()
    chain_module._inherited.remove(first)
    first.close()


def test_a_file_that_is_no_ledger_is_left_alone(chain: Chain, golden: Golden) -> None:
    chain.path.parent.mkdir(parents=True)
    for script in ("CREATE TABLE x (y)", "PRAGMA application_id=5"):
        chain.path.unlink(missing_ok=True)
        with closing(sqlite3.connect(chain.path)) as connection:
            connection.executescript(script + "; PRAGMA user_version=1")
        before = chain.path.read_bytes()
        with pytest.raises(LedgerError) as raised:
            filled(chain, 1)
        golden(raised)
        assert chain.path.read_bytes() == before


def test_an_empty_file_becomes_a_ledger(chain: Chain) -> None:
    chain.path.parent.mkdir(parents=True)
    chain.path.touch()  # whoever made it was killed before the tables
    assert len(filled(chain, 2)) == 2 and problems(chain) == []


def test_a_file_that_everybody_may_write_proves_nothing(chain: Chain, golden: Golden) -> None:
    filled(chain, 1)
    chain.path.chmod(0o664)
    assert len(read(chain)) == 1
    chain.path.chmod(0o602)
    with pytest.raises(LedgerError) as raised:
        read(chain)
    golden(raised)
    chain.path.chmod(0o600)


def test_errors_of_the_disk_are_refusals(chain: Chain) -> None:
    with pytest.raises(LedgerError, match=r"cannot be used \(full\)\. No release is made"), chain._errors():
        raise OSError("full")
    with pytest.raises(LedgerError, match=r"cannot be used \(busy\)"), chain._errors():
        raise sqlite3.OperationalError("busy")
    with pytest.raises(ValueError), chain._errors():
        raise ValueError("another")


@pytest.mark.parametrize(
    ("writable", "side_file", "address"),
    [(True, False, "?mode=rw"), (True, True, "?mode=rw"), (False, True, "?mode=ro"),
     (False, False, "?mode=ro&immutable=1")],
)  # fmt: skip
def test_how_a_file_is_opened(
    chain: Chain, monkeypatch: pytest.MonkeyPatch, writable: bool, side_file: bool, address: str
) -> None:
    filled(chain, 1)
    chain.close()
    asked: list[Any] = []
    connect = sqlite3.connect

    def noted(where: str, **how: Any) -> sqlite3.Connection:
        asked.append((where, how))
        return connect(where, **how)

    monkeypatch.setattr("fedtune.privacy.ledger.chain.sqlite3.connect", noted)
    monkeypatch.setattr(
        "fedtune.privacy.ledger.chain.os.access", lambda path, mode: writable and mode == os.W_OK
    )
    if side_file:
        Path(f"{chain.path}-wal").touch()
    assert len(read(chain)) == 1
    how = {"uri": True, "timeout": 60.0, "isolation_level": None, "check_same_thread": False}
    assert asked == [(chain.path.as_uri() + address, how)]


def test_a_reader_sees_one_state_of_the_file(chain: Chain) -> None:
    filled(chain, 1)
    other = Chain(chain.path)
    with chain.reading() as view:
        assert view is not None and chain.head(view).number == 1
        with other.writing() as writer:
            other.append(writer, "x", {}, run=None, previous=other.head(writer).hash)
        assert chain.head(view).number == 1
    assert len(read(chain)) == 2
    other.close()


def test_the_name_of_a_new_file_is_on_the_disk(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[tuple[int, int]] = []
    monkeypatch.setattr(
        "fedtune.privacy.ledger.chain.os.fsync", lambda fd: synced.append((fd, os.fstat(fd).st_ino))
    )
    chain._make_file()
    ((folder, inode),) = synced
    assert inode == chain.path.parent.stat().st_ino
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(folder)
    chain._make_file()
    assert len(synced) == 1


def test_tables_that_cannot_be_made_are_none(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    chain._make_file()
    made: list[sqlite3.Connection] = []
    connect = sqlite3.connect

    def noted(where: str, **how: Any) -> sqlite3.Connection:
        made.append(connect(where, **how))
        return made[-1]

    monkeypatch.setattr("fedtune.privacy.ledger.chain.sqlite3.connect", noted)
    monkeypatch.setattr(chain_module, "_SET_SCHEMA", ("NOT SQL",))
    with pytest.raises(LedgerError, match=r'cannot be used \(near "NOT": syntax error\)'), chain.reading():
        pass
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        made[0].execute("SELECT 1")
    with closing(connect(chain.path, isolation_level=None)) as connection:
        connection.execute("CREATE TABLE log (x)")  # nothing of it was kept
        connection.execute("DROP TABLE log")
        with pytest.raises(sqlite3.OperationalError, match="syntax"):
            chain._ensure_schema(connection)
        assert not connection.in_transaction
        monkeypatch.undo()
        chain._ensure_schema(connection)
        assert chain._is_ledger(connection) is True
    with closing(connect(":memory:")) as connection:
        assert chain._is_ledger(connection) is False
