"""What travels between server and nodes: three small records, versioned, and checked on arrival.

One flat float32 array carries the adapter (many small tensors cost Flower seconds each), one
ConfigRecord the rest. Whatever is received is treated as wrong until shown to be right: an unknown or
missing key, another type, shape, version, round or node, a NaN, an infinity or a norm above the limit
is an error that names the node, the round and the numbers.

What leaves a node is exactly what `HELLO_KEYS` and `REPLY_KEYS` list, it passes the door that everything
passes which is published (`fedtune.privacy.publication`), and a test watches the wire:
the update, which the plan made private, and public numbers; and where evaluation is private, two noised
counts (`fedtune.federation.evaluation_messages`). No shard size, no number of drawn
examples, no histogram, no loss, no epsilon (the server can compute its own run's from the plan).

Time is a channel too: how long a node computes depends on how many examples its Poisson batches held. A node
reports no seconds of private data (0.0 stands for them), and of public data `coarse_seconds`, on a grid of
25 percent steps. When an answer arrives the server sees all the same: the timing of answers is outside of
epsilon, as the privacy statement says. For a node that
minds, `answer-after` in its node configuration holds every answer back until that many seconds after
the request came in (see `fedtune.federation.client.release.delay_answer`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedtune.errors import FederationError, FedtuneError, UpdateRejected
from fedtune.privacy.plan import PrivacyPlan
from fedtune.privacy.publication import one_line, publish

__all__ = [
    "COST_KEYS",
    "HELLO_KEYS",
    "REPLY_KEYS",
    "VERSION",
    "NodeHello",
    "RoundReply",
    "RoundRequest",
    "check_update",
    "coarse_seconds",
    "only_records",
    "publishable_record",
    "read_config",
    "read_plan",
]

VERSION = 1
COST_KEYS = ("seconds",)
HELLO_KEYS: Mapping[str, type] = {
    "version": int, "node": str, "declared_size": int, "shards": int, "software": str, "idle": bool,
    "delta": float,
}  # fmt: skip
REQUEST_KEYS: Mapping[str, type] = {"version": int, "run": str, "round": int, "attempt": int, "plan": str}
REPLY_KEYS: Mapping[str, type] = {
    "version": int, "node": str, "run": str, "round": int, "attempt": int, "releases": int, "steps": int,
    "seconds": float, "refused": str, "refusal": str, "error": str,
}  # fmt: skip
_MAX_TEXT = 2000
_SHOWN = ("refused", "refusal", "error", "software")  # a node's words, for a person
_LEAST_DELTA = 1e-30


def coarse_seconds(seconds: float) -> float:
    """Seconds, rounded to the nearest power of 1.25 (0.0 below a millisecond); off by 12 percent at most."""
    if not seconds >= 1e-3:
        return 0.0
    return float(f"{1.25 ** round(math.log(seconds, 1.25)):.4g}")


def read_config(
    content: RecordDict, name: str, keys: Mapping[str, type], what: str, signed: Collection[str] = ()
) -> dict[str, Any]:
    """The ConfigRecord `name` of `content`, with exactly `keys` of exactly these types.

    Numbers are 0 or more, but for whole ones among `signed`. Raises FederationError, which says `what` it is.
    """
    record = content.get(name)
    if not isinstance(record, ConfigRecord):
        raise FederationError(f"{what} has no record {name!r} (it has {sorted(content)}).")
    values: dict[str, Any] = dict(record)
    version = values.get("version")
    if version != VERSION:
        raise FederationError(
            f"{what} has message version {version!r}, and this fedtune speaks version {VERSION}. "
            "Install the same fedtune on the server and on every node."
        )
    if set(values) != set(keys):
        missing, unknown = sorted(set(keys) - set(values)), sorted(set(values) - set(keys))
        raise FederationError(f"{what} lacks {missing} and has unknown keys {unknown}.")
    for key, kind in keys.items():
        value: Any = values[key]
        right = type(value) is kind  # a bool is no int here
        if not right:
            raise FederationError(
                f"{what}: {key} is a {type(value).__name__}, and should be a {kind.__name__}."
            )
        if kind is int and value < 0 and key not in signed:
            raise FederationError(f"{what}: {key} is {value}, below 0.")
        if kind is float and not (math.isfinite(value) and value >= 0):
            raise FederationError(f"{what}: {key} is {value}, and should be a number of at least 0.")
        if key in _SHOWN:
            values[key] = one_line(value)
    return values


def _vector(content: RecordDict, name: str, what: str) -> np.ndarray:
    """The flat float32 array in the ArrayRecord `name`; a copy of the received bytes."""
    record = content.get(name)
    if not isinstance(record, ArrayRecord) or list(record) != [name]:
        raise FederationError(f"{what} has no array {name!r} (it has {sorted(content)}).")
    array = record[name]
    # A header that lies about its size must not make this process allocate it: look at the bytes first.
    if array.dtype != "float32" or len(array.shape) != 1 or len(array.data) > 4 * array.shape[0] + 1024:
        raise FederationError(
            f"{what}: {name} is {array.dtype}{list(array.shape)}, and should be float32[P]."
        )
    try:
        vector = array.numpy()
    except (ValueError, TypeError, EOFError, OSError) as error:
        raise FederationError(f"{what}: {name} cannot be decoded ({type(error).__name__}).") from error
    if vector.dtype != np.float32 or vector.shape != tuple(array.shape):
        raise FederationError(
            f"{what}: {name} says float32{list(array.shape)} and is {vector.dtype}{list(vector.shape)}."
        )
    return vector


def publishable_record(sink: str, values: Mapping[str, Any], *, public_data: bool = False) -> ConfigRecord:
    """A ConfigRecord of what may leave of `values` (`fedtune.privacy.publication`)."""
    return ConfigRecord(publish(sink, values, public_data=public_data)[0])


def read_plan(text: str, what: str) -> PrivacyPlan:
    """The plan that a message carries as JSON.

    Raises FederationError, which says `what` it is, for a text that is none, and what
    `PrivacyPlan.from_json` raises for a plan without meaning.
    """
    try:
        return PrivacyPlan.from_json(json.loads(text))
    except FedtuneError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FederationError(
            f"{what} carries an unreadable privacy plan ({type(error).__name__})."
        ) from error


def only_records(content: RecordDict, allowed: set[str], what: str) -> None:
    """Raises FederationError if `content` has records beside the `allowed` ones."""
    if extra := sorted(set(content) - allowed):
        raise FederationError(f"{what} carries records that nobody asked for: {extra}.")


def _arrays(name: str, vector: np.ndarray) -> ArrayRecord:
    # 0-d and 2-d arrays never travel: `ascontiguousarray` of the ravelled vector is float32 [P], always.
    return ArrayRecord({name: Array(np.ascontiguousarray(vector.ravel(), dtype=np.float32))})


@dataclass(frozen=True)
class NodeHello:
    """Who a node is; all of it public.

    `declared_size` by its owner's declaration; `shards`: how many the federation has, by its configuration;
    `idle`: this node has none of them; `delta`: that of its owner's budget, 0.0 where none bounds this data.
    """

    node: str
    declared_size: int
    shards: int
    software: str
    idle: bool = False
    delta: float = 0.0

    def to_records(self) -> RecordDict:
        """Inverse of `from_records`."""
        values = {
            "version": VERSION,
            "node": self.node,
            "declared_size": self.declared_size,
            "shards": self.shards,
            "software": self.software,
            "idle": self.idle,
            "delta": self.delta,
        }
        return RecordDict({"hello": publishable_record("hello", values)})

    @classmethod
    def from_records(cls, content: RecordDict) -> NodeHello:
        """Raises FederationError if anything is missing, unknown or of another type."""
        what = "A node's hello"
        only_records(content, {"hello"}, what)
        values = read_config(content, "hello", HELLO_KEYS, what)
        values.pop("version")
        if not values["idle"] and (
            not values["node"] or len(values["node"]) > 200 or values["declared_size"] < 1
        ):
            raise FederationError(
                f"{what}: the name {values['node'][:50]!r} or the declared size {values['declared_size']} is "
                "unusable."
            )
        if values["delta"] and not _LEAST_DELTA <= values["delta"] < 1.0:
            # The smallest of all is the run's: what cannot be accounted for would end it for everybody.
            raise FederationError(
                f"{what}: the delta of the budget of {values['node'][:50]!r} is {values['delta']:g}, and it "
                f"should be below 1 and at least {_LEAST_DELTA:g}."
            )
        return cls(**values)


@dataclass(frozen=True)
class RoundRequest:
    """What the server asks of a node in one round. (run, round, attempt) names the release it asks for."""

    run: str
    round: int
    attempt: int
    plan: PrivacyPlan
    adapter: np.ndarray = field(repr=False)  # float32 [P]

    def to_records(self) -> RecordDict:
        """Inverse of `from_records`."""
        values: dict[str, Any] = {
            "version": VERSION,
            "run": self.run,
            "round": self.round,
            "attempt": self.attempt,
            "plan": json.dumps(self.plan.to_json(), sort_keys=True),
        }
        adapter = _arrays("adapter", self.adapter)
        return RecordDict({"adapter": adapter, "request": publishable_record("request", values)})

    @classmethod
    def from_records(cls, content: RecordDict) -> RoundRequest:
        """Raises FederationError (or what `PrivacyPlan.from_json` raises) if it is not a usable request."""
        what = "The server's request"
        only_records(content, {"adapter", "request"}, what)
        values = read_config(content, "request", REQUEST_KEYS, what)
        adapter = _vector(content, "adapter", what)
        if not np.isfinite(adapter).all():
            raise FederationError(
                f"{what} for round {values['round']} carries an adapter with NaN or infinity."
            )
        plan = read_plan(values["plan"], what)
        return cls(values["run"], values["round"], values["attempt"], plan, adapter)


@dataclass(frozen=True)
class RoundReply:
    """What a node answers: an update, or why there is none. Exactly one of update, refused and error is set.

    `refused` is the node's own decision (budget, ledger, preflight), `refusal` the name of the exception
    behind it; `error` is a failure. `releases` counts this run's releases in the node's ledger. `steps`
    is the plan's number of local steps. `cost` has the keys of `COST_KEYS`.
    """

    node: str
    run: str
    round: int
    attempt: int
    releases: int = 0
    steps: int = 0
    cost: dict[str, float] = field(default_factory=dict)
    update: np.ndarray | None = field(default=None, repr=False)  # float32 [P]
    refused: str | None = None
    refusal: str | None = None
    error: str | None = None

    def to_records(self, *, public_data: bool = False) -> RecordDict:
        """Inverse of `from_records`; sends nothing that is not in `REPLY_KEYS`.

        Seconds are sent only if the node's owner has declared its data public (`public_data`).
        """
        values: dict[str, Any] = {
            "version": VERSION,
            "node": self.node,
            "run": self.run,
            "round": self.round,
            "attempt": self.attempt,
            "releases": self.releases,
            "steps": self.steps,
            "seconds": float(self.cost.get("seconds", 0.0)),
            "refused": (self.refused or "")[:_MAX_TEXT],
            "refusal": self.refusal or "",
            "error": (self.error or "")[:_MAX_TEXT],
        }
        records: dict[str, Any] = {"reply": publishable_record("reply", values, public_data=public_data)}
        if self.update is not None:
            records["update"] = _arrays("update", self.update)
        return RecordDict(records)

    @classmethod
    def from_records(
        cls, content: RecordDict, *, node: str, run: str, round: int, attempt: int
    ) -> RoundReply:
        """Checks everything but the update's values (`check_update` does those).

        Raises UpdateRejected, which names `node` and `round`, if anything is missing, unknown, of another
        type, or an answer to another question.
        """
        what = f"The answer of node {node!r} in round {round}"
        try:
            only_records(content, {"reply", "update"}, what)
            values = read_config(content, "reply", REPLY_KEYS, what)
            update = _vector(content, "update", what) if "update" in content else None
        except FederationError as error:
            raise UpdateRejected(str(error)) from error
        for key, expected in (("node", node), ("run", run), ("round", round), ("attempt", attempt)):
            if values[key] != expected:
                raise UpdateRejected(f"{what} is for {key} {values[key]!r}, and {expected!r} was asked.")
        refused, refusal, error_text = (values[key] or None for key in ("refused", "refusal", "error"))
        if sum(part is not None for part in (update, refused, error_text)) != 1:
            raise UpdateRejected(f"{what} should be one of an update, a refusal and an error.")
        return cls(
            node=node,
            run=run,
            round=round,
            attempt=attempt,
            releases=values["releases"],
            steps=values["steps"],
            cost={"seconds": values["seconds"]},
            update=update,
            refused=refused,
            refusal=refusal,
            error=error_text,
        )


def check_update(update: np.ndarray, *, node: str, round: int, size: int, max_norm: float) -> float:
    """The L2 norm of a usable update; raises UpdateRejected, naming node, round and limit, for any other.

    Usable: a one-dimensional float32 array of `size` finite values with a norm of at most `max_norm`. What
    the update holds is not told: the reason goes into the record, and not every update is private by itself.
    """
    whose = f"Round {round} goes on without the update of node {node!r}:"
    if update.ndim != 1 or update.shape != (size,) or update.dtype != np.float32:
        raise UpdateRejected(
            f"{whose} it is {update.dtype}{list(update.shape)} and should be float32[{size}]."
        )
    if not np.isfinite(update).all():
        raise UpdateRejected(f"{whose} some of its {size} values are NaN or infinite.")
    norm = float(np.linalg.norm(update.astype(np.float64)))
    if norm > max_norm:
        raise UpdateRejected(
            f"{whose} its norm is over federation.max_update_norm={max_norm:g}. Lower the node's "
            "learning rate, or raise the limit if such updates are meant."
        )
    return norm
