"""The clipped sum against a slow reference, against Opacus' own optimizer, and at its edges."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fedtune.data.corpus import Shard
from fedtune.models.classifier import AdaptedModel
from fedtune.models.hidden_states import Features
from fedtune.privacy.plan import PrivacyPlan
from fedtune.training.dp_step import clipped_sum, per_example_gradients
from tests.training.conftest import load, make_plan, make_shard

ADAPTERS = [
    {"name": "lora"},
    {"name": "ffa_lora"},
    {"name": "bitfit"},
    {"name": "head"},
    {"name": "lora", "layers": 1},
]


def one_at_a_time(model: AdaptedModel, shard: Shard, record: int) -> torch.Tensor:
    """One example's gradient, by autograd alone, from its tokens alone: no batch, no padding, no hooks."""
    ids = torch.from_numpy(shard.data.tokens(record).astype(np.int64))[None]
    loss = nn.functional.cross_entropy(model.base(input_ids=ids), torch.tensor([shard.data.labels[record]]))
    gradients = torch.autograd.grad(loss, list(model.parameters.values()))
    return torch.cat([g.reshape(-1) for g in gradients]).double()


def reference(model: AdaptedModel, shard: Shard, groups: list[list[int]], clip: float) -> np.ndarray:
    total = torch.zeros(model.num_parameters, dtype=torch.float64)
    for members in groups:
        gradient = sum(one_at_a_time(model, shard, r) for r in members)
        assert isinstance(gradient, torch.Tensor)
        total += gradient * min(1.0, clip / float(gradient.norm()))
    return total.numpy()


def compute(
    model: AdaptedModel, shard: Shard, records: list[int], plan: PrivacyPlan, units: list[int] | None = None
) -> np.ndarray:
    features = Features.of(model, shard.data, 64)
    with per_example_gradients(model):
        return clipped_sum(
            model,
            features,
            np.array(records, dtype=np.int64),
            None if units is None else np.array(units, dtype=np.int64),
            plan,
            micro_batch_tokens=64,
            precision="fp32",
        )


def near(got: np.ndarray, want: np.ndarray, tolerance: float = 1e-4) -> bool:
    return bool(np.abs(got - want).max() <= tolerance * max(1e-9, np.abs(want).max()))


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("clip", [0.05, 1e6])
def test_equals_one_example_at_a_time(tiny_bert: Path, adapter: dict[str, object], clip: float) -> None:
    model, shard = load(tiny_bert, **adapter), make_shard()
    got = compute(model, shard, list(range(12)), make_plan(max_grad_norm=clip))
    # Kept outputs of frozen layers are float16.
    tolerance = 5e-3 if model.first_layer else 1e-4
    assert near(got, reference(model, shard, [[r] for r in range(12)], clip), tolerance)


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_equals_one_at_a_time_when_quantized(tiny_bert: Path, quantization: str) -> None:
    for name in ("lora", "bitfit"):
        model, shard = load(tiny_bert, quantization=quantization, name=name), make_shard()
        got = compute(model, shard, list(range(12)), make_plan(max_grad_norm=0.05))
        assert near(got, reference(model, shard, [[r] for r in range(12)], 0.05), 1e-3)


def test_person_is_clipped_as_a_whole(tiny_bert: Path) -> None:
    model, shard = load(tiny_bert), make_shard(12, persons=3)
    groups = [[r for r in range(12) if r % 3 == p] for p in range(3)]
    records = [r for members in groups for r in members]
    got = compute(
        model, shard, records, make_plan(unit="person", max_grad_norm=0.05), [r % 3 for r in records]
    )
    assert near(got, reference(model, shard, groups, 0.05))
    # The mutant clips each record: it must be told apart.
    assert not near(compute(model, shard, records, make_plan(max_grad_norm=0.05)), got, 0.1)


def test_more_persons_than_a_block(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, shard = load(tiny_bert), make_shard(12, persons=5)
    records = list(range(12))
    plan, units = make_plan(unit="person", max_grad_norm=0.05), [r % 5 for r in range(12)]
    whole = compute(model, shard, records, plan, units)
    monkeypatch.setattr("fedtune.training.dp_step._BLOCK", 2)
    assert near(compute(model, shard, records, plan, units), whole, 1e-5)


def test_equals_opacus_own_optimizer(tiny_bert: Path) -> None:
    """Independent implementation: Opacus' DPOptimizer clips and accumulates the same batch."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model, shard, clip = load(tiny_bert), make_shard(), 0.05
    mine = compute(model, shard, list(range(12)), make_plan(max_grad_norm=clip))
    wrapped = GradSampleModule(model.base, loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(list(model.parameters.values()), lr=0.1),
        noise_multiplier=0.0, max_grad_norm=clip, expected_batch_size=1, loss_reduction="sum",
    )  # fmt: skip
    features = Features.of(model, shard.data, 64)
    inputs = features.inputs(np.arange(12), 12, 16, model.device)
    target = torch.from_numpy(shard.data.labels)
    nn.functional.cross_entropy(wrapped(**inputs), target, reduction="sum").backward()
    optimizer.clip_and_accumulate()
    theirs = torch.cat([p.summed_grad.reshape(-1) for p in model.parameters.values()]).numpy()
    wrapped._close()
    for parameter in model.parameters.values():
        parameter.grad = None
    assert near(mine, theirs)


def test_one_record_changes_the_sum_by_at_most_the_clip(tiny_bert: Path) -> None:
    model, shard = load(tiny_bert, spread=3.0), make_shard()
    plan = make_plan(max_grad_norm=0.05)
    everyone = compute(model, shard, list(range(12)), plan)
    changes = [
        float(np.linalg.norm(everyone - compute(model, shard, [r for r in range(12) if r != out], plan)))
        for out in range(12)
    ]
    assert max(changes) <= 0.05 * (1 + 1e-5)
    assert max(changes) > 0.049  # the bound is met, so a larger clip would be noticed


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_broken_example_contributes_nothing(tiny_bert: Path, poison: float) -> None:
    model, shard = load(tiny_bert), make_shard()
    table = model.base.encoder.embeddings.word_embeddings.weight
    token = int(shard.data.tokens(4)[1])
    hit = [r for r in range(12) if token in shard.data.tokens(r)]
    healthy = [r for r in range(12) if r not in hit]
    assert hit
    assert healthy
    kept = table[token].clone()
    want = compute(model, shard, healthy, make_plan())
    try:
        with torch.no_grad():
            table[token] = poison
        got = compute(model, shard, list(range(12)), make_plan())
    finally:
        with torch.no_grad():
            table[token] = kept
    assert np.isfinite(got).all()
    assert near(got, want)


def test_empty_batch_gives_zeros(tiny_bert: Path) -> None:
    model, shard = load(tiny_bert), make_shard(12, persons=3)
    for units in (None, []):
        total = compute(model, shard, [], make_plan(unit="record" if units is None else "person"), units)
        assert total.shape == (model.num_parameters,)
        assert not total.any()


def test_hooks_are_gone_afterwards(tiny_bert: Path) -> None:
    model, shard = load(tiny_bert), make_shard()
    for _ in range(2):  # hooks that stayed would be refused the second time
        compute(model, shard, [0, 1], make_plan())
    assert not any(hasattr(p, "grad_sample") for p in model.parameters.values())
    model.base(input_ids=torch.tensor([[2, 5, 3]])).sum().backward()
    assert not any(hasattr(p, "grad_sample") for p in model.parameters.values())
    for parameter in model.parameters.values():
        parameter.grad = None
