"""What of a server is open to whom. A call that nobody opened is closed."""

from __future__ import annotations

import asyncio
import base64
import datetime
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.constant import TIMESTAMP_HEADER
from flwr.supercore.constant import FLEET_HTTP_SIGNATURE_HEADER

from fedtune.deploy import certificates, server
from fedtune.deploy.flower import superlink_app
from fedtune.deploy.operators import Operators
from fedtune.deploy.provision import provision
from fedtune.deploy.server import FOR_NODES, FOR_OPERATORS, Gate
from fedtune.errors import ConfigError
from tests.support.golden import Golden
from tests.support.ports import free_port

TOKEN = "t" * 43
KEY = ec.generate_private_key(ec.SECP384R1())
NODE = certificates.public_key_of(KEY)


def signature(key: ec.EllipticCurvePrivateKey = KEY, ago: float = 0.0) -> list[tuple[bytes, bytes]]:
    """Headers of a request that was signed so many seconds ago."""
    stamp = (datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=ago)).isoformat().encode()
    signed = base64.b64encode(key.sign(stamp, ec.ECDSA(hashes.SHA256())))
    return [(TIMESTAMP_HEADER.encode(), stamp), (FLEET_HTTP_SIGNATURE_HEADER.encode(), signed)]


class Admission:
    """Lets one key in."""

    def refusal_of_request(self, header: bytes) -> tuple[int, str] | None:
        return None if header == base64.b64encode(NODE) else (403, "not enrolled")


PEOPLE = Operators(Path("/nonexistent"), TOKEN)


async def nothing() -> dict[str, Any]:
    """The body of a request that has none."""
    return {"type": "http.request", "body": b"", "more_body": False}


class Behind:
    """What is behind the gate: notes what came through."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked.append(scope["path"])
        await server._respond(send, 200, {})


def ask(path: str, token: bytes | None = None, node: bool = False) -> tuple[int, bool]:
    """(status, whether it came through) of a request."""
    behind, statuses = Behind(), []
    headers = [(b"content-length", b"0")]
    if token is not None:
        headers.append((server.TOKEN_HEADER.encode(), token))
    if node:
        headers += [(server._NODE_KEY, base64.b64encode(NODE)), *signature()]

    async def send(message: dict[str, Any]) -> None:
        statuses.append(message.get("status"))

    scope = {"type": "http", "path": path, "method": "POST", "headers": headers}
    asyncio.run(Gate(behind, PEOPLE, Admission())(scope, nothing, send))  # type: ignore[arg-type]
    return next(one for one in statuses if one), bool(behind.asked)


@pytest.fixture(scope="module")
def routes(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Every path that the installed Flower serves."""
    from fastapi.routing import iter_route_contexts

    folder = tmp_path_factory.mktemp("server")
    for name in ("ca.crt", "server.crt", "server.key"):
        (folder / name).write_text("")
    app = superlink_app(folder, "127.0.0.1", 9)
    paths = {str(one.route.path) for one in iter_route_contexts(app.routes) if hasattr(one.route, "path")}
    prefixed = {str(one.path) for one in iter_route_contexts(app.routes) if hasattr(one, "path")}
    return paths | prefixed


def test_what_is_open_is_what_flower_has_and_fedtune_uses(routes: set[str]) -> None:
    assert len(routes) > 60, "or this does not read Flower's routes any more"
    of_flower = {path for path in FOR_OPERATORS if not path.startswith("/v1/fedtune/")}
    assert {*FOR_NODES, *of_flower} <= routes, "a call that Flower has no more"
    for path in sorted(routes):
        with_token, with_key = ask(path, token=TOKEN.encode()), ask(path, node=True)
        assert with_token == ((200, True) if path in FOR_OPERATORS else (403, False)), path
        assert with_key == ((200, True) if path in FOR_NODES else (403, False)), path
        assert ask(path) == (403, False), path


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/register-node", "/v1/control/unregister-node", "/v1/fleet/register-node",
        "/v1/fleet/unregister-node", "/v1/control/add-node-to-federation", "/v1/runtime/a-later-call",
        "/v1/fleet/a-later-call", "/v1/control/list-nodes/", "/v1/control//list-nodes", "/docs", "/",
    ],
)  # fmt: skip
def test_neither_the_token_nor_a_nodes_key_opens_anything_else(path: str) -> None:
    assert ask(path, token=TOKEN.encode(), node=True) == (403, False)


def passed(*headers: tuple[bytes, bytes]) -> list[str]:
    """What came through of a node's request with these headers."""
    behind = Behind()

    async def send(message: dict[str, Any]) -> None:
        pass

    scope = {"type": "http", "path": "/v1/fleet/pull-messages", "method": "POST"}
    scope["headers"] = [*headers, *signature()]  # type: ignore[assignment]
    asyncio.run(Gate(behind, PEOPLE, Admission())(scope, nothing, send))  # type: ignore[arg-type]
    return behind.asked


def test_a_request_that_names_two_keys_is_let_to_nothing() -> None:
    """The gate would look at the last of them and Flower at the first: a suspended node would be let in."""
    length, mine = (b"content-length", b"0"), (server._NODE_KEY, base64.b64encode(NODE))
    assert passed(length, mine)
    assert not passed(length, (server._NODE_KEY, base64.b64encode(b"suspended")), mine)
    assert not passed(length, mine, (server._NODE_KEY, base64.b64encode(b"suspended")))


def test_a_request_in_chunks_has_no_size_whatever_length_it_names() -> None:
    mine = (server._NODE_KEY, base64.b64encode(NODE))
    assert not passed(mine, (b"content-length", b"5"), (b"transfer-encoding", b"chunked"))
    assert not passed(mine, (b"transfer-encoding", b"chunked"))


def test_a_nodes_request_is_let_to_nothing_unless_its_key_signed_it_now() -> None:
    """Its public key is no secret: whoever has read it must not have a body read."""
    behind, answers = Behind(), []

    async def send(message: dict[str, Any]) -> None:
        answers.append(message)

    def ask_with(*signed: tuple[bytes, bytes]) -> int:
        answers.clear()
        headers = [(b"content-length", b"9"), (server._NODE_KEY, base64.b64encode(NODE)), *signed]
        scope = {"type": "http", "path": "/v1/fleet/push-object", "method": "POST", "headers": headers}
        asyncio.run(Gate(behind, PEOPLE, Admission())(scope, None, send))  # type: ignore[arg-type]
        assert (b"connection", b"close") in answers[0]["headers"]
        return int(answers[0]["status"])

    other = ec.generate_private_key(ec.SECP384R1())
    wrong = [(), signature(other), signature(ago=400), signature(ago=-60), signature()[:1], signature()[1:]]
    assert [ask_with(*one) for one in wrong] == [401] * len(wrong)
    assert not behind.asked


def test_flowers_header_with_a_nodes_key_is_the_one_that_is_read() -> None:
    from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER

    assert FLEET_HTTP_PUBLIC_KEY_HEADER.encode() == server._NODE_KEY


@pytest.mark.parametrize("given", [None, b"", b"t", b"t" * 42, b"t" * 44, b"T" * 43])
def test_a_token_that_is_empty_short_or_another_opens_nothing(given: bytes | None) -> None:
    assert ask("/v1/control/list-nodes", token=given) == (403, False)
    assert ask(server.PUBLISHED_PATH, token=given) == (403, False)
    assert ask("/v1/control/list-nodes", token=TOKEN.encode()) == (200, True)


def test_an_empty_token_serves_nobody(golden: Golden) -> None:
    with pytest.raises(ConfigError) as raised:
        Operators(Path("/nonexistent"), "")
    golden(raised)


def test_an_empty_token_never_passes_even_if_it_were_the_token() -> None:
    people = Operators(Path("/nonexistent"), TOKEN)
    people._token = b""
    assert people.who({}, server.TOKEN_HEADER) is None
    assert people.who({server.TOKEN_HEADER.encode(): b""}, server.TOKEN_HEADER) is None


def test_the_server_is_not_started_with_a_token_that_is_none(tmp_path: Path) -> None:
    import yaml

    from fedtune.deploy.provision import provision

    file = tmp_path / "federation.yaml"
    file.write_text(yaml.safe_dump({"name": "trial", "server": "127.0.0.1:9", "sites": ["a"]}))
    folder = provision(file, tmp_path / "out").folder / "server"
    for content in ("", "\n", "short\n"):
        (folder / "operator.token").write_text(content)
        with pytest.raises(ConfigError, match="operator.token"):
            server.run_server(folder, pytest.fail)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_told_to_end_has_done_what_it_was_asked(
    number: signal.Signals, tmp_path: Path
) -> None:
    """It ended with 130, which a service manager takes for a failure."""
    (tmp_path / "federation.yaml").write_text(f"name: a\nserver: 127.0.0.1:{free_port()}\nsites: [b]\n")
    provision(tmp_path / "federation.yaml", tmp_path / "out")
    with subprocess.Popen(
        [sys.executable, "-m", "fedtune", "server", str(tmp_path / "out" / "server"), "--monitor", "0"],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        while "has its page" not in (line := process.stderr.readline()):
            assert line, "it ended"
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "the server has ended" in said and "Interrupted" not in said
