"""What a node agrees to, and what it charges before anything leaves it.

`reserve_release` is the one gate: whoever lets anything about a shard leave the node, by whatever
protocol, calls it first. It opens the node's shard and ledger, checks the server's plan against the
node's own configuration and the ledger against its second witness, and reserves the release, durably.

The second witness, `ReleaseCounter`: `Context.state` holds the last (attempt, round) answered and how many
releases that makes. The ledger may know more (a crash, a node that hung); if it knows less, it has lost or
been robbed of something and the node refuses. A message for an (attempt, round) that was answered before is
refused too: one charge, one release (PITFALLS 21). So is one that a worker of a simulation died of
(`ASKED_AGAIN`), where the ledger shows a charge for its round: what the counter noted died with the worker.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from flwr.app import ConfigRecord, Context, RecordDict

from fedtune.errors import BudgetExhausted, FederationError, LedgerError, ModelError, PrivacyError
from fedtune.federation.client.going_on import SILENT_SECONDS, going_on
from fedtune.federation.client.node_context import (
    node_config,
    node_ledger,
    node_name,
    own_shard,
    owner_delta,
    public_reason,
    site_settings,
)
from fedtune.federation.client.policy import check_plan
from fedtune.federation.flower import config_record
from fedtune.federation.messages import RoundReply, RoundRequest, coarse_seconds
from fedtune.federation.personal import place_of_part
from fedtune.federation.sizes import tell_size
from fedtune.privacy.ledger.ledger import AskedRelease
from fedtune.privacy.mechanisms.counts import size_plan

if TYPE_CHECKING:
    from fedtune.config.schema import Config
    from fedtune.data.corpus import Shard
    from fedtune.federation.client.policy import SiteSettings
    from fedtune.privacy.ledger.ledger import PrivacyLedger, Reservation
    from fedtune.privacy.plan import PrivacyPlan, ReleasePlan

__all__ = [
    "ASKED_AGAIN",
    "Asked",
    "Permitted",
    "Release",
    "ReleaseCounter",
    "ask_for_release",
    "charged_releases",
    "check_encoder",
    "check_run",
    "declare_size",
    "failure_fields",
    "failure_reply",
    "finished_reply",
    "permitted",
    "releases_of",
    "reserve_release",
]

ASKED_AGAIN = "again"  # in a run config: a worker that was asked the same died, nobody knows how far it came


class ReleaseCounter:
    """The second witness: this run's releases, counted in `Context.state`, which never leaves the node."""

    NAME = "fedtune.releases"

    def __init__(self, state: RecordDict, run: str, name: str = NAME) -> None:
        self._state, self._name = state, name
        record = state.get(name)
        values = dict(record) if isinstance(record, ConfigRecord) else {}
        same = values.get("run") == run
        self.run = run
        self.releases = int(values.get("releases", 0)) if same else 0  # type: ignore[arg-type]
        self.last = (int(values["attempt"]), int(values["round"])) if same else (-1, -1)  # type: ignore[arg-type]

    def check(self, request: RoundRequest, node: str, in_ledger: int) -> None:
        """Checks a request against what this counter knows.

        Raises:
            FederationError: the message was answered before.
            LedgerError: the ledger has lost releases.
        """
        if (request.attempt, request.round) <= self.last:
            raise FederationError(
                f"Node {node!r} has answered attempt {self.last[0]}, round {self.last[1]} of run {self.run} "
                f"and is asked for attempt {request.attempt}, round {request.round}. An answer is released "
                "once for one charge; resume the run, which starts a new attempt."
            )
        if in_ledger < self.releases:
            raise LedgerError(
                f"The ledger of node {node!r} shows {in_ledger} releases of run {self.run}, and the node "
                f"remembers {self.releases}: the ledger has lost some. Restore it from a backup; nothing was "
                "released.",
                public=True,
            )

    def note(self, request: RoundRequest, releases: int) -> None:
        """Remembers a release that is now reserved, with the parameters that it is accounted by."""
        self.releases, self.last = releases, (request.attempt, request.round)
        plan = request.plan
        self._state[self._name] = config_record(
            {
                "run": self.run,
                "attempt": request.attempt,
                "round": request.round,
                "releases": releases,
                "noise_multiplier": float(plan.noise_multiplier),
                "sample_rate": float(plan.sample_rate),
                "local_steps": int(plan.local_steps),
                "max_grad_norm": float(plan.max_grad_norm),
            }
        )


@dataclass(frozen=True)
class Release:
    """A release that the node's ledger has charged, and what it is made from.

    `plan` is what is accounted; `training` is what the steps on this node obey.
    """

    config: Config
    shard: Shard
    plan: PrivacyPlan
    training: PrivacyPlan
    ledger: PrivacyLedger
    reservation: Reservation
    place: Path | None  # of the node's personal part, if it has one
    count: int  # this run's releases for the same purpose in the ledger, this one included
    together: bool = False  # charged with those of other nodes


@dataclass(frozen=True)
class Permitted:
    """A plan that this node may follow, as its settings say, and what it would follow it with."""

    config: Config
    shard: Shard
    plan: PrivacyPlan  # as it is accounted for this shard
    ledger: PrivacyLedger
    place: Path | None  # of the node's personal part, if it has one


@dataclass(frozen=True)
class Asked:
    """A release that this node may make as far as it can tell without a charge."""

    request: RoundRequest
    own: Permitted
    counter: ReleaseCounter
    wanted: AskedRelease

    def reserved(self, reservation: Reservation, *, together: bool = False) -> Release:
        """The release, now that it is charged; the second witness takes note of it."""
        own = self.own
        self.counter.note(self.request, reservation.count)
        if own.config.engine.name == "deployment":
            going_on.heard(own.ledger.path, self.request.run, self.wanted.whole)
        _, training = _plans_of(self.request.plan, own.shard.declared_size)
        return Release(
            own.config, own.shard, own.plan, training, own.ledger, reservation, own.place, reservation.count,
            together,
        )  # fmt: skip


def permitted(proposed: PrivacyPlan, run: str, context: Context) -> Permitted:
    """Whether this node's settings, its owner's file and its data permit what a server proposes; the budget
    is not asked.

    Raises:
        PrivacyError: (of some kind) they do not.
        FederationError: the node has no part in the run, or no place for a part of its own.
    """
    from fedtune.federation.resources import config_of

    text = str(context.run_config.get("fedtune", ""))
    config = node_config(context)
    shard = own_shard(config, context)
    if shard is None:
        raise FederationError("This node holds no shard of this federation.")
    site = site_settings(context)
    if site is None:
        _check_simulated(proposed, text)
    else:
        check_plan(proposed, config)
    plan, _ = _plans_of(proposed, shard.declared_size)
    plan.mechanism.check_shard(plan, shard.node, shard.declared_size)
    ledger = node_ledger(context)
    if site is not None:
        asked = config_of(text)
        used = {release.fingerprint for release in ledger.releases(run=run, node=shard.node)}
        # A run that began under version 0.1 has the fingerprint that was not keyed.
        site.check(asked, proposed, used - {shard.fingerprint}, ledger.known_as(shard.identity))
    place = place_of_part(config, context, site, run, shard.node)
    return Permitted(config, shard, plan, ledger, place)


@functools.lru_cache(maxsize=64)
def _plans_of(proposed: PrivacyPlan, declared_size: int) -> tuple[PrivacyPlan, PrivacyPlan]:
    """By what a node of that size is accounted, and what its steps obey: once for all such nodes."""
    return proposed.for_shard(declared_size), proposed.training_plan(declared_size)


@functools.lru_cache(maxsize=8)
def _check_simulated(proposed: PrivacyPlan, text: str) -> None:
    """`check_plan` of a simulated node, whose configuration is the run's `text`: once for all that have it.

    It follows from the two alone. A refusal is not remembered.
    """
    from fedtune.federation.resources import config_of

    check_plan(proposed, config_of(text))


def releases_of(plan: PrivacyPlan, site: SiteSettings | None = None) -> list[ReleasePlan]:
    """All that a run by `plan` may release of a shard, one for each purpose.

    A real site (`site`) whose owner permits no answers about held-out data gives none: they are not among its
    releases, when it agrees to the run and in each round alike.
    """
    answers = plan.evaluation()
    if answers is not None and site is not None:
        try:
            site.check_evaluation(plan)
        except PrivacyError:
            answers = None
    return [plan, *(other for other in (answers, plan.sizing()) if other is not None)]


def check_run(plan: PrivacyPlan, run: str, context: Context) -> str:
    """Whether this node can go through with a whole run: by its settings, its owner's file and its ledger.

    Charges nothing. A real site also refuses a plan whose delta is above that of its owner's budget, since
    epsilon at a larger delta is not what its owner allowed.

    Returns:
        This node's name.

    Raises:
        PrivacyError: (of some kind) it cannot.
        FederationError: the node has no part in the run.
    """
    own = permitted(plan, run, context)
    _check_whole(own, run, releases_of(own.plan, site_settings(context)))
    return own.shard.node


def _check_whole(own: Permitted, run: str, plans: Sequence[ReleasePlan]) -> None:
    """Whether the budget allows a whole run, beside what is left of others that go on at this site."""
    beside = going_on.others(own.ledger.path, run)
    try:
        own.ledger.check_run(
            dataset=own.shard.dataset,
            fingerprint=own.shard.identity,
            node=own.shard.node,
            run=run,
            plans=plans,
            beside=beside,
            public=own.config.data.public,
        )
    except BudgetExhausted as error:
        if not beside:
            raise
        raise BudgetExhausted(
            f"{error} What is left of {len(beside)} other run(s) that go on here is counted as well: wait "
            f"for their end. One that was ended early counts until {SILENT_SECONDS / 60:g} minutes after its "
            "last release.",
            public=error.public,
        ) from error


def check_encoder(digest: str, node: str, context: Context) -> None:
    """Whether this node trains on the encoder whose digest the server has.

    Raises:
        ModelError: it holds another one, on which the server's adapter means nothing; or none.
        ResourceError: it cannot be loaded.
    """
    from fedtune.federation.resources import run_resources

    config = node_config(context)
    own = run_resources(config).digest()
    if own != digest:
        raise ModelError(
            f"Node {node!r} has another encoder or tokenizer as model.name={config.model.name} than the "
            f"server: the digest is {own[:12]} here and {digest[:12]} there. Copy the model's folder from "
            "the server, or set model.revision to one commit for everybody.",
            public=True,
        )


def ask_for_release(request: RoundRequest, context: Context, *, evaluation: bool = False) -> Asked:
    """Steps 2 and 3 of a round: shard, plan, second witness. Charges nothing. Raises as `reserve_release`."""
    own = permitted(request.plan, request.run, context)
    config, shard = own.config, own.shard
    charged: ReleasePlan | None = own.plan.evaluation() if evaluation else own.plan
    if charged is None:
        raise PrivacyError(
            f"Node {shard.node!r} is asked about data that it holds out, and federation.evaluation is "
            f"{config.federation.evaluation}: no such answer is in the plan."
        )
    site = site_settings(context)
    if evaluation and site is not None:
        site.check_evaluation(request.plan)
    counter = ReleaseCounter(
        context.state, request.run, "fedtune.answers" if evaluation else ReleaseCounter.NAME
    )
    earlier = own.ledger.rounds(run=request.run, node=shard.node, purpose=charged.purpose)
    counter.check(request, shard.node, len(earlier))
    if context.run_config.get(ASKED_AGAIN) and request.round in earlier:
        raise FederationError(
            f"The worker of node {shard.node!r} died in round {request.round}, for which the ledger shows a "
            "charge. The charge stays, and nothing is drawn for it again; the next round asks this node anew."
        )
    whole = tuple(releases_of(own.plan, site))
    if going_on.others(own.ledger.path, request.run) and not own.ledger.rounds(
        run=request.run, node=shard.node
    ):
        _check_whole(own, request.run, whole)  # one that was agreed to before another began
    wanted = AskedRelease(
        dataset=shard.dataset,
        fingerprint=shard.identity,
        node=shard.node,
        run=request.run,
        round=request.round,
        plan=charged,
        whole=whole,
        public=config.data.public,
    )
    return Asked(request, own, counter, wanted)


def reserve_release(request: RoundRequest, context: Context, *, evaluation: bool = False) -> Release:
    """Steps 2 to 4 of a round: shard, plan, ledger, second witness, and a durable charge.

    For every protocol: whoever lets anything about a shard leave the node calls this first, or has been
    charged together with other nodes (`fedtune.federation.client.together`). With `evaluation` it is for an
    answer about what is held out, charged by the plan's own event for that.

    Raises:
        PrivacyError: (of some kind) the node refuses; nothing is charged then.
    """
    asked = ask_for_release(request, context, evaluation=evaluation)
    return asked.reserved(asked.own.ledger.reserve(asked.wanted))


def declare_size(config: Config, context: Context) -> None:
    """Releases the node's size, noised and charged, where no owner declared one and this run has none yet.

    What the whole run will release is known before, for no part of it follows from a size released so.

    Raises:
        BudgetExhausted: the owner's budget does not allow all of that; nothing is charged then.
        PrivacyError, LedgerError: it cannot be charged.
        DataError, ModelError, ResourceError: the data cannot be prepared.
    """
    from fedtune.federation.resources import run_resources
    from fedtune.privacy.plan import make_plan

    position = context.node_config.get("partition-id")
    if size_plan(config) is None or type(position) is not int:
        return
    data = run_resources(config).prepared
    if not 0 <= position < len(data.shards):
        return
    shard = data.shards[position]
    limit = owner_delta(shard, config, context) or None
    plan = make_plan(config, [1] * len(data.shards), limit)
    tell_size(config, context, data, position, node_ledger(context), releases_of(plan))


def failure_fields(context: Context, release: Release | None, round: int, error: Exception) -> dict[str, Any]:
    """What an answer says of `error`: `refused` and `refusal` if it is the node's decision, else `error`; and
    `node`."""
    node = release.shard.node if release else node_name(context)
    reason = public_reason(error, node, context, round)
    if isinstance(error, PrivacyError):
        return {"node": node, "refused": reason, "refusal": type(error).__name__}
    return {"node": node, "error": reason}


def finished_reply(
    request: RoundRequest, release: Release, seconds: float, update: np.ndarray | None = None
) -> RoundReply:
    """What a node answers when its release is done; `update`, float32 [P], where it does not go masked."""
    return RoundReply(
        node=release.shard.node,
        run=request.run,
        round=request.round,
        attempt=request.attempt,
        releases=release.count,
        steps=release.training.local_steps,
        seconds=coarse_seconds(seconds),
        update=update,
    )


def failure_reply(
    request: RoundRequest, context: Context, release: Release | None, error: Exception
) -> RoundReply:
    """What a node answers instead of an update: a refusal if it is the node's decision, else a failure."""
    fields = failure_fields(context, release, request.round, error)
    return RoundReply(
        run=request.run,
        round=request.round,
        attempt=request.attempt,
        releases=release.count if release else charged_releases(fields["node"], request.run, context),
        **fields,
    )


def charged_releases(node: str, run: str, context: Context, purpose: str = "training") -> int:
    """Releases of a run that the node's ledger knows; 0 if it cannot be read."""
    try:
        return len(node_ledger(context).rounds(run=run, node=node, purpose=purpose))
    except Exception:
        return 0
