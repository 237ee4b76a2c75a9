"""Files that are there whole or not at all: secrets, keys, and what a run goes on from.

The content is written beside its place, under its final mode, synced, and only then given its name; the
folder is synced last. So a full disk, a `kill -9` or a power cut leaves what was there before, or nothing:
never an empty or a torn file, and never a secret that others may read for a moment.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

__all__ = ["create_whole", "replace_whole", "sync_folder"]

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def replace_whole(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Puts `content` in the place of `path`, readable as `mode` and the umask say.

    Raises OSError; what was there before is then as it was.
    """
    beside = _written_beside(path, content, mode)
    try:
        beside.replace(path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def create_whole(path: Path, content: bytes, *, mode: int = 0o600) -> None:
    """Writes `content` to a new file `path`, and never over one that is there.

    Raises FileExistsError if there is one, OSError if it cannot be written; there is no such file then.
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
    """Makes a new name in `folder` durable. Not possible on Windows, where it is also not needed."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _written_beside(path: Path, content: bytes, mode: int) -> Path:
    """A synced file with `content` beside `path`. Raises OSError, and leaves no file then."""
    beside = path.parent / f".{path.name}.{os.getpid()}.tmp"
    beside.unlink(missing_ok=True)  # of a process that died, and may have had another mode
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    handle = os.open(beside, flags, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(handle)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    return beside
