"""A head made of the classes' names: what it is where names say something, and that it is zero where not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedtune.config.schema import AdapterConfig, ModelConfig
from fedtune.models.classifier import AdaptedModel, load_model
from fedtune.models.encoder import load_tokenizer
from fedtune.models.name_start import start_by_names, words_of


def loaded(folder: Path, names: tuple[str, ...], adapter: str = "head") -> AdaptedModel:
    return load_model(
        ModelConfig(name=str(folder), quantization="none"), AdapterConfig(name=adapter, rank=2),
        len(names), 0, "cpu", names,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("card_arrival", "lost-card"), ["card arrival", "lost card"]),
        (("0", "1"), None),
        (("good", "1"), None),
        (("a_b", "A-b"), None),
        (("alone",), None),
        ((), None),
    ],
)
def test_names_are_words_or_nothing(names: tuple[str, ...], words: list[str] | None) -> None:
    assert words_of(names) == words


@pytest.mark.parametrize("adapter", ["head", "lora", "ffa_lora", "bitfit"])
def test_a_name_is_its_own_class(world: dict[str, Path], adapter: str) -> None:
    names = ("good_film", "awful_food", "happy_day")
    model = loaded(world["model"], names, adapter)
    tokenizer, _ = load_tokenizer(model.model_config)
    start = start_by_names(model, tokenizer)
    changed = start != model.initial
    assert changed.sum() == 3 * model.base.encoder.width  # the head's weight and nothing else
    rows = start[changed].reshape(3, -1)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 4.0 / 3.0, rtol=1e-5)
    model.set_vector(start)
    for label, name in enumerate(names):
        ids = torch.tensor([tokenizer(name.replace("_", " "))["input_ids"]])
        with torch.no_grad():
            assert int(model.base(input_ids=ids).argmax()) == label


def test_numbers_as_names_start_at_zero(world: dict[str, Path]) -> None:
    model = loaded(world["model"], ("0", "1"))
    np.testing.assert_array_equal(start_by_names(model, load_tokenizer(model.model_config)[0]), model.initial)
