"""Faults in fedtune that the simulator must find: each takes out what one guarantee rests on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

__all__ = ["MUTANTS"]


@contextmanager
def charge_after() -> Iterator[None]:
    """A site charges when it has trained."""
    from fedtune.privacy.ledger.ledger import PrivacyLedger, Reservation

    reserve, commit = PrivacyLedger.reserve, PrivacyLedger.commit
    wanted: list[Any] = []

    def remembered(self: PrivacyLedger, asked: Any) -> Any:
        wanted.append(asked)
        return Reservation(0, "", asked.node, asked.run, asked.round, 1)

    def written(self: PrivacyLedger, reservation: Any) -> None:
        commit(self, reserve(self, wanted.pop()))

    with (
        mock.patch.object(PrivacyLedger, "reserve", remembered),
        mock.patch.object(PrivacyLedger, "commit", written),
    ):
        yield


@contextmanager
def ledger_without_sync() -> Iterator[None]:
    """SQLite is told never to sync the ledger."""
    from fedtune.privacy.ledger.chain import Chain

    connected = Chain._connected

    def unsynced(self: Chain, *, create: bool) -> Any:
        connection = connected(self, create=create)
        connection.execute("PRAGMA synchronous=OFF")
        return connection

    with mock.patch.object(Chain, "_connected", unsynced):
        yield


@contextmanager
def audit_log_without_sync() -> Iterator[None]:
    """The audit log's lines are not synced."""
    from fedtune.federation.client import log_files

    def write(handle: int, line: bytes) -> None:
        os.write(handle, line)

    with mock.patch.object(log_files, "_write", write):
        yield


@contextmanager
def checkpoint_without_sync() -> Iterator[None]:
    """A checkpoint is written in its place and not synced."""
    from fedtune.federation import run_folder

    def replace(path: Any, content: bytes, *, mode: int = 0o666) -> None:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        os.write(handle, content)
        os.close(handle)

    with mock.patch.object(run_folder, "replace_whole", replace):
        yield


@contextmanager
def folder_without_sync() -> Iterator[None]:
    """New names are not synced: neither that of a checkpoint nor that of an attempt."""
    from fedtune.config import files
    from fedtune.federation.server import checkpoint

    with mock.patch.object(files, "sync_folder"), mock.patch.object(checkpoint, "sync_folder"):
        yield


@contextmanager
def retry_releases_again() -> Iterator[None]:
    """A question that was answered is answered anew, on the charge that was made for it."""
    from fedtune.federation.client.release import ReleaseCounter
    from fedtune.privacy.ledger.ledger import PrivacyLedger

    reserve = PrivacyLedger.reserve
    made: dict[Any, Any] = {}

    def again(self: PrivacyLedger, asked: Any) -> Any:
        key = str(self.path), asked.run, asked.round, asked.plan.purpose
        if key not in made:
            made[key] = reserve(self, asked)
        return made[key]

    with mock.patch.object(PrivacyLedger, "reserve", again), mock.patch.object(ReleaseCounter, "check"):
        yield


@contextmanager
def round_is_told_before_it_is_saved() -> Iterator[None]:
    """The checkpoint after a round is left out but for every other one."""
    from fedtune.federation.server.checkpoint import RunState

    save = RunState.save

    def seldom(self: RunState, *arguments: Any) -> None:
        if self.round % 2 == 0:
            save(self, *arguments)

    with mock.patch.object(RunState, "save", seldom):
        yield


@contextmanager
def torn_line_counts() -> Iterator[None]:
    """What a power cut left of a line of the audit log is taken for a line."""
    from fedtune.federation.client import log_files

    with mock.patch.object(log_files, "_end_of_lines", lambda file: file.seek(0, os.SEEK_END)):
        yield


MUTANTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        charge_after,
        ledger_without_sync,
        audit_log_without_sync,
        checkpoint_without_sync,
        folder_without_sync,
        retry_releases_again,
        round_is_told_before_it_is_saved,
        torn_line_counts,
    )
}
