"""Where folders are; files that appear whole, with their mode; locks that name their holder."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedtune.config.files import (
    being_written,
    cache_dir,
    create_whole,
    lock_file,
    meant_path,
    replace_whole,
    state_dir,
)
from fedtune.errors import ResourceError
from tests.support.golden import Golden

HOLDER = (
    "import os, sys; from pathlib import Path; from fedtune.config.files import lock_file\n"
    "with lock_file(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()\n"
)


@contextmanager
def held_elsewhere(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock `path`."""
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_file_is_replaced_whole_with_its_mode_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    replace_whole(path, b"one", mode=0o600)
    replace_whole(path, b"two", mode=0o600)
    assert path.read_bytes() == b"two" and path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_path_most_likely_meant_is_said_as_it_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("first run", "second", "y.csv", "visits.csv"):
        (tmp_path / name).mkdir()
    assert meant_path(Path("frist run")) == " Did you mean 'first run'?"
    assert meant_path(Path("Secnd")) == " Did you mean second?"
    assert meant_path(tmp_path / "visit.csv") == f" Did you mean {tmp_path / 'visits.csv'}?"
    for far in ("v.csv", "third", "nowhere/second", "..", "", "a\0b"):
        assert meant_path(Path(far)) == ""


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    replace_whole(path, b"before")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fedtune.config.files.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_whole(path, b"after")
    with pytest.raises(OSError, match="No space"):
        create_whole(tmp_path / "new", b"after")
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_there_is_not_created_again(tmp_path: Path) -> None:
    create_whole(tmp_path / "key", b"one")
    with pytest.raises(FileExistsError):
        create_whole(tmp_path / "key", b"two")
    assert (tmp_path / "key").read_bytes() == b"one"


def test_what_is_written_for_a_person_is_for_nobody_else_and_there_whole_or_not_at_all(
    tmp_path: Path,
) -> None:
    path = tmp_path / "new" / "answers.csv"
    with being_written(path) as file:
        file.write("text,label\n")
    with pytest.raises(KeyError), being_written(path):
        raise KeyError
    assert path.read_text() == "text,label\n" and path.stat().st_mode & 0o777 == 0o600
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(ResourceError, match="Cannot write"), being_written(path / "below a file"):
        pass


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    """As /dev/null, which a file took the place of where this ran as root."""
    os.mkfifo(path := tmp_path / "pipe")
    reader = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    with being_written(path) as file:
        file.write("a")
    replace_whole(path, b"b")
    assert os.read(reader, 10) == b"ab" and path.is_fifo() and list(tmp_path.iterdir()) == [path]
    os.close(reader)


def test_threads_that_write_one_file_at_once_do_not_meet(tmp_path: Path) -> None:
    path, failures = tmp_path / "file", []

    def write(content: bytes) -> None:
        try:
            for _ in range(50):
                replace_whole(path, content)
        except OSError as error:
            failures.append(error)

    contents = [bytes([64 + i]) * 10_000 for i in range(4)]
    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and path.read_bytes() in contents and list(tmp_path.iterdir()) == [path]


def test_a_lock_that_another_process_holds_is_refused_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with held_elsewhere(path) as holder:
        with pytest.raises(BlockingIOError) as refused, lock_file(path, wait=False):
            pass
        assert refused.value.strerror == f"in use by process {holder.pid}"
        assert path.read_text() == str(holder.pid), "asking does not change what the file says"


def test_a_killed_holder_releases_its_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with held_elsewhere(path) as holder:
        holder.kill()
        holder.wait()
        with lock_file(path, wait=False):
            assert path.read_text() == str(os.getpid()) and path.stat().st_mode & 0o777 == 0o600
    with lock_file(path, wait=False):
        pass


@pytest.mark.slow
def test_a_lock_is_waited_for(tmp_path: Path) -> None:
    path, order = tmp_path / "lock", []

    def second() -> None:
        with lock_file(path):
            order.append("second")

    with lock_file(path):
        waiting = threading.Thread(target=second)
        waiting.start()
        waiting.join(0.3)
        order.append("first")
    waiting.join(60.0)
    assert order == ["first", "second"]


def test_a_lock_does_not_live_on_in_a_forked_child(tmp_path: Path) -> None:
    """A worker that was forked meanwhile and outlives the holder must not keep a run folder in use."""
    code = (
        "import os, sys, time; from pathlib import Path; from fedtune.config.files import lock_file\n"
        "with lock_file(Path(sys.argv[1])):\n"
        "    child = os.fork()\n"
        "    if child == 0: print(os.getpid(), flush=True); time.sleep(60)\n"
        "    time.sleep(60)\n"
    )
    made = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "lock")], stdout=subprocess.PIPE)
    assert made.stdout is not None
    child = int(made.stdout.readline())  # said by the child, which has begun, and so has let go of the lock
    made.kill()
    made.wait()
    try:
        with lock_file(tmp_path / "lock", wait=False):
            pass
    finally:
        os.kill(child, 9)
        made.stdout.close()


def test_below_fedtune_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "home"))
    assert state_dir() == tmp_path / "home" / "state"
    assert cache_dir() == tmp_path / "home" / "cache"
    assert state_dir().is_dir() and cache_dir().is_dir()
    assert stat.S_IMODE(state_dir().stat().st_mode) == 0o700


def test_relative_home_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDTUNE_HOME", "home")
    assert state_dir() == tmp_path / "home" / "state"


def test_platform_folders_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDTUNE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert tmp_path in state_dir().parents
    assert state_dir() != cache_dir()


def test_a_file_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").write_text("")
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "home"))
    with pytest.raises(ResourceError, match="FEDTUNE_HOME"):
        state_dir()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden: Golden) -> None:
    tmp_path.chmod(0o500)
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "home"))
    with pytest.raises(ResourceError) as raised:
        cache_dir()
    golden(raised)
