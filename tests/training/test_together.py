"""Nodes that take their steps together: each gets what it gets alone, whoever the others are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.config.schema import TrainConfig
from fedtune.data.corpus import Shard
from fedtune.errors import PreflightError, UpdateRejected
from fedtune.models.classifier import AdaptedModel
from fedtune.models.frozen_outputs import Features
from fedtune.privacy.mechanisms.noise import Entropy
from fedtune.privacy.plan import PrivacyPlan
from fedtune.training import dp_step, local
from fedtune.training.dp_step import Drawn, head_sums
from fedtune.training.local import LocalResult, train_locally, train_together
from tests.models.conftest import random_corpus
from tests.training.conftest import load, make_plan, make_shard

SIZES = [12, 5, 1, 30]  # records of each node


def shards_of(sizes: Sequence[int] = SIZES, persons: int | None = None) -> list[Shard]:
    """Nodes with texts of their own, the last ones of larger corpora."""
    corpus = random_corpus(sum(sizes), persons=persons)
    parts = np.split(np.arange(corpus.num_records), np.cumsum(sizes)[:-1])
    return [
        Shard(f"node-{i}", corpus.subset(part), len(part), corpus.fingerprint, "random", part)
        for i, part in enumerate(parts)
    ]


def starts_of(model: AdaptedModel, count: int) -> np.ndarray:
    """An adapter for each node, float32 [count, P]."""
    shape = (count, model.num_parameters)
    return np.random.default_rng(5).normal(0, 0.3, shape).astype(np.float32)


def updates(results: Sequence[LocalResult | UpdateRejected]) -> np.ndarray:
    return np.stack([one.update for one in results if isinstance(one, LocalResult)])


VARIANTS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd"},
    "momentum": {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1},
    "adam": {"optimizer": "adam", "label_smoothing": 0.1},
    "proximal": {"optimizer": "adamw", "proximal_mu": 0.5},
    "gradients": {"gradients": True},
    "persons": {"optimizer": "sgd", "persons": 4},
    "head norm": {"optimizer": "sgd", "head_norm": 0.4, "head_share": 0.2},
    "centred": {"optimizer": "sgd", "centred": True},
    "no noise": {"optimizer": "sgd", "open": True},
    "few rows": {"optimizer": "sgd", "rows": 3},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_each_gets_what_it_gets_alone(
    tiny_bert: Path, train: TrainConfig, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    options = dict(VARIANTS[name])
    monkeypatch.setattr(dp_step, "_ROWS", options.pop("rows", 4096))
    model = load(tiny_bert, name="head", centred=options.pop("centred", False))
    persons, gradients = options.pop("persons", None), options.pop("gradients", False)
    changes = {key: options.pop(key) for key in ("head_norm", "head_share") if key in options}
    if options.pop("open", False):
        changes |= {"trust": "none", "noise_multiplier": 0.0, "max_grad_norm": math.inf, "delta": 0.0}
    else:
        changes |= {"reproducible_noise": True}
    steps = 1 if gradients else 3
    plan = make_plan(unit="record" if persons is None else "person", local_steps=steps, **changes)
    train = dataclasses.replace(train, local_steps=steps, **options)
    shards = shards_of(persons=persons)
    starts = starts_of(model, len(shards))
    together = train_together(model, shards, plan, starts, train, round=2, gradients=gradients)
    alone = [
        train_locally(model, shard, plan, start, train, round=2, gradients=gradients)
        for shard, start in zip(shards, starts, strict=True)
    ]
    # To the last bit, but where an optimizer's vectors end in another place.
    np.testing.assert_allclose(updates(together), updates(alone), rtol=1e-5, atol=1e-7)
    assert all(np.abs(one.update).max() > 1e-4 for one in alone)
    other = train_together(model, shards, plan, starts, train, round=3, gradients=gradients)
    assert not np.allclose(updates(other), updates(alone), rtol=1e-2, atol=1e-5)
    assert {one.steps for one in together if isinstance(one, LocalResult)} == {steps}
    flops = sum(one.flops for one in together if isinstance(one, LocalResult))
    assert 0 <= sum(one.flops for one in alone) - flops < len(shards)


def sums(
    model: AdaptedModel, shards: Sequence[Shard], plan: PrivacyPlan, records: Sequence[Sequence[int]]
) -> np.ndarray:
    drawn = [
        Drawn(Features.of(model, shard.data, 64, precision="fp32"), np.array(mine, dtype=np.int64), None)
        for shard, mine in zip(shards, records, strict=True)
    ]
    return head_sums(model, starts_of(model, len(shards)), drawn, plan, 0.0)


@pytest.mark.parametrize("rows", [3, 4096])
def test_a_record_changes_its_nodes_sum_by_at_most_the_clip_and_no_other(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(dp_step, "_ROWS", rows)
    model, shards, plan = load(tiny_bert, name="head"), shards_of(), make_plan(max_grad_norm=0.05)
    everyone = [list(range(size)) for size in SIZES]
    whole = sums(model, shards, plan, everyone)
    changes = []
    for node, size in enumerate(SIZES):
        for out in range(min(size, 4)):
            left = [[r for r in mine if (i, r) != (node, out)] for i, mine in enumerate(everyone)]
            change = whole - sums(model, shards, plan, left)
            changes.append(float(np.linalg.norm(change[node])))
            assert not np.delete(change, node, axis=0).any()  # to the last bit
    assert max(changes) <= 0.05 * (1 + 1e-9)
    assert max(changes) > 0.0499  # the bound is met, so a larger clip would be noticed


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_broken_record_is_nothing_and_reaches_no_other_node(tiny_bert: Path, poison: float) -> None:
    model, shards, plan = load(tiny_bert, name="head"), shards_of(), make_plan()
    everyone = [list(range(size)) for size in SIZES]
    without = sums(model, shards, plan, [everyone[0], [r for r in everyone[1] if r != 3], *everyone[2:]])
    vectors = Features.of(model, shards[1].data, 64, precision="fp32")._vectors
    vectors[3, 7] = poison
    got = sums(model, shards, plan, everyone)
    np.testing.assert_allclose(got, without, rtol=1e-12, atol=1e-15)
    np.testing.assert_array_equal(np.delete(got, 1, axis=0), np.delete(without, 1, axis=0))


@pytest.mark.filterwarnings("ignore:invalid value")
def test_who_diverges_is_refused_alone(tiny_bert: Path, train: TrainConfig) -> None:
    model, shards = load(tiny_bert, name="head"), shards_of()
    plan = make_plan(reproducible_noise=True)
    starts = starts_of(model, len(shards))
    healthy = train_together(model, shards, plan, starts, train, round=4)
    starts[2, 5] = math.inf
    results = train_together(model, shards, plan, starts, train, round=4)
    refused = results.pop(2)
    assert isinstance(refused, UpdateRejected) and "at node 'node-2' diverged in round 4" in str(refused)
    with pytest.raises(UpdateRejected) as alone:
        train_locally(model, shards[2], plan, starts[2], train, round=4)
    assert str(alone.value) == str(refused)
    healthy.pop(2)
    np.testing.assert_array_equal(updates(results), updates(healthy))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many words of 64 bits were asked for, each time."""
    seen, real = list[int](), Entropy.words

    def words(self: Entropy, count: int, purpose: str = "noise") -> Any:
        assert not self.is_reproducible
        seen.append(count)
        return real(self, count, purpose)

    monkeypatch.setattr(Entropy, "words", words)
    return seen


@pytest.mark.parametrize("spoilt", ["", "shared", "repeated", "half"])
def test_each_node_has_noise_of_its_own_in_each_step(
    tiny_bert: Path, train: TrainConfig, asked: list[int], monkeypatch: pytest.MonkeyPatch, spoilt: str
) -> None:
    """With nobody drawn the steps are noise: of the plan's size, and of no two nodes or steps the same."""
    count, steps = 8, 6
    plan = make_plan(sample_rate=1e-9, local_steps=steps, noise_multiplier=2.0, max_grad_norm=0.5)
    train = dataclasses.replace(
        train, sample_rate=1e-9, local_steps=steps, optimizer="sgd", learning_rate=1.0
    )
    model, shards = load(tiny_bert, name="head"), shards_of([4] * count)
    std, seen, real = 2.0 * 0.5, list[np.ndarray](), local._noises
    first: list[np.ndarray] = []

    def noises(plan: PrivacyPlan, size: int, entropies: Any) -> np.ndarray:
        got = real(plan, size, entropies)
        if spoilt == "shared":
            got = np.repeat(got[:1], len(got), axis=0)
        if spoilt == "repeated":
            first.append(got)
            got = first[0]
        if spoilt == "half":
            got = got / 2
        return got

    def average(self: PrivacyPlan, noised: np.ndarray) -> np.ndarray:
        seen.append(noised)
        return averaged(self, noised)

    averaged = PrivacyPlan.average
    monkeypatch.setattr(local, "_noises", noises)
    monkeypatch.setattr(PrivacyPlan, "average", average)
    results = train_together(model, shards, plan, starts_of(model, count), train, round=1)
    of_steps = np.stack(seen, axis=1).reshape(count * steps, -1) / std
    moved = -updates(results) * plan.expected_batch_size() / std / math.sqrt(steps)
    size = of_steps.shape[1]
    right = all(abs((np.square(one).sum() - size) / math.sqrt(2 * size)) < 4.5 for one in (*of_steps, *moved))
    between = of_steps @ of_steps.T / math.sqrt(size)
    independent = np.abs(between[~np.eye(len(between), dtype=bool)]).max() < 5
    assert bool(right and independent) is (not spoilt)
    if not spoilt:
        # Two words a number, and one for each unit that may be drawn.
        assert sum(asked) == count * steps * (2 * size + 4)


def test_each_node_draws_by_itself_in_each_step(
    tiny_bert: Path, train: TrainConfig, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    count, size, steps = 6, 40, 5
    plan = make_plan(sample_rate=0.3, local_steps=steps)
    train = dataclasses.replace(train, sample_rate=0.3, local_steps=steps)
    model, shards = load(tiny_bert, name="head"), shards_of([size] * count)
    drawn: list[set[int]] = []
    real = head_sums

    def noting(model: AdaptedModel, adapters: Any, nodes: Sequence[Drawn], *rest: Any) -> np.ndarray:
        drawn.extend({int(r) for r in one.records} for one in nodes)
        return real(model, adapters, nodes, *rest)

    monkeypatch.setattr(local, "head_sums", noting)
    train_together(model, shards, plan, starts_of(model, count), train, round=1)
    assert len(drawn) == count * steps == len({frozenset(one) for one in drawn})
    total, expected = sum(map(len, drawn)), 0.3 * size * count * steps
    assert abs(total - expected) < 4 * math.sqrt(0.7 * expected)
    both = [len(a & b) for i, a in enumerate(drawn) for b in drawn[:i]]
    assert np.mean(both) == pytest.approx(0.09 * size, rel=0.35)  # four deviations


def test_what_is_no_head_on_kept_outputs_is_not_trained_together(tiny_bert: Path, train: TrainConfig) -> None:
    for model, plan in (
        (load(tiny_bert), make_plan()),
        (load(tiny_bert, name="head", centred=True), make_plan(centre_rounds=1, local_steps=1)),
    ):
        with pytest.raises(PreflightError, match="train heads on kept outputs alone"):
            train_together(model, [make_shard()] * 2, plan, starts_of(model, 2), train, round=1)


def test_they_go_through_preflight(tiny_bert: Path, train: TrainConfig) -> None:
    model, plan = load(tiny_bert, name="head"), make_plan(local_steps=7)
    with pytest.raises(PreflightError, match="accounts for 7 steps"):
        train_together(model, shards_of(), plan, starts_of(model, len(SIZES)), train, round=1)
    model.gradients_checked = False
    train_together(model, shards_of(), make_plan(), starts_of(model, len(SIZES)), train, round=1)
    assert model.gradients_checked
