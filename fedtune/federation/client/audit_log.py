"""A node's own log of what was asked of it and what left it: one JSON object a line, append-only.

Each line carries its number and the hash of the line before it, so that a line which was changed, moved or
taken out shows (`verify`); what was cut off at the end shows against the privacy ledger, which names the
log's head (`fedtune.federation.client.books`). A line that was torn while it was written (a full disk, a
crash) is taken out again: its answer has not left. Several processes may write. It holds nothing of the
data, but what a site has spent and refused is its own business: mode 0600.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedtune.config.files import lock_file
from fedtune.errors import LedgerError, ResourceError
from fedtune.privacy.ledger.witness import Head

__all__ = ["AuditLog"]

_START = "0" * 64


class AuditLog:
    """The log in one file; made by the first entry."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: str, **values: Any) -> Head:
        """Adds one line, durably, with its number, the time and the hash of the line before it; the new head.

        Raises ResourceError if it cannot be written: a node that cannot log does not answer.
        """
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            private = lambda path, flags: os.open(path, flags, 0o600)  # noqa: E731
            lock = lock_file(self.path.with_name(f"{self.path.name}.lock"))
            with lock, open(self.path, "a+b", opener=private) as file:
                end = _end_of_lines(file)
                last = _last_line(file)
                entry = {
                    "line": _number(file, last) + 1,
                    "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
                    "event": event,
                    **values,
                    "previous": _hash(last),
                }
                # ASCII: a server may send half a surrogate pair, which no encoding of text can hold.
                line = json.dumps(entry).encode() + b"\n"
                try:
                    _write(file.fileno(), line)
                except OSError:
                    os.ftruncate(file.fileno(), end)
                    raise
                return Head(int(entry["line"]), _hash(line[:-1]))
        except OSError as error:
            raise ResourceError(
                f"The node's audit log cannot be written ({error.strerror}), so the node answers "
                f"nothing. Make room "
                "or give permission; its administrator knows where."
            ) from error

    def head(self) -> Head:
        """The last line; (0, zeros) where there is none. Raises LedgerError."""
        try:
            with self.path.open("rb") as file:
                last = _last_line(file)
                return Head(_number(file, last), _hash(last))
        except FileNotFoundError:
            return Head(0, _START)
        except OSError as error:
            raise LedgerError(f"The audit log {self.path} cannot be read ({error.strerror}).") from error

    def last(self) -> dict[str, Any]:
        """The last line, empty where there is none or it is no entry. Raises LedgerError."""
        try:
            with self.path.open("rb") as file:
                entry = json.loads(_last_line(file) or b"{}")
        except (FileNotFoundError, ValueError):
            return {}
        except OSError as error:
            raise LedgerError(f"The audit log {self.path} cannot be read ({error.strerror}).") from error
        return entry if isinstance(entry, dict) else {}

    def hashes(self) -> list[str]:
        """The hash of each line, oldest first. Raises LedgerError."""
        return [_hash(line) for line in self._lines()]

    def entries(self) -> list[dict[str, Any]]:
        """All lines that are entries, oldest first; `verify` names the others. Raises LedgerError."""
        found = []
        for line in self._lines():
            with suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict):
                    found.append(entry)
        return found

    def verify(self, *, after: int = 0) -> list[str]:
        """What is wrong with the chain of lines after line `after` (nothing: it is whole).

        Raises LedgerError.
        """
        problems, before = [], b""
        for number, line in enumerate(self._lines(), start=1):
            if number <= after:
                before = line
                continue
            try:
                entry = json.loads(line)
                named = entry.get("previous")
            except (ValueError, AttributeError):
                problems.append(f"line {number} is no entry")
            else:
                if named is None:
                    problems.append(f"line {number} does not say which line it follows")
                elif named != _hash(before):
                    problems.append(f"line {number} does not follow the line before it")
            before = line
        return problems

    def _lines(self) -> list[bytes]:
        try:
            return self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise LedgerError(f"The audit log {self.path} cannot be read ({error.strerror}).") from error


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest() if line else _START


def _number(file: Any, last: bytes) -> int:
    """The number of the last line: as it says, or counted, where it was written before lines had numbers."""
    try:
        number = json.loads(last)["line"]
        if type(number) is int and number > 0:
            return number
    except (ValueError, KeyError, TypeError):
        pass
    file.seek(0)
    return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def _write(descriptor: int, line: bytes) -> None:
    """All of it, on the disk."""
    while line:
        line = line[os.write(descriptor, line) :]
    os.fsync(descriptor)


def _end_of_lines(file: Any) -> int:
    """The size of an open file, once what follows its last complete line has been cut off."""
    end: int = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 4096)
        file.seek(start)
        block = file.read(end - start)
        if (found := block.rfind(b"\n")) >= 0:
            end = start + found + 1
            break
        end = start
    if end < file.seek(0, os.SEEK_END):
        os.ftruncate(file.fileno(), end)
    return end


def _last_line(file: Any) -> bytes:
    """The last complete line of an open file, b'' if it has none."""
    end = file.seek(0, os.SEEK_END)
    block = b""
    while end > 0 and b"\n" not in block.rstrip(b"\n"):
        start = max(0, end - 4096)
        file.seek(start)
        block, end = file.read(end - start) + block, start
    stripped: bytes = block.rstrip(b"\n")
    return stripped.rsplit(b"\n", 1)[-1]
