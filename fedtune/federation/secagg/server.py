"""The server's side of a distributed round: one DP-SGD step over the union of all shards, seen only as a sum.

    1  advertise   every node makes keys            } no data is touched, and a node that is lost here
    2  share       every node deals its secrets     } costs nothing
    3  mask        every node sends its clipped, partly noised, masked integers; added up as they come
    4  unmask      the survivors take the masks off the sum
    5  decode, divide by the public expected batch size: the gradient, whose noise meets the plan

What the server sees of a node's data is in `fedtune.federation.secagg.protocol`, why the noise of the sum
meets the plan in `fedtune.privacy.mechanisms.discrete`. The step itself is
`fedtune.federation.server.optimizers`.

Dropouts. A node that does not answer in time, fails or refuses is left out; up to `privacy.max_dropouts`
may be missing from the sum, and `threshold` nodes must answer `unmask`. With fewer the round is void: its
result is discarded, and what nodes had reserved stays charged, because their masked vectors have left them. A
message that cannot be right (a wrong share, a malformed vector) voids the round too, and names its sender.

The divisor is the same whoever came: it is the plan's constant, and a sum that lacks a node is a smaller
step, not another one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedtune.config.schema import Config
from fedtune.errors import AggregationAborted, ConfigError, FederationError, UpdateRejected
from fedtune.federation.events import Observer
from fedtune.federation.flower import serialized_size
from fedtune.federation.messages import RoundRequest
from fedtune.federation.secagg import messages as wire
from fedtune.federation.secagg.messages import PhaseId
from fedtune.federation.secagg.protocol import MaskedSum, Session
from fedtune.federation.server.rounds import (
    RoundAsk,
    RoundOutcome,
    exchange,
    make_messages,
    reason_of,
    time_to_live,
)
from fedtune.privacy.mechanisms.discrete import DiscreteMechanism
from fedtune.privacy.plan import PrivacyPlan

__all__ = ["DistributedRound"]

KEY_SECONDS = 120.0  # exchanges without training: seconds until a node that does not answer is left out
T = TypeVar("T")


class DistributedRound:
    """A `RoundProtocol`: the aggregate is minus the noised gradient of one step over the union of all
    shards.
    """

    def __init__(self, config: Config, plan: PrivacyPlan) -> None:
        """Checks, before any node is asked, that such a round can be done.

        Raises:
            ConfigError, PrivacyError: it cannot.
        """
        cohort = config.federation.cohort_size
        if cohort is not None and cohort < plan.nodes:
            raise ConfigError(
                f"federation.cohort_size={cohort} does not fit privacy.trust=distributed: every round is one "
                f"step over the union of all {plan.nodes} shards, so every node is asked. Leave "
                "federation.cohort_size out."
            )
        wire.session_for(PhaseId("", 0, 0, "advertise"), plan, [str(i) for i in range(plan.nodes)], 1)

    def run_round(self, grid: Grid, ask: RoundAsk, observer: Observer) -> RoundOutcome:
        """See `RoundProtocol`. A round that was discarded has no aggregate and every node among `dropped`."""
        outcome = RoundOutcome()
        try:
            _Round(grid, ask, observer, outcome).run()
        except FederationError as error:
            outcome.aggregate, outcome.used = None, []
            gone = {node for node, _ in outcome.dropped}
            outcome.dropped += [(node.name, str(error)) for node in ask.nodes if node.name not in gone]
        return outcome


class _Round:
    """One round while it goes on."""

    def __init__(self, grid: Grid, ask: RoundAsk, observer: Observer, outcome: RoundOutcome) -> None:
        self.grid, self.ask, self.observer, self.outcome = grid, ask, observer, outcome
        self.nodes = {node.name: node for node in sorted(ask.nodes, key=lambda node: node.name)}
        names = list(self.nodes)
        self.session: Session = wire.session_for(
            self.phase_id("advertise"), ask.plan, names, ask.adapter.size
        )
        self.mechanism = DiscreteMechanism.for_plan(ask.plan, ask.adapter.size)

    def phase_id(self, phase: str) -> PhaseId:
        return PhaseId(self.ask.run, self.ask.round, self.ask.attempt, phase)

    def run(self) -> None:
        ask, outcome, server = self.ask, self.outcome, MaskedSum(self.session)
        for name in self.nodes:
            self.observer.on_client(name, "asked")

        # 1 to 2: keys and shares
        asks = wire.advertise_ask(self.phase_id("advertise"), ask.plan, list(self.nodes), ask.adapter.size)
        keys = self.exchange("advertise", dict.fromkeys(self.nodes, asks), self.reading(wire.read_keys))
        roster = server.advertised(keys)
        asks = wire.share_ask(self.phase_id("share"), roster)
        dealt = self.exchange("share", dict.fromkeys(roster, asks), self.reading(wire.read_sealed))
        received = server.shared(dealt)

        # 3: the one exchange that touches data
        request = RoundRequest(ask.run, ask.round, ask.attempt, ask.plan, ask.adapter).to_records()
        phase_id = self.phase_id("mask")
        self.exchange(
            "mask",
            {name: wire.mask_ask(phase_id, request, peers) for name, peers in received.items()},
            lambda name, content: self.add_vector(server, name, content),
        )
        survivors = server.survivors()

        # 4 to 5
        asks = wire.unmask_ask(self.phase_id("unmask"), survivors)
        shares = self.exchange("unmask", dict.fromkeys(survivors, asks), self.reading(wire.read_shares))
        total = self.mechanism.decode(server.unmask(shares))
        average = ask.plan.average(total)
        if ask.head is not None:
            average = ask.plan.clipping.undone(average, ask.head, ask.plan.head_alone(ask.round))
        outcome.aggregate = -average
        outcome.used = survivors
        # A node that was lost after its vector had come is in the sum, and not dropped from it.
        outcome.dropped = [(name, reason) for name, reason in outcome.dropped if name not in survivors]
        for name in survivors:
            self.observer.on_client(name, "answered")

    def add_vector(self, server: MaskedSum, name: str, content: RecordDict) -> None:
        """Adds a masked vector to the sum.

        Raises:
            UpdateRejected: the node refused or failed.
        """
        reply, vector = wire.read_mask_answer(
            content, node=name, phase_id=self.phase_id("mask"), size=self.ask.adapter.size
        )
        self.outcome.replies.append(reply)
        if vector is None:
            reason = reply.refused or reply.error or ""
            self.stop_if_cheated(reason)
            raise UpdateRejected(reason)
        server.masked(name, vector)

    def reading(self, read: Callable[[Mapping[str, object]], T]) -> Callable[[str, RecordDict], T]:
        """Reads an answer of one of the exchanges without training.

        Raises:
            UpdateRejected: it is unusable.
        """

        def read_answer(name: str, content: RecordDict) -> T:
            what = f"The answer of node {name!r} in round {self.ask.round}"
            phase = str(dict(content.config_records.get("secagg", {})).get("phase", ""))
            try:
                if set(content) != {"secagg"} or phase not in wire.ANSWERS:
                    raise FederationError(f"{what} carries {sorted(content)} for {phase!r}.")
                phase_id, values = wire.read_record(content, wire.ANSWERS[phase], phase, what)
                if phase_id != self.phase_id(self.phase):
                    raise FederationError(f"{what} is for {phase_id}.")
                return read(values)
            except FederationError as error:
                raise UpdateRejected(str(error)) from error

        return read_answer

    def exchange(
        self, phase: str, contents: Mapping[str, RecordDict], read: Callable[[str, RecordDict], T]
    ) -> dict[str, T]:
        """Sends each node its content and reads what comes back; who gives nothing usable is dropped."""
        self.phase = phase
        ask, outcome = self.ask, self.outcome
        timeout = ask.timeout if phase == "mask" else min(ask.timeout, KEY_SECONDS)
        messages: list[Message] = []
        for name, content in contents.items():
            to = [self.nodes[name]]
            ttl = time_to_live(timeout) if ask.deadline else None
            messages += make_messages(content, wire.KINDS[phase], to, ask.round, ttl=ttl)
        outcome.bytes_down += sum(serialized_size(message) for message in messages)
        waiting = {self.nodes[name].node_id: name for name in contents}
        results: dict[str, T] = {}
        for node_id, answer in exchange(self.grid, messages, timeout, ask.stop, deadline=ask.deadline):
            sender = waiting.pop(node_id)
            outcome.bytes_up += serialized_size(answer)
            if answer.has_error():
                reason = reason_of(answer)
                self.stop_if_cheated(reason)
                self.drop(sender, f"{reason} (in '{phase}')")
                continue
            try:
                results[sender] = read(sender, answer.content)
            except UpdateRejected as error:
                self.drop(sender, str(error))
        for name in waiting.values():
            self.drop(name, f"did not answer '{phase}' in {timeout:g} s (federation.round_timeout)")
        return results

    def drop(self, name: str, reason: str) -> None:
        self.outcome.dropped.append((name, reason))
        self.observer.on_client(name, f"dropped: {reason}")

    @staticmethod
    def stop_if_cheated(reason: str) -> None:
        """A node that says that the exchange itself cannot be right is believed, and the round discarded."""
        name = AggregationAborted.__name__
        if reason.startswith(f"{name}: "):
            raise AggregationAborted(reason.removeprefix(f"{name}: "))
