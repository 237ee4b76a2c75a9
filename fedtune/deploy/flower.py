"""Every touch of Flower's internals that a real federation needs (checked with flwr 1.41).

Flower's public packages have no SuperLink, SuperNode or client that another program could embed, so
`fedtune server`, `node` and `submit` are made of Flower's parts. This file takes each of them from where it
is and says what it is for; what is called on the objects that it hands out (a LinkState, a NodeState, an
ObjectStore, protobuf messages) is Flower's interface too. `fedtune.federation.flower` has what the other
engines need as well. A test of the architecture holds every other file to Flower's public packages, so an
update of Flower is checked in these two.
"""

from __future__ import annotations

import asyncio
import base64
import datetime
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
from cryptography.exceptions import UnsupportedAlgorithm

from fedtune.deploy.database import NAME, check_database
from fedtune.deploy.news import QUESTION
from fedtune.deploy.spared import RunsThatGoOn, spare_database
from fedtune.errors import FederationError
from fedtune.federation.flower import quiet  # before Flower: its import switches off what reports home

# isort: split
from flwr.app import Error, Message
from flwr.app.message import make_message
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import (
    HEARTBEAT_DEFAULT_INTERVAL,
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_HEADER,
    TIMESTAMP_TOLERANCE,
    TRANSPORT_TYPE_GRPC_RERE,
    ErrorCode,
    Status,
    SubStatus,
)
from flwr.common.serde import fab_to_proto, run_from_proto, user_config_to_proto
from flwr.proto import control_pb2, runtime_pb2
from flwr.supercore import heartbeat, sql_mixin
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLEET_HTTP_SIGNATURE_HEADER,
    HEAD_BODY_DIVIDER,
    SQLITE_PRAGMAS,
    TASK_TOKEN_HEADER,
    TaskType,
)
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import (
    get_object_head_values_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    ObjectUnavailableError,
    inflate_object_from_contents,
    push_object_contents_from_iterable,
)
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, RuntimeVersionHttpInterceptor
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, sign_message, verify_signature
from flwr.supercore.retry import RetryInvoker, exponential, http_retry
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid import HttpGrid
from flwr.supernode import fleet_http_connection, node_auth_http_interceptor
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState
from flwr.supernode.start_client_internal import (
    _init_connection,
    _insert_message,
    _pull_and_store_message,
    _push_messages,
)

__all__ = [
    "ControlHttpClient",
    "Fab",
    "FrequentCalls",
    "HeartbeatSender",
    "HttpGrid",
    "ObjectPullError",
    "ObjectPushError",
    "ObjectUnavailableError",
    "RetryInvoker",
    "RuntimeHttpClient",
    "RuntimeTokenHttpInterceptor",
    "RuntimeVersionHttpInterceptor",
    "Status",
    "SubStatus",
    "TaskType",
    "build_fab_from_files",
    "control_pb2",
    "error_in_place_of",
    "exponential",
    "forget_node",
    "node_connection",
    "node_state",
    "object_ids",
    "pull_message",
    "push_objects",
    "push_replies",
    "quiet",
    "register_node",
    "run_from_proto",
    "run_started",
    "runtime_pb2",
    "signed_by_node",
    "start_request",
    "store_reply",
    "superlink_app",
    "task_taken",
    "whole_message",
]

_log = logging.getLogger("fedtune.node")

_BUSY_MILLISECONDS = "60000"
_CONNECTIONS = 16  # to the database, that are kept
_THREADS = 4  # that answer frequent calls: more only wait for one another, and for the database's one writer
_INTERFACES = {  # where Flower defines the middleware of an interface, and how its paths begin
    "flwr.superlink.routers.control.": "/v1/control/",
    "flwr.superlink.routers.fleet.": "/v1/fleet/",
    "flwr.supercore.routers.runtime.": "/v1/runtime/",
}


# --- the server: a SuperLink ------------------------------------------------------------------------------


def superlink_app(folder: Path, host: str, port: int) -> Any:
    """Flower's SuperLink as an ASGI application with the database of a server folder.

    What `flower-superlink` runs, without an executor for apps.

    Raises:
        ResourceError: the database is damaged.
    """
    check_database(folder)
    from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin  # late: a node has no use for its 10 MB
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
    from flwr.superlink.config_loader import SuperLinkLifespanConfig
    from flwr.superlink.main import create_app

    quiet()
    # Flower waits 5 s for its database, which twenty nodes that ask at once on two cores outlast. Of two
    # settings of one name the later one holds.
    setattr(sql_mixin, "SQLITE_PRAGMAS", (*SQLITE_PRAGMAS, ("busy_timeout", _BUSY_MILLISECONDS)))  # noqa: B010
    # Of its connections to the database it keeps five, and opens and closes all above them for each request.
    pooled = partial(vars(sql_mixin)["create_engine"], pool_size=_CONNECTIONS, pool_use_lifo=True)
    setattr(sql_mixin, "create_engine", pooled)  # noqa: B010
    config = SuperLinkLifespanConfig(
        control_address="",
        health_server_address=None,
        host=host,
        port=port,
        insecure=False,
        certificates=None,
        superexec_auth_secret=None,
        authn_plugin=NoOpControlAuthnPlugin(),
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        enable_supernode_auth=True,
        fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
        fleet_api_address=None,
        simulation=False,
        ssl_ca_certfile=str(folder / "ca.crt"),
        ssl_certfile=str(folder / "server.crt"),
        ssl_keyfile=str(folder / "server.key"),
        database=str(folder.absolute() / NAME),
        isolation="process",
        runtime_dependency_install=False,
    )
    app = create_app(config, SuperLinkLifespan)
    app.user_middleware = [_of_its_paths(middleware) for middleware in app.user_middleware]
    spare_database(app.state.linkstate_factory.state())
    return app


class _OfItsPaths:
    """A middleware of Flower's in front of the paths that it is for; other requests pass it by.

    It would let them through as they are, but each costs a request a group of tasks and two streams.
    """

    def __init__(self, app: Any, middleware: Any, paths: str) -> None:
        self._app, self._paths = app, paths
        self._through = middleware.cls(app, *middleware.args, **middleware.kwargs)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        its_own = scope["type"] == "http" and scope["path"].startswith(self._paths)
        await (self._through if its_own else self._app)(scope, receive, send)


class FrequentCalls:
    """Answers what nodes and a run's program call again and again, a dozen times for each message.

    Flower's application takes a call through nine layers and four threads. Here Flower's own functions check
    who calls (a node's signature and that the node is the key's; a run's token), answer, and translate what
    was raised, all in one thread.

    Args:
        app: what `superlink_app` returned.
    """

    def __init__(self, app: Any) -> None:
        from flwr.server.superlink.utils import check_abort
        from flwr.supercore.dependencies.task import authenticate_task
        from flwr.supercore.error import http_error_translator
        from flwr.supercore.protobuf import translation
        from flwr.superlink.routers.fleet import node_auth, router
        from flwr.superlink.servicer.fleet import fleet_handlers
        from starlette.requests import Request
        from starlette.responses import Response

        # A node signs once a second (`node_connection`), and a run that goes on is not asked for each call.
        setattr(node_auth, "bytes_to_public_key", bytes)  # noqa: B010
        setattr(node_auth, "verify_signature", _is_signed)  # noqa: B010
        setattr(fleet_handlers, "check_abort", RunsThatGoOn(check_abort))  # noqa: B010

        def of_node(answer: Callable[[Any, Any], Any]) -> Callable[..., Any]:
            def answered(request: Any, asked: Any, state: Any) -> Any:
                node_auth.authenticate_node(request)
                return answer(asked, state)

            return answered

        def of_run(answer: Callable[[Any, Any, Any], Any]) -> Callable[..., Any]:
            def answered(request: Any, asked: Any, state: Any) -> Any:
                token = request.headers.get(TASK_TOKEN_HEADER)
                return answer(asked, state, authenticate_task(request, token, state))

            return answered

        self._app, self._translated, self._of_protobuf = app, http_error_translator, translation
        self._request, self._response = Request, Response
        self._threads = ThreadPoolExecutor(_THREADS, "frequent-calls")
        run = app.state.runtime_handlers
        self._answers = {
            "/v1/fleet/confirm-message-received": of_node(router.fleet_confirm_message_received),
            QUESTION: of_node(router.fleet_pull_messages),
            "/v1/fleet/pull-object": of_node(router.fleet_pull_object),
            "/v1/fleet/push-messages": of_node(router.fleet_push_messages),
            "/v1/fleet/push-object": of_node(router.fleet_push_object),
            "/v1/fleet/send-node-heartbeat": of_node(router.fleet_send_node_heartbeat),
            "/v1/runtime/confirm-message-received": of_run(run.confirm_message_received),
            "/v1/runtime/pull-object": of_run(run.pull_object),
            "/v1/runtime/push-object": of_run(run.push_object),
        }

    def take(self, scope: Any) -> bool:
        """Whether a request (ASGI) is one of them."""
        return scope["method"] == "POST" and scope["path"] in self._answers

    async def answer(self, scope: Any, receive: Any, send: Any, body: bytes) -> bool:
        """Answers one whose body was read; whether it told a node that there is no message."""
        request = self._request({**scope, "app": self._app})
        nothing = False

        def answered() -> Any:
            nonlocal nothing
            layer = self._of_protobuf.ProtobufTranslationMiddleware
            layer._check_request_media_type(request)
            kind = self._of_protobuf.PROTOBUF_REQUEST_TYPES["POST", scope["path"]]
            request.state.protobuf_request = asked = layer._parse_request(body, kind)
            state = self._app.state.linkstate_factory.state()
            result = self._answers[scope["path"]](request, asked, state)
            nothing = scope["path"] == QUESTION and not result.messages_list
            media = self._of_protobuf.PROTOBUF_MEDIA_TYPE
            return self._response(result.SerializeToString(), media_type=media)

        async def in_a_thread(_: Any) -> Any:
            return await asyncio.get_running_loop().run_in_executor(self._threads, answered)

        response = await self._translated(request, in_a_thread)
        await response(scope, receive, send)
        return nothing


def _of_its_paths(middleware: Any) -> Any:
    for module, paths in _INTERFACES.items():
        if middleware.cls.__module__.startswith(module):
            return type(middleware)(_OfItsPaths, middleware, paths)
    return middleware


def signed_by_node(headers: Mapping[bytes, bytes]) -> bool:
    """Whether a request to the node interface is signed, now, by the key that it names.

    As Flower's `authenticate_node`, which reads the body first.
    """
    try:
        named, signature = (
            base64.b64decode(headers[name.encode()], validate=True)
            for name in (FLEET_HTTP_PUBLIC_KEY_HEADER, FLEET_HTTP_SIGNATURE_HEADER)
        )
        stamp = headers[TIMESTAMP_HEADER.encode()]
        signed_at = datetime.datetime.fromisoformat(stamp.decode("ascii"))
        age = (datetime.datetime.now(datetime.UTC) - signed_at).total_seconds()
        in_time = -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE
        return in_time and _is_signed(named, stamp, signature)
    except (KeyError, ValueError, TypeError, UnsupportedAlgorithm):
        return False


@lru_cache(maxsize=128)  # each may hold 64 kB of headers
def _is_signed(key: bytes, message: bytes, signature: bytes) -> bool:
    return verify_signature(bytes_to_public_key(key), message, signature)


def run_started(response: bytes) -> int | None:
    """The number of the run in the server's answer to StartRun; None if it started none."""
    started = control_pb2.StartRunResponse.FromString(response)
    return int(started.run_id) if started.HasField("run_id") else None


def task_taken(response: bytes) -> int | None:
    """The number of the run whose task is in the server's answer to AcquireTask; None if there is none."""
    taken = runtime_pb2.AcquireTaskResponse.FromString(response)
    return int(taken.task.run_id) if taken.token else None


def register_node(link_state: Any, key: bytes, site: str) -> None:
    """Registers a public key (PEM) under a site's name.

    Raises:
        ValueError: it was registered before and is so no more; Flower forgets a key for good.
    """
    link_state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, HEARTBEAT_DEFAULT_INTERVAL, name=site)


def forget_node(link_state: Any, node_id: int) -> None:
    """Ends the registration of a node's key, for good."""
    link_state.delete_node(NOOP_FLWR_AID, node_id)


# --- the node: the parts of a SuperNode -------------------------------------------------------------------

pull_message = _pull_and_store_message
push_replies = _push_messages
store_reply = _insert_message


def node_state(on_joined: Callable[[], None]) -> tuple[Any, Any]:
    """(NodeState, ObjectStore) of a node in memory; calls `on_joined` each time it has joined a server."""

    class State(InMemoryNodeState):
        def set_node_id(self, node_id: int | None) -> None:
            super().set_node_id(node_id)
            on_joined()

    store = ObjectStoreFactory().store()
    return State(store), store


class NodeHeartbeat(HeartbeatSender):
    """Flower's, which a server that fails for a moment does not end.

    At an HTTP 500 (a database that is locked, a server that ends) Flower's thread dies of it, and a node that
    works would count as gone. Other errors end it as they end Flower's, in one line: the server does not
    know this node any more, or takes its signature no more, which its loop finds out too.
    """

    def __init__(self, heartbeat_fn: Callable[[], bool]) -> None:
        def beat() -> bool:
            try:
                return heartbeat_fn()
            except httpx.HTTPStatusError as error:
                if error.response.status_code >= 500:
                    return False  # asked again, after a while
                _log.warning("the server took no sign of life: HTTP status %d", error.response.status_code)
            except RuntimeError as error:
                _log.warning("the server took no sign of life: %s", error)
            self._stop_event.set()
            return True

        super().__init__(beat)


def node_connection(
    server: str, authority: Path, key: Any, heartbeat_seconds: int
) -> AbstractContextManager[tuple[Any, ...]]:
    """A connection to the SuperLink at `server`: the node's id, and seven functions (see `guard` in node.py).

    It ends with SystemExit if the server refuses the key from the first, and like any connection if it does
    so later: whoever asks it again is told why.

    Args:
        server: HOST:PORT.
        authority: file with the certificate of whoever vouches for the server.
        key: the node's private key.
        heartbeat_seconds: how often the node says that it is alive.
    """
    for where in (fleet_http_connection, heartbeat):  # what the server is told, and what is kept
        setattr(where, "HEARTBEAT_DEFAULT_INTERVAL", heartbeat_seconds)  # noqa: B010 (Flower re-exports it)
    setattr(fleet_http_connection, "HeartbeatSender", NodeHeartbeat)  # noqa: B010
    for where in (fleet_http_connection, http_retry):
        setattr(where, "os", SimpleNamespace(getpid=os.getpid, kill=_taken_no_more))  # noqa: B010
    # A dozen calls a message need not be signed each: the server takes a signature for five minutes.
    setattr(node_auth_http_interceptor, "now", _this_second)  # noqa: B010
    setattr(node_auth_http_interceptor, "sign_message", _sign_once)  # noqa: B010
    return _init_connection(
        server_address=server,
        insecure=False,
        root_certificates=authority.read_bytes(),
        authentication_keys=(key, key.public_key()),
    )


def _taken_no_more(*_: Any) -> None:
    """In the place of the signal that Flower sends its own process at HTTP status 401: to this node it was
    its administrator's, and a site whose clock had jumped left for good, as if all were well."""
    raise RuntimeError("the server takes this node's signature no more (HTTP status 401)")


def _this_second() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


_sign_once = lru_cache(maxsize=128)(sign_message)


def object_ids(tree: Any) -> list[str]:
    """The ids of the objects in a tree of Flower's, each once."""
    return list(dict.fromkeys(node.object_id for node in iterate_object_tree(tree)))


def push_objects(store: Any, ids: Sequence[str], push: Callable[[str, bytes], None]) -> None:
    """Pushes the content of each object, several at once. Raises what `push` raises."""
    push_object_contents_from_iterable(((name, store.get(name)) for name in ids), push)


def whole_message(message_id: str, store: Any, most: int) -> Any:
    """The object `message_id` made of the contents in `store`; None if some are missing.

    What the server sent is not to be believed: it may raise anything, or be no message.

    Raises:
        FederationError: it would have more than `most` bytes.
    """
    wanted = object_ids(store.get_object_tree(message_id))
    contents = {name: data for name in wanted if (data := store.get(name))}
    if len(contents) < len(wanted):
        return None
    if (size := _inflated_size(message_id, contents, {})) > most:
        raise FederationError(
            f"Message {message_id[:12]} would have {size:,} bytes, and a message may have {most:,} here; "
            f"{sum(map(len, contents.values())):,} came. It was given up, and nothing was charged for it."
        )
    return inflate_object_from_contents(message_id, contents)


def _inflated_size(name: str, contents: Mapping[str, bytes], known: dict[str, int]) -> int:
    """Bytes of an object with all that is in it, as often as it is: on its way, each part comes once, and a
    megabyte that is named a million times is a megabyte."""
    if name not in known:
        kind, children, _ = get_object_head_values_from_object_content(contents[name])
        parts: Iterable[str] = children
        if kind in ("Array", "ArrayRecord", "RecordDict"):
            named = json.loads(contents[name].partition(HEAD_BODY_DIVIDER)[2])
            parts = [children[at] for at in named["arraychunk_ids"]] if kind == "Array" else named.values()
        known[name] = 0  # of an object in itself, which cannot be
        known[name] = len(contents[name]) + sum(_inflated_size(part, contents, known) for part in parts)
    return known[name]


def error_in_place_of(message: Message, reason: str) -> Message:
    """A message with the same metadata that holds an error instead of its content."""
    return make_message(metadata=message.metadata, error=Error(ErrorCode.UNKNOWN, reason))


# --- the operator ---------------------------------------------------------------------------------------


def start_request(content: bytes, digest: str, config: Mapping[str, str]) -> Any:
    """The request that starts a run of an app (its content and sha256) with a configuration."""
    app, values = fab_to_proto(Fab(digest, content, {})), user_config_to_proto(dict(config))
    return control_pb2.StartRunRequest(fab=app, override_config=values)
