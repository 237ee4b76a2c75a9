"""A worker that hangs is seen, killed and replaced; one that is merely slow is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedtune.config.build import build
from fedtune.deploy import node, worker_process
from fedtune.deploy.node_metrics import NodeActivity
from fedtune.deploy.site import books_of
from fedtune.deploy.worker_process import HangDetector, WorkerDied, WorkerProcess, processor_seconds
from fedtune.errors import ResourceError
from fedtune.privacy.ledger.ledger import PrivacyLedger
from tests.support.golden import Golden
from tests.support.site_parts import settings


class Clock:
    """Time and processor time that a test sets."""

    def __init__(self) -> None:
        self.now = self.used = 0.0

    def watch(self, awaited: float = 100.0, limit: float = 1000.0) -> HangDetector:
        return HangDetector(awaited, limit, lambda: self.used, lambda: self.now)


def test_an_idle_worker_is_given_up_when_nobody_waits_any_more() -> None:
    clock = Clock()
    one = clock.watch()
    for clock.now in range(0, 101, 5):
        assert one.hangs() == ""
    clock.now = 105.0
    assert one.hangs() == "it had not answered after 105 s, of which it did nothing for the last 105"


def test_a_worker_that_works_has_until_its_owners_limit() -> None:
    clock = Clock()
    one = clock.watch()
    for clock.now in range(0, 1001, 5):
        clock.used += 0.5  # a tenth of a processor
        assert one.hangs() == ""
    clock.now = 1001.0
    assert "limits.message_seconds" in one.hangs()


def test_a_worker_that_stops_working_is_given_up_a_while_later() -> None:
    clock = Clock()
    one = clock.watch()
    for clock.now in range(0, 201, 5):
        clock.used += 5.0
        assert one.hangs() == ""
    clock.now = 225.0
    assert one.hangs() == ""
    clock.now = 231.0
    assert "did nothing for the last 31" in one.hangs()


def test_without_proc_only_the_owners_limit_holds() -> None:
    now = 0.0
    one = HangDetector(10.0, 100.0, lambda: None, lambda: now)
    now = 99.0
    assert one.hangs() == ""
    now = 101.0
    assert one.hangs() != ""


def test_processor_seconds_are_those_of_the_process() -> None:
    before = processor_seconds(os.getpid())
    assert before is not None
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    after = processor_seconds(os.getpid())
    assert after is not None
    assert 0.1 < after - before < 2.0
    assert processor_seconds(2**30) is None


# Answers its first message at once and hangs over every other.
HANGS = """
import socket, sys, time
from fedtune.config.build import build
from fedtune.deploy import channel
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
channel.receive(connection)
channel.send(connection, {"ready": 1, "fedtune": build()})
header, parts = channel.receive(connection)
if header["task"] == 2:
    time.sleep(1000)
channel.send(connection, {}, [b"reply", b"context"])
channel.receive(connection)
"""


POPEN = subprocess.Popen
build()  # asks git once, by the subprocess that tests here replace


def _and_then(first: Callable[..., object], then: Callable[[], object]) -> Callable[..., object]:
    """`first`, followed by `then`."""

    def both(*values: object) -> object:
        done = first(*values)
        then()
        return done

    return both


def _started_as(code: str, monkeypatch: pytest.MonkeyPatch, stdin: int = subprocess.DEVNULL) -> None:
    """Has `code` started where a node would start its worker."""
    started = POPEN

    def other(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        options["stdin"] = stdin
        return started([sys.executable, "-c", code, command[-1]], **options)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(worker_process.subprocess, "Popen", other)


def test_a_worker_of_another_version_is_not_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed under a node that goes on: the server has let in the version of the node."""
    _started_as(HANGS.replace("build()}", "'9.9'}"), monkeypatch)
    worker = WorkerProcess(settings(tmp_path))
    try:
        named = rf"upgraded under this node \({build().replace('+', '.')} runs, 9.9 is inst"
        with pytest.raises(ResourceError, match=named):
            worker.ask(b"", b"", {"task": 1}, lambda: None)
        assert worker.pid is None
        _started_as(HANGS, monkeypatch)  # it was taken back
        assert worker.ask(b"", b"", {"task": 1}, lambda: None) == [b"reply", b"context"]
    finally:
        worker.close()


ENDS_EARLY = """
import socket, sys
from fedtune.deploy import channel
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
channel.receive(connection)
sys.exit(3)
"""
IS_NEVER_READY = ENDS_EARLY.replace(
    "sys.exit(3)", "open(sys.argv[1] + '.told', 'w').close(); import time; time.sleep(1000)"
)


def test_a_worker_that_ends_before_it_is_ready_is_told_with_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _started_as(ENDS_EARLY, monkeypatch)
    monkeypatch.setattr(worker_process, "_BEAT_SECONDS", 60.0)
    worker = WorkerProcess(settings(tmp_path))
    try:
        with pytest.raises(ResourceError, match=r"worker did not start \(exit status 3\)"):
            worker.ask(b"", b"", {"task": 1}, lambda: None)
    finally:
        worker.close()


@pytest.mark.slow
def test_a_worker_that_is_never_ready_is_given_up_and_the_node_lives_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden: Golden
) -> None:
    _started_as(IS_NEVER_READY, monkeypatch)
    monkeypatch.setattr(worker_process, "_BEAT_SECONDS", 0.1)
    worker, now, beats = WorkerProcess(settings(tmp_path)), [1000.0], []
    monkeypatch.setattr(worker_process.time, "monotonic", lambda: now[0])

    def passes() -> None:
        if Path(worker._path + ".told").exists():  # it has its settings, and time passes now
            beats.append(worker.pid)
            now[0] += 30.0

    try:
        with pytest.raises(ResourceError) as raised:
            worker.start(passes)
        assert "120" in str(raised.value)
        golden(raised)
        assert len(beats) >= 5 and all(beats)
        assert worker.pid is None
    finally:
        worker.close()


@pytest.mark.slow
def test_a_worker_that_hangs_is_killed_and_the_next_message_has_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_process, "_BEAT_SECONDS", 0.1)
    monkeypatch.setattr(worker_process, "_IDLE_SECONDS", 0.5)
    _started_as(HANGS, monkeypatch)
    worker, beats = WorkerProcess(settings(tmp_path)), []
    try:
        assert worker.ask(b"", b"", {"task": 1}, lambda: None, 60.0) == [b"reply", b"context"]
        worker.close_worker()
        with pytest.raises(WorkerDied, match=r"the worker was killed, for it had not answered after \d+ s"):
            worker.ask(b"", b"", {"task": 2}, lambda: beats.append(1), 1.0)
        # Flower's SuperNode must not think that nobody is at work.
        assert worker.pid is None
        assert len(beats) > 1
        assert worker.ask(b"", b"", {"task": 3}, lambda: None, 60.0) == [b"reply", b"context"]
    finally:
        worker.close()


def test_a_worker_that_nobody_asks_ends_and_the_next_message_has_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _started_as(HANGS, monkeypatch)
    now = [1000.0]
    monkeypatch.setattr(worker_process.time, "monotonic", lambda: now[0])
    worker = WorkerProcess(settings(tmp_path, limits={"threads": 1, "idle_seconds": 60.0}))
    try:
        worker.start()
        now[0] += 59.0
        assert not worker.end_if_idle()
        assert worker.ask(b"", b"", {"task": 1}, lambda: None) == [b"reply", b"context"]
        now[0] += 59.0
        assert not worker.end_if_idle()
        first = worker.pid
        assert first is not None
        now[0] += 2.0
        assert worker.end_if_idle()
        assert worker.pid is None
        assert processor_seconds(first) is None  # it has really gone, and its memory with it
        assert not worker.end_if_idle()
        assert worker.ask(b"", b"", {"task": 3}, lambda: None) == [b"reply", b"context"]
    finally:
        worker.close()


def test_a_worker_that_is_being_asked_does_not_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it has been at it: the thread that looks once a minute is not the one that asks."""
    _started_as(HANGS.replace("time.sleep(1000)", "sys.stdin.read(1)"), monkeypatch, subprocess.PIPE)
    now, asked, replies = [1000.0], threading.Event(), []
    monkeypatch.setattr(worker_process.time, "monotonic", lambda: now[0])
    worker = WorkerProcess(settings(tmp_path, limits={"threads": 1, "idle_seconds": 60.0}))
    try:
        worker.start()
        one = worker.pid
        message = (b"", b"", {"task": 2}, lambda: None)
        monkeypatch.setattr(worker_process.channel, "send", _and_then(worker_process.channel.send, asked.set))
        other = threading.Thread(target=lambda: replies.append(worker.ask(*message)), daemon=True)
        other.start()
        assert asked.wait(60)
        now[0] += 1e6
        assert not worker.end_if_idle()
        assert worker.pid == one
        assert worker._process is not None and worker._process.stdin is not None
        worker._process.stdin.write(b".")
        worker._process.stdin.close()
        other.join(60)
        assert replies == [[b"reply", b"context"]]
        assert not worker.end_if_idle()  # it was asked just now
    finally:
        if worker._process is not None:
            worker._process.kill()  # nobody waits for whoever still asks
        worker.close()


def test_a_worker_that_does_not_leave_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_process, "_END_SECONDS", 0.2)
    _started_as(HANGS, monkeypatch)
    worker = WorkerProcess(settings(tmp_path))
    worker.start()
    one, process = worker.pid, worker._process
    assert one is not None and process is not None
    os.kill(one, signal.SIGSTOP)  # it sees neither that its socket closes nor a SIGTERM
    os.waitpid(one, os.WUNTRACED)  # it has stopped, which one that has not run for a while does late
    worker.close()
    assert process.returncode == -signal.SIGKILL


def test_a_worker_is_given_up_when_the_node_has_to_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_process, "_BEAT_SECONDS", 0.1)
    _started_as(HANGS, monkeypatch)
    worker = WorkerProcess(settings(tmp_path))
    try:
        with pytest.raises(WorkerDied, match="was killed, for it is time"):
            worker.ask(b"", b"", {"task": 2}, lambda: None, give_up=lambda: "it is time")
    finally:
        worker.close()


def test_a_worker_rests_while_the_server_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower asks a server that is away again for ever, and nothing else is done meanwhile."""

    def away(*_: object) -> None:
        raise ResourceError("The server does not answer.")

    monkeypatch.setattr(node, "publish_changes", away)
    monkeypatch.setattr(node, "check_server", away)
    said: list[str] = []
    rested = [True, False]
    minutes = SimpleNamespace(wait=lambda seconds: len(said) > 4)
    worker = SimpleNamespace(end_if_idle=lambda: rested.pop(0) if rested else False)
    activity = NodeActivity()
    activity.step = 0.0
    node._every_minute(settings(tmp_path), None, worker, None, activity, minutes, said.append)  # type: ignore[arg-type]
    assert activity.step > 0  # nobody takes it for one that hangs
    assert [one for one in said if "the worker has ended" in one] == said[1:2]
    assert not rested


def test_a_site_may_keep_its_worker_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _started_as(HANGS, monkeypatch)
    now = [1000.0]
    monkeypatch.setattr(worker_process.time, "monotonic", lambda: now[0])
    worker = WorkerProcess(settings(tmp_path, limits={"threads": 1, "idle_seconds": None}))
    try:
        worker.start()
        now[0] += 1e9
        assert not worker.end_if_idle()
        assert worker.pid is not None
    finally:
        worker.close()


def test_the_log_says_that_the_budget_was_published_when_it_leaves_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = settings(tmp_path)
    PrivacyLedger.open(Path(site.ledger)).set_budget(site.budget)
    books, left, there = books_of(site), [], False
    budget = {"epsilon_left": 1.0, "epsilon": 2.0, "delta": 1e-5, "unit": "record"}

    def answers(*_: object) -> float:
        if not there:
            raise ResourceError("The server does not answer.")
        return 99.0

    def leaves(*arguments: object) -> None:
        answers()
        left.append((arguments[2], [one["event"] for one in books.log.entries()]))

    monkeypatch.setattr(node.join, "budget_of", lambda site: budget)
    monkeypatch.setattr(node, "check_server", answers)
    monkeypatch.setattr(node.join, "publish", leaves)
    for _ in range(3):  # minutes
        with pytest.raises(ResourceError):
            node.publish_changes(site, None, books, None)
    assert books.log.entries() == [] and left == []
    there = True
    told = node.publish_changes(site, None, books, None)
    assert node.publish_changes(site, None, books, told) == told
    assert left == [(budget, ["published"])]  # the line was there before it left, and there is one
    assert len(books.log.entries()) == 1
