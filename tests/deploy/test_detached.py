"""A submit that goes on without a terminal: that it starts, what is seen of it, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedtune.cli.app import main
from fedtune.deploy import detached
from fedtune.deploy.detached import detach, follow
from fedtune.errors import ConfigError, FederationError

STARTS = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
print("round 1/2", flush=True)
(folder / "checkpoint").mkdir()
(folder / "checkpoint" / "server-run").write_text("77")
while not (folder / "go-on").exists():
    time.sleep(0.01)
print("round 2/2", flush=True)
(folder / "record.json").write_text("{}")
"""
WAITS = """
import time
print("waiting for this run's turn: 2 go on at the server, 0 wait before it", flush=True)
time.sleep(60)
"""
FAILS = """
import sys
print("title\\n\\nThe site refuses:\\n6 rounds are more than the permitted 5.")
sys.exit(1)
"""


def started_as(program: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in for `fedtune submit`."""
    begin = subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        assert command[3] == "submit" and command[-1] == f"hydra.run.dir={folder}"
        assert options["start_new_session"] is True
        return begin([sys.executable, "-c", program, str(folder)], **options)

    monkeypatch.setattr(detached.subprocess, "Popen", popen)
    monkeypatch.setattr(detached, "_LOOK_SECONDS", 0.05)


@pytest.mark.slow
def test_a_record_of_before_is_not_the_success_of_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "record.json").write_text("{}")
    os.utime(folder / "record.json", (1e9, 1e9))
    started_as(STARTS.replace('(folder / "record.json")', '(folder / "other.json")'), folder, monkeypatch)
    detach(tmp_path, ["data=files"], folder)
    assert not follow(folder, lambda text: (folder / "go-on").touch())


@pytest.mark.slow
def test_a_detached_run_is_followed_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    started_as(STARTS, folder, monkeypatch)
    process, number = detach(tmp_path, ["data=files"], folder)
    assert number == "77" and process > 0
    with pytest.raises(ConfigError, match="goes on: look at it with `fedtune follow"):
        detach(tmp_path, ["data=files"], folder)
    seen: list[str] = []

    def see(text: str) -> None:
        seen.append(text)
        (folder / "go-on").touch()

    assert follow(folder, see)
    assert "".join(seen) == "round 1/2\nround 2/2\n" and len(seen) == 2
    assert follow(folder, seen.append), "again, when it has long ended"


@pytest.mark.slow
def test_a_run_that_waits_for_its_turn_is_said_to_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    started_as(WAITS, folder, monkeypatch)
    process, number = detach(tmp_path, [], folder)
    assert number is None
    one = detached._process_of(folder)
    assert one is not None and one.pid == process
    seen: list[str] = []
    ended: list[bool] = []
    told = threading.Event()

    def see(text: str) -> None:
        seen.append(text)
        told.set()

    looks = threading.Thread(target=lambda: ended.append(follow(folder, see)))
    looks.start()
    assert told.wait(60) and looks.is_alive() and "turn" in "".join(seen)
    one.kill()
    looks.join(60)
    assert ended == [False]


@pytest.mark.slow
def test_a_run_that_waits_for_its_turn_is_ended_as_detach_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    started_as(WAITS, folder, monkeypatch)
    process, _ = detach(tmp_path, [], folder)
    assert detached._process_of(folder) is not None
    with pytest.raises(SystemExit) as ended:
        main(["stop", str(tmp_path), str(folder)])
    assert not ended.value.code and "had not begun, and will not" in capsys.readouterr().out
    assert detached._process_of(folder) is None and not psutil.pid_exists(process)
    with pytest.raises(SystemExit) as ended:
        main(["stop", str(tmp_path), str(folder)])
    assert ended.value.code == 2 and "is no run folder" in capsys.readouterr().err


def test_a_run_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    started_as(FAILS, folder, monkeypatch)
    with pytest.raises(FederationError, match=r"did not start\. The site refuses: 6 rounds are more"):
        detach(tmp_path, [], folder)
    assert not follow(folder, lambda text: None)


def test_a_folder_that_nobody_submitted_from_cannot_be_followed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="was not submitted with --detach"):
        follow(tmp_path, pytest.fail)
