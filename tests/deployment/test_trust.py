"""Whom a node trusts: the right server over TLS, the thin app and no other, and its own worker's frames."""

from __future__ import annotations

import asyncio
import io
import os
import socket
import ssl
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedtune import __version__
from fedtune.engines.deployment import certificates, channel
from fedtune.engines.deployment.reach import check_server
from fedtune.engines.deployment.server import TOKEN_HEADER, Gate, _check_port
from fedtune.engines.deployment.thin import check_app, thin_app
from fedtune.errors import ConfigError, FederationError, ResourceError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    certificates.make_authority(tmp_path, "trial")
    return tmp_path


@contextmanager
def listening(folder: Path | None) -> Iterator[str]:
    """A server at a free port: with TLS by the certificate in `folder`, or plain."""
    listener = socket.create_server(("127.0.0.1", 0))
    context = None
    if folder is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "server.crt", folder / "server.key")

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            try:
                if context is None:
                    connection.recv(1)
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                else:
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
    with listening(folder) as address, pytest.raises(FederationError, match=r"expired.*--renew.*clock"):
        check_server(address, folder / "ca.crt")


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
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ResourceError, match="does not answer"):
        check_server(f"127.0.0.1:{port}", folder / "ca.crt")
    with pytest.raises(ConfigError, match="no authority certificate"):
        check_server(f"127.0.0.1:{port}", folder / "none.crt")


def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=f"Port {port} .*another server of this federation"):
            _check_port("127.0.0.1", port)


def test_the_thin_app_is_accepted_and_holds_no_code() -> None:
    content, _ = thin_app()
    check_app(content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert sorted(archive.namelist()) == [".info/CONTENT", "pyproject.toml"]


def _with(content: bytes, **files: str) -> bytes:
    """The app with files added or replaced ('.' written as '__')."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
        changed = {name.replace("__", "."): text for name, text in files.items()}
        for name in old.namelist():
            new.writestr(name, changed.pop(name, None) or old.read(name))
        for name, text in changed.items():
            new.writestr(name, text)
    return made.getvalue()


def test_any_other_app_is_refused_unrun() -> None:
    content, _ = thin_app()
    with pytest.raises(FederationError, match="not fedtune's.*no code of that app"):
        check_app(_with(content, evil__py="raise SystemExit"))
    pyproject = f'x = 1\n[project]\nname = "fedtune-thin"\nversion = "{__version__}"\n'
    with pytest.raises(FederationError, match="not fedtune's"):
        check_app(_with(content, pyproject__toml=pyproject))
    with pytest.raises(FederationError, match="not fedtune's"):
        check_app(b"no archive at all")


def test_another_version_is_refused_with_both_named() -> None:
    pyproject = '[project]\nname = "fedtune-thin"\nversion = "9.9"\n'
    with pytest.raises(FederationError, match=rf"fedtune 9\.9, and this node fedtune {__version__}"):
        check_app(_with(thin_app()[0], pyproject__toml=pyproject))


def test_frames_and_peers(tmp_path: Path) -> None:
    one, other = socket.socketpair()
    with one, other:
        channel.send(one, {"run": 2**60}, [b"", b"x" * 10])
        assert channel.receive(other) == ({"run": 2**60}, [b"", b"x" * 10])
        assert channel.peer(other) == (os.getpid(), os.getuid())
        one.sendall((200_000).to_bytes(8, "big"))
        with pytest.raises(FederationError, match="200000 bytes"):
            channel.receive(other)
    one, other = socket.socketpair()
    with one, other:
        data = b'{"lengths": [99999999999999]}'
        one.sendall(len(data).to_bytes(8, "big") + data)
        with pytest.raises(FederationError, match="malformed or names more bytes"):
            channel.receive(other)
        one.close()
        with pytest.raises(EOFError):
            channel.receive(other)


@pytest.mark.parametrize(
    ("path", "token", "status"),
    [
        ("/v1/fleet/pull-messages", None, 200),
        ("/v1/fleet/register-node", "secret", 403),
        ("/v1/control/start-run", None, 403),
        ("/v1/control/start-run", "wrong", 403),
        ("/v1/control/start-run", "secret", 200),
        ("/v1/runtime/acquire-task", None, 403),
        ("/docs", None, 403),
    ],
)
def test_only_nodes_and_the_operator_are_let_in(path: str, token: str | None, status: int) -> None:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [] if token is None else [(TOKEN_HEADER.encode(), token.encode())]
    scope = {"type": "http", "path": path, "headers": headers}
    asyncio.run(Gate(app, "secret")(scope, None, send))
    assert sent[0]["status"] == status
