"""A submit and a real server, without any site: what is killed, ended or in the way, and how it goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.control_pb2 import StartRunRequest, StopRunRequest
from flwr.proto.message_pb2 import PushObjectResponse
from flwr.proto.runtime_pb2 import (
    GetNodesResponse,
    PullAppMessagesResponse,
    PullTaskInputResponse,
    PushAppMessagesResponse,
    SendTaskHeartbeatResponse,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

from fedtune.config.convert import changes_to_json, config_from_json
from fedtune.config.loader import load
from fedtune.deploy import client, message_loop, submit
from fedtune.deploy.client import Server, status
from fedtune.deploy.provision import provision
from fedtune.deploy.submit import RunLost, submitted_run
from fedtune.deploy.thin_app import thin_app
from fedtune.errors import FederationError, FedtuneError
from fedtune.federation.flower import task_identity
from tests.support.fake_federation import Watcher
from tests.support.ports import free_port

REPOSITORY = Path(__file__).parents[2]


class Running:
    """A server in a process of its own."""

    def __init__(self, root: Path) -> None:
        port = free_port()
        file = root / "federation.yaml"
        file.write_text(yaml.safe_dump({"name": "t", "server": f"127.0.0.1:{port}", "sites": ["a"]}))
        provision(file, root / "out")
        self.folder, self.log = root / "out" / "server", root / "server.log"
        self.start()

    def start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        with self.log.open("wb") as log:
            command = [sys.executable, "-m", "fedtune.cli.app", "server", str(self.folder)]
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        end = time.monotonic() + 240.0
        while True:
            assert time.monotonic() < end and self.process.poll() is None, self.log.read_text()
            try:
                self.server = Server.of(self.folder)
                status(self.folder)  # it answers, and not only at its port
                return
            except FedtuneError:
                time.sleep(0.3)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def states(self) -> dict[str, str]:
        return {one["run"]: one["state"] for one in status(self.folder).runs}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    made = Running(tmp_path_factory.mktemp("server"))
    try:
        yield made
    finally:
        made.kill()


def number(run_dir: Path) -> str:
    return (run_dir / "checkpoint" / "server-run").read_text()


def stop(running: Running, run: str) -> None:
    with running.server.client(ControlHttpClient) as control:
        control.StopRun(StopRunRequest(run_id=int(run)))


def test_nodes_are_told_the_run_and_not_where_its_operator_has_what() -> None:
    words = ["privacy.epsilon=2", "adapter=head"]
    config = load(
        [*words, "public.path=/mine/public.csv", "public.label=mood", "tracker.folder=/mine/tracks"]
    )
    text = changes_to_json(submit.as_told(config))
    assert "mine" not in text and "mood" not in text
    plain = load(words)
    assert config_from_json(text) == plain and plain.train.damped  # as a start by names is


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_begins_and_ends_at_the_server(running: Running, tmp_path: Path) -> None:
    with submitted_run(running.server, "{}", tmp_path, None) as (grid, lost):
        assert list(grid.get_node_ids()) == []
        assert running.states()[number(tmp_path)] == "running"
        assert not lost.is_set()
    assert running.states()[number(tmp_path)] == "completed"
    with pytest.raises(ZeroDivisionError), submitted_run(running.server, "{}", tmp_path, None):
        raise ZeroDivisionError
    assert running.states()[number(tmp_path)] == "failed"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_server_that_is_killed_is_waited_for_and_the_observer_is_told(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_QUIET_SECONDS", 0.5)
    watcher, away = Watcher(), time.monotonic()

    def start_when_it_was_missed() -> None:
        while not watcher.waits and time.monotonic() - away < 120.0:
            time.sleep(0.1)
        running.start()

    again = threading.Thread(target=start_when_it_was_missed)
    try:
        with submitted_run(running.server, "{}", tmp_path, watcher) as (grid, lost):
            running.kill()
            away = time.monotonic()
            again.start()
            assert list(grid.get_node_ids()) == []
            away = time.monotonic() - away
            again.join()
            assert not lost.is_set()
        assert running.states()[number(tmp_path)] == "completed"
    except RunLost:
        again.join()
        assert time.monotonic() - away > 45.0  # on a busy machine: gone for longer than it waits for a submit
    assert watcher.waits[0].endswith("does not answer; trying again until it does")
    assert watcher.waits[-1] == ""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_the_server_has_ended_is_lost_and_does_not_interrupt_the_process(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flwr.supercore.heartbeat.HEARTBEAT_DEFAULT_INTERVAL", 6)  # it is 30 s, less 5

    def asks_on() -> None:
        with submitted_run(running.server, "{}", tmp_path, None) as (grid, _):
            stop(running, number(tmp_path))
            grid.get_node_ids()

    def is_busy_meanwhile() -> None:
        """Seen by the heartbeat alone, while this process evaluates: the loop over rounds is told to stop."""
        with submitted_run(running.server, "{}", tmp_path, None) as (_, lost):
            stop(running, number(tmp_path))
            assert lost.wait(60.0)
            raise KeyboardInterrupt  # which is what the loop makes of it

    for run in (asks_on, is_busy_meanwhile):
        with pytest.raises(RunLost):
            run()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_that_was_lost_waits_for_its_server_before_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server may end a run that it cannot hear, and be out of reach itself: its certificate expired."""
    order: list[str] = []

    @contextmanager
    def submitted(*about: Any) -> Iterator[Any]:
        order.append("submitted")
        if len(order) > 1:
            raise FederationError("enough")
        raise RunLost
        yield

    def waits(address: str, authority: Path, say: Any) -> float:
        say("its certificate has expired")
        order.append("waited")
        return 9.0

    here = Server(tmp_path, "127.0.0.1:9", b"", "token")
    monkeypatch.setattr(Server, "of", lambda folder: here)
    monkeypatch.setattr(submit, "submitted_run", submitted)
    monkeypatch.setattr(submit, "wait_for_server", waits)
    monkeypatch.setattr(submit, "_stopped_by", lambda *about: order.append("asked"))
    config, watcher = load([]), Watcher()
    config.engine.name, config.engine.server = "deployment", str(tmp_path)
    with pytest.raises(FederationError, match="enough"):
        submit.run(config, tmp_path / "run", watcher)
    assert order == ["submitted", "waited", "asked", "submitted"]
    assert watcher.waits == ["its certificate has expired", ""]


def test_what_a_killed_submit_left_at_the_server_is_stopped(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = submit._start(running.server, "{}", tmp_path, None)  # and then nothing is heard of it
    assert token
    first = number(tmp_path)
    with submitted_run(running.server, "{}", tmp_path, None):
        states = running.states()
        assert states[first] == "stopped"
        assert states[number(tmp_path)] == "running"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_task_that_nobody_took_is_ended(running: Running, tmp_path: Path) -> None:
    from flwr.common.serde import fab_to_proto
    from flwr.supercore.fab import Fab

    content, digest = thin_app()
    with running.server.client(ControlHttpClient) as control:
        orphan = control.StartRun(StartRunRequest(fab=fab_to_proto(Fab(digest, content, {})))).run_id
    watcher = Watcher()
    with submitted_run(running.server, "{}", tmp_path, watcher):  # when the other's time to take it is over
        assert running.states()[str(orphan)] in ("failed", "stopped")
    assert watcher.waits[0].startswith("waiting for this run's turn") and watcher.waits[-1] == ""


class RunThatEnds:
    """A server's answers to a run's ServerApp, without a network.

    `ends`: at which of them it ends the run, as a server does that is told so between two of its own steps;
    `fails`: how it answers then, once. It goes on with the run if it is not `ended`.
    """

    def __init__(self, ends: str, fails: str, *, ended: bool = True) -> None:
        self.ends, self.fails, self.ended, self.over = ends, fails, ended, False
        self.asked: list[str] = []
        self.stored: set[str] = set()

    def _ask(self, name: str) -> bool:
        """Whether this one fails as it is told to."""
        self.asked.append(name)
        if self.over and self.ended:
            raise self._status(401)
        if name != self.ends or self.over:
            return False
        self.over = True
        if self.fails != "not stored":
            raise self._status(int(self.fails))
        return True

    @staticmethod
    def _status(code: int) -> httpx.HTTPStatusError:
        answer = httpx.Response(code, request=httpx.Request("POST", "https://s"))
        return httpx.HTTPStatusError(f"status {code}", request=answer.request, response=answer)

    def PullTaskInput(self, request: Any) -> Any:
        answer = PullTaskInputResponse(task_id=3)
        answer.run.run_id, answer.context.node_id = 7, 1
        self._ask("PullTaskInput")
        return answer

    def SendTaskHeartbeat(self, request: Any) -> Any:
        if self.over and self.ended:
            raise self._status(401)
        return SendTaskHeartbeatResponse(success=True)

    def GetNodes(self, request: Any) -> Any:
        self._ask("GetNodes")
        return GetNodesResponse()

    def PullMessages(self, request: Any) -> Any:
        self._ask("PullMessages")
        return PullAppMessagesResponse()

    def PushMessages(self, request: Any) -> Any:
        self._ask("PushMessages")
        wanted = [one.object_id for tree in request.message_object_trees for one in iterate_object_tree(tree)]
        ids = [tree.object_id for tree in request.message_object_trees]
        missing = [name for name in wanted if name not in self.stored]
        return PushAppMessagesResponse(message_ids=ids, objects_to_push=missing, session_id="s")

    def PushObject(self, request: Any) -> Any:
        if self._ask("PushObject"):
            return PushObjectResponse(stored=False)
        self.stored.add(request.object_id)
        return PushObjectResponse(stored=True)

    def PushTaskOutput(self, request: Any) -> None: ...

    def close(self) -> None: ...


def push_one(grid: Any) -> list[str]:
    content = RecordDict({"a": ConfigRecord({"value": 1}), "b": ConfigRecord({"value": 2})})
    return list(grid.push_messages([Message(content, 2, "train")]))


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    slept: list[float] = []
    monkeypatch.setattr(submit, "_start", lambda *_: "token")
    monkeypatch.setattr(message_loop.time, "sleep", slept.append)

    def run(answers: RunThatEnds, do: Any) -> tuple[Any, float]:
        class Faked(Server):
            def open_client(self, *_: Any, **__: Any) -> Any:
                return answers

        slept.clear()
        with submitted_run(Faked(tmp_path, "h:1", b"", "t"), "{}", tmp_path, None) as (grid, _):
            return do(grid), sum(slept)

    with task_identity(7):
        yield run


_CALLS = ("PushObject", "PushMessages", "PullMessages", "GetNodes", "PullTaskInput")


@pytest.mark.parametrize(
    ("ends", "fails"),
    [("PushObject", "not stored"), *((ends, fails) for ends in _CALLS for fails in ("500", "404", "401"))],
)
def test_however_a_server_fails_at_a_run_that_it_is_ending_the_run_is_lost(
    submitted: Any, ends: str, fails: str
) -> None:
    def do(grid: Any) -> None:
        push_one(grid)
        grid.pull_messages(["m"])
        grid.get_node_ids()

    with pytest.raises(RunLost):
        submitted(RunThatEnds(ends, fails), do)


@pytest.mark.parametrize(
    ("ends", "fails"), [("PushObject", "not stored"), ("PushObject", "500"), ("PushMessages", "500")]
)
def test_a_push_that_a_server_forgot_to_confirm_is_begun_again(submitted: Any, ends: str, fails: str) -> None:
    """It was killed between storing an object and saying so: it takes that object no second time."""
    server = RunThatEnds(ends, fails, ended=False)
    (message_id,), slept = submitted(server, push_one)
    assert message_id in server.stored and len(server.stored) == 4  # the message, its content and two records
    assert server.asked.count("PushMessages") == 2 and 0 < slept < 1


def test_what_is_no_ended_run_is_an_error_with_a_way_out(
    submitted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = RunThatEnds("PushMessages", "404", ended=False)
    with pytest.raises(FederationError, match=r"404.*fedtune submit DIR resume=RUN_DIR"):
        submitted(server, push_one)
    assert server.asked.count("PushMessages") == 1
    server = RunThatEnds("", "", ended=False)
    monkeypatch.setattr(server, "PushObject", lambda request: PushObjectResponse(stored=False))
    with pytest.raises(FederationError, match=r"ObjectPushError.*resume=RUN_DIR"):
        submitted(server, push_one)
    assert server.asked.count("PushMessages") > message_loop.UPLOAD_SECONDS


def test_a_run_waits_for_a_certificate_that_is_renewed_and_for_no_other_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    failed = "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: "
    answers = iter([httpx.ConnectError(f"{failed}certificate has expired (_ssl.c:1006)")] * 2)

    def ask() -> str:
        if (error := next(answers, None)) is not None:
            raise error
        return "answered"

    assert client.patient_retries("server").invoke(ask) == "answered"
    answers = iter([httpx.ConnectError(f"{failed}self-signed certificate in certificate chain")])
    with pytest.raises(httpx.ConnectError):
        client.patient_retries("server").invoke(ask)
