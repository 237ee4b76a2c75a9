"""A node's two books, and what each knows of the other: the privacy ledger, and the audit log.

After each answer the log gets a line that names the ledger's head (`ledger`: number and hash of its last
row), and the ledger a row that names the log's (`fedtune.privacy.ledger.witness`). A node compares before
it starts and before each answer, and `proof` compares all of it. So found and named are: a ledger that was
rolled back (a backup of before a run), cut or written anew; an audit log that was cut, rotated, removed or
written anew. A crash between the two leaves the later book one entry ahead, which is no reason for a
complaint.

Both rolled back together look whole. Against that a head of both is kept elsewhere: `Books.head`, which the
administrator files or the server keeps, and `Books.against`, which holds the books to it.

What a head tells whoever keeps it: how many rows and lines there are, that is, how often this node was asked
and released; and two hashes, of rows that hold counts, times, plans and keyed names, and no text of the data.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedtune.errors import ConfigError, LedgerError
from fedtune.federation.client.audit_log import AuditLog
from fedtune.privacy.ledger.witness import Head, ledger_head, ledger_row, note_witness, witnesses

__all__ = ["Books", "parts_of"]

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


class Books:
    """The ledger and the audit log of one node, as files."""

    def __init__(self, ledger: Path, log: Path) -> None:
        self.ledger, self.log = ledger, AuditLog(log)

    def append(self, event: str, **values: Any) -> None:
        """Adds a line that names the ledger's head, then has the ledger name the line.

        Raises ResourceError if the line cannot be written. Books that `check` complains of do not name one
        another any more (`ledger`: null), or the complaint would be silenced by its own line.
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
            note_witness(self.ledger, line)

    def check(self) -> None:
        """Raises LedgerError if the last entry of one book is not what the other knows."""
        if problems := self._rolled_back(last=True) + self._cut(last=True):
            raise LedgerError(f"{problems[0]} Nothing is released.")

    def problems(self) -> tuple[list[str], list[str]]:
        """All that one book knows otherwise than the other says: (of the ledger, of the audit log).

        Raises LedgerError for a book that cannot be read.
        """
        return self._rolled_back(), self._cut()

    def accept(self) -> list[str]:
        """Has the owner accept that the audit log lost lines; both books say so from now on. What was
        accepted.

        Raises LedgerError for a ledger that lost rows: what they released would be forgotten.
        """
        ledger, log = self.problems()
        if ledger:
            raise LedgerError(f"{ledger[0]} That cannot be accepted.")
        found = [*log, *(f"The audit log: {one}" for one in self.log.verify(after=self.accepted()[0]))]
        if found:
            self.append("accepted", problems=found)
        return found

    def accepted(self) -> tuple[int, int]:
        """(line by which the owner accepted what was wrong before it, the ledger's row then), or zeros."""
        found = (0, 0)
        for number, one in enumerate(self.log.entries(), 1):
            head = _named(one)
            if one.get("event") == "accepted" and head is not None:
                found = int(one.get("line", number)), head.number
        return found

    # --- outside anchors ----------------------------------------------------------------------------

    def head(self) -> str:
        """Both heads in one line: what the administrator files, and the server is told."""
        ledger, log = ledger_head(self.ledger), self.log.head()
        return f"L{ledger.number}-{ledger.hash[:_SHORT]}.A{log.number}-{log.hash[:_SHORT]}"

    def against(self, head: str) -> list[str]:
        """What these books lack of a head that was kept elsewhere (nothing: they go on from it).

        Raises ConfigError for what is no head, LedgerError for a book that cannot be read.
        """
        row, row_hash, line, line_hash = parts_of(head)
        known = ledger_row(self.ledger, [row])[row]
        found = []
        if known is None or known[:_SHORT] != row_hash:
            last = ledger_head(self.ledger).number
            how = f"ends at row {last}" if known is None else "has another row there"
            found.append(
                f"The privacy ledger {self.ledger} {how}, and the head that was kept names row {row}: it was "
                f"rolled back, cut or written anew. {_RESTORE}"
            )
        hashes = self.log.hashes()
        if line and (line > len(hashes) or hashes[line - 1][:_SHORT] != line_hash):
            how = f"has {len(hashes)} lines" if line > len(hashes) else "has another line there"
            found.append(
                f"The audit log {self.log.path} {how}, and the head that was kept names line {line}: it was "
                f"cut, rotated, removed or written anew. {_ACCEPT}"
            )
        return found

    # --- inside -------------------------------------------------------------------------------------

    def _rolled_back(self, last: bool = False) -> list[str]:
        """What the audit log knows of the ledger, and is not so."""
        entries = [self.log.last()] if last else self.log.entries()
        if last and entries[0] and _named(entries[0]) is None:
            entries = self.log.entries()
        named = [
            (one.get("line", number), one.get("time", ""), head)
            for number, one in enumerate(entries, 1)
            if (head := _named(one)) is not None
        ]
        rows = ledger_row(self.ledger, [head.number for _, _, head in named])
        wrong = [one for one in named if rows[one[2].number] != one[2].hash]
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

    def _cut(self, last: bool = False) -> list[str]:
        """What the ledger knows of the audit log, and is not so."""
        named = witnesses(self.ledger, 1 if last else -1)
        if last and (not named or named[0].log == self.log.head()):
            return []
        hashes, (_, accepted) = self.log.hashes(), self.accepted()
        wrong = [one for one in named if one.row > accepted and one.log.number and not _has(hashes, one.log)]
        if not wrong:
            return []
        one = wrong[-1]
        how = (
            f"it has {len(hashes)} lines, so it was cut, rotated or removed"
            if one.log.number > len(hashes)
            else f"its line {one.log.number} is another, so it was cut and went on, or was written anew"
        )
        return [
            f"The audit log {self.log.path} is not what the privacy ledger knows: row {one.row} "
            f"({one.time[:19]}) names line {one.log.number}, and {how}. {_ACCEPT}"
        ]


def parts_of(head: str) -> tuple[int, str, int, str]:
    """(row, its hash, line, its hash) of what `Books.head` made. Raises ConfigError for anything else."""
    found = _HEAD.fullmatch(head.strip())
    if found is None:
        raise ConfigError(
            f"{head[:80]!r} is no head of books: it should look like L12-{'0' * _SHORT}.A34-{'0' * _SHORT}, "
            "as `fedtune node proof --config node.yaml` prints it."
        )
    return int(found[1]), found[2], int(found[3]), found[4]


def _named(entry: dict[str, Any]) -> Head | None:
    """The ledger's head that a line of the log names."""
    head = entry.get("ledger")
    if isinstance(head, list) and len(head) == 2 and type(head[0]) is int and isinstance(head[1], str):
        return Head(head[0], head[1])
    return None


def _has(hashes: list[str], head: Head) -> bool:
    return head.number <= len(hashes) and hashes[head.number - 1] == head.hash
