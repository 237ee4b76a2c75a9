"""A node's own decisions: what it is, what it agrees to, and what it charges before anything leaves it.

`reserve_release` is the one gate: whoever lets anything about a shard leave the node, by whatever
protocol, calls it first. It opens the node's shard and ledger, checks the server's plan against the
node's own configuration and the ledger against its second witness, and reserves the release, durably.

The second witness: `Context.state` remembers the last (attempt, round) answered and how many releases
that makes. The ledger may know more (a crash, a node that hung); if it knows less, it has lost or been
robbed of something and the node refuses. A message for an (attempt, round) that was answered before is
refused too: one charge, one release (PITFALLS 21).

What is told of a failure is the text of an error that is made of public values, and of any other only its
kind (`fedtune.privacy.publication.told`). The node's own log has the rest. What a real site has spent and
may spend is its own: a server hears that the budget is exhausted, and the numbers only if the site publishes
them (`publish_budget` in its file).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import ConfigRecord, Context, RecordDict

from fedtune.config.choices import resolved
from fedtune.errors import BudgetExhausted, FederationError, FedtuneError, LedgerError, PrivacyError
from fedtune.federation import local_record
from fedtune.federation.messages import RoundReply, RoundRequest
from fedtune.federation.sizes import sized, tell_size
from fedtune.privacy.publication import told
from fedtune.privacy.sizes import size_plan

if TYPE_CHECKING:
    from fedtune.config.schema import Config
    from fedtune.data.corpus import Shard
    from fedtune.federation.client.policy import SiteSettings
    from fedtune.privacy.ledger.ledger import PrivacyLedger, Reservation
    from fedtune.privacy.plan import PrivacyPlan, ReleasePlan

__all__ = [
    "Permitted",
    "Release",
    "ReleaseCounter",
    "check_plan",
    "declare_size",
    "delay_answer",
    "failure_reply",
    "failure_text",
    "ledger_of",
    "node_config",
    "node_label",
    "own_shard",
    "owner_delta",
    "permitted",
    "public_reason",
    "releases_of",
    "reserve_release",
    "site_settings",
]

_log = logging.getLogger("fedtune.node")
_MOST_NODES = 1_000_000  # a plan is made from as many sizes: a server that names more would fill the memory


def site_settings(context: Context) -> SiteSettings | None:
    """A real site's own file, as its administrator started the node with; None in a simulation."""
    from fedtune.federation.client.policy import SiteSettings

    text = context.node_config.get("site")
    return SiteSettings.from_json(str(text)) if text is not None else None


def node_config(context: Context) -> Config:
    """The configuration that the run was started with; a real site's own data in it.

    Raises: ConfigError; PrivacyError if the site does not permit the run's data, model or adapter.
    """
    from fedtune.federation.resources import config_of

    asked = config_of(str(context.run_config.get("fedtune", "")))
    site = site_settings(context)
    if site is None:
        return asked
    site.admit(asked)
    return site.own(asked)


def own_shard(config: Config, context: Context) -> Shard | None:
    """This node's shard, with the size that it tells; None if the federation has fewer shards than nodes and
    this one is spare.

    Raises: DataError, ModelError, ResourceError; FederationError if Flower gave the node no place.
    """
    from fedtune.federation.resources import run_resources

    if config.engine.name == "deployment":
        return run_resources(config).prepared.shards[0]
    position = context.node_config.get("partition-id")
    if type(position) is not int or position < 0:
        raise FederationError(
            f"Flower gave this node the partition-id {position!r}. Start it with --node-config "
            "'partition-id=N num-partitions=M', N from 0 to M-1."
        )
    shards = run_resources(config).prepared.shards
    return sized(config, context, shards[position]) if position < len(shards) else None


def declare_size(config: Config, context: Context) -> None:
    """Has the node tell its size, charged, where it must be told with noise and was not yet in this run.

    What the whole run will release is known before, for no part of it follows from a size that is told so.
    Raises: BudgetExhausted if the owner's budget does not allow all of that, and then nothing is charged;
    PrivacyError, LedgerError, and as `own_shard` does.
    """
    from fedtune.federation.resources import run_resources
    from fedtune.privacy.planning import make_plan

    position = context.node_config.get("partition-id")
    if size_plan(config) is None or type(position) is not int:
        return
    data = run_resources(config).prepared
    if not 0 <= position < len(data.shards):
        return
    shard = data.shards[position]
    limit = owner_delta(shard, config, context) or None
    plan = make_plan(config, [1] * len(data.shards), limit)
    tell_size(config, context, data, position, ledger_of(shard.node, context), releases_of(plan))


def ledger_of(node: str, context: Context | None = None) -> PrivacyLedger:
    """The ledger that `node` charges, a file that outlives process and run.

    A real node's is its own; all nodes of simulations share one. Raises: LedgerError, ResourceError.
    """
    from fedtune.config.paths import state_dir
    from fedtune.privacy.ledger.ledger import PrivacyLedger
    from fedtune.privacy.ledger.simulation import simulation_ledger

    site = None if context is None else site_settings(context)
    if site is not None:
        return PrivacyLedger.open(Path(site.ledger), require_budget=True)
    return simulation_ledger(state_dir() / "ledgers")


def owner_delta(shard: Shard, config: Config, context: Context) -> float:
    """Delta of the budget that the owner of `shard` has set, which is public; 0.0 where none bounds it."""
    site = site_settings(context)
    if config.data.public:
        return 0.0
    if site is not None:
        return site.budget_delta
    budget = ledger_of(shard.node, context).budget(dataset=shard.dataset)
    return 0.0 if budget is None else budget.delta


def check_plan(plan: PrivacyPlan, config: Config) -> None:
    """The node's own check of what the server proposes. Raises PrivacyError, with both values.

    The plan must be the one that the node's own configuration makes, in every field: another unit, trust
    model, rate, clipping norm or number of steps is refused. The noise may be any, as long as it meets
    the configured epsilon over all the rounds that the plan is for.
    """
    from fedtune.privacy.evaluation import evaluation_epsilon
    from fedtune.privacy.planning import make_plan

    config = resolved(config)
    privacy, federation, nodes = config.privacy, config.federation, plan.nodes
    if nodes > _MOST_NODES:
        raise PrivacyError(
            f"The server proposes a plan for {nodes:,} nodes, and this node makes none for more than "
            f"{_MOST_NODES:,}."
        )
    if federation.evaluation == "private" and plan.is_private():
        # What the configuration says, before the target that it may be a part of is taken out below.
        federation = dataclasses.replace(federation, evaluation_epsilon=evaluation_epsilon(config))
    # Sizes that give the plan's own union; what they are one by one the node need not know.
    others = [1] * (nodes - 1) if plan.trust == "distributed" else [plan.declared_size] * (nodes - 1)
    sizes = [
        max(1, plan.declared_size - len(others)) if plan.trust == "distributed" else plan.declared_size,
        *others,
    ]
    if privacy.trust != "none" and plan.is_private():
        given = privacy.noise_multiplier
        noise = plan.noise_multiplier if given is None else given
        privacy = dataclasses.replace(privacy, epsilon=None, noise_multiplier=noise)
    # A default delta may be any smaller one: the smallest of the sites' budgets'.
    limit = plan.delta if plan.is_private() else None
    mine = make_plan(dataclasses.replace(config, privacy=privacy, federation=federation), sizes, limit)
    # An adaptive norm moves from round to round, at a price that the plan's event includes.
    free = {"target_epsilon", "evaluation_noise", *(["max_grad_norm"] if mine.adaptive_clipping else [])}
    if plan.trust == "central":
        free |= {"declared_size"}
    for item in dataclasses.fields(plan):
        proposed, permitted = getattr(plan, item.name), getattr(mine, item.name)
        if item.name not in free and proposed != permitted:
            raise PrivacyError(
                f"The server proposes a plan with {item.name}={proposed!r}, and this node's configuration "
                f"permits {item.name}={permitted!r}. Start server and nodes with the same configuration."
            )
    about = plan.evaluation()
    if about is not None and plan.is_private():
        cost, permitted = about.epsilon(), evaluation_epsilon(config)
        if not cost <= permitted * (1 + 1e-6):
            raise PrivacyError(
                f"The server proposes evaluation_noise={plan.evaluation_noise:.4g}, with which "
                f"{about.num_rounds} answers cost epsilon {cost:.4g}; this node's configuration permits "
                f"{permitted:g}. Use the calibrated noise."
            )
    if plan.is_private() and config.privacy.epsilon is not None:
        epsilon = plan.epsilon()
        if not epsilon <= config.privacy.epsilon * (1 + 1e-6):
            raise PrivacyError(
                f"The server proposes noise_multiplier={plan.noise_multiplier:.4g}, which gives epsilon "
                f"{epsilon:.4g} over {plan.num_rounds} rounds at delta {plan.delta:g}; this node's "
                f"configuration permits {config.privacy.epsilon:g}. Use the calibrated noise multiplier."
            )


class ReleaseCounter:
    """The second witness: what `Context.state` remembers of this run's releases. Never leaves the node."""

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
        """Raises FederationError for a message answered before, LedgerError for a ledger that forgot."""
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
        self._state[self._name] = ConfigRecord(
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


def public_reason(error: Exception, node: str, context: Context | None = None, round: int = 0) -> str:
    """What may be told of an error that happened at `node`; the whole goes to the node's own log.

    In a simulation that is the run folder's too, where the person at the keyboard reads it
    (`fedtune.federation.local_record`).
    """
    whole = f"{type(error).__name__}: {' '.join(str(error).split())}"
    expected = isinstance(error, FedtuneError)
    _log.log(
        logging.INFO if expected else logging.ERROR,
        "Node %r gives no answer in round %d: %s",
        node,
        round,
        whole,
        exc_info=None if expected else error,
    )
    permitted, run_dir = False, None
    if context is not None:
        with contextlib.suppress(Exception):  # settings that cannot be read permit nothing
            site = site_settings(context)
            config = node_config(context)
            if site is None:
                permitted, run_dir = config.data.public, config.resume or config.output
            else:
                permitted = site.publish_budget and isinstance(error, BudgetExhausted)
    said = told(error, node, permitted=permitted)
    if run_dir is not None and said != whole:
        local_record.log_reason(Path(run_dir), node, round, said, whole)
    return said


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
    count: int  # this run's releases for the same purpose in the ledger, this one included


@dataclass(frozen=True)
class Permitted:
    """A plan that this node may follow, as its settings say, and what it would follow it with."""

    config: Config
    shard: Shard
    plan: PrivacyPlan  # as it is accounted for this shard
    ledger: PrivacyLedger


def permitted(proposed: PrivacyPlan, run: str, context: Context) -> Permitted:
    """Whether this node's settings, its owner's file and its data permit what a server proposes; the budget
    is not asked.

    Raises PrivacyError (of some kind) if they do not, FederationError if the node has no part in the run.
    """
    from fedtune.federation.resources import config_of

    config = node_config(context)
    shard = own_shard(config, context)
    if shard is None:
        raise FederationError("This node holds no shard of this federation.")
    check_plan(proposed, config)
    plan = proposed.for_shard(shard.declared_size)
    if plan.trust == "distributed" and plan.declared_size < shard.declared_size:
        # Delta follows from the size of the union, which this node's own part is in.
        raise PrivacyError(
            f"The server proposes a plan for a union of {plan.declared_size} units, and node {shard.node!r} "
            f"alone declares {shard.declared_size}. Start server and nodes with the same configuration."
        )
    ledger = ledger_of(shard.node, context)
    site = site_settings(context)
    if site is not None:
        asked = config_of(str(context.run_config.get("fedtune", "")))
        used = {release.fingerprint for release in ledger.releases(run=run, node=shard.node)}
        # A run that began under version 0.1 has the fingerprint that was not keyed.
        site.check(asked, proposed, used - {shard.fingerprint}, ledger.known_as(shard.identity))
    return Permitted(config, shard, plan, ledger)


def releases_of(plan: PrivacyPlan, site: SiteSettings | None = None) -> list[ReleasePlan]:
    """All that a run by `plan` may release of a shard, one for each purpose.

    A real site whose owner permits no such answers (`site`) trains and answers none: they are not among its
    releases, when it agrees to the run and in each round alike.
    """
    answers = plan.evaluation()
    if answers is not None and site is not None:
        try:
            site.check_evaluation(plan)
        except PrivacyError:
            answers = None
    return [plan, *(one for one in (answers, plan.sizing()) if one is not None)]


def reserve_release(request: RoundRequest, context: Context, *, evaluation: bool = False) -> Release:
    """Steps 2 to 4 of a round: shard, plan, ledger, second witness, and a durable charge.

    For every protocol: whoever lets anything about a shard leave the node calls this first. With `evaluation`
    it is for an answer about what is held out, charged by the plan's own event for that. Raises
    PrivacyError (of some kind) if the node refuses; nothing is charged then.
    """
    own = permitted(request.plan, request.run, context)
    config, shard, plan, ledger = own.config, own.shard, own.plan, own.ledger
    charged: ReleasePlan | None = plan.evaluation() if evaluation else plan
    if charged is None:
        raise PrivacyError(
            f"Node {shard.node!r} is asked about data that it holds out, and federation.evaluation is "
            f"{config.federation.evaluation}: no such answer is in the plan."
        )
    if evaluation and (site := site_settings(context)) is not None:
        site.check_evaluation(request.plan)

    mine = {"run": request.run, "node": shard.node, "purpose": charged.purpose}
    memory = ReleaseCounter(
        context.state, request.run, "fedtune.answers" if evaluation else ReleaseCounter.NAME
    )
    memory.check(request, shard.node, len(ledger.releases(**mine)))
    reservation = ledger.reserve(
        dataset=shard.dataset,
        fingerprint=shard.identity,
        node=shard.node,
        run=request.run,
        round=request.round,
        plan=charged,
        whole=releases_of(plan, site_settings(context)),
        public=config.data.public,
    )
    count = len(ledger.releases(**mine))
    memory.note(request, count)
    training = request.plan.training_plan(shard.declared_size)
    return Release(config, shard, plan, training, ledger, reservation, count)


def failure_text(round: int, context: Context, release: Release | None, error: Exception) -> tuple[str, str]:
    """(this node's name, what may be told of `error`), as `public_reason` says."""
    node = release.shard.node if release else _name(context)
    return node, public_reason(error, node, context, round)


def failure_reply(
    request: RoundRequest, context: Context, release: Release | None, error: Exception
) -> RoundReply:
    """What a node answers instead of an update: a refusal if it is the node's decision, else a failure."""
    node, reason = failure_text(request.round, context, release, error)
    decided = isinstance(error, PrivacyError)
    return RoundReply(
        node=node,
        run=request.run,
        round=request.round,
        attempt=request.attempt,
        releases=release.count if release else _charged(node, request.run, context),
        refused=reason if decided else None,
        refusal=type(error).__name__ if decided else None,
        error=None if decided else reason,
    )


def _name(context: Context) -> str:
    """This node's name, as far as it is known."""
    try:
        shard = own_shard(node_config(context), context)
    except Exception:
        shard = None
    return shard.node if shard else node_label(context)


def node_label(context: Context) -> str:
    """What to call a node whose data cannot be read: its site, or its place in a simulation."""
    site = site_settings(context)
    return site.site if site is not None else f"partition {context.node_config.get('partition-id')}"


def _charged(node: str, run: str, context: Context) -> int:
    """Releases of a run that the node's ledger knows; 0 if it cannot be read."""
    try:
        return len(ledger_of(node, context).releases(run=run, node=node, purpose="training"))
    except Exception:
        return 0


def delay_answer(context: Context, arrived: float) -> None:
    """Sleeps until `answer-after` seconds after `arrived` (monotonic), where the node's owner asks for it."""
    hold = context.node_config.get("answer-after")
    if isinstance(hold, (int, float)) and not isinstance(hold, bool) and math.isfinite(hold):
        time.sleep(max(0.0, hold - (time.monotonic() - arrived)))
