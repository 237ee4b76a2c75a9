"""What is cut out is gone, and what stays says what it said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.compress.importance import choose, importance, least_layers
from fedtune.compress.transfer import Inputs
from fedtune.config.schema import AdapterConfig, ModelConfig
from fedtune.errors import ModelError
from fedtune.models import standalone
from fedtune.models.classifier import load_model
from fedtune.models.encoder import load_pretrained
from fedtune.models.modeling_fedtune import layers_of
from fedtune.models.surgery import Kept, anatomy, cut, masked

IDS = torch.tensor([[2, 5, 9, 11, 3, 0], [2, 6, 7, 3, 0, 0], [2, 12, 14, 13, 8, 3]])
MASK = (IDS != 0).long()


def classifier(base: Path, folder: Path) -> Any:
    """A merged model with random numbers in its adapter and head."""
    model = load_model(
        ModelConfig(name=str(base), quantization="none"), AdapterConfig(name="lora", rank=2), 3, 0, "cpu",
        ("a", "b", "c"), centred=True,
    )  # fmt: skip
    noise = torch.randn(model.num_parameters, generator=torch.Generator().manual_seed(1)).numpy()
    model.set_vector(model.get_vector() + 0.2 * noise)
    model.save(folder)
    return standalone.merged(folder)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=IDS, attention_mask=MASK).logits
    return found


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_a_cut_model_says_what_one_with_zeros_there_says_and_loads_again(
    families: dict[str, Path], tmp_path: Path, family: str
) -> None:
    model = classifier(families[family], tmp_path / "adapter")
    whole = anatomy(model)
    assert whole.layers == 2 and whole.head_size * whole.heads[0] == whole.width
    torch.testing.assert_close(logits(cut(model, Kept.all_of(range(whole.layers), whole))), logits(model))
    units = tuple(tuple(range(layer, count, 3)) for layer, count in enumerate(whole.units))
    kept = Kept((0, 1), ((0,), tuple(range(whole.heads[1]))), units)
    small = cut(model, kept)
    with masked(model, len(IDS)) as (heads, of_units), torch.no_grad():
        heads[0][:, 1:] = 0
        for layer in (0, 1):
            of_units[layer][:, [i for i in range(whole.units[layer]) if i not in units[layer]]] = 0
        expected = model(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(logits(small), expected, atol=1e-5, rtol=1e-4)
    assert (logits(small) - logits(model)).abs().max() > 1e-3  # what went had mattered
    assert anatomy(small).heads == (1, whole.heads[1]) and anatomy(small).units == tuple(map(len, units))
    small.save_pretrained(tmp_path / "small")
    torch.testing.assert_close(logits(standalone.load_merged(tmp_path / "small")), logits(small))


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_layers_are_taken_out_and_numbered_anew(
    families: dict[str, Path], tmp_path: Path, family: str
) -> None:
    model = classifier(families[family], tmp_path / "adapter")
    small = cut(model, Kept.all_of([1], anatomy(model)))
    assert anatomy(small).layers == 1 and small.config.encoder.num_hidden_layers == 1
    for mine, its in zip(
        layers_of(small.encoder)[0].parameters(), layers_of(model.encoder)[1].parameters(), strict=True
    ):
        assert torch.equal(mine, its)


def test_a_base_encoder_loses_units_evenly_and_keeps_its_heads(tiny_bert: Path, tmp_path: Path) -> None:
    base = load_pretrained(ModelConfig(name=str(tiny_bert)))
    whole = anatomy(base)
    units = tuple(tuple(range(10)) for _ in whole.units)
    small = cut(base, Kept(tuple(range(whole.layers)), Kept.all_of(range(whole.layers), whole).heads, units))
    small.save_pretrained(tmp_path / "small")
    again = load_pretrained(ModelConfig(name=str(tmp_path / "small")))
    assert again.config.intermediate_size == 10 and anatomy(again).units == (10,) * whole.layers  # type: ignore[union-attr]
    with pytest.raises(ModelError, match="prune heads of a finished run"):
        cut(base, Kept((0,), ((0,),), (tuple(range(10)),)))


def test_what_does_nothing_matters_least(tiny_bert: Path, tmp_path: Path) -> None:
    model = classifier(tiny_bert, tmp_path / "adapter")
    with torch.no_grad():
        layer = layers_of(model.encoder)[1]
        layer.output.dense.weight[:, 3] = 0  # unit 3 of layer 1 goes nowhere
        size = anatomy(model).head_size
        layer.attention.output.dense.weight[:, :size] = 0  # its first head neither
    ids = [row[mask.bool()].tolist() for row, mask in zip(IDS, MASK, strict=True)]
    heads, units = importance(model, ids, Inputs(0), seed=0)
    assert units[1].argmin() == 3 and units[1][3] == 0 and heads[1][0] == 0
    assert all((one > 0).all() for one in (heads[0], units[0], heads[1][1:]))
    assert 3 not in choose(units, 0.02)[1] and 0 not in choose(heads, 0.25)[1]


@pytest.mark.slow
def test_importance_is_the_second_order_of_how_far_answers_move(tiny_bert: Path, tmp_path: Path) -> None:
    """Half of it, times the square of a small step of the mask, is the divergence."""
    model = classifier(tiny_bert, tmp_path / "adapter").double()
    ids = [row[mask.bool()].tolist() for row, mask in zip(IDS, MASK, strict=True)]
    from fedtune.compress import importance as module

    module_draws, module._DRAWS = module._DRAWS, 400
    try:
        _, units = importance(model, ids, Inputs(0), seed=0)
    finally:
        module._DRAWS = module_draws
    unit = int(units[1].argmax())
    before = logits(model).log_softmax(-1)
    step = 1e-3
    with masked(model, len(IDS)) as (_, of_units), torch.no_grad():
        of_units[1][:, unit] = 1 - step
        after = model(input_ids=IDS, attention_mask=MASK).logits.log_softmax(-1)
    divergence = (before.exp() * (before - after)).sum(1).mean()
    assert float(2 * divergence / step**2) == pytest.approx(float(units[1][unit]), rel=0.2)


def test_each_layer_keeps_something_and_the_share_is_that_of_all() -> None:
    found = [torch.tensor([5.0, 6.0, 7.0, 8.0]), torch.tensor([0.1, 0.2, 0.3, 0.4])]
    assert choose(found, 0.0) == ((0, 1, 2, 3), (0, 1, 2, 3))
    assert choose(found, 0.5) == ((1, 2, 3), (3,))
    assert choose(found, 0.99) == ((3,), (3,))
    assert choose(found, 0.5, even=True) == ((2, 3), (2, 3))


def test_the_layer_that_changes_least_goes_first(tiny_bert: Path, tmp_path: Path) -> None:
    model = classifier(tiny_bert, tmp_path / "adapter")
    ids = [row[mask.bool()].tolist() for row, mask in zip(IDS, MASK, strict=True)]
    before = logits(model).log_softmax(-1)
    moved = []
    for layer in (0, 1):
        after = logits(cut(model, Kept.all_of([1 - layer], anatomy(model)))).log_softmax(-1)
        moved.append(float((before.exp() * (before - after)).sum()))
    assert least_layers(model, 1, ids, Inputs(0)) == (1 - moved.index(min(moved)),)
    assert anatomy(model).layers == 2
