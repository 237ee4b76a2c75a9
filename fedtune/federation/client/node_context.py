"""What a node knows of itself: its owner's settings, its shard, its ledger, and what it may say of a failure.

Everything is read from the node's own Context and files for every message anew: nothing that a server says
replaces it.

What is published of a failure is the text of an error that is made of public values, and of any other only
its kind (`fedtune.privacy.publication.error_in_public`). The node's own log has the rest. What a real site
has spent and may spend is its own: a server hears that the budget is exhausted, and the numbers only if the
site publishes them (`publish_budget` in its file).
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from flwr.app import Context

from fedtune.errors import BudgetExhausted, FederationError, FedtuneError
from fedtune.federation import run_folder
from fedtune.federation.sizes import sized
from fedtune.privacy.publication import error_in_public

if TYPE_CHECKING:
    from fedtune.config.schema import Config
    from fedtune.data.corpus import Shard
    from fedtune.federation.client.policy import SiteSettings
    from fedtune.privacy.ledger.ledger import PrivacyLedger

__all__ = [
    "delay_answer",
    "delays_answer",
    "ledger_at_once",
    "node_config",
    "node_label",
    "node_ledger",
    "node_name",
    "own_shard",
    "owner_delta",
    "public_reason",
    "site_settings",
]

_log = logging.getLogger("fedtune.node")


def site_settings(context: Context) -> SiteSettings | None:
    """A real site's own file, as its administrator started the node with; None in a simulation."""
    from fedtune.federation.client.policy import SiteSettings

    text = context.node_config.get("site")
    return SiteSettings.from_json(str(text)) if text is not None else None


def node_config(context: Context) -> Config:
    """The configuration that the run was started with; a real site's own data in it.

    Raises:
        ConfigError: the text is no configuration.
        PrivacyError: the site does not permit the run's data, model or adapter.
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

    Raises:
        FederationError: Flower gave the node no place.
        DataError, ModelError, ResourceError: the data cannot be prepared.
    """
    shard = _unsized_shard(config, context)
    return shard if shard is None or config.engine.name == "deployment" else sized(config, context, shard)


def _unsized_shard(config: Config, context: Context) -> Shard | None:
    """As `own_shard`, with the size that its owner declared or none."""
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
    return shards[position] if position < len(shards) else None


_at_hand = threading.local()


@contextlib.contextmanager
def ledger_at_once(context: Context) -> Iterator[None]:
    """Within it all simulated nodes that this thread asks have one ledger, opened once and read as it is now
    (`PrivacyLedger.at_once`): nothing can be charged meanwhile. `context`: of one of them.

    Raises:
        LedgerError, ResourceError: as `node_ledger`.
    """
    ledger = node_ledger(context)
    with ledger.at_once():
        if site_settings(context) is None:
            _at_hand.ledger = ledger
        try:
            yield
        finally:
            _at_hand.ledger = None


def node_ledger(context: Context | None = None) -> PrivacyLedger:
    """The ledger that this node charges, a file that outlives process and run.

    A real node's is its own; all nodes of simulations share one.

    Raises:
        LedgerError: it cannot be read, or was changed.
        ResourceError: it cannot be opened.
    """
    from fedtune.config.files import state_dir
    from fedtune.privacy.ledger.ledger import PrivacyLedger
    from fedtune.privacy.ledger.simulation import simulation_ledger

    site = None if context is None else site_settings(context)
    if site is not None:
        return PrivacyLedger.open(Path(site.ledger), require_budget=True)
    at_hand: PrivacyLedger | None = getattr(_at_hand, "ledger", None)
    return at_hand or simulation_ledger(state_dir() / "ledgers")


def owner_delta(shard: Shard, config: Config, context: Context) -> float:
    """Delta of the budget that the owner of `shard` has set, which is public; 0.0 where none bounds it."""
    site = site_settings(context)
    if config.data.public:
        return 0.0
    if site is not None:
        return site.budget_delta
    budget = node_ledger(context).budget(dataset=shard.dataset)
    return 0.0 if budget is None else budget.delta


def node_label(context: Context) -> str:
    """What to call a node whose data cannot be read: its site, or its place in a simulation."""
    site = site_settings(context)
    return site.site if site is not None else f"partition {context.node_config.get('partition-id')}"


def node_name(context: Context) -> str:
    """This node's name, as far as it is known; the size, which it may be refused to tell, is not needed."""
    try:
        shard = _unsized_shard(node_config(context), context)
    except Exception:  # whatever is wrong with the data has an error of its own
        shard = None
    return shard.node if shard else node_label(context)


def public_reason(error: Exception, node: str, context: Context | None = None, round: int = 0) -> str:
    """What may be published of an error that happened at `node`; the whole goes to the node's own log.

    In a simulation that is the run folder's too, where the person at the keyboard reads it
    (`fedtune.federation.run_folder`).
    """
    full = f"{type(error).__name__}: {' '.join(str(error).split())}"
    expected = isinstance(error, FedtuneError)
    _log.log(
        logging.INFO if expected else logging.ERROR,
        "Node %r gives no answer in round %d: %s",
        node,
        round,
        full,
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
    published = error_in_public(error, node, permitted=permitted)
    if run_dir is not None and published != full:
        run_folder.log_reason(Path(run_dir), node, round, published, full)
    return published


def delays_answer(context: Context) -> float:
    """After how many seconds the node's owner asks to answer (`answer-after`); 0.0: as soon as it can."""
    hold = context.node_config.get("answer-after")
    if isinstance(hold, (int, float)) and not isinstance(hold, bool) and math.isfinite(hold):
        return float(hold)
    return 0.0


def delay_answer(context: Context, arrived: float) -> None:
    """Sleeps until `answer-after` seconds after `arrived` (monotonic), where the node's owner asks for it."""
    if hold := delays_answer(context):
        time.sleep(max(0.0, hold - (time.monotonic() - arrived)))
