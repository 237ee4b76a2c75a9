"""A node's message loop: fetch a message, have the worker answer it, send the answer, wait, ask again.

Flower's own loop (`start_client_internal`) waits 3 s whenever there is no message and looks every 0.5 s
whether an answer is there, so that a round would mostly wait for polls. This one is made of the same parts,
answers a message in the thread that fetched it, and waits between two questions for a twentieth of the time
since the last message (longer where the server is slow): rounds follow each other closely, and a node that
has been idle for a minute asks every 3 s, as Flower's does. It also says more often that it is alive.

Flower would start a process for each message that installs and runs the app which came with the run. Here an
app that is not fedtune's own was turned away when it arrived (`thin_app`), and the message goes to the
resident worker. Whatever is wrong with a message, it gets an answer, because Flower takes no other message
before it has one.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import httpx
from flwr.app import Message

from fedtune.deploy import channel, flower
from fedtune.deploy.consent import Consent
from fedtune.deploy.join import HEARTBEAT_SECONDS
from fedtune.deploy.leaving import Leaving
from fedtune.deploy.news import HOLD_SECONDS
from fedtune.deploy.node_metrics import NodeActivity
from fedtune.deploy.thin_app import AppAllowList
from fedtune.deploy.worker import refusal_in
from fedtune.deploy.worker_process import WorkerDied, WorkerProcess
from fedtune.errors import FederationError, FedtuneError, ResourceError
from fedtune.federation.client.audit_log import Books
from fedtune.federation.client.node_context import public_reason
from fedtune.federation.client.policy import SiteSettings
from fedtune.federation.flower import (
    act_as,
    deserialize,
    deserialize_context,
    error_answer,
    serialize,
    serialize_context,
)
from fedtune.privacy.publication import error_in_public

__all__ = ["UPLOAD_SECONDS", "MessageHandler", "PollInterval", "begun_again", "pauses", "run_message_loop"]

T = TypeVar("T")

_log = logging.getLogger("fedtune.node")


# For an object of a message on its way. Whoever died while it sent one would hold the other side until
# Flower forgets the upload, after 3 minutes.
UPLOAD_SECONDS = 60


class PollInterval:
    """Seconds to wait before asking again: a share of the time since the last message, within bounds.

    A server that holds a question until there may be a message (`fedtune.deploy.news`) is asked again at
    once. One that takes longer than that to say that there is nothing has more to do than it can, and is
    asked less often: fifty nodes that each asked again after 0.1 s took most of its time.
    """

    SHARE, SHORTEST, LONGEST, TIMES = 0.05, 0.1, 3.0, 4.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_message = clock() - self.LONGEST / self.SHARE  # as after a long silence

    def message_came(self) -> None:
        """Starts again with the shortest interval."""
        self._last_message = self._clock()

    def seconds(self, took: float = 0.0) -> float:
        """The wait before the next question, after one that took so many seconds."""
        if took >= HOLD_SECONDS:
            return min(self.LONGEST, max(self.SHORTEST, self.TIMES * (took - HOLD_SECONDS)))
        share = self.SHARE * (self._clock() - self._last_message)
        return min(self.LONGEST, max(self.SHORTEST, share, self.TIMES * took))


def run_message_loop(
    state: Any,
    store: Any,
    *,
    server: str,
    authority: Path,
    key: Any,
    node_config: dict[str, Any],
    guard: Callable[[Any], Any],
    answer: Callable[[], bool],
    leaving: Leaving,
    say: Callable[[str], None],
    outdated: Callable[[], bool] = lambda: False,
) -> None:
    """Joins the SuperLink at `server` and answers its messages until the connection ends, or is outdated.

    Args:
        state: Flower's NodeState; it is given the node's id once the node has joined.
        store: Flower's ObjectStore of that state.
        server: HOST:PORT.
        authority: file with the certificate of whoever vouches for the server.
        key: the node's private key.
        node_config: what every Context of this node holds.
        guard: puts the node's own checks before the functions of Flower's connection.
        answer: answers the messages that are in `state`; False if there is nothing to send.
        leaving: whether the node was told to leave.
        say: tells the site's administrator of an answer that did not arrive.
        outdated: whether to connect anew, asked where nothing is begun.

    Raises:
        SystemExit: the server does not let this node in, or it was told to leave (Ctrl-C, SIGTERM).
    """
    interval = PollInterval()
    with flower.node_connection(server, authority, key, HEARTBEAT_SECONDS) as connection:
        node_id, receive, send, get_run, get_fab, pull_object, push_object, confirm = guard(connection)
        state.set_node_id(node_id)
        deliver = _with_retries(store, send, push_object, say)
        while not outdated():
            asked = time.monotonic()
            run_id = flower.pull_message(
                state=state,
                object_store=store,
                node_config=node_config,
                receive=receive,
                get_run=get_run,
                get_fab=get_fab,
                pull_object=_patient(pull_object),
                confirm_message_received=confirm,
                trusted_entities=None,
            )
            if run_id is None:
                leaving.pause(interval.seconds(time.monotonic() - asked))
                continue
            leaving.answering = True
            if answer():
                flower.push_replies(state=state, object_store=store, send=deliver, push_object=push_object)
            leaving.answering = False
            leaving.leave_if_asked()
            interval.message_came()


def pauses() -> Iterator[float]:
    """Seconds between two questions for an object on its way: UPLOAD_SECONDS in all, short ones first.

    Flower's own first pause is a second, and most objects are there after a tenth.
    """
    yield from (0.05, 0.1, 0.2, 0.3, 0.35)
    yield from itertools.repeat(1.0, UPLOAD_SECONDS - 1)


def _patient(pull: Callable[[int, str], bytes]) -> Callable[[int, str], bytes]:
    """`pull`, but waiting for an object that is on its way, and giving it up when it does not come.

    A server that fails for a moment (its database was locked by twenty nodes at once) is asked again too:
    Flower would forget the message, and the round would wait for this node until its deadline.
    """

    def patient(run_id: int, object_id: str) -> bytes:
        for pause in pauses():
            try:
                return pull(run_id, object_id)
            except flower.ObjectUnavailableError:
                time.sleep(pause)
            except httpx.HTTPStatusError as error:
                if error.response.status_code < 500:
                    raise
                time.sleep(pause)
        raise flower.ObjectPullError(object_id, f"it did not arrive in {UPLOAD_SECONDS} s.")

    return patient


def begun_again(push: Callable[[], T]) -> T:
    """What `push` returns; it is called again for UPLOAD_SECONDS while the server fails or takes an object no
    more, as it does when it was killed between storing the object and saying so.

    All of it is begun again, for the server may have stored an object and failed later: it knows a message by
    the hash of its content, keeps it once, and says which of its objects it still misses; a new push of a
    message replaces the one before (`LinkState.store_message_ins` and `store_message_res`,
    `CoreState.preregister_object_tree`).
    """
    for pause in pauses():
        try:
            return push()
        except (httpx.HTTPStatusError, flower.ObjectPushError) as error:
            if isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500:
                raise
            time.sleep(pause)
    return push()


def _with_retries(
    store: Any, send: Callable[..., Any], push_object: Callable[..., Any], say: Callable[[str], None]
) -> Callable[[Any, Any, float], tuple[set[str], str]]:
    """Flower's `send`, which also pushes the answer's objects, and does both again when the server failed.

    Flower drops an answer at an HTTP 500 or an object that was not stored, and this one is charged.
    """

    def deliver(message: Any, tree: Any, seconds: float) -> tuple[set[str], str]:
        def push() -> tuple[set[str], str]:
            missing, session = send(message, tree, seconds)
            ids = [name for name in flower.object_ids(tree) if name in missing]
            flower.push_objects(store, ids, partial(push_object, message.metadata.run_id, session))
            return set(), session

        try:
            return begun_again(push)
        except Exception as error:
            reason = (
                f"HTTP status {error.response.status_code}"
                if isinstance(error, httpx.HTTPStatusError)
                else f"{type(error).__name__}: {error}"
            )
            say(
                f"the answer to {message.metadata.message_type}, round {message.metadata.group_id}, "
                f"did not arrive at the server ({reason}) and is given up; what was charged for it "
                "stays charged"
            )
            raise

    return deliver


class MessageHandler:
    """Has each message that Flower has received answered, and hands the answer back to it."""

    def __init__(
        self,
        state: Any,
        store: Any,
        site: SiteSettings,
        worker: WorkerProcess,
        apps: AppAllowList,
        leaving: Leaving,
        activity: NodeActivity,
    ) -> None:
        self._state, self._store, self._site, self._worker, self._apps = state, store, site, worker, apps
        self._leaving, self._activity, self._consent = leaving, activity, Consent(site)
        self._books = Books(Path(site.ledger), Path(site.audit_log))

    def __call__(self) -> bool:
        """Answers what is pending. Returns whether something was answered."""
        done = False
        for task in self._state.get_tasks(statuses=[flower.Status.PENDING], order_by="pending_at"):
            try:
                done = self._handle(task) or done
            except Exception:  # one message must not end the node
                _log.exception("a message could not be answered")
        return done

    def _handle(self, task: Any) -> bool:
        """Has the message of a task answered, by a refusal if something is wrong with it."""
        state = self._state
        if state.claim_task(task.task_id) is None or not state.activate_task(task.task_id):
            return False
        messages = state.get_messages_legacy(run_ids=[task.run_id], is_reply=False, limit=1)
        if not messages:
            return False
        message = messages[0]  # without its content, but with sender and receiver
        run = state.get_run(task.run_id)
        context = state.get_run_series_context(run.series_id)
        act_as(task.task_id, run.run_id, context.node_id)
        state.record_message_processing_start(message_id=message.metadata.message_id)
        began, how = time.monotonic(), "refused"
        try:
            if self._leaving.asked:
                raise FederationError(
                    f"Site '{self._site.site}' is leaving, for its administrator ended its node: this was "
                    "not begun, and nothing was charged for it."
                )
            self._apps.check(run.run_id)
            whole = self._whole(message)
            self._consent.check(run.run_id, context.run_config, whole)
            reply = self._ask(whole, run, context, task)
            how = "refused" if refusal_in(reply) else "answered"
        except WorkerDied as error:
            how = "died"
            _log.warning("%s", error)  # how it ended may tell how much there was to do
            reason = (
                f"Site '{self._site.site}' lost this round: its worker ended. If the release was reserved, "
                "it stays charged; the next message starts another worker."
            )
            reply = self._refusal(message, "worker died", reason)
        except FedtuneError as error:
            reply = self._refusal(message, "refused", public_reason(error, self._site.site))
        except Exception as error:
            _log.exception("a message could not be read")
            reason = f"Site '{self._site.site}' cannot read this message ({type(error).__name__})."
            reply = self._refusal(message, "refused", reason)
        self._activity.answered(message.metadata.message_type, how, time.monotonic() - began)
        state.record_message_processing_end(message_id=message.metadata.message_id)
        self._store.delete(message.metadata.message_id)
        flower.store_reply(reply, state, self._store)
        state.finish_task(task.task_id, flower.SubStatus.COMPLETED, "")
        return True

    def _ask(self, message: Any, run: Any, context: Any, task: Any) -> Any:
        """The worker's reply; what its ClientApp remembers of the run is kept."""
        data = self._worker.ask(
            serialize(message),
            serialize_context(context),
            {"task": task.task_id, "run": run.run_id, "node": context.node_id},
            lambda: self._state.acknowledge_task_heartbeat(task.task_id),
            _awaited(context),
            self._leaving.overdue,
        )
        self._state.set_run_series_context(run.series_id, deserialize_context(data[1]))
        return deserialize(data[0])

    def _whole(self, message: Any) -> Any:
        """The message with its content. One that is wrong may raise anything."""
        message_id = message.metadata.message_id
        whole = flower.whole_message(message_id, self._store, channel.MAX_MESSAGE)
        if whole is None:
            raise FederationError(f"Message {message_id[:12]} arrived in part only.")
        if type(whole) is not type(message):
            raise FederationError(f"The server sent a {type(whole).__name__} where a message was announced.")
        # What was announced is what is answered: the content may name another run or another node.
        whole.__dict__["_metadata"] = message.metadata
        return whole

    def _refusal(self, message: Message, event: str, reason: str) -> Message:
        try:
            self._books.append(event, message=message.metadata.message_type, reason=reason)
        except ResourceError as error:  # it still carries nothing of the data, and the server waits for it
            _log.error("%s", error)
            reason = error_in_public(error, self._site.site)
        _log.warning("%s", reason)
        return error_answer(message, reason)


def _awaited(context: Any) -> float:
    """Seconds for which the server waits for an answer, as the run's configuration says; else infinite."""
    try:
        seconds = json.loads(context.run_config["fedtune"])["federation"]["round_timeout"]
        return float(seconds) if math.isfinite(seconds) else math.inf
    except (KeyError, TypeError, ValueError, RecursionError):
        return math.inf
