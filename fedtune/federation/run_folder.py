"""A run folder on the disk: durable writes, the lock of one process, the run's number, and `local.json`.

The number is drawn when the run begins, before any node is asked: what a simulated node releases first (its
size) is charged to it. A run that begins anew in the same folder, because an earlier one ended before its
first checkpoint, has another number.

`local.json` is for the owner of the data alone. Measured time, usage of the machine, notes about records and
the full text of errors depend on private records and were not charged, so `fedtune.privacy.publication` holds
them back from everything that is published; the person at the keyboard may see them all the same. Simulated
nodes, some of them in other processes, add their reasons to `local.log` beside it, line by line;
`collect_reasons` moves them.

    {"schema": 1, "note": ..., "record": {...}, "checkpoint": {...}, "reasons": [{node, round, told, reason}]}

`record` and `checkpoint` have the shape of what was published, with the local fields alone
(`publication.merge`). Both files are of mode 0600. Losing them costs their numbers and nothing else.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from fedtune.config.files import lock_file, replace_whole
from fedtune.config.shapes import parse_as, read_as
from fedtune.errors import CheckpointError, ResourceError

__all__ = [
    "LOCAL_NAME",
    "OFFSETS",
    "PERSONAL",
    "SIZES",
    "collect_reasons",
    "lock_folder",
    "log_reason",
    "new_run_number",
    "no_room",
    "read_local",
    "reasons",
    "restore_reasons",
    "run_number",
    "update_local",
    "write_durably",
]

SIZES = "sizes"  # the folder of the sizes that nodes released; see `fedtune.federation.sizes`
OFFSETS = "offsets"  # of the simulated nodes' own parts; see `fedtune.federation.personal`
PERSONAL = "personal"  # of the models with such parts, one a site
_RUN = "run_number"
LOCAL_NAME = "local.json"
_LOG_NAME = "local.log"
_NOTE = "For the owner of the data: these values depend on private records and are in no guarantee."


def run_number(run_dir: Path) -> str:
    """The number of the run in `run_dir`: that which was drawn for it, or a new one."""
    try:
        if known := (run_dir / _RUN).read_text(encoding="ascii").strip():
            return known
    except FileNotFoundError:
        pass
    return new_run_number(run_dir)


def new_run_number(run_dir: Path) -> str:
    """Draws the number of a run that begins in `run_dir`, and forgets what nodes left for an earlier one.

    Raises:
        ResourceError: the folder cannot be written.
    """
    run = secrets.token_hex(8)
    try:
        for folder in (SIZES, OFFSETS):
            with suppress(FileNotFoundError):
                shutil.rmtree(run_dir / folder)
        replace_whole(run_dir / _RUN, run.encode())
    except OSError as error:
        raise _unwritable(run_dir, error) from error
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
            raise _unwritable(run_dir, error) from error
        yield


def _unwritable(run_dir: Path, error: OSError) -> ResourceError:
    return ResourceError(
        f"The run folder {run_dir} cannot be written: {error.strerror or error}. Choose another by "
        "hydra.run.dir."
    )


# --- what is for the owner of the data alone ---------------------------------------------------------


def read_local(run_dir: Path) -> dict[str, Any]:
    """What the run folder keeps for the owner; empty where there is nothing, or nothing readable."""
    try:
        return dict(read_as("local", run_dir / LOCAL_NAME))
    except (OSError, ValueError):
        return {}


def update_local(run_dir: Path, **sections: Any) -> None:
    """Replaces `sections` of the file by name, whole or not at all.

    Raises:
        ResourceError: the file cannot be written.
    """
    before = read_local(run_dir)
    values = {**before, **sections}
    if values == before or (not any(sections.values()) and not before):
        return
    values = {"schema": 1, "note": _NOTE, **values}
    write_durably(run_dir / LOCAL_NAME, (json.dumps(values, indent=1) + "\n").encode(), mode=0o600)


def log_reason(run_dir: Path, node: str, round: int, published: str, reason: str) -> None:
    """Adds a node's reason, and what was `published` of it, to the folder's log.

    Never raises: the log of the process has the reason too.
    """
    line = json.dumps({"node": node, "round": round, "told": published, "reason": reason}) + "\n"
    with suppress(OSError):
        handle = os.open(run_dir / _LOG_NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)


def reasons(run_dir: Path) -> list[dict[str, Any]]:
    """All reasons that nodes have logged in this folder, oldest first."""
    collected = read_local(run_dir).get("reasons")
    entries = list(collected) if isinstance(collected, list) else []
    with suppress(OSError):
        for line in (run_dir / _LOG_NAME).read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                entries.append(parse_as("reason", line))
    return entries


def restore_reasons(run_dir: Path, text: str, round: int | None = None) -> str:
    """`text` with the full reasons in place of what was published of them.

    Of several reasons with the same published text the last one counts, of `round` if that is given.
    """
    for entry in reversed(reasons(run_dir)):
        published = str(entry.get("told", ""))
        if published and published in text and (round is None or entry.get("round") == round):
            text = text.replace(published, str(entry.get("reason", published)))
    return text


def collect_reasons(run_dir: Path) -> list[dict[str, Any]]:
    """Moves the folder's log into `local.json`, and returns all reasons.

    Raises:
        ResourceError: the file cannot be written.
    """
    entries = reasons(run_dir)
    update_local(run_dir, reasons=entries)
    (run_dir / _LOG_NAME).unlink(missing_ok=True)
    return entries
