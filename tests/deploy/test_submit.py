"""A submit and a real server, without any site: what is killed, ended or in the way, and how it goes on."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from flwr.proto.control_pb2 import StartRunRequest, StopRunRequest
from flwr.supercore.control import ControlHttpClient

from fedtune.deploy import submit
from fedtune.deploy.provision import provision
from fedtune.deploy.submit import RunLost, Server, status, submitted_run
from fedtune.deploy.thin_app import thin_app
from fedtune.errors import FederationError, FedtuneError
from tests.support.fake_federation import Watcher

REPOSITORY = Path(__file__).parents[2]


class Running:
    """A server in a process of its own."""

    def __init__(self, root: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
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
    monkeypatch.setattr(submit, "_QUIET_SECONDS", 0.5)
    watcher, away = Watcher(), time.monotonic()
    again = threading.Thread(target=running.start)
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
def test_what_a_killed_submit_left_at_the_server_is_stopped(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = submit._start(running.server, "{}", tmp_path)  # and then nothing is heard of it
    assert token
    first = number(tmp_path)
    with submitted_run(running.server, "{}", tmp_path, None):
        states = running.states()
        assert states[first] == "stopped"
        assert states[number(tmp_path)] == "running"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_task_that_nobody_took_is_ended_and_a_fresh_one_is_left_alone(
    running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flwr.common.serde import fab_to_proto
    from flwr.supercore.fab import Fab

    content, digest = thin_app()
    with running.server.client(ControlHttpClient) as control:
        orphan = control.StartRun(StartRunRequest(fab=fab_to_proto(Fab(digest, content, {})))).run_id
    with (
        pytest.raises(FederationError, match="at the same moment"),
        submitted_run(running.server, "{}", tmp_path, None),
    ):
        pass
    monkeypatch.setattr(submit, "_ORPHAN_SECONDS", 0.0)
    with running.server.client(ControlHttpClient) as control:
        orphan = control.StartRun(StartRunRequest(fab=fab_to_proto(Fab(digest, content, {})))).run_id
    with submitted_run(running.server, "{}", tmp_path, None):
        assert running.states()[str(orphan)] == "failed"
