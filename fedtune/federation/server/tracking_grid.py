"""Flower's Grid, which also tracks what was asked and not answered yet.

A round is over at its deadline, and a node that was late may still be at work on it: asked again meanwhile,
it would be late again, and be charged for that too. So whoever goes over the rounds asks `late` first, which
fetches what has come since (a late update is in no round), and asks no `busy` node again.

What it does not do: wait, or decide who takes part (`fedtune.federation.server.cohort`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedtune.federation.flower import Run

__all__ = ["Question", "TrackingGrid"]


@dataclass(frozen=True)
class Question:
    """A message on its way. `expires`: when nobody delivers it any more (monotonic seconds)."""

    node_id: int
    kind: str
    expires: float


class TrackingGrid(Grid):
    """Passes everything on to another Grid, and remembers the questions that are open."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._open: dict[str, Question] = {}

    def set_run(self, run: Run) -> None:
        """As of the Grid."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """As of the Grid."""
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Deprecated by Flower in favour of `Message(...)`; does the same."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes that are connected."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """As of the Grid: the ids in the order of the messages, empty for one that was not taken."""
        messages = list(messages)
        ids = [message_id or "" for message_id in self._grid.push_messages(messages)]
        now = time.monotonic()
        for message_id, message in zip(ids, messages, strict=True):
            if message_id:
                metadata = message.metadata
                self._open[message_id] = Question(
                    metadata.dst_node_id, metadata.message_type, now + metadata.ttl
                )
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The answers that have come to these messages, each once."""
        answers = list(self._grid.pull_messages(message_ids))
        for answer in answers:
            self._open.pop(answer.metadata.reply_to_message_id, None)
        return answers

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """As of the Grid."""
        return self._grid.send_and_receive(messages, timeout=timeout)

    def late(self) -> list[tuple[Question, Message]]:
        """The answers that have come since to questions for which nobody waits any more, with these.

        To be called between two rounds, when nobody waits for anything. Questions that expired are forgotten.
        """
        if not self._open:
            return []
        open_before = dict(self._open)
        answers = [
            (open_before[answer.metadata.reply_to_message_id], answer)
            for answer in self.pull_messages(set(open_before))
            if answer.metadata.reply_to_message_id in open_before
        ]
        now = time.monotonic()
        self._open = {name: question for name, question in self._open.items() if question.expires > now}
        return answers

    def busy(self) -> set[int]:
        """The nodes that have an open question: as far as is known they still work on it."""
        return {question.node_id for question in self._open.values()}
