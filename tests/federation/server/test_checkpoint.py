"""Checkpoints that survive what breaks files."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedtune.errors import CheckpointError, ResourceError
from fedtune.federation.run_folder import lock_folder, new_run_number
from fedtune.federation.server import checkpoint as checkpoints
from fedtune.federation.server.checkpoint import (
    Checkpoint,
    has_checkpoint,
    load_latest,
    next_attempt,
    save,
)
from tests.support.golden import Golden


def at(round: int) -> Checkpoint:
    chance = np.random.default_rng(round)
    return Checkpoint(
        run="r1",
        round=round,
        adapter=chance.normal(size=9).astype(np.float32),
        optimizer={"m": chance.normal(size=9), "v": chance.normal(size=9)},
        meta={"history": [{"round": round, "accuracy": 0.1 + 0.2}], "exhausted": []},
    )


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoint").iterdir())


def test_a_checkpoint_comes_back_bit_by_bit(tmp_path: Path) -> None:
    save(tmp_path, at(3))
    got, notices = load_latest(tmp_path)
    want = at(3)
    assert (got.run, got.round, got.meta, notices) == (want.run, want.round, want.meta, [])
    np.testing.assert_array_equal(got.adapter, want.adapter)
    assert got.adapter.dtype == np.float32
    for name in ("m", "v"):
        np.testing.assert_array_equal(got.optimizer[name], want.optimizer[name])
        assert got.optimizer[name].dtype == np.float64


def test_only_the_last_two_are_kept(tmp_path: Path) -> None:
    for round in range(12):
        save(tmp_path, at(round))
    assert files(tmp_path) == ["round-000010.ckpt", "round-000011.ckpt"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data + b"x",
        lambda data: data[:-50] + bytes([data[-50] ^ 1]) + data[-49:],
        lambda data: data.replace(b'"format": 1', b'"format": 2'),
        lambda data: b"\x00" * len(data),
        lambda data: b'{"format": 1}\n' + data,
        lambda data: b"[]\n",
    ],
    ids=["empty", "half", "longer", "one bit", "format", "zeros", "header", "list"],
)
def test_a_broken_checkpoint_is_passed_over_with_a_notice(tmp_path: Path, damage) -> None:  # type: ignore[no-untyped-def]
    save(tmp_path, at(1))
    newest = save(tmp_path, at(2))
    newest.write_bytes(damage(newest.read_bytes()))
    got, notices = load_latest(tmp_path)
    assert got.round == 1
    assert len(notices) == 1
    assert "round-000002.ckpt is broken" in notices[0]
    assert "stays charged" in notices[0]


def test_no_usable_checkpoint_says_the_way_out(tmp_path: Path) -> None:
    for round in (1, 2):
        save(tmp_path, at(round)).write_bytes(b"broken")
    with pytest.raises(CheckpointError, match=r"Start a new run"):
        load_latest(tmp_path)
    assert has_checkpoint(tmp_path)


def test_nothing_to_resume_says_the_way_out(tmp_path: Path, golden: Golden) -> None:
    assert not has_checkpoint(tmp_path)
    with pytest.raises(CheckpointError) as raised:
        load_latest(tmp_path / "nowhere")
    golden(raised)


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, at(1))

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    with pytest.raises(ResourceError, match=r"No space left.*resume"):
        save(tmp_path, at(2))
    monkeypatch.undo()
    assert load_latest(tmp_path)[0].round == 1
    assert files(tmp_path) == ["round-000001.ckpt"]


def test_an_old_checkpoint_that_cannot_be_removed_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seed 2652 of the simulator: the disk failed after the new one was written, and a raw OSError rose."""

    unlink = Path.unlink

    def refuses(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".ckpt":
            raise OSError(errno.ENOSPC, "No space left on device")
        unlink(path, missing_ok)

    for number in range(3):
        save(tmp_path, at(number))
    monkeypatch.setattr(Path, "unlink", refuses)
    save(tmp_path, at(3))
    assert load_latest(tmp_path)[0].round == 3


def test_left_over_temporary_files_are_removed(tmp_path: Path) -> None:
    save(tmp_path, at(1))
    (tmp_path / "checkpoint" / ".round-000002.ckpt.77.tmp").write_bytes(b"half a chec")
    assert load_latest(tmp_path)[0].round == 1
    save(tmp_path, at(2))
    assert files(tmp_path) == ["round-000001.ckpt", "round-000002.ckpt"]


def test_attempt_numbers_only_rise(tmp_path: Path) -> None:
    assert [next_attempt(tmp_path) for _ in range(12)] == list(range(1, 13))
    (tmp_path / "checkpoint" / "attempt-5").unlink()
    assert next_attempt(tmp_path) == 13


def test_two_processes_cannot_run_one_folder(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from fedtune.federation.run_folder import lock_folder\n"
        "with lock_folder(Path(sys.argv[1])): print('locked', flush=True); sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(CheckpointError, match=f"in use by process {other.pid}"), lock_folder(tmp_path):
            pass
    finally:
        other.kill()  # as kill -9: the lock must die with it
        other.communicate()
    with lock_folder(tmp_path):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_a_resource_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ResourceError, match="cannot be written"), lock_folder(tmp_path / "run"):
        pass


def test_a_full_disk_under_the_number_of_a_run_is_a_resource_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fedtune.federation.run_folder.replace_whole", full)
    with pytest.raises(ResourceError, match=r"cannot be written: No space left.*hydra.run.dir"):
        new_run_number(tmp_path)


def test_a_run_folder_that_is_a_file_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("not a folder")
    with pytest.raises(ResourceError, match="cannot be written"), lock_folder(tmp_path / "run"):
        pass
