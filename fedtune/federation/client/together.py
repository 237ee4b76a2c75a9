"""Charges of simulated nodes that are asked at the same time: one durable write for many, before any of their
data is touched.

A process that runs many nodes hands over their messages before it runs the first (`charge`). Each goes
through steps 2 to 4 of `fedtune.federation.client.app` by itself: its own plan, settings, second witness and
budget; only the transaction is shared. Whoever is not charged by it (it refuses, or nothing could be written)
asks for itself when its message is run, and refuses then.

So all of them have paid when the first begins. Where a run ends in the middle of a round, nodes that had not
begun are charged too: the ledger may show more than was released, never less.

That releases came to their end is noted for many at once too (`settle`); one that was not noted counts all
the same.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flwr.app import Context, Message

from fedtune.errors import LedgerError, PrivacyError
from fedtune.federation.client.release import Asked, Release, ask_for_release
from fedtune.federation.messages import RoundRequest

if TYPE_CHECKING:
    from fedtune.privacy.ledger.ledger import PrivacyLedger, Reservation

__all__ = ["KINDS", "MOST", "Charged", "charge", "charged", "end", "settle"]

MOST = 64  # nodes that are charged at once, and so at most for a round that they did not begin
KINDS = {"train": False, "query.evaluate": True}  # of messages that ask for a release; whether of an answer

_log = logging.getLogger("fedtune.node")


@dataclass(frozen=True)
class Charged:
    """A request and the release that it was charged."""

    request: RoundRequest
    release: Release


_waiting: dict[str, Charged] = {}  # by message
_ended: list[tuple[PrivacyLedger, Reservation]] = []


def charge(messages: Sequence[tuple[Message, Context]]) -> None:
    """Charges the nodes for what `messages` of `KINDS` ask, each with its node's Context; one of each node.

    Raises:
        LedgerError: nothing could be written, and nobody is charged.
    """
    ready: dict[PrivacyLedger, list[tuple[str, Asked]]] = defaultdict(list)
    for message, context in messages:
        evaluation = KINDS[message.metadata.message_type]
        try:
            asked = ask_for_release(
                RoundRequest.from_records(message.content), context, evaluation=evaluation
            )
        except Exception as error:  # its own answer will say so
            _log.debug("A node is not charged ahead: %s", error)
            continue
        ready[asked.own.ledger].append((message.metadata.message_id, asked))
    for ledger, wanted in ready.items():
        answers = ledger.reserve_all([asked.wanted for _, asked in wanted])
        for (message_id, asked), answer in zip(wanted, answers, strict=True):
            if not isinstance(answer, PrivacyError):
                _waiting[message_id] = Charged(asked.request, asked.reserved(answer, together=True))


def charged(message: Message) -> Charged | None:
    """What `charge` did for a message, once; None if it is not charged."""
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
    ended = list(_ended)
    _ended.clear()
    try:
        for ledger in dict.fromkeys(ledger for ledger, _ in ended):
            ledger.commit_all(reservation for of, reservation in ended if of is ledger)
    except LedgerError:
        _log.warning("Releases that came to their end are not noted as such; they count.", exc_info=True)
