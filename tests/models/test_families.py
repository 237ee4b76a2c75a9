"""Every family, adapter and quantization: outputs against transformers' own, gradients against autograd's."""

from __future__ import annotations

import copy
import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel

from fedtune.config.schema import AdapterConfig, ModelConfig
from fedtune.errors import ModelError
from fedtune.models.adapters import ADAPTERS
from fedtune.models.classifier import AdaptedModel, load_model
from fedtune.models.encoder import EncoderStack, load_encoder, load_encoder_config, load_tokenizer
from fedtune.models.families import FAMILIES
from fedtune.models.quantization import QUANTIZATIONS, dequantize
from fedtune.models.standalone import merged
from fedtune.training.example_gradients import example_gradients, per_example_gradients

NEW = (
    "mpnet",
    "albert",
    "albert in two groups",
    "modernbert",
    "deberta-v3",
    "deberta-v2",
    "multilingual",
    "small electra",
)
ALL = ("bert", "roberta", "distilbert", "xlm-roberta", "camembert", "electra", *NEW)
# Each adapter and each quantization once a family; what else there is, in the slow suite.
PAIRS = [("lora", "none"), ("ffa_lora", "nf4"), ("bitfit", "int8"), ("head", "none")]


def product() -> list[Any]:
    return [
        pytest.param(*one, marks=[] if one[1:] in PAIRS else pytest.mark.slow)
        for one in itertools.product(NEW, ADAPTERS, QUANTIZATIONS)
    ]


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(5, 12, (4, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(4, 9, dtype=torch.bool)
    mask[1, 6:] = mask[2, 4:] = mask[3, 1:] = False
    return ids, mask


def output(stack: EncoderStack, ids: Tensor, mask: Tensor) -> Tensor:
    return stack.run(stack.embed(ids, mask), mask, 0, len(stack.layer))


def test_the_families_tried_are_all_that_there_are(families: dict[str, Path]) -> None:
    kinds = {load_encoder_config(ModelConfig(name=str(families[name]))).model_type for name in ALL}
    assert kinds == set(FAMILIES)


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_outputs_equal_transformers_own(families: dict[str, Path], family: str, quantization: str) -> None:
    """With the weights of the stack put into transformers' model: its file's, or what integers stand for."""
    settings = ModelConfig(name=str(families[family]), quantization=quantization)
    stack = load_encoder(settings, torch.device("cpu"))
    reference = AutoModel.from_pretrained(families[family], attn_implementation="eager").eval()
    if quantization != "none":
        plain = dequantize(copy.deepcopy(stack)).state_dict()
        names = {stack.family.name_in_transformers(f"encoder.{n}")[len("encoder.") :]: n for n in plain}
        lost = reference.load_state_dict({new: plain[old] for new, old in names.items()}, strict=False)
        assert not lost.unexpected_keys and all("pooler" in name for name in lost.missing_keys)
    ids, mask = batch()
    ids[~mask] = reference.config.pad_token_id
    want = reference(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    assert torch.allclose(output(stack, ids, mask)[mask], want[mask], atol=2e-5)
    # And layers one by one, as they are run around a cache of the lower ones.
    half = len(stack.layer) // 2
    lower = stack.run(stack.embed(ids, mask), mask, 0, half)
    upper = stack.run(lower, mask, half, len(stack.layer))
    assert torch.allclose(upper[mask], want[mask], atol=2e-5)


@pytest.mark.parametrize("family", ALL)
def test_padding_changes_nothing(families: dict[str, Path], family: str) -> None:
    stack = load_encoder(ModelConfig(name=str(families[family]), quantization="none"), torch.device("cpu"))
    ids, mask = batch()
    whole = output(stack, ids, mask)
    alone = output(stack, ids[2:3, :4], torch.ones(1, 4, dtype=torch.bool))
    assert torch.allclose(whole[2, :4], alone[0], atol=1e-5)


def at_random(folder: Path, adapter: str, quantization: str) -> AdaptedModel:
    """At a random adapter: at LoRA's own start most gradients are zero."""
    encoder = ModelConfig(name=str(folder), quantization=quantization)
    model = load_model(encoder, AdapterConfig(name=adapter, rank=2), 2, 0, "cpu", ("no", "yes"))
    spread = np.random.default_rng(1).normal(0, 0.3, model.num_parameters)
    model.set_vector(model.initial + spread.astype(np.float32))
    return model


def of_each(model: AdaptedModel) -> tuple[Tensor, Tensor]:
    """Gradients [3, P] of three records in a batch of four rows, and one by one, without padding."""
    ids, mask = batch()
    target = torch.tensor([0, 1, 1])
    arguments = {"input_ids": ids, "attention_mask": mask}
    layers = model.merged_layers("fp32")
    if layers is not None or model.one_by_one:
        got = example_gradients(model, arguments, target, "fp32", layers, 0.1)
    else:
        with per_example_gradients(model):
            got = example_gradients(model, arguments, target, "fp32", None, 0.1)
    rows = []
    for row in range(3):
        own = ids[row : row + 1, : int(mask[row].sum())]
        loss = nn.functional.cross_entropy(
            model.base(input_ids=own), target[row : row + 1], label_smoothing=0.1
        )
        gradients = torch.autograd.grad(loss, [*model.parameters.values()])
        rows.append(torch.cat([gradient.reshape(-1) for gradient in gradients]))
    return torch.cat(got, 1)[:3], torch.stack(rows)


@pytest.mark.parametrize(("family", "adapter", "quantization"), product())
def test_gradients_of_each_example(
    families: dict[str, Path], family: str, adapter: str, quantization: str
) -> None:
    if family == "modernbert" and adapter == "bitfit":
        with pytest.raises(ModelError, match="layers have none .* Use adapter=lora"):
            at_random(families[family], adapter, quantization)
        return
    model = at_random(families[family], adapter, quantization)
    got, want = of_each(model)
    assert torch.allclose(got, want, atol=1e-5 * float(want.abs().max()), rtol=2e-3)
    assert (want.abs().sum(0) > 0).float().mean() > 0.8  # it is not zeros that agree


def by_hooks(model: AdaptedModel) -> Tensor:
    ids, mask = batch()
    arguments = {"input_ids": ids, "attention_mask": mask}
    with per_example_gradients(model):
        got = example_gradients(model, arguments, torch.tensor([0, 1, 1]), "fp32", None, 0.1)
    return torch.cat(got, 1)[:3]


def test_layers_that_share_their_weights_have_the_sum_of_their_gradients(families: dict[str, Path]) -> None:
    model = at_random(families["albert"], "lora", "none")
    got, _ = of_each(model)
    assert torch.allclose(got, by_hooks(model), atol=1e-5 * float(got.abs().max()), rtol=2e-3)


def test_debertas_gradients_by_hooks_would_be_wrong(
    families: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = at_random(families["deberta-v3"], "lora", "none")
    _, want = of_each(model)
    monkeypatch.setattr(AdaptedModel, "one_by_one", False)
    assert not torch.allclose(by_hooks(model), want, atol=1e-2 * float(want.abs().max()))


@pytest.mark.parametrize("family", NEW)
@pytest.mark.parametrize("adapter", ["lora", "bitfit", "head"])
def test_what_is_saved_is_merged_for_transformers_alone(
    families: dict[str, Path], family: str, adapter: str, tmp_path: Path
) -> None:
    if (family, adapter) == ("modernbert", "bitfit"):
        return
    model = at_random(families[family], adapter, "int8")
    model.save(tmp_path)
    ids, mask = batch()
    plain = merged(tmp_path)
    ids[~mask] = plain.config.encoder.pad_token_id
    with torch.no_grad():
        want = model.base(input_ids=ids, attention_mask=mask)
        got = plain(input_ids=ids, attention_mask=mask.long()).logits
    assert torch.allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_encoder_of_a_file_in_half_precision_is_merged_in_float32(
    families: dict[str, Path], dtype: torch.dtype, tmp_path: Path
) -> None:
    """Its config.json says so of the file; what int8 stands for is rounded once, not twice."""
    AutoModel.from_pretrained(families["bert"]).to(dtype).save_pretrained(tmp_path / "half")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(families["bert"] / file, tmp_path / "half")
    model = at_random(tmp_path / "half", "lora", "int8")
    model.save(tmp_path / "adapter")
    plain = merged(tmp_path / "adapter")
    assert {value.dtype for value in plain.parameters()} == {torch.float32}
    ids, mask = batch()
    with torch.no_grad():
        want = model.base(input_ids=ids, attention_mask=mask)
        got = plain(input_ids=ids, attention_mask=mask.long()).logits
    assert torch.allclose(got, want, atol=1e-4)


def test_a_multilingual_bert_has_its_tokenizers_special_tokens(families: dict[str, Path]) -> None:
    settings = ModelConfig(name=str(families["multilingual"]), quantization="none")
    tokenizer, _ = load_tokenizer(settings)
    ids = tokenizer("the film фильм").input_ids
    assert ids == [0, 4, 5, 6, 2] and tokenizer.pad_token_id == 1  # not BERT's [CLS] and [SEP], nor its 0
    stack = load_encoder(settings, torch.device("cpu"), pairs=True)
    assert stack.separator is None  # it was never trained with segments, though its configuration has two


def test_layers_that_share_their_weights_are_frozen_together(families: dict[str, Path]) -> None:
    settings = ModelConfig(name=str(families["albert"]), quantization="none")
    with pytest.raises(ModelError, match="share their weights"):
        load_model(settings, AdapterConfig(name="lora", layers=2), 2, 0, "cpu")
    assert load_model(settings, AdapterConfig(name="lora", layers=1), 2, 0, "cpu").first_layer == 0
