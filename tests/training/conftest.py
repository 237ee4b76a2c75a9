"""The tiny model of the models' tests, a shard of made-up records, and plans."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

from fedtune.config.schema import AdapterConfig, ModelConfig, TrainConfig
from fedtune.data.corpus import Shard
from fedtune.models.classifier import AdaptedModel, load_model
from fedtune.models.merged_layers import Seen
from fedtune.privacy.plan import PrivacyPlan
from tests.models.conftest import random_corpus, tiny_bert  # noqa: F401
from tests.support.plans import plan_of


def load(folder: Path, spread: float = 0.2, **options: Any) -> AdaptedModel:
    """The tiny model at a random adapter (LoRA's own start has zero gradients)."""
    quantization = options.pop("quantization", "none")
    options.setdefault("rank", 2)
    options.setdefault("name", "lora")
    centred = options.pop("centred", False)
    model = load_model(
        ModelConfig(name=str(folder), quantization=quantization), AdapterConfig(**options), 2, 0, "cpu",
        centred=centred,
    )  # fmt: skip
    model.set_vector(model.initial + np.random.default_rng(1).normal(0, spread, model.num_parameters))
    return model


def make_shard(n: int = 12, persons: int | None = None) -> Shard:
    data = random_corpus(n, persons=persons)
    size = n if persons is None else persons
    return Shard("node-0", data, size, data.fingerprint, "random", np.arange(n))


def make_plan(**changes: Any) -> PrivacyPlan:
    values: dict[str, Any] = {
        "trust": "local", "unit": "record", "sample_rate": 0.5, "local_steps": 2, "num_rounds": 3,
        "noise_multiplier": 1.0, "max_grad_norm": 0.1, "declared_size": 12, "delta": 1e-3,
    }  # fmt: skip
    return plan_of(**(values | changes))


def open_plan(**changes: Any) -> PrivacyPlan:
    """No privacy: no clip, no noise, seeded sampling."""
    return make_plan(trust="none", noise_multiplier=0.0, max_grad_norm=math.inf, delta=0.0, **changes)


@pytest.fixture
def train() -> TrainConfig:
    return TrainConfig(
        sample_rate=0.5,
        local_steps=2,
        learning_rate=0.05,
        optimizer="adam",
        micro_batch_tokens=64,
        precision="fp32",
    )


def spoil(monkeypatch: pytest.MonkeyPatch, wrong: Callable[[nn.Parameter, Tensor], Tensor]) -> None:
    """Makes a trained parameter's per-example gradients [b, *shape] other ones: Opacus' of linear layers, and
    all those of merged layers."""
    from opacus.grad_sample import GradSampleHooks

    linear, merged = GradSampleHooks.GRAD_SAMPLERS[nn.Linear], Seen.per_example

    def by_opacus(layer: nn.Linear, activations: list[Tensor], backprops: Tensor) -> object:
        return {p: wrong(p, g) for p, g in linear(layer, activations, backprops).items()}

    monkeypatch.setitem(GradSampleHooks.GRAD_SAMPLERS, nn.Linear, by_opacus)
    monkeypatch.setattr(Seen, "per_example", lambda seen, g: [(p, wrong(p, v)) for p, v in merged(seen, g)])
