"""What choosing the best of many runs costs in privacy: three epsilons, and which of them is true.

1. The chosen run alone. What its record says; not the whole truth once it was chosen by looking at others
   that used the same private data.
2. All runs composed, by Renyi DP as the nodes' ledgers do (`fedtune.privacy.accounting.filter`): an upper
   bound for everything that these records used, and for publishing all of their results. It does not know of
   runs outside of the report; the nodes' ledgers do.
3. The best of a random number of trials, where a sweep was made that way (`sweep.private_selection=true`)
   and nothing but its best run is published: `fedtune.privacy.accounting.selection`.

Composition is by node: under the natural partition a record lies on the same node in every run, so each node
composes its own; otherwise a record may have been on the busiest node of every run, and is charged so. Runs
that protect different units promise different things and are never added up. Tuning on data that its owner
declared public is free, and is labelled so.

Runs of a search (`sweep=optuna`) depend on one another, so 3 does not exist for them, and 2 is what the
search told. If it also chose noise, rates or rounds, or ended runs early, it did so after outputs were
seen; `describe_search` says what is proven of that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.errors import PrivacyError
from fedtune.privacy.accounting.epsilon import Term, compose_terms
from fedtune.privacy.accounting.filter import least_epsilon
from fedtune.privacy.accounting.selection import TrialCount, epsilon_best_of
from fedtune.report.collect import Run
from fedtune.report.words import format_number

__all__ = [
    "Tuning",
    "changes_mechanism",
    "composed_terms",
    "describe_search",
    "tuning_cards",
    "tuning_of",
    "tuning_text",
]

# What changes the privacy of a trial, or the data that it is on. Trials of a private selection must be alike
# in all of it, for the bound is that of one mechanism that is repeated; of a search it is said if it chose
# any of it. The clipping norm is not among it: noise is accounted in multiples of it.
_ONE_MECHANISM = ("privacy", "data", "partition")
_HARMLESS = ("privacy.max_grad_norm", "privacy.head_norm", "privacy.head_share")
_ONE_MECHANISM_SETTINGS = (
    "train",
    "federation",
    "experiment",
    "train.sample_rate",
    "train.local_steps",
    "federation.num_rounds",
    "federation.nodes",
    "federation.cohort_size",
)


@dataclass(frozen=True)
class Tuning:
    """The three epsilons of having chosen `chosen` among `runs` runs, at `delta`, for one `unit`.

    Attributes:
        epsilon_alone: of the chosen run.
        epsilon_composed: of all private runs together.
        epsilon_best: bound for publishing only the best of the trials; None where the sweep was
            not made for it.
        trials: the distribution of the number of trials, for that bound.
        without_privacy: runs on the same data that had no noise; with them nothing is promised.
        public: the data was declared public, so that all of this is what it would have cost.
        searched: how many of the private runs a search chose.
        pruned: how many of those it ended early.
        searched_mechanism: settings that a search chose from and that change what a run costs in privacy.
    """

    chosen: Run
    delta: float
    unit: str
    adjacency: str
    runs: int
    epsilon_alone: float
    epsilon_composed: float
    without_privacy: int
    public: bool
    epsilon_best: float | None = None
    trials: TrialCount | None = None
    searched: int = 0
    pruned: int = 0
    searched_mechanism: tuple[str, ...] = ()


def tuning_of(runs: Sequence[Run], chosen: Run, sweeps: Mapping[Path, Mapping[str, Any]]) -> Tuning | None:
    """The three epsilons for `chosen` among the `runs` on the same data; None if it is not private."""
    if math.isinf(chosen.epsilon) or chosen.delta is None:
        return None
    rivals = [run for run in runs if run.task == chosen.task and _same_data(run, chosen)]
    private = [run for run in rivals if math.isfinite(run.epsilon) and run.unit == chosen.unit]
    composed = max(
        (
            least_epsilon(terms, chosen.delta)
            for node, terms in composed_terms(private).items()
            if sum(_used(run, node) for run in private) > 1  # else one run's own number, below
        ),
        default=0.0,
    )
    best_of, trials = _selection(private, chosen, sweeps)
    by_search, searched_mechanism = _searched(private, sweeps)
    return Tuning(
        chosen=chosen,
        delta=chosen.delta,
        unit=chosen.unit,
        adjacency=chosen.adjacency,
        runs=len(private),
        epsilon_alone=chosen.epsilon,
        # Where every node's part of the data was used by one run, it is that run's own number.
        epsilon_composed=max(composed, max(run.epsilon for run in private))
        if len(private) > 1
        else chosen.epsilon,
        without_privacy=sum(not run.is_private or math.isinf(run.epsilon) for run in rivals),
        public=all(run.public for run in rivals),
        epsilon_best=best_of,
        trials=trials,
        searched=len(by_search),
        pruned=sum(run.pruned for run in by_search),
        searched_mechanism=searched_mechanism,
    )


def describe_search(tuning: Tuning) -> str:
    """What it means for the three epsilons that a search chose runs; empty if none did."""
    if not tuning.searched:
        return ""
    some = "These" if tuning.searched == tuning.runs else f"{tuning.searched} of these {tuning.runs}"
    text = (
        f"{some} runs were chosen by a search, each by what those before it had released: what that told "
        "about the data is all runs composed, and there is no bound for publishing the best one alone."
    )
    decided = [f"chose {', '.join(tuning.searched_mechanism)}"] if tuning.searched_mechanism else []
    if tuning.pruned:
        decided.append(f"ended {tuning.pruned} of them early")
    if decided:
        text += (
            f" The search also {' and '.join(decided)} after outputs were seen. A node's budget is proven to "
            "hold for that (Feldman and Zrnic 2021); this total is proven for what was planned together."
        )
    return text


@dataclass(frozen=True)
class Card:
    """One of the three epsilons as the page shows it.

    Attributes:
        epsilon: as text; None where there is none.
        tag: what to warn of; empty for none.
        main: the number that holds.
    """

    name: str
    epsilon: str | None
    tag: str
    text: str
    main: bool


def tuning_cards(tuning: Tuning) -> list[Card]:
    """The three epsilons, each with what it holds for."""
    several, best = tuning.runs > 1, tuning.epsilon_best
    gains = best is not None and best < tuning.epsilon_composed
    if best is not None and tuning.trials is not None:
        text = (
            f"Papernot and Steinke 2022, {tuning.trials.name}, mean {format_number(tuning.trials.mean)}. "
            "Holds if the best run is published and nothing else: neither this page nor the number of trials."
        )
        if not gains:
            text += " With so few trials, composing all of them gives the smaller bound."
    elif tuning.searched:
        text = "Not available: it is for trials that do not depend on one another, and a search chose these."
    else:
        text = (
            "Not available: it needs a sweep whose number of trials was drawn at random beforehand "
            "(sweep.private_selection=true), and the best run of it."
        )
    return [
        Card(
            "The chosen run alone",
            format_number(tuning.epsilon_alone),
            "not the whole truth" if several else "",
            f"What the record of seed {tuning.chosen.seed} says. True only if it had not been chosen by "
            "looking at the others."
            if several
            else "There was nothing to choose from, so as far as these records go this is the whole truth.",
            main=not several,
        ),
        Card(
            "All private runs, composed",
            format_number(tuning.epsilon_composed),
            "",
            f"What {tuning.runs} {'runs have' if several else 'run has'} spent together. Holds for "
            "publishing everything on this page.",
            main=several and not gains,
        ),
        Card(
            "The best of a random number of trials",
            None if best is None else format_number(best),
            "",
            text,
            main=gains,
        ),
    ]


def tuning_text(tuning: Tuning) -> str:
    """What the three epsilons have in common, and what they leave out."""
    sentences = [
        "The owner declared this data public: tuning on it was free, and the numbers say what it would have "
        "cost."
        if tuning.public
        else "",
        f"At delta {tuning.delta:.1e}, unit {tuning.unit}, {tuning.adjacency}.",
        "Runs outside of this report are not counted here; the ledgers of the nodes count them "
        "(fedtune budget show).",
        describe_search(tuning),
        f"{tuning.without_privacy} runs on the same data had no privacy: if it was private data, nothing is "
        "guaranteed for it any more."
        if tuning.without_privacy
        else "",
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def composed_terms(runs: Sequence[Run]) -> dict[str, dict[Term, int] | None]:
    """By node, the steps that all of `runs` together cost a record of that node; None: no privacy."""
    fixed = [run for run in runs if run.nodes_fixed]
    loose = [run for run in runs if not run.nodes_fixed]
    anywhere = compose_terms(*(_busiest(run) for run in loose))
    nodes = dict.fromkeys(node for run in fixed for node in run.terms) or {"any node": None}
    return {node: compose_terms(anywhere, *(run.terms.get(node, {}) for run in fixed)) for node in nodes}


def _used(run: Run, node: str) -> bool:
    """Whether `run` may have released a record of `node`."""
    return bool(run.terms.get(node, {})) if run.nodes_fixed else any(run.terms.values())


def _busiest(run: Run) -> Mapping[Term, int] | None:
    if any(terms is None for terms in run.terms.values()):
        return None
    return max(
        (terms for terms in run.terms.values() if terms is not None),
        key=lambda terms: sum(terms.values()),
        default={},
    )


def _same_data(run: Run, other: Run) -> bool:
    """By the name of the data alone: what tells records apart is private, and in no record.

    Safe: data of one name is counted as the same although it may have changed.
    """
    return not run.dataset or not other.dataset or run.dataset == other.dataset


def _selection(
    private: Sequence[Run], chosen: Run, sweeps: Mapping[Path, Mapping[str, Any]]
) -> tuple[float | None, TrialCount | None]:
    """Bound and distribution, if `chosen` is the best run of a sweep that drew its number of trials."""
    for folder, sweep in sweeps.items():
        drawn = sweep.get("private_selection")
        if not isinstance(drawn, Mapping) or not _below(chosen.path, folder):
            continue
        mine = [run for run in private if _below(run.path, folder)]
        best = max((run.accuracy for run in mine if run.accuracy is not None), default=None)
        if best is None or chosen.accuracy != best or chosen.delta is None:
            continue
        try:
            shape = drawn["shape"]
            trials = TrialCount(float(drawn["mean"]), math.inf if shape is None else float(shape))
        except (KeyError, TypeError, ValueError, PrivacyError):
            continue
        kinds = {frozenset((_busiest(run) or {}).items()) for run in mine}
        return epsilon_best_of([dict(kind) for kind in kinds], trials, chosen.delta), trials
    return None, None


def _searched(
    private: Sequence[Run], sweeps: Mapping[Path, Mapping[str, Any]]
) -> tuple[list[Run], tuple[str, ...]]:
    """The runs that a search chose, and what it chose that changes what a run costs in privacy."""
    found: list[Run] = []
    moved: dict[str, None] = {}
    for folder, sweep in sweeps.items():
        mine = [run for run in private if _below(run.path, folder)]
        search = sweep.get("search")
        if not mine or not isinstance(search, Mapping):
            continue
        found += mine
        identity = search.get("identity")
        axes = identity.get("searched") if isinstance(identity, Mapping) else None
        for axis in axes if isinstance(axes, list) else []:
            name = str(axis).partition("=")[0]
            if changes_mechanism(name):
                moved[name] = None
    return found, tuple(moved)


def _below(path: Path, folder: Path) -> bool:
    return folder.resolve() in path.resolve().parents


def changes_mechanism(name: str) -> bool:
    """Whether runs that differ in the setting or group `name` may differ in privacy, or in their data."""
    if name in _HARMLESS:
        return False
    return name.split(".")[0] in _ONE_MECHANISM or name in _ONE_MECHANISM_SETTINGS
