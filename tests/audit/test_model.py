"""Canaries in the real training: drawn, clipped and noised as records are, and without private data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.audit.attack import audit_model
from fedtune.audit.canaries import GradientCanaries, Scores
from fedtune.audit.model import CanaryView, InputCanaries, _Training, watch
from fedtune.config.choices import resolved
from fedtune.config.files import state_dir
from fedtune.config.schema import AdapterConfig
from fedtune.errors import DataError
from fedtune.federation.resources import run_resources
from fedtune.privacy.mechanisms.noise import Entropy
from fedtune.privacy.plan import PrivacyPlan, make_plan
from fedtune.training.example_gradients import hooks_for
from fedtune.training.local import ShardView
from tests.models.conftest import random_corpus
from tests.support import audited_plans as plans
from tests.support import tiny_federation as tiny
from tests.support.golden import Golden
from tests.support.plans import plan_of as flat_plan


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny federation with local privacy: epsilon 4, 6 steps at rate 0.3."""
    tiny.one_thread()
    root: Path = tmp_path_factory.mktemp("world")
    made = tiny.make_config(tiny.make_model(root / "model"), tiny.make_data(root / "data"))
    return tiny.private(made, epsilon=4.0)


def plan_of(config: Any, **changes: Any) -> PrivacyPlan:
    privacy = dataclasses.replace(config.privacy, reproducible_noise=True, delta=1e-3, **changes)
    return make_plan(dataclasses.replace(config, privacy=privacy), [30, 30, 30, 30])


def test_canaries_are_clipped_and_added_beside_the_records(config: Any) -> None:
    plan, resources = plan_of(config), run_resources(config)
    entropy = plan.entropy("audit", 1, 0)
    with resources.using_model() as model:
        placed = GradientCanaries.spread(100, model.num_parameters, np.random.default_rng(0))
        shard = resources.prepared.shards[0]
        model.set_vector(model.initial)
        plain = ShardView(model, shard, "record", config.train)
        with hooks_for(model, plain.features):
            view = CanaryView(model, shard, "record", config.train, placed)
            assert view.num_units == plain.num_units + placed.included.sum()
            records, mine = np.array([0, 3]), np.array([0, 7, 20])
            alone = plain.clipped_sum(records, plan, entropy, 1)
            both = view.clipped_sum(np.concatenate([records, plain.num_units + mine]), plan, entropy, 1)
            assert np.array_equal(view.clipped_sum(records, plan, entropy, 1), alone)
    added = both - alone
    where = placed.coordinates[placed.members[mine]]
    assert sorted(np.flatnonzero(np.abs(added) > 1e-9)) == sorted(where)
    assert added[where] == pytest.approx(plan.max_grad_norm, rel=1e-5)


def test_a_canary_shows_the_norm_of_its_own_group(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the scores expect of a canary is what clipping lets through of it, in head and adapter alike."""
    plan = dataclasses.replace(plan_of(config), head_norm=3.0, head_share=0.2)
    expected: list[np.ndarray] = []
    monkeypatch.setattr(Scores, "observe", lambda self, released, plan, signal: expected.append(signal))
    with run_resources(config).using_model() as model:
        placed = GradientCanaries.spread(200, model.num_parameters, np.random.default_rng(0))
        shard = run_resources(config).prepared.shards[0]
        scores = Scores(placed, plan.sample_rate, 3)
        whole = resolved(config)
        _Training(whole, whole.train, model, shard, placed, scores).round(model.initial, plan, 1, 0)
        view = CanaryView(model, shard, "record", config.train, placed)
        drawn = view.num_real + np.arange(len(placed.members))
        with hooks_for(model, view.features):
            total = view.clipped_sum(drawn, plan, plan.entropy("audit", 1, 0), 1)
        of_head = model.head[placed.coordinates]
    assert 0 < of_head.sum() < 200 and len(expected) == plan.local_steps
    assert expected[0] == pytest.approx(np.sqrt(np.where(of_head, 0.2, 0.8)))
    shown = total[placed.coordinates[placed.members]] / plan.max_grad_norm
    assert shown == pytest.approx(expected[0][placed.members], rel=1e-5)


@pytest.mark.parametrize("trust", ["local", "distributed"])
def test_the_round_of_the_centre_is_audited_as_it_is(
    config: Any, trust: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is seen of round 1 is the noised mean, canaries in it; the next rounds train around it."""
    head = dataclasses.replace(config, adapter=AdapterConfig(name="head"))
    head = dataclasses.replace(
        head, train=dataclasses.replace(head.train, centre=True, local_steps=None, averaging=0.0),
        privacy=dataclasses.replace(head.privacy, trust=trust, epsilon=50.0, reproducible_noise=True),
        federation=dataclasses.replace(head.federation, num_rounds=3, strategy="fedsgd"),
    )  # fmt: skip
    head = resolved(head)
    plan, seen = make_plan(head, [30, 30, 30, 30]), []
    monkeypatch.setattr(Scores, "observe", lambda self, released, plan, signal: seen.append(released))
    train = dataclasses.replace(head.train, local_steps=1)
    with run_resources(head).using_model() as model:
        placed = GradientCanaries.spread(40, model.num_parameters, np.random.default_rng(0))
        shard = run_resources(head).prepared.shards[0]
        training = _Training(head, train, model, shard, placed, Scores(placed, plan.sample_rate, 3))
        adapter, adapters = model.initial, []
        for round in (1, 2, 3):
            adapter, plan = training.round(adapter, plan, round, 0)
            adapters.append(adapter)
    width = model.centre_size
    assert len(seen) == 3 and all(released.size == model.num_parameters for released in seen)
    assert adapters[0][-width:].any() and not adapters[0][:-width].any()
    assert adapters[1][:-width].any() and np.array_equal(adapters[2][-width:], adapters[0][-width:])


def test_input_canaries_are_mislabelled_public_records_and_half_of_them_are_trained_on(
    golden: Golden,
) -> None:
    public = random_corpus(60, persons=20)
    drawn = InputCanaries.draw(public, 20, 25, 40, np.random.default_rng(1))
    marks = {row.tobytes(): label for row, label in zip(public.digests, public.labels, strict=True)}
    assert drawn.canaries.num_records == 20
    for digest, label in zip(drawn.canaries.digests, drawn.canaries.labels, strict=True):
        assert label != marks[digest.tobytes()]
    inside = {row.tobytes() for row in drawn.shard.data.digests}
    for digest, included in zip(drawn.canaries.digests, drawn.included, strict=True):
        assert (digest.tobytes() in inside) == included
    background = drawn.shard.data.num_records - int(drawn.included.sum())
    assert background == 25 and drawn.shard.declared_size == 40
    # Each canary is a person by itself, or it would share a clip with its author's other records.
    assert drawn.shard.data.units is not None
    names, counts = np.unique(drawn.shard.data.units, return_counts=True)
    assert all(count == 1 for name, count in zip(names, counts, strict=True) if name.startswith("canary"))
    with pytest.raises(DataError) as raised:
        InputCanaries.draw(random_corpus(3), 20, 25, 40, np.random.default_rng(1))
    assert "--model" in str(raised.value)
    golden(raised)


def test_no_private_record_is_trained_on_and_no_ledger_is_written(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.audit import model as module

    seen: list[Any] = []
    real = module.CanaryView.__init__

    def noting(self: Any, model: Any, shard: Any, *rest: Any) -> None:
        seen.append(shard)
        real(self, model, shard, *rest)

    monkeypatch.setattr(module.CanaryView, "__init__", noting)
    watch(config, plan_of(config), 1, 50, np.random.default_rng(2))
    data = run_resources(config).prepared
    public = {row.tobytes() for row in data.test.digests}
    private = {row.tobytes() for shard in data.shards for row in shard.data.digests}
    used = {row.tobytes() for shard in seen for row in shard.data.digests}
    assert used and used <= public and not used & (private - public)
    assert list(state_dir().rglob("*.sqlite")) == []


@pytest.mark.slow
@pytest.mark.parametrize("trust", ["local", "distributed", "central"])
def test_training_as_it_should_be_is_acquitted(config: Any, trust: str) -> None:
    changes: dict[str, Any] = {"trust": trust}
    if trust == "central":
        changes |= {"unit": "client", "epsilon": None, "noise_multiplier": 2.0}
    changed = dataclasses.replace(config, privacy=dataclasses.replace(config.privacy, **changes))
    plan = plan_of(changed)
    for seed in range(2):
        result = audit_model(
            changed, dataclasses.replace(plan, seed=seed), 3, claimed=plan.epsilon(), canaries=280
        )
        assert not result.violated, result.bounds
        assert len(result.bounds) == 4 and result.canaries == 280
        assert sum(1.0 - bound.confidence for bound in result.bounds) <= 0.05 + 1e-12


class LoraNotNoised(PrivacyPlan):
    """The first parameters, those of LoRA, are trained without noise; the head has it."""

    def noise(self, size: int, entropy: Entropy) -> Any:
        values = super().noise(size, entropy)
        values[:512] = 0.0
        return values


@pytest.mark.parametrize("kind", [plans.NoClipping, LoraNotNoised, plans.NoiseInTheFirstStepOnly])
def test_broken_training_is_exposed(config: Any, kind: type[PrivacyPlan]) -> None:
    plan = plan_of(config, epsilon=1.0)
    result = audit_model(config, plans.mutated(plan, kind), 3, claimed=plan.epsilon(), canaries=280)
    assert result.violated, result.bounds


def test_a_step_that_forgets_to_clip_is_exposed(config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug of the training code, of which the plan knows nothing: only the model's audit can see it."""
    import torch

    from fedtune.audit import model as module
    from fedtune.training import dp_step

    def summed(gradients: list[torch.Tensor], plan: PrivacyPlan, heads: list[bool]) -> list[torch.Tensor]:
        return [gradient.sum(0) for gradient in gradients]

    plan = plan_of(config, epsilon=1.0)
    monkeypatch.setattr(dp_step, "clip_and_sum", summed)
    monkeypatch.setattr(module, "clip_and_sum", summed)
    assert audit_model(config, plan, 3, claimed=plan.epsilon(), canaries=280).violated


def test_without_privacy_mislabelled_records_leave_their_mark(config: Any) -> None:
    """The black box sees the final model only: its scores of what was in are higher."""
    open_plan = flat_plan(
        "none", unit="record", sample_rate=0.3, local_steps=2, num_rounds=8, noise_multiplier=0.0,
        max_grad_norm=float("inf"), declared_size=40, delta=0.0,
    )  # fmt: skip
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, learning_rate=0.05))
    gaps = []
    for seed in range(3):
        found = watch(config, open_plan, 8, 40, np.random.default_rng(seed))
        scores = found.inputs["loss"]
        gaps.append(scores[found.inputs_included].mean() - scores[~found.inputs_included].mean())
    assert np.mean(gaps) > 0.0


def test_private_data_that_was_held_out_is_not_trained_on(config: Any, golden: Golden) -> None:
    """A run without privacy tests on private data: an audit would train on it, and charge nobody."""
    held = dataclasses.replace(config.data, test_split=None, test_public=False)
    free = dataclasses.replace(config.privacy, trust="none", epsilon=None)
    undeclared = dataclasses.replace(config, data=held, privacy=free)
    with pytest.raises(DataError) as raised:
        watch(undeclared, plan_of(config), 1, 10, np.random.default_rng(0))
    golden(raised)
