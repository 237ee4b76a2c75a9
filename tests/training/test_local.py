"""A round of training: what the update is made of, and that it is made of nothing else."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedtune.config.schema import TrainConfig
from fedtune.errors import ConfigError, PreflightError, UpdateRejected
from fedtune.models.frozen_outputs import Features
from fedtune.privacy.mechanisms.noise import Entropy
from fedtune.training.local import Sgd, ShardView, make_optimizer, train_locally
from tests.support.golden import Golden
from tests.training.conftest import load, make_plan, make_shard, open_plan


def with_(train: TrainConfig, **changes: object) -> TrainConfig:
    return dataclasses.replace(train, **changes)


def test_without_privacy_it_is_plain_training(tiny_bert: Path, train: TrainConfig) -> None:
    """No clip, no noise, every record drawn: exactly full-batch SGD, written out here."""
    train = with_(train, sample_rate=1.0, optimizer="sgd", learning_rate=0.3)
    model, shard = load(tiny_bert), make_shard()
    start = model.get_vector()
    result = train_locally(model, shard, open_plan(sample_rate=1.0), start, train, round=1)
    model.set_vector(start)
    for _ in range(2):
        losses = [
            nn.functional.cross_entropy(
                model.base(input_ids=torch.from_numpy(shard.data.tokens(r).astype(np.int64))[None]),
                torch.tensor([shard.data.labels[r]]),
            )
            for r in range(12)
        ]
        gradients = torch.autograd.grad(torch.stack(losses).mean(), list(model.parameters.values()))
        with torch.no_grad():
            model.theta -= 0.3 * torch.cat([g.reshape(-1) for g in gradients])
    want = model.get_vector() - start
    assert np.abs(want).max() > 1e-3
    assert np.allclose(result.update, want, atol=1e-5)
    assert result.steps == 2


def test_seed_decides_without_privacy_and_not_with_it(tiny_bert: Path, train: TrainConfig) -> None:
    model, shard = load(tiny_bert), make_shard()
    start = model.get_vector()

    def update(plan: object, round: int = 1, repetition: int = 0) -> np.ndarray:
        return train_locally(model, shard, plan, start, train, round=round, repetition=repetition).update  # type: ignore[arg-type]

    assert np.array_equal(update(open_plan()), update(open_plan()))
    assert not np.array_equal(update(open_plan()), update(open_plan(), round=2))
    assert not np.array_equal(update(make_plan()), update(make_plan()))
    repeatable = make_plan(reproducible_noise=True)
    assert np.array_equal(update(repeatable), update(repeatable))
    assert not np.array_equal(update(repeatable), update(repeatable, repetition=1))


@pytest.mark.parametrize(("scale", "right"), [(1.0, True), (2 / 3, False), (3 / 2, False)])
def test_with_nobody_drawn_the_update_is_the_noise(
    tiny_bert: Path, train: TrainConfig, scale: float, right: bool
) -> None:
    """An empty batch is still a step: what is left is noise of std sigma C / (q n), no more and no less."""
    train = with_(train, sample_rate=1e-9, local_steps=40, optimizer="sgd", learning_rate=1.0)
    model, shard = load(tiny_bert), make_shard()
    plan = make_plan(sample_rate=1e-9, local_steps=40, noise_multiplier=2.0 * scale, max_grad_norm=0.5)
    update = train_locally(model, shard, plan, model.get_vector(), train, round=1).update.astype(float)
    std = 2.0 * 0.5 / (1e-9 * 12) * math.sqrt(40)
    # Chi-square with P degrees of freedom; four standard deviations.
    z = (np.sum((update / std) ** 2) - len(update)) / math.sqrt(2 * len(update))
    assert bool(abs(z) < 4) is right


def test_divides_by_the_expected_and_not_the_drawn_size(tiny_bert: Path, train: TrainConfig) -> None:
    train = with_(train, sample_rate=1.0, local_steps=1, optimizer="sgd", learning_rate=1.0)
    model, shard = load(tiny_bert), make_shard()
    start = model.get_vector()
    plan = open_plan(sample_rate=1.0, local_steps=1)
    full = train_locally(model, shard, plan, start, train, round=1).update
    declared_double = dataclasses.replace(plan, declared_size=24)
    half = train_locally(model, shard, declared_double, start, train, round=1).update
    assert np.allclose(half * 2, full, atol=1e-6)


def test_fedprox_pulls_to_the_start(tiny_bert: Path, train: TrainConfig) -> None:
    train = with_(train, sample_rate=1.0, local_steps=6, optimizer="sgd", learning_rate=0.2)
    plan = open_plan(sample_rate=1.0, local_steps=6)
    model, shard = load(tiny_bert), make_shard()
    start = model.get_vector()
    free = train_locally(model, shard, plan, start, train, round=1).update
    held = train_locally(model, shard, plan, start, with_(train, proximal_mu=2.0), round=1).update
    assert np.linalg.norm(held) < 0.8 * np.linalg.norm(free)


@pytest.mark.slow
def test_training_lowers_the_loss(tiny_bert: Path, train: TrainConfig) -> None:
    from fedtune.training.evaluation import evaluate

    train = with_(train, sample_rate=0.9, local_steps=30, learning_rate=0.02)
    model, shard = load(tiny_bert), make_shard()
    before = evaluate(model, shard.data, train).loss
    train_locally(
        model, shard, open_plan(sample_rate=0.9, local_steps=30), model.get_vector(), train, round=1
    )
    assert evaluate(model, shard.data, train).loss < 0.7 * before


def test_a_diverged_round_is_refused(tiny_bert: Path, train: TrainConfig, golden: Golden) -> None:
    train = with_(train, optimizer="sgd", learning_rate=1e38, sample_rate=1.0)
    model, shard = load(tiny_bert), make_shard()
    plan = make_plan(sample_rate=1.0, max_grad_norm=100.0)
    with pytest.raises(UpdateRejected) as raised:
        train_locally(model, shard, plan, model.get_vector(), train, round=4)
    golden(raised)


def test_persons_and_their_records(tiny_bert: Path, train: TrainConfig) -> None:
    view = ShardView(load(tiny_bert), make_shard(12, persons=3), "person", train)
    assert view.num_units == 3
    entropy = Entropy.reproducible(0, "node-0", 1, 0)
    records, units = view.records_of(np.array([2, 0]), 8, entropy)
    assert sorted(records[units == 2]) == [2, 5, 8, 11]
    assert sorted(records[units == 0]) == [0, 3, 6, 9]
    several = [view.records_of(np.array([1]), 2, entropy) for _ in range(20)]
    assert all(len(records) == 2 and set(records) <= {1, 4, 7, 10} for records, _ in several)
    assert len({tuple(sorted(records)) for records, _ in several}) > 1  # drawn anew each time
    empty, nobody = view.records_of(np.zeros(0, dtype=np.int64), 2, entropy)
    assert len(empty) == len(nobody) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_sgd_is_torchs_own_to_the_last_bit(momentum: float, decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(770, generator=generator)
    mine, reference = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    steps = Sgd(mine, 0.3, momentum, decay)
    torchs = torch.optim.SGD([reference], lr=0.3, momentum=momentum, weight_decay=decay)
    for _ in range(5):
        mine.grad = torch.randn(770, generator=generator)
        reference.grad = mine.grad.clone()
        steps.step()
        torchs.step()
        assert torch.equal(mine, reference)
    assert not torch.equal(mine, start)


def test_optimizers(train: TrainConfig, golden: Golden) -> None:
    theta = nn.Parameter(torch.zeros(3))
    for name, kind in (("sgd", Sgd), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
        assert type(make_optimizer(theta, with_(train, optimizer=name))) is kind
    with pytest.raises(ConfigError) as raised:
        make_optimizer(theta, with_(train, optimizer="lion"))
    golden(raised)


def test_plan_and_training_must_agree(tiny_bert: Path, train: TrainConfig, golden: Golden) -> None:
    model, shard = load(tiny_bert), make_shard()
    start = model.get_vector()
    for plan in (make_plan(local_steps=3), make_plan(sample_rate=0.4)):
        with pytest.raises(PreflightError) as raised:
            train_locally(model, shard, plan, start, train, round=1)
        golden(raised)
        assert np.array_equal(model.get_vector(), start)


@pytest.mark.parametrize("missing", [False, True], ids=["as it is", "without noise on the mean"])
def test_the_mean_of_the_texts_has_the_noise_of_a_gradient(
    tiny_bert: Path, train: TrainConfig, missing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What round 1 releases, less the mean, is noise of std sigma C / n on every number, the mean's too."""
    train = with_(train, sample_rate=1.0, local_steps=1)
    model, shard = load(tiny_bert, name="head", centred=True), make_shard()
    plan = make_plan(sample_rate=1.0, local_steps=1, noise_multiplier=2.0, max_grad_norm=0.5, centre_rounds=1)
    pooled = Features.of(model, shard.data, 64, precision="fp32")._vectors.astype(float)
    mean = np.zeros(model.num_parameters)
    mean[-32:] = 0.5 * (pooled / np.linalg.norm(pooled, axis=1, keepdims=True)).mean(0)
    if missing:
        real = type(plan).noise
        gone = lambda self, size, entropy: np.r_[real(self, size, entropy)[:-32], np.zeros(32)]  # noqa: E731
        monkeypatch.setattr(type(plan), "noise", gone)
    start = model.get_vector()
    updates = [
        train_locally(model, shard, plan, start, train, round=1, gradients=True).update for _ in range(30)
    ]
    noise = -np.array(updates, dtype=float) - mean
    std = 2.0 * 0.5 / 12
    z = [(np.sum((part / std) ** 2) - part.size) / math.sqrt(2 * part.size) for part in (
        noise[:, :-32], noise[:, -32:]
    )]  # fmt: skip
    assert abs(z[0]) < 4 and (abs(z[1]) < 4) is not missing
    assert abs(noise[:, -32:].mean() / std) < 4 / math.sqrt(30 * 32) or missing
    later = train_locally(model, shard, plan, start, train, round=2, gradients=True).update
    assert np.linalg.norm(-later[-32:] - mean[-32:]) > 0  # a gradient again: nothing but noise there
