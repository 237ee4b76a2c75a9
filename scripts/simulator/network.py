"""Virtual time, and what lies between server and sites: late, lost, twice, out of order.

Nobody waits for real. The server's loop is the one thread of it all: where it sleeps, whatever is due
meanwhile happens (`Clock.sleep`), in the order of virtual time. A site's work is done at one moment, and
its answer leaves later. `Link` is Flower's SuperLink as fedtune sees it: it keeps a message until its site
fetches it, or its time to live is over; the first answer counts; for a site that it has not heard of for a
while it answers itself.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedtune.federation.flower import Run, empty_run, error_answer, serialize, set_message_id

__all__ = ["Clock", "Link", "Network", "Question", "SimulatedGrid"]

_UNHEARD_SECONDS = 45.0  # after which Flower's server counts a node as gone


class Clock:
    """Virtual seconds, and what is to happen when."""

    def __init__(self) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, seconds: float, what: Callable[[], None]) -> None:
        """Has `what` happen `seconds` from now, while somebody sleeps."""
        heapq.heappush(self._due, (self.now + seconds, next(self._order), what))

    def sleep(self, seconds: float) -> None:
        """Lets time pass. Raises what happens meanwhile raises."""
        end = self.now + seconds
        while self._due and self._due[0][0] <= end:
            when, _, what = heapq.heappop(self._due)
            self.now = max(self.now, when)
            what()
        self.now = max(self.now, end)

    # As the module `time`:
    def monotonic(self) -> float:
        return self.now

    perf_counter = time = monotonic


@dataclass(frozen=True)
class Network:
    """What may happen to one message on its way, as probabilities; `seconds` is the mean delay."""

    seconds: float
    lost: float
    twice: float

    @classmethod
    def drawn(cls, chance: random.Random) -> Network:
        """Good, or bad, or worse."""
        return cls(
            chance.choice([0.02, 0.5, 8.0]), chance.choice([0, 0, 0.02, 0.1]), chance.choice([0, 0.05, 0.2])
        )

    def delay(self, chance: random.Random) -> float:
        return chance.expovariate(1.0 / self.seconds)


@dataclass
class Question:
    """A message that the server put on the link."""

    id: str
    run: int
    node: int
    kind: str
    data: bytes
    expires: float
    message: Message = field(repr=False)  # as it was asked, to answer it with an error


class Link:
    """What Flower's server keeps. `deliver` brings a question to its site, if that is up."""

    def __init__(self, clock: Clock, network: Network, chance: random.Random) -> None:
        self.clock, self.network, self.chance = clock, network, chance
        self.calm = False
        self.sites: dict[int, Any] = {}
        self.open: dict[str, Question] = {}
        self.answers: dict[str, Message] = {}  # in the order of arrival
        self._number = itertools.count(1)
        self.runs = itertools.count(1)

    def push(self, run: int, message: Message) -> str:
        name, to = f"m{next(self._number)}", message.metadata.dst_node_id
        set_message_id(message, name)
        expires = self.clock.now + message.metadata.ttl
        kind = message.metadata.message_type
        question = self.open[name] = Question(name, run, to, kind, serialize(message), expires, message)
        self._send(question)
        return name

    def _send(self, question: Question) -> None:
        """On its way to its site, as often as the network brings it there."""
        for _ in range(1 if self.calm else 1 + (self.chance.random() < self.network.twice)):
            if self.calm or self.chance.random() >= self.network.lost:
                self.clock.at(self.network.delay(self.chance), lambda: self._arrive(question))

    def _arrive(self, question: Question) -> None:
        if question.id not in self.open or self.clock.now > question.expires:
            return
        site = self.sites[question.node]
        if site.up:
            site.receive(question)
        else:  # it fetches the message when it is back
            self.clock.at(5.0, lambda: self._arrive(question))

    def answer(self, question: Question, answer: Message) -> None:
        """A site's answer on its way to the link."""
        if self.calm or self.chance.random() >= self.network.lost:
            self.clock.at(self.network.delay(self.chance), lambda: self._answered(question, answer))

    def _answered(self, question: Question, answer: Message) -> None:
        if self.open.pop(question.id, None) is not None:
            self.answers[question.id] = answer

    def pull(self, ids: set[str]) -> list[Message]:
        for name in [name for name in self.open if name in ids]:
            question = self.open[name]
            if self.clock.now - self.sites[question.node].heard > _UNHEARD_SECONDS:
                del self.open[name]
                self.answers[name] = error_answer(question.message, "The node is not connected.")
        return [self.answers.pop(name) for name in list(self.answers) if name in ids]

    def stop_run(self, run: int) -> None:
        """Nothing of this run is delivered any more."""
        self.open = {name: question for name, question in self.open.items() if question.run != run}

    def connected(self) -> list[int]:
        return [id for id, site in self.sites.items() if self.clock.now - site.heard <= _UNHEARD_SECONDS]


class SimulatedGrid(Grid):
    """Flower's Grid over the link, for one run there."""

    def __init__(self, link: Link, run: int) -> None:
        self._link, self._run = link, empty_run(run)

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return self._link.connected()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [self._link.push(int(self._run.run_id), message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        link = self._link
        if not link.calm and link.chance.random() < 0.002:
            link.clock.sleep(link.chance.uniform(1.0, 90.0))  # the server itself was cut off
        return link.pull(set(message_ids))

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise NotImplementedError
