"""The lines of a log that goes on over several files: the present one, and older ones beside it.

A log `audit.jsonl` that has grown large is renamed by whoever writes it (`audit.jsonl.1-52341`, after the
lines that are in it), or at any time by the machine's own log rotation (`audit.jsonl.1`,
`audit.jsonl-20261130`, also compressed: `.gz`). Which file comes before which is said by the hash chain of
their lines and not by their names: before a file comes the one whose last line has the hash that its first
line names. So another copy beside the log (`audit.jsonl.bak`) is no part of it.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from fedtune.config.files import sync_folder
from fedtune.privacy.ledger.chain import hash_entry

__all__ = ["LARGEST", "append_line", "last_line", "log_files", "numbered_lines", "set_aside"]

LARGEST = 2**25  # bytes of one file, before it is set aside
_TRIES = 5  # to read files that somebody renames meanwhile


def log_files(path: Path) -> list[tuple[Path, list[bytes]]]:
    """The files of the log `path` that are there, oldest first, each with its lines.

    Where files were renamed or compressed meanwhile, which looks as if lines were missing, all is read again.

    Raises:
        OSError: one cannot be read.
    """
    for _ in range(_TRIES):
        names = _state(path)
        try:
            found = _chained(path)
        except FileNotFoundError:
            continue
        if _state(path) == names:
            return found
    return _chained(path)


def _state(path: Path) -> list[tuple[str, int]]:
    """The names of a log's files, and which file each is; the present one's may grow."""
    if not path.parent.exists():
        return []
    with os.scandir(path.parent) as entries:
        return sorted((one.name, one.inode()) for one in entries if one.name.startswith(path.name))


def _chained(path: Path) -> list[tuple[Path, list[bytes]]]:
    present = _complete(path.read_bytes()) if path.exists() else []
    found, first = [(path, present)] if present else [], present[0] if present else None
    others = None if first is not None and _starts_a_log(first) else _others(path)
    while others:
        last = _before(first, others)
        if last is None:
            break
        lines = others.pop(last)
        found.insert(0, (last, lines))
        first = lines[0]
        if _starts_a_log(first):
            break
    return found


def numbered_lines(path: Path) -> list[tuple[int, bytes]]:
    """All lines of the log `path`, oldest first, with their numbers.

    They begin with 1, unless older files are not there any more. Raises OSError if a file cannot be read.
    """
    lines = [line for _, lines in log_files(path) for line in lines]
    first = number_of(lines[0]) if lines else 0
    return list(enumerate(lines, start=max(first, 1)))


def last_line(path: Path) -> tuple[int, bytes]:
    """(number, last complete line) of the log `path`; (0, b"") where it has none.

    Raises:
        OSError: a file cannot be read.
    """
    try:
        with path.open("rb") as file:
            if last := _last_of(file):
                return _number_in(file, last), last
    except FileNotFoundError:
        pass
    lines = numbered_lines(path)
    return lines[-1] if lines else (0, b"")


def append_line(path: Path, line: bytes) -> None:
    """Adds a line durably to the present file, which is made, readable by its owner alone, if it is missing.

    A line that was torn before is cut off first, and one that cannot be written whole is taken out again.

    Raises:
        OSError: it cannot be written.
    """
    private = lambda name, flags: os.open(name, flags, 0o600)  # noqa: E731
    with open(path, "a+b", buffering=0, opener=private) as file:  # it is cut and written by its number
        end = _end_of_lines(file)
        os.ftruncate(file.fileno(), end)
        if end == 0:
            sync_folder(path.parent)  # the name of a new file must survive a power cut too
        try:
            _write(file.fileno(), line)
        except OSError:
            os.ftruncate(file.fileno(), end)
            raise


def set_aside(path: Path) -> None:
    """Renames a present file that has become too large, after the lines that are in it.

    Raises:
        OSError: it cannot be read or renamed.
    """
    try:
        if path.stat().st_size < LARGEST:
            return
        with path.open("rb") as file:
            first, last = file.readline(), _last_of(file)
            numbers = f"{max(number_of(first), 1)}-{_number_in(file, last)}"
            os.fsync(file.fileno())  # the last line's writer may have died before it was durable
    except FileNotFoundError:
        return
    path.replace(path.with_name(f"{path.name}.{numbers}"))
    sync_folder(path.parent)


def number_of(line: bytes) -> int:
    """The number that a line says it has; 0 if it says none, as lines of version 0.1."""
    number = _field(line, "line")
    return number if type(number) is int and number > 0 else 0


def _others(path: Path) -> dict[Path, list[bytes]]:
    """The lines of what may be older files of a log, by file."""
    found = {}
    for file in sorted(path.parent.glob(f"{path.name}[.-]*")):
        if file.suffix == ".lock" or not file.is_file():
            continue
        content = file.read_bytes()
        if file.suffix == ".gz":
            try:
                content = gzip.decompress(content)
            except (EOFError, zlib.error, gzip.BadGzipFile):
                continue  # it is being made, or broken: its lines are missing
        if lines := _complete(content):
            found[file] = lines
    return found


def _before(first: bytes | None, others: Mapping[Path, list[bytes]]) -> Path | None:
    """Which of the other files comes before the one whose first line is `first` (None: it has none yet)."""
    if first is None:
        return max(others, key=lambda name: number_of(others[name][-1]))
    previous = _field(first, "previous")
    return next((name for name, lines in others.items() if hash_entry(lines[-1]) == previous), None)


def _complete(content: bytes) -> list[bytes]:
    """The lines of a file, without one that was torn: it is cut off before the next is written."""
    return content[: content.rfind(b"\n") + 1].splitlines()


def _starts_a_log(line: bytes) -> bool:
    return number_of(line) <= 1


def _field(line: bytes, name: str) -> Any:
    try:
        return json.loads(line).get(name)
    except (ValueError, AttributeError):
        return None


def _number_in(file: IO[bytes], last: bytes) -> int:
    """The number of the last line: as it says, or counted, where it was written before lines had numbers."""
    if number := number_of(last):
        return number
    file.seek(0)
    return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def _write(descriptor: int, line: bytes) -> None:
    """All of it, on the disk."""
    while line:
        line = line[os.write(descriptor, line) :]
    os.fsync(descriptor)


def _end_of_lines(file: IO[bytes]) -> int:
    """Where the last complete line of an open file ends."""
    end: int = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 4096)
        file.seek(start)
        block = file.read(end - start)
        if (newline := block.rfind(b"\n")) >= 0:
            end = start + newline + 1
            break
        end = start
    return end


def _last_of(file: IO[bytes]) -> bytes:
    """The last complete line of an open file, b'' if it has none."""
    end = _end_of_lines(file)
    block = b""
    while end > 0 and b"\n" not in block.rstrip(b"\n"):
        start = max(0, end - 4096)
        file.seek(start)
        block, end = file.read(end - start) + block, start
    stripped: bytes = block.rstrip(b"\n")
    return stripped.rsplit(b"\n", 1)[-1]
