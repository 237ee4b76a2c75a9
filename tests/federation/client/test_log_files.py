"""A log over several files, rotated by itself or by the machine: one chain; a part that is gone is missed."""

from __future__ import annotations

import gzip
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fedtune.errors import LedgerError
from fedtune.federation.client import log_files
from fedtune.federation.client.audit_log import AuditLog, Books
from fedtune.privacy.ledger.ledger import PrivacyBudget, PrivacyLedger


def write(log: AuditLog, *events: str) -> None:
    for event in events:
        log.append(event)


def events(log: AuditLog) -> str:
    return "".join(entry["event"] for entry in log.entries())


def rename(path: Path, to: str) -> None:
    path.rename(path.with_name(to))


def compress(path: Path, to: str) -> None:
    path.with_name(to).write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()


def copy_and_truncate(path: Path, to: str) -> None:
    shutil.copy(path, path.with_name(to))
    path.write_bytes(b"")


@pytest.mark.parametrize("vanished", ["log.1", "log"])
def test_files_that_are_renamed_while_they_are_read_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vanished: str
) -> None:
    log, read, renamed = AuditLog(tmp_path / "log"), Path.read_bytes, list[str]()
    write(log, *"ab")
    rename(log.path, "log.1")
    write(log, *"cd")

    def racing(path: Path) -> bytes:
        if path.name == vanished and not renamed:
            renamed.append(vanished)
            if (tmp_path / "log.1").exists():
                rename(tmp_path / "log.1", "log.2")
            if vanished == "log":
                rename(log.path, "log.1")
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", racing)
    assert log.verify() == [] and events(log) == "abcd" and renamed


@pytest.mark.parametrize("names", [("log.2", "log.1"), ("log-20261101", "log-20261201"), ("log.9", "log.10")])
@pytest.mark.parametrize("rotate", [rename, compress, copy_and_truncate])
def test_what_log_rotation_renamed_is_followed(
    tmp_path: Path, rotate: Callable[[Path, str], None], names: tuple[str, str]
) -> None:
    log = AuditLog(tmp_path / "log")
    end = ".gz" if rotate is compress else ""
    write(log, *"abc")
    rotate(log.path, names[0] + end)
    assert log.head().number == 3 and log.last()["event"] == "c" and log.verify() == []
    write(log, *"de")
    rotate(log.path, names[1] + end)
    write(log, "f")
    assert events(log) == "abcdef" and log.verify() == []
    assert [entry["line"] for entry in log.entries()] == [1, 2, 3, 4, 5, 6]
    assert [file.name for file in log.files()] == [names[0] + end, names[1] + end, "log"]
    assert len(log.hashes()) == 6 and log.head().number == 6 and log.head().hash == log.hashes()[-1]


def test_a_part_that_is_gone_is_missed_and_may_be_put_back(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "log")
    for number, part in enumerate(("abc", "de", "f")):
        write(log, *part)
        rename(log.path, f"log.{number}")
    write(log, "g")
    away = tmp_path / "away"
    rename(tmp_path / "log.1", "away")
    assert log.verify() == ["lines 1 to 5 are missing"] and events(log) == "fg"
    assert log.hashes()[:5] == [""] * 5 and log.head().number == 7, "the others keep their places"
    assert log.verify(after=6) == [], "what its owner has accepted"
    write(log, "h")
    assert log.head().number == 8
    rename(away, "log.1")
    assert log.verify() == [] and events(log) == "abcdefgh"


def test_a_changed_line_of_an_older_file_is_found(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "log")
    write(log, *"abc")
    older = tmp_path / "log.1"
    rename(log.path, "log.1")
    write(log, "d")
    kept = older.read_bytes()
    older.write_bytes(kept.replace(b'"event": "b"', b'"event": "x"'))
    assert log.verify() == ["line 3 does not follow line 2: one of them was replaced"]
    older.write_bytes(kept.replace(b'"event": "c"', b'"event": "x"'))
    assert log.verify() == ["lines 1 to 3 are missing"], "the chain does not lead there any more"
    older.write_bytes(kept)
    (tmp_path / "log.2.gz").write_bytes(gzip.compress(kept)[:40])  # it is just being made
    assert log.verify() == []


def test_a_copy_beside_the_log_is_no_part_of_it(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "log")
    write(log, *"ab")
    shutil.copy(log.path, tmp_path / "log.bak")
    write(log, *"cd")
    rename(log.path, "log.1")
    write(log, "e")
    (tmp_path / "log.notes").write_text("not a log\n")
    assert events(log) == "abcde" and log.verify() == []
    log.path.unlink()
    assert log.head().number == 4, "of several the newest, and never an older copy"


def test_the_node_sets_a_large_file_aside_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_files, "LARGEST", 700)
    log = AuditLog(tmp_path / "log")

    def several() -> None:
        for _ in range(10):
            log.append("a", padding="x" * 50)

    threads = [threading.Thread(target=several) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files = log.files()
    assert len(files) > 3 and files[0].name.startswith("log.1-") and files[-1] == log.path
    assert all(file.stat().st_size < 700 + 300 and file.stat().st_mode & 0o077 == 0 for file in files)
    assert [entry["line"] for entry in log.entries()] == list(range(1, 31)) and log.verify() == []


def test_a_torn_line_is_taken_out_before_the_next(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "log")
    write(log, *"ab")
    with log.path.open("ab") as file:
        file.write(b'{"line": 3, "ev')
    write(log, "c")
    assert events(log) == "abc" and log.verify() == []
    with log.path.open("ab") as file:
        file.write(b'{"line": 4, "ev')
    rename(log.path, "log.1")
    write(log, "d")
    assert events(log) == "abcd" and log.verify() == []
    rename(log.path, "log.2")
    log.path.write_bytes(b'{"line": 5, "ev')
    write(log, "e")
    assert events(log) == "abcde" and log.verify() == []


def test_both_books_agree_over_rotated_files_and_miss_a_deleted_one(tmp_path: Path) -> None:
    ledger = PrivacyLedger(tmp_path / "ledger.sqlite")
    ledger.set_budget(PrivacyBudget(8.0, 1e-5))
    books = Books(tmp_path / "ledger.sqlite", tmp_path / "audit.jsonl")
    for _ in range(3):
        books.append("answered")
    head = books.head()
    rename(books.log.path, "audit.jsonl.1")
    books.check()
    for _ in range(3):
        books.append("answered")
    assert books.problems() == ([], []) and books.against(head) == []
    kept = (tmp_path / "audit.jsonl.1").read_bytes()
    (tmp_path / "audit.jsonl.1").unlink()
    assert "lines 1 to 3 are missing" in books.log.verify()[0]
    assert books.against(head) and books.problems()[1]
    (tmp_path / "audit.jsonl.1").write_bytes(kept)
    books.check()
    (tmp_path / "audit.jsonl.1").unlink()  # for good: its owner says so, and the node goes on
    assert books.accept() and books.accept() == []
    books.append("answered")
    books.check()
    assert books.problems() == ([], [])
    assert json.loads(books.log.path.read_text().splitlines()[-1])["line"] == 8
    ledger.close()


def test_a_file_that_cannot_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(tmp_path / "log")
    write(log, "a")
    rename(log.path, "log.1")

    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(LedgerError, match="cannot be read"):
        log.head()
