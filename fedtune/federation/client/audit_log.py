"""A node's own log of what was asked of it and what left it, and how it and the ledger vouch for each other.

`AuditLog`: one JSON object a line, append-only. Each line carries its number and the hash of the line before
it, so that a line which was changed, moved or taken out shows (`verify`). A line that was torn while it was
written (a full disk, a crash, a power cut) is no line, and is taken out: its answer has not left. Several
processes may write. It holds nothing of the data, but what a site has spent and refused is its own business:
mode 0600. When it has grown to 32 MiB the file is set aside under another name, and whoever rotates logs may
do so at any time: the older files beside it are read as one with it (`log_files`). One that is deleted is
missed.

`Books`: the log and the privacy ledger together. After each answer the log gets a line that names the
ledger's head (`ledger`: number and hash of its last row), and the ledger a row that names the log's
(`fedtune.privacy.ledger.audit_heads`). A node compares before it starts and before each answer, and `proof`
compares all of it. So found and named are: a ledger that was rolled back (a backup of before a run), cut or
written anew; an audit log that was cut, rotated, removed or written anew. A crash between the two leaves the
later one an entry ahead, which is no reason for a complaint.

Both rolled back together look whole. Against that a head of both is kept elsewhere: `Books.head`, which the
administrator files or the server keeps, and `Books.against`, which holds the books to it. A head tells
whoever keeps it how many rows and lines there are, that is, how often this node was asked and released; and
two hashes, of rows that hold counts, times, plans and keyed names, and no text of the data.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from fedtune.config.files import lock_file
from fedtune.errors import ConfigError, LedgerError, ResourceError
from fedtune.federation.client.log_files import (
    append_line,
    last_line,
    log_files,
    numbered_lines,
    set_aside,
)
from fedtune.privacy.ledger.audit_heads import audit_heads, ledger_head, note_audit_head, row_hashes
from fedtune.privacy.ledger.chain import GENESIS, Head, broken_link, hash_entry

__all__ = ["AuditLog", "Books", "parts_of"]

_T = TypeVar("_T")
_SHORT = 24  # hex digits of a hash in a head that people copy: 96 bits
_NUMBER = "[0-9]{1,18}"  # SQLite holds no larger one
_HEAD = re.compile(rf"L({_NUMBER})-([0-9a-f]{{{_SHORT}}})\.A({_NUMBER})-([0-9a-f]{{{_SHORT}}})")
_RESTORE = (
    "Restore the newest copy of the whole folder that holds both. Where there is none, what was released "
    "since is known to nobody: do not use this data for another run."
)
_ACCEPT = (
    "Put the lines back, in their order, from where they went. If they are gone for good, say so: `fedtune "
    "node accept --config node.yaml` notes it in both books, and the node starts again. What the ledger "
    "counts stays."
)


class AuditLog:
    """The log in one file, made by the first entry, and in older ones beside it (`log_files`)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: str, **values: Any) -> Head:
        """Adds one line, durably, with its number, the time and the hash of the line before it; the new head.

        Raises:
            ResourceError: it cannot be written; a node that cannot log does not answer.
        """
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with lock_file(self.path.with_name(f"{self.path.name}.lock")):
                set_aside(self.path)
                number, last = last_line(self.path)
                entry = {
                    "line": number + 1,
                    "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
                    "event": event,
                    **values,
                    "previous": hash_entry(last),
                }
                # ASCII: a server may send half a surrogate pair, which no encoding of text can hold.
                line = json.dumps(entry).encode()
                append_line(self.path, line + b"\n")
                return Head(number + 1, hash_entry(line))
        except OSError as error:
            raise ResourceError(
                f"The node's audit log cannot be written ({error.strerror}), so the node answers nothing. "
                "Make room or give permission; its administrator knows where."
            ) from error

    def head(self) -> Head:
        """The last line; (0, zeros) where there is none.

        Raises:
            LedgerError: the log cannot be read.
        """
        number, last = self._last()
        return Head(number, hash_entry(last)) if last else Head(0, GENESIS)

    def sync(self) -> None:
        """Makes durable what is there: the last line's writer may have died before it was.

        Raises:
            LedgerError: the log cannot be synced.
        """
        try:
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
        except FileNotFoundError:
            pass
        except OSError as error:
            raise LedgerError(f"The audit log {self.path} cannot be synced ({error.strerror}).") from error

    def last(self) -> dict[str, Any]:
        """The last line, empty where there is none or it is no entry.

        Raises:
            LedgerError: the log cannot be read.
        """
        try:
            entry = json.loads(self._last()[1] or b"{}")
        except ValueError:
            return {}
        return entry if isinstance(entry, dict) else {}

    def hashes(self) -> list[str]:
        """The hash of each line, oldest first; empty for one in an older file that is not there any more.

        Raises:
            LedgerError: the log cannot be read.
        """
        lines = self._lines()
        missing = lines[0][0] - 1 if lines else 0
        return [""] * missing + [hash_entry(line) for _, line in lines]

    def files(self) -> list[Path]:
        """The files that the log is in, oldest first.

        Raises:
            LedgerError: the log cannot be read.
        """
        return [file for file, _ in self._read(log_files)]

    def entries(self) -> list[dict[str, Any]]:
        """All lines that are entries, oldest first; `verify` names the others.

        Raises:
            LedgerError: the log cannot be read.
        """
        entries = []
        for _, line in self._lines():
            with suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict):
                    entries.append(entry)
        return entries

    def verify(self, *, after: int = 0) -> list[str]:
        """What is wrong with the chain of lines after line `after` (nothing: it is whole).

        Raises:
            LedgerError: the log cannot be read.
        """
        problems, before = [], Head(0, GENESIS)
        for number, line in self._lines():
            if number > after:
                try:
                    previous = json.loads(line).get("previous")
                except (ValueError, AttributeError):
                    problems.append(f"line {number} is no entry")
                else:
                    if wrong := broken_link(before, number, previous, kind="line"):
                        problems.append(wrong)
            before = Head(number, hash_entry(line))
        return problems

    def _lines(self) -> list[tuple[int, bytes]]:
        return self._read(numbered_lines)

    def _last(self) -> tuple[int, bytes]:
        return self._read(last_line)

    def _read(self, question: Callable[[Path], _T]) -> _T:
        try:
            return question(self.path)
        except OSError as error:
            raise LedgerError(f"The audit log {self.path} cannot be read ({error.strerror}).") from error


class Books:
    """The ledger and the audit log of one node, as files."""

    def __init__(self, ledger: Path, log: Path) -> None:
        self.ledger, self.log = ledger, AuditLog(log)

    def append(self, event: str, **values: Any) -> None:
        """Adds a line that names the ledger's head, then has the ledger name the line.

        Books that `check` complains of do not name one another any more (`ledger`: null), or the complaint
        would be silenced by its own line.

        Raises:
            ResourceError: the line cannot be written.
        """
        try:
            if event != "accepted":
                self.check()
            now = ledger_head(self.ledger)
        except LedgerError:
            self.log.append(event, **values, ledger=None)
            return
        line = self.log.append(event, **values, ledger=[now.number, now.hash])
        with suppress(LedgerError):
            note_audit_head(self.ledger, line)

    def check(self) -> None:
        """Compares the last entry of each book with what the other knows.

        Raises:
            LedgerError: they differ.
        """
        if problems := self._rolled_back(only_last=True) + self._cut(only_last=True):
            raise LedgerError(f"{problems[0]} Nothing is released.")

    def problems(self) -> tuple[list[str], list[str]]:
        """All that one book knows otherwise than the other says: (of the ledger, of the audit log).

        Raises:
            LedgerError: a book cannot be read.
        """
        return self._rolled_back(), self._cut()

    def accept(self) -> list[str]:
        """Has the owner accept that the audit log lost lines; both books say so from now on. What was
        accepted.

        Raises:
            LedgerError: the ledger lost rows; what they released would be forgotten.
        """
        ledger, log = self.problems()
        if ledger:
            raise LedgerError(f"{ledger[0]} That cannot be accepted.")
        broken = self.log.verify(after=self.accepted()[0])
        problems = [*log, *(f"The audit log: {problem}" for problem in broken)]
        if problems:
            self.append("accepted", problems=problems)
        return problems

    def accepted(self) -> tuple[int, int]:
        """(line by which the owner accepted what was wrong before it, the ledger's row then), or zeros."""
        accepted = (0, 0)
        for number, entry in enumerate(self.log.entries(), 1):
            head = _named(entry)
            if entry.get("event") == "accepted" and head is not None:
                accepted = int(entry.get("line", number)), head.number
        return accepted

    # --- outside anchors ----------------------------------------------------------------------------

    def head(self) -> str:
        """Both heads in one line: what the administrator files, and the server is told."""
        self.log.sync()
        ledger, log = ledger_head(self.ledger), self.log.head()
        return f"L{ledger.number}-{ledger.hash[:_SHORT]}.A{log.number}-{log.hash[:_SHORT]}"

    def against(self, head: str) -> list[str]:
        """What these books lack of a head that was kept elsewhere (nothing: they go on from it).

        Raises:
            ConfigError: it is no head.
            LedgerError: a book cannot be read.
        """
        row, row_hash, line, line_hash = parts_of(head)
        known = row_hashes(self.ledger, [row])[row]
        problems = []
        if known is None or known[:_SHORT] != row_hash:
            last = ledger_head(self.ledger).number
            how = f"ends at row {last}" if known is None else "has another row there"
            problems.append(
                f"The privacy ledger {self.ledger} {how}, and the head that was kept names row {row}: it was "
                f"rolled back, cut or written anew. {_RESTORE}"
            )
        hashes = self.log.hashes()
        if line and (line > len(hashes) or hashes[line - 1][:_SHORT] != line_hash):
            how = f"has {len(hashes)} lines" if line > len(hashes) else "has another line there"
            problems.append(
                f"The audit log {self.log.path} {how}, and the head that was kept names line {line}: it was "
                f"cut, rotated, removed or written anew. {_ACCEPT}"
            )
        return problems

    # --- inside -------------------------------------------------------------------------------------

    def _rolled_back(self, only_last: bool = False) -> list[str]:
        """What the audit log knows of the ledger, and is not so."""
        entries = [self.log.last()] if only_last else self.log.entries()
        if only_last and entries[0] and _named(entries[0]) is None:
            entries = self.log.entries()
        named = [
            (entry.get("line", number), entry.get("time", ""), head)
            for number, entry in enumerate(entries, 1)
            if (head := _named(entry)) is not None
        ]
        rows = row_hashes(self.ledger, [head.number for _, _, head in named])
        wrong = [line for line in named if rows[line[2].number] != line[2].hash]
        if not wrong:
            return []
        line, time, head = wrong[0]
        end = ledger_head(self.ledger).number
        how = (
            f"it ends at row {end}, so it was rolled back or cut"
            if rows[head.number] is None
            else f"its row {head.number} is another, so it was written anew"
        )
        more = f" So do {len(wrong) - 1} later lines." if len(wrong) > 1 else ""
        return [
            f"The privacy ledger {self.ledger} is not what the audit log knows: line {line} "
            f"({str(time)[:19]}) names row {head.number}, and {how}.{more} {_RESTORE}"
        ]

    def _cut(self, only_last: bool = False) -> list[str]:
        """What the ledger knows of the audit log, and is not so."""
        named = audit_heads(self.ledger, 1 if only_last else -1)
        if only_last and (not named or named[0].log == self.log.head()):
            return []
        hashes, (_, accepted) = self.log.hashes(), self.accepted()
        wrong = [row for row in named if row.row > accepted and row.log.number and not _has(hashes, row.log)]
        if not wrong:
            return []
        last = wrong[-1]
        how = (
            f"it has {len(hashes)} lines, so it was cut, rotated or removed"
            if last.log.number > len(hashes)
            else f"its line {last.log.number} is another, so it was cut and went on, or was written anew"
        )
        return [
            f"The audit log {self.log.path} is not what the privacy ledger knows: row {last.row} "
            f"({last.time[:19]}) names line {last.log.number}, and {how}. {_ACCEPT}"
        ]


def parts_of(head: str) -> tuple[int, str, int, str]:
    """(row, its hash, line, its hash) of what `Books.head` made.

    Raises:
        ConfigError: it is anything else.
    """
    parts = _HEAD.fullmatch(head.strip())
    if parts is None:
        raise ConfigError(
            f"{head[:80]!r} is no head of books: it should look like L12-{'0' * _SHORT}.A34-{'0' * _SHORT}, "
            "as `fedtune node proof --config node.yaml` prints it."
        )
    return int(parts[1]), parts[2], int(parts[3]), parts[4]


def _named(entry: dict[str, Any]) -> Head | None:
    """The ledger's head that a line of the log names."""
    head = entry.get("ledger")
    if isinstance(head, list) and len(head) == 2 and type(head[0]) is int and isinstance(head[1], str):
        return Head(head[0], head[1])
    return None


def _has(hashes: list[str], head: Head) -> bool:
    return head.number <= len(hashes) and hashes[head.number - 1] == head.hash
