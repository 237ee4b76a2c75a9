"""Who holds a server's connections, seconds and memory: whoever has no credential holds up nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE

from fedtune.deploy import certificates, door, join, server
from fedtune.deploy.certificates import check_server
from fedtune.deploy.door import Bodies, BodyTimeout, Connections
from fedtune.deploy.provision import provision
from fedtune.errors import ResourceError
from tests.support.crowd import MIB, crowd, half_a_body
from tests.support.real_superlink import Real

# --- the rules ---------------------------------------------------------------------------------------


def test_the_oldest_connection_without_a_credential_makes_room_and_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(door, "UNPROVEN_PER_ADDRESS", 2)
    monkeypatch.setattr(door, "UNPROVEN", 3)
    ended: list[str] = []
    connections = Connections(most=100)

    def admit(name: str, address: str) -> Any:
        return connections.admit(address, lambda: ended.append(name))

    node = admit("node", "a")
    connections.prove(node, b"key")
    admit("first", "a"), admit("second", "a"), admit("third", "a")
    assert ended == ["first"]  # of the same address
    admit("other", "b"), admit("one too many", "c")
    assert ended == ["first", "second"]  # of any
    assert len(connections) == 4
    for _ in range(50):
        admit("flood", "a")
    assert "node" not in ended and len(connections) == 4


def test_a_server_that_is_full_of_nodes_turns_others_away() -> None:
    connections = Connections(most=3)
    held = [connections.admit("a", pytest.fail) for _ in range(1)]
    for _ in range(2):
        connections.prove(held[-1], b"key")
        held.append(connections.admit("a", pytest.fail))
    connections.prove(held[-1], b"key")
    assert connections.admit("b", pytest.fail) is None
    connections.leave(held[0])
    assert connections.admit("b", pytest.fail) is not None


def test_one_credential_does_not_take_the_places_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "PER_CREDENTIAL", 3)
    connections, ended = Connections(most=100), list[int]()

    def comes(number: int, key: bytes) -> Any:
        made = connections.admit("a", lambda: ended.append(number))
        assert made is not None
        connections.prove(made, key)
        connections.prove(made, key)  # with each request
        return made

    others = [comes(place, b"another") for place in (100, 101)]
    mine = [comes(number, b"mallory") for number in range(10)]
    assert ended == list(range(7)) and len(connections) == 5
    connections.prove(mine[0], b"mallory")  # a request that it had sent before it was closed
    connections.leave(mine[9])
    comes(10, b"mallory")
    assert ended == list(range(7)) and len(connections) == 5
    for one in (*others, *mine):
        connections.leave(one)
    assert len(connections) == 1 and len(connections._proven) == 1


def slow_body(parts: list[bytes], pause: float) -> Any:
    async def receive() -> dict[str, Any]:
        await asyncio.sleep(pause)
        part = parts.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    return receive


async def settled() -> None:
    """Every task has come as far as it can: none of them waits for time to pass."""
    for _ in range(100):
        await asyncio.sleep(0)


def test_bodies_wait_for_room_and_one_sender_has_half_of_it() -> None:
    async def main() -> None:
        bodies = Bodies(most=4 * MIB)
        reading: list[str] = []
        release = asyncio.Event()

        async def send(name: str, size: int) -> None:
            async with bodies.read(slow_body([bytes(size)], 0), size, name[:1].encode()) as body:
                assert len(body) == size
                reading.append(name)
                await release.wait()

        tasks = [asyncio.create_task(send(f"a{i}", MIB)) for i in range(5)]
        await settled()
        assert reading == ["a0", "a1"]
        tasks += [asyncio.create_task(send("b", 2 * MIB)), asyncio.create_task(send("a-beat", 100))]
        await settled()
        assert reading[2:] == ["a-beat", "b"] or reading[2:] == ["b", "a-beat"]
        release.set()
        await asyncio.gather(*tasks)
        assert sorted(reading) == ["a-beat", "a0", "a1", "a2", "a3", "a4", "b"]
        assert bodies._held == 0 and not bodies._by_sender

    asyncio.run(main())


def test_a_server_that_ends_shows_no_traceback_of_what_it_cuts_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Ctrl-C while sites asked for messages showed uvicorn's tracebacks, some hundred lines."""
    (tmp_path / "federation.yaml").write_text("name: a\nserver: 127.0.0.1:9443\nsites: [b]\n")
    provision(tmp_path / "federation.yaml", tmp_path / "out")
    folder, asked = tmp_path / "out" / "server", threading.Event()

    class Waiting:
        connections = Connections(most=8)

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http":
                asked.set()
                await asyncio.sleep(600)

    listener = socket.create_server(("127.0.0.1", 0))
    serving = server.behind_the_door(Waiting(), folder, listener)  # type: ignore[arg-type]
    serving.config.timeout_graceful_shutdown = 0
    log = logging.getLogger("uvicorn.error")  # which uvicorn keeps from the root's handlers
    log.addHandler(caplog.handler)
    context = certificates.tls_context(folder / "ca.crt")
    there = http.client.HTTPSConnection("127.0.0.1", listener.getsockname()[1], timeout=60, context=context)
    thread = threading.Thread(target=serving.run)
    thread.start()
    there.request("GET", "/")
    assert asked.wait(60)
    serving.should_exit = True
    there.getresponse().read()
    thread.join(60)
    there.close()
    log.removeHandler(caplog.handler)
    assert "Cancel 1 running task" in caplog.text and "Traceback" not in caplog.text, caplog.text


@pytest.mark.slow
def test_a_body_that_pauses_or_trickles_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def read(parts: list[bytes], pause: float) -> bytes:
        bodies = Bodies()
        async with bodies.read(slow_body(parts, pause), sum(map(len, parts)), b"a") as body:
            return body

    assert asyncio.run(read([b"x"] * 3, 0.05)) == b"xxx"
    monkeypatch.setattr(door, "PAUSE_SECONDS", 0.2)
    monkeypatch.setattr(door, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(door, "SLOWEST", MIB)
    for parts, pause in (([b"x"], 0.5), ([b"x"] * 20, 0.05), ([bytes(MIB // 2), *[b"x"] * 50], 0.1)):
        with pytest.raises(BodyTimeout):
            asyncio.run(read(parts, pause))


# --- a server ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    made = Real(tmp_path_factory.mktemp("real"))
    yield made
    made.close()


def beats(real: Real, site: str) -> int:
    """HTTP status of a signed request of a node, over a connection of its own."""
    context = certificates.tls_context(real.folder / "ca.crt")
    connection = http.client.HTTPSConnection("127.0.0.1", real.port, timeout=20, context=context)
    node = Node(node_id=real.node_id(site))
    body = SendNodeHeartbeatRequest(node=node, heartbeat_interval=30).SerializeToString()
    headers = {**real.signed(site), "content-type": PROTOBUF_MEDIA_TYPE}
    connection.request("POST", "/v1/fleet/send-node-heartbeat", body, headers)
    status = connection.getresponse().status
    connection.close()
    return status


@pytest.mark.slow
def test_a_node_is_served_while_others_hold_connections(real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    """All from one address. Without room made for it, the node would wait until the others give up."""
    monkeypatch.setattr(door, "UNPROVEN_PER_ADDRESS", 16)
    real.state.activate_node(real.node_id("clinic-1"), 30)
    fat = half_a_body({**real.signed("clinic-1"), "flwr-signature": "AAAA"}, MIB)
    with crowd(("127.0.0.1", real.port), idle=40, greeted=10, fat=10, sends=fat) as held:
        begun = time.monotonic()
        for _ in range(5):
            assert beats(real, "clinic-1") == 200
        check_server(real.address, real.folder / "ca.crt")
        join.check_in(real.site("clinic-2"), real.keys["clinic-2"], pytest.fail)
        assert time.monotonic() - begun < door.HEADER_SECONDS
        assert len(real.gate.connections) <= 16 + 7
        assert len(held) > 40


def test_a_body_of_somebody_who_only_knows_a_nodes_public_key_is_not_read(real: Real) -> None:
    named = {**real.signed("clinic-1"), "flwr-signature": "AAAA"}
    status, said = real.request("POST", "/v1/fleet/push-object", content_length=str(31 * MIB), **named)
    assert status == 401 and "signed" in said["error"]


def test_a_full_server_is_not_said_to_speak_no_tls(real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real.gate.connections, "admit", lambda address, end: None)
    with pytest.raises(ResourceError, match="is full: it has as many connections as it can hold"):
        check_server(real.address, real.folder / "ca.crt")
    monkeypatch.undo()
    check_server(real.address, real.folder / "ca.crt")


def test_a_server_that_hangs_up_is_worth_another_try(tmp_path: Path) -> None:
    certificates.make_authority(tmp_path, "trial")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"

        def hang_up() -> None:
            other = listener.accept()[0]
            other.recv(10_000)
            other.close()

        threading.Thread(target=hang_up, daemon=True).start()
        with pytest.raises(ResourceError, match="closed the connection before it had said who it is"):
            check_server(address, tmp_path / "ca.crt")


@pytest.mark.slow
def test_a_client_that_says_nothing_is_let_go(real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "HEADER_SECONDS", 0.3)
    with crowd(("127.0.0.1", real.port), idle=1, greeted=1) as held:
        for one in held:
            one.settimeout(60)
            with contextlib.suppress(ConnectionError):
                assert one.recv(1) == b""
    end = time.monotonic() + 60
    while len(real.gate.connections):
        assert time.monotonic() < end
        time.sleep(0.05)
