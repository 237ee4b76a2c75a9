"""Encoder, adapters, the packed vector, and what a saved adapter gives when PEFT loads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModel

from fedtune.config.schema import AdapterConfig, ModelConfig
from fedtune.errors import ModelError, ResourceError
from fedtune.models.adapters import ADAPTERS
from fedtune.models.classifier import (
    LENGTH,
    AdaptedModel,
    forget_models,
    load_base,
    load_model,
    load_saved,
)
from fedtune.models.encoder import load_encoder, load_tokenizer, select_device
from tests.support.golden import Golden

MINILM = "embedded:minilm"


def load(folder: Path | str, quantization: str = "none", seed: int = 0, **adapter: object):  # type: ignore[no-untyped-def]
    adapter.setdefault("rank", 2)
    adapter.setdefault("name", "lora")
    return load_model(
        ModelConfig(name=str(folder), quantization=quantization),
        AdapterConfig(**adapter),
        2,
        seed,
        "cpu",
        ("no", "yes"),
    )


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_stack_equals_the_library_model(families: dict[str, Path], family: str) -> None:
    stack = load_encoder(ModelConfig(name=str(families[family]), quantization="none"), torch.device("cpu"))
    reference = AutoModel.from_pretrained(families[family]).eval()
    ids = torch.randint(5, 25, (3, 9))
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[1, 6:] = mask[2, 4:] = False
    ids[~mask] = reference.config.pad_token_id
    want = reference(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    got = stack.run(stack.embed(ids, mask), mask, 0, len(stack.layer))
    assert torch.allclose(got[mask], want[mask], atol=1e-5)


def test_segments_of_a_pair(families: dict[str, Path]) -> None:
    reference = AutoModel.from_pretrained(families["bert"]).eval()
    settings = ModelConfig(name=str(families["bert"]), quantization="none")
    stack = load_encoder(settings, torch.device("cpu"), pairs=True)
    ids = torch.tensor([[2, 7, 3, 8, 9, 3, 0]])
    mask = ids != 0
    want = reference.embeddings(ids, token_type_ids=torch.tensor([[0, 0, 0, 1, 1, 1, 0]]))
    assert torch.equal(stack.embed(ids, mask), want)
    assert stack.separator == 3  # from the tokenizer: a BERT's configuration does not name it
    single = load_encoder(settings, torch.device("cpu"))  # a text that holds the separator is one text still
    want = reference.embeddings(ids, token_type_ids=torch.zeros_like(ids))
    assert torch.equal(single.embed(ids, mask), want)


def test_an_early_bert_that_does_not_say_its_kind(families: dict[str, Path], tmp_path: Path) -> None:
    # As prajjwal1/bert-tiny is on the hub: config.json without model_type, vocab.txt, pytorch_model.bin.
    reference = AutoModel.from_pretrained(families["bert"]).eval()
    values = json.loads((families["bert"] / "config.json").read_text())
    kept = ("hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads",
            "num_hidden_layers", "vocab_size", "type_vocab_size")  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({name: values[name] for name in kept}))
    shutil.copy(families["bert"] / "vocab.txt", tmp_path)
    torch.save(reference.state_dict(), tmp_path / "pytorch_model.bin")
    old = ModelConfig(name=str(tmp_path), quantization="none", pickle=True)
    tokenizer, _ = load_tokenizer(old)
    same, _ = load_tokenizer(ModelConfig(name=str(families["bert"]), quantization="none"))
    text = (families["bert"] / "vocab.txt").read_text().split()[6]
    assert tokenizer(text).input_ids == same(text).input_ids
    assert tokenizer.unk_token_id not in tokenizer(text).input_ids
    stack = load_encoder(old, torch.device("cpu"))
    ids = torch.tensor([[2, 7, 8, 3]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    want = reference(input_ids=ids).last_hidden_state
    assert torch.allclose(stack.run(stack.embed(ids, mask), mask, 0, 2), want, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_saved_adapter_gives_the_same_predictions(
    families: dict[str, Path], family: str, adapter: str, tmp_path: Path
) -> None:
    model = load(families[family], quantization="int8", name=adapter)
    model.set_vector(model.initial + np.random.default_rng(0).normal(0, 0.3, model.num_parameters))
    ids = torch.randint(5, 25, (4, 7))
    want = model.base(input_ids=ids)
    model.save(tmp_path)
    untrained = load_base(tmp_path, "cpu")
    before = untrained(input_ids=ids)
    loaded = peft.PeftModel.from_pretrained(untrained, str(tmp_path))
    assert torch.allclose(loaded(input_ids=ids), want, atol=1e-6)
    assert not torch.allclose(before, want, atol=1e-2)


@pytest.mark.slow
def test_what_is_trained() -> None:
    expected = {
        "lora": {"lora_A", "lora_B", "classifier"},
        "ffa_lora": {"lora_B", "classifier"},
        "bitfit": {"bias", "classifier"},
        "head": {"classifier"},
    }
    for adapter, parts in expected.items():
        model = load(MINILM, name=adapter, layers=2 if adapter != "head" else None)
        names = list(model.parameters)
        found = {p for p in ("lora_A", "lora_B", "classifier") if any(p in n for n in names)}
        if any(n.endswith(".bias") and "classifier" not in n for n in names):
            found.add("bias")
        assert found == parts, adapter
        layers = {int(n.split(".layer.")[1].split(".")[0]) for n in names if ".layer." in n}
        assert layers == (set() if adapter == "head" else {4, 5}), adapter
        assert model.first_layer == (6 if adapter == "head" else 4)
    # rank 8, query and value of two layers, A [8, 384] and B [384, 8], and the head
    assert load(MINILM, name="lora", layers=2, rank=8).num_parameters == 2 * 2 * 2 * 8 * 384 + 2 * 384 + 2


def test_vector_is_the_parameters(tiny_bert: Path, golden: Golden) -> None:
    model = load(tiny_bert)
    vector = np.arange(model.num_parameters, dtype=np.float32)
    model.set_vector(vector)
    assert np.array_equal(model.get_vector(), vector)
    flat = np.concatenate([p.detach().numpy().ravel() for p in model.parameters.values()])
    assert np.array_equal(flat, vector)
    assert sum(int(np.prod(shape)) for _, shape in model.layout()) == model.num_parameters
    with pytest.raises(ModelError) as raised:
        model.set_vector(vector[:-1])
    golden(raised)


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), name=st.sampled_from(ADAPTERS))
def test_law_unpacking_what_was_packed_gives_it_back(tiny_bert: Path, seed: int, name: str) -> None:
    """Each parameter is a stretch of the vector, in the order of the layout; nothing is left over."""
    model = load(tiny_bert, name=name)
    vector = np.random.default_rng(seed).normal(size=model.num_parameters).astype(np.float32)
    model.set_vector(vector)
    assert model.get_vector().tobytes() == vector.tobytes()
    parts = [model.parameters[name].detach().numpy() for name, _ in model.layout()]
    assert [part.shape for part in parts] == [shape for _, shape in model.layout()]
    assert np.concatenate([part.ravel() for part in parts]).tobytes() == vector.tobytes()


def test_start_depends_on_the_seed_alone(tiny_bert: Path) -> None:
    first = load(tiny_bert, seed=3).get_vector()
    torch.manual_seed(99)
    load(tiny_bert, seed=4), load(tiny_bert, seed=5)  # push it out of the cache
    assert np.array_equal(load(tiny_bert, seed=3).get_vector(), first)
    assert not np.array_equal(load(tiny_bert, seed=4).get_vector(), first)


def test_seeds_of_a_bare_head_share_the_encoder_and_nothing_else(tiny_bert: Path) -> None:
    first, second = load(tiny_bert, seed=11, name="head"), load(tiny_bert, seed=12, name="head")
    assert first.base.encoder is second.base.encoder and first.base.classifier is not second.base.classifier
    start = second.get_vector()
    first.set_vector(np.ones_like(first.initial))
    assert np.array_equal(second.get_vector(), start)
    ids = torch.tensor([[2, 5, 6, 3]])
    alone = second.peft_model(input_ids=ids)
    assert not np.array_equal(first.peft_model(input_ids=ids).detach(), alone.detach())
    forget_models()
    fresh = load(tiny_bert, seed=12, name="head")
    assert fresh.base.encoder is not second.base.encoder
    assert torch.equal(alone, fresh.peft_model(input_ids=ids))
    assert load(tiny_bert, seed=11).base.encoder is not load(tiny_bert, seed=12).base.encoder


def test_the_head_starts_at_zero_and_sees_every_text_at_one_length(tiny_bert: Path) -> None:
    model = load(tiny_bert, name="head").base
    assert not any(p.any() for p in model.classifier.parameters())
    pooled = torch.randn(5, 32) * torch.tensor([1e-3, 0.1, 1.0, 50.0, 0.0])[:, None]
    seen: list[torch.Tensor] = []
    hook = model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(pooled=pooled), model(pooled=pooled[2:3])
    hook.remove()
    assert torch.allclose(seen[0].norm(dim=1), torch.tensor([LENGTH] * 4 + [0.0]), rtol=1e-6)
    assert torch.equal(seen[0][2:3], seen[1])  # what other texts are in the batch does not matter
    ours = torch.nn.functional.cosine_similarity(seen[0][:4], pooled[:4])
    assert torch.allclose(ours, torch.ones(4))


def test_the_gradient_flows_through_the_scaling(tiny_bert: Path) -> None:
    """By finite differences, in float64; nothing flows back from a vector of zeros, and no NaN."""
    model = load(tiny_bert, name="head").base
    head = torch.randn(2, 32)
    with torch.no_grad():
        model.classifier.weight.copy_(head)
    pooled = torch.stack([torch.randn(32), torch.zeros(32)]).requires_grad_()
    model(pooled=pooled)[:, 0].sum().backward()
    assert pooled.grad is not None and torch.isfinite(pooled.grad).all()
    x, row = pooled.detach()[0].double(), head[0].double()
    eye = 1e-5 * torch.eye(32, dtype=torch.float64)
    ours = [(row @ (LENGTH * v / v.norm())).item() for step in eye for v in (x + step, x - step)]
    want = torch.tensor([(up - down) / 2e-5 for up, down in zip(ours[::2], ours[1::2], strict=True)])
    assert want.abs().max() > 0.1
    assert torch.allclose(pooled.grad[0], want, atol=1e-4)


def with_centre(folder: Path) -> AdaptedModel:
    config = ModelConfig(name=str(folder), quantization="none")
    return load_model(config, AdapterConfig(name="head"), 2, 0, "cpu", ("no", "yes"), centred=True)


def test_a_head_sees_texts_from_the_centre(tiny_bert: Path) -> None:
    model = with_centre(tiny_bert)
    assert list(dict(model.layout()).values()) == [(2, 32), (2,), (32,)]
    assert model.centre_size == 32 and model.heads == (True, True, False)
    vector, pooled = (
        model.get_vector(),
        torch.randn(5, 32) * torch.tensor([1e-3, 0.1, 1.0, 50.0, 0.0])[:, None],
    )
    plain = load(tiny_bert, name="head")
    assert plain.centre_size == 0 and plain.num_parameters == model.num_parameters - 32
    assert torch.equal(model.base.scaled(pooled), plain.base.scaled(pooled))  # at zero: to the last bit
    centre = np.random.default_rng(0).normal(0, 0.1, 32).astype(np.float32)
    vector[-32:] = centre
    model.set_vector(vector)
    unit = pooled[:4].double() / pooled[:4].double().norm(dim=1, keepdim=True)
    around = unit - torch.from_numpy(centre).double()
    want = LENGTH * around / around.norm(dim=1, keepdim=True)
    got = model.base.scaled(pooled)
    assert torch.allclose(got[:4].double(), want, atol=1e-5) and not got[4].any()
    assert not any(p.requires_grad for p in model.centre.values())


def test_a_centre_is_saved_and_read_with_the_head(tiny_bert: Path, tmp_path: Path) -> None:
    model = with_centre(tiny_bert)
    model.set_vector(np.random.default_rng(0).normal(0, 0.3, model.num_parameters))
    ids = torch.randint(5, 25, (4, 7))
    want = model.base(input_ids=ids)
    model.save(tmp_path / "new")
    for loaded in (
        load_saved(tmp_path / "new", "cpu"),
        peft.PeftModel.from_pretrained(load_base(tmp_path / "new", "cpu"), str(tmp_path / "new")),
    ):
        assert torch.allclose(loaded(input_ids=ids), want, atol=1e-6)
    vector = model.get_vector()
    vector[-32:] = 0.0
    model.set_vector(vector)
    assert not torch.allclose(model.base(input_ids=ids), want, atol=1e-3)


def test_an_adapter_without_a_centre_has_none_when_it_is_read(tiny_bert: Path, tmp_path: Path) -> None:
    """As earlier versions saved one."""
    old = load(tiny_bert, name="head")
    old.set_vector(np.random.default_rng(0).normal(0, 0.3, old.num_parameters))
    ids = torch.randint(5, 25, (4, 7))
    want = old.base(input_ids=ids)
    old.save(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["classifier"]
    assert torch.allclose(load_saved(tmp_path, "cpu")(input_ids=ids), want, atol=1e-6)


def test_an_adapter_of_an_earlier_version_loads_as_it_was_trained(tiny_bert: Path, tmp_path: Path) -> None:
    options = {"name": str(tiny_bert), "quantization": "none"}
    old = load_model(ModelConfig(**options, normalize=False), AdapterConfig(name="lora", rank=2), 2, 0, "cpu",
                     ("no", "yes"))  # fmt: skip
    old.set_vector(old.initial + np.random.default_rng(0).normal(0, 0.3, old.num_parameters))
    ids = torch.randint(5, 25, (4, 7))
    want = old.base(input_ids=ids)
    old.save(tmp_path)
    base = json.loads((tmp_path / "fedtune.json").read_text())
    assert base["model"].pop("normalize") is False  # earlier versions did not know it
    (tmp_path / "fedtune.json").write_text(json.dumps(base))
    loaded = load_saved(tmp_path, "cpu")
    assert torch.allclose(loaded(input_ids=ids), want, atol=1e-6)


def test_a_kept_model_is_handed_out_at_its_start(tiny_bert: Path) -> None:
    model = load(tiny_bert)
    model.set_vector(model.initial + 1)
    assert load(tiny_bert) is model
    assert np.array_equal(model.get_vector(), model.initial)


@pytest.mark.slow
@pytest.mark.parametrize(("quantization", "most"), [("int8", 0.30), ("nf4", 0.20)])
def test_embedded_model_is_as_small_as_claimed(quantization: str, most: float) -> None:
    full = load(MINILM, name="head").encoder_bytes
    assert full == pytest.approx(4 * 22.57e6, rel=0.01)
    assert load(MINILM, quantization, name="head").encoder_bytes <= most * full


@pytest.mark.parametrize(
    ("model", "adapter", "words"),
    [
        ({"name": "embedded:nothing"}, {}, "embedded:minilm"),
        ({"name": "./no/such/folder"}, {}, "no such folder"),
        ({"pooling": "max"}, {}, "mean or cls"),
        ({"quantization": "int3"}, {}, "none, int8, nf4"),
        ({}, {"name": "prefix"}, "lora, ffa_lora, bitfit, head"),
        ({}, {"layers": 3}, "has 2 layers"),
        ({}, {"layers": 0}, "has 2 layers"),
        ({}, {"target_modules": ["q_proj"]}, "q_proj.*query"),
    ],
)
def test_bad_settings_are_explained(
    tiny_bert: Path, model: dict[str, str], adapter: dict[str, object], words: str
) -> None:
    options = {"name": str(tiny_bert), "quantization": "none"} | model
    with pytest.raises(ModelError, match=words):
        load_model(ModelConfig(**options), AdapterConfig(**({"name": "lora"} | adapter)), 2, 0, "cpu")


def test_hub_name_without_network_says_what_to_do(golden: Golden) -> None:
    with pytest.raises(ResourceError) as raised:
        load_tokenizer(ModelConfig(name="google-bert/bert-base-uncased"))
    golden(raised)


def test_folder_without_a_model(tmp_path: Path, golden: Golden) -> None:
    with pytest.raises((ModelError, ResourceError), match="has no config.json"):
        load_encoder(ModelConfig(name=str(tmp_path)), torch.device("cpu"))
    with pytest.raises(ModelError) as raised:
        load_base(tmp_path)
    golden(raised)


def test_devices(golden: Golden) -> None:
    assert select_device("cpu").type == "cpu"
    with pytest.raises(ResourceError) as raised:
        select_device("tpu")
    golden(raised)
    if not torch.cuda.is_available():
        with pytest.raises(ResourceError) as raised:
            select_device("cuda")
        golden(raised)


def test_another_architecture_is_refused(tmp_path: Path, golden: Golden) -> None:
    from transformers import GPT2Config, GPT2Model

    GPT2Model(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    with pytest.raises(ModelError) as raised:
        load_encoder(ModelConfig(name=str(tmp_path)), torch.device("cpu"))
    golden(raised)
