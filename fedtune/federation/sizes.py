"""A node's size where no owner declared one: a noised count, released once a run and charged beforehand.

Only in a simulation of private data (`fedtune.privacy.mechanisms.counts` says where and by what mechanism).
The noised count is stored in the run's folder, `sizes/NODE.json`, and is all that a run ever has of the size:
a run that is resumed goes on with it, and is not charged again. Under trust=central the size of private data
does not leave the node, which says 1.

The release is charged to the run, whose number a simulation's server writes into the folder before it
discovers the nodes (`fedtune.federation.run_folder`): the ledger then sees one run, fixed before its first
release. Under another number the nodes release their sizes again: its partition or its unit may be
another, and the ledger counts what the nodes of *one* run release as releases of different people's data.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context

from fedtune.config.files import replace_whole
from fedtune.data.partition import split_size
from fedtune.errors import FederationError
from fedtune.federation.run_folder import SIZES, run_number
from fedtune.privacy.mechanisms.counts import size_plan
from fedtune.privacy.mechanisms.registry import mechanism_of

if TYPE_CHECKING:
    from fedtune.config.schema import Config
    from fedtune.data.corpus import Shard
    from fedtune.data.prepare import PreparedData
    from fedtune.privacy.ledger.ledger import PrivacyLedger
    from fedtune.privacy.plan import ReleasePlan

__all__ = ["size_to_declare", "sized", "tell_size"]


def tell_size(
    config: Config,
    context: Context,
    data: PreparedData,
    position: int,
    ledger: PrivacyLedger,
    whole: Sequence[ReleasePlan],
) -> None:
    """Reserves, counts, noises and stores the size of the node at `position`, unless this run has it already.

    Args:
        whole: the plans of all that the run may release.

    Raises:
        BudgetExhausted: the owner's budget does not allow it all; nothing is counted or charged then.
        LedgerError: it cannot be charged.
    """
    shard, plan = data.shards[position], size_plan(config)
    if plan is None:
        return
    folder = _folder(config, context, shard.node)
    path = _path(folder, shard.node)
    if path.exists():
        return
    release: dict[str, Any] = {
        "dataset": shard.dataset,
        "fingerprint": shard.identity,
        "node": shard.node,
        "run": run_number(folder),
        "public": config.data.public,
    }
    ledger.check_run(**release, plans=whole)
    reservation = ledger.reserve(**release, round=0, plan=plan, whole=whole)
    # Held-out units are units of the shard: their parts share none, so the counts add up.
    parts = [part.data for part in (shard, *data.held_out[position : position + 1])]
    units = sum(part.num_units if plan.unit == "person" else part.num_records for part in parts)
    path.parent.mkdir(exist_ok=True)
    record = {"node": shard.node, "told": plan.told(units, plan.entropy(shard.node))}
    # Whole or not at all, durably: what was released must not be counted a second time.
    replace_whole(path, json.dumps(record).encode())
    ledger.commit(reservation)


def sized(config: Config, context: Context, shard: Shard) -> Shard:
    """`shard` with the size that its node released in this run in place of its count.

    Raises:
        FederationError: it released none yet, which it does when the server first asks who it is.
    """
    if size_plan(config) is None:
        return shard
    path = _path(_folder(config, context, shard.node), shard.node)
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))["told"]
        size = stored if type(stored) is int and stored >= 1 else None
    except FileNotFoundError as error:
        raise FederationError(
            f"Node {shard.node!r} has not told its size in this run ({path} is missing), and the plan "
            "follows from it. Start a new run, or declare a size: data.declared_size=N, about how many "
            "records (or persons) there are in all."
        ) from error
    except (OSError, ValueError, KeyError, TypeError):
        size = None
    if size is None:
        raise FederationError(
            f"{path} does not hold the size that node {shard.node!r} told. Start a new run."
        )
    if config.federation.evaluation == "private":
        size = split_size(size, config.federation.evaluation_share)[0]
    return dataclasses.replace(shard, declared_size=size)


def size_to_declare(config: Config, shard: Shard) -> int:
    """The size that a node tells with its name: its shard's, or 1 where it may not leave the node."""
    simulated = config.engine.name != "deployment"
    tells = mechanism_of(config.privacy.trust).tells_size
    hidden = not tells and simulated and config.data.declared_size is None
    return 1 if hidden and not config.data.public else shard.declared_size


def _folder(config: Config, context: Context, node: str) -> Path:
    """The run's folder, which in a simulation is on the same machine."""
    chosen = config.resume or str(context.run_config.get("output", "")) or config.output
    if not chosen:
        raise FederationError(
            f"Node {node!r} does not know the run's folder, where it would keep the size that it tells. Give "
            "data.declared_size=N, about how many records (or persons) there are in all."
        )
    return Path(chosen)


def _path(folder: Path, node: str) -> Path:
    return folder / SIZES / f"{node}.json"
