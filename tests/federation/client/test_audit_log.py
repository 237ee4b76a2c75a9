"""Issue 10, item 3 (PITFALLS 34): a book that is wound back, cut or written anew is found by the other."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from fedtune.errors import ConfigError, LedgerError
from fedtune.federation.client.audit_log import Books
from fedtune.privacy.ledger.ledger import PrivacyBudget, PrivacyLedger
from tests.support.plans import local_plan

ROUNDS = 5


class Node:
    """Two books, kept as a worker keeps them."""

    def __init__(self, root: Path) -> None:
        self.root, self.round = root, 0
        self.ledger_path, self.log_path = root / "ledger.sqlite", root / "audit.jsonl"
        self.ledger().set_budget(PrivacyBudget(1000.0, 1e-3))

    def ledger(self) -> PrivacyLedger:
        return PrivacyLedger(self.ledger_path)

    def books(self) -> Books:
        return Books(self.ledger_path, self.log_path)

    def release(self, log: bool = True) -> None:
        self.round += 1
        ledger = self.ledger()
        done = ledger.reserve(
            dataset="d", fingerprint="f", node="clinic-1", run=f"r{self.round}", round=1, plan=local_plan()
        )
        ledger.commit(done)
        ledger.close()
        if log:
            self.books().append("released", round=self.round)

    def backup(self) -> Path:
        """Copies the folder as it is now."""
        self.ledger().verify()
        return Path(shutil.copytree(self.root, self.root.parent / f"backup-{self.round}"))

    def restore(self, backup: Path, *names: str) -> None:
        for name in names:
            for path in self.root.glob(f"{name}*"):
                path.unlink()
            for path in backup.glob(f"{name}*"):
                shutil.copy2(path, self.root)

    def problems(self) -> tuple[str, str]:
        ledger, log = self.books().problems()
        return " ".join(ledger), " ".join(log)

    def lines(self) -> list[str]:
        return self.log_path.read_text().splitlines()

    def write(self, lines: list[str]) -> None:
        self.log_path.write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture
def node(tmp_path: Path) -> Node:
    (tmp_path / "state").mkdir()
    made = Node(tmp_path / "state")
    for _ in range(ROUNDS):
        made.release()
    return made


def refused(node: Node, words: str) -> None:
    """Before an answer, too, where only the last entries are compared."""
    with pytest.raises(LedgerError, match=words):
        node.books().check()


def test_whole_books_are_whole_and_name_one_another(node: Node) -> None:
    assert node.problems() == ("", "") and node.books().log.verify() == []
    node.books().check()
    rows, problems = node.ledger().verify()
    assert problems == [] and rows == node.books().log.last()["ledger"][0] + 1, "and a row for the line"
    assert [json.loads(line)["line"] for line in node.lines()] == [1, 2, 3, 4, 5]


def test_an_older_ledger_beside_a_newer_log_is_found(node: Node) -> None:
    backup = node.backup()
    node.release()
    node.release()
    node.restore(backup, "ledger")
    assert node.ledger().verify()[1] == [], "by itself it is whole"
    ledger, log = node.problems()
    assert "line 6" in ledger and "rolled back or cut" in ledger and "later lines" in ledger and not log
    assert "Restore the newest copy" in ledger
    refused(node, "rolled back or cut")
    with pytest.raises(LedgerError, match="cannot be accepted"):
        node.books().accept()


def test_a_complaint_is_not_silenced_by_the_lines_that_tell_of_it(node: Node) -> None:
    backup = node.backup()
    node.release()
    node.restore(backup, "ledger")
    for _ in range(3):
        refused(node, "rolled back or cut")
        node.books().append("refused", reason="the ledger was rolled back")
    node.write(node.lines()[:4])
    for _ in range(2):
        refused(node, "names line 5, and it has . lines|names line 5, and its line 5 is another")
        node.books().append("refused", reason="the log was cut")


def test_a_ledger_that_grew_again_after_it_was_rolled_back_is_found(node: Node) -> None:
    backup = node.backup()
    node.release()
    node.release()
    node.restore(backup, "ledger")
    for _ in range(3):
        node.release(log=False)  # in another process that did not look
    ledger, _ = node.problems()
    assert "is another, so it was written anew" in ledger
    refused(node, "written anew")


def test_a_ledger_whose_chain_was_written_anew_passes_verify_and_is_found(node: Node) -> None:
    from fedtune.privacy.ledger import chain

    with sqlite3.connect(node.ledger_path) as connection:
        rows = connection.execute("SELECT seq, time, kind, run, body, previous, hash FROM log").fetchall()
        connection.execute("DROP TRIGGER log_is_not_edited")
        previous = chain.GENESIS
        for seq, time, kind, run, body, _, _ in rows:
            body = body.replace('"noise_multiplier":1', '"noise_multiplier":9')
            digest = chain._digest(seq, time, kind, run, body, previous)
            connection.execute(
                "UPDATE log SET body=?, previous=?, hash=? WHERE seq=?", (body, previous, digest, seq)
            )
            previous = digest
        (trigger,) = [sql for sql in chain._SCHEMA if "log_is_not_edited" in sql]
        connection.execute(trigger)
    assert node.ledger().verify()[1] == []
    assert "written anew" in node.problems()[0]
    refused(node, "written anew")


@pytest.mark.parametrize("left", [0, 1, 4])
def test_a_log_that_was_cut_is_found(node: Node, left: int) -> None:
    node.write(node.lines()[:left])
    assert node.books().log.verify() == [], "by itself it is whole"
    ledger, log = node.problems()
    assert not ledger and f"it has {left} lines, so it was cut, rotated or removed" in log
    assert "names line 5" in log and "fedtune node accept" in log
    refused(node, "cut, rotated or removed")


def test_a_log_that_was_removed_or_rotated_is_found(node: Node) -> None:
    kept = node.lines()
    node.log_path.unlink()
    refused(node, "it has 0 lines")
    node.books().log.append("answered")  # it goes on in a new file
    assert "it has 1 lines" in node.problems()[1]
    node.write(kept)
    assert node.problems() == ("", ""), "the lines are back"


def test_a_log_that_was_written_anew_is_found(node: Node) -> None:
    kept = node.lines()
    node.log_path.unlink()
    for line in kept:
        entry = json.loads(line)
        node.books().log.append("answered", ledger=entry["ledger"])
    assert node.books().log.verify() == []
    assert "its line 5 is another" in node.problems()[1]
    refused(node, "written anew")


def test_a_lost_log_is_accepted_by_its_owner_and_that_is_noted_in_both_books(node: Node) -> None:
    node.write(node.lines()[:2])
    before = len(node.ledger().releases())
    accepted = node.books().accept()
    assert len(accepted) == 1 and "names line 5" in accepted[0]
    node.books().check()
    assert node.problems() == ("", "")
    entry = node.books().log.last()
    assert (entry["event"], entry["line"], entry["problems"]) == ("accepted", 3, accepted)
    assert len(node.ledger().releases()) == before, "what the ledger counts stays"
    node.release()
    node.books().check()
    node.write(node.lines()[:3])  # what is lost later is another matter
    assert "names line 4" in node.problems()[1]
    assert node.books().accept() and node.books().accept() == []


def test_a_bad_line_is_named_and_may_be_accepted(node: Node) -> None:
    lines = node.lines()
    node.write([*lines[:2], lines[2][:20], *lines[3:]])
    assert node.books().log.verify() == [
        "line 3 is no entry",
        "line 4 does not follow line 3: one of them was replaced",
    ]
    assert len(node.books().accept()) == 3, "the ledger knows that line too"
    assert node.books().log.verify(after=node.books().accepted()[0]) == [] and node.problems() == ("", "")


@pytest.mark.parametrize("ahead", ["row", "line", "nothing named"])
def test_a_crash_between_the_two_is_no_reason_for_a_complaint(node: Node, ahead: str) -> None:
    if ahead == "row":
        node.release(log=False)
    elif ahead == "line":
        now = node.ledger().state()
        node.books().log.append("released", ledger=[now.seq, now.hash])
    else:
        node.books().log.append("refused")  # a line of version 0.1
    node.books().check()
    assert node.problems() == ("", "")
    node.release()
    assert node.problems() == ("", "")


def test_clocks_that_go_back_are_no_matter(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    import datetime

    class Earlier(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Earlier:
            return cls(1999, 1, 1, tzinfo=tz)

    monkeypatch.setattr("fedtune.federation.client.audit_log.datetime.datetime", Earlier)
    monkeypatch.setattr("fedtune.privacy.ledger.chain.datetime", Earlier)
    node.release()
    assert json.loads(node.lines()[-1])["time"].startswith("1999")
    assert node.problems() == ("", "") and node.ledger().verify()[1] == []


def test_both_rolled_back_together_are_found_by_a_head_that_was_kept_elsewhere(node: Node) -> None:
    backup = node.backup()
    early = node.books().head()
    node.release()
    late = node.books().head()
    assert node.books().against(early) == node.books().against(late) == []
    node.restore(backup, "ledger", "audit")
    assert node.problems() == ("", ""), "they agree with one another"
    assert node.books().against(early) == []
    ledger, log = node.books().against(late)
    assert "rolled back, cut or written anew" in ledger and "names line 6" in log
    node.release()
    assert len(node.books().against(late)) == 2, "nor when they have grown as long again"


@pytest.mark.parametrize("change", [lambda h: "", lambda h: h[:-1], lambda h: h.upper(), lambda h: f"x{h}"])
def test_what_is_no_head_is_told(node: Node, change: Callable[[str], str]) -> None:
    with pytest.raises(ConfigError, match="is no head of books"):
        node.books().against(change(node.books().head()))


def test_a_head_holds_numbers_and_hashes_only(node: Node) -> None:
    import re

    assert re.fullmatch(r"L\d+-[0-9a-f]{24}\.A5-[0-9a-f]{24}", node.books().head())


def test_a_ledger_that_cannot_be_used_is_named_by_no_line(node: Node) -> None:
    node.ledger_path.write_bytes(b"no ledger")
    node.books().append("refused", reason="the ledger is broken")
    assert node.books().log.last()["ledger"] is None
    with pytest.raises(LedgerError):
        node.books().problems()
