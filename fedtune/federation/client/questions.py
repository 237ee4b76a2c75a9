"""What a node answers before a run begins: who it is, and whether it will go through with all of it.

Nothing is trained for either. `hello` charges nothing but a size that no owner declared
(`fedtune.federation.sizes`), `propose` nothing at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from flwr.app import Context, RecordDict

from fedtune.errors import LedgerError
from fedtune.federation.client.node_context import node_config, node_ledger, own_shard, owner_delta
from fedtune.federation.client.release import check_encoder, check_run, declare_size, failure_fields
from fedtune.federation.messages import Consent, NodeHello, Proposal
from fedtune.federation.sizes import size_to_declare

__all__ = ["ANSWERS", "consent", "hello"]


def hello(content: RecordDict, context: Context) -> RecordDict:
    """Who this node is: name, declared size, software and the budget's delta, all public.

    Raises:
        FedtuneError: it cannot say; a size that it would have to tell cannot be charged.
    """
    from fedtune.config.build import build
    from fedtune.federation.resources import run_resources

    config = node_config(context)
    declare_size(config, context)
    shard = own_shard(config, context)
    return NodeHello(
        node=shard.node if shard else "",
        declared_size=size_to_declare(config, shard) if shard else 0,
        shards=len(run_resources(config).prepared.shards),
        software=f"fedtune {build()}",
        idle=shard is None,
        delta=owner_delta(shard, config, context) if shard else 0.0,
    ).to_records()


def consent(content: RecordDict, context: Context) -> RecordDict:
    """Whether the whole run that `content` proposes may be done here.

    Raises:
        FederationError: it is no proposal.
    """
    proposal = Proposal.from_records(content)
    refusal: str | None = None
    try:
        fields = {"node": check_run(proposal.plan, proposal.run, context)}
        check_encoder(proposal.encoder, fields["node"], context)
    except Exception as error:
        refusal = type(error).__name__
        fields = failure_fields(context, None, 0, error)
    node, refused = fields["node"], fields.get("refused") or fields.get("error")
    last = _last_round(proposal.run, node, context)
    return Consent(node, proposal.run, proposal.attempt, refused, refusal, last).to_records()


def _last_round(run: str, node: str, context: Context) -> int:
    """The last round of a run that this node has charged; 0 if it has none, or its ledger cannot be read."""
    try:
        return max(node_ledger(context).rounds(run=run, node=node), default=0)
    except LedgerError:
        return 0


# By the kind of the message.
ANSWERS: Mapping[str, Callable[[RecordDict, Context], RecordDict]] = {
    "query.hello": hello,
    "query.propose": consent,
}
