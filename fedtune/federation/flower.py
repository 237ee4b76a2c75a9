"""Every touch of Flower's internals but those of a real federation, which `fedtune.deploy.flower` has.

Checked with flwr 1.41; pyproject holds the range narrow, and a test of the architecture holds the rest of the
package to Flower's public names.

Serialization is needed to count the bytes of a message, and copies to isolate nodes from one another;
`TaskIdentity` because a Message cannot be made outside of a Flower process without one. If an update
of Flower moves them, this file is what changes.
"""

from __future__ import annotations

import copy
import functools
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

# Flower and Ray report home by default; a privacy tool does not, unless its user asks for it.
for _name, _value in (
    ("FLWR_TELEMETRY_ENABLED", "0"),
    ("FLWR_DISABLE_UPDATE_CHECK", "1"),
    ("RAY_USAGE_STATS_ENABLED", "0"),
):
    os.environ.setdefault(_name, _value)

from flwr.app import Array, ConfigRecord, Context, Error, Message, RecordDict  # noqa: E402
from flwr.app.message.message import make_message  # noqa: E402
from flwr.common.serde import (  # noqa: E402
    context_from_proto,
    context_to_proto,
    message_from_proto,
    message_to_proto,
)
from flwr.proto.message_pb2 import Context as ProtoContext  # noqa: E402
from flwr.proto.message_pb2 import Message as ProtoMessage  # noqa: E402
from flwr.supercore.run import Run  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

__all__ = [
    "SERVER_NODE_ID",
    "Run",
    "act_as",
    "blamed",
    "config_record",
    "copied",
    "copied_records",
    "deserialize",
    "deserialize_context",
    "empty_run",
    "error_answer",
    "quiet",
    "serialize",
    "serialize_context",
    "serialized_size",
    "set_message_id",
    "simulation_workers",
    "task_identity",
    "wrapped_exception",
]

SERVER_NODE_ID = 1
_EMPTY = ConfigRecord()
_SCALARS = frozenset({bool, int, float, str, bytes})
_CLIENT_RAISED = 2  # ErrorCode.CLIENT_APP_RAISED_EXCEPTION
_NAMED = re.compile(r'node ("(?:[^"\\]|\\.){1,400}"): ')
_WRAPPED = re.compile(r"<class '(?:\w+\.)*(\w+)'>:<'")  # how its simulation (vce_api) reports a lost worker


def error_answer(question: Message, reason: str, node: str | None = None) -> Message:
    """An answer that carries an error instead of content; `reason` must be fit to be published.

    `node`: whose answer it is, where the server cannot know yet (`blamed`).
    """
    named = reason if node is None else f"node {json.dumps(node, ensure_ascii=False)}: {reason}"
    return Message(Error(_CLIENT_RAISED, named), reply_to=question)


def blamed(reason: str) -> tuple[str | None, str]:
    """The node that an `error_answer` names, if it does, and the reason by itself.

    A node says of itself who it is: for people to read, and nothing may follow from it.
    """
    named = _NAMED.match(reason)
    if named is None:
        return None, reason
    try:
        return str(json.loads(named[1])), reason[named.end() :]
    except ValueError:
        return None, reason


def wrapped_exception(reason: str) -> str | None:
    """The type of the exception that ended a worker of Flower's simulation; None if `reason` is a node's own.

    Flower puts the text of that exception beside the type, and nobody has looked at it: it is not for others.
    """
    wrapped = _WRAPPED.match(reason)
    return None if wrapped is None else wrapped[1]


def serialize(message: Message) -> bytes:
    """The message as the bytes that travel."""
    data: bytes = message_to_proto(message).SerializeToString()
    return data


def deserialize(data: bytes) -> Message:
    """Inverse of `serialize`; shares nothing with the original."""
    proto = ProtoMessage()
    proto.ParseFromString(data)
    return message_from_proto(proto)


def serialize_context(context: Context) -> bytes:
    """A Context as bytes."""
    data: bytes = context_to_proto(context).SerializeToString()
    return data


def deserialize_context(data: bytes) -> Context:
    """Inverse of `serialize_context`."""
    proto = ProtoContext()
    proto.ParseFromString(data)
    return context_from_proto(proto)


def copied_records(content: RecordDict) -> RecordDict:
    """Records of their own with the same values: what is done to them, the original does not see.

    The arrays' bytes are shared, which is safe because they are immutable.
    """
    own = content.copy()
    for name, record in own.items():
        own.__dict__["_data"][name] = mine = record.copy()
        values = mine.__dict__["_data"]
        for key, value in values.items():
            if isinstance(value, Array):
                values[key] = copy.copy(value)
            elif isinstance(value, list):
                values[key] = list(value)
    return own


def config_record(values: Mapping[str, Any]) -> ConfigRecord:
    """`ConfigRecord(values)`, at a tenth of the time where all values are scalars: Flower's own check makes a
    type anew for each."""
    if any(type(key) is not str or type(value) not in _SCALARS for key, value in values.items()):
        return ConfigRecord(dict(values))
    record = _EMPTY.copy()
    record.__dict__["_data"].update(values)
    return record


def copied(message: Message) -> Message:
    """A message that shares nothing with the original that can change, as `deserialize(serialize(message))`
    gives it in twice the time."""
    content = copied_records(message.content) if message.has_content() else None
    error = Error(message.error.code, message.error.reason) if message.has_error() else None
    return make_message(copy.copy(message.metadata), content, error)


def serialized_size(message: Message) -> int:
    """How many bytes `serialize` would make."""
    return int(message_to_proto(message).ByteSize())


def set_message_id(message: Message, message_id: str) -> None:
    """Sets the id that a SuperLink would have set."""
    message.metadata.__dict__["_message_id"] = message_id


@contextmanager
def task_identity(run_id: int) -> Iterator[None]:
    """Makes this process able to create messages as the server of a run; restores what was there."""
    names = ("_task_id", "_run_id", "_node_id")
    before = {name: getattr(TaskIdentity, name) for name in names}
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run_id, SERVER_NODE_ID
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(TaskIdentity, name, value)


def act_as(task_id: int, run_id: int, node_id: int) -> None:
    """Makes this process able to create messages as the app of a task, for good."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task_id, run_id, node_id


def quiet(level: int = logging.ERROR) -> None:
    """Silences what Flower prints on its own; the run's own display and errors say what matters."""
    logging.getLogger("flwr").setLevel(level)


@contextmanager
def simulation_workers(pool: Callable[..., Any]) -> Iterator[None]:
    """Has Flower's simulation on Ray keep its workers in a `pool` of another kind than its own.

    `pool` takes what `BasicActorPool` does, and `room`: how many workers the cluster has room for.
    """
    from flwr.server.superlink.fleet.vce.backend import raybackend
    from flwr.simulation.ray_transport.ray_actor import pool_size_from_resources

    name = "BasicActorPool"
    own = getattr(raybackend, name)
    setattr(raybackend, name, functools.partial(pool, room=pool_size_from_resources))
    try:
        yield
    finally:
        setattr(raybackend, name, own)


def empty_run(run_id: int) -> Any:
    """A `Run` with an id and nothing else."""
    return Run.create_empty(run_id=run_id)
