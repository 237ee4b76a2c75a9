"""A merged model, and its ONNX files, give the logits of the adapter on its own base, for every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.config.schema import ModelConfig
from fedtune.errors import ModelError
from fedtune.models import standalone
from fedtune.models.adapters import ADAPTERS
from fedtune.models.classifier import load_saved
from fedtune.models.onnx_files import write_fp32, write_int8
from fedtune.models.quantization import dequantize, quantize, stored_bytes
from fedtune.serving.classifier import onnx_forward
from tests.support.tiny_federation import save_adapter


def batch(rows: int = 4, length: int = 9) -> dict[str, torch.Tensor]:
    ids = torch.from_numpy(np.random.default_rng(2).integers(5, 25, (rows, length)))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    mask[2, 2:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(model: Any) -> np.ndarray:
    with torch.inference_mode():
        found = model(**batch())
    return np.asarray(getattr(found, "logits", found))


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_merged_and_bare_adapters_say_the_same(
    families: dict[str, Path], tmp_path: Path, family: str, adapter: str
) -> None:
    folder = save_adapter(families[family], tmp_path / "adapter", adapter)
    expected = logits(load_saved(folder, "cpu"))
    np.testing.assert_allclose(logits(standalone.merged(folder)), expected, atol=2e-5)
    (tmp_path / "bare").mkdir()
    standalone.save_adapter(folder, tmp_path / "bare")
    standalone.save_config(folder, tmp_path / "bare")
    bare = standalone.on_plain_base(tmp_path / "bare", ModelConfig(name=str(families[family])))
    np.testing.assert_allclose(logits(bare), expected, atol=2e-5)
    assert np.ptp(expected) > 0.5  # the adapter does something


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("adapter", ["lora", "bitfit"])
def test_a_compressed_base_is_expanded_to_what_it_stands_for(
    tiny_bert: Path, tmp_path: Path, quantization: str, adapter: str
) -> None:
    folder = save_adapter(tiny_bert, tmp_path / "adapter", adapter, quantization)
    merged = standalone.merged(folder)
    np.testing.assert_allclose(logits(merged), logits(load_saved(folder, "cpu")), atol=2e-5)
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
    plain = save_adapter(tiny_bert, tmp_path / "plain", adapter)
    assert (
        np.abs(logits(merged) - logits(standalone.merged(plain))).max() > 1e-4
    )  # and not to the base itself


@pytest.mark.parametrize(("normalize", "pooling"), [(False, "mean"), (True, "cls"), (False, "cls")])
def test_other_ways_to_a_texts_vector(tiny_bert: Path, tmp_path: Path, normalize: bool, pooling: str) -> None:
    folder = save_adapter(tiny_bert, tmp_path / "adapter", "lora", normalize=normalize, pooling=pooling)
    merged = standalone.merged(folder)
    np.testing.assert_allclose(logits(merged), logits(load_saved(folder, "cpu")), atol=2e-5)
    assert hasattr(merged, "centring") is normalize


def test_a_saved_model_is_read_again(tiny_bert: Path, tmp_path: Path) -> None:
    model = standalone.merged(save_adapter(tiny_bert, tmp_path / "adapter", "lora"))
    model.save_pretrained(tmp_path / "hf")
    assert np.array_equal(logits(standalone.load_merged(tmp_path / "hf")), logits(model))
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"} and model.config.label2id["c"] == 2
    weights = tmp_path / "hf" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="Export the run again"):
        standalone.load_merged(tmp_path / "hf")


def test_a_loss_where_labels_are_given(tiny_bert: Path, tmp_path: Path) -> None:
    model = standalone.merged(save_adapter(tiny_bert, tmp_path / "adapter", "head"))
    labels = torch.tensor([0, 1, 2, 0])
    found = model(**batch(), labels=labels)
    assert found.loss.item() == pytest.approx(torch.nn.functional.cross_entropy(found.logits, labels).item())
    without = model(input_ids=batch()["input_ids"]).logits
    assert without.shape == (4, 3)
    with pytest.raises(ValueError, match="input_ids"):
        model()


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_expanded_layers_are_plain_and_give_the_same(name: str) -> None:
    torch.manual_seed(0)
    layers = torch.nn.ModuleDict({"linear": torch.nn.Linear(128, 64), "table": torch.nn.Embedding(50, 128)})
    quantize(layers, name)
    x, ids = torch.randn(3, 128), torch.arange(50)
    expected = layers["linear"](x), layers["table"](ids)
    small = stored_bytes(layers)
    dequantize(layers)
    assert type(layers["linear"]) is torch.nn.Linear and type(layers["table"]) is torch.nn.Embedding
    assert torch.equal(layers["linear"](x), expected[0]) and torch.equal(layers["table"](ids), expected[1])
    assert stored_bytes(layers) > 3 * small


@pytest.fixture(scope="module")
def onnx_files(families: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """family -> folder with an adapter, model.onnx and int8.onnx."""
    found = {}
    for family, inputs in (("bert", ("input_ids", "token_type_ids", "attention_mask")),
                           ("roberta", ("input_ids", "attention_mask"))):  # fmt: skip
        folder = save_adapter(families[family], tmp_path_factory.mktemp(family), "lora")
        write_fp32(standalone.merged(folder), inputs, folder / "model.onnx")
        write_int8(folder / "model.onnx", folder / "int8.onnx")
        found[family] = folder
    return found


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize(("rows", "length"), [(1, 2), (1, 32), (5, 7)])
def test_onnx_files_take_any_batch(onnx_files: dict[str, Path], family: str, rows: int, length: int) -> None:
    folder = onnx_files[family]
    ids = np.random.default_rng(3).integers(5, 25, (rows, length))
    mask = np.ones_like(ids)
    mask[-1, (length + 1) // 2 :] = 0
    with torch.inference_mode():
        expected = load_saved(folder, "cpu")(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
    np.testing.assert_allclose(onnx_forward(folder / "model.onnx")(ids, mask), expected, atol=1e-4)
    eight = onnx_forward(folder / "int8.onnx")(ids, mask)
    np.testing.assert_allclose(eight, expected, atol=0.05 * np.abs(expected).max())
    assert np.abs(eight - expected).max() > 1e-5


def test_in_int8_a_text_does_not_depend_on_the_others(onnx_files: dict[str, Path]) -> None:
    forward = onnx_forward(onnx_files["bert"] / "int8.onnx")
    ids = np.random.default_rng(4).integers(5, 25, (6, 12))
    mask = np.ones_like(ids)
    mask[0, 4:] = 0
    together = forward(ids, mask)
    np.testing.assert_allclose(forward(ids[:1, :4], mask[:1, :4]), together[:1], atol=1e-5)
    np.testing.assert_allclose(forward(ids[3:4], mask[3:4]), together[3:4], atol=1e-5)


def test_products_and_tables_are_stored_in_eight_bits(onnx_files: dict[str, Path]) -> None:
    import onnx

    def matrices(name: str) -> dict[int, int]:
        found: dict[int, int] = {}
        for one in onnx.load(onnx_files["bert"] / name).graph.initializer:
            if len(one.dims) == 2 and min(one.dims) > 1 and one.name not in ("model.classifier.weight",):
                found[one.data_type] = found.get(one.data_type, 0) + int(np.prod(one.dims))
        return found

    before, after = matrices("model.onnx"), matrices("int8.onnx")
    assert set(before) == {onnx.TensorProto.FLOAT}
    assert after[onnx.TensorProto.INT8] >= 0.98 * before[onnx.TensorProto.FLOAT]
