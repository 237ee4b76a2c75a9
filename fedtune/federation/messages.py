"""What travels between server and nodes: small records, versioned, and checked on arrival.

    hello       who a node is                  NodeHello
    propose     may this run be done here      Proposal -> Consent
    train       one round                      RoundRequest -> RoundReply
    evaluate    how right is this adapter      RoundRequest -> EvaluationReply

(Secure aggregation has messages of its own, in `fedtune.federation.secagg.messages`.) One flat float32 array
carries the adapter, for many small tensors cost Flower seconds each; one ConfigRecord carries the rest.
Whatever is received is wrong until shown to be right: an unknown or missing key, another type, shape,
version, round or node, a NaN, an infinity or a norm above the limit is an error that names the node, the
round and the numbers.

What leaves a node is exactly what the `*_KEYS` below list. It passes the check of everything that is
published (`fedtune.privacy.publication`), and a test watches the wire: the update, which the plan made
private, public numbers, and where evaluation is private, two noised counts. No shard size, number of drawn
examples, histogram, loss or epsilon (the server can compute its own run's from the plan).

Time is a channel too: how long a node computes depends on how many examples its Poisson batches held. A node
reports no seconds of private data (0.0 stands for them), and of public data `coarse_seconds`, on a grid of
25 percent steps; evaluation reports none, for it takes as long as there is held-out data. When an answer
arrives the server sees all the same: the timing of answers is outside of epsilon, as the privacy statement
says. For a node that minds, `answer-after` in its node configuration delays every answer until that many
seconds after the request came in (`fedtune.federation.client.node_context.delay_answer`).
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, RecordDict

from fedtune.errors import FederationError, FedtuneError, UpdateRejected
from fedtune.federation.flower import config_record
from fedtune.federation.protocol import PROTOCOL
from fedtune.federation.vectors import array_record, read_vector
from fedtune.privacy.plan import PrivacyPlan
from fedtune.privacy.publication import one_line, publish

__all__ = [
    "CONSENT_KEYS",
    "EVALUATION_KEYS",
    "HELLO_KEYS",
    "REPLY_KEYS",
    "VERSION",
    "Consent",
    "EvaluationReply",
    "NodeHello",
    "Proposal",
    "RoundReply",
    "RoundRequest",
    "check_update",
    "coarse_seconds",
    "publishable_record",
    "read_config",
    "read_plan",
]

VERSION = PROTOCOL
HELLO_KEYS: Mapping[str, type] = {
    "version": int, "node": str, "declared_size": int, "shards": int, "software": str, "idle": bool,
    "delta": float,
}  # fmt: skip
PROPOSAL_KEYS: Mapping[str, type] = {"version": int, "run": str, "attempt": int, "plan": str, "encoder": str}
CONSENT_KEYS: Mapping[str, type] = {
    "version": int, "node": str, "run": str, "attempt": int, "refused": str, "refusal": str,
    "last_round": int,
}  # fmt: skip
REQUEST_KEYS: Mapping[str, type] = {"version": int, "run": str, "round": int, "attempt": int, "plan": str}
REPLY_KEYS: Mapping[str, type] = {
    "version": int, "node": str, "run": str, "round": int, "attempt": int, "releases": int, "steps": int,
    "seconds": float, "refused": str, "refusal": str, "error": str,
}  # fmt: skip
EVALUATION_KEYS: Mapping[str, type] = {
    "version": int, "node": str, "run": str, "round": int, "attempt": int, "answers": int, "right": int,
    "wrong": int, "refused": str, "refusal": str, "error": str,
}  # fmt: skip
_COUNTS = ("right", "wrong")
_MAX_COUNT = 2**62
_MAX_TEXT = 2000  # characters of a reason
_plan_in = functools.lru_cache(8)(lambda text: PrivacyPlan.from_json(json.loads(text)))  # the same to all
_SHOWN = ("refused", "refusal", "error", "software")  # a node's words, for a person
_LEAST_DELTA = 1e-30


def coarse_seconds(seconds: float) -> float:
    """Seconds, rounded to the nearest power of 1.25 (0.0 below a millisecond); off by 12 percent at most."""
    if not seconds >= 1e-3:
        return 0.0
    return float(f"{1.25 ** round(math.log(seconds, 1.25)):.4g}")


def publishable_record(sink: str, values: Mapping[str, Any], *, public_data: bool = False) -> ConfigRecord:
    """A ConfigRecord of what may leave of `values` (`fedtune.privacy.publication`)."""
    return config_record(publish(sink, values, public_data=public_data)[0])


@dataclass(frozen=True)
class NodeHello:
    """Who a node is; all of it public.

    Attributes:
        node: its name; empty if it is idle.
        declared_size: by its owner's declaration, in units of privacy.
        shards: how many the federation has, by the node's configuration.
        idle: it has none of them.
        delta: of its owner's budget; 0.0 where none bounds this data.
    """

    node: str
    declared_size: int
    shards: int
    software: str
    idle: bool = False
    delta: float = 0.0

    def to_records(self) -> RecordDict:
        """The message as it travels."""
        return RecordDict({"hello": _record("hello", self, HELLO_KEYS)})

    @classmethod
    def from_records(cls, content: RecordDict) -> NodeHello:
        """Inverse of `to_records`.

        Raises:
            FederationError: something is missing, unknown or of another type.
        """
        what = "A node's hello"
        _only_records(content, {"hello"}, what)
        values = read_config(content, "hello", HELLO_KEYS, what)
        values.pop("version")
        name, size, delta = values["node"], values["declared_size"], values["delta"]
        if not values["idle"] and (not name or len(name) > 200 or size < 1):
            raise FederationError(f"{what}: the name {name[:50]!r} or the declared size {size} is unusable.")
        if delta and not _LEAST_DELTA <= delta < 1.0:
            # The smallest of all is the run's: what cannot be accounted for would end it for everybody.
            raise FederationError(
                f"{what}: the delta of the budget of {name[:50]!r} is {delta:g}, and it should be below 1 "
                f"and at least {_LEAST_DELTA:g}."
            )
        return cls(**values)


@dataclass(frozen=True)
class Proposal:
    """What a server means to do with a run, first round to last, on the encoder with the digest `encoder`."""

    run: str
    attempt: int
    plan: PrivacyPlan
    encoder: str

    def to_records(self) -> RecordDict:
        """The message as it travels."""
        return RecordDict({"proposal": _record("proposal", self, PROPOSAL_KEYS)})

    @classmethod
    def from_records(cls, content: RecordDict) -> Proposal:
        """Inverse of `to_records`.

        Raises:
            FederationError: it is no usable proposal; or what `PrivacyPlan.from_json` raises.
        """
        what = "The server's proposal"
        _only_records(content, {"proposal"}, what)
        values = read_config(content, "proposal", PROPOSAL_KEYS, what)
        return cls(values["run"], values["attempt"], read_plan(values["plan"], what), values["encoder"])


@dataclass(frozen=True)
class Consent:
    """A node's answer to a proposal: it agrees, or `refused` says why not.

    Attributes:
        refusal: the name of the exception behind `refused`.
        last_round: the last round of this run that the node was asked for and charged, as its ledger has it;
            0: none. A server that knows of fewer was wound back.
    """

    node: str
    run: str
    attempt: int
    refused: str | None = None
    refusal: str | None = None
    last_round: int = 0

    def to_records(self) -> RecordDict:
        """The message as it travels; sends nothing that is not in `CONSENT_KEYS`."""
        return RecordDict({"consent": _record("consent", self, CONSENT_KEYS)})

    @classmethod
    def from_records(cls, content: RecordDict, *, node: str, run: str, attempt: int) -> Consent:
        """Inverse of `to_records`.

        Raises:
            FederationError: something is missing, unknown, of another type, or about another run.
        """
        what = f"The answer of node {node!r} to the proposed run"
        _only_records(content, {"consent"}, what)
        values = read_config(content, "consent", CONSENT_KEYS, what)
        return cls(**_answers(values, what, node=node, run=run, attempt=attempt))


@dataclass(frozen=True)
class RoundRequest:
    """What the server asks of a node in one round. (run, round, attempt) names the release it asks for."""

    run: str
    round: int
    attempt: int
    plan: PrivacyPlan
    adapter: np.ndarray = field(repr=False)  # float32 [P]

    def to_records(self) -> RecordDict:
        """The message as it travels."""
        adapter = array_record("adapter", self.adapter)
        return RecordDict({"adapter": adapter, "request": _record("request", self, REQUEST_KEYS)})

    @classmethod
    def from_records(cls, content: RecordDict) -> RoundRequest:
        """Inverse of `to_records`.

        Raises:
            FederationError: it is no usable request; or what `PrivacyPlan.from_json` raises.
        """
        what = "The server's request"
        _only_records(content, {"adapter", "request"}, what)
        values = read_config(content, "request", REQUEST_KEYS, what)
        adapter = read_vector(content, "adapter", what)
        if not np.isfinite(adapter).all():
            raise FederationError(f"{what} for round {values['round']} has an adapter with NaN or infinity.")
        plan = read_plan(values["plan"], what)
        return cls(values["run"], values["round"], values["attempt"], plan, adapter)


@dataclass(frozen=True)
class RoundReply:
    """What a node answers: an update, or why there is none. Exactly one of update, refused, error is set.

    Attributes:
        releases: this run's releases in the node's ledger.
        steps: the plan's number of local steps.
        seconds: of training, coarse, and 0.0 for private data.
        update: float32 [P].
        refused: the node's own decision (budget, ledger, preflight), and `refusal` the name of the exception
            behind it.
        error: a failure.
    """

    node: str
    run: str
    round: int
    attempt: int
    releases: int = 0
    steps: int = 0
    seconds: float = 0.0
    update: np.ndarray | None = field(default=None, repr=False)
    refused: str | None = None
    refusal: str | None = None
    error: str | None = None

    def to_records(self, *, public_data: bool = False) -> RecordDict:
        """The message as it travels; sends nothing that is not in `REPLY_KEYS`.

        Seconds are sent only if the node's owner has declared its data public (`public_data`).
        """
        records: dict[str, Any] = {"reply": _record("reply", self, REPLY_KEYS, public_data=public_data)}
        if self.update is not None:
            records["update"] = array_record("update", self.update)
        return RecordDict(records)

    @classmethod
    def from_records(
        cls, content: RecordDict, *, node: str, run: str, round: int, attempt: int
    ) -> RoundReply:
        """Checks everything but the update's values (`check_update` does those).

        Raises:
            UpdateRejected: something is missing, unknown, of another type, or an answer to another question;
                it names `node` and `round`.
        """
        what = f"The answer of node {node!r} in round {round}"
        try:
            _only_records(content, {"reply", "update"}, what)
            values = read_config(content, "reply", REPLY_KEYS, what)
            update = read_vector(content, "update", what) if "update" in content else None
        except FederationError as error:
            raise UpdateRejected(str(error)) from error
        values = _answers(values, what, node=node, run=run, round=round, attempt=attempt)
        if sum(part is not None for part in (update, values["refused"], values["error"])) != 1:
            raise UpdateRejected(f"{what} should be one of an update, a refusal and an error.")
        return cls(**values, update=update)


@dataclass(frozen=True)
class EvaluationReply:
    """Two noised counts, or why there are none. Exactly one of counts, refused and error is set.

    Attributes:
        answers: this run's answers in the node's ledger.
        counts: (right, wrong) in steps of the plan (`EvaluationPlan.scale` of them are one unit), noised;
            either may be negative.
        refused, refusal, error: as in `RoundReply`.
    """

    node: str
    run: str
    round: int
    attempt: int
    answers: int = 0
    counts: tuple[int, int] | None = None
    refused: str | None = None
    refusal: str | None = None
    error: str | None = None

    def to_records(self) -> RecordDict:
        """The message as it travels; sends nothing that is not in `EVALUATION_KEYS`."""
        right, wrong = self.counts or (0, 0)
        record = _record("evaluation", self, EVALUATION_KEYS, right=right, wrong=wrong)
        return RecordDict({"evaluation": record})

    @classmethod
    def from_records(
        cls, content: RecordDict, *, node: str, run: str, round: int, attempt: int
    ) -> EvaluationReply:
        """Inverse of `to_records`.

        Raises:
            UpdateRejected: something is missing, unknown, of another type, too large, or an answer to another
                question; it names `node` and `round`.
        """
        what = f"The answer of node {node!r} about its held-out data after round {round}"
        try:
            _only_records(content, {"evaluation"}, what)
            values = read_config(content, "evaluation", EVALUATION_KEYS, what, signed=_COUNTS)
        except FederationError as error:
            raise UpdateRejected(str(error)) from error
        values = _answers(values, what, node=node, run=run, round=round, attempt=attempt)
        right, wrong = (values.pop(key) for key in _COUNTS)
        if max(abs(right), abs(wrong)) > _MAX_COUNT:
            raise UpdateRejected(f"{what} counts more than there can be.")
        if values["refused"] is not None and values["error"] is not None:
            raise UpdateRejected(f"{what} should be one of two counts, a refusal and an error.")
        counted = values["refused"] is None and values["error"] is None
        return cls(**values, counts=(right, wrong) if counted else None)


def check_update(
    update: np.ndarray, *, node: str, round: int, size: int, max_norm: float, noise: float = 0.0
) -> float:
    """The L2 norm of a usable update; raises UpdateRejected, naming node, round and limit, for any other.

    Usable: a one-dimensional float32 array of `size` finite values with a norm of at most `max_norm`, beside
    `noise` for the noise that is in it. The text quotes no value of the update: it goes into the record, and
    not every update is private by itself.
    """
    whose = f"Round {round} goes on without the update of node {node!r}:"
    if update.ndim != 1 or update.shape != (size,) or update.dtype != np.float32:
        raise UpdateRejected(
            f"{whose} it is {update.dtype}{list(update.shape)} and should be float32[{size}]."
        )
    if not np.isfinite(update).all():
        raise UpdateRejected(f"{whose} some of its {size} values are NaN or infinite.")
    norm = float(np.linalg.norm(update.astype(np.float64)))
    if norm > max_norm + noise:
        beside = f" beside {noise:g} for its noise" if noise else ""
        raise UpdateRejected(
            f"{whose} its norm is over federation.max_update_norm={max_norm:g}{beside}. Lower the node's "
            "learning rate, or raise the limit if such updates are meant."
        )
    return norm


# --- writing and reading records --------------------------------------------------------------------


def _record(
    sink: str, message: Any, keys: Mapping[str, type], *, public_data: bool = False, **more: Any
) -> ConfigRecord:
    """The fields of `message` that `keys` names, as far as they may leave; None is an empty text."""
    values: dict[str, Any] = {"version": VERSION}
    for key, kind in keys.items():
        if key == "version":
            continue
        value = more[key] if key in more else getattr(message, key)
        if key == "plan":
            value = json.dumps(value.to_json(), sort_keys=True)
        elif kind is str:
            value = (value or "")[:_MAX_TEXT] if key in ("refused", "error") else value or ""
        values[key] = float(value) if kind is float else value
    return publishable_record(sink, values, public_data=public_data)


def _only_records(content: RecordDict, allowed: set[str], what: str) -> None:
    """Refuses `content` that has records beside the `allowed` ones, with a FederationError."""
    if extra := sorted(set(content) - allowed):
        raise FederationError(f"{what} carries records that nobody asked for: {extra}.")


def read_config(
    content: RecordDict, name: str, keys: Mapping[str, type], what: str, signed: Collection[str] = ()
) -> dict[str, Any]:
    """The ConfigRecord `name` of `content`, with exactly `keys` of exactly these types.

    Numbers are 0 or more, but for whole ones among `signed`. Lists are of texts if called `names`, else of
    bytes.

    Raises:
        FederationError: the record is anything else; it says `what` it is.
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
        item: type = str if key == "names" else bytes
        if kind is list and any(type(element) is not item for element in value):
            raise FederationError(f"{what}: {key} is not a list of {item.__name__}.")
        if kind is int and value < 0 and key not in signed:
            raise FederationError(f"{what}: {key} is {value}, below 0.")
        if kind is float and not (math.isfinite(value) and value >= 0):
            raise FederationError(f"{what}: {key} is {value}, and should be a number of at least 0.")
        if key in _SHOWN:
            values[key] = one_line(value)
    return values


def _answers(values: Mapping[str, Any], what: str, **asked: Any) -> dict[str, Any]:
    """The fields of an answer; refuses one to another question than was `asked`, with UpdateRejected."""
    for key, expected in asked.items():
        if values[key] != expected:
            raise UpdateRejected(f"{what} is for {key} {values[key]!r}, and {expected!r} was asked.")
    return {
        key: value or None if key in ("refused", "refusal", "error") else value
        for key, value in values.items()
        if key != "version"
    }


def read_plan(text: str, what: str) -> PrivacyPlan:
    """The plan that a message carries as JSON.

    Raises:
        FederationError: the text is no plan; it says `what` it is.
        PrivacyError: the plan has no meaning.
    """
    try:
        return _plan_in(text)
    except FedtuneError:
        raise
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FederationError(
            f"{what} carries an unreadable privacy plan ({type(error).__name__})."
        ) from error
