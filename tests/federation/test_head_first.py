"""The head first, then the rest: in those rounds nothing else moves, and the cost is the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.config.choices import resolved
from fedtune.config.schema import AdapterConfig, Config
from fedtune.engines import local
from fedtune.errors import ConfigError, PrivacyError
from fedtune.federation.client.policy import check_plan
from fedtune.federation.events import FederationResult
from fedtune.federation.resources import run_resources
from fedtune.federation.server import loop
from fedtune.models.adapters import ADAPTERS
from fedtune.privacy.plan import make_plan
from tests.support.plans import central_plan, changed
from tests.support.tiny_federation import private

Make = Callable[..., Config]
SIZES = [30, 30, 30, 30]


def run(config: Config, folder: Path) -> FederationResult:
    return local.run(resolved(config), folder)


def with_trust(tiny: Make, trust: str, **changes: Any) -> Config:
    config = tiny(train__head_rounds=2, federation__num_rounds=3, **changes)
    if trust == "none":
        return config
    config = private(config, epsilon=50.0)
    config.privacy.trust = trust  # type: ignore[assignment]
    if trust == "central":
        config.privacy.unit, config.privacy.delta = "client", 0.1
    if trust == "distributed":
        config.train.local_steps = None
    return config


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora", "bitfit"])
@pytest.mark.parametrize("strategy", ["fedsgd", "fedavg"])
def test_the_first_rounds_are_those_of_a_head_alone_bit_for_bit(
    tiny: Make, tmp_path: Path, adapters: list[np.ndarray], name: str, strategy: str
) -> None:
    config = with_trust(tiny, "none", federation__strategy=strategy, train__averaging=0.0)
    config.train.local_steps = 1 if strategy == "fedsgd" else 2
    config.train.optimizer, config.train.schedule = "adam", "constant"
    config.train.head_learning_rate = config.train.learning_rate
    config.train.label_smoothing, config.train.start = 0.0, "zero"
    config.adapter = AdapterConfig(name=name, rank=2)  # type: ignore[arg-type]
    resources = run_resources(config)
    head, start = resources.head(), resources.initial()
    run(config, tmp_path / "first")
    both = list(adapters)
    adapters.clear()
    alone = dataclasses.replace(config, adapter=AdapterConfig(name="head"))
    run(alone, tmp_path / "alone")
    assert 0 < head.sum() < len(head)
    for adapter, bare in zip(both[:2], adapters[:2], strict=True):
        assert adapter[~head].tobytes() == start[~head].tobytes()
        assert adapter[head].tobytes() == bare.tobytes() and bare.any()
    assert not np.array_equal(both[2][~head], start[~head])  # then all of it is trained


@pytest.mark.parametrize("head_norm", [0.0, 3.0])
@pytest.mark.parametrize("trust", ["local", "distributed", "central"])
def test_noise_alone_never_moves_the_rest(
    tiny: Make, tmp_path: Path, adapters: list[np.ndarray], trust: str, head_norm: float
) -> None:
    config = with_trust(tiny, trust)
    if trust != "central":
        config.privacy.head_norm = head_norm
    resources = run_resources(config)
    head, start = resources.head(), resources.initial()
    result = run(config, tmp_path)
    assert len(adapters) == 3 and not result.dropped
    for adapter in adapters[:2]:
        assert np.array_equal(adapter[~head], start[~head]) and adapter[head].any()
    assert np.abs(adapters[2][~head] - start[~head]).max() > 0
    without = dataclasses.replace(config, train=dataclasses.replace(config.train, head_rounds=0))
    plans = [make_plan(one, SIZES) for one in (config, without)]
    assert plans[0].epsilon() == plans[1].epsilon() and plans[0].noise_std() == plans[1].noise_std()


def test_a_server_that_keeps_what_the_rest_got_would_be_noticed(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant: under a secure sum only the server can drop the noise on the rest."""
    config = with_trust(tiny, "distributed")
    head, start = run_resources(config).head(), run_resources(config).initial()
    after: list[np.ndarray] = []

    def all_of_it(setting: Any, state: Any, aggregate: np.ndarray, used: list[str]) -> np.ndarray:
        after.append(state.optimizer.step(state.adapter, aggregate))
        return after[-1]

    monkeypatch.setattr(loop, "_step", all_of_it)
    run(config, tmp_path)
    assert np.abs(after[0][~head] - start[~head]).max() > 0


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name != "head"])
def test_at_its_start_the_rest_changes_nothing(tiny: Make, name: str) -> None:
    """So the head alone, on outputs that are kept, predicts what the whole model does."""
    config = resolved(with_trust(tiny, "none"))
    config.adapter = AdapterConfig(name=name, rank=2)  # type: ignore[arg-type]
    resources = run_resources(config)
    head, adapter = resources.head(), resources.initial()
    adapter[head] = np.random.default_rng(0).normal(size=head.sum())
    with resources.model_at(adapter) as model:
        assert model.num_parameters == head.sum()
    fast = resources.evaluate(adapter)
    with resources.using_model() as model:
        from fedtune.training.evaluation import evaluate

        model.set_vector(adapter)
        whole = evaluate(model, resources.prepared.test, config.train)
    np.testing.assert_allclose(fast.probabilities, whole.probabilities, atol=5e-3)
    adapter[np.flatnonzero(~head)[0]] += 1e-3
    with resources.model_at(adapter) as model:
        assert model.num_parameters == len(head)


def test_another_number_of_head_rounds_is_refused(tiny: Make) -> None:
    config = with_trust(tiny, "local")
    plan = make_plan(config, SIZES)
    check_plan(plan, config)
    assert [plan.head_alone(round) for round in (1, 2, 3)] == [True, True, False]
    with pytest.raises(PrivacyError, match="head_rounds=1.* permits head_rounds=2"):
        check_plan(changed(plan, head_rounds=1), config)
    bare = dataclasses.replace(config, adapter=AdapterConfig(name="head"))
    assert make_plan(bare, SIZES).head_rounds == 0


def test_settings_without_meaning_are_refused() -> None:
    from fedtune.config.loader import load

    with pytest.raises(ConfigError) as raised:
        load(["adapter=lora", "train.head_rounds=9", "federation.num_rounds=8"])
    assert raised.value.setting == "train.head_rounds"
    for wrong in (-1, 13, 1.5):
        with pytest.raises(PrivacyError, match="head_rounds"):
            central_plan(head_rounds=wrong)
    with pytest.raises(PrivacyError, match="head_rounds=2 does not fit privacy.mechanism=dp_ftrl"):
        central_plan(method="dp_ftrl", head_rounds=2)


def test_what_is_kept_is_computed_before_the_first_round(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.models import frozen_outputs
    from fedtune.models.frozen_outputs import Features

    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path))
    frozen_outputs._STORES.clear()
    frozen_outputs._RESIDENT.clear()
    config = resolved(with_trust(tiny, "none"))
    resources = run_resources(config)
    seen: list[tuple[int, int]] = []
    resources.warm(lambda done, total: seen.append((done, total)))
    again: list[int] = []
    with resources.using_model():
        for shard in resources.prepared.shards:
            Features.of(
                resources._bare_head(), shard.data, 64, lambda done, _: again.append(done), precision="fp32"
            )
    assert again == [] and seen and all(done <= total for done, total in seen)


def test_texts_of_all_nodes_are_kept_at_once(
    tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Node by node the whole index of what is kept would be read and written as often as there are nodes."""
    from fedtune.models import frozen_outputs

    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path))
    frozen_outputs._STORES.clear()
    frozen_outputs._RESIDENT.clear()
    kept: list[int] = []
    real = frozen_outputs.FeatureStore.add
    monkeypatch.setattr(
        frozen_outputs.FeatureStore, "add", lambda self, items: kept.append(len(items)) or real(self, items)
    )
    resources = run_resources(resolved(with_trust(tiny, "none")))
    resources.warm()
    assert len(resources.prepared.shards) == 4 and len(kept) <= 2
