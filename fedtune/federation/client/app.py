"""What a node does when it is asked: Flower's ClientApp, the same in every engine.

It reads its message and its Context and nothing else. The server proposes; the node disposes:

1. read and check the request;
2. open its own shard (Context: `partition-id`, `num-partitions`) and its own ledger;
3. check the plan against its own configuration, and the ledger against its second witness;
4. `reserve` the release, durably, BEFORE training touches the data; or refuse, with the numbers;
5. train, `commit`, and send the update with public numbers.

Before the first round the whole run is proposed, and checked against settings and budget, without any
charge (`fedtune.federation.client.agreement`). Steps 2 to 4 are
`fedtune.federation.client.release.reserve_release`. All of this happens for every message, from the
beginning: there is no state of round 1 that a restart, or a node that joins late, could go on without
(PITFALLS 3). Distributed rounds and questions about held-out data have messages of their own, in
`fedtune.federation.secagg.client` and `fedtune.federation.client.evaluation`.
"""

from __future__ import annotations

import time
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.federation.client.agreement import register as register_agreement
from fedtune.federation.client.evaluation import register as register_evaluation
from fedtune.federation.client.release import (
    Release,
    declare_size,
    delay_answer,
    failure_reply,
    node_config,
    node_label,
    own_shard,
    owner_delta,
    public_reason,
    reserve_release,
)
from fedtune.federation.messages import NodeHello, RoundReply, RoundRequest, coarse_seconds
from fedtune.federation.secagg.client import register as register_distributed
from fedtune.federation.sizes import size_to_declare

__all__ = ["app"]

_CLIENT_RAISED = 2  # flwr's ErrorCode.CLIENT_APP_RAISED_EXCEPTION

app = ClientApp()
register_agreement(app)
register_distributed(app)
register_evaluation(app)


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Answers who this node is: name, declared size, software and the budget's delta, all public."""
    from fedtune import __version__
    from fedtune.federation.resources import run_resources

    try:
        config = node_config(context)
        declare_size(config, context)
        shard = own_shard(config, context)
        answer = NodeHello(
            node=shard.node if shard else "",
            declared_size=size_to_declare(config, shard) if shard else 0,
            shards=len(run_resources(config).prepared.shards),
            software=f"fedtune {__version__}",
            idle=shard is None,
            delta=owner_delta(shard, config, context) if shard else 0.0,
        )
        return Message(answer.to_records(), reply_to=message)
    except Exception as error:
        reason = public_reason(error, node_label(context), context)
        return Message(Error(_CLIENT_RAISED, reason), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """One round on this node; see the module's docstring for the steps."""
    arrived = time.monotonic()
    try:
        request = RoundRequest.from_records(message.content)
    except Exception as error:
        return Message(Error(_CLIENT_RAISED, public_reason(error, "?", context)), reply_to=message)
    answer = _answer(request, context)
    delay_answer(context, arrived)
    return Message(answer, reply_to=message)


def _answer(request: RoundRequest, context: Context) -> RecordDict:
    """The reply to a request, as it leaves; never raises."""
    release: Release | None = None
    try:
        release = reserve_release(request, context)
        update, seconds = _train(release, request)
        release.ledger.commit(release.reservation)
    except Exception as error:
        # Where there is a reservation, it stays: reserved counts as released, whatever became of it.
        return failure_reply(request, context, release, error).to_records()
    reply = RoundReply(
        node=release.shard.node,
        run=request.run,
        round=request.round,
        attempt=request.attempt,
        releases=release.count,
        steps=release.training.local_steps,
        cost={"seconds": coarse_seconds(seconds)},
        update=update,
    )
    return reply.to_records(public_data=release.config.data.public)


def _train(release: Release, request: RoundRequest) -> tuple[Any, float]:
    """The update, float32 [P], and the seconds that it took once the model was free."""
    from fedtune.federation.resources import run_resources, training_usage
    from fedtune.training.local import train_locally

    with run_resources(release.config).using_model() as model:
        started = time.perf_counter()
        result = train_locally(
            model,
            release.shard,
            release.training,
            request.adapter,
            release.config.train,
            round=request.round,
        )
        seconds = time.perf_counter() - started
    training_usage.add(seconds, result.flops)
    return result.update, seconds
