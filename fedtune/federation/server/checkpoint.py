"""The run folder's memory: after every round, everything that the next one depends on.

A checkpoint appears under its name only when it is complete (written beside, synced, renamed, folder
synced), so a `kill -9` or a power cut at any instruction leaves the previous one. Each file begins with
a line of JSON that holds the payload's length and sha256; the last two are kept, and one that does not
match its checksum is passed over, with a notice, for the one before.

Going back one checkpoint forgets a round's result, never its cost: what a node released is in the
node's ledger, and this file has no say in it. And a resumed run never repeats noise (PITFALLS 22):
every start of a run takes a number of its own, higher than any before, *before* the first message, by
creating a file that must not exist (`attempt-3`). So (run, round, attempt) names a release once, even
if the process died between sending a message and writing the checkpoint.

What it does not do: hold private data. Adapter, moments, history and public configuration are what the
server knows anyway. (The noise of dp_ftrl lies beside it; see `fedtune.federation.server.correlated`.)
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.config.files import lock_file, replace_whole, sync_folder
from fedtune.errors import CheckpointError, ResourceError

__all__ = [
    "Checkpoint",
    "has_checkpoint",
    "load_latest",
    "lock_folder",
    "next_attempt",
    "save",
    "write_durably",
]

FORMAT = 1
KEEP = 2


@dataclass
class Checkpoint:
    """The state after `round` rounds (0: before the first). `meta` is JSON; arrays are stored exactly."""

    run: str
    round: int
    adapter: np.ndarray  # float32 [P]
    optimizer: dict[str, np.ndarray] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


def _folder(run_dir: Path) -> Path:
    return run_dir / "checkpoint"


def _files(run_dir: Path) -> list[Path]:
    """Newest first."""
    return sorted(_folder(run_dir).glob("round-*.ckpt"), reverse=True)


def has_checkpoint(run_dir: Path) -> bool:
    """Whether a run was started in this folder."""
    return bool(_files(run_dir))


def _no_room(path: Path, error: OSError, size: int) -> ResourceError:
    return ResourceError(
        f"The checkpoint {path} of {size} bytes cannot be written: {error.strerror or error}. Free some "
        "space or make the folder writable, and go on with `fedtune run resume=RUN_DIR`; the checkpoint "
        "before this one is intact."
    )


def write_durably(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Puts `content` in the place of `path`, whole and synced, readable as `mode` and the umask say.

    Raises: ResourceError; what was there before is then as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_whole(path, content, mode=mode)
    except OSError as error:
        raise _no_room(path, error, len(content)) from error


def save(run_dir: Path, checkpoint: Checkpoint) -> Path:
    """Writes a checkpoint, durably, and removes all but the last two. Raises: ResourceError."""
    meta = {"run": checkpoint.run, "round": checkpoint.round, "meta": checkpoint.meta}
    buffer = io.BytesIO()
    arrays = {f"optimizer.{name}": value for name, value in checkpoint.optimizer.items()}
    np.savez(
        buffer,
        allow_pickle=False,
        adapter=checkpoint.adapter,
        json=np.frombuffer(json.dumps(meta, allow_nan=False).encode(), dtype=np.uint8),
        **arrays,
    )
    payload = buffer.getvalue()
    header = {"format": FORMAT, "length": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
    folder = _folder(run_dir)
    path = folder / f"round-{checkpoint.round:06d}.ckpt"
    write_durably(path, json.dumps(header).encode() + b"\n" + payload)
    for old in [*_files(run_dir)[KEEP:], *folder.glob(".round-*.tmp")]:
        old.unlink(missing_ok=True)
    return path


def _read(path: Path) -> Checkpoint:
    """Raises ValueError (or what it is made of) if the file is anything but a whole checkpoint."""
    header_line, _, payload = path.read_bytes().partition(b"\n")
    header = json.loads(header_line)
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"it is not of format {FORMAT}, which this fedtune reads")
    if len(payload) != header["length"]:
        raise ValueError(f"{len(payload)} bytes instead of {header['length']}")
    if hashlib.sha256(payload).hexdigest() != header["sha256"]:
        raise ValueError("its checksum does not match")
    with np.load(io.BytesIO(payload), allow_pickle=False) as arrays:
        meta = json.loads(arrays["json"].tobytes())
        optimizer = {
            name[len("optimizer.") :]: arrays[name] for name in arrays if name.startswith("optimizer.")
        }
        return Checkpoint(meta["run"], meta["round"], arrays["adapter"], optimizer, meta["meta"])


def load_latest(run_dir: Path) -> tuple[Checkpoint, list[str]]:
    """The newest usable checkpoint, and a notice for each broken one that was passed over.

    Raises: CheckpointError if there is none.
    """
    notices: list[str] = []
    files = _files(run_dir)
    for path in files:
        try:
            return _read(path), notices
        except (ValueError, KeyError, TypeError, OSError, EOFError) as error:
            notices.append(
                f"The checkpoint {path.name} is broken ({error}); going on from the one before it. What its "
                "round released stays charged."
            )
    if not files:
        raise CheckpointError(
            f"{run_dir} holds no checkpoint, so there is nothing to resume. Give the folder of a run that "
            "was started, or leave `resume` out to start a new one."
        )
    raise CheckpointError(
        f"No checkpoint in {_folder(run_dir)} is usable: {' '.join(notices)} Start a new run; what this one "
        "released stays in the nodes' ledgers (`fedtune budget history`)."
    )


def next_attempt(run_dir: Path) -> int:
    """Takes the next attempt number of this run, durably: 1 for the first start. Raises: ResourceError."""
    folder = _folder(run_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = [int(path.name.removeprefix("attempt-")) for path in folder.glob("attempt-[0-9]*")]
        number = max(taken, default=0) + 1
        while True:
            try:
                os.close(os.open(folder / f"attempt-{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            except FileExistsError:
                number += 1
                continue
            sync_folder(folder)
            return number
    except OSError as error:
        raise _no_room(folder, error, 0) from error


@contextmanager
def lock_folder(run_dir: Path) -> Iterator[None]:
    """Keeps every other process out of a run folder; the lock dies with the process, even by `kill -9`.

    Raises: CheckpointError if another process has it, ResourceError if the folder cannot be written.
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
