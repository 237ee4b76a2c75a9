"""Merged layers against transformers' own with PEFT's adapters, family by family; and their gradients."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedtune.config.schema import AdapterConfig, ModelConfig
from fedtune.models import merged_layers
from fedtune.models.adapters import ADAPTERS
from fedtune.models.classifier import AdaptedModel, load_model
from fedtune.models.merged_layers import MergedLayers
from fedtune.training.example_gradients import example_gradients

LINEAR = {
    "bert": ["query", "key", "value", "dense"],
    "distilbert": ["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
}


def load(folder: Path, quantization: str = "none", **adapter: Any) -> AdaptedModel:
    """At a random adapter: at LoRA's own start nothing of it shows."""
    encoder = ModelConfig(name=str(folder), quantization=quantization)
    model = load_model(encoder, AdapterConfig(rank=2, **adapter), 2, 0, "cpu")
    spread = np.random.default_rng(1).normal(0, 0.3, model.num_parameters)
    model.set_vector(model.initial + spread.astype(np.float32))
    return model


def batch() -> tuple[dict[str, Any], Tensor]:
    chance = torch.Generator().manual_seed(3)
    ids, mask = torch.randint(5, 25, (4, 9), generator=chance), torch.ones(4, 9, dtype=torch.bool)
    mask[1, 6:] = mask[2, 4:] = False
    return {"input_ids": ids, "attention_mask": mask}, torch.tensor([0, 1, 1])


def both_ways(model: AdaptedModel, precision: str = "fp32") -> tuple[Tensor, Tensor]:
    """Each example's gradient [3, P] by merged layers, and by autograd alone of the model as it is."""
    arguments, target = batch()
    layers = model.merged_layers(precision)
    assert layers is not None
    got = torch.cat(example_gradients(model, arguments, target, precision, layers, 0.1), 1)[:3]
    rows = []
    for row in range(3):
        alone = {name: values[row : row + 1] for name, values in arguments.items()}
        loss = nn.functional.cross_entropy(model.base(**alone), target[row : row + 1], label_smoothing=0.1)
        rows.append(
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, [*model.parameters.values()])])
        )
    return got, torch.stack(rows)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "camembert", "xlm-roberta"])
@pytest.mark.parametrize("adapter", [name for name in ADAPTERS if name != "head"])
@pytest.mark.parametrize("quantization", ["none", "int8", "nf4"])
def test_outputs_and_gradients_of_every_family(
    families: dict[str, Path], family: str, adapter: str, quantization: str
) -> None:
    model = load(families[family], quantization, name=adapter)
    arguments, _ = batch()
    with torch.no_grad():
        own = model.base(**arguments)
        merged = model.base(**arguments, layers=model.merged_layers("fp32"))
    assert torch.allclose(merged, own, atol=1e-5)
    got, want = both_ways(model)
    assert torch.allclose(got, want, atol=1e-5 * float(want.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("family", LINEAR)
@pytest.mark.parametrize("adapter", ["lora", "ffa_lora"])
@pytest.mark.parametrize("layers", [None, 1])
def test_an_adapter_on_every_linear_layer(
    families: dict[str, Path], family: str, adapter: str, layers: int | None
) -> None:
    model = load(families[family], name=adapter, target_modules=LINEAR[family], layers=layers)
    got, want = both_ways(model)
    assert torch.allclose(got, want, atol=1e-5 * float(want.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("family", LINEAR)
def test_all_linear_is_each_of_them(families: dict[str, Path], family: str) -> None:
    """And nothing outside the layers: no pooler, no head."""
    named = load(families[family], name="lora", target_modules=LINEAR[family])
    every = load(families[family], name="lora", target_modules=["all-linear"])
    trained = [{n for n, p in one.base.named_parameters() if p.requires_grad} for one in (named, every)]
    assert trained[0] == trained[1]
    assert every.num_parameters > load(families[family], name="lora").num_parameters


@pytest.mark.slow
def test_bfloat16_stays_near() -> None:
    model = load(Path("embedded:minilm"), name="lora")
    model.set_vector(model.initial + np.random.default_rng(1).normal(0, 0.02, model.num_parameters))
    got, want = both_ways(model, "bf16")
    assert ((got - want).norm(dim=1) < 0.03 * want.norm(dim=1)).all()
    assert got.dtype == torch.float32


def test_the_adapter_is_the_one_of_the_moment(families: dict[str, Path]) -> None:
    model = load(families["bert"], name="lora")
    arguments, _ = batch()
    before = model.merged_layers("fp32")
    model.set_vector(2 * model.get_vector())
    own, after = model.base(**arguments), model.base(**arguments, layers=model.merged_layers("fp32"))
    assert torch.allclose(after, own, atol=1e-5)
    assert not torch.allclose(model.base(**arguments, layers=before), own, atol=1e-3)


def test_nothing_requires_gradients_unless_it_is_seen(families: dict[str, Path]) -> None:
    model = load(families["bert"], name="lora")
    arguments, _ = batch()
    layers = model.merged_layers("fp32")
    assert layers is not None
    hidden = model.base.encoder.embed(arguments["input_ids"], arguments["attention_mask"])
    assert not layers.run(hidden, arguments["attention_mask"]).requires_grad
    assert layers.run(hidden, arguments["attention_mask"], []).requires_grad


class BertLayer(nn.Module):
    """Bears the name of a layer that is known, and is not it."""


@pytest.mark.parametrize("change", ["decoder", "own"])
def test_layers_of_another_make_run_as_they_are(families: dict[str, Path], change: str) -> None:
    model = load(families["bert"], name="lora")
    last: Any = model.base.encoder.layer[-1]
    try:
        if change == "decoder":
            last.is_decoder = True
        else:
            model.base.encoder.layer[-1] = BertLayer()
        assert model.merged_layers("fp32") is None
        assert (
            MergedLayers.of(model.base.encoder, 0, 1, torch.float32) is not None
        )  # the first is what it was
    finally:
        last.is_decoder = False
        model.base.encoder.layer[-1] = last


def test_a_head_has_no_layers(families: dict[str, Path]) -> None:
    assert load(families["bert"], name="head").merged_layers("fp32") is None


def test_a_wrong_scale_would_be_found(families: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant that the comparison is for: an adapter merged at another scale."""
    right = merged_layers._adapter
    monkeypatch.setattr(
        merged_layers,
        "_adapter",
        lambda linear: (a := right(linear)) and dataclasses.replace(a, scale=1.1 * a.scale),
    )
    got, want = both_ways(load(families["bert"], name="lora"))
    assert not torch.allclose(got, want, atol=1e-3 * float(want.abs().max()), rtol=1e-2)
