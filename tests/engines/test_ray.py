"""Flower's simulation on Ray gives what the local engine gives."""

from __future__ import annotations

import importlib.util
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune import engines
from fedtune.config.schema import Config
from fedtune.engines.ray import ConfiguredClientApp
from fedtune.errors import CheckpointError, ConfigError, ResourceError
from fedtune.federation.client.node_context import node_ledger
from fedtune.federation.flower import task_identity
from fedtune.federation.server.evaluation import NodesEvaluation
from tests.support.fake_federation import HUNG, impatient
from tests.support.golden import Golden
from tests.support.tiny_federation import private


def test_without_ray_the_error_says_how_to_install_it(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "ray" else find(name, *a)
    )
    with pytest.raises(ResourceError, match=r"pip install 'fedtune\[ray\]'.*engine=local"):
        engines.run(tiny(engine__name="ray"), tmp_path)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_an_accelerator_that_ray_would_hide_is_refused(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    import torch

    monkeypatch.setattr("fedtune.models.encoder.select_device", lambda name: torch.device("cuda"))
    with pytest.raises(ConfigError, match=rf"device={device} is cuda here.*engine=local"):
        engines.run(tiny(engine__name="ray", device=device), tmp_path)


def test_what_a_worker_does_with_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedtune.federation.client import app as client_app

    impatient(monkeypatch)
    seen = []

    def answer(message: Message, context: Context) -> Message:
        seen.append((dict(context.run_config), context.node_config["partition-id"]))
        context.state["n"] = ConfigRecord({"hung": bool(message.content["c"]["hang"])})
        if message.content["c"]["hang"]:
            HUNG.set()
            while True:
                time.sleep(0.01)
        return Message(message.content, reply_to=message)

    inner = ClientApp()
    inner.train()(answer)
    monkeypatch.setattr(client_app, "app", inner)
    app = ConfiguredClientApp({"fedtune": "{}"}, {"FEDTUNE_TEST_PASSED_ON": "yes"}, timeout=0.5)
    context = Context(1, 7, {"partition-id": 3}, RecordDict(), {})

    def send(hang: bool) -> Message:
        with task_identity(1):
            return app(Message(RecordDict({"c": ConfigRecord({"hang": hang})}), 7, "train"), context)

    assert send(hang=False).has_content()
    assert seen == [({"fedtune": "{}"}, 3)]
    assert os.environ.pop("FEDTUNE_TEST_PASSED_ON") == "yes"
    assert context.run_config == {}, "Flower refuses a Context whose run_config has changed"
    assert context.state["n"]["hung"] is False
    # One that hangs is given up, what it did to its state is dropped, and the next one is served.
    assert "did not answer in 0.5 s" in (send(hang=True).error.reason or "")
    assert context.state["n"]["hung"] is False
    assert send(hang=False).has_content()


def test_a_worker_on_another_machine_answers_for_public_data_only(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ledger would be another: each machine would count for itself what the data has spent."""
    made: list[ConfiguredClientApp] = []

    def simulation(server_app: Any, client_app: ConfiguredClientApp, *args: Any, **options: Any) -> None:
        made.append(client_app)

    monkeypatch.setattr("flwr.simulation.run_simulation", simulation)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    public = private(tiny(engine__name="ray"))
    public.data.public = True
    for config in (private(tiny(engine__name="ray")), public, tiny(engine__name="ray")):
        with pytest.raises(KeyboardInterrupt):  # no result
            engines.run(config, tmp_path)
    monkeypatch.setattr(platform, "node", lambda: "elsewhere")
    inner = ClientApp()
    inner.train()(lambda message, context: Message(message.content, reply_to=message))
    monkeypatch.setattr("fedtune.federation.client.app.app", inner)
    context = Context(1, 7, {"partition-id": 3}, RecordDict(), {})
    with task_identity(1):
        answers = [app(Message(RecordDict(), 7, "train"), context) for app in made]
    assert [answer.has_error() for answer in answers] == [True, False, False]
    assert "sent to the machine elsewhere" in str(answers[0].error.reason)


# Ray's workers import torch before they answer, which takes its time on a machine that has other work.
PATIENT = {"federation__round_timeout": 400.0}
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_same_seed_and_no_noise_give_the_same_adapter_in_both_engines(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    changes = {"federation__num_rounds": 2, "federation__cohort_size": 2, **PATIENT}
    local = engines.run(tiny(**changes), tmp_path / "local")
    ray = engines.run(tiny(**changes, engine__name="ray"), tmp_path / "ray")
    np.testing.assert_allclose(ray.adapter, local.adapter, rtol=1e-5, atol=1e-7)
    assert ray.releases == local.releases
    assert [s.updates for s in ray.history] == [s.updates for s in local.history]


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_accounting_is_the_same_in_both_engines(
    tiny: Callable[..., Config], tmp_path: Path, golden: Golden
) -> None:
    local = engines.run(private(tiny(federation__num_rounds=2, **PATIENT)), tmp_path / "local")
    config = private(tiny(federation__num_rounds=2, engine__name="ray", **PATIENT))
    ray = engines.run(config, tmp_path / "ray")
    assert ray.epsilon == local.epsilon
    assert ray.releases == local.releases == {f"site-{i}": 2 for i in range(4)}
    for i in range(4):
        assert len(node_ledger().releases(run=ray.run, node=f"site-{i}")) == 2
    # An error of the server loop comes out of the simulation as itself.
    with pytest.raises(CheckpointError) as raised:
        engines.run(config, tmp_path / "ray")
    golden(raised)


@needs_ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_private_evaluation_is_the_same_in_both_engines(tiny: Callable[..., Config], tmp_path: Path) -> None:
    """Workers of their own answer about what they hold out: the same counts without noise, and charged
    in the nodes' ledgers where there is."""

    def asking(config: Config) -> Config:
        config.federation.evaluation, config.federation.evaluation_share = "private", 0.3
        return config

    changes = {"federation__num_rounds": 2, **PATIENT}
    local = engines.run(asking(tiny(**changes)), tmp_path / "local").evaluation
    ray = engines.run(asking(tiny(**changes, engine__name="ray")), tmp_path / "ray").evaluation
    assert isinstance(local, NodesEvaluation) and isinstance(ray, NodesEvaluation)
    assert (ray.round, ray.missing, len(ray.nodes)) == (2, (), 4)
    assert ray.accuracy == local.accuracy and ray.units == local.units > 20
    assert ray.nodes == local.nodes
    noised = engines.run(asking(private(tiny(**changes, engine__name="ray"))), tmp_path / "noised")
    assert isinstance(noised.evaluation, NodesEvaluation)
    assert noised.evaluation.units != round(noised.evaluation.units)
    assert noised.answers == {f"site-{i}": 1 for i in range(4)}
    assert noised.epsilon == pytest.approx(noised.plan.epsilon(2, 1))
    for i in range(4):
        (release,) = node_ledger().releases(run=noised.run, node=f"site-{i}", purpose="evaluation")
        assert release.committed and release.steps is not None
