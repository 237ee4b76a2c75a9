"""Machines whose disks fail: every write is a point at which the machine may die, or its disk refuse.

`Disks.installed` takes the place of what fedtune writes with (`os.open`, `os.write`, `os.fsync`,
`os.replace` and their like, and SQLite's connections) for files below a machine's folder. Before each write
`Machine.point` asks
whether something fails there:

- `kill`: the process dies; what was written stays, synced or not;
- `power`: the machine loses power, and with it whatever was not synced, in any part: contents of files that
  no `fsync` followed, names in a folder that was not synced, transactions that SQLite did not sync;
- `error`: this write fails, as on a full disk;
- `read-only`: all writes fail for a while.

Who died raises `Crash` through fedtune's code, and writes nothing more: whatever `except` or `finally` it
passes, each write there raises it again.
"""

from __future__ import annotations

import errno
import functools
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

__all__ = ["Crash", "Disks", "Machine"]

_FULL = sqlite3.OperationalError("database or disk is full")
_LOCKED = sqlite3.OperationalError("database is locked")


class Crash(BaseException):
    """A machine died. `kind`: `kill` or `power`."""

    def __init__(self, machine: Machine, kind: str) -> None:
        super().__init__(f"{machine.name}: {kind}")
        self.machine, self.kind = machine, kind


class Machine:
    """One machine with the folder that is its disk.

    Args:
        fate: called with the machine and what it is about to write: what fails there, "" for nothing.
    """

    def __init__(self, name: str, folder: Path, fate: Callable[[Machine, str], str]) -> None:
        self.name, self.folder, self._fate = name, folder, fate
        self.read_only = self.off = False
        self.failures = 0  # writes at which something failed
        self._died = ""
        self._files = _Files()
        self._databases: dict[str, _Database] = {}
        folder.mkdir()

    def point(self, what: str, error: Exception | None = None) -> None:
        """A write is about to happen.

        Raises:
            Crash: the machine dies here, or is dead.
            OSError, sqlite3.Error: the write fails; `error`, or that there is no room.
        """
        if self._died:
            raise Crash(self, self._died)
        fate = "error" if self.read_only else self._fate(self, what)
        if not fate:
            return
        self.failures += 1
        if fate == "error":
            number = errno.EROFS if self.read_only else errno.ENOSPC
            raise error or OSError(number, os.strerror(number))
        self._died = fate
        raise Crash(self, fate)

    def restart(self, cut: Callable[[int], int]) -> None:
        """Its disk as the next start finds it. `cut(n)`: a number from 0 to n, drawn."""
        from fedtune.privacy.ledger import ledger

        self.off = True  # what is written meanwhile is no write of fedtune's
        for key in [key for key in ledger._opened if key[0].startswith(f"{self.folder}/")]:
            ledger._opened.pop(key).close()
        self.forget()
        if self._died == "power":
            self._files.cut(cut)
            for database in self._databases.values():
                database.cut(cut)
        self._died, self.off = "", False

    def forget(self) -> None:
        """Closes connections to its databases that nobody uses."""
        for database in self._databases.values():
            database.forget()

    # --- what the patched functions do

    def wrote(self, do: Callable[[_Files], None]) -> None:
        do(self._files)

    def database(self, path: str) -> _Database:
        return self._databases.setdefault(path, _Database(path))


class _Files:
    """What of a machine's files is on the disk for good.

    A file is a number: names are moved from one to another, and an old one may come back.
    """

    def __init__(self) -> None:
        self._number = 0
        self._current: dict[str, int] = {}  # by path
        self._synced: dict[int, bytes] = {}  # content, by file
        self._names: dict[str, int] = {}  # that are synced, by path
        self._pending: dict[str, list[tuple[str, int | None]]] = {}  # by folder: what was done to names since

    def created(self, path: str) -> None:
        self._number += 1
        self._set(path, self._number)

    def removed(self, path: str) -> None:
        if path in self._current:
            self._set(path, None)

    def moved(self, source: str, target: str) -> None:
        if source in self._current:
            self._set(target, self._current[source])
            self._set(source, None)

    def linked(self, source: str, target: str) -> None:
        if source in self._current:
            self._set(target, self._current[source])

    def synced(self, path: str) -> None:
        if Path(path).is_dir():
            for name, file in self._pending.pop(path, []):
                if file is None:
                    self._names.pop(name, None)
                else:
                    self._names[name] = file
        elif path in self._current:
            self._synced[self._current[path]] = Path(path).read_bytes()

    def _set(self, path: str, file: int | None) -> None:
        if file is None:
            self._current.pop(path, None)
        else:
            self._current[path] = file
        self._pending.setdefault(str(Path(path).parent), []).append((path, file))

    def cut(self, cut: Callable[[int], int]) -> None:
        """Of unsynced names and contents a part, the first ones first, is left."""
        latest = {file: Path(path).read_bytes() for path, file in self._current.items()}
        names = dict(self._names)
        for operations in self._pending.values():
            for name, file in operations[: cut(len(operations))]:
                if file is None:
                    names.pop(name, None)
                else:
                    names[name] = file
        for path in self._current:
            Path(path).unlink(missing_ok=True)
        contents: dict[int, bytes] = {}
        for path, file in names.items():
            if file not in contents:
                contents[file] = self._left(file, latest, cut)
            Path(path).write_bytes(contents[file])
            Path(path).chmod(0o600)
        self._current, self._names, self._pending = dict(names), names, {}
        self._synced = contents

    def _left(self, file: int, latest: dict[int, bytes], cut: Callable[[int], int]) -> bytes:
        synced = self._synced.get(file, b"")
        now = latest.get(file, synced)
        if now == synced:
            return synced
        if now.startswith(synced):
            return now[: len(synced) + cut(len(now) - len(synced))]
        return now if cut(1) else synced


class _Database:
    """What of an SQLite file is on the disk for good."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._synced: dict[str, bytes] | None = None
        self._spare: dict[str, list[sqlite3.Connection]] = {}  # by address

    def opened(self, address: str, connect: Callable[[], sqlite3.Connection]) -> sqlite3.Connection:
        """A connection that was let go of, or another: to open one costs as much as to use it."""
        spare = self._spare.get(address)
        return spare.pop() if spare else connect()

    def let_go(self, address: str, raw: sqlite3.Connection) -> None:
        self._spare.setdefault(address, []).append(raw)

    def forget(self) -> None:
        """Closes what was let go of: its files are another's now."""
        for raw in (raw for spare in self._spare.values() for raw in spare):
            raw.close()
        self._spare = {}

    def committed(self, synchronous: int) -> None:
        """A transaction has ended; SQLite has synced its log if it is told to (FULL, or more)."""
        if synchronous >= 2:
            self._synced = self._now()

    def checkpointed(self, synchronous: int) -> None:
        """The log was written back, which syncs both unless SQLite is told never to (OFF)."""
        if synchronous >= 1:
            self._synced = self._now()

    def _now(self) -> dict[str, bytes]:
        files = [self.path, f"{self.path}-wal"]
        return {file: Path(file).read_bytes() for file in files if Path(file).exists()}

    def cut(self, cut: Callable[[int], int]) -> None:
        """What was not synced is gone, or there."""
        left = self._now() if cut(1) and self._synced is None else self._synced or {}
        for file in (self.path, f"{self.path}-wal", f"{self.path}-shm"):
            Path(file).unlink(missing_ok=True)
        for file, content in ({self.path: b""} | left).items():
            Path(file).write_bytes(content)
            Path(file).chmod(0o600)


@functools.cache
def _written_by(sql: str) -> str:
    """The verb of a statement that writes; "" for one that does not."""
    verb = " ".join(sql.split()[:2]).upper()
    if verb == "BEGIN IMMEDIATE":
        return "BEGIN"
    writes = verb.startswith(("INSERT", "CREATE", "COMMIT", "PRAGMA JOURNAL")) or "checkpoint" in sql
    return verb.split()[0] if writes else ""


class _Connection:
    """An SQLite connection whose writes are points of its machine."""

    def __init__(self, machine: Machine, path: str, address: str, connect: Callable[[], Any]) -> None:
        self._machine, self._database, self._address = machine, machine.database(path), address
        self._raw = self._database.opened(address, connect)

    @property
    def in_transaction(self) -> bool:
        return self._raw.in_transaction

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        what, machine = _written_by(sql), self._machine
        if what:
            machine.point(f"sql {what}", _LOCKED if what == "BEGIN" else _FULL)
        cursor = self._raw.execute(sql, *values)
        if what == "COMMIT":
            self._database.committed(self._synchronous())
            machine.point("sql COMMITTED", _FULL)  # SQLite may say so of what is there all the same
        elif "checkpoint" in sql:
            self._database.checkpointed(self._synchronous())
        return cursor

    def close(self) -> None:
        if self._raw.in_transaction or self._machine.off:
            self._raw.close()
        else:
            self._database.let_go(self._address, self._raw)

    def _synchronous(self) -> int:
        return int(self._raw.execute("PRAGMA synchronous").fetchone()[0])


class Disks:
    """All machines of a simulation, below one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.machines: dict[str, Machine] = {}

    def add(self, name: str, fate: Callable[[Machine, str], str]) -> Machine:
        machine = self.machines[name] = Machine(name, self.root / name, fate)
        return machine

    def _of(self, path: Any) -> tuple[Machine | None, str]:
        """Whose disk a path is on; nobody's where a power cut does not matter (locks, databases)."""
        text = os.fspath(path)
        if not isinstance(text, str):
            return None, ""
        text = str(Path(text).absolute()) if not text.startswith("/") else text
        prefix = f"{self.root}/"
        if not text.startswith(prefix) or text.endswith(".lock"):
            return None, text
        machine = self.machines.get(text[len(prefix) :].partition("/")[0])
        return (None if machine is None or machine.off else machine), text

    def _of_handle(self, handle: Any) -> tuple[Machine | None, str]:
        number = handle if isinstance(handle, int) else handle.fileno()
        return self._of(Path(f"/proc/self/fd/{number}").readlink())

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within it, what fedtune writes below `root` goes through here."""
        real = SimpleNamespace(
            open=os.open, write=os.write, fsync=os.fsync, replace=os.replace, link=os.link,
            unlink=os.unlink, ftruncate=os.ftruncate, connect=sqlite3.connect,
        )  # fmt: skip

        def opened(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            machine, text = self._of(path)
            if machine is None or not flags & os.O_CREAT:
                return int(real.open(path, flags, *rest, **more))
            new = not os.path.lexists(text)
            if new:
                machine.point(f"create {_short(text)}")
            handle = int(real.open(path, flags, *rest, **more))
            if new and ".sqlite" not in text:
                machine.wrote(lambda files: files.created(text))
            return handle

        def written(handle: int, data: Any) -> int:
            machine, text = self._of_handle(handle)
            if machine is not None:
                machine.point(f"write {_short(text)}")
            return int(real.write(handle, data))

        def synced(handle: Any) -> None:
            machine, text = self._of_handle(handle)
            if machine is None:
                return
            machine.point(f"fsync {_short(text)}")
            machine.wrote(lambda files: files.synced(text))

        def replaced(source: Any, target: Any, **more: Any) -> None:
            machine, text = self._of(target)
            if machine is not None:
                machine.point(f"rename {_short(text)}")
            real.replace(source, target, **more)
            if machine is not None:
                machine.wrote(lambda files: files.moved(os.fspath(source), text))

        def linked(source: Any, target: Any, **more: Any) -> None:
            machine, text = self._of(target)
            if machine is not None:
                machine.point(f"link {_short(text)}")
            real.link(source, target, **more)
            if machine is not None:
                machine.wrote(lambda files: files.linked(os.fspath(source), text))

        def unlinked(path: Any, **more: Any) -> None:
            machine, text = self._of(path)
            if machine is not None and os.path.lexists(text):
                machine.point(f"unlink {_short(text)}")
            real.unlink(path, **more)
            if machine is not None:
                machine.wrote(lambda files: files.removed(text))

        def truncated(handle: int, size: int) -> None:
            machine, text = self._of_handle(handle)
            if machine is not None:
                machine.point(f"truncate {_short(text)}")
            real.ftruncate(handle, size)

        def connected(address: str, **options: Any) -> Any:
            from urllib.parse import unquote, urlparse

            connect = functools.partial(real.connect, address, **options)
            machine, text = self._of(unquote(urlparse(str(address)).path))
            return connect() if machine is None else _Connection(machine, text, address, connect)

        from fedtune.privacy.ledger import chain

        shim = SimpleNamespace(
            connect=connected, Error=sqlite3.Error, Connection=sqlite3.Connection,
            OperationalError=sqlite3.OperationalError,
        )  # fmt: skip
        with ExitStack() as stack:
            for name, function in (
                ("open", opened), ("write", written), ("fsync", synced), ("replace", replaced),
                ("link", linked), ("unlink", unlinked), ("ftruncate", truncated),
            ):  # fmt: skip
                stack.enter_context(mock.patch.object(os, name, function))
            stack.enter_context(mock.patch.object(chain, "sqlite3", shim))
            for machine in self.machines.values():
                stack.callback(machine.forget)
            yield


def _short(path: str) -> str:
    """The name of a file; that of one beside it, before it has its own, without what differs between
    processes."""
    name = Path(path).name
    return f"{name.split('.')[1]}.tmp" if name.startswith(".") and name.endswith(".tmp") else name
