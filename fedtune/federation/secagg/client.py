"""A node's side of a distributed round: four requests, of which one touches data.

    advertise   check the server's plan against the node's own configuration; make keys
    share       deal shares of this node's secrets to its peers
    mask        open the peers' shares; reserve in the ledger; draw units, sum their clipped gradients, add
                this node's part of the noise, all as integers; mask; answer
    unmask      give the shares that take the masks off the sum of those who are in it

The privacy of what leaves here rests on three things that the node sees to by itself, whatever the server
says: the noise share and the grid follow from the plan that it has checked; the release is charged before
data is read; and it helps to unmask a sum only if enough nodes are in it for their noise to suffice
(`Session.quorum`). An attempt of a round is answered once (PITFALLS 21).

Between requests the node's secrets lie in `Context.state`, which never leaves the node, and are gone with
the request that used them.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedtune.errors import FederationError
from fedtune.federation.client.node_context import (
    delay_answer,
    node_config,
    node_label,
    own_shard,
    public_reason,
)
from fedtune.federation.client.policy import check_plan
from fedtune.federation.client.release import Release, failure_reply, finished_reply, reserve_release
from fedtune.federation.flower import error_answer
from fedtune.federation.messages import RoundRequest, read_plan
from fedtune.federation.secagg import messages as wire
from fedtune.federation.secagg.messages import PhaseId
from fedtune.federation.secagg.protocol import Masker
from fedtune.privacy.mechanisms.discrete import DiscreteMechanism

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp

__all__ = ["MaskerStore", "clipped_gradient_sum", "register"]

_WHAT = "The server's request"


class MaskerStore:
    """This node's Masker between two requests, in `Context.state`."""

    NAME = "fedtune.secagg"

    def __init__(self, state: RecordDict) -> None:
        self._state = state
        record = state.get(self.NAME)
        self._values: dict[str, Any] = dict(record) if isinstance(record, ConfigRecord) else {}

    def begin(self, phase_id: PhaseId, node: str, masker: Masker) -> None:
        """Remembers a new attempt.

        Raises:
            FederationError: it was begun before, or is older than one that was.
        """
        values = self._values
        last = (values["attempt"], values["round"]) if values.get("run") == phase_id.run else (-1, -1)
        if (phase_id.attempt, phase_id.round) <= last:
            raise FederationError(
                f"Node {node!r} has begun attempt {last[0]}, round {last[1]} of run {phase_id.run} and is "
                f"asked to begin attempt {phase_id.attempt}, round {phase_id.round}. Keys are made once; "
                "resume the run, which starts a new attempt."
            )
        self._values = {"run": phase_id.run, "attempt": phase_id.attempt, "round": phase_id.round}
        self.save(masker)

    def masker(self, phase_id: PhaseId) -> Masker:
        """The Masker of this attempt.

        Raises:
            FederationError: another, or none, was begun.
        """
        values = self._values
        mine = tuple(values.get(key) for key in ("run", "attempt", "round"))
        if mine != (phase_id.run, phase_id.attempt, phase_id.round):
            raise FederationError(
                f"This node has no keys for attempt {phase_id.attempt}, round {phase_id.round} of run "
                f"{phase_id.run}: it did not take part in it from the beginning."
            )
        return Masker.from_json(json.loads(str(values["masker"])))

    def save(self, masker: Masker) -> None:
        """Writes the Masker back, in place of what it was before."""
        self._values["masker"] = json.dumps(masker.to_json())
        self._state[self.NAME] = ConfigRecord(dict(self._values))


def clipped_gradient_sum(release: Release, request: RoundRequest) -> tuple[np.ndarray, float]:
    """One step's work on this node: (what it puts into the secure sum, uint32 [P]; the seconds it took).

    Draws units (Poisson, in secret), sums their clipped gradients at the server's adapter, rounds, and adds
    this node's share of discrete noise.
    """
    import torch

    from fedtune.federation.resources import run_resources, training_usage
    from fedtune.training.example_gradients import hooks_for
    from fedtune.training.local import ShardView
    from fedtune.training.preflight import preflight

    plan = release.training
    # However many steps a node takes where it trains by itself: here it takes the plan's one.
    train = dataclasses.replace(release.config.train, local_steps=plan.local_steps)
    mechanism = DiscreteMechanism.for_plan(plan, request.adapter.size)
    entropy = plan.entropy(release.shard.node, request.round)
    with run_resources(release.config).training_model(plan, request.round) as (model, part):
        started, flops = time.perf_counter(), model.flops.total
        mine = np.ones(request.adapter.size, dtype=np.bool_) if part is None else part
        model.set_vector(request.adapter[mine])
        view = ShardView(model, release.shard, plan.unit, train)
        theta = torch.nn.Parameter(model.theta, requires_grad=True)
        with hooks_for(model, view.features):
            preflight(model, view.features, plan, theta, train)
            drawn = plan.sample(view.num_units, entropy)
            # Of a head alone the rest is zero, and noised all the same.
            total = np.zeros(request.adapter.size)
            total[mine] = view.clipped_sum(drawn, plan, entropy, request.round)
        seconds, flops = time.perf_counter() - started, model.flops.total - flops
    training_usage.add(seconds, flops)
    return mechanism.share(total, entropy), seconds


def _advertise(message: Message, context: Context) -> RecordDict:
    phase_id, values = wire.read_record(message.content, wire.ASKS["advertise"], "advertise", _WHAT)
    config = node_config(context)
    shard = own_shard(config, context)
    if shard is None:
        raise FederationError("This node holds no shard of this federation.")
    plan = read_plan(values["plan"], _WHAT)
    check_plan(plan, config)
    DiscreteMechanism.for_plan(plan, values["size"])  # refuses what does not fit before any key is made
    masker = Masker(wire.session_for(phase_id, plan, values["names"], values["size"]), shard.node)
    MaskerStore(context.state).begin(phase_id, shard.node, masker)
    keys = masker.advertise()
    MaskerStore(context.state).save(masker)
    return wire.phase_records(phase_id, sealing=keys.sealing, masking=keys.masking)


def _share(message: Message, context: Context) -> RecordDict:
    phase_id, values = wire.read_record(message.content, wire.ASKS["share"], "share", _WHAT)
    store = MaskerStore(context.state)
    masker = store.masker(phase_id)
    try:
        dealt = masker.share(wire.read_roster(values))
    finally:
        store.save(masker)  # also after an error: what was begun is not begun again
    return wire.share_answer(phase_id, dealt)


def _unmask(message: Message, context: Context) -> RecordDict:
    phase_id, values = wire.read_record(message.content, wire.ASKS["unmask"], "unmask", _WHAT)
    store = MaskerStore(context.state)
    masker = store.masker(phase_id)
    try:
        shares = masker.unmask(values["names"])
    finally:
        store.save(masker)
    return wire.phase_records(phase_id, names=list(shares), shares=list(shares.values()))


def _mask(message: Message, context: Context) -> RecordDict:
    plain, more = wire.split_mask_ask(message.content)
    phase_id, values = wire.read_record(more, wire.ASKS["mask"], "mask", _WHAT)
    request = RoundRequest.from_records(plain)
    store, release = MaskerStore(context.state), None
    try:
        masker = store.masker(phase_id)
        session = masker.session
        if session != wire.session_for(phase_id, request.plan, session.nodes, request.adapter.size) or (
            (request.run, request.round, request.attempt) != (phase_id.run, phase_id.round, phase_id.attempt)
        ):
            raise FederationError("The server changed the plan or the adapter's size within a round.")
        received = wire.read_received(values)
        try:
            masker.check_received(received)
            release = reserve_release(request, context)
            noised, seconds = clipped_gradient_sum(release, request)
            masked = masker.mask(noised, received)
        finally:
            store.save(masker)
        release.ledger.commit(release.reservation)
    except Exception as error:
        return failure_reply(request, context, release, error).to_records()
    reply = finished_reply(request, release, seconds)
    return wire.mask_answer(phase_id, reply, masked, public_data=release.config.data.public)


def _handler(work: Callable[[Message, Context], RecordDict]) -> Callable[[Message, Context], Message]:
    """Answers with what `work` gives, or with an error that may be published; the state it left is stored."""

    def answer(message: Message, context: Context) -> Message:
        arrived = time.monotonic()
        try:
            reply = Message(work(message, context), reply_to=message)
        except Exception as error:
            reply = error_answer(message, public_reason(error, node_label(context), context))
        if work is _mask:
            delay_answer(context, arrived)
        return reply

    return answer


def register(app: ClientApp) -> None:
    """Adds the four requests to a ClientApp."""
    for phase, work in (("advertise", _advertise), ("share", _share), ("unmask", _unmask)):
        app.query(f"secagg_{phase}")(_handler(work))
    app.train("secagg_mask")(_handler(_mask))
