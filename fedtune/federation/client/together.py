"""What simulated nodes that are asked at the same time do together, before the first of them is run.

A process that runs many nodes hands over their messages before it runs the first (`prepare`). The ledger that
they share is opened and looked at once for all of them. Each node's part is its own: its plan, settings,
second witness and budget.

**A release** (`CHARGED`) is charged: one durable write for many, before any of their data is touched. Each
goes through steps 2 to 4 of `fedtune.federation.client.app`; only the transaction is shared. Whoever is not
charged by it (it refuses, or nothing could be written) asks for itself when its message is run, and refuses
then. So all of them have paid when the first begins. Where a run ends in the middle of a round, nodes that
had not begun are charged too: the ledger may show more than was released, never less. That releases came to
their end is noted for many at once too (`settle`); one that was not noted counts all the same.

Nodes that were charged so, and train small heads by the same plan, then train together
(`fedtune.training.local.train_together`): by the same lines as alone, each on its own data with its own
noise. Whoever fails there fails alone, and what is found waits for its node's message.

**A question** before the run (`fedtune.federation.client.questions`) is answered, and the answer kept until
its message is run. Whoever fails, or must be charged first (for a size that it tells), is asked again then.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import Context, Message, RecordDict

from fedtune.errors import LedgerError, PrivacyError, UpdateRejected
from fedtune.federation.client.node_context import delays_answer, ledger_at_once
from fedtune.federation.client.questions import ANSWERS
from fedtune.federation.client.release import Asked, Release, ask_for_release
from fedtune.federation.messages import RoundRequest

if TYPE_CHECKING:
    from fedtune.privacy.ledger.ledger import PrivacyLedger, Reservation
    from fedtune.privacy.plan import PrivacyPlan
    from fedtune.training.local import LocalResult

__all__ = ["KINDS", "MOST", "Charged", "answered", "at_hand", "charged", "end", "prepare", "settle"]

MOST = 64  # nodes that are asked at once, and so charged at most for a round that they did not begin
CHARGED = {"train": False, "query.evaluate": True}  # what asks for a release; whether for an answer
KINDS = frozenset({*CHARGED, *ANSWERS})  # of messages
_SMALL = 1 << 20  # of `_size`: some milliseconds of training, which group and round are not kept waiting for

_log = logging.getLogger("fedtune.node")


@dataclass(frozen=True)
class Charged:
    """A request, the release that it was charged, and what its node's training with others gave."""

    request: RoundRequest
    release: Release
    trained: LocalResult | UpdateRejected | None = None


_waiting: dict[str, Charged] = {}  # by message
_answers: dict[str, RecordDict] = {}  # by message
_ended: list[tuple[PrivacyLedger, Reservation]] = []


def prepare(messages: Sequence[tuple[Message, Context]]) -> None:
    """Charges or answers `messages`, all of one of `KINDS`, each with its node's Context, one of each node.

    Raises:
        LedgerError: the ledger cannot be read or written, and nobody is charged.
    """
    kind = messages[0][0].metadata.message_type
    if kind in CHARGED:
        charged = _charge(messages, evaluation=CHARGED[kind])
        _waiting.update(charged)
        if not CHARGED[kind]:
            _train(charged)
        return
    with ledger_at_once(messages[0][1]):
        for message, context in messages:
            try:
                answer = ANSWERS[kind](message.content, context)
            except Exception as error:  # it is asked again by itself, and says so then
                _log.debug("A node does not answer ahead: %s", error)
            else:
                _answers[message.metadata.message_id] = answer


def _charge(messages: Sequence[tuple[Message, Context]], *, evaluation: bool) -> dict[str, Charged]:
    """Those that could be charged, by message."""
    ready: dict[PrivacyLedger, list[tuple[str, Asked]]] = defaultdict(list)
    with ledger_at_once(messages[0][1]):
        for message, context in messages:
            try:
                request = RoundRequest.from_records(message.content)
                asked = ask_for_release(request, context, evaluation=evaluation)
            except Exception as error:  # its own answer will say so
                _log.debug("A node is not charged ahead: %s", error)
                continue
            ready[asked.own.ledger].append((message.metadata.message_id, asked))
    charged = {}
    for ledger, wanted in ready.items():
        answers = ledger.reserve_all([asked.wanted for _, asked in wanted])
        for (message_id, asked), answer in zip(wanted, answers, strict=True):
            if not isinstance(answer, PrivacyError):
                charged[message_id] = Charged(asked.request, asked.reserved(answer, together=True))
    return charged


def _size(one: Charged) -> float:
    """Numbers that a node's steps go through, by its plan, not its data; infinite if it must train alone."""
    release, round = one.release, one.request.round
    plan = release.training
    of_head = release.config.adapter.name == "head" or plan.head_alone(round)
    if not of_head or plan.centres(round) or release.place is not None:
        return math.inf
    return plan.local_steps * (plan.expected_batch_size() + 1.0) * one.request.adapter.size


def _train(charged: Mapping[str, Charged]) -> None:
    """Trains those of `charged` together that can be, by plan; the others train when they are run."""
    from fedtune.federation.resources import run_resources
    from fedtune.training.local import train_together

    alike: dict[PrivacyPlan, list[str]] = defaultdict(list)
    for message_id, one in charged.items():
        if _size(one) <= _SMALL:
            alike[one.release.training].append(message_id)
    for plan, ids in alike.items():
        group = [charged[message_id] for message_id in ids]
        config, round = group[0].release.config, group[0].request.round
        if len(group) == 1 or any((o.release.config, o.request.round) != (config, round) for o in group):
            continue
        try:
            with run_resources(config).training_model(plan, round) as (model, part):
                results = train_together(
                    model,
                    [one.release.shard for one in group],
                    plan,
                    np.stack([one.request.adapter for one in group]),
                    config.train,
                    round=round,
                    gradients=config.federation.strategy == "fedsgd",
                    part=part,
                )
        except Exception as error:  # each meets it by itself, and says so then
            _log.debug("Nodes do not train together: %s", error)
            continue
        for message_id, one, result in zip(ids, group, results, strict=True):
            _waiting[message_id] = dataclasses.replace(one, trained=result)


def at_hand(message: Message, context: Context) -> bool:
    """Whether `prepare` found what this message asks for, so that it is answered without work or delay."""
    message_id = message.metadata.message_id
    trained = message_id in _waiting and _waiting[message_id].trained is not None
    return (trained or message_id in _answers) and not delays_answer(context)


def answered(message: Message) -> RecordDict | None:
    """What `prepare` answered to a message, once; None if it did not."""
    return _answers.pop(message.metadata.message_id, None)


def charged(message: Message) -> Charged | None:
    """What `prepare` did for a message, once; None if it is not charged."""
    return _waiting.pop(message.metadata.message_id, None)


def end(release: Release) -> None:
    """Notes that a release came to its end: with others, if it was charged with others."""
    if release.together:
        _ended.append((release.ledger, release.reservation))
    else:
        release.ledger.commit(release.reservation)


def settle(never_run: Iterable[str] = ()) -> None:
    """Writes down what `end` was told, and forgets messages that were charged and will not be run."""
    for message_id in never_run:
        _waiting.pop(message_id, None)
        _answers.pop(message_id, None)
    ended = list(_ended)
    _ended.clear()
    try:
        for ledger in dict.fromkeys(ledger for ledger, _ in ended):
            ledger.commit_all(reservation for of, reservation in ended if of is ledger)
    except LedgerError:
        _log.warning("Releases that came to their end are not noted as such; they count.", exc_info=True)
