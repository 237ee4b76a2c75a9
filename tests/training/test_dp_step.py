"""The clipped sum against a slow reference, against Opacus' own optimizer, and at its edges."""

from __future__ import annotations

import dataclasses
import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedtune.config.schema import TrainConfig
from fedtune.data.corpus import Shard
from fedtune.errors import PreflightError, PrivacyError
from fedtune.models.classifier import AdaptedModel
from fedtune.models.frozen_outputs import Features
from fedtune.models.merged_layers import MergedLayers
from fedtune.privacy.clipping import Clipping
from fedtune.privacy.mechanisms.discrete import FLOAT_MARGIN
from fedtune.privacy.plan import PrivacyPlan
from fedtune.training import dp_step, example_gradients
from fedtune.training.dp_step import clip_and_sum, clipped_sum
from fedtune.training.example_gradients import _collect, _taken, hooks_for, per_example_gradients
from fedtune.training.local import train_locally
from tests.support.golden import Golden
from tests.training.conftest import load, make_plan, make_shard

ADAPTERS = [
    {"name": "lora"},
    {"name": "ffa_lora"},
    {"name": "bitfit"},
    {"name": "head"},
    {"name": "lora", "layers": 1},
]


def one_at_a_time(model: AdaptedModel, shard: Shard, record: int) -> torch.Tensor:
    """One example's gradient, by autograd alone, from its tokens alone: no batch, no padding, no hooks."""
    ids = torch.from_numpy(shard.data.tokens(record).astype(np.int64))[None]
    loss = nn.functional.cross_entropy(model.base(input_ids=ids), torch.tensor([shard.data.labels[record]]))
    gradients = torch.autograd.grad(loss, list(model.parameters.values()))
    return torch.cat([g.reshape(-1) for g in gradients]).double()


def reference(model: AdaptedModel, shard: Shard, groups: list[list[int]], clip: float) -> np.ndarray:
    total = torch.zeros(model.num_parameters, dtype=torch.float64)
    for members in groups:
        gradient = sum(one_at_a_time(model, shard, r) for r in members)
        assert isinstance(gradient, torch.Tensor)
        total += gradient * min(1.0, clip / float(gradient.norm()))
    return total.numpy()


def compute(
    model: AdaptedModel,
    shard: Shard,
    records: list[int],
    plan: PrivacyPlan,
    units: list[int] | None = None,
    smoothing: float = 0.0,
    centre: bool = False,
) -> np.ndarray:
    features = Features.of(model, shard.data, 64, precision="fp32")
    with hooks_for(model, features):
        return clipped_sum(
            model,
            features,
            np.array(records, dtype=np.int64),
            None if units is None else np.array(units, dtype=np.int64),
            plan,
            micro_batch_tokens=64,
            precision="fp32",
            label_smoothing=smoothing,
            centre=centre,
        )


def near(got: np.ndarray, want: np.ndarray, tolerance: float = 1e-4) -> bool:
    return bool(np.abs(got - want).max() <= tolerance * max(1e-9, np.abs(want).max()))


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("clip", [0.05, 1e6])
def test_equals_one_example_at_a_time(tiny_bert: Path, adapter: dict[str, object], clip: float) -> None:
    model, shard = load(tiny_bert, **adapter), make_shard()
    got = compute(model, shard, list(range(12)), make_plan(max_grad_norm=clip))
    # Kept outputs of frozen layers are float16.
    tolerance = 5e-3 if model.first_layer else 1e-4
    assert near(got, reference(model, shard, [[r] for r in range(12)], clip), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_equals_one_at_a_time_when_quantized(tiny_bert: Path, quantization: str) -> None:
    for name in ("lora", "bitfit"):
        model, shard = load(tiny_bert, quantization=quantization, name=name), make_shard()
        got = compute(model, shard, list(range(12)), make_plan(max_grad_norm=0.05))
        assert near(got, reference(model, shard, [[r] for r in range(12)], 0.05), 1e-3)


def test_person_is_clipped_as_a_whole(tiny_bert: Path) -> None:
    model, shard = load(tiny_bert), make_shard(12, persons=3)
    groups = [[r for r in range(12) if r % 3 == p] for p in range(3)]
    records = [r for members in groups for r in members]
    got = compute(
        model, shard, records, make_plan(unit="person", max_grad_norm=0.05), [r % 3 for r in records]
    )
    assert near(got, reference(model, shard, groups, 0.05))
    # The mutant clips each record: it must be told apart.
    assert not near(compute(model, shard, records, make_plan(max_grad_norm=0.05)), got, 0.1)


def test_more_persons_than_a_block(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, shard = load(tiny_bert), make_shard(12, persons=5)
    records = list(range(12))
    plan, units = make_plan(unit="person", max_grad_norm=0.05), [r % 5 for r in range(12)]
    whole = compute(model, shard, records, plan, units)
    monkeypatch.setattr("fedtune.training.dp_step._BLOCK", 2 * model.num_parameters)
    assert near(compute(model, shard, records, plan, units), whole, 1e-5)


def test_equals_opacus_own_optimizer(tiny_bert: Path) -> None:
    """Independent implementation: Opacus' DPOptimizer clips and accumulates the same batch."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    model, shard, clip = load(tiny_bert), make_shard(), 0.05
    mine = compute(model, shard, list(range(12)), make_plan(max_grad_norm=clip))
    wrapped = GradSampleModule(model.base, loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(list(model.parameters.values()), lr=0.1),
        noise_multiplier=0.0, max_grad_norm=clip, expected_batch_size=1, loss_reduction="sum",
    )  # fmt: skip
    features = Features.of(model, shard.data, 64, precision="fp32")
    inputs = features.inputs(np.arange(12), 12, 16, model.device)
    target = torch.from_numpy(shard.data.labels)
    nn.functional.cross_entropy(wrapped(**inputs), target, reduction="sum").backward()
    optimizer.clip_and_accumulate()
    theirs = torch.cat([p.summed_grad.reshape(-1) for p in model.parameters.values()]).numpy()
    wrapped._close()
    for parameter in model.parameters.values():
        parameter.grad = None
    assert near(mine, theirs)


def test_one_record_changes_the_sum_by_at_most_the_clip(tiny_bert: Path) -> None:
    model, shard = load(tiny_bert, spread=3.0), make_shard()
    plan = make_plan(max_grad_norm=0.05)
    everyone = compute(model, shard, list(range(12)), plan)
    changes = [
        float(np.linalg.norm(everyone - compute(model, shard, [r for r in range(12) if r != out], plan)))
        for out in range(12)
    ]
    assert max(changes) <= 0.05 * (1 + 1e-5)
    assert max(changes) > 0.049  # the bound is met, so a larger clip would be noticed


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_who_is_drawn_beside_a_record_hardly_moves_it_on_the_default_model(
    precision: str,
) -> None:
    """With the threads and the precision of a run: a long text is added, and all are cut anew."""
    model, chance = load(Path("embedded:minilm"), 0.02, rank=4, layers=2), np.random.default_rng(0)
    lengths = [*chance.integers(6, 60, 60), 120]
    ids = chance.integers(1000, 20_000, sum(lengths)).astype(np.int32)
    corpus = dataclasses.replace(
        make_shard().data,
        input_ids=ids,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        labels=chance.integers(0, 2, len(lengths)),
        units=None, sites=None, digests=np.zeros((len(lengths), 32), np.uint8),
        marks=np.zeros((len(lengths), 32), np.uint8),
    )  # fmt: skip
    features, plan = Features.of(model, corpus, 2048, precision=precision), make_plan(max_grad_norm=0.05)

    def clipped(*records: int) -> np.ndarray:
        return clipped_sum(
            model, features, np.array(records), None, plan, micro_batch_tokens=2048, precision=precision
        )

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with hooks_for(model, features):  # none: they would be of both threads at once
            others, one, all_of_them = clipped(*range(60)), clipped(60), clipped(*range(61))
    finally:
        torch.set_num_threads(threads)
    assert np.linalg.norm(one) == pytest.approx(0.05, rel=1e-5)
    assert np.linalg.norm(all_of_them - others) <= 0.05 * (1 + FLOAT_MARGIN)
    moved = np.linalg.norm(all_of_them - others - one) / 0.05
    assert moved < (1e-2 if precision == "bf16" else 1e-5)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_broken_example_contributes_nothing(tiny_bert: Path, poison: float) -> None:
    model, shard = load(tiny_bert), make_shard()
    table = model.base.encoder.embeddings.word_embeddings.weight
    token = int(shard.data.tokens(4)[1])
    hit = [r for r in range(12) if token in shard.data.tokens(r)]
    healthy = [r for r in range(12) if r not in hit]
    assert hit
    assert healthy
    kept = table[token].clone()
    want = compute(model, shard, healthy, make_plan())
    try:
        with torch.no_grad():
            table[token] = poison
        got = compute(model, shard, list(range(12)), make_plan())
    finally:
        with torch.no_grad():
            table[token] = kept
    assert np.isfinite(got).all()
    assert near(got, want)


def test_empty_batch_gives_zeros(tiny_bert: Path) -> None:
    model, shard = load(tiny_bert), make_shard(12, persons=3)
    for units in (None, []):
        total = compute(model, shard, [], make_plan(unit="record" if units is None else "person"), units)
        assert total.shape == (model.num_parameters,)
        assert not total.any()


def test_hooks_are_gone_afterwards(tiny_bert: Path) -> None:
    model, shard = load(tiny_bert), make_shard()
    for _ in range(2):  # hooks that stayed would be refused the second time
        compute(model, shard, [0, 1], make_plan())
    assert not any(hasattr(p, "grad_sample") for p in model.parameters.values())
    model.base(input_ids=torch.tensor([[2, 5, 3]])).sum().backward()
    assert not any(hasattr(p, "grad_sample") for p in model.parameters.values())
    for parameter in model.parameters.values():
        parameter.grad = None


def clipped_by_hand(units: np.ndarray, clip: float) -> np.ndarray:
    """Rows are units; one that is not finite is left out."""
    total = np.zeros(units.shape[1])
    for unit in units:
        norm = float(np.linalg.norm(unit))
        if math.isfinite(norm):
            total += unit * min(1.0, clip / norm if norm else 1.0)
    return total


@pytest.mark.parametrize("broken", [[], [1], [0, 3], [0, 1, 2, 3]])
def test_units_are_clipped_over_all_parameters_and_broken_ones_are_nothing(broken: list[int]) -> None:
    units = np.random.default_rng(0).normal(size=(4, 7))
    units[2] *= 1e-3  # below the bound: as it is
    for row, value in zip(broken, (math.nan, math.inf, -math.inf, math.nan), strict=False):
        units[row, row] = value
    tensors = [torch.from_numpy(units[:, :3]), torch.from_numpy(units[:, 3:])]
    kept = [t.clone() for t in tensors]
    got = torch.cat(clip_and_sum(tensors, make_plan(max_grad_norm=0.5), [False, True])).numpy()
    assert got == pytest.approx(clipped_by_hand(units, 0.5), rel=1e-12, abs=1e-15)
    assert all(torch.equal(t, k) or broken for t, k in zip(tensors, kept, strict=True))
    # However the parameters are cut.
    (whole,) = clip_and_sum([torch.from_numpy(units)], make_plan(max_grad_norm=0.5), [True])
    assert whole.numpy() == pytest.approx(got, rel=1e-12, abs=1e-15)


# --- head and adapter each to a norm of its own ------------------------------------------------------

HEADS = [False, True, False, True]  # anywhere in the vector


def two_norms(share: float, clip: float = 0.5) -> PrivacyPlan:
    return make_plan(max_grad_norm=clip, head_norm=2.0 if share else 0.0, head_share=share)


def in_groups(units: np.ndarray, share: float, clip: float = 0.5) -> np.ndarray:
    """Sum [10] of `units` [u, 10], clipped in two groups, the head at 2; parameters of 3, 2, 1, 4 numbers."""
    tensors = torch.from_numpy(units).split([3, 2, 1, 4], dim=1)
    return torch.cat(clip_and_sum(tensors, two_norms(share, clip), HEADS)).numpy()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_two_groups_are_clipped_each_by_itself(share: float) -> None:
    """Against the definition (McMahan et al. 2018), and against Opacus' own optimizer for it."""
    from opacus.optimizers import DPPerLayerOptimizer

    units = np.random.default_rng(1).normal(size=(6, 10))
    units[1] *= 1e-2  # below both
    units[2, :3] = units[2, 5] = 0.0  # nothing in the adapter
    head = np.repeat(HEADS, [3, 2, 1, 4])
    bounds = {True: 2.0, False: 0.5 * math.sqrt(1 - share)}
    got = in_groups(units, share)
    small = got[head]
    got = two_norms(share).clipping.undone(got, head)  # as whoever takes the step does
    assert small == pytest.approx(got[head] * 0.5 * math.sqrt(share) / 2.0, rel=1e-12)
    for which, bound in bounds.items():
        mine = units[:, head == which]
        assert got[head == which] == pytest.approx(clipped_by_hand(mine, bound), rel=1e-12)
    parts = [nn.Parameter(torch.zeros(int((head == which).sum()))) for which in bounds]
    optimizer = DPPerLayerOptimizer(
        torch.optim.SGD(parts, lr=0.1), noise_multiplier=0.0, max_grad_norm=list(bounds.values()),
        expected_batch_size=1, loss_reduction="sum",
    )  # fmt: skip
    for which, part in zip(bounds, parts, strict=True):
        part.grad_sample = torch.from_numpy(units[:, head == which])
    optimizer.clip_and_accumulate()
    for which, part in zip(bounds, parts, strict=True):
        assert near(got[head == which], part.summed_grad.numpy(), 1e-4)


def largest_change(share: float) -> float:
    """By how much one unit changes the sum at most, with huge gradients in both groups."""
    units = 100 * np.random.default_rng(2).normal(size=(5, 10))
    whole = in_groups(units, share)
    others = [in_groups(np.delete(units, out, axis=0), share) for out in range(5)]
    return max(float(np.linalg.norm(whole - other)) for other in others)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.99])
def test_one_unit_changes_the_sum_of_two_groups_by_the_clip(share: float) -> None:
    assert largest_change(share) == pytest.approx(0.5, rel=1e-9)


def test_groups_that_do_not_add_up_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clipping, "head_factor", lambda self, alone: self.norm / self.head_norm)
    assert largest_change(0.5) == pytest.approx(0.5 * math.sqrt(1.5))
    monkeypatch.undo()
    groups = Clipping.groups
    monkeypatch.setattr(
        Clipping,
        "groups",
        lambda self, heads: [dataclasses.replace(g, most=9.0) for g in groups(self, heads)],
    )
    assert largest_change(0.5) > 0.51


@pytest.mark.parametrize("place", [0, 4])  # in the adapter, in the head
def test_a_unit_that_is_broken_in_one_group_contributes_to_neither(place: int) -> None:
    units = np.random.default_rng(3).normal(size=(4, 10))
    want = in_groups(units[1:], 0.3)
    units[0, place] = math.nan
    assert in_groups(units, 0.3) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("unit", ["record", "person"])
def test_groups_of_a_real_adapter_against_one_at_a_time(tiny_bert: Path, unit: str) -> None:
    persons = 3 if unit == "person" else None
    model, shard = load(tiny_bert), make_shard(12, persons=persons)
    members = [[r for r in range(12) if r % (persons or 12) == p] for p in range(persons or 12)]
    plan = make_plan(unit=unit, max_grad_norm=0.05, head_norm=0.2, head_share=0.3)
    records = [r for group in members for r in group]
    got = compute(model, shard, records, plan, [r % 3 for r in records] if persons else None)
    head = np.concatenate([
        np.full(int(np.prod(shape)), ".classifier." in name) for name, shape in model.layout()
    ])  # fmt: skip
    assert 0 < head.sum() == 2 * 32 + 2 < len(head) and np.array_equal(head, model.head)
    units = np.stack([
        sum(one_at_a_time(model, shard, r) for r in group).numpy()  # type: ignore[union-attr]
        for group in members
    ])  # fmt: skip
    want = np.zeros(len(head))
    want[head] = clipped_by_hand(units[:, head], 0.2) * 0.05 * math.sqrt(0.3) / 0.2
    want[~head] = clipped_by_hand(units[:, ~head], 0.05 * math.sqrt(0.7))
    assert near(got[head], want[head]) and near(got[~head], want[~head], 1e-3)


def test_a_head_alone_has_the_whole_norm(tiny_bert: Path) -> None:
    model, shard = load(tiny_bert, name="head"), make_shard()
    assert all(model.heads) and model.head.all()
    plan = make_plan(max_grad_norm=0.05, head_norm=0.4, head_share=0.1)
    got = compute(model, shard, list(range(12)), plan)
    want = reference(model, shard, [[r] for r in range(12)], 0.4)
    assert near(plan.clipping.undone(got, model.head), want, 5e-3)
    assert near(got, want * 0.05 / 0.4, 5e-3)  # one record adds at most the plan's norm


def test_a_large_unit_is_clipped_and_not_taken_for_a_broken_one() -> None:
    """Its squares are beyond float32, its norm is not."""
    units = np.array([[3e25, 4e25], [0.3, 0.0]], dtype=np.float32)
    plan = make_plan(max_grad_norm=1.0)
    by_parameter = [torch.from_numpy(units[:, :1]), torch.from_numpy(units[:, 1:])]
    got = torch.cat(clip_and_sum(by_parameter, plan, [False, True])).numpy()
    assert got == pytest.approx([0.9, 0.8], rel=1e-6) and got.dtype == np.float32


def test_a_parameter_without_its_gradients_stops_the_step(tiny_bert: Path) -> None:
    model = load(tiny_bert)
    name, first = next(iter(model.parameters.items()))
    for sample in (None, torch.zeros(3, 1), torch.zeros(2, *first.shape)):
        first.grad_sample = sample
        with pytest.raises(PreflightError, match=f"gradient for the trainable parameter '{name}'"):
            _collect(model, 3, _taken(model))


def test_gradients_are_taken_once(tiny_bert: Path) -> None:
    model = load(tiny_bert)
    for parameter in model.parameters.values():
        parameter.grad_sample = torch.arange(3.0 * parameter.numel()).reshape(3, *parameter.shape)
        parameter.grad = torch.zeros_like(parameter)
    collected = _collect(model, 3, _taken(model))
    for parameter, taken in zip(model.parameters.values(), collected, strict=True):
        assert torch.equal(taken, torch.arange(3.0 * parameter.numel()).reshape(3, -1))
        assert parameter.grad_sample is None and parameter.grad is None


def stateful(count: int) -> Any:
    """Stands in for a model whose normalisation mixes examples; its last one is frozen."""
    layers = [nn.Linear(4, 4), *(nn.BatchNorm1d(4) for _ in range(count)), nn.BatchNorm1d(4)]
    for parameter in layers[-1].parameters():
        parameter.requires_grad = False
    layers[1].bias.requires_grad = False
    return SimpleNamespace(base=nn.Sequential(nn.Sequential(*layers)))


@pytest.mark.parametrize(
    ("count", "named"),
    [
        (1, r"for '0.1' \(BatchNorm1d\): it keeps"),
        (3, r"for '0.1' \(BatchNorm1d\), '0.2' \(BatchNorm1d\), '0.3' \(BatchNorm1d\): it keeps"),
        (5, r"for '0.1' \(BatchNorm1d\), '0.2' \(BatchNorm1d\), '0.3' \(BatchNorm1d\): it keeps"),
    ],
)
def test_layers_that_mix_examples_are_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, count: int, named: str
) -> None:
    checked: list[Any] = []
    monkeypatch.setattr(example_gradients, "check_layers", checked.append)
    model = stateful(count)
    with pytest.raises(PreflightError, match=named), per_example_gradients(model):
        pass
    assert checked == [model]


def test_a_refusal_without_such_a_layer_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from opacus import grad_sample

    class Refusing(grad_sample.GradSampleHooks):
        def __init__(self, *arguments: Any, **settings: Any) -> None:
            raise NotImplementedError

    monkeypatch.setattr(grad_sample, "GradSampleHooks", Refusing)
    monkeypatch.setattr(example_gradients, "check_layers", lambda model: None)
    model = SimpleNamespace(base=nn.Linear(2, 2))
    with (
        pytest.raises(PreflightError, match="gradients for a layer of this model: it"),
        per_example_gradients(model),  # type: ignore[arg-type]
    ):
        pass


def test_the_warning_of_every_lowest_layer_is_not_repeated(tiny_bert: Path) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with per_example_gradients(load(tiny_bert)):
            warnings.warn("Full backward hook is firing when gradients are computed", stacklevel=1)
            warnings.warn("another", stacklevel=1)
    said = [str(one.message) for one in seen]
    assert "another" in said and not any(text.startswith("Full backward") for text in said)


def test_precision_is_automatic_unless_it_is_said(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = AdaptedModel.merged_layers
    monkeypatch.setattr(AdaptedModel, "merged_layers", lambda self, how: asked.append(how) or real(self, how))
    model, shard = load(tiny_bert), make_shard()
    features = Features.of(model, shard.data, 64, precision="fp32")
    with hooks_for(model, features):
        clipped_sum(model, features, np.array([0]), None, make_plan(), micro_batch_tokens=64)
    assert asked == ["auto"]


def test_the_work_of_a_step_is_counted_as_training(tiny_bert: Path) -> None:
    model, shard = load(tiny_bert), make_shard()
    counted: list[tuple[object, ...]] = []
    real = model.flops.counting
    model.flops.counting = lambda key: counted.append(key) or real(key)  # type: ignore[method-assign]
    compute(model, shard, [0, 1], make_plan())
    assert counted and all(kind == "train" for kind, *_ in counted)


def by_hooks(
    model: AdaptedModel,
    shard: Shard,
    records: list[int],
    plan: PrivacyPlan,
    units: list[int],
    smoothing: float,
) -> np.ndarray:
    """The same sum from gradients that Opacus writes out, each unit's added up and then clipped."""
    features = Features.of(model, shard.data, 64, precision="fp32")
    rows, sums = np.array(records), torch.zeros(max(units) + 1, model.num_parameters)
    with per_example_gradients(model):
        for places, gradients in dp_step._of_micro_batches(
            model, features, rows, 64, "fp32", smoothing, None, lambda places, gradients: (places, gradients)
        ):
            sums.index_add_(0, torch.tensor(units)[places], torch.cat(gradients, dim=1))
    return torch.cat(clip_and_sum(model.split(sums), plan, model.heads)).numpy()


@pytest.mark.parametrize("clip", [0.05, 1.0, 1e6])
@pytest.mark.parametrize(("rows", "smoothing"), [(3, 0.0), (5, 0.0), (4096, 0.2)])
@pytest.mark.parametrize("persons", [None, 3])
def test_a_heads_closed_form_is_the_sum_of_opacus_gradients(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch, clip: float, rows: int, smoothing: float,
    persons: int | None,
) -> None:  # fmt: skip
    monkeypatch.setattr(dp_step, "_ROWS", rows)
    monkeypatch.setattr(dp_step, "_PAIRED", rows)
    model, shard = load(tiny_bert, name="head"), make_shard()
    plan, records = make_plan(max_grad_norm=clip), list(range(12))
    units = None if persons is None else [r % persons for r in records]
    closed = compute(model, shard, records, plan, units, smoothing)
    assert near(closed, by_hooks(model, shard, records, plan, units or records, smoothing), 1e-5)
    if clip < 1.0:  # the mutants: no clip at all, and another unit
        assert not near(closed, compute(model, shard, records, make_plan(max_grad_norm=1e6), units), 1e-2)
        other = [r % 2 for r in records]
        assert not near(closed, compute(model, shard, records, plan, other, smoothing), 1e-2)
    if smoothing and clip > 1.0:  # of two classes a clipped gradient is the same with and without
        assert not near(closed, compute(model, shard, records, plan, units), 1e-2)
    assert not compute(model, shard, [], plan, None if units is None else []).any()


@pytest.mark.parametrize("centred", [False, True])
def test_a_head_sees_by_numpy_what_it_sees_by_torch(tiny_bert: Path, centred: bool) -> None:
    model = load(tiny_bert, name="head", centred=centred)
    generator = np.random.default_rng(0)
    pooled = generator.normal(size=(7, 32)).astype(np.float16)
    pooled[3] = 0.0
    vector = generator.normal(size=model.num_parameters).astype(np.float32)
    model.set_vector(0.1 * vector)
    torchs = model.base.scaled(torch.from_numpy(pooled).float()).numpy()
    np.testing.assert_allclose(model.head_inputs(pooled), torchs, rtol=1e-5, atol=1e-6)
    uncentred = np.concatenate([vector[:66], 0 * vector[66:]])
    model.set_vector(0.1 * uncentred)
    assert centred is not np.allclose(model.head_inputs(pooled), torchs, rtol=1e-3)
    model.base.normalize = False
    try:
        np.testing.assert_array_equal(model.head_inputs(pooled), pooled)
    finally:
        model.base.normalize = True


def test_a_heads_few_rows_do_not_enter_torch(tiny_bert: Path) -> None:
    """Its threads wait for one another longer than four rows take."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            operations.append(str(function))
            return function(*args, **(kwargs or {}))

    operations: list[str] = []
    model, shard = load(tiny_bert, name="head"), make_shard()
    features = Features.of(model, shard.data, 64, precision="fp32")
    with Seen():
        for units in (None, np.array([0, 0, 1, 1])):
            got = clipped_sum(model, features, np.arange(4), units, make_plan(), micro_batch_tokens=64)
            assert got.any()
    assert set(operations) <= {"aten.detach.default", "aten._to_copy.default"}


def test_a_person_adds_at_most_the_clip_to_a_heads_sum(tiny_bert: Path) -> None:
    model, shard = load(tiny_bert, name="head"), make_shard()
    plan, records = make_plan(unit="person", max_grad_norm=0.05), [r for r in range(12) for _ in range(40)]
    units = [r % 3 for r in records]
    whole = compute(model, shard, records, plan, units)
    for person in range(3):
        left = [(r, u) for r, u in zip(records, units, strict=True) if u != person]
        without = compute(model, shard, [r for r, _ in left], plan, [u for _, u in left])
        assert np.linalg.norm(whole - without) == pytest.approx(plan.max_grad_norm, rel=1e-5)


def test_a_person_whose_texts_pull_against_one_another_adds_at_most_a_tiny_clip(tiny_bert: Path) -> None:
    """One text with both labels: of the norm's large products only rounding is left, and a server chooses how
    small the clip is."""
    model, data = load(tiny_bert, name="head"), make_shard(2).data
    first = int(data.offsets[1])
    twice = dataclasses.replace(
        data,
        input_ids=np.tile(data.input_ids[:first], 2),
        offsets=np.array([0, first, 2 * first]),
        labels=np.array([0, 1]),
    )
    shard = Shard("node-0", twice, 2, twice.fingerprint, "random", np.arange(2))
    plan = make_plan(unit="person", max_grad_norm=1e-10)
    for step in range(1, 40):
        model.set_vector(np.append(np.zeros(model.num_parameters - 2), [step * 1e-10, -step * 1e-10]))
        added = np.linalg.norm(compute(model, shard, [0, 1], plan, [0, 0]))
        assert added <= plan.max_grad_norm * (1 + 1e-6)


def test_at_the_smallest_norm_that_a_plan_may_have_a_unit_is_still_clipped() -> None:
    """In float32 what is clipped to 1e-43 is rounded to twice of that, and a server chooses the norm."""
    for numbers in (1, 200, 5000, 74_000):
        (total,) = clip_and_sum([torch.ones(1, numbers)], make_plan(max_grad_norm=1e-20), [False])
        assert np.linalg.norm(total.double().numpy()) <= 1e-20 * (1 + 1e-5)
    with pytest.raises(PrivacyError, match=r"max_grad_norm is 1e-43, and must be at least 1e-20"):
        make_plan(max_grad_norm=1e-43)


def test_memory_does_not_grow_with_how_many_texts_are_short(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that asks for much at once would see where a node runs out of it."""
    model, shard, rows = load(tiny_bert), make_shard(), list[int]()
    real = dp_step.example_gradients

    def noting(*about: Any) -> list[torch.Tensor]:
        rows.append(len(about[2]))
        return real(*about)

    monkeypatch.setattr(dp_step, "example_gradients", noting)
    whole = compute(model, shard, list(range(12)), make_plan())
    assert max(rows) > 2
    rows.clear()
    monkeypatch.setattr(dp_step, "_MOST_AT_ONCE", 2 * model.num_parameters)
    assert near(compute(model, shard, list(range(12)), make_plan()), whole)
    assert max(rows) <= 2


@pytest.mark.slow
def test_hooks_are_set_up_where_they_are_needed(
    tiny_bert: Path, train: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = []
    real = example_gradients.per_example_gradients
    monkeypatch.setattr(
        example_gradients, "per_example_gradients", lambda model: installed.append(model) or real(model)
    )
    takes = MergedLayers.takes
    for name, merged, expected in (("head", True, 1), ("lora", True, 0), ("lora", False, 3)):
        monkeypatch.setattr(MergedLayers, "takes", takes if merged else lambda *_: False)
        model, shard = load(tiny_bert, name=name), make_shard()
        model.gradients_checked = False
        for round in (1, 2, 3):
            train_locally(model, shard, make_plan(), model.get_vector(), train, round=round)
        assert len(installed) == expected
        installed.clear()


def test_a_head_record_without_a_norm_counts_as_nothing(tiny_bert: Path) -> None:
    model, shard = load(tiny_bert, name="head"), make_shard()
    plan, features = make_plan(max_grad_norm=0.5), Features.of(model, shard.data, 64, precision="fp32")
    without = compute(model, shard, [0, 2], plan)
    assert features.rows is not None
    features._vectors[1, 3] = math.nan
    try:
        broken = compute(model, shard, [0, 1, 2], plan)
        persons = compute(model, shard, [0, 1, 2], make_plan(unit="person", max_grad_norm=0.5), [0, 1, 2])
    finally:
        features._vectors[1] = features.rows[1][0]
    assert np.isfinite(broken).all() and near(broken, without, 1e-6) and near(persons, without, 1e-6)


# --- the round that sets the centre ------------------------------------------------------------------


def centred(folder: Path) -> AdaptedModel:
    return load(folder, name="head", centred=True)


def lengths_one(model: AdaptedModel, shard: Shard) -> np.ndarray:
    pooled = Features.of(model, shard.data, 64, precision="fp32")._vectors.astype(np.float64)
    return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)


def in_centre(total: np.ndarray) -> np.ndarray:
    """The centre's part [32]; the rest is zero."""
    assert not total[:-32].any()
    return total[-32:]


@pytest.mark.parametrize("rows", [3, 4096])
def test_a_record_contributes_where_its_text_lies(
    tiny_bert: Path, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dp_step, "_ROWS", rows)
    model, shard = centred(tiny_bert), make_shard()
    records, unit = [0, 2, 3, 7, 11], lengths_one(model, shard)
    got = in_centre(compute(model, shard, records, make_plan(max_grad_norm=0.05), centre=True))
    np.testing.assert_allclose(got, 0.05 * unit[records].sum(0), atol=1e-7)
    without_privacy = make_plan(trust="none", noise_multiplier=0.0, max_grad_norm=math.inf, delta=0.0)
    got = in_centre(compute(model, shard, records, without_privacy, centre=True))
    np.testing.assert_allclose(got, unit[records].sum(0), atol=1e-6)
    assert not compute(model, shard, [], make_plan(), centre=True).any()


@pytest.mark.parametrize("rows", [2, 4096])
def test_a_person_contributes_the_mean_of_its_texts(
    tiny_bert: Path, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are: one person counts as one, and no more than a record."""
    monkeypatch.setattr(dp_step, "_ROWS", rows)
    model, shard = centred(tiny_bert), make_shard(12, persons=5)
    unit, plan = lengths_one(model, shard), make_plan(unit="person", max_grad_norm=0.05)
    groups = {0: [0, 5, 10], 2: [2, 7], 4: [4]}
    records = [r for members in groups.values() for r in members]
    units = [p for p, members in groups.items() for _ in members]
    got = in_centre(compute(model, shard, records, plan, units, centre=True))
    np.testing.assert_allclose(got, 0.05 * sum(unit[m].mean(0) for m in groups.values()), atol=1e-7)
    assert not compute(model, shard, [], plan, [], centre=True).any()


@pytest.mark.parametrize("mended", [True, False], ids=["as it is", "vectors as long as they come"])
def test_a_long_vector_weighs_no_more(tiny_bert: Path, mended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its length is not looked at; and a mutant that looks at it is clipped all the same."""
    model, shard, plan = centred(tiny_bert), make_shard(), make_plan(max_grad_norm=0.05)
    features = Features.of(model, shard.data, 64, precision="fp32")
    unit = lengths_one(model, shard)
    longer = features._vectors.copy()
    longer[4] *= 256.0  # exactly, in float16
    monkeypatch.setitem(features.__dict__, "_vectors", longer)
    if not mended:
        monkeypatch.setattr(nn.functional, "normalize", lambda x, dim: x)
    got = [in_centre(compute(model, shard, r, plan, centre=True)) for r in ([0, 4], [0])]
    change = float(np.linalg.norm(got[0] - got[1]))
    assert change == pytest.approx(0.05, rel=1e-6)
    if mended:
        np.testing.assert_allclose(got[0], 0.05 * (unit[0] + unit[4]), atol=1e-6)
        monkeypatch.setattr(PrivacyPlan, "clip_factors", lambda self, norms: np.ones_like(norms))
        np.testing.assert_allclose(in_centre(compute(model, shard, [0, 4], plan, centre=True)), got[0])
    else:
        # Without the clip the mutant would be found out.
        monkeypatch.setattr(PrivacyPlan, "clip_factors", lambda self, norms: np.ones_like(norms))
        assert np.linalg.norm(compute(model, shard, [4], plan, centre=True)) > 1.0


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_broken_vector_contributes_nothing_to_the_centre(
    tiny_bert: Path, poison: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, shard, plan = centred(tiny_bert), make_shard(12, persons=6), make_plan(max_grad_norm=0.05)
    want = compute(model, shard, [0, 1, 2], plan, centre=True)
    features = Features.of(model, shard.data, 64, precision="fp32")
    broken = features._vectors.copy()
    broken[4, 3], broken[5] = poison, 0.0
    monkeypatch.setitem(features.__dict__, "_vectors", broken)
    np.testing.assert_array_equal(compute(model, shard, [0, 1, 2, 4, 5], plan, centre=True), want)
    persons = make_plan(unit="person", max_grad_norm=0.05)
    got = compute(model, shard, [0, 4, 4], persons, [0, 3, 3], centre=True)
    np.testing.assert_array_equal(got, compute(model, shard, [0], plan, centre=True))


@pytest.mark.parametrize("unit", ["record", "person"])
def test_gradients_around_a_centre_against_one_at_a_time(tiny_bert: Path, unit: str) -> None:
    """In closed form and by hooks alike; the centre's own part is zero."""
    model, shard = centred(tiny_bert), make_shard(12, persons=4 if unit == "person" else None)
    assert model.base.centring.modules_to_save.default.centre.any()  # the spread is on it too
    groups = [[r for r in range(12) if r % 4 == p] for p in range(4)]
    if unit == "record":
        groups = [[r] for r in range(12)]
    records = [r for members in groups for r in members]
    plan = make_plan(unit=unit, max_grad_norm=0.05)
    got = compute(model, shard, records, plan, [r % 4 for r in records] if unit == "person" else None)
    assert got.shape == (model.num_parameters,) and not got[-32:].any()
    want = np.zeros_like(got)
    for members in groups:
        gradient = sum(one_at_a_time(model, shard, r) for r in members)
        assert isinstance(gradient, torch.Tensor)
        want[:-32] += (gradient * min(1.0, 0.05 / float(gradient.norm()))).numpy()
    assert near(got, want, 5e-3)
    away = np.concatenate([model.get_vector()[:-32], np.zeros(32)])
    model.set_vector(away)
    assert not near(compute(model, shard, records[:1], plan), want, 0.1)


def test_a_model_without_a_centre_is_not_asked_for_one(tiny_bert: Path, golden: Golden) -> None:
    for model in (load(tiny_bert, name="head"), load(tiny_bert, name="lora")):
        with pytest.raises(PreflightError) as raised:
            compute(model, make_shard(), [0], make_plan(), centre=True)
    golden(raised)


def test_a_record_among_thousands_that_pull_one_way_changes_a_sum_by_its_bound_and_no_more(
    tiny_bert: Path,
) -> None:
    """A sum of thousands in float32 rounds each of its numbers by more than one record's share of them."""
    model, shard, plan = load(tiny_bert, name="head"), make_shard(), make_plan(max_grad_norm=0.05)
    alike = np.flatnonzero(shard.data.labels == 0)
    records = np.tile(alike, 30_000 // len(alike)).tolist()
    total = compute(model, shard, records, plan)
    for without in (0, 1, len(records) // 3, len(records) // 2):
        change = np.linalg.norm(total - compute(model, shard, np.delete(records, without).tolist(), plan))
        assert change <= plan.max_grad_norm * (1 + 1e-5)
