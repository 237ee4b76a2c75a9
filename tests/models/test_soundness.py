"""A model folder is what it says, or is refused by name: nothing is made up, run, or hinted at that is "
"unsafe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, RobertaConfig

from fedtune.config.schema import ModelConfig
from fedtune.errors import ModelError
from fedtune.models.classifier import load_base
from fedtune.models.encoder import EncoderStack, load_encoder, load_tokenizer
from fedtune.models.soundness import computation_of
from tests.models.test_classifier import load as load_adapted

Weights = dict[str, torch.Tensor]


@pytest.fixture
def folder(tiny_bert: Path, tmp_path: Path) -> Path:
    """A copy of the tiny BERT, to be spoilt."""
    return Path(shutil.copytree(tiny_bert, tmp_path / "model"))


def opened(folder: Path, **more: Any) -> EncoderStack:
    return load_encoder(ModelConfig(name=str(folder), quantization="none", **more), torch.device("cpu"))


def change_weights(folder: Path, change: Callable[[Weights], Weights]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refusal(folder: Path, **more: Any) -> str:
    with pytest.raises(ModelError) as raised:
        opened(folder, **more)
    text = str(raised.value)
    assert "\n" not in text
    for unsafe in ("trust_remote_code", "weights_only", "ignore_mismatched"):
        assert unsafe not in text
    return text


@pytest.mark.parametrize("prefix", ["module.", "bert.", "base_model.model.", "0.auto_model.", "module.bert."])
def test_weights_under_a_prefix_are_found_and_that_is_said(
    tiny_bert: Path, folder: Path, prefix: str
) -> None:
    change_weights(folder, lambda weights: {prefix + name: value for name, value in weights.items()})
    stack, plain = opened(folder), opened(tiny_bert)
    assert stack.digest == plain.digest
    if prefix != "bert.":  # transformers' own, which needs no words
        assert f"named {prefix}NAME" in stack.notes[0]


def test_names_of_a_norm_in_early_berts_are_found_under_a_prefix(tiny_bert: Path, folder: Path) -> None:
    def early(weights: Weights) -> Weights:
        names = {
            name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            )
            for name in weights
        }
        return {"module." + names[name]: value for name, value in weights.items()}

    change_weights(folder, early)
    assert opened(folder).digest == opened(tiny_bert).digest


def test_two_encoders_in_one_file_are_not_chosen_from(folder: Path) -> None:
    change_weights(
        folder, lambda w: {p + n: v.clone() for p in ("question.", "context.") for n, v in w.items()}
    )
    text = refusal(folder)
    assert "would be random" in text and "context.embeddings" in text


def test_43_weights_of_other_names_are_no_random_encoder(folder: Path) -> None:
    change_weights(folder, lambda w: {n.replace("encoder.layer.", "blocks."): v for n, v in w.items()})
    assert "lacks 32 weights" in refusal(folder)


def test_missing_weights_are_named_and_counted(folder: Path) -> None:
    change_weights(folder, lambda w: {n: v for n, v in w.items() if "layer.1." not in n})
    text = refusal(folder)
    assert "lacks 16 weights" in text and "encoder.layer.1.attention" in text and "and 13 more" in text


def test_a_layer_that_the_configuration_leaves_out_is_not_dropped(folder: Path) -> None:
    change_config(folder, num_hidden_layers=1)
    assert "16 weights of an encoder that config.json does not speak of" in refusal(folder)


def test_heads_of_other_tasks_and_the_pooler_do_not_matter(tiny_bert: Path, folder: Path) -> None:
    def other_task(weights: Weights) -> Weights:
        kept = {f"bert.{n}": v for n, v in weights.items() if "pooler" not in n}
        return kept | {"cls.predictions.bias": torch.zeros(25), "classifier.weight": torch.zeros(3, 32)}

    change_weights(folder, other_task)
    assert opened(folder).digest == opened(tiny_bert).digest


@pytest.mark.parametrize(
    "changed", [{"hidden_act": "relu"}, {"num_attention_heads": 4}, {"layer_norm_eps": 1e-5}]
)
def test_what_is_computed_otherwise_with_the_same_weights_has_another_digest(
    tiny_bert: Path, folder: Path, changed: dict[str, Any]
) -> None:
    change_config(folder, **changed)
    assert opened(folder).digest != opened(tiny_bert).digest
    one, other = load_adapted(folder, layers=1), load_adapted(tiny_bert, layers=1)
    assert one.frozen_digest != other.frozen_digest


def test_a_plain_berts_digest_is_of_its_weights_and_tokenizer_alone() -> None:
    assert computation_of(BertConfig()) == "" and computation_of(RobertaConfig()) != ""


def test_whole_numbers_are_no_weights(folder: Path) -> None:
    change_weights(folder, lambda weights: {name: held.to(torch.int8) for name, held in weights.items()})
    assert "is stored compressed: 37 of its weights are whole numbers" in refusal(folder)


def test_a_table_that_was_never_filled(folder: Path) -> None:
    change_weights(folder, lambda weights: {name: torch.zeros_like(held) for name, held in weights.items()})
    assert "zeros for all of its embeddings of words" in refusal(folder)


def test_a_tokenizer_that_is_cut_off_is_named_as_such(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:200])
    assert "The tokenizer of the model" in refusal(folder) and "tokenizer.json or what is" in refusal(folder)


def test_a_size_that_does_not_fit_is_named_with_both(folder: Path) -> None:
    change_config(folder, intermediate_size=48)
    text = refusal(folder)
    assert "[64, 32] in the file and [48, 32] by config.json" in text or "[64] in the file and [48]" in text
    assert "more weights do not" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(folder: Path, value: float) -> None:
    def spoil(weights: Weights) -> Weights:
        weights["encoder.layer.0.output.dense.bias"][3] = value
        return weights

    change_weights(folder, spoil)
    assert "in 1 of its weights: encoder.layer.0.output.dense.bias" in refusal(folder)


@pytest.mark.parametrize("key", ["is_decoder", "add_cross_attention"])
def test_a_decoder_is_refused(folder: Path, key: str) -> None:
    change_config(folder, **{key: True})
    assert f"{key}=true" in refusal(folder)


def test_code_of_a_model_is_not_run(folder: Path, tmp_path: Path) -> None:
    change_config(folder, model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModel": "own.Own"})
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert "code of its own, which fedtune does not run" in refusal(folder)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_is_read_only_where_it_is_asked_for(tiny_bert: Path, folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "model.pickle=true" in refusal(folder)
    assert opened(folder, pickle=True).digest == opened(tiny_bert).digest


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 90868376\n"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_pointer_is_named(folder: Path, name: str) -> None:
    (folder / name).write_text(POINTER)
    text = refusal(folder)
    assert name in text and "git lfs pull" in text


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        (0, "is empty (0 bytes)"),
        (5, "is cut off"),
        (300, "is cut off"),
        (-1, "has 84335 bytes, and its header speaks of 84336"),
    ],
)
def test_weights_that_are_not_whole(folder: Path, cut: int, words: str) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    assert words in refusal(folder)


def test_a_shard_that_is_missing_is_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert "lacks 1 of the 2 files of its weights: model-00002-of-00002.safetensors" in refusal(folder)
    for content in ("[]", '{"weight_map": {"embeddings": 1}}'):
        (folder / "model.safetensors.index.json").write_text(content)
        assert "no list of the weights' files" in refusal(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_configuration_that_is_none(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    assert "config.json" in refusal(folder)


def test_an_adapters_folder_is_no_model(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")
    assert "holds an adapter" in refusal(folder)


def test_a_folder_without_a_tokenizer_is_refused_before_texts_are_read(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        (folder / name).unlink()
    with pytest.raises(ModelError, match="has no tokenizer: neither tokenizer.json"):
        load_tokenizer(ModelConfig(name=str(folder)))


def test_a_tokenizer_without_words_is_refused(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    with pytest.raises(ModelError, match="knows no words, only 5 special tokens"):
        load_tokenizer(ModelConfig(name=str(folder)))


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder: Path) -> None:
    tokenizer, _ = load_tokenizer(ModelConfig(name=str(folder)))
    copied = folder.parent / "larger"
    shutil.copytree(folder, copied)
    tokenizer.add_tokens(["superb", "terrible"])
    tokenizer.save_pretrained(copied)
    with pytest.raises(
        ModelError, match="has 27 tokens, and the encoder has embeddings for 25: superb, terrible"
    ):
        load_tokenizer(ModelConfig(name=str(copied)))


def test_an_adapter_refuses_another_encoder_than_its_own(folder: Path, tmp_path: Path) -> None:
    load_adapted(folder).save(tmp_path / "adapter")
    load_base(tmp_path / "adapter", "cpu")
    change_weights(folder, lambda w: {n: v + 1e-3 for n, v in w.items()})
    with pytest.raises(ModelError, match="was trained on another encoder"):
        load_base(tmp_path / "adapter", "cpu")


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_a_quantized_encoder_does_not_hold_its_file(folder: Path, quantization: str) -> None:
    stack = load_encoder(ModelConfig(name=str(folder), quantization=quantization), torch.device("cpu"))
    assert str(folder / "model.safetensors") not in Path("/proc/self/maps").read_text()
    assert len(list(stack.parameters())) > 0


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"layer_norm_eps": float("nan")}, "makes NaN or infinity of a text"),
        ({"layer_norm_eps": 1e30}, "makes the same of every text"),
    ],
)
def test_what_an_encoder_computes_is_looked_at_before_it_is_trusted(
    folder: Path, changed: dict[str, Any], words: str
) -> None:
    change_config(folder, **changed)
    assert words in refusal(folder) and "layer_norm_eps" in refusal(folder)


def test_weights_that_are_finite_and_too_large(folder: Path) -> None:
    change_weights(folder, lambda weights: {name: held * 1e30 for name, held in weights.items()})
    assert "makes NaN or infinity of a text, though each of its weights is a number" in refusal(folder)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"pad_token_id": -1}, "pad_token_id=-1, and its tokens are those from 0 to"),
        ({"hidden_act": "nosuch"}, "hidden_act='nosuch', which transformers"),
        ({"hidden_act": None}, "config.json of the model"),
        ({"layer_norm_eps": "1e-12"}, "config.json of the model"),
        ({"id2label": ["a"]}, "config.json of the model"),
        ({"model_type": "my_bert"}, "is of type 'my_bert', and fedtune adapts"),
        ({"model_type": ["bert"]}, "is of type ['bert'], and fedtune adapts"),
    ],
)
def test_a_configuration_that_no_encoder_has_is_named_and_not_the_tokenizer(
    folder: Path, changed: dict[str, Any], words: str
) -> None:
    change_config(folder, **changed)
    assert words in refusal(folder)
    if words == "config.json of the model":  # the tokenizer asks for it first
        text = refused_tokenizer(folder)
        assert words in text and "The tokenizer" not in text


def refused_tokenizer(folder: Path) -> str:
    with pytest.raises(ModelError) as raised:
        load_tokenizer(ModelConfig(name=str(folder), quantization="none"))
    return str(raised.value)


@pytest.mark.parametrize("kind", [torch.bool, torch.complex64])
def test_weights_that_are_no_real_numbers(folder: Path, kind: torch.dtype) -> None:
    change_weights(folder, lambda weights: {name: held.to(kind) for name, held in weights.items()})
    assert "weights, which are real numbers in an encoder" in refusal(folder)


@pytest.mark.parametrize("token", ["[SEP]", "[PAD]", "[UNK]"])
def test_a_list_of_words_without_a_special_token_numbers_no_words(folder: Path, token: str) -> None:
    (folder / "tokenizer.json").unlink()
    path = folder / "vocab.txt"
    path.write_text(path.read_text().replace(f"{token}\n", ""))
    assert f"vocab.txt has no line {token}, which the tokenizer" in refusal(folder)


def test_a_tokenizer_that_fails_at_unknown_words_is_no_bug_of_ours(folder: Path) -> None:
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["vocab"] = {"[PAD]": 0, "good": 1}
    values["added_tokens"] = []
    path.write_text(json.dumps(values))
    assert "fails at a word that it does not know" in refusal(folder)


def test_a_forward_in_chunks_is_one_without(folder: Path, tiny_bert: Path) -> None:
    change_config(folder, chunk_size_feed_forward=7)
    assert opened(folder).digest == opened(tiny_bert).digest
