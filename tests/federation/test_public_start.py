"""A start on public texts: it costs nothing, tells nothing, and is the adapter that everybody begins with."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.config.choices import resolved
from fedtune.config.schema import AdapterConfig, Config, PublicConfig
from fedtune.engines import local
from fedtune.federation.events import FederationResult
from fedtune.federation.resources import RunResources, run_resources
from fedtune.models.frozen_outputs import Features
from fedtune.privacy.plan import make_plan
from fedtune.runs import record, run
from fedtune.training import public_start
from fedtune.training.evaluation import evaluate
from tests.support.tiny_federation import make_public, private

Make = Callable[..., Config]
SIZES = [30, 30, 30, 30]


@pytest.fixture
def public(tmp_path: Path) -> Path:
    return make_public(tmp_path / "public.csv")


def config_of(tiny: Make, public: Path | None, adapter: str, trust: str = "none", **changes: Any) -> Config:
    config = tiny(**{"train__head_rounds": 0, **changes})
    config.adapter, config.train.local_steps = AdapterConfig(name=adapter, rank=2), None  # type: ignore[arg-type]
    if trust != "none":
        config = private(config, epsilon=50.0)
        config.privacy.trust = trust  # type: ignore[assignment]
    config.public = PublicConfig(path=None if public is None else str(public))
    return resolved(config)


def federated(config: Config, folder: Path) -> FederationResult:
    return local.run(config, folder)


@pytest.mark.parametrize("adapter", ["head", "lora", "ffa_lora", "bitfit"])
def test_a_run_is_the_one_that_begins_with_what_was_learnt(
    tiny: Make, tmp_path: Path, public: Path, monkeypatch: pytest.MonkeyPatch, adapter: str
) -> None:
    with_start = config_of(tiny, public, adapter)
    start = run_resources(with_start).initial()
    bare = RunResources(config_of(tiny, None, adapter)).initial()
    assert np.abs(start - bare).max() > 1e-3
    begun = federated(with_start, tmp_path / "with")
    monkeypatch.setattr(RunResources, "initial", lambda self, progress=None: start.copy())
    without = federated(
        config_of(tiny, None, adapter, train__damped=with_start.train.damped), tmp_path / "without"
    )
    assert begun.adapter.tobytes() == without.adapter.tobytes()
    assert begun.public_start is not None and without.public_start is None


@pytest.mark.parametrize("adapter", ["head", "ffa_lora"])
@pytest.mark.parametrize("trust", ["local", "distributed", "central"])
def test_the_plan_does_not_know_of_it(tiny: Make, public: Path, adapter: str, trust: str) -> None:
    def plan(path: Path | None) -> str:
        config = config_of(tiny, path, adapter, trust, train__head_rounds=None)
        config.privacy.unit = "client" if trust == "central" else "record"
        config.privacy.delta = 0.1 if trust == "central" else None
        return make_plan(config, SIZES).to_json()

    assert plan(public) == plan(None)


def test_rounds_of_the_head_alone_find_the_rest_as_it_was(tiny: Make, public: Path) -> None:
    config = config_of(tiny, public, "lora", train__head_rounds=2)
    resources = RunResources(config)
    start, head = resources.initial(), resources.head()
    with resources.using_model() as model:
        assert start[~head].tobytes() == model.initial[~head].tobytes()
        assert np.abs(start[head] - model.initial[head]).max() > 1e-3
    every = RunResources(config_of(tiny, public, "lora")).initial()
    assert np.abs(every[~head] - start[~head]).max() > 1e-4


def test_it_tells_the_classes_apart_and_is_the_same_again(tiny: Make, public: Path) -> None:
    for adapter in ("head", "lora"):
        config = config_of(tiny, public, adapter)
        one, two = RunResources(config), RunResources(config)
        assert one.initial().tobytes() == two.initial().tobytes()
        assert one.public_texts is not None
        with one.using_model() as model:
            model.set_vector(one.initial())
            assert evaluate(model, one.public_texts.tokens, config.train).accuracy > 0.9


def test_a_run_goes_on_without_the_file(
    tiny: Make, tmp_path: Path, public: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tiny, public, "head", federation__num_rounds=3)
    whole = federated(config, tmp_path / "whole")

    class Stop:
        def on_round(self, summary: Any) -> str | None:
            if summary.round == 2:
                raise KeyboardInterrupt
            return None

        def __getattr__(self, name: str) -> Any:
            return lambda *arguments: None

    with pytest.raises(KeyboardInterrupt):
        local.run(config, tmp_path / "cut", Stop())
    public.unlink()
    monkeypatch.setattr(public_start, "train_head", None)
    resumed = federated(dataclasses.replace(config, resume=str(tmp_path / "cut")), tmp_path / "cut")
    assert resumed.adapter.tobytes() == whole.adapter.tobytes()
    assert resumed.attempt == 2 and resumed.public_start == whole.public_start


def test_record_and_statement_say_so(tiny: Make, tmp_path: Path, public: Path) -> None:
    config = config_of(tiny, public, "head", "local", federation__num_rounds=2)
    config.output = str(tmp_path / "run")
    resources, digest = RunResources(config), hashlib.sha256(public.read_bytes()).hexdigest()
    accuracy = resources.evaluate(resources.initial()).accuracy
    run.run(config, stop_rule=lambda summary: public.unlink(missing_ok=True))  # type: ignore[func-returns-value]
    assert not public.exists()
    kept = record.read(tmp_path / "run")
    start = kept["data"]["public_start"]
    assert start == {"texts": 40, "digest": digest, "accuracy": accuracy}
    assert "from a start on public texts" in kept["federation"]["recipe"]
    statement = (tmp_path / "run" / "statement.md").read_text(encoding="utf-8")
    assert "(after 40 public texts, which nothing protects)" in statement
    covered = statement[statement.index("## What is not covered") :]
    assert start["digest"][:16] in covered and "40 labelled texts" in covered


def test_the_centre_is_the_public_mean_until_a_round_sets_it(tiny: Make, public: Path) -> None:
    config = config_of(tiny, public, "head", train__centre=True)
    resources = RunResources(config)
    start, texts = resources.initial(), resources.public_texts
    assert texts is not None
    with resources.using_model() as model:
        vectors = Features.of(model, texts.tokens, 64, precision="fp32")._vectors.astype(np.float64)
    mean = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).mean(0)
    np.testing.assert_allclose(start[-mean.size :], mean, atol=1e-3)
