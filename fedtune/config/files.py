"""Where what outlives a run lies, files that are there whole or not at all, and locks between processes.

`state_dir` holds what must not be lost (privacy ledgers), `cache_dir` what can be made again. `FEDTUNE_HOME`
puts both below one folder; without it they are the platform's own user folders. They are apart because a
cache may be deleted at any time, while deleting a ledger deletes what is known about privacy already spent.

`replace_whole` and `create_whole` write the content beside its place, under its final mode, sync it, and only
then give it its name; the folder is synced last. So a full disk, a `kill -9` or a power cut leaves what was
there before, or nothing: never an empty or a torn file, and never a secret that others may read for a moment.

`lock_file` holds a file of its own, beside what it protects. The operating system releases it with the
process, however that ends, so there is no stale lock to remove.
"""

from __future__ import annotations

import difflib
import errno
import os
import shlex
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import platformdirs

from fedtune.errors import ResourceError

__all__ = [
    "being_written",
    "cache_dir",
    "create_whole",
    "lock_file",
    "meant_path",
    "replace_whole",
    "save",
    "state_dir",
    "sync_folder",
]

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def state_dir() -> Path:
    """Folder of what must not be lost (ledgers); made, readable by its owner only, if it is missing.

    Raises `ResourceError` if it cannot be made or is no folder.
    """
    return _folder("state", platformdirs.user_state_dir("fedtune", appauthor=False))


def cache_dir() -> Path:
    """Folder of what can be made again (data, tokens, calibrations); made if it is missing.

    Raises `ResourceError` if it cannot be made or is no folder.
    """
    return _folder("cache", platformdirs.user_cache_dir("fedtune", appauthor=False))


def _folder(kind: str, default: str) -> Path:
    home = os.environ.get("FEDTUNE_HOME", "").strip()
    path = Path(home).expanduser().absolute() / kind if home else Path(default)
    try:
        # Others on the machine have no business in ledgers or in cached private texts.
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        whose = f"FEDTUNE_HOME={home}" if home else "the platform's default"
        raise ResourceError(
            f"The {kind} folder {path} ({whose}) cannot be made: {error.strerror or error}. "
            "Set FEDTUNE_HOME to a folder that you may write to."
        ) from error
    return path


def replace_whole(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Replaces the file `path`, or makes it, with `content`; readable as `mode` and the umask say.

    Raises:
        OSError: it cannot be written; what was there before is unchanged.
    """
    if _only_takes(path):
        path.write_bytes(content)
        return
    beside = _written_beside(path, content, mode)
    try:
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def save(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """`replace_whole`, in a folder that is made if there is none, for files that a person asked for.

    Raises:
        ResourceError: the file cannot be written; with the way out.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_whole(path, content, mode=mode)
    except OSError as error:
        raise ResourceError(
            f"Cannot write {path}: {error.strerror or error}. Choose another folder with --output FOLDER."
        ) from error


@contextmanager
def being_written(path: Path) -> Iterator[IO[str]]:
    """A text file for a person that appears as `path` when the block ends; not at all if it raises.

    Only its owner can read it: what is written so may be private texts.

    Raises:
        ResourceError: the file cannot be written; with the way out.
    """
    beside = path.parent / f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp"
    try:
        if _only_takes(path):
            with path.open("w", encoding="utf-8", newline="") as file:
                yield file
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.unlink(missing_ok=True)  # of a process that died, and may have had another mode
        handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            yield file
        beside.replace(path)
    except OSError as error:
        raise ResourceError(
            f"Cannot write {path}: {error.strerror or error}. Choose another place with --output."
        ) from error
    finally:
        with suppress(OSError):  # also where there is no such folder, since a file has its name
            beside.unlink()


def meant_path(path: Path) -> str:
    """A sentence with the neighbour that `path` most likely meant; empty: it is there, or none is near.

    For the person at the keyboard alone: it names what lies there.
    """
    place = path.expanduser()
    with suppress(OSError, ValueError):
        if place.exists():
            return ""
        there = sorted(entry.name for entry in os.scandir(place.parent))
        near = difflib.get_close_matches(
            place.name.lower(), [name.lower() for name in there], n=3, cutoff=0.6
        )
        for name in (one for word in near for one in there if one.lower() == word):
            stem, other = (Path(one).stem.lower() for one in (place, name))  # v.csv is not what y.csv meant
            if difflib.SequenceMatcher(None, stem, other).ratio() >= 0.6:
                return f" Did you mean {shlex.quote(str(path.parent / name))}?"
    return ""


def create_whole(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Writes `content` to a new file `path`, and never over one that is there.

    Raises:
        FileExistsError: there is one.
        OSError: it cannot be written; there is no such file then.
    """
    if path.exists():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    beside = _written_beside(path, content, mode)
    try:
        try:
            os.link(beside, path)  # unlike a rename, it fails where somebody else was first
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            beside.replace(path)  # a file system without links
    finally:
        beside.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes a new name in `folder` durable.

    Raises:
        OSError: the folder cannot be opened or synced.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def lock_file(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Holds the lock `path`, which no other process and no other thread can hold meanwhile.

    The file stays when the lock is released; it holds the process id of its last holder.

    Args:
        path: a file of its own, made if missing.
        wait: wait for another holder; else fail at once.

    Raises:
        BlockingIOError: another holds it and `wait` is False; its `strerror` names the process.
        OSError: the file cannot be made or opened.
    """
    from filelock import FileLock, Timeout  # late: it takes 40 ms

    def write_holder(handle: int) -> None:
        with suppress(OSError):  # a full disk: the lock is held all the same
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode(), 0)

    # Not where locks are only files (fallback_to_soft): one of those outlives a killed process.
    lock = FileLock(
        path, mode=0o600, blocking=wait, thread_local=False, fallback_to_soft=False, on_acquired=write_holder
    )
    try:
        lock.acquire()
    except Timeout as error:
        holder = path.read_text(encoding="ascii", errors="replace")[:20].strip()
        reason = f"in use by process {holder}" if holder else "in use by another process"
        raise BlockingIOError(errno.EWOULDBLOCK, reason, str(path)) from error
    try:
        yield
    finally:
        lock.release()


def _only_takes(path: Path) -> bool:
    """Is it a device or a pipe (/dev/null), which is written to, and no file's place?"""
    return path.exists() and not path.is_file() and not path.is_dir()


def _written_beside(path: Path, content: bytes, mode: int) -> Path:
    """A synced file with `content` beside `path`. Raises OSError, and leaves no file then."""
    beside = path.parent / f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp"
    beside.unlink(missing_ok=True)  # of a process that died, and may have had another mode
    handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(handle)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return beside
