"""The administrator's port: who may ask, how many at once, and what is said when something is wrong."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
from collections.abc import Iterator, Mapping

import pytest

from fedtune.errors import ConfigError, ResourceError
from fedtune.monitoring import endpoint as at
from fedtune.monitoring.endpoint import Page, as_json, endpoint, parse_listen, watched


def ask(address: str, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(address, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def broken(_: Mapping[str, str]) -> Page:
    raise RuntimeError("the database is gone")


@pytest.fixture
def address() -> Iterator[str]:
    health = watched(lambda: b"a_total 1\n", lambda: True, lambda: False)
    pages = {"/": lambda _: Page(b"hello"), "/run": as_json, "/broken": broken, **health}
    with endpoint("0", pages) as made:
        yield made


def test_pages_and_health(address: str) -> None:
    assert address.startswith("127.0.0.1:")
    assert ask(address, "/") == (200, b"hello")
    assert ask(address, "/", "HEAD") == (200, b"")
    assert ask(address, "/run?id=a%22b&id2=")[1] == b'{"id": "a\\"b"}'
    assert ask(address, "/metrics") == (200, b"a_total 1\n")
    assert ask(address, "/healthz") == (200, b'{"status": "alive"}')
    assert ask(address, "/readyz") == (503, b'{"status": "not ready"}')
    assert ask(address, "/etc/passwd")[0] == ask(address, "/../")[0] == 404
    assert ask(address, "/", "POST")[0] == 501  # nothing can be changed


def test_what_cannot_be_told_is_503_and_the_reason_is_for_the_log(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    status, said = ask(address, "/broken")
    assert status == 503 and b"database" not in said and "the database is gone" in caplog.text


@pytest.mark.parametrize(
    "host", ["evil.example.org", "evil.example.org:9464", "", "10.0.0.1", "[::2]:1", "["]
)
def test_a_page_that_is_open_in_a_browser_here_cannot_read_it_by_a_name_of_its_own(
    address: str, host: str
) -> None:
    assert ask(address, "/metrics", Host=host)[0] == 403
    for right in ("localhost", "localhost:9464", "127.0.0.1:1", "[::1]:9464"):
        assert ask(address, "/metrics", Host=right)[0] == 200


@pytest.mark.slow
def test_on_another_address_any_name_may_be_asked_for() -> None:
    with endpoint("0.0.0.0:0", {"/": lambda _: Page(b"hello")}) as made:
        assert ask(f"127.0.0.1:{made.rpartition(':')[2]}", "/", Host="server-0.fedtune")[0] == 200


@pytest.mark.slow
def test_silent_connections_hold_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at._Handler, "timeout", 1.5)
    before = threading.active_count()
    with endpoint("0", {"/": lambda _: Page(b"hello")}) as made:
        host, _, port = made.partition(":")
        silent = [socket.create_connection((host, int(port))) for _ in range(40)]
        time.sleep(0.7)
        assert threading.active_count() - before <= 1 + at._AT_ONCE
        for one in silent:
            one.settimeout(60)
            assert one.recv(1) == b""  # those over the number at once; the others after the timeout
            one.close()
        assert ask(made, "/") == (200, b"hello")


@pytest.mark.slow
def test_connections_that_go_on_slowly_for_ever_hold_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(at, "_SECONDS", 0.5)
    monkeypatch.setattr(at, "_AT_ONCE", 1)
    with endpoint("0", {"/": lambda _: Page(b"hello")}) as address:
        host, port = address.split(":")
        with socket.create_connection((host, int(port))) as slow:
            began = time.monotonic()
            with contextlib.suppress(OSError):
                while time.monotonic() - began < 10:
                    slow.sendall(b"G")  # each time a little before it would have been closed
                    time.sleep(0.2)
            assert 0.5 < time.monotonic() - began < 10
        assert ask(address, "/")[0] == 200


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("9464", ("127.0.0.1", 9464)), (":9464", ("127.0.0.1", 9464)), ("0.0.0.0:1", ("0.0.0.0", 1)),
        ("[::1]:80", ("::1", 80)), ("name.example:80", ("name.example", 80)), (" 80 ", ("127.0.0.1", 80)),
    ],
)  # fmt: skip
def test_where_to_listen(text: str, parsed: tuple[str, int]) -> None:
    assert parse_listen(text) == parsed


@pytest.mark.parametrize("text", ["", "here", "70000", "here:", "-1", "1.5", "two words:80", "٣"])
def test_no_address(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--monitor .*: give a port, as 9464 .*, or HOST:PORT"):
        parse_listen(text)


@pytest.mark.slow
def test_a_port_that_is_taken_is_said() -> None:
    with (
        endpoint("0", {}) as made,
        pytest.raises(ResourceError, match="Choose another port"),
        endpoint(made, {}),
    ):
        pytest.fail("it listens twice")
