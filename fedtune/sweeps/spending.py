"""The privacy that a sweep will spend, before its first run: all of its runs composed.

Every run of a sweep is a use of the same data, and which of them is kept is chosen by looking at all. So the
number that counts is that of all together, by Renyi DP, which is proven for runs whose settings are chosen
adaptively (Feldman and Zrnic 2021). It is made from each run's plan before any data is read. Where delta
follows from sizes that only the run will learn, the number is marked as approximate. Earlier uses, which the
ledgers have, are not in it. Runs that fail or end early release less, never more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fedtune.config.choices import resolved
from fedtune.data.partition import DEFAULT_NODES
from fedtune.errors import FedtuneError
from fedtune.privacy.accounting.epsilon import compose_terms
from fedtune.privacy.accounting.filter import least_epsilon
from fedtune.privacy.mechanisms.counts import size_noise
from fedtune.privacy.mechanisms.registry import adds_noise, mechanism_of
from fedtune.privacy.plan import make_plan
from fedtune.report.words import format_number

if TYPE_CHECKING:
    from fedtune.config.schema import Config
    from fedtune.config.search import Axis
    from fedtune.privacy.plan import PrivacyPlan

__all__ = ["costliest_run", "spending_text"]

_DELTA = 1e-5  # where the run's own follows from sizes that are not known yet
_UNITS = 1000  # any size below one over it: noise does not follow from it


def spending_text(configs: Sequence[Config | None], *, most: bool = False) -> str:
    """One sentence for each data set and unit that the runs of `configs` use; empty if there is no run.

    A run that is None, or cannot be planned, is counted, and its privacy is left out.

    Args:
        most: the runs are those of a search, each the one that spends most (`costliest_run`).
    """
    groups: dict[tuple[str, bool, str], list[PrivacyPlan]] = {}
    exact = True
    open_runs: dict[tuple[str, bool], int] = {}
    unknown = 0
    for config in configs:
        if config is None:
            unknown += 1
            continue
        config = resolved(config)
        data = (config.data.name, config.data.public)
        if not adds_noise(config.privacy.trust):
            open_runs[data] = open_runs.get(data, 0) + 1
            continue
        try:
            plan, own = _plan(config)
        except FedtuneError:
            unknown += 1
            continue
        exact = exact and own
        groups.setdefault((*data, plan.adjacency()), []).append(plan)
    how = "at most " if most else "" if exact else "about "
    parts = [_together(*key, plans, how) for key, plans in groups.items()]
    parts += [_without_noise(*data, count) for data, count in open_runs.items()]
    if unknown:
        parts.append(f"{_runs(unknown)} cannot be planned yet, and what they spend is not in this")
    return "; ".join(parts)


def costliest_run(base: Config | None, axes: Iterable[Axis]) -> Config | None:
    """The run of a search that spends most: the largest epsilon, or the least noise, that it may choose.

    None where the base does not stand alone, or where noise is given and how often it is used is searched.
    """
    if base is None:
        return None
    privacy, usage = base.privacy, ("train.sample_rate", "train.local_steps", "federation.num_rounds")
    for axis in axes:
        if axis.name in ("privacy.epsilon", "privacy.noise_multiplier"):
            values = [float(text) for text in axis.choices] or [axis.low, axis.high]
            name = axis.name.removeprefix("privacy.")
            other = "noise_multiplier" if name == "epsilon" else "epsilon"
            worst = max(values) if name == "epsilon" else min(values)
            changed: dict[str, Any] = {name: worst, other: None}
            privacy = dataclasses.replace(privacy, **changed)
            continue
        uses = axis.name in usage and privacy.epsilon is None and adds_noise(privacy.trust)
        if uses or axis.name.partition(".")[0] in ("privacy", "data"):
            return None
    return dataclasses.replace(base, privacy=privacy)


def _plan(config: Config) -> tuple[PrivacyPlan, bool]:
    """The plan of a run, and whether it is the run's own: a default delta follows from sizes, which only a
    run learns, and is taken to be `_DELTA` here."""
    privacy, nodes = config.privacy, config.federation.nodes or DEFAULT_NODES
    kind = mechanism_of(privacy.trust)
    if not kind.tells_size or privacy.delta is not None or size_noise(config):
        return make_plan(config, [_UNITS] * nodes), True
    total = config.data.declared_size
    if total is not None and (config.federation.nodes is not None or kind.fixed_nodes):
        return make_plan(config, [max(1, round(total / nodes))] * nodes), True
    privacy = dataclasses.replace(privacy, delta=_DELTA)
    return make_plan(dataclasses.replace(config, privacy=privacy), [_UNITS] * nodes), False


def _together(name: str, public: bool, adjacency: str, plans: Sequence[PrivacyPlan], about: str) -> str:
    delta = min(plan.delta for plan in plans)
    if len(plans) == 1:
        epsilon, verb = plans[0].epsilon(), "spends"
    else:
        total = compose_terms(*(plan.everything(plan.num_rounds, plan.evaluation_answers) for plan in plans))
        epsilon, verb = least_epsilon(total, delta), "together, by Renyi DP, spend"
    whose = (
        f"; '{name}' is declared public, so ledgers record it and refuse nothing"
        if public
        else "; ledgers charge it, beside what was spent before, and refuse what a budget does not allow"
    )
    return (
        f"privacy: {_runs(len(plans))} {verb} {about}epsilon {format_number(epsilon)} of '{name}' at delta "
        f"{delta:.1e} ({adjacency}){whose}"
    )


def _without_noise(name: str, public: bool, count: int) -> str:
    if public:
        return f"{_runs(count)} without noise"
    return (
        f"{_runs(count)} without noise: of '{name}' they promise nothing, and with them epsilon is infinite"
    )


def _runs(count: int) -> str:
    return f"{count} run{'' if count == 1 else 's'}"
