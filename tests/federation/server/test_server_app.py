"""Flower's ServerApp in this process: what `flwr run` does, without the SuperLink."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from fedtune.config.convert import to_json
from fedtune.config.loader import read_config
from fedtune.config.schema import Config
from fedtune.engines.local import LocalGrid
from fedtune.errors import ConfigError
from fedtune.federation.client.app import app as client_app
from fedtune.federation.flower import task_identity
from fedtune.federation.server import app as server_app
from fedtune.federation.server import cohort
from tests.support.tiny_federation import private

CALLS: list[tuple[Any, ...]] = []


def note(*arguments: Any) -> None:
    """What the run config's `finish` names in these tests."""
    CALLS.append(arguments)


def start(config: Config, monkeypatch: pytest.MonkeyPatch, nodes: int = 4, **run_config: str) -> None:
    monkeypatch.setattr(cohort, "_SETTLED_SECONDS", 0.1)
    values = {"fedtune": to_json(config), "output": "", "finish": "", **run_config}
    grid = LocalGrid(client_app, nodes, values, timeout=60.0)
    try:
        with task_identity(grid.run_id):
            server_app.app(grid, Context(grid.run_id, 1, {}, RecordDict(), dict(values)))  # type: ignore[arg-type]
    finally:
        grid.close()


@pytest.mark.slow
def test_a_run_leaves_its_files_and_calls_who_finishes_it(
    tiny: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    CALLS.clear()
    run_dir = tmp_path / "run"
    config = private(tiny(federation__num_rounds=2))
    start(config, monkeypatch, output=str(run_dir), finish=f"{__name__}:note")
    ((finished, folder, result, meter),) = CALLS
    assert finished.output == str(run_dir)
    assert folder == run_dir
    assert meter.cost().seconds > 0
    assert (run_dir / "adapter" / "adapter_config.json").is_file()
    history = json.loads((run_dir / "history.json").read_text())
    assert history["releases"] == result.releases == {f"site-{i}": 2 for i in range(4)}
    assert history["epsilon"] == result.epsilon
    assert [one["round"] for one in history["rounds"]] == [1, 2]
    assert read_config(run_dir).federation.num_rounds == 2
    told = capsys.readouterr().out
    assert "round 2/2: 4 updates" in told
    assert str(run_dir) in told


def test_nodes_that_are_fewer_than_shards_are_told_of(
    tiny: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    start(tiny(federation__num_rounds=1), monkeypatch, nodes=2, output=str(tmp_path))
    assert "has 4 shards, and only 2 of them have a node" in capsys.readouterr().out
    assert "num-supernodes=4" in json.loads((tmp_path / "history.json").read_text())["notices"][0]


@pytest.mark.parametrize("named", ["fedtune.nowhere:finish", "fedtune.errors:finish", "fedtune"])
def test_a_finish_that_does_not_exist_is_an_error_that_loses_nothing(
    tiny: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    with pytest.raises(ConfigError, match="finish="):
        start(tiny(federation__num_rounds=1), monkeypatch, output=str(tmp_path), finish=named)
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert (tmp_path / "history.json").is_file()


@pytest.mark.slow
def test_without_an_output_the_run_is_kept_below_the_state_folder(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, fedtune_home: Path
) -> None:
    start(tiny(federation__num_rounds=1), monkeypatch)
    (run_dir,) = (fedtune_home / "state" / "runs").iterdir()
    assert (run_dir / "history.json").is_file()


def test_the_function_that_pyproject_names_exists() -> None:
    import importlib
    import tomllib

    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    flower = project["tool"]["flwr"]["app"]
    for name in (*flower["components"].values(), flower["config"]["finish"]):
        module, _, attribute = name.partition(":")
        assert callable(getattr(importlib.import_module(module), attribute))
    assert flower["config"]["fedtune"] == ""
