"""From what ran to what a record says of it: privacy of each node, quality, and the mechanism's name.

Epsilon is accounted here from the releases that the nodes' ledgers hold, by the terms of each node's own
plan. Where a node has no ledger row of this run (it was never asked), it has released nothing and its
epsilon is 0.
"""

from __future__ import annotations

from collections import Counter
from importlib import metadata
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtune.cost.meter import EnergyReading
from fedtune.data.sources.load import LABELS_TAKEN
from fedtune.runs.assemble import Metrics, NodePrivacy

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from fedtune.config.schema import Config
    from fedtune.data.corpus import Shard, TokenizedCorpus
    from fedtune.data.prepare import PreparedData
    from fedtune.federation.events import FederationResult
    from fedtune.federation.server.evaluation import NodesEvaluation
    from fedtune.models.classifier import AdaptedModel
    from fedtune.privacy.plan import PrivacyPlan
    from fedtune.runs.personal import PersonalScore
    from fedtune.training.evaluation import Evaluation

__all__ = [
    "accountant",
    "bought_records",
    "data_facts",
    "energy_of_run",
    "evaluation_facts",
    "expected_flops",
    "metrics",
    "node_privacy",
    "noise_line",
    "size_facts",
]


def accountant(plan: PrivacyPlan) -> str | None:
    """What epsilon was computed with; None where there is none.

    fedtune composes privacy loss distributions itself (`fedtune.privacy.accounting.pld`); its tests hold
    that to dp-accounting's own composition.
    """
    if not plan.is_private():
        return None
    return f"PLD (fedtune {metadata.version('fedtune')}, checked against dp-accounting)"


def node_privacy(shards: Sequence[Shard], result: FederationResult) -> list[NodePrivacy]:
    """Each node's releases in this run and in all, with the epsilon that they come to.

    The engine counts the releases that it asked for, the ledger those that it reserved; the larger count is
    taken, since a release that only one of them saw may still have happened. Nodes that are gone
    after a resume are kept: what they released is released. Where the ledger is on another machine, what it
    knows of other uses is null.
    """
    held = {shard.node: shard for shard in shards}
    sizes = {node.name: node.declared_size for node in result.nodes}
    found = []
    for name in sorted({*held, *sizes}):
        shard = held.get(name)
        plan = result.plan.for_shard(sizes.get(name, 1))
        in_ledger, in_answers, total = _ledger(name, shard, result.run, plan.delta)
        releases = max(in_ledger, result.releases.get(name, 0))
        answers = max(in_answers, result.answers.get(name, 0))
        # A node that was never discovered has told no size either.
        told, private = name in sizes, plan.is_private()
        found.append(
            NodePrivacy(
                node=name,
                epsilon=plan.epsilon(releases, answers, told=told) if private else None,
                epsilon_rdp=plan.epsilon_rdp(releases, answers, told=told) if private else None,
                delta=plan.delta if private else None,
                releases=releases,
                answers=answers,
                dataset=None if shard is None else shard.dataset,
                fingerprint=None,
                total_epsilon=total[0],
                total_releases=total[1],
                total_unit=total[2],
            )
        )
    return found


def _ledger(
    node: str, shard: Shard | None, run: str, delta: float
) -> tuple[int, int, tuple[float | None, int | None, str | None]]:
    """(this run's rounds, its answers about held-out data, (epsilon over everything, releases in all, the
    unit that this epsilon is about)) as the node's ledger knows them."""
    from fedtune.config.files import state_dir
    from fedtune.privacy.ledger.simulation import simulation_ledger
    from fedtune.privacy.ledger.state import NamedData

    ledger = simulation_ledger(state_dir() / "ledgers")
    if not ledger.path.exists():
        return 0, 0, (None, None, None)
    mine = len(ledger.rounds(run=run, node=node, purpose="training"))
    answers = len(ledger.rounds(run=run, node=node, purpose="evaluation"))
    if shard is None:
        return mine, answers, (None, None, None)
    data: dict[str, Any] = {"dataset": shard.dataset, "fingerprint": shard.identity}
    # From the running sum: to read every row of a long ledger would take longer with each run of a sweep.
    made = ledger.state().releases.get(NamedData(shard.dataset, ledger.known_as(shard.identity)), 0)
    return mine, answers, (ledger.epsilon(**data, delta=delta or None), made, ledger.account(**data).unit())


def metrics(
    evaluation: Evaluation | NodesEvaluation | None,
    test: TokenizedCorpus,
    data: str = "public",
    personal: Mapping[str, PersonalScore] | None = None,
) -> Metrics:
    """Quality, as it was measured.

    On a test part (`data`: public, or held_out in a run without privacy) with what guessing its commonest
    label would give. Of nodes' noised counts an accuracy and its standard error is all there is. None: it was
    not evaluated.

    With `personal`, sites have parts of their own: on a test part each site's accuracy stands beside that of
    the common model. Nodes answer about one model, the one that they use, so that nothing is known of the
    common one then.
    """
    from fedtune.federation.server.evaluation import NodesEvaluation

    if evaluation is None:
        return Metrics(accuracy=None, evaluation={"data": "none"})
    if isinstance(evaluation, NodesEvaluation):
        return _noised(evaluation, own_parts=personal is not None)
    counts = Counter(np.asarray(test.labels).tolist())
    total = sum(counts.values())
    sizes = {} if test.sites is None or data != "public" else Counter(np.asarray(test.sites).tolist())
    per_site: dict[str, dict[str, Any]] = {
        site: {"accuracy": accuracy, "num_records": sizes.get(site)}
        for site, accuracy in evaluation.per_site.items()
    }
    tested = {site: one for site, one in (personal or {}).items() if one.accuracy is not None}
    for site, one in tested.items():
        per_site[site]["personal"] = {"accuracy": one.accuracy, "steps": one.steps}
    return Metrics(
        accuracy=evaluation.accuracy,
        precision_macro=evaluation.precision_macro,
        recall_macro=evaluation.recall_macro,
        f1_macro=evaluation.f1_macro,
        loss=evaluation.loss,
        per_site=per_site,
        num_records=total if data == "public" else None,  # else how much is held out is private
        majority_rate=max(counts.values()) / total if total and data == "public" else None,
        personal=_together(tested.values()),
        evaluation={"data": data},
    )


def _together(tested: Collection[PersonalScore]) -> dict[str, Any] | None:
    """Accuracy of all sites' models, each on its own test records; None if there are none."""
    records = sum(one.records for one in tested)
    if not records:
        return None
    return {"accuracy": sum(one.records * (one.accuracy or 0.0) for one in tested) / records}


def _noised(evaluation: NodesEvaluation, own_parts: bool) -> Metrics:
    per_site: dict[str, dict[str, Any]] = {}
    for one in evaluation.nodes:
        quality = {"accuracy": one.accuracy, "standard_error": one.standard_error}
        row = {"accuracy": None, "standard_error": None, "personal": quality} if own_parts else quality
        per_site[one.node] = {**row, "units": one.right + one.wrong, "num_records": None}
    found = {
        "data": "private",
        "model": "personal" if own_parts else "common",
        "round": evaluation.round,
        "standard_error": evaluation.standard_error,
        "units": evaluation.units,
        "missing": [{"node": node, "reason": reason} for node, reason in evaluation.missing],
    }
    together = {"accuracy": evaluation.accuracy, "standard_error": evaluation.standard_error}
    return Metrics(
        accuracy=evaluation.accuracy,
        per_site=per_site,
        personal=together if own_parts else None,
        num_records=None,
        evaluation=found,
    )


def evaluation_facts(plan: PrivacyPlan) -> dict[str, Any] | None:
    """How nodes answered about data that they hold out, by the plan; None where they did not."""
    about = plan.evaluation()
    if about is None:
        return None
    private = about.is_private()
    return {
        "mechanism": "two counts of held-out units, right and wrong, with exact discrete Gaussian noise",
        "unit": about.unit,
        "share": about.share,
        "answers": about.num_rounds,
        "noise_multiplier": about.noise_multiplier,
        "noise_std": about.noise_std,
        "epsilon": about.epsilon() if private else None,
        "delta": about.delta if private else None,
    }


def size_facts(plan: PrivacyPlan) -> dict[str, Any] | None:
    """How nodes told their sizes, by the plan; None where they told none with noise."""
    sizing = plan.sizing()
    if sizing is None:
        return None
    return {
        "mechanism": f"the number of {sizing.unit}s, with exact discrete Gaussian noise, once",
        "noise_multiplier": sizing.noise_multiplier,
        "epsilon": sizing.epsilon(),
        "delta": sizing.delta,
    }


def expected_flops(config: Config, result: FederationResult, model: AdaptedModel) -> float | None:
    """Operations that training should have taken, from settings and told sizes; None where those do not say.

    Of a person at most `records_per_unit` records enter a step, and as many are counted. Under trust=central
    no size leaves a node.
    """
    from fedtune.training.local import flops_of_record

    plan = result.plan
    if not plan.mechanism.tells_size:
        return None
    each = flops_of_record(model, plan, config.data, config.train)
    alone = 4.0 * float(model.head.sum())  # two products with the head's weights
    total = 0.0
    for node in result.nodes:
        releases = result.releases.get(node.name, 0)
        first = min(releases, plan.head_rounds)
        records = plan.local_steps * plan.sample_rate * node.declared_size
        total += (first * alone + (releases - first) * each) * records
    return total * (plan.records_per_unit if plan.unit == "person" else 1)


def noise_line(result: FederationResult, numbers: int) -> str | None:
    """That noise is all there is, where the noise of the whole run is longer than gradients of `numbers`
    numbers can be, if all of them pointed one way; else None. From public numbers.

    Where a server noises whole updates, nothing is said.
    """
    plan = result.plan
    sizes = {node.name: node.declared_size for node in result.nodes}
    ratio = plan.mechanism.noise_over_gradients(plan, sizes, numbers)
    if not ratio > 1.0:
        return None
    times = f"{ratio:.1f}" if ratio < 10.0 else f"{ratio:,.0f}"
    return (
        f"The noise of all {plan.steps()} steps together is {times} times as long as their gradients can "
        "be at most: hardly anything is learnt. With as much data and as many numbers to train it is shorter "
        f"from about epsilon {plan.epsilon() * ratio:.2g} on."
    )


def data_facts(
    config: Config, data: PreparedData, result: FederationResult, notes: Sequence[str] = ()
) -> dict[str, Any]:
    """What was trained and tested on, in public numbers: the sizes that nodes told, never the real ones.

    `notes`: of the public texts that were trained on first.
    """
    return {
        "name": config.data.name,
        "source": config.data.source,
        "public": data.public,
        "labels": list(data.label_names),
        "labels_declared": LABELS_TAKEN not in data.notes,
        "declared_sizes": {node.name: node.declared_size for node in result.nodes},
        "test_records": data.test.num_records if config.federation.evaluation == "public" else 0,
        "only_site": config.data.only_site,
        "notes": [*data.notes, *notes],
        "public_start": result.public_start,
    }


def energy_of_run(reading: EnergyReading, attempt: int) -> EnergyReading:
    """The reading, if it covers the run: of a resumed one only the last session was measured."""
    if attempt <= 1 or reading.kwh is None:
        return reading
    note = f"no energy estimate for a resumed run: {1000 * reading.kwh:.3g} Wh since its last start"
    return EnergyReading(None, note, reading.covered_seconds, reading.start_seconds)


def bought_records(result: FederationResult) -> int | None:
    """Declared records in all; None where only persons or clients are declared."""
    if result.plan.unit != "record":
        return None
    return sum(node.declared_size for node in result.nodes)
