"""What a node does when it is asked: Flower's ClientApp, the same in every engine.

It reads its message and its Context and nothing else. The server proposes; the node disposes. For `train`:

1. read and check the request;
2. open its own shard (Context: `partition-id`, `num-partitions`) and its own ledger;
3. check the plan against its own configuration, and the ledger against its second witness;
4. reserve the release, durably, BEFORE training touches the data; or refuse, with the numbers;
5. train, commit, and send the update with public numbers. Where the site has a part of its own of the model
   (`fedtune.federation.personal`), the gradient is taken with it, and it moves, before the commit.

Steps 2 to 4 are `fedtune.federation.client.release.reserve_release`; nodes of a simulation that one process
runs go through them together, and those that train small heads through step 5
(`fedtune.federation.client.together`). All of this happens for every message,
from the beginning: there is no state of round 1 that a restart, or a node that joins late, could go on
without (PITFALLS 3). `propose` asks in advance, and without any charge, whether all rounds of the run would
be permitted. `evaluate` goes the same way as `train`: only after the charge is the held-out part of the shard
predicted, with the adapter that the server sent, and what is right and wrong is counted and noised by the
plan's own object (`EvaluationPlan.answer`). Distributed rounds have messages of their own, in
`fedtune.federation.secagg.client`.

An answer to one (attempt, round) is given once. One that was charged and never arrived stays charged; asked
again, in a new attempt, it is charged again, with fresh noise.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.errors import FederationError, UpdateRejected
from fedtune.federation.client import together
from fedtune.federation.client.node_context import (
    delay_answer,
    node_name,
    public_reason,
)
from fedtune.federation.client.questions import ANSWERS
from fedtune.federation.client.release import (
    Release,
    charged_releases,
    failure_fields,
    failure_reply,
    finished_reply,
    reserve_release,
)
from fedtune.federation.client.together import Charged
from fedtune.federation.flower import error_answer
from fedtune.federation.messages import (
    EvaluationReply,
    RoundRequest,
)
from fedtune.federation.personal import PersonalPart
from fedtune.federation.secagg.client import register as register_distributed
from fedtune.federation.server.optimizers import damping

__all__ = ["app"]

_log = logging.getLogger("fedtune.node")

app = ClientApp()
register_distributed(app)


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Answers who this node is: name, declared size, software and the budget's delta, all public."""
    return _say(message, context)


@app.query("propose")
def propose(message: Message, context: Context) -> Message:
    """Answers whether this whole run may be done here. Charges nothing, trains nothing."""
    return _say(message, context)


def _say(message: Message, context: Context) -> Message:
    """The answer to a question before the run, which may have been found together with those of others."""
    try:
        answer = together.answered(message) or ANSWERS[message.metadata.message_type](
            message.content, context
        )
    except Exception as error:
        node = node_name(context)
        return error_answer(message, public_reason(error, node, context), node)
    return Message(answer, reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round on this node; see the module's docstring for the steps."""
    return _answer(message, context, _training_reply)


@app.query("evaluate")
def evaluate(message: Message, context: Context) -> Message:
    """Answers with two noised counts: how often an adapter is right on held-out data, and how often wrong."""
    return _answer(message, context, _evaluation_reply)


def _answer(
    message: Message, context: Context, reply: Callable[[RoundRequest, Context, Charged | None], RecordDict]
) -> Message:
    """`reply` to a request, which must not raise, after the delay that the node's owner asks for."""
    arrived = time.monotonic()
    if (ahead := together.charged(message)) is not None:
        content = reply(ahead.request, context, ahead)
    else:
        try:
            request = RoundRequest.from_records(message.content)
        except Exception as error:
            return error_answer(message, public_reason(error, "?", context))
        content = reply(request, context, None)
    delay_answer(context, arrived)
    return Message(content, reply_to=message)


def _training_reply(request: RoundRequest, context: Context, ahead: Charged | None) -> RecordDict:
    """`ahead`: what was done for the node already, together with others."""
    release = None if ahead is None else ahead.release
    try:
        release = release or reserve_release(request, context)
        update, seconds = _trained(ahead) or _train(release, request)
        together.end(release)
    except Exception as error:
        # Where there is a reservation, it stays: reserved counts as released, whatever became of it.
        return failure_reply(request, context, release, error).to_records()
    reply = finished_reply(request, release, seconds, update)
    return reply.to_records(public_data=release.config.data.public)


def _trained(ahead: Charged | None) -> tuple[np.ndarray, float] | None:
    """As `_train`, of a node that trained together with others; None: it did not."""
    from fedtune.federation.resources import training_usage

    if ahead is None or ahead.trained is None:
        return None
    if isinstance(ahead.trained, UpdateRejected):
        raise ahead.trained
    training_usage.add(ahead.trained.seconds, ahead.trained.flops)
    return ahead.trained.update, ahead.trained.seconds


def _train(release: Release, request: RoundRequest) -> tuple[np.ndarray, float]:
    """The update, float32 [P], and the seconds that it took once the model was free."""
    from fedtune.federation.resources import run_resources, training_usage
    from fedtune.training.local import train_locally

    resources = run_resources(release.config)
    with resources.training_model(release.training, request.round) as (model, part):
        started = time.perf_counter()
        own = _own_part(release, request)
        result = train_locally(
            model,
            release.shard,
            release.training,
            request.adapter if own is None else own.training(request.adapter, request.round),
            release.config.train,
            round=request.round,
            gradients=release.config.federation.strategy == "fedsgd",
            part=part,
        )
        seconds = time.perf_counter() - started
    if own is not None:
        sizes, classes = {release.shard.node: release.shard.declared_size}, resources.classes()
        share = damping(release.config.train, release.plan, sizes, request.adapter.size, classes)
        own.move(result.update, request.round, release.count, share)
        _keep(release, own, own.so_far())
    training_usage.add(seconds, result.flops)
    return result.update, seconds


def _own_part(release: Release, request: RoundRequest) -> PersonalPart | None:
    """The node's own part of the model; None where the run has none."""
    from fedtune.federation.resources import run_resources

    if release.place is None:
        return None
    head = run_resources(release.config).head()
    return PersonalPart(release.place, request.run, release.config, head)


def _keep(release: Release, own: PersonalPart, adapter: np.ndarray | None) -> None:
    """Writes the model that a real site uses, `adapter` [P], beside its ledger."""
    from fedtune.federation.resources import run_resources

    if adapter is None or release.config.engine.name != "deployment":
        return
    try:
        run_resources(release.config).save(adapter, own.folder)
    except OSError:  # the answer is charged, and must not be lost to a full disk
        _log.warning("The site's own model could not be kept in %s.", own.folder, exc_info=True)


def _evaluation_reply(request: RoundRequest, context: Context, ahead: Charged | None) -> RecordDict:
    """`ahead` as in `_training_reply`."""
    asked: dict[str, Any] = {"run": request.run, "round": request.round, "attempt": request.attempt}
    release = None if ahead is None else ahead.release
    try:
        release = release or reserve_release(request, context, evaluation=True)
        counts = _noised_counts(release, request)
        together.end(release)
    except Exception as error:
        # Where there is a reservation, it stays: reserved counts as released, whatever became of it.
        fields = failure_fields(context, release, request.round, error)
        if release is None:
            answers = charged_releases(fields["node"], request.run, context, "evaluation")
        else:
            answers = release.count
        return EvaluationReply(**asked, **fields, answers=answers).to_records()
    reply = EvaluationReply(**asked, node=release.shard.node, answers=release.count, counts=counts)
    return reply.to_records()


def _noised_counts(release: Release, request: RoundRequest) -> tuple[int, int]:
    """What leaves the node of its held-out data: (right, wrong), in steps of the plan.

    They are about the model that the site uses: the one that the server sent, with the site's own part, if it
    has one.
    """
    from fedtune.federation.resources import run_resources

    plan = release.plan.evaluation()
    assert plan is not None
    resources = run_resources(release.config)
    (held_out,) = (part for part in resources.prepared.held_out if part.node == release.shard.node)
    if held_out.whole is not release.shard.whole:  # it was read again: the file may have been replaced
        known, now = map(release.ledger.known_as, (release.shard.identity, held_out.identity))
        if known != now:
            raise FederationError(
                f"The data of node {release.shard.node!r} was replaced while it was asked: what was charged "
                "is not what would be evaluated on."
            )
    own, adapter = _own_part(release, request), request.adapter
    if own is not None:
        adapter = own.result(adapter)
        _keep(release, own, adapter)
    with resources.model_at(adapter) as model:
        right = np.zeros(0, dtype=np.bool_)
        if held_out.data.num_records:
            from fedtune.training.evaluation import answers_alone

            right = answers_alone(model, held_out.data, release.config.train) == held_out.data.labels
    entropy = plan.entropy(release.shard.node, request.round, request.attempt)
    return plan.answer(right, held_out.data.unit_index, entropy)
