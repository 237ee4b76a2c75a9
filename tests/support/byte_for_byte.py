"""Runs a tiny federation with all that mechanisms release replaced by constants, and keeps what leaves.

What is left then is what leaves *beside* the noise: if two data sets give other bytes anywhere, something
that was computed from private records is published and was not paid for. Durations are left as they are, for
no two runs have the same, so a measured time shows too; only what is public of time (when a run was started)
and fresh identifiers are held still.
"""

from __future__ import annotations

import csv
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message

from fedtune.config.schema import Config
from fedtune.errors import FedtuneError

Row = dict[str, str]
COLUMNS = ("text", "label", "site", "person")
_LOCAL = ("local.json", "local.log", ".lock", "noise.secret")  # the owner's, the server's


def rows(n: int = 120) -> list[Row]:
    """Four sites with ten persons each, every person with a few records."""
    from tests.support.tiny_federation import BAD, GOOD, OTHER

    found = []
    for i in range(n):
        words = [OTHER[i % 10], OTHER[(3 * i) % 10], (GOOD if i % 2 else BAD)[i % 5]]
        label = "positive" if i % 2 else "negative"
        found.append(
            {"text": " ".join(words), "label": label, "site": f"site-{i % 4}", "person": f"person-{i % 40}"}
        )
    return found


def write(folder: Path, data: Sequence[Row]) -> None:
    """The data set as train.csv of `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "train.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, COLUMNS)
        writer.writeheader()
        writer.writerows(data)


class KeptTracker:
    """A tracker that writes what it is told into one file of the run folder."""

    def __init__(self, folder: Path, project: str) -> None:
        self._path = folder.parent / "tracker.jsonl"

    def __getattr__(self, method: str) -> Any:
        def tell(*args: Any) -> None:
            with self._path.open("a") as file:
                file.write(json.dumps([method, *args]) + "\n")

        return tell


@dataclass
class Left:
    """What left a run: each message's content and each file, as bytes, by name."""

    messages: list[bytes] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    printed: str = ""  # on the terminal, which is the owner's
    local: str = ""  # local.json


def _as_text(value: Any) -> Any:
    """Bytes as hexadecimal digits, so that as many bytes are as long a text, whatever they are."""
    if isinstance(value, bytes):
        return f"bytes {value.hex()}"
    return [_as_text(one) for one in value] if isinstance(value, list) else value


def content_of(message: Message) -> bytes:
    """All that a message says, but for Flower's own numbers of it."""
    head = [message.metadata.message_type, message.metadata.group_id, message.metadata.dst_node_id]
    if message.has_error():
        return json.dumps([*head, "error", message.error.code, message.error.reason]).encode()
    parts = [json.dumps(head).encode()]
    for name, record in message.content.items():
        if isinstance(record, ArrayRecord):
            for key, array in record.items():
                parts.append(f"{name}.{key} {array.dtype} {array.shape} ".encode() + array.data)
        else:
            assert isinstance(record, ConfigRecord)
            items = [(key, _as_text(value)) for key, value in sorted(dict(record).items())]
            parts.append(f"{name} {items}".encode())
    return b"\n".join(parts)


def hold_node_still(patch: Callable[[Any, str, Any], None]) -> None:
    """What the mechanisms of a node release becomes a constant; the work that it is made of is still done.

    `patch` sets an attribute, as `setattr` does.
    """
    from fedtune.federation.secagg import client as distributed_node
    from fedtune.privacy.mechanisms.counts import EvaluationPlan
    from fedtune.training import local as training

    train, clipped = training.train_locally, distributed_node.clipped_gradient_sum
    answer = EvaluationPlan.answer

    def constant_update(*args: Any, **options: Any) -> training.LocalResult:
        made = train(*args, **options)
        update = np.full_like(made.update, 0.001)
        return training.LocalResult(update, made.steps, made.seconds, made.flops)

    def constant_sum(*args: Any) -> tuple[np.ndarray, float]:
        made, seconds = clipped(*args)
        return np.zeros_like(made), seconds

    def constant_counts(self: EvaluationPlan, *args: Any) -> tuple[int, int]:
        answer(self, *args)
        return 40 * round(self.scale), 10 * round(self.scale)

    patch(training, "train_locally", constant_update)
    patch(distributed_node, "clipped_gradient_sum", constant_sum)
    patch(EvaluationPlan, "answer", constant_counts)


def hold_server_still(patch: Callable[[Any, str, Any], None]) -> None:
    """What a trusted server releases becomes a constant, whatever it was sent; `patch` as above."""
    from fedtune.federation.server import loop, rounds
    from fedtune.privacy.plan import PrivacyPlan

    def constant_release(self: Any, *args: Any) -> tuple[np.ndarray, PrivacyPlan]:
        return np.full(self._total.size, 0.001), self._plan

    patch(rounds.ClippedUpdates, "release", constant_release)
    patch(loop, "check_learned", lambda *args: None)  # from constants nothing is


@contextmanager
def constants(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """The mechanisms' outputs are constants until the block ends; yields the list that messages go to."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    from fedtune.engines import local
    from fedtune.federation import run_folder
    from fedtune.federation.secagg import crypto as secagg_crypto
    from fedtune.federation.secagg import protocol as secure_aggregation
    from fedtune.privacy.mechanisms.counts import SizePlan
    from fedtune.privacy.plan import PrivacyPlan
    from fedtune.report import page
    from fedtune.runs import environment, run, trackers

    sent: list[bytes] = []
    deliver, empty_run = local.LocalGrid._deliver, local.empty_run
    numbers = itertools.count(1)

    def watched(self: Any, message: Message) -> Message:
        sent.append(content_of(message))
        reply = deliver(self, message)
        sent.append(content_of(reply))
        return reply

    def key(size: int = 32) -> bytes:
        return next(numbers).to_bytes(size, "big")

    def key_pair() -> tuple[bytes, bytes]:
        private = X25519PrivateKey.from_private_bytes(key())
        return private.private_bytes_raw(), private.public_key().public_bytes_raw()

    class Clock:
        """When a run is started is public, and here always the same."""

        UTC = run.datetime.UTC

        class datetime:
            now = staticmethod(lambda zone=None: _Then())

    with monkeypatch.context() as patch:
        hold_node_still(patch.setattr)
        hold_server_still(patch.setattr)
        patch.setattr(SizePlan, "told", lambda self, units, entropy: 20)  # a noised count, charged
        patch.setattr(PrivacyPlan, "noise", lambda self, size, entropy: np.zeros(size))
        patch.setattr(PrivacyPlan, "adapt_clip", lambda self, *args: self)
        patch.setattr(local.LocalGrid, "_deliver", watched)
        patch.setattr(local, "empty_run", lambda run_id: empty_run(2**55))  # its length is in bytes_up
        patch.setattr(run_folder, "secrets", SimpleNamespace(token_hex=lambda size: "ab" * size))
        patch.setattr(secagg_crypto, "new_key_pair", key_pair)
        patch.setattr(secagg_crypto, "secrets", SimpleNamespace(randbelow=lambda limit: next(numbers)))
        patch.setattr(secure_aggregation, "secrets", SimpleNamespace(token_bytes=key))
        patch.setattr(environment, "commit", lambda: ("0" * 40, False))  # of whoever edits meanwhile
        patch.setattr(run, "datetime", Clock)
        patch.setattr(page, "datetime", Clock)
        patch.setitem(trackers.WRITERS, "tensorboard", KeptTracker)
        yield sent


class _Then:
    def isoformat(self, timespec: str = "") -> str:
        return "2026-01-01T00:00:00+00:00"

    def strftime(self, form: str) -> str:
        return "2026-01-01"


def forget_data() -> None:
    """Nothing of another data set is kept in this process."""
    from fedtune.data.prepare import clear_cache
    from fedtune.federation import resources as resident

    resident._resources.clear()
    clear_cache()


def run_once(
    config: Config, data: Sequence[Row], home: Path, monkeypatch: pytest.MonkeyPatch, *, fails: bool = False
) -> Left:
    """Runs `config` on `data` with a state folder of its own and gives what left; the run folder is removed.

    `fails`: the run is expected to end with an error, which is printed as the command line prints it.
    """
    import io

    from rich.console import Console

    from fedtune.report.page import write_report
    from fedtune.runs.run import run

    run_dir = Path(str(config.output))
    shutil.rmtree(run_dir, ignore_errors=True)
    write(Path(str(config.data.path)), data)
    forget_data()
    (home / "state").mkdir(parents=True, mode=0o700)
    (home / "cache").mkdir(mode=0o700)
    left, terminal = Left(), io.StringIO()
    with constants(monkeypatch) as sent, monkeypatch.context() as patch:
        patch.setenv("FEDTUNE_HOME", str(home))
        with pytest.raises(FedtuneError) if fails else nullcontext() as failed:
            run(config, console=Console(file=terminal, width=200, highlight=False))
            write_report([run_dir])
        if failed is not None:
            terminal.write(str(failed.value))
    left.messages, left.printed = sent, " ".join(terminal.getvalue().split())
    for path in sorted(run_dir.rglob("*")):
        if path.is_file() and path.name not in _LOCAL:
            left.files[str(path.relative_to(run_dir))] = path.read_bytes()
        elif path.name in _LOCAL[:2]:
            assert path.stat().st_mode & 0o777 == 0o600
            left.local = path.read_text()
    shutil.rmtree(run_dir)
    return left


def differences(one: Left, other: Left) -> list[str]:
    """Where the two differ, with the bytes around the first difference."""
    found = []
    if len(one.messages) != len(other.messages):
        found.append(f"{len(one.messages)} and {len(other.messages)} messages")
    pairs: dict[str, tuple[bytes, bytes]] = {
        f"message {i}": pair for i, pair in enumerate(zip(one.messages, other.messages, strict=False))
    }
    for name in sorted({*one.files, *other.files}):
        pairs[name] = (one.files.get(name, b"(no such file)"), other.files.get(name, b"(no such file)"))
    for name, (mine, theirs) in pairs.items():
        if mine != theirs:
            at = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), 0)
            around = slice(max(0, at - 80), at + 60)
            found.append(f"{name} differs at {at}: {mine[around]!r} and {theirs[around]!r}")
    return found
