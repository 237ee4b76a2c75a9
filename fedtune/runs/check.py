"""What a run would do with somebody's data, before anything is spent: `fedtune data check`.

`fedtune run --dry-run` says the same. Files, model and settings are read as the run would read them, so that
what it would refuse is refused here. Nothing is trained, charged, written or sent.

What is told of the data is exact, and so as private as the data: it is for their owner, who sits here, and no
file keeps it. What the run would publish is in the plan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtune.config.choices import resolved, tests_openly
from fedtune.config.recipe import in_words

if TYPE_CHECKING:
    from fedtune.config.schema import Config
    from fedtune.data.corpus import Corpus, TokenizedCorpus
    from fedtune.data.prepare import PreparedData
    from fedtune.privacy.plan import PrivacyPlan

__all__ = ["check", "in_text", "plan_of", "with_length"]

_SAMPLE, _SAMPLE_LETTERS = 3, 70
_MOST_SHOWN = 12  # labels or sites


def with_length(config: Config) -> tuple[Config, list[str]]:
    """`config` with a number in `data.max_length`, and what should be said of it.

    Where none was given: by the texts, if they are here and public; else the default, for a length that
    follows from private texts would be a release.

    Raises:
        DataError, ModelError, ResourceError: data or encoder cannot be read.
    """
    from fedtune.data.reading import chosen_length
    from fedtune.data.sources.load import load_corpus
    from fedtune.models.encoder import load_encoder_config, load_tokenizer, max_positions

    if config.data.max_length is not None:
        return config, []
    positions, said = max_positions(load_encoder_config(config.model)), list[str]()
    length = min(config.data.longest, positions)
    if config.data.public and config.engine.name != "deployment":
        texts, _ = load_corpus(config.data, config.seed, testing=tests_openly(config))
        length, why = chosen_length(texts, load_tokenizer(config.model)[0], positions)
        said.append(why)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, max_length=length)), said


def plan_of(config: Config, data: PreparedData) -> PrivacyPlan | None:
    """The run's own plan, unless a node's budget asks for a smaller delta; None where no node is here.

    Of sizes that nodes tell with noise it does not matter what they come to. Nothing is released.

    Raises:
        PrivacyError: (of some kind) as `make_plan`.
        ConfigError: a round can never have the updates that it needs.
    """
    from fedtune.federation.server.agreement import check_possible
    from fedtune.federation.sizes import size_to_declare
    from fedtune.privacy.mechanisms.counts import size_plan
    from fedtune.privacy.plan import make_plan

    if not data.shards:  # real sites are elsewhere
        return None
    check_possible(config, len(data.shards))
    told = size_plan(config) is not None
    return make_plan(config, [1 if told else size_to_declare(config, shard) for shard in data.shards])


def check(config: Config) -> dict[str, Any]:
    """What was understood of the data, what the run would do, and what it would spend, fit for JSON.

    Raises:
        FedtuneError: of the kind that the run would raise.
    """
    from fedtune.data.sources.load import load_corpus
    from fedtune.federation.resources import run_resources

    config, said = with_length(resolved(config))
    resources = run_resources(config)
    data, texts = resources.prepared, resources.public_texts
    with resources.using_model() as model:
        digest, notes = model.digest, [*said, *data.notes, *(texts.notes if texts else ()), *model.notes]
    plan = plan_of(config, data)
    if plan is not None and plan.is_private():
        notes += _refusals(config, data, plan)
    train, test = load_corpus(config.data, config.seed, testing=tests_openly(config))
    return {
        "data": {
            "name": config.data.name,
            "path": config.data.path,
            "public": data.public,
            "train": _facts(train, data.train, config),
            "test": _facts(test, data.test, config) if test.num_records else None,
            "public start": None if texts is None else _facts(texts.corpus, texts.tokens, config),
            "sample": [
                {"text": text[:_SAMPLE_LETTERS], "label": train.label_names[label]}
                for text, label in zip(train.texts[:_SAMPLE], train.labels[:_SAMPLE], strict=False)
            ],
        },
        "model": {
            "name": config.model.name,
            "digest": digest,
            "max_length": config.data.longest,
            "windows": config.data.windows,
        },
        "run": {
            "recipe": in_words(config),
            "nodes": len(data.shards),
            "rounds": config.federation.num_rounds,
            "evaluation": config.federation.evaluation,
        },
        "privacy": None if plan is None else _spent(plan),
        "cautions": list(dict.fromkeys([*(() if plan is None else plan.cautions()), *notes])),
    }


def _refusals(config: Config, data: PreparedData, plan: PrivacyPlan) -> list[str]:
    """What the ledger of simulations says against the whole run, a note for each node that it would refuse.

    Charges and writes nothing; where there is no ledger, nothing was spent and no budget is set.

    Raises:
        BudgetExhausted: the budgets leave fewer nodes than a round needs.
        LedgerError: the ledger cannot be used.
    """
    from fedtune.config.files import state_dir
    from fedtune.errors import BudgetExhausted
    from fedtune.federation.client.release import releases_of
    from fedtune.federation.sizes import size_to_declare
    from fedtune.privacy.ledger.simulation import simulation_ledger

    ledger = simulation_ledger(state_dir() / "ledgers")
    if not ledger.path.exists():
        return []
    refused = list[BudgetExhausted]()
    with ledger.at_once():
        for shard in data.shards:
            plans = releases_of(plan.for_shard(size_to_declare(config, shard)))
            try:
                ledger.check_run(
                    dataset=shard.dataset,
                    fingerprint=shard.identity,
                    node=shard.node,
                    run="run",
                    plans=plans,
                    public=config.data.public,
                )
            except BudgetExhausted as error:
                refused.append(error)
    if refused and len(data.shards) - len(refused) < config.federation.min_updates:
        raise refused[0]
    more = [f"{len(refused) - _MOST_SHOWN} more nodes refuse, too."] if len(refused) > _MOST_SHOWN else []
    return [str(error) for error in refused[:_MOST_SHOWN]] + more


def _facts(corpus: Corpus, tokens: TokenizedCorpus, config: Config) -> dict[str, Any]:
    from fedtune.data.reading import reading_of
    from fedtune.models.encoder import load_tokenizer

    lengths = tokens.lengths
    read = reading_of(corpus, tokens, load_tokenizer(config.model)[0], config.data)
    counts = np.bincount(corpus.labels, minlength=len(corpus.label_names))
    distinct = len(np.unique(corpus.digests, axis=0))
    sites: dict[str, int] | None = None
    if corpus.sites is not None:
        names, numbers = np.unique(corpus.sites, return_counts=True)
        sites = {str(name): int(number) for name, number in zip(names, numbers, strict=True)}
    return {
        "records": corpus.num_records,
        "labels": {name: int(count) for name, count in zip(corpus.label_names, counts, strict=True)},
        "persons": None if corpus.units is None else len(np.unique(corpus.units)),
        "sites": sites,
        "repeated": corpus.num_records - distinct,
        "tokens": {
            "median": int(np.median(lengths)),
            "most": int(lengths.max()),
            "all": int(lengths.sum()),
            "texts_cut": read.cut / max(1, read.texts),
            "unknown": read.unknown / read.words,
            "a_letter": read.tokens_a_letter,
        },
    }


def _spent(plan: PrivacyPlan) -> dict[str, Any]:
    private = plan.is_private()
    return {
        "trust": plan.trust,
        "unit": plan.unit,
        "adjacency": plan.adjacency(),
        "epsilon": plan.epsilon(plan.num_rounds, plan.evaluation_answers) if private else None,
        "delta": plan.delta if private else None,
        "noise_multiplier": plan.noise_multiplier,
    }


def in_text(found: Mapping[str, Any]) -> str:
    """What `check` found, for a person."""
    data, run, privacy = found["data"], found["run"], found["privacy"]
    model = found["model"]
    cut = (
        f"at {model['max_length']}"
        if model["windows"] == 1
        else (f"into at most {model['windows']} windows of {model['max_length']}")
    )
    lines = [("data", data["name"] + (f", {data['path']}" if data["path"] else ""))]
    for split in ("train", "test", "public start"):
        if (facts := data[split]) is None:
            continue
        repeated = f", {facts['repeated']} of them repeated" if facts["repeated"] else ""
        lines.append((split, f"{facts['records']} records{repeated}"))
        lines.append(("  labels", _listed(facts["labels"])))
        if facts["persons"] is not None:
            lines.append(("  persons", str(facts["persons"])))
        if facts["sites"] is not None:
            lines.append(("  sites", _listed(facts["sites"])))
        tokens = facts["tokens"]
        lines.append(
            (
                "  tokens",
                f"{tokens['median']} in half of the texts, {tokens['most']} at most; cut {cut}, "
                f"which {tokens['texts_cut']:.1%} of the texts fill; "
                f"{tokens['unknown']:.1%} unknown, {tokens['a_letter']:.2f} a letter",
            )
        )
    lines += [("  row", f"{row['label']}: {_one_line(row['text'])}") for row in data["sample"]]
    lines += [
        ("model", f"{found['model']['name']} (digest {found['model']['digest'][:12]})"),
        ("run", f"{run['nodes']} nodes, {run['rounds']} rounds; {run['recipe']}"),
        ("evaluation", run["evaluation"]),
    ]
    if privacy is not None and privacy["epsilon"] is not None:
        lines.append(
            (
                "spends",
                f"epsilon {privacy['epsilon']:.4g} at delta {privacy['delta']:.2g} of each node's data; "
                f"protects one {privacy['unit']} (trust {privacy['trust']}, noise multiplier "
                f"{privacy['noise_multiplier']:.4g})",
            )
        )
    elif privacy is not None:
        lines.append(("spends", f"nothing is protected (trust {privacy['trust']}): epsilon is infinite"))
    lines += [("note", note) for note in found["cautions"]]
    width = max(len(name) for name, _ in lines)
    said = [f"{name:<{width}}  {value}" for name, value in lines]
    return "\n".join([*said, "", "Nothing was trained, charged, written or sent."])


def _listed(counts: Mapping[str, int]) -> str:
    shown = [f"{_one_line(name)} {count}" for name, count in list(counts.items())[:_MOST_SHOWN]]
    return ", ".join(shown) + (f" and {len(counts) - _MOST_SHOWN} more" if len(counts) > _MOST_SHOWN else "")


def _one_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)
