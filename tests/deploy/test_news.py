"""A node's question is held until there may be a message; frequent calls are answered as Flower does."""

from __future__ import annotations

import asyncio
import http.client
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2, node_pb2
from flwr.supercore.protobuf.translation import PROTOBUF_MEDIA_TYPE, PROTOBUF_REQUEST_TYPES

from fedtune.deploy import certificates, flower, news, spared
from fedtune.deploy.news import News
from fedtune.deploy.provision import read_token
from fedtune.deploy.server import TOKEN_HEADER
from tests.support.real_superlink import Real

NODE = b"a key"


def timed(act: Callable[[News, asyncio.Future[object]], Awaitable[None]]) -> float:
    """Seconds of a loop in which a node has been told that there is nothing."""

    async def main() -> float:
        told, gone = News(), asyncio.get_running_loop().create_future()
        told.note(NODE, await told.wait(NODE, gone))
        began = time.monotonic()
        await act(told, gone)
        return time.monotonic() - began

    return asyncio.run(main())


@pytest.fixture(autouse=True)
def held_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(news, "HOLD_SECONDS", 0.5)


def test_a_question_is_held_while_nothing_comes() -> None:
    async def act(told: News, gone: asyncio.Future[object]) -> None:
        await told.wait(NODE, gone)

    assert timed(act) >= 0.5


def test_a_question_ends_soon_after_something_came() -> None:
    async def act(told: News, gone: asyncio.Future[object]) -> None:
        asyncio.get_running_loop().call_later(0.01, told.came)
        await told.wait(NODE, gone)

    assert news._QUIET <= timed(act) < 0.5


def test_what_came_before_the_question_is_not_waited_for() -> None:
    """It came while the node was told that there is nothing."""

    async def act(told: News, gone: asyncio.Future[object]) -> None:
        told.came()
        await told.wait(NODE, gone)

    assert timed(act) < 0.5


def test_a_node_that_had_a_message_asks_again_at_once() -> None:
    """There may be another one: Flower hands out one at a time, and only "nothing" is noted."""

    async def act(told: News, gone: asyncio.Future[object]) -> None:
        told.came()
        await told.wait(NODE, gone)
        await told.wait(NODE, gone)
        await told.wait(b"another key", gone)

    assert timed(act) < 0.5


def test_a_node_that_is_gone_is_not_waited_for() -> None:
    async def act(told: News, gone: asyncio.Future[object]) -> None:
        asyncio.get_running_loop().call_later(0.01, gone.set_result, None)
        await told.wait(NODE, gone)

    assert timed(act) < 0.5


def test_a_call_is_made_at_most_once_in_so_many_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now, made = [100.0], list[float]()
    monkeypatch.setattr(spared.time, "monotonic", lambda: now[0])
    call = spared.at_most_each(1.0, lambda: made.append(now[0]))
    for now[0] in (100.0, 100.5, 100.9, 101.0, 101.5, 103.0):
        call()
    assert made == [100.0, 101.0, 103.0]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    made = Real(tmp_path_factory.mktemp("real"))
    yield made
    made.close()


def post(real: Real, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, str, bytes]:
    context = certificates.tls_context(real.folder / "ca.crt")
    connection = http.client.HTTPSConnection("127.0.0.1", real.port, timeout=20, context=context)
    connection.request("POST", path, body, headers)
    answer = connection.getresponse()
    said = answer.status, str(answer.headers["content-type"]), answer.read()
    connection.close()
    return said


def bodies(node: int) -> dict[str, Any]:
    """A request to each frequent call, by path."""
    of_node, lost = node_pb2.Node(node_id=node), "ab" * 32
    made: dict[str, Any] = {
        "pull-messages": fleet_pb2.PullMessagesRequest(node=of_node),
        "push-messages": fleet_pb2.PushMessagesRequest(node=of_node),
        "pull-object": message_pb2.PullObjectRequest(node=of_node, run_id=5, object_id=lost),
        "push-object": message_pb2.PushObjectRequest(node=of_node, run_id=5, object_id=lost),
        "confirm-message-received": message_pb2.ConfirmMessageReceivedRequest(
            node=of_node, run_id=5, message_object_id=lost
        ),
    }
    fleet = {
        **made,
        "send-node-heartbeat": heartbeat_pb2.SendNodeHeartbeatRequest(node=of_node, heartbeat_interval=30),
    }
    runtime = {name: made[name] for name in ("pull-object", "push-object", "confirm-message-received")}
    return {
        **{f"/v1/fleet/{name}": one for name, one in fleet.items()},
        **{f"/v1/runtime/{name}": one for name, one in runtime.items()},
    }


def test_frequent_calls_are_answered_as_flowers_application_does(real: Real) -> None:
    """Good requests and refused ones: another node's number, a signature of nobody, no protobuf, no token."""
    calls, node = real.gate._calls, real.node_id("clinic-1")
    assert calls is not None and set(calls._answers) == set(bodies(1))
    real.state.activate_node(node, 30)
    token, media = read_token(real.folder), {"content-type": PROTOBUF_MEDIA_TYPE}
    seen = set[int]()
    for path, body in bodies(node).items():
        assert type(body) is PROTOBUF_REQUEST_TYPES["POST", path]
        other = bodies(real.node_id("clinic-2"))[path]
        for sent, changes in (
            (body.SerializeToString(), {}),
            (other.SerializeToString(), {}),
            (b"\xff" * 20, {}),
            (body.SerializeToString(), {"content-type": "text/plain"}),
            (body.SerializeToString(), {"flwr-timestamp": "2020-01-01T00:00:00+00:00"}),
            (body.SerializeToString(), {"flwr-task-token": "guessed"}),
        ):
            answers = []
            for real.gate._calls in (calls, None):
                headers = {**real.signed("clinic-1"), TOKEN_HEADER: token, **media, **changes}
                answers.append(post(real, path, sent, headers))
            assert answers[0] == answers[1], (path, sent, changes)
            seen.add(answers[0][0])
    real.gate._calls = calls
    assert {200, 400, 401} <= seen


def test_a_node_that_goes_while_its_question_is_held_takes_no_message_with_it(
    real: Real, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(news, "HOLD_SECONDS", 3.0)
    calls, answered = real.gate._calls, list[str]()
    assert calls is not None
    answer = calls.answer

    async def noted(scope: Any, *more: Any) -> bool:
        answered.append(scope["path"])
        return await answer(scope, *more)

    monkeypatch.setattr(calls, "answer", noted)
    node = real.node_id("clinic-3")
    body = bodies(node)[news.QUESTION].SerializeToString()
    headers = {**real.signed("clinic-3"), "content-type": PROTOBUF_MEDIA_TYPE}
    assert post(real, news.QUESTION, body, headers)[0] == 200  # nothing: the next one is held
    context = certificates.tls_context(real.folder / "ca.crt")
    connection = http.client.HTTPSConnection("127.0.0.1", real.port, timeout=20, context=context)
    connection.request("POST", news.QUESTION, body, {**headers, **real.signed("clinic-3")})
    time.sleep(0.5)
    assert connection.sock is not None
    connection.sock.close()
    connection.close()
    time.sleep(0.5)
    real.gate._news.came()
    time.sleep(3.0)
    assert answered == [news.QUESTION]


def test_the_layers_of_flowers_application_stand_before_their_own_paths_alone(tmp_path: Path) -> None:
    for name in ("ca.crt", "server.crt", "server.key"):
        (tmp_path / name).write_text("")
    app = flower.superlink_app(tmp_path, "127.0.0.1", 9)
    layers = [
        (one.kwargs["middleware"].cls.__name__, one.kwargs["paths"]) if "paths" in one.kwargs
        else (one.args[0].cls.__name__, one.args[1]) if len(one.args) == 2 else (one.cls.__name__, "")
        for one in app.user_middleware
    ]  # fmt: skip
    assert layers == [
        ("ControlSensitiveResponseMiddleware", "/v1/control/"),
        ("BaseHTTPMiddleware", ""),
        ("ControlAuthenticationMiddleware", "/v1/control/"),
        ("ControlLicenseMiddleware", "/v1/control/"),
        ("ProtobufTranslationMiddleware", ""),
        ("RuntimeTracingMiddleware", "/v1/runtime/"),
        ("ControlEventLogMiddleware", "/v1/control/"),
        ("NodeAuthMiddleware", "/v1/fleet/"),
        ("FleetEventLogMiddleware", "/v1/fleet/"),
    ]
