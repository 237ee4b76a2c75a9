"""Whom a node trusts, and whom a server: TLS, and the worker's frames."""

from __future__ import annotations

import datetime
import os
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedtune.deploy import certificates, channel
from fedtune.deploy.certificates import check_server
from fedtune.deploy.server import _listen
from fedtune.errors import ConfigError, FederationError, ResourceError
from tests.support.golden import Golden
from tests.support.ports import free_port


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    certificates.make_authority(tmp_path, "trial")
    return tmp_path


@contextmanager
def listening(folder: Path | None) -> Iterator[str]:
    """A server at a free port: with TLS by the certificate that is in `folder` now, or plain."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            try:
                if folder is None:
                    connection.recv(1)
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                else:
                    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                    context.load_cert_chain(folder / "server.crt", folder / "server.key")
                    context.wrap_socket(connection, server_side=True).close()
            except OSError:
                pass
            finally:
                connection.close()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


def test_the_right_server_is_trusted(folder: Path) -> None:
    certificates.make_server_certificate(folder, folder, ["127.0.0.1"], 9)
    with listening(folder) as address:
        check_server(address, folder / "ca.crt")


def test_a_wrong_authority_is_named(folder: Path) -> None:
    certificates.make_server_certificate(folder, folder, ["127.0.0.1"], 9)
    other = folder / "other"
    other.mkdir()
    certificates.make_authority(other, "other")
    with listening(folder) as address, pytest.raises(FederationError, match="not the one that the authority"):
        check_server(address, other / "ca.crt")


def test_an_expired_certificate_is_named(folder: Path) -> None:
    certificates.make_server_certificate(folder, folder, ["127.0.0.1"], -2)
    with listening(folder) as address, pytest.raises(ResourceError, match=r"expired.*--renew.*clock"):
        check_server(address, folder / "ca.crt")


def test_a_node_waits_for_a_certificate_that_is_renewed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    certificates.make_server_certificate(folder, folder, ["127.0.0.1"], -2)

    def renews(seconds: float) -> None:
        certificates.make_server_certificate(folder, folder, ["127.0.0.1"], 9)

    with listening(folder) as address:
        monkeypatch.setattr(certificates.time, "sleep", renews)
        assert 8 < certificates.wait_for_server(address, folder / "ca.crt", said.append) < 10
    (line,) = said
    assert "has expired" in line and "--renew" in line and line.endswith("Trying again.")


def test_a_clock_that_is_behind_the_certificate_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the site, for which the certificate is from the future, and of the server, before it serves."""
    monkeypatch.setattr(certificates, "_EARLY", datetime.timedelta(days=-1))
    certificates.make_server_certificate(folder, folder, ["127.0.0.1"], 9)
    with (
        listening(folder) as address,
        pytest.raises(ResourceError, match="not valid yet: check this machine"),
    ):
        check_server(address, folder / "ca.crt")
    with pytest.raises(
        ConfigError, match=r"valid from .* on, and this machine's clock says .* Set the clock"
    ):
        certificates.check_server_certificate(folder)


def test_a_certificate_for_another_name_is_named(folder: Path) -> None:
    certificates.make_server_certificate(folder, folder, ["fed.example.org"], 9)
    with (
        listening(folder) as address,
        pytest.raises(FederationError, match=r"another name.*certificate_names"),
    ):
        check_server(address, folder / "ca.crt")


def test_a_server_without_tls_is_named(folder: Path) -> None:
    with listening(None) as address, pytest.raises(FederationError, match="does not speak TLS"):
        check_server(address, folder / "ca.crt")


def test_nobody_there_is_worth_another_try(folder: Path) -> None:
    port = free_port()
    with pytest.raises(ResourceError, match="does not answer"):
        check_server(f"127.0.0.1:{port}", folder / "ca.crt")
    with pytest.raises(ConfigError, match="no authority certificate"):
        check_server(f"127.0.0.1:{port}", folder / "none.crt")


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=f"Port {port} .*another server of this federation"):
            _listen("127.0.0.1", port)


def test_frames_and_peers(tmp_path: Path, golden: Golden) -> None:
    one, other = socket.socketpair()
    with one, other:
        channel.send(one, {"run": 2**60}, [b"", b"x" * 10])
        assert channel.receive(other) == ({"run": 2**60}, [b"", b"x" * 10])
        assert channel.peer(other) == (os.getpid(), os.getuid())
        one.sendall((200_000).to_bytes(8, "big"))
        with pytest.raises(FederationError) as raised:
            channel.receive(other)
        assert "200000" in str(raised.value)
        golden(raised)
    one, other = socket.socketpair()
    with one, other:
        data = b'{"lengths": [99999999999999]}'
        one.sendall(len(data).to_bytes(8, "big") + data)
        with pytest.raises(FederationError) as raised:
            channel.receive(other)
        golden(raised)
        one.close()
        with pytest.raises(EOFError):
            channel.receive(other)
