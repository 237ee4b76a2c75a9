"""`fedtune serve` as a process: it starts, answers, and SIGTERM loses nothing that was accepted."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any

import httpx
import pytest
import uvicorn

from fedtune.errors import ConfigError, ModelError, ResourceError
from fedtune.serving.serve import serve
from tests.support.golden import Golden
from tests.support.ports import free_port


def start(*words: str, log: IO[str] | int = subprocess.PIPE) -> tuple[subprocess.Popen[str], str]:
    """(the process, the address of /predict); a long `log` needs a file, for a full pipe holds the process"""
    started = subprocess.Popen(
        [sys.executable, "-m", "fedtune", "serve", *words],
        stdout=subprocess.PIPE, stderr=log, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert started.stdout is not None
    line = started.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:\d+/predict", line)
    if not found:
        started.kill()
        raise AssertionError(line or started.communicate()[1])
    return started, found[0]


@pytest.fixture
def process(exported: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    started, address = start(str(exported), "--port", "0")
    yield started, address
    started.kill()
    started.communicate()


@pytest.mark.slow
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
        next(one for one in as_completed(answers) if one.result() == 200)
        server.send_signal(number)
        found = [one.result() for one in answers]
    assert set(found) <= {200, 503, 0} and found.count(200) >= 1
    assert server.wait(30) == 0
    out, log = server.communicate()
    # Each request that the server read is in its log, and was answered with what the log says.
    assert log.count('"status": 200') == found.count(200) + 1
    assert log.count('"status":') == len(found) - found.count(0) + 1
    assert "Traceback" not in log and "film" not in log + out
    assert all(json.loads(line)["time"] for line in log.splitlines())


def ask_until(stop: threading.Event, address: str, heard: SimpleQueue[None]) -> tuple[int, int]:
    """(answers with 200, answers that broke off) of one client that asks again and again.

    Each of the former is put into `heard`.
    """
    good = broken = 0
    with httpx.Client(timeout=60) as client:
        while not stop.is_set():
            try:
                if client.post(address, json={"texts": ["sad", "the film was good"]}).status_code == 200:
                    good += 1
                    heard.put(None)
            except httpx.ConnectError:
                stop.wait(0.02)  # between two servers
            except httpx.TransportError:
                broken += 1
    return good, broken


@pytest.mark.parametrize("restarts", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_restarts_under_load_lose_nothing_that_was_accepted(
    exported: Path, restarts: int, tmp_path: Path
) -> None:
    port, heard = free_port(), SimpleQueue[None]()
    stop, answered = threading.Event(), 0
    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(ask_until, stop, f"http://127.0.0.1:{port}/predict", heard) for _ in range(4)]
        try:
            for _ in range(restarts):
                with (tmp_path / "log").open("w+", encoding="utf-8") as lines:
                    server, _address = start(str(exported), "--port", str(port), log=lines)
                    for _ in range(11):
                        heard.get(timeout=60)
                    server.send_signal(signal.SIGTERM)
                    assert server.wait(30) == 0
                    lines.seek(0)
                    log = [json.loads(line) for line in lines]
                assert all(one["status"] in (200, 503) for one in log)
                answered += sum(one["status"] == 200 for one in log)
        finally:
            stop.set()
    good, broken = map(sum, zip(*(one.result() for one in clients), strict=True))
    # A connection that the server closed unread is no request of its: whatever it read, its client has.
    assert good == answered and answered > 10 * restarts, (good, broken)


@pytest.mark.slow
def test_a_client_that_says_nothing_or_says_it_slowly_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import asyncio

    from fedtune.deploy import door

    monkeypatch.setattr(door, "HEADER_SECONDS", 0.3)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0.5)  # an answer may take longer than the headers
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    async def main() -> None:
        config = uvicorn.Config(
            app, http=door.HeaderDeadline, log_config=None, lifespan="off", timeout_keep_alive=1
        )
        server = uvicorn.Server(config)
        listener = socket.create_server(("127.0.0.1", 0))
        serving = asyncio.create_task(server.serve([listener]))
        while not server.started:
            await asyncio.sleep(0.01)

        async def say(*parts: bytes) -> bytes:
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            try:
                for part in parts:
                    writer.write(part)
                    await asyncio.sleep(0.1)
                    if reader.at_eof():
                        break
                return await asyncio.wait_for(reader.read(), 60)
            except ConnectionError:
                return b""
            finally:
                writer.close()

        asked = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
        silent, slow, quick, second = await asyncio.gather(
            say(),
            say(b"GET / HTTP/1.1\r\n", *[b"A: b\r\n"] * 20),
            say(asked),
            say(asked, asked[:20], *[b"A: b\r\n"] * 30),
        )
        assert silent == slow == b""
        assert quick.startswith(b"HTTP/1.1 200") and second.count(b"HTTP/1.1") <= 1
        server.should_exit = True
        await serving

    asyncio.run(main())


def test_an_idle_connection_is_kept_for_longer_than_a_proxy_keeps_it(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[uvicorn.Server] = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda server, sockets: seen.append(server))
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
    try:
        serve([str(exported)], "127.0.0.1", 0, threads=1)
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    assert seen[0].config.timeout_keep_alive > 60
    assert seen[0].config.limit_concurrency is None  # which would refuse /healthz too


def test_who_stays_connected_is_told_to_come_no_more_before_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import asyncio

    from fedtune.serving import serve as module

    monkeypatch.setattr(module, "_GOODBYE", 600.0)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    async def main() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        where = listener.getsockname()
        config = uvicorn.Config(app, log_config=None, lifespan="off", timeout_keep_alive=600)
        server = module._server(config, listener)
        serving = asyncio.create_task(server.serve([listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection(*where)

        async def ask() -> bytes:
            writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            return await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)

        assert b"connection: close" not in await ask()
        server.should_exit = True
        while server.servers[0].is_serving():
            await asyncio.sleep(0.01)
        answer = await ask()
        assert answer.startswith(b"HTTP/1.1 200") and b"connection: close" in answer
        await asyncio.wait_for(serving, 60)  # it waits for nobody else
        writer.close()

    asyncio.run(main())


def test_requests_that_are_cut_off_at_the_end_leave_no_traceback(caplog: pytest.LogCaptureFixture) -> None:
    """A second Ctrl-C, or an answer that takes longer than the service waits."""
    import asyncio

    from fedtune.serving import serve as module

    async def app(scope: Any, receive: Any, send: Any) -> None:
        asked.set()
        await asyncio.sleep(600)

    async def main() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_config=None, lifespan="off", timeout_graceful_shutdown=0)
        server = module._server(config, listener)
        serving = asyncio.create_task(server.serve([listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        reader, writer = await asyncio.open_connection(*listener.getsockname())
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        await asyncio.wait_for(asked.wait(), 60)
        server.should_exit = True
        await asyncio.wait_for(serving, 60)
        await asyncio.wait_for(reader.read(), 60)  # cut off
        writer.close()

    asked = asyncio.Event()
    asyncio.run(main())
    assert "Cancel 1 running task" in caplog.text
    assert "Traceback" not in caplog.text


@pytest.mark.slow
def test_a_signal_as_soon_as_the_address_is_told_is_not_forgotten(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes before uvicorn listens for any."""
    import uvicorn

    run = uvicorn.Server.run

    def told(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Timer(100.0, setattr, (server, "should_exit", True)).start()
        run(server, sockets)

    monkeypatch.setattr(uvicorn.Server, "run", told)
    before = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
    started = time.monotonic()
    try:
        serve([str(exported)], "127.0.0.1", 0, threads=1)
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    assert time.monotonic() - started < 100.0


def test_a_changed_folder_is_not_served(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(exported, folder)
    path = folder / "onnx" / "model_int8.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"onnx/model_int8\.onnx was changed"):
        serve([str(folder)], "127.0.0.1", 0)


def test_what_cannot_be_served(exported: Path, monkeypatch: pytest.MonkeyPatch, golden: Golden) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    with taken, pytest.raises(ResourceError, match="Choose another"):
        serve([str(exported)], "127.0.0.1", taken.getsockname()[1])
    for options in (
        {"rate": 0.0}, {"rate": float("nan")}, {"waiting": 0}, {"workers": -1}, {"threads": -1},
        {"keys": Path("/gone/keys")},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"--{next(iter(options))}"):
            serve([str(exported)], "127.0.0.1", 0, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--port 70000"):
        serve([str(exported)], "127.0.0.1", 70000)
    with pytest.raises(ConfigError) as raised:
        serve([f"film={exported}", f"mood={exported}", f"film={exported}"], "127.0.0.1", 0)
    golden(raised)
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "uvicorn" else find_spec(name, *rest)
    )
    with pytest.raises(ConfigError) as raised:
        serve([str(exported)], "127.0.0.1", 0)
    golden(raised)
