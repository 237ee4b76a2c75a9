"""The resident worker of a node: one process that keeps encoder, data and ledger between the messages.

Flower would start a process for every message, which then loads torch and the encoder; here the node passes
each message, with its Context, over a local socket (`channel`) to the process that has them. It calls the
same ClientApp as every other engine, and writes the node's audit log: what was asked, what leaves, and what
the data has spent before and after.

    python -m fedtune.deploy.worker SOCKET [--log-json]

It does not use the network. If it dies, the node starts another; a release that was reserved in the ledger
stays charged. Between messages it holds nothing but caches, so that the node may end it whenever it is idle.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import os
import resource
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.config.build import build
from fedtune.deploy import channel
from fedtune.deploy.memory import WORKER_BLOCK, give_memory_back
from fedtune.monitoring.logs import log_to_stderr

if TYPE_CHECKING:
    from flwr.app import Context, Message

    from fedtune.federation.client.audit_log import Books
    from fedtune.federation.client.policy import SiteSettings

__all__ = ["answer", "main", "refusal_in"]

_log = logging.getLogger("fedtune.node")


def main(path: str, *, log_json: bool = False) -> None:
    """Connects to the node's socket and answers its messages until it closes.

    Args:
        path: of the socket.
        log_json: the log has JSON, as the node's has.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # they are for the node, which ends this one
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    header, parts = channel.receive(connection)
    from fedtune.federation.client.policy import SiteSettings

    site = SiteSettings.from_json(parts[0].decode())
    _limit(site)
    give_memory_back(WORKER_BLOCK)
    log_to_stderr("worker", as_json=log_json)
    from fedtune.federation.flower import quiet

    quiet()
    channel.send(connection, {"ready": os.getpid(), "fedtune": build()})
    _load()
    while True:
        try:
            header, parts = channel.receive(connection)
        except EOFError:
            return
        answered = answer(parts[0], parts[1], header, site)
        try:
            channel.send(connection, {}, answered)
        except OSError:  # what was charged stays charged; a node that starts again starts another worker
            _log.info("the node is gone, and nobody takes the answer")
            return


def answer(message: bytes, context: bytes, header: dict[str, Any], site: SiteSettings) -> list[bytes]:
    """Answers a message and writes the audit log.

    Args:
        message: serialized.
        context: of the run, serialized.
        header: task, run and node of the message.
        site: the site's settings.

    Returns:
        [reply, context], serialized.
    """
    from fedtune.errors import FedtuneError, ResourceError
    from fedtune.federation.client.app import app
    from fedtune.federation.client.audit_log import Books
    from fedtune.federation.client.node_context import public_reason
    from fedtune.federation.flower import (
        act_as,
        deserialize,
        deserialize_context,
        error_answer,
        serialize,
        serialize_context,
    )

    received, its_context = deserialize(message), deserialize_context(context)
    act_as(header["task"], header["run"], header["node"])
    books = Books(Path(site.ledger), Path(site.audit_log))
    before: dict[str, Any] = {}
    try:
        books.check()
        before = _spent(its_context)
        reply = app(received, its_context)
    except Exception as error:  # books that disagree; a message of a kind that nobody answers
        known = isinstance(error, FedtuneError)
        _log.error("a message could not be answered: %s", error, exc_info=None if known else error)
        reply = error_answer(received, public_reason(error, site.site))
    data = serialize(reply)
    try:
        _audit(books, received, reply, its_context, before, len(data))
    except ResourceError as error:  # what is not in the log does not leave; what was charged stays charged
        _log.error("%s (%s)", error, site.audit_log)
        data = serialize(error_answer(received, public_reason(error, site.site)))
    return [data, serialize_context(its_context)]


def _limit(site: SiteSettings) -> None:
    """Applies the owner's limits to this process, before torch is loaded and makes its threads."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(site.limits.threads)
    _skip_unused_libraries()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a worker that crashes leaves no texts on the disk
    if site.limits.memory_gb is not None:
        limit = int(site.limits.memory_gb * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def _load() -> None:
    """Imports what the first message would import, while the node still joins.

    If something is missing or broken, the answer to that message says so, because it imports it again.
    """
    names = ("fedtune.federation.client.app", "fedtune.models.classifier", "fedtune.training.local", "peft")
    with contextlib.suppress(Exception):
        for name in (*names, "transformers.models.auto.modeling_auto"):
            importlib.import_module(name)


def _skip_unused_libraries() -> None:
    """Prevents imports by transformers, peft and bitsandbytes that no training here uses.

    They are torchao, and the compiler behind `torch.compile`, which bitsandbytes names in a decorator:
    together 50 MB that would stay resident between rounds, and seconds of each start.
    """
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    sys.modules.setdefault("torchao", None)  # type: ignore[arg-type]  # looks as if it were not installed


def _spent(context: Context) -> dict[str, Any]:
    """Releases and epsilon of this node's data until now."""
    from fedtune.federation.client import node_context as node

    try:
        shard = node.own_shard(node.node_config(context), context)
        assert shard is not None
        ledger = node.node_ledger(context)
        epsilon = ledger.epsilon(dataset=shard.dataset, fingerprint=shard.identity)
        return {
            "releases": len(ledger.releases(dataset=shard.dataset)),
            "epsilon": epsilon if epsilon != float("inf") else None,
            "fingerprint": ledger.known_as(shard.identity)[:12],
        }
    except Exception as error:  # the answer itself will say why the node cannot work
        return {"problem": node.public_reason(error, "this node")}


def _audit(
    books: Books, message: Message, reply: Message, context: Context, before: dict[str, Any], size: int
) -> None:
    """Writes one line for a message and its answer, before the answer leaves this process."""
    kind, sent, refused = message.metadata.message_type, _answer_in(reply), refusal_in(reply)
    values: dict[str, Any] = {"message": kind, "bytes_out": size}
    asked = _config(message, "request") or _config(message, "proposal")
    if asked:
        plan = _plan(asked)
        keys = (
            "trust",
            "unit",
            "noise_multiplier",
            "max_grad_norm",
            "sample_rate",
            "local_steps",
            "num_rounds",
            *(("evaluation_answers", "evaluation_noise") if kind == "query.evaluate" else ()),
        )
        values |= {name: _short(asked.get(name)) for name in ("run", "round", "attempt")}
        values["asked"] = {key: _short(plan.get(key)) for key in keys}
    if kind == "query.evaluate" and not refused:
        values["left"] = {name: sent.get(name) for name in ("right", "wrong")}  # noised, as they were sent
    if refused:
        values["reason"] = str(refused)[:2000]
    charges = kind not in ("query.hello", "query.propose")
    after = _spent(context) if charges else before
    if charges:
        values |= {"before": before, "after": after}
    charged = after.get("releases", 0) > before.get("releases", 0)
    event = "refused" if refused else "released" if charged else "answered"
    books.append(event, **values)
    _log.info("%s %s%s", event, kind, f": {refused}" if refused else "")


def _answer_in(reply: Message) -> dict[str, Any]:
    return _config(reply, "reply") or _config(reply, "evaluation") or _config(reply, "consent")


def refusal_in(reply: Message) -> str:
    """Why an answer is none, as its receiver reads it; empty for an answer."""
    sent = _answer_in(reply)
    return str(sent.get("refused") or sent.get("error") or (reply.error.reason if reply.has_error() else ""))


def _config(message: Message, name: str) -> dict[str, Any]:
    from flwr.app import ConfigRecord

    record = message.content.get(name) if message.has_content() else None
    return dict(record) if isinstance(record, ConfigRecord) else {}


def _plan(asked: dict[str, Any]) -> dict[str, Any]:
    """The plan in a request; empty if it cannot be read as one, for a server may send anything."""
    try:
        plan = json.loads(str(asked["plan"])[:10_000])
    except (KeyError, ValueError, RecursionError):
        return {}
    return plan if isinstance(plan, dict) else {}


def _short(value: Any) -> Any:
    """A value that a line of the log can hold, whatever the server sent."""
    if value is None or type(value) in (bool, int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)[:100]


if __name__ == "__main__":
    main(sys.argv[1], log_json="--log-json" in sys.argv[2:])
