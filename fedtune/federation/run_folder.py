"""A run folder on the disk: durable writes, the lock that one process holds, and the run's number.

The number is drawn when the run begins, before any node is asked: what a simulated node releases first (its
size) is charged to it. A run that begins anew in the same folder, because an earlier one ended before its
first checkpoint, has another number.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fedtune.config.files import lock_file, replace_whole
from fedtune.errors import CheckpointError, ResourceError

__all__ = ["SIZES", "lock_folder", "new_run_number", "no_room", "run_number", "write_durably"]

SIZES = "sizes"  # the folder of what nodes told of their sizes; see `fedtune.federation.sizes`
_RUN = "run_number"


def run_number(run_dir: Path) -> str:
    """The number of the run in `run_dir`: that which was drawn for it, or a new one."""
    try:
        if known := (run_dir / _RUN).read_text(encoding="ascii").strip():
            return known
    except FileNotFoundError:
        pass
    return new_run_number(run_dir)


def new_run_number(run_dir: Path) -> str:
    """Draws the number of a run that begins in `run_dir`, and forgets what sizes an earlier one was told."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(run_dir / SIZES)
    run = secrets.token_hex(8)
    replace_whole(run_dir / _RUN, run.encode())
    return run


def write_durably(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Puts `content` in the place of `path`, whole and synced, readable as `mode` and the umask say.

    Raises:
        ResourceError: it cannot be written; what was there before is unchanged.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_whole(path, content, mode=mode)
    except OSError as error:
        raise no_room(path, error, len(content)) from error


def no_room(path: Path, error: OSError, size: int) -> ResourceError:
    """The error of a file of `size` bytes that cannot be written."""
    return ResourceError(
        f"The checkpoint {path} of {size} bytes cannot be written: {error.strerror or error}. Free some "
        "space or make the folder writable, and go on with `fedtune run resume=RUN_DIR`; the checkpoint "
        "before this one is intact."
    )


@contextmanager
def lock_folder(run_dir: Path) -> Iterator[None]:
    """Keeps every other process out of a run folder; the lock dies with the process, even by `kill -9`.

    Raises:
        CheckpointError: another process has it.
        ResourceError: the folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock_file(run_dir / ".lock", wait=False))
        except BlockingIOError as error:
            raise CheckpointError(
                f"The run folder {run_dir} is {error.strerror}. Wait until it has ended, or choose another "
                "folder by hydra.run.dir."
            ) from error
        except OSError as error:
            raise ResourceError(
                f"The run folder {run_dir} cannot be written: {error.strerror or error}. Choose another by "
                "hydra.run.dir."
            ) from error
        yield
