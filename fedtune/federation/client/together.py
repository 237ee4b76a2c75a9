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

**A question** before the run (`fedtune.federation.client.questions`) is answered, and the answer kept until
its message is run. Whoever fails, or must be charged first (for a size that it tells), is asked again then.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flwr.app import Context, Message, RecordDict

from fedtune.errors import LedgerError, PrivacyError
from fedtune.federation.client.node_context import ledger_at_once
from fedtune.federation.client.questions import ANSWERS
from fedtune.federation.client.release import Asked, Release, ask_for_release
from fedtune.federation.messages import RoundRequest

if TYPE_CHECKING:
    from fedtune.privacy.ledger.ledger import PrivacyLedger, Reservation

__all__ = ["KINDS", "MOST", "Charged", "answered", "charged", "end", "prepare", "settle"]

MOST = 64  # nodes that are asked at once, and so charged at most for a round that they did not begin
CHARGED = {"train": False, "query.evaluate": True}  # what asks for a release; whether for an answer
KINDS = frozenset({*CHARGED, *ANSWERS})  # of messages

_log = logging.getLogger("fedtune.node")


@dataclass(frozen=True)
class Charged:
    """A request and the release that it was charged."""

    request: RoundRequest
    release: Release


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
        _charge(messages, evaluation=CHARGED[kind])
        return
    with ledger_at_once(messages[0][1]):
        for message, context in messages:
            try:
                answer = ANSWERS[kind](message.content, context)
            except Exception as error:  # it is asked again by itself, and says so then
                _log.debug("A node does not answer ahead: %s", error)
            else:
                _answers[message.metadata.message_id] = answer


def _charge(messages: Sequence[tuple[Message, Context]], *, evaluation: bool) -> None:
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
    for ledger, wanted in ready.items():
        answers = ledger.reserve_all([asked.wanted for _, asked in wanted])
        for (message_id, asked), answer in zip(wanted, answers, strict=True):
            if not isinstance(answer, PrivacyError):
                _waiting[message_id] = Charged(asked.request, asked.reserved(answer, together=True))


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
