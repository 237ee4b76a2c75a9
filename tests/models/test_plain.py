"""The short way to a saved model gives what the long one gives, or nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedtune.config.schema import ModelConfig
from fedtune.data.tokenize import encoded
from fedtune.models.adapters import ADAPTERS
from fedtune.models.classifier import load_saved
from fedtune.models.encoder import load_tokenizer
from fedtune.models.plain import load_plain
from tests.support.tiny_federation import save_adapter

TEXTS = ["the film was good", "An AWFUL day [SEP] so sad \u00e9\u4e2d", "and " * 40, "[MASK] xyz", " it "]
OTHERS = ("electra", "roberta", "xlm-roberta", "camembert", "multilingual")


def logits(model: Any, ids: list[list[int]]) -> Tensor:
    longest = max(map(len, ids))
    padded = torch.tensor([one + [0] * (longest - len(one)) for one in ids])
    mask = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in ids])
    with torch.no_grad():
        found: Tensor = model(input_ids=padded, attention_mask=mask)
    return found


def same(folder: Path, base: Path | str) -> None:
    found = load_plain(folder, "cpu")
    assert found is not None
    model, short = found
    long, _ = load_tokenizer(ModelConfig(name=str(base)))
    for length, windows in ((20, 1), (8, 3)):
        ids = encoded(short, TEXTS, None, length, windows)
        assert ids == encoded(long, TEXTS, None, length, windows)
    ids = encoded(short, TEXTS, None, 20)
    wanted = logits(load_saved(folder, "cpu"), ids)
    assert wanted.std(0).min() > 1e-3, "the texts must differ, for something to be compared"
    assert torch.allclose(logits(model, ids), wanted, atol=1e-5)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_each_adapter_and_quantization(
    tiny_bert: Path, tmp_path: Path, adapter: str, quantization: str
) -> None:
    same(save_adapter(tiny_bert, tmp_path, adapter, quantization), tiny_bert)


@pytest.mark.parametrize("family", OTHERS)
def test_each_family_of_its_make(families: dict[str, Path], tmp_path: Path, family: str) -> None:
    same(save_adapter(families[family], tmp_path, "lora", pooling="cls"), families[family])


@pytest.mark.parametrize(("adapter", "quantization"), [("ffa_lora", "int8"), ("lora", "nf4")])
def test_the_default_model(tmp_path: Path, adapter: str, quantization: str) -> None:
    base = "embedded:minilm"
    same(save_adapter(base, tmp_path, adapter, quantization), base)


def spoilt(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "what", ["digest", "pairs", "adapter", "config", "weights", "no tokenizer", "family", "narrow"]
)
def test_what_is_not_as_expected_is_for_the_long_way(
    families: dict[str, Path], tiny_bert: Path, tmp_path: Path, what: str
) -> None:
    base = Path(shutil.copytree(families["distilbert"] if what == "family" else tiny_bert, tmp_path / "base"))
    folder = save_adapter(base, tmp_path / "adapter", "lora", "nf4" if what == "narrow" else "none")
    assert (load_plain(folder, "cpu") is None) == (what in ("family", "narrow"))
    if what in ("digest", "pairs"):
        spoilt(folder / "fedtune.json", **{what: True if what == "pairs" else "0" * 64})
    elif what == "adapter":
        spoilt(folder / "adapter_config.json", use_rslora=True)
    elif what == "config":
        spoilt(base / "config.json", hidden_act="relu")
    elif what == "no tokenizer":
        (base / "tokenizer.json").unlink()
    elif what == "weights":
        weights = load_file(base / "model.safetensors")
        weights["encoder.layer.1.output.dense.bias"][-1] += 1e-6
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert load_plain(folder, "cpu") is None
