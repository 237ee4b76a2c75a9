"""`fedtune serve` as a process: it starts, answers, and SIGTERM loses nothing that was accepted."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from fedtune.errors import ConfigError, ModelError, ResourceError
from fedtune.serving.serve import serve
from tests.support.golden import Golden


@pytest.fixture
def process(exported: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """(the process, the address of /predict)"""
    started = subprocess.Popen(
        [sys.executable, "-m", "fedtune", "serve", str(exported), "--port", "0", "--threads", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        assert started.stdout is not None
        line = started.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/predict", line)
        assert found, line or started.communicate()[1]
        yield started, found[0]
    finally:
        started.kill()
        started.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_when_what_was_accepted_is_answered(
    process: tuple[subprocess.Popen[str], str], number: signal.Signals
) -> None:
    server, address = process
    texts = ["the film was good and so very nice"] * 256
    assert httpx.post(address, json={"text": "sad"}, timeout=30).status_code == 200

    def ask(_: int) -> int:
        try:
            return httpx.post(address, json={"texts": texts}, timeout=60).status_code
        except (httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError):
            return 0  # it came after the port was closed, so the server has not read it

    with ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(ask, one) for one in range(48)]
        time.sleep(0.3)
        server.send_signal(number)
        found = [one.result() for one in answers]
    assert set(found) <= {200, 503, 0} and found.count(200) >= 1
    assert server.wait(30) == 0
    out, log = server.communicate()
    # Each request that the server read is in its log, and was answered with what the log says.
    assert log.count('"status": 200') == found.count(200) + 1
    assert log.count('"status":') == len(found) - found.count(0) + 1
    assert "Traceback" not in log and "film" not in log + out


def test_a_changed_folder_is_not_served(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    path = folder / "onnx" / "model_int8.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"onnx/model_int8\.onnx was changed"):
        serve(folder, "127.0.0.1", 0)


def test_what_cannot_be_served(exported: Path, monkeypatch: pytest.MonkeyPatch, golden: Golden) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    with taken, pytest.raises(ResourceError, match="Choose another"):
        serve(exported, "127.0.0.1", taken.getsockname()[1])
    for options in ({"rate": 0.0}, {"rate": float("nan")}, {"waiting": 0}):
        with pytest.raises(ConfigError, match=f"--{next(iter(options))}"):
            serve(exported, "127.0.0.1", 0, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--port 70000"):
        serve(exported, "127.0.0.1", 70000)
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "uvicorn" else find_spec(name, *rest)
    )
    with pytest.raises(ConfigError) as raised:
        serve(exported, "127.0.0.1", 0)
    golden(raised)
