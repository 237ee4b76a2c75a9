"""Before round 1 the plan is proposed to every node, and each checks the *whole* run.

A run that is asked for round by round is refused in the middle by a node whose budget does not reach to its
end: what it released until then is spent, and nothing is gained (PITFALLS 40). So the server makes the plan
when the nodes have said who they are, and asks each whether it will go through with it: by its settings, by
its owner's file, and by its ledger over all that the run may release. Nothing is charged for the question.

A node that refuses, or does not answer, is left out with its reason, and the plan is made anew for those who
are left and proposed to them, until all of them agree. (Under trust=distributed the noise is shared out over
the nodes; under any, delta and the expected batch follow from who is there.) If too few are left, the run
ends, and nothing was charged. A node that comes later is asked before its first round
(`fedtune.federation.server.cohort`).

A refusal tells the server that the node's budget does not reach; the numbers stay with the node. Whoever
submits run after run and counts refusals learns how much is left there, as from any refusal; a node logs
each.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from fedtune.config.schema import Config
from fedtune.errors import ConfigError, FederationError, PrivacyError
from fedtune.federation.events import Dropped, NodeInfo, Observer
from fedtune.federation.messages import Consent, Proposal
from fedtune.federation.server.rounds import exchange, make_messages, reason_of, time_to_live
from fedtune.privacy.plan import PrivacyPlan, make_plan

__all__ = ["PROPOSE", "agree", "check_enough", "check_possible", "propose", "read_consent"]

PROPOSE = "query.propose"


def read_consent(answer: Message, node: str, proposal: Proposal) -> Consent:
    """A node's answer, whatever it is: what is no consent is a refusal."""
    try:
        if answer.has_error():
            raise FederationError(reason_of(answer))
        return Consent.from_records(answer.content, node=node, run=proposal.run, attempt=proposal.attempt)
    except FederationError as error:
        return Consent(node, proposal.run, proposal.attempt, str(error), type(error).__name__)


def propose(
    grid: Grid,
    proposal: Proposal,
    nodes: Sequence[NodeInfo],
    timeout: float,
    stop: threading.Event | None = None,
    *,
    deadline: bool = False,
) -> list[Consent]:
    """Asks all of `nodes`: their answers in the order of `nodes`; one that does not answer refuses."""
    waiting = {node.node_id: node for node in nodes}
    late = f"did not answer in {timeout:g} s (federation.round_timeout)"
    consents = {
        node.name: Consent(node.name, proposal.run, proposal.attempt, late, "TimeoutError") for node in nodes
    }
    ttl = time_to_live(timeout) if deadline else None
    messages = make_messages(proposal.to_records(), PROPOSE, nodes, 0, ttl=ttl)
    for node_id, answer in exchange(grid, messages, timeout, stop, deadline=deadline):
        name = waiting[node_id].name
        consents[name] = read_consent(answer, name, proposal)
    return [consents[node.name] for node in nodes]


def agree(
    grid: Grid,
    config: Config,
    nodes: Sequence[NodeInfo],
    run: str,
    attempt: int,
    encoder: str,
    *,
    stop: threading.Event | None = None,
    deadline: bool = False,
    observer: Observer,
) -> tuple[PrivacyPlan, list[NodeInfo], list[Dropped]]:
    """The plan that all who are left agree to: (plan, nodes, those who refused, with their reasons).

    Each also compares `encoder`, the digest of the server's, with its own.

    Raises:
        FederationError: fewer than `federation.min_updates` are left, or nobody; nothing was charged then.
    """
    left, refused = list(nodes), list[Dropped]()
    plan: PrivacyPlan | None = None
    while True:
        deltas = [node.delta for node in left if node.delta is not None]
        try:
            now = make_plan(config, [node.declared_size for node in left], min(deltas, default=None))
        except PrivacyError as error:
            if not refused:
                raise
            reasons = " ".join(f"{lost.node}: {lost.reason}" for lost in refused[:8])
            raise FederationError(
                f"{len(left)} of {len(nodes)} nodes agreed to the run, and no plan can be made for them "
                f"alone: {error} Nothing was charged. {reasons}"
            ) from error
        if now == plan:
            return plan, left, refused  # nobody who is left has another plan to judge
        plan = now
        answers = propose(
            grid,
            Proposal(run, attempt, plan, encoder),
            left,
            config.federation.round_timeout,
            stop,
            deadline=deadline,
        )
        for node, answer in zip(left, answers, strict=True):
            if answer.refused is not None:
                refused.append(Dropped(node.name, 0, answer.refused))
                observer.on_client(node.name, f"refused: {answer.refused}")
        gone = {lost.node for lost in refused}
        if all(node.name not in gone for node in left):
            return plan, left, refused
        left = [node for node in left if node.name not in gone]
        check_enough(left, refused, len(nodes), config)


def check_possible(config: Config, nodes: int) -> None:
    """Checks that a round of so many nodes can have the updates that it needs.

    Raises:
        ConfigError: it never can.
    """
    federation = config.federation
    asked = min(nodes, federation.cohort_size or nodes)
    if federation.min_updates > asked:
        raise ConfigError(
            f"federation.min_updates={federation.min_updates} can never be met: there are {nodes} nodes, "
            f"and a round asks {asked} of them. Nothing was charged. Give federation.min_updates={asked} or "
            "less.",
            setting="federation.min_updates",
        )


def check_enough(
    left: Sequence[NodeInfo], refused: Sequence[Dropped], asked: int, config: Config, needed: int = 1
) -> None:
    """Checks that those who agreed are enough to begin a round.

    Raises:
        FederationError: they are not; it gives each reason.
    """
    least = max(1, needed, config.federation.min_updates)
    if len(left) >= least:
        return
    reasons = " ".join(f"{lost.node}: {lost.reason}" for lost in refused[:8])
    more = f" (and {len(refused) - 8} others)" if len(refused) > 8 else ""
    raise FederationError(
        f"{len(left)} of {asked} nodes agreed to the run, and a round needs {least} "
        f"(federation.min_updates={config.federation.min_updates}). It was refused before a round "
        f"began, and nothing was charged for that. {reasons}{more} Ask for less (privacy.epsilon, "
        "federation.num_rounds), or have the owners allow more."
    )
