"""Forked children: each runs some of the collected tests in a world of its own, and tells how they went.

The parent has imported and collected everything and has run nothing, so no cache holds a right answer that
would hide a fault. A child gets an empty FEDTUNE_HOME and a temporary folder of its own; both go with it.
"""

from __future__ import annotations

import ctypes
import json
import os
import selectors
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import pytest

__all__ = ["Child", "Outcome", "in_children", "run_items"]

_GRACE = 8.0  # seconds that any test may take, and ten times what it took before
_MEMORY = 6 << 30  # bytes beyond what the parent has: a wrong exponent must not take the machine down


@dataclass
class Outcome:
    """`failed`: the first test that failed; "(timeout) ..." or "(crash) ..." count too. `seconds` a test."""

    failed: str = ""
    passed: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    lines: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    error: str = ""


@dataclass
class Child:
    """What is to be done: `prepare` is called in the child, then `items` run until one fails."""

    key: Any
    items: list[pytest.Item]
    prepare: Callable[[], None]
    allowed: dict[str, float] = field(default_factory=dict)  # seconds by test
    trace: frozenset[str] = frozenset()  # files whose executed lines are wanted


class _Watch:
    """A pytest plugin of the child: remembers failures."""

    def __init__(self) -> None:
        self.failed = False
        self.skipped = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed
        self.skipped |= report.skipped


def run_items(child: Child, say: Callable[[dict[str, Any]], None]) -> None:
    """Runs the items one after the other and says what happens, until one fails."""
    session = child.items[0].session
    watch = _Watch()
    session.config.pluginmanager.register(watch)
    for index, item in enumerate(child.items):
        say({"start": item.nodeid})
        after = child.items[index + 1] if index + 1 < len(child.items) else None
        watch.failed = watch.skipped = False
        started = time.perf_counter()
        lines = _trace(child.trace) if child.trace else {}
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
        sys.settrace(None)
        seconds = time.perf_counter() - started
        found = {file: sorted(numbers) for file, numbers in lines.items()}
        say({"end": item.nodeid, "failed": watch.failed, "skipped": watch.skipped, "seconds": seconds} | (
            {"lines": found} if child.trace else {}
        ))  # fmt: skip
        if watch.failed:
            return


def _trace(files: frozenset[str]) -> dict[str, set[int]]:
    """From now on, the executed lines of `files` go into the result."""
    lines: dict[str, set[int]] = {file: set() for file in files}

    def enter(frame: FrameType, event: str, argument: object) -> Any:
        numbers = lines.get(frame.f_code.co_filename)
        if numbers is None:
            return None

        def line(frame: FrameType, event: str, argument: object) -> Any:
            numbers.add(frame.f_lineno)
            return line

        numbers.add(frame.f_lineno)
        return line

    threading.settrace(enter)
    sys.settrace(enter)
    return lines


def _isolate(folder: Path, session: pytest.Session) -> None:
    """Points home, caches and every temporary file of this process to `folder`."""
    home = folder / "home"
    for path in (home, home / "state", home / "cache", folder / "tmp", folder / "pytest"):
        path.mkdir(mode=0o700)
    os.environ.update(FEDTUNE_HOME=str(home), TMPDIR=str(folder / "tmp"))
    tempfile.tempdir = None
    for plugin in session.config.pluginmanager.get_plugins():
        if hasattr(plugin, "_HOME"):  # tests/conftest.py
            plugin._HOME = home
    session.config._tmp_path_factory._basetemp = folder / "pytest"  # type: ignore[attr-defined]


def _limit() -> None:
    import resource

    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _fork(child: Child, folder: Path) -> tuple[int, int]:
    """Process id and the end of the pipe from which its messages are read."""
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: whoever stops the run stops this too
        os.close(read)
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(nothing, number)
        _limit()
        _isolate(folder, child.items[0].session)

        def say(message: dict[str, Any]) -> None:
            data = (json.dumps(message) + "\n").encode()
            while data:
                data = data[os.write(write, data) :]

        try:
            child.prepare()
        except BaseException as error:
            say({"error": f"{type(error).__name__}: {error}"})
            os._exit(3)
        run_items(child, say)
        say({"done": True})
        os._exit(0)
    except BaseException:
        os._exit(4)


class _Running:
    def __init__(self, child: Child, folder: Path) -> None:
        self.child, self.folder = child, folder
        self.pid, self.pipe = _fork(child, folder)
        self.outcome = Outcome()
        self.buffer = b""
        self.current = ""
        self.done = False
        self.deadline = time.monotonic() + 60.0

    def read(self) -> bool:
        """Takes what is there; False at the end."""
        data = os.read(self.pipe, 1 << 20)
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        for line in lines:
            self.take(json.loads(line))
        return bool(data)

    def take(self, message: dict[str, Any]) -> None:
        self.done |= "done" in message
        if "error" in message:
            self.outcome.error = message["error"]
        if "start" in message:
            self.current = message["start"]
            known = self.child.allowed.get(self.current, 2 * _GRACE)
            self.deadline = time.monotonic() + _GRACE + 10.0 * known
        if "end" in message:
            name = message["end"]
            self.outcome.seconds[name] = message["seconds"]
            self.outcome.lines[name] = message.get("lines", {})
            if message["failed"]:
                self.outcome.failed = name
            elif not message["skipped"]:
                self.outcome.passed.append(name)

    def close(self, late: bool) -> Outcome:
        os.close(self.pipe)
        try:
            os.killpg(self.pid, signal.SIGKILL)  # the group that the child made: itself and what it started
        except ProcessLookupError:
            pass
        os.waitpid(self.pid, 0)
        shutil.rmtree(self.folder, ignore_errors=True)
        if not self.outcome.failed and not self.outcome.error and not self.done:
            self.outcome.failed = f"({'timeout' if late else 'crash'}) {self.current}"
        return self.outcome


def in_children(children: Iterable[Child], jobs: int, done: Callable[[Child, Outcome], None]) -> None:
    """Runs each child, `jobs` at a time, and calls `done` as each ends."""
    waiting = iter(children)
    running: set[_Running] = set()
    selector = selectors.DefaultSelector()
    exhausted = False
    while running or not exhausted:
        while not exhausted and len(running) < jobs:
            child = next(waiting, None)
            if child is None:
                exhausted = True
                break
            one = _Running(child, Path(tempfile.mkdtemp(prefix="mutant-")))
            running.add(one)
            selector.register(one.pipe, selectors.EVENT_READ, one)
        ended: dict[_Running, bool] = {}
        for key, _ in selector.select(timeout=0.5):
            if not key.data.read():
                ended[key.data] = False
        for one in running - ended.keys():
            if time.monotonic() > one.deadline:
                ended[one] = True
        for one, late in ended.items():
            selector.unregister(one.pipe)
            running.remove(one)
            done(one.child, one.close(late))
    selector.close()
