"""Before round 1 the plan is proposed to every node, and each checks the *whole* run.

A run that is asked for round by round is refused in the middle by a node whose budget does not reach to its
end: what it released until then is spent, and nothing is gained (PITFALLS 40). So the server makes the plan
when the nodes have said who they are, and asks each whether it will go through with it: by its settings, by
its owner's file, and by its ledger over all that the run may release. Nothing is charged for the question.

A node that refuses, or does not answer, is left out with its reason, and the plan is made anew for those who
are left and proposed to them, until all of them agree. (Under trust=distributed the noise is shared out over
the nodes; under any, delta and the expected batch follow from who is there.) If too few are left, the run
ends, and nothing was charged. A node that comes later is asked before its first round
(`fedtune.federation.server.roster`).

A refusal tells the server that the node's budget does not reach; the numbers stay with the node. Whoever
submits run after run and counts refusals learns how much is left there, as from any refusal; a node logs
each.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

from fedtune.config.schema import Config
from fedtune.errors import FederationError, PrivacyError, UpdateRejected
from fedtune.federation.events import Dropped, NodeInfo, Observer
from fedtune.federation.messages import VERSION, only_records, publishable_record, read_config, read_plan
from fedtune.federation.server.rounds import exchange, make_messages, reason_of, time_to_live
from fedtune.privacy.plan import PrivacyPlan
from fedtune.privacy.planning import make_plan

__all__ = ["PROPOSE", "Consent", "Proposal", "agree", "check_enough", "propose"]

PROPOSE = "query.propose"
PROPOSAL_KEYS: Mapping[str, type] = {"version": int, "run": str, "attempt": int, "plan": str}
CONSENT_KEYS: Mapping[str, type] = {
    "version": int, "node": str, "run": str, "attempt": int, "refused": str, "refusal": str,
    "last_round": int,
}  # fmt: skip
_MAX_TEXT = 2000


@dataclass(frozen=True)
class Proposal:
    """What a server means to do with a run, from its first round to its last."""

    run: str
    attempt: int
    plan: PrivacyPlan

    def to_records(self) -> RecordDict:
        """Inverse of `from_records`."""
        values: dict[str, Any] = {
            "version": VERSION,
            "run": self.run,
            "attempt": self.attempt,
            "plan": json.dumps(self.plan.to_json(), sort_keys=True),
        }
        return RecordDict({"proposal": publishable_record("proposal", values)})

    @classmethod
    def from_records(cls, content: RecordDict) -> Proposal:
        """Raises FederationError (or what `PrivacyPlan.from_json` raises) if it is no usable proposal."""
        what = "The server's proposal"
        only_records(content, {"proposal"}, what)
        values = read_config(content, "proposal", PROPOSAL_KEYS, what)
        plan = read_plan(values["plan"], what)
        return cls(values["run"], values["attempt"], plan)


@dataclass(frozen=True)
class Consent:
    """A node's answer to a proposal: it agrees, or `refused` says why not (`refusal`: by which exception).

    `last_round`: the last round of this run that the node was asked for and charged, as its ledger has it; 0:
    none. A server whose books know less was wound back.
    """

    node: str
    run: str
    attempt: int
    refused: str | None = None
    refusal: str | None = None
    last_round: int = 0

    def to_records(self) -> RecordDict:
        """Inverse of `from_records`; sends nothing that is not in `CONSENT_KEYS`."""
        values: dict[str, Any] = {
            "version": VERSION,
            "node": self.node,
            "run": self.run,
            "attempt": self.attempt,
            "refused": (self.refused or "")[:_MAX_TEXT],
            "refusal": self.refusal or "",
            "last_round": self.last_round,
        }
        return RecordDict({"consent": publishable_record("consent", values)})

    @classmethod
    def from_answer(cls, answer: Message, node: str, proposal: Proposal) -> Consent:
        """A node's answer, whatever it is: what is no consent is a refusal."""
        what = f"The answer of node {node!r} to the proposed run"
        try:
            if answer.has_error():
                raise FederationError(reason_of(answer))
            only_records(answer.content, {"consent"}, what)
            values = read_config(answer.content, "consent", CONSENT_KEYS, what)
            for key, expected in (("node", node), ("run", proposal.run), ("attempt", proposal.attempt)):
                if values[key] != expected:
                    raise UpdateRejected(f"{what} is for {key} {values[key]!r}, and {expected!r} was asked.")
        except FederationError as error:
            return cls(node, proposal.run, proposal.attempt, str(error), type(error).__name__)
        refused, refusal = (values[key] or None for key in ("refused", "refusal"))
        return cls(node, proposal.run, proposal.attempt, refused, refusal, values["last_round"])


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
    found = {
        node.name: Consent(node.name, proposal.run, proposal.attempt, late, "TimeoutError") for node in nodes
    }
    ttl = time_to_live(timeout) if deadline else None
    messages = make_messages(proposal.to_records(), PROPOSE, nodes, 0, ttl=ttl)
    for node_id, answer in exchange(grid, messages, timeout, stop, deadline=deadline):
        name = waiting[node_id].name
        found[name] = Consent.from_answer(answer, name, proposal)
    return [found[node.name] for node in nodes]


def agree(
    grid: Grid,
    config: Config,
    nodes: Sequence[NodeInfo],
    run: str,
    attempt: int,
    *,
    stop: threading.Event | None = None,
    deadline: bool = False,
    observer: Observer,
) -> tuple[PrivacyPlan, list[NodeInfo], list[Dropped]]:
    """The plan that all who are left agree to: (plan, nodes, those who refused, with their reasons).

    Raises FederationError if fewer than `federation.min_updates` are left, or nobody; nothing was charged
    then.
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
            reasons = " ".join(f"{one.node}: {one.reason}" for one in refused[:8])
            raise FederationError(
                f"{len(left)} of {len(nodes)} nodes agreed to the run, and no plan can be made for them "
                f"alone: {error} Nothing was charged. {reasons}"
            ) from error
        if now == plan:
            return plan, left, refused  # nobody who is left has another plan to judge
        plan = now
        answers = propose(
            grid, Proposal(run, attempt, plan), left, config.federation.round_timeout, stop, deadline=deadline
        )
        for node, answer in zip(left, answers, strict=True):
            if answer.refused is not None:
                refused.append(Dropped(node.name, 0, answer.refused))
                observer.on_client(node.name, f"refused: {answer.refused}")
        gone = {one.node for one in refused}
        if all(node.name not in gone for node in left):
            return plan, left, refused
        left = [node for node in left if node.name not in gone]
        check_enough(left, refused, len(nodes), config)


def check_enough(
    left: Sequence[NodeInfo], refused: Sequence[Dropped], asked: int, config: Config, needed: int = 1
) -> None:
    """Raises FederationError, with each reason, if those who agreed are too few to begin a round."""
    least = max(1, needed, config.federation.min_updates)
    if len(left) >= least:
        return
    reasons = " ".join(f"{one.node}: {one.reason}" for one in refused[:8])
    more = f" (and {len(refused) - 8} others)" if len(refused) > 8 else ""
    raise FederationError(
        f"{len(left)} of {asked} nodes agreed to the run, and a round needs {least} "
        f"(federation.min_updates={config.federation.min_updates}). It was refused before a round "
        f"began, and nothing was charged for that. {reasons}{more} Ask for less (privacy.epsilon, "
        "federation.num_rounds), or have the owners allow more."
    )
