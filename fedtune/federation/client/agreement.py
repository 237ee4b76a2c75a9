"""A node's side of the agreement: may this whole run be done here? Charges nothing, trains nothing.

What is asked is what every round of the run will be asked again, in advance: is the plan the one that this
node's own configuration makes; does its owner's file permit it; does its ledger have room for all that the
run may release, answers about held-out data included where it gives them. A real site also refuses a plan
whose delta is above that of its owner's budget, since epsilon at a larger delta is not what its owner
allowed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flwr.app import Context, Error, Message

from fedtune.errors import LedgerError
from fedtune.federation.client import release as node_side
from fedtune.federation.server.agreement import Consent, Proposal

if TYPE_CHECKING:
    from flwr.clientapp import ClientApp

__all__ = ["register"]

_CLIENT_RAISED = 2  # flwr's ErrorCode.CLIENT_APP_RAISED_EXCEPTION


def register(app: ClientApp) -> None:
    """Adds the question to a ClientApp."""
    app.query("propose")(_proposed)


def _proposed(message: Message, context: Context) -> Message:
    try:
        proposal = Proposal.from_records(message.content)
    except Exception as error:
        return Message(Error(_CLIENT_RAISED, node_side.public_reason(error, "?", context)), reply_to=message)
    return Message(_answer(proposal, context).to_records(), reply_to=message)


def _answer(proposal: Proposal, context: Context) -> Consent:
    """The node's answer; never raises."""
    try:
        node = _check(proposal, context)
    except Exception as error:
        name, reason = node_side.failure_text(0, context, None, error)
        last = _last_round(proposal.run, name, context)
        return Consent(name, proposal.run, proposal.attempt, reason, type(error).__name__, last)
    return Consent(node, proposal.run, proposal.attempt, last_round=_last_round(proposal.run, node, context))


def _last_round(run: str, node: str, context: Context) -> int:
    """The last round of a run that this node has charged; 0 if it has none, or its ledger cannot be read."""
    try:
        made = node_side.ledger_of(node, context).releases(run=run, node=node)
    except LedgerError:
        return 0
    return max((one.round for one in made), default=0)


def _check(proposal: Proposal, context: Context) -> str:
    """This node's name. Raises PrivacyError (of some kind) if the run may not be done here."""
    site = node_side.site_settings(context)
    own = node_side.permitted(proposal.plan, proposal.run, context)
    own.ledger.check_run(
        dataset=own.shard.dataset,
        fingerprint=own.shard.identity,
        node=own.shard.node,
        run=proposal.run,
        plans=node_side.releases_of(own.plan, site),
        public=own.config.data.public,
    )
    return own.shard.node
