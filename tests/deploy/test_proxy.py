"""Through an HTTP proxy with CONNECT, as hospitals have them: HTTPS_PROXY, NO_PROXY, one that refuses."""

from __future__ import annotations

import base64
import contextlib
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtune.deploy import join
from fedtune.deploy.certificates import check_server, https_connection
from fedtune.deploy.client import status
from fedtune.errors import ConfigError, ResourceError
from tests.support.real_superlink import Real


class Proxy:
    """Connects whoever has the password, and notes whereto."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                head += client.recv(1000)
            word, target, _ = head.split(b" ", 2)
            if base64.b64encode(b"site:secret") not in head:
                client.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
                return
            self.asked.append(f"{word.decode()} {target.decode()}")
            host, port = target.decode().rsplit(":", 1)
            with socket.create_connection((host, int(port))) as server:
                client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                while True:
                    for ready in select.select([client, server], [], [])[0]:
                        data = ready.recv(65536)
                        if not data:
                            return
                        (server if ready is client else client).sendall(data)

    def close(self) -> None:
        self._listener.close()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    made = Real(tmp_path_factory.mktemp("real"))
    yield made
    made.close()


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    made = Proxy()
    for name in ("https_proxy", "no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", f"http://site:secret@{made.address}")
    yield made
    made.close()


def test_each_part_asks_the_server_through_the_proxy(real: Real, proxy: Proxy) -> None:
    site, through = real.site("clinic-1"), f"CONNECT {real.address}"
    check_server(site.server, Path(site.ca))
    assert proxy.asked == [through]
    join.check_in(site, real.keys["clinic-1"], pytest.fail)
    assert set(proxy.asked) == {through} and len(proxy.asked) == 2
    status(real.folder)  # the operator's questions, by Flower's clients and httpx
    assert set(proxy.asked) == {through} and len(proxy.asked) >= 5


def test_no_proxy_is_obeyed(real: Real, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "example.org,127.0.0.1")
    site = real.site("clinic-1")
    check_server(site.server, Path(site.ca))
    join.check_in(site, real.keys["clinic-1"], pytest.fail)
    status(real.folder)
    assert proxy.asked == []


def test_a_proxy_that_refuses_is_named_without_its_password(
    real: Real, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://site:wrong@{proxy.address}")
    site = real.site("clinic-1")
    with pytest.raises(ResourceError) as raised:
        check_server(site.server, Path(site.ca))
    said = str(raised.value)
    assert f"through the proxy http://{proxy.address} (HTTPS_PROXY)" in said and "407" in said
    assert "wrong" not in said and proxy.asked == []


def test_another_kind_of_proxy_is_refused(real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "socks5://site:secret@127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"socks5://127.0.0.1:1, and .*NO_PROXY"):
        https_connection(real.address, Path(real.site("clinic-1").ca), 1.0)
