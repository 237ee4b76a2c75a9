"""The node's talk with the SuperLink: when it asks, what it does with a message, what it does not load."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from fedtune.deploy import flower, leaving, message_loop, submit
from fedtune.deploy.leaving import Leaving
from fedtune.deploy.message_loop import UPLOAD_SECONDS, PollInterval, pauses, run_message_loop
from fedtune.deploy.news import HOLD_SECONDS


class Clock:
    """Seconds that pass when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_a_node_asks_often_after_a_message_and_seldom_when_it_is_idle() -> None:
    clock = Clock()
    pace = PollInterval(clock)
    assert pace.seconds() == PollInterval.LONGEST  # nothing has come yet
    pace.message_came()
    assert pace.seconds() == PollInterval.SHORTEST
    clock.now += 20
    assert pace.seconds() == pytest.approx(1.0)
    clock.now += 1000
    assert pace.seconds() == PollInterval.LONGEST


def test_a_server_that_is_slow_to_say_that_there_is_nothing_is_asked_less_often() -> None:
    """Fifty nodes that each asked 0.1 s after every answer took most of a server's time."""
    clock = Clock()
    pace = PollInterval(clock)
    pace.message_came()
    assert pace.seconds(0.012) == PollInterval.SHORTEST  # as one that has nothing else to do
    assert pace.seconds(0.5) == pytest.approx(2.0)
    assert pace.seconds(60.0) == PollInterval.LONGEST


def test_a_server_that_holds_a_question_is_asked_again_at_once() -> None:
    pace = PollInterval(Clock())  # after a long silence
    assert pace.seconds(HOLD_SECONDS) == pace.seconds(HOLD_SECONDS + 0.02) == PollInterval.SHORTEST
    assert pace.seconds(HOLD_SECONDS + 0.5) == pytest.approx(2.0)


def test_the_questions_of_an_idle_minute_are_few() -> None:
    clock = Clock()
    pace = PollInterval(clock)
    pace.message_came()
    while clock.now < 1060:
        clock.sleep(pace.seconds())
    assert len(clock.slept) < 100  # of 2 ms each: well below 1 percent of a core
    before = len(clock.slept)
    while clock.now < 1120:
        clock.sleep(pace.seconds())
    assert len(clock.slept) - before <= 21


class Server:
    """What `_init_connection` gives: the answers of a SuperLink, one script of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, script: list[Any]) -> None:
        self.script, self.did = script, []
        clock = Clock()
        self.leaving = Leaving(60.0, self.did.append)
        monkeypatch.setattr(message_loop.time, "sleep", clock.sleep)
        monkeypatch.setattr(leaving.time, "sleep", clock.sleep)
        monkeypatch.setattr(leaving.time, "monotonic", clock)
        monkeypatch.setattr(leaving.signal, "setitimer", lambda which, seconds: None)
        monkeypatch.setattr(flower, "_init_connection", self._connection)
        monkeypatch.setattr(flower, "pull_message", self._pull)
        monkeypatch.setattr(message_loop, "_with_retries", lambda *_: "what sends it again")
        monkeypatch.setattr(flower, "push_replies", lambda **by: self.did.append(f"pushed by {by['send']}"))

    @contextlib.contextmanager
    def _connection(self, **_: Any) -> Iterator[Any]:
        with contextlib.suppress(EOFError):  # as Flower's, which logs what it did not foresee and returns
            yield (7, *[None] * 3, None, lambda run, name: b"", None, None)

    def _pull(self, **_: Any) -> int | None:
        self.did.append("asked")
        if not self.script:
            raise EOFError
        return self.script.pop(0)

    def talk(self, tmp_path: Path, answer: Any, outdated: Any = lambda: False) -> list[str]:
        (tmp_path / "ca.crt").write_bytes(b"")
        state = SimpleNamespace(set_node_id=lambda node: self.did.append(f"joined {node}"))
        run_message_loop(
            state, None, server="localhost:1", authority=tmp_path / "ca.crt",
            key=SimpleNamespace(public_key=lambda: None), node_config={}, guard=lambda opened: opened,
            answer=answer, leaving=self.leaving, say=pytest.fail, outdated=outdated,
        )  # fmt: skip
        return self.did


def test_a_message_is_answered_and_the_answer_sent_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(monkeypatch, [None, 5])

    def answer() -> bool:
        server.did.append("answered")
        return True

    assert server.talk(tmp_path, answer) == [
        "joined 7", "asked", "asked", "answered", "pushed by what sends it again", "asked",
    ]  # fmt: skip


def test_the_loop_tells_its_pace_how_long_a_question_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, took, asked = Server(monkeypatch, [None, None]), list[float](), iter([0.7, 0.2, 0.0])
    pull = flower.pull_message

    def slowly(**by: Any) -> int | None:
        message_loop.time.sleep(next(asked))
        return pull(**by)

    def seconds(pace: PollInterval, answer_took: float) -> float:
        took.append(round(answer_took, 3))
        return 0.0

    monkeypatch.setattr(flower, "pull_message", slowly)
    monkeypatch.setattr(PollInterval, "seconds", seconds)
    server.talk(tmp_path, pytest.fail)
    assert took == [0.7, 0.2]


def test_a_connection_that_is_outdated_ends_when_what_was_begun_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where other authorities vouch for the server from now on."""
    server, old = Server(monkeypatch, [None, 5, 6]), []

    def answer() -> bool:
        old.append(True)
        return True

    assert server.talk(tmp_path, answer, lambda: bool(old)) == [
        "joined 7", "asked", "asked", "pushed by what sends it again",
    ]  # fmt: skip


def test_a_node_that_is_told_to_leave_finishes_and_sends_what_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(monkeypatch, [5, 6])

    def answer() -> bool:
        server.leaving._on_signal(15, None)
        assert not server.leaving.overdue()
        server.did.append("answered")
        return True

    with pytest.raises(SystemExit):
        server.talk(tmp_path, answer)
    told, *rest = server.did[2:]
    assert "finishes the message that it answers, 60 s at most" in told
    assert rest == ["answered", "pushed by what sends it again"]


def test_an_idle_node_leaves_at_once_and_a_second_signal_ends_a_busy_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(monkeypatch, [None, 5])
    pause = server.leaving.pause
    monkeypatch.setattr(
        server.leaving, "pause", lambda seconds: (server.leaving._on_signal(15, None), pause(seconds))
    )
    with pytest.raises(SystemExit):
        server.talk(tmp_path, pytest.fail)
    assert server.did == ["joined 7", "asked"]
    other = Server(monkeypatch, [5])

    def answer() -> bool:
        other.leaving._on_signal(15, None)
        other.leaving._on_signal(15, None)
        return True

    with pytest.raises(SystemExit):
        other.talk(tmp_path, answer)
    assert not [one for one in other.did if "pushed" in one]


def test_a_worker_has_its_time_when_the_node_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(leaving.time, "monotonic", clock)
    monkeypatch.setattr(leaving.signal, "setitimer", lambda which, seconds: None)
    going = Leaving(60.0, print)
    assert not going.overdue() and not going.asked
    going._on_signal(15, None)
    clock.now += 59
    assert not going.overdue()
    clock.now += 2
    assert "limits.stop_seconds" in going.overdue()


def test_the_server_is_told_soon_that_a_node_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.common.constant import HEARTBEAT_MIN_INTERVAL
    from flwr.supercore import heartbeat
    from flwr.supernode import fleet_http_connection

    for module in (heartbeat, fleet_http_connection):
        monkeypatch.setattr(module, "HEARTBEAT_DEFAULT_INTERVAL", 30)
    Server(monkeypatch, []).talk(tmp_path, lambda: False)
    for module in (heartbeat, fleet_http_connection):
        assert module.HEARTBEAT_DEFAULT_INTERVAL == HEARTBEAT_MIN_INTERVAL


def failed(status: int) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "https://localhost:1")
    return httpx.HTTPStatusError(str(status), request=request, response=httpx.Response(status))


def sign_of_life(
    answers: list[Exception | None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[Any]:
    """What the thread that says that a node is alive died of, when the server gave these answers."""
    from flwr.supernode import fleet_http_connection

    Server(monkeypatch, []).talk(tmp_path, lambda: False)
    died = list[Any]()
    monkeypatch.setattr(threading, "excepthook", died.append)

    def beat() -> bool:
        if answer := answers.pop(0):
            raise answer
        if not answers:
            sender._stop_event.set()
        return True

    sender = fleet_http_connection.HeartbeatSender(beat)
    monkeypatch.setattr(sender._retry_invoker, "wait_function", lambda seconds: None)
    monkeypatch.setattr(sender._stop_event, "wait", lambda seconds=None: None)
    sender.start()
    sender._thread.join(60)
    return died


def test_a_server_that_fails_for_a_moment_does_not_end_the_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At an HTTP 500 Flower's thread ended with a traceback, and the node counted as gone."""
    answers = [None, failed(500), failed(500), failed(503), None, None]
    assert sign_of_life(answers, tmp_path, monkeypatch) == [] and answers == []


@pytest.mark.parametrize("error", [failed(401), RuntimeError("The SuperLink does not recognize this node.")])
def test_a_server_that_takes_a_node_no_more_ends_the_sign_of_life_in_one_line(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers: list[Exception | None] = [None, error, None]
    assert sign_of_life(answers, tmp_path, monkeypatch) == [] and answers == [None]
    assert len(caplog.messages) == 1 and "no sign of life" in caplog.text


def test_a_server_that_takes_the_signature_no_more_ends_the_connection_and_not_the_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower sends its own process a SIGINT: a node whose clock had jumped left, with status 0."""
    from flwr.supercore.retry import make_simple_http_retry_invoker
    from flwr.supernode import fleet_http_connection

    Server(monkeypatch, []).talk(tmp_path, lambda: False)
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("the node was ended"))

    def ask() -> None:
        raise failed(401)

    with pytest.raises(RuntimeError, match="signature no more"):
        make_simple_http_retry_invoker().invoke(ask)
    with pytest.raises(RuntimeError, match="signature no more"):  # as its heartbeat does
        fleet_http_connection.os.kill(fleet_http_connection.os.getpid(), signal.SIGINT)


def test_a_signal_while_python_ends_shows_no_traceback(tmp_path: Path) -> None:
    """A second Ctrl-C at a node that had left, but waited for a thread."""
    code = """
import sys, threading, time
from fedtune.deploy.leaving import Leaving

going = Leaving(60.0, print)
going.listen()
print("ready", flush=True)
while not going.asked:
    time.sleep(0.01)
going.all_is_done()
threading.Thread(target=time.sleep, args=(100.0,)).start()  # Python waits for it
threading._register_atexit(lambda: print("waits", flush=True))
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "waits\n"
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")


def test_nothing_is_waited_for_when_there_is_nothing_to_send(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Flower's own push waits for ever for an answer that never comes.
    server = Server(monkeypatch, [5, 6])
    assert server.talk(tmp_path, lambda: False) == ["joined 7", *["asked"] * 3]


def test_an_object_on_its_way_is_asked_for_again_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectUnavailableError

    clock, calls = Clock(), []
    monkeypatch.setattr(message_loop.time, "sleep", clock.sleep)

    def pull(run_id: int, object_id: str) -> bytes:
        calls.append(object_id)
        if len(calls) < ready:
            raise ObjectUnavailableError(object_id)
        return b"content"

    ready = 3
    assert message_loop._patient(pull)(1, "one") == b"content"
    assert sum(clock.slept) < 0.2
    clock.slept.clear()
    ready = 10_000
    with pytest.raises(ObjectPullError, match="did not arrive in 60 s"):  # its sender has died
        message_loop._patient(pull)(1, "one")
    assert sum(clock.slept) == pytest.approx(UPLOAD_SECONDS)


@pytest.mark.parametrize(("status", "heals"), [(500, True), (503, True), (403, False)])
def test_an_object_is_asked_for_again_when_the_server_failed(
    monkeypatch: pytest.MonkeyPatch, status: int, heals: bool
) -> None:
    monkeypatch.setattr(message_loop.time, "sleep", lambda seconds: None)
    asked = []

    def pull(run_id: int, object_id: str) -> bytes:
        asked.append(object_id)
        if len(asked) == 1:
            answer = httpx.Response(status, request=httpx.Request("POST", "https://server"))
            raise httpx.HTTPStatusError("database is locked", request=answer.request, response=answer)
        return b"content"

    if heals:
        assert message_loop._patient(pull)(1, "one") == b"content"
    else:
        with pytest.raises(httpx.HTTPStatusError):
            message_loop._patient(pull)(1, "one")


class Taker:
    """A SuperLink as far as an answer reaches it: keeps each object once, says which it misses.

    `failures`: what goes wrong, by the number of the request: before it is done, after, or "not stored".
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failures: dict[int, str]) -> None:
        from flwr.app import ConfigRecord, Message, RecordDict
        from flwr.supercore.object_store import ObjectStoreFactory
        from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState
        from flwr.supernode.start_client_internal import _insert_message

        from fedtune.federation.flower import task_identity

        self.clock, self.failures, self.said = Clock(), failures, []
        monkeypatch.setattr(message_loop.time, "sleep", self.clock.sleep)
        self.requests, self.sessions, self.stored, self.lock = 0, 0, [], threading.Lock()
        self.objects = ObjectStoreFactory().store()
        self.state = InMemoryNodeState(self.objects)
        self.state.set_node_id(7)
        with task_identity(5):
            asked = Message(RecordDict(), 7, "train", group_id="3")
        asked.metadata.__dict__["_message_id"] = asked.object_id
        self.state.store_message(asked)
        self.state.get_messages_legacy()
        self.state.record_message_processing_start(message_id=asked.object_id)
        self.state.record_message_processing_end(message_id=asked.object_id)
        records = {f"part {i}": ConfigRecord({"value": i}) for i in range(3)}
        self.reply = Message(RecordDict(records), reply_to=asked)
        _insert_message(self.reply, self.state, self.objects)

    @contextlib.contextmanager
    def _request(self) -> Iterator[bool]:
        """Whether it is to be carried out as asked."""
        with self.lock:
            self.requests += 1
            wrong = self.failures.get(self.requests, self.failures.get(0, ""))
            answer = httpx.Response(
                500 if "500" in wrong else 404, request=httpx.Request("POST", "https://s")
            )
            error = httpx.HTTPStatusError("it failed", request=answer.request, response=answer)
            if wrong.startswith("before"):
                raise error
            yield wrong != "not stored"
            if wrong.startswith("after"):
                raise error

    def send(self, message: Any, tree: Any, seconds: float) -> tuple[set[str], str]:
        from flwr.supercore.inflatable.inflatable_object import iterate_object_tree

        with self._request():
            assert message.metadata.message_id == self.reply.object_id
            self.sessions += 1
            wanted = {one.object_id for one in iterate_object_tree(tree)} - set(self.stored)
            return wanted, str(self.sessions)

    def push(self, run_id: int, session: str, name: str, content: bytes) -> None:
        from flwr.supercore.inflatable.inflatable_object import get_object_id
        from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

        with self._request() as done:
            if not done or session != str(self.sessions) or name in self.stored:
                raise ObjectPushError(name, run_id, session)
            assert name == get_object_id(content)
            self.stored.append(name)

    def push_all(self) -> None:
        from flwr.supernode.start_client_internal import _push_messages

        deliver = message_loop._with_retries(self.objects, self.send, self.push, self.said.append)
        _push_messages(self.state, self.objects, deliver, lambda *_: pytest.fail("it was pushed"))


@pytest.mark.parametrize(
    "failures",
    [
        {},
        {1: "before, 500", 2: "after, 500"},  # nothing, or the message, is stored
        {2: "before, 500", 7: "after, 500"},  # an object is not stored, and one is although it says 500
        {3: "not stored", 5: "after, 500"},
    ],
)
def test_a_charged_answer_arrives_though_the_server_fails(
    monkeypatch: pytest.MonkeyPatch, failures: dict[int, str]
) -> None:
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

    server = Taker(monkeypatch, failures)
    server.push_all()
    assert sorted(server.stored) == sorted(get_all_nested_objects(server.reply))  # each once
    assert server.said == [] and len(server.clock.slept) >= bool(failures)


@pytest.mark.parametrize(
    ("wrong", "told"), [("before, 500", "HTTP status 500"), ("before", "HTTP status 404")]
)
def test_an_answer_that_does_not_arrive_is_told(
    monkeypatch: pytest.MonkeyPatch, wrong: str, told: str
) -> None:
    server = Taker(monkeypatch, {0: wrong})
    server.push_all()
    (said,) = server.said
    assert said.startswith(f"the answer to train, round 3, did not arrive at the server ({told})")
    assert said.endswith("what was charged for it stays charged")
    assert sum(server.clock.slept) == pytest.approx(UPLOAD_SECONDS if "500" in wrong else 0)


def test_the_submitting_side_asks_again_soon_too(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(submit.time, "sleep", clock.sleep)
    answers = [
        SimpleNamespace(object_found=True, object_available=False),
        SimpleNamespace(object_found=True, object_available=True),
        SimpleNamespace(object_found=False, object_available=False),
    ]
    client = submit._PatientClient(SimpleNamespace(PullObject=lambda request: answers.pop(0), other="kept"))
    assert client.PullObject(None).object_available
    assert clock.slept == [next(pauses())]
    assert not client.PullObject(None).object_found  # it will never come: said at once
    assert client.other == "kept"
    clock.slept.clear()
    answers += [SimpleNamespace(object_found=True, object_available=False) for _ in range(100)]
    assert not client.PullObject(None).object_found  # the node died while it sent it: 3 minutes at Flower's
    assert sum(clock.slept) == pytest.approx(UPLOAD_SECONDS)


def test_the_worker_loads_no_library_that_it_does_not_use() -> None:
    code = (
        "import importlib.util\n"
        "from fedtune.deploy import worker\n"
        "worker._skip_unused_libraries()\n"
        "assert importlib.util.find_spec('torchao') is None\n"
        "import os; assert os.environ['TORCHDYNAMO_DISABLE'] == '1'\n"
        "import sys; assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
