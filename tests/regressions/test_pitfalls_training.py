"""Privacy bugs that others have shipped (see PITFALLS), as far as gradients decide them.

`tests/training/test_preflight.py` looks at every check by itself; here the bugs are switched on and a whole
training is asked for, which must not begin.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from fedtune.config.schema import TrainConfig
from fedtune.errors import PreflightError
from fedtune.models import classifier
from fedtune.models.classifier import AdaptedModel
from fedtune.training.local import train_locally
from tests.training.conftest import load, make_plan, make_shard, spoil, tiny_bert, train

__all__ = ["tiny_bert", "train"]


@pytest.fixture
def model(tiny_bert: Path) -> Iterator[AdaptedModel]:
    """One that a test may spoil: it is not handed out again."""
    classifier._load.cache_clear()
    yield load(tiny_bert)
    classifier._load.cache_clear()


def refused(model: AdaptedModel, train: TrainConfig, match: str) -> None:
    before = model.get_vector()
    with pytest.raises(PreflightError, match=match):
        train_locally(model, make_shard(), make_plan(), before, train, round=1)
    assert np.array_equal(model.get_vector(), before)  # nothing was trained


def test_pitfall_12_per_example_gradients_of_lora_that_an_upgrade_made_wrong(
    model: AdaptedModel,
    train: TrainConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil(monkeypatch, lambda _, g: 1.1 * g)
    refused(model, train, "one at a time differ")


def test_pitfall_13_parameters_that_are_trained_and_neither_clipped_nor_noised(
    model: AdaptedModel,
    train: TrainConfig,
) -> None:
    model.base.encoder.layer[0].output.LayerNorm.weight.requires_grad_(True)
    refused(model, train, r"encoder\.layer\.0\.output\.LayerNorm\.weight")


def test_pitfall_13_frozen_parameters_that_count_in_the_norm(
    model: AdaptedModel,
    train: TrainConfig,
) -> None:
    next(iter(model.parameters.values())).requires_grad_(False)
    refused(model, train, "frozen ones")


def test_pitfall_14_layers_that_mix_examples(
    model: AdaptedModel,
    train: TrainConfig,
) -> None:
    # One with weights is refused by Opacus before it comes to that; this one it does not see.
    model.base.encoder.layer[1].intruder = nn.BatchNorm1d(32, affine=False, track_running_stats=False)
    refused(model, train, "mixes the examples")
