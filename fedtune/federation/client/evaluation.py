"""A node's side of private evaluation: one question, answered with two noised counts or a refusal.

1. shard, plan, ledger, second witness and a durable charge, as for training (`reserve_release`);
2. only then is the held-out part of the shard predicted, with the adapter that the server sent;
3. what is right and wrong is counted and noised by the plan's own object (`EvaluationPlan.answer`);
4. `commit`, and answer.

An answer to one (attempt, round) is given once. One that was charged and never arrived stays charged; asked
again, in a new attempt, it is charged again, with fresh noise, as long as the plan's number of answers lasts.
A node's owner may permit fewer answers, or none (`permit.max_evaluations` in its node.yaml), and still
take part in the training.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from flwr.app import Context, Error, Message

from fedtune.errors import PrivacyError
from fedtune.federation.client import release as node_side
from fedtune.federation.evaluation_messages import EvaluationReply
from fedtune.federation.messages import RoundRequest

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp

    from fedtune.data.corpus import Shard
    from fedtune.federation.client.release import Release

__all__ = ["register"]

_CLIENT_RAISED = 2  # flwr's ErrorCode.CLIENT_APP_RAISED_EXCEPTION


def register(app: ClientApp) -> None:
    """Adds the question to a ClientApp."""
    app.query("evaluate")(_evaluate)


def _evaluate(message: Message, context: Context) -> Message:
    arrived = time.monotonic()
    try:
        request = RoundRequest.from_records(message.content)
    except Exception as error:
        return Message(Error(_CLIENT_RAISED, node_side.public_reason(error, "?", context)), reply_to=message)
    reply = _answer(request, context)
    node_side.delay_answer(context, arrived)
    return Message(reply.to_records(), reply_to=message)


def _answer(request: RoundRequest, context: Context) -> EvaluationReply:
    """The reply to a question; never raises."""
    release: Release | None = None
    reply = partial(EvaluationReply, run=request.run, round=request.round, attempt=request.attempt)
    try:
        release = node_side.reserve_release(request, context, evaluation=True)
        counts = _counts(release, request)
        release.ledger.commit(release.reservation)
    except Exception as error:
        # Where there is a reservation, it stays: reserved counts as released, whatever became of it.
        node, reason = node_side.failure_text(request.round, context, release, error)
        decided = isinstance(error, PrivacyError)
        return reply(
            node=node,
            answers=release.count if release else _charged(node, request.run, context),
            refused=reason if decided else None,
            refusal=type(error).__name__ if decided else None,
            error=None if decided else reason,
        )
    return reply(node=release.shard.node, answers=release.count, counts=counts)


def _counts(release: Release, request: RoundRequest) -> tuple[int, int]:
    """What leaves the node."""
    from fedtune.federation.resources import run_resources

    plan = release.plan.evaluation()
    assert plan is not None
    held = _held_out(release)
    with run_resources(release.config).using_model() as model:
        right = np.zeros(0, dtype=np.bool_)
        if held.data.num_records:
            from fedtune.training.evaluation import predict_probabilities

            model.set_vector(request.adapter)
            predicted = predict_probabilities(model, held.data, release.config.train).argmax(1)
            right = predicted == held.data.labels
    entropy = plan.entropy(release.shard.node, request.round, request.attempt)
    return plan.answer(right, held.data.unit_index, entropy)


def _held_out(release: Release) -> Shard:
    from fedtune.federation.resources import run_resources

    parts = run_resources(release.config).prepared.held_out
    return next(part for part in parts if part.node == release.shard.node)


def _charged(node: str, run: str, context: Context) -> int:
    """Answers of a run that the node's ledger knows; 0 if it cannot be read."""
    try:
        return len(node_side.ledger_of(node, context).releases(run=run, node=node, purpose="evaluation"))
    except Exception:
        return 0
