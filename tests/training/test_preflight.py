"""Each check passes on the right model and fails on the bug that it is there for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedtune.config.schema import AdapterConfig, ModelConfig, TrainConfig
from fedtune.data.corpus import TokenizedCorpus
from fedtune.errors import PreflightError
from fedtune.models import classifier
from fedtune.models.classifier import AdaptedModel, load_model
from fedtune.models.frozen_outputs import Features
from fedtune.models.merged_layers import MergedLayers
from fedtune.privacy.plan import PrivacyPlan
from fedtune.training.example_gradients import check_layers, hooks_for
from fedtune.training.local import train_locally
from fedtune.training.preflight import check_gradients, check_parameters
from tests.support.golden import Golden
from tests.training.conftest import load, make_plan, make_shard, spoil


@pytest.fixture
def model(tiny_bert: Path) -> Iterator[AdaptedModel]:
    """One that a test may spoil: it is not handed out again."""
    classifier._load.cache_clear()
    yield load(tiny_bert)
    classifier._load.cache_clear()


def test_a_right_model_passes(model: AdaptedModel) -> None:
    before = model.get_vector()
    check_layers(model)
    check_parameters(model, nn.Parameter(model.theta))
    check(model, make_shard().data)
    assert np.array_equal(model.get_vector(), before)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(32), nn.InstanceNorm1d(32, affine=True)])
def test_layers_that_mix_examples(model: AdaptedModel, layer: nn.Module, golden: Golden) -> None:
    model.base.encoder.layer[1].intruder = layer
    with pytest.raises(PreflightError) as raised:
        check_layers(model)
    golden(raised)


def test_dropout(model: AdaptedModel, golden: Golden) -> None:
    next(m for m in model.base.modules() if isinstance(m, nn.Dropout)).p = 0.1
    with pytest.raises(PreflightError) as raised:
        check_layers(model)
    golden(raised)


def test_a_parameter_that_is_trained_but_not_noised(model: AdaptedModel, golden: Golden) -> None:
    model.base.encoder.layer[0].output.LayerNorm.weight.requires_grad_(True)
    with pytest.raises(PreflightError) as raised:
        check_parameters(model, nn.Parameter(model.theta))
    golden(raised)


def test_a_frozen_parameter_in_the_norm(model: AdaptedModel, golden: Golden) -> None:
    next(iter(model.parameters.values())).requires_grad_(False)
    with pytest.raises(PreflightError) as raised:
        check_parameters(model, nn.Parameter(model.theta))
    golden(raised)


def test_an_optimizer_over_something_else(model: AdaptedModel, golden: Golden) -> None:
    with pytest.raises(PreflightError) as raised:
        check_parameters(model, nn.Parameter(model.theta.clone()))
    golden(raised)
    with pytest.raises(PreflightError) as raised:
        check_parameters(model, nn.Parameter(model.theta[:-1]))
    golden(raised)


def test_a_model_cast_after_it_was_loaded(model: AdaptedModel, golden: Golden) -> None:
    name, parameter = next(iter(model.parameters.items()))
    parameter.data = parameter.data.clone()
    with pytest.raises(PreflightError) as raised:
        check_parameters(model, nn.Parameter(model.theta))
    golden(raised)
    assert name


def check(model: AdaptedModel, data: TokenizedCorpus) -> None:
    with hooks_for(model, Features.of(model, data, 64)):
        check_gradients(model)


@pytest.fixture(params=["merged", "hooks"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to per-example gradients."""
    if request.param == "hooks":
        monkeypatch.setattr(MergedLayers, "takes", lambda *_: False)
    return str(request.param)


@pytest.mark.parametrize("factor", [0.5, 1.05, 0.0])
def test_a_wrong_gradient_sampler(
    model: AdaptedModel, factor: float, either: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opacus issue 820: an upgrade makes per-example gradients wrong, and nobody notices."""
    spoil(monkeypatch, lambda _, g: factor * g)
    with pytest.raises(PreflightError, match="one at a time differ"):
        check(model, make_shard().data)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["query.lora_A", "query.lora_B", "classifier"])
def test_a_wrong_gradient_of_one_part_at_the_real_start(
    part: str, either: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head starts at zero, and LoRA's gradients are far below the head's: each has its own scale."""
    model = load_model(ModelConfig(quantization="none"), AdapterConfig(name="lora"), 2, 0, "cpu")
    spoilt = [p for name, p in model.parameters.items() if part in name and "bias" not in name][-1]
    check(model, make_shard().data)
    spoil(monkeypatch, lambda p, g: (1.05 if p is spoilt else 1.0) * g)
    with pytest.raises(PreflightError, match="one at a time differ"):
        check(model, make_shard().data)


def test_gradients_mixed_up_between_examples(
    model: AdaptedModel, either: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda _, g: g.roll(1, 0))
    with pytest.raises(PreflightError, match="one at a time differ"):
        check(model, make_shard().data)


@pytest.mark.parametrize("adapter", ["head", "lora"])
def test_44_whether_it_passes_tells_nothing_of_a_record(
    tiny_bert: Path, train: TrainConfig, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that could have it fail where a text has some word would read it, without any noise: here the
    logits of some records are too large for a float, by an adapter that the server chose."""
    classifier._load.cache_clear()
    model, shard = load(tiny_bert, name=adapter), make_shard()
    start, ids = model.initial.copy(), torch.from_numpy(shard.data.tokens(0).astype(np.int64))[None]

    def is_too_large(seed: int) -> bool:
        signs = np.random.default_rng(seed).choice([-3e38, 3e38], int(model.head.sum()))
        start[model.head] = signs.astype(np.float32)
        model.set_vector(start)
        with torch.no_grad():
            return not bool(model.base(input_ids=ids).isfinite().all())

    assert any(map(is_too_large, range(40)))
    seen = []
    inputs = Features.inputs
    monkeypatch.setattr(Features, "inputs", lambda self, *a: (seen.append(self.corpus), inputs(self, *a))[1])
    monkeypatch.setattr(PrivacyPlan, "sample", lambda *_: np.zeros(0, dtype=np.int64))
    result = train_locally(model, shard, make_plan(), start, train, round=1, gradients=True)
    assert np.isfinite(result.update).all() and model.gradients_checked
    assert seen and all(corpus is not shard.data for corpus in seen)
    classifier._load.cache_clear()


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (nn.BatchNorm1d(32), r"encoder.layer.1.intruder.*BatchNorm1d.*mixes the examples.*LayerNorm"),
        (nn.SyncBatchNorm(32), r"encoder.layer.1.intruder.*SyncBatchNorm.*mixes the examples"),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(32, 32)), r"Opacus has no per-example gradients"),
    ],
)
def test_a_layer_that_opacus_refuses_ends_in_a_paragraph(
    model: AdaptedModel, train: TrainConfig, layer: nn.Module, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With weights that are trained Opacus itself refuses it, before any check of ours comes to its turn."""
    monkeypatch.setattr(MergedLayers, "takes", lambda *_: False)
    model.base.encoder.layer[1].intruder = layer
    start = model.get_vector()
    with pytest.raises(PreflightError, match=says) as error:
        train_locally(model, make_shard(), make_plan(), start, train, round=1)
    assert "\n" not in str(error.value)
    assert np.array_equal(model.get_vector(), start)


class Strange(nn.Module):
    """Adds the mean over the batch, in a way that functorch cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.weight if float(hidden.abs().max()) >= 0 else hidden


def test_a_layer_that_opacus_cannot_follow_ends_in_a_paragraph(
    model: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MergedLayers, "takes", lambda *_: False)
    model.base.classifier = nn.Sequential(Strange(), model.base.classifier)
    with pytest.raises(PreflightError, match=r"RuntimeError.*Strange"):
        check(model, make_shard().data)


# --- with a centre -----------------------------------------------------------------------------------


@pytest.fixture
def centred(tiny_bert: Path) -> Iterator[AdaptedModel]:
    classifier._load.cache_clear()
    yield load(tiny_bert, name="head", centred=True)
    classifier._load.cache_clear()


def test_a_centred_head_passes_and_is_compared_at_another_centre(
    centred: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, seen = centred.get_vector(), []
    real = classifier.Centring.forward
    monkeypatch.setattr(
        classifier.Centring, "forward", lambda self, p: (seen.append(self.centre.clone()), real(self, p))[1]
    )
    check_parameters(centred, nn.Parameter(centred.theta))
    check(centred, make_shard().data)
    assert np.array_equal(centred.get_vector(), before)
    assert seen and not any(np.allclose(one.numpy(), before[-32:], atol=1e-3) for one in seen)


def test_a_centre_that_is_trained(centred: AdaptedModel) -> None:
    next(iter(centred.centre.values())).requires_grad_(True)
    with pytest.raises(PreflightError, match="trainable"):
        check_parameters(centred, nn.Parameter(centred.theta))


def test_a_centre_that_is_no_part_of_the_adapter(centred: AdaptedModel) -> None:
    (parameter,) = centred.centre.values()
    parameter.data = parameter.data.clone()
    with pytest.raises(PreflightError, match=r"centring.*no longer a part of the packed adapter"):
        check_parameters(centred, nn.Parameter(centred.theta))


def test_a_wrong_gradient_around_a_centre(centred: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda _, g: 1.05 * g)
    with pytest.raises(PreflightError, match="one at a time differ"):
        check(centred, make_shard().data)
