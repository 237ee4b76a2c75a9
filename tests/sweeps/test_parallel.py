"""Sweeps whose runs a launcher shares out to several processes, and the ledgers that they must share."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest

from fedtune.config.loader import load
from fedtune.config.overrides import check_overrides
from fedtune.errors import ConfigError, LedgerError, ResourceError
from fedtune.sweeps.options import SweepOptions
from fedtune.sweeps.sweep import Sweep, run_sweep
from tests.support.golden import Golden

HERE = str(Path(__file__).resolve().parent)
LAUNCHERS = [
    pytest.param(["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], "joblib", id="joblib"),
    pytest.param(["hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2"], "ray", id="ray"),
    pytest.param(["hydra/launcher=submitit_local"], "submitit", id="submitit"),
]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _start_ray(request: pytest.FixtureRequest) -> None:
    """A Ray that the launcher finds running: Ray waits 30 s for itself, and a busy machine may need more."""
    ray = pytest.importorskip("ray")
    request.addfinalizer(ray.shutdown)
    for attempt in range(3):
        try:
            ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=80_000_000)
            return
        except Exception:
            ray.shutdown()
            if attempt == 2:
                raise


def sweep(*words: str) -> tuple[list[Any], list[str]]:
    """Failures and lines; what is sent to other processes must be functions of its own, so they are local."""
    log, here = Path("lines").absolute(), HERE

    def start(config: Any, title: str, stop_rule: Any, alone: bool) -> Path:
        import sys

        sys.path.insert(0, here)
        from tests.support.synthetic import make_record, write

        if config.seed == 2:
            raise ValueError("seed two")
        made = make_record(seed=config.seed, train__learning_rate=config.train.learning_rate)
        made["run"]["id"] += f"{os.getpid()}-{Path(config.output).name}"
        made["run"]["hardware"]["process"], made["run"]["hardware"]["alone"] = os.getpid(), alone
        for one in made["metrics"]["by_round"] if stop_rule is not None else []:
            from fedtune.federation.events import RoundSummary

            stop_rule(RoundSummary(one["round"], 6, 1.0, accuracy=one["accuracy"]))
        return write(Path(config.output), made)

    def say(line: str) -> None:
        with log.open("a") as file:
            file.write(line + "\n")

    failures = run_sweep(words, start, describe=lambda error: str(error), say=say, warn=say).failures
    return failures, log.read_text().splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(("words", "package"), LAUNCHERS)
def test_runs_are_shared_out(words: list[str], package: str, request: pytest.FixtureRequest) -> None:
    pytest.importorskip(f"hydra_plugins.hydra_{package}_launcher")
    if package == "ray":
        _start_ray(request)
    failures, lines = sweep("seed=0,1,2,3", "hydra.sweep.dir=sweep", *words)
    assert [failure.number for failure in failures] == [2] and "seed two" in failures[0].message
    made = [json.loads((Path("sweep") / str(i) / "record.json").read_text()) for i in (0, 1, 3)]
    assert [one["config"]["seed"] for one in made] == [0, 1, 3]
    processes = {one["run"]["hardware"]["process"] for one in made}
    assert os.getpid() not in processes and not any(one["run"]["hardware"]["alone"] for one in made)
    assert lines[0].startswith("4 runs in sweep") and sum("best so far" in line for line in lines) == 3
    assert (Path("sweep") / "2" / "failure.json").exists()
    again, lines = sweep("sweep.resume=sweep")
    assert [failure.number for failure in again] == [2], "what had failed is tried again, and nothing else"
    assert sum("finished before" in line for line in lines[-5:]) >= 3


@pytest.mark.slow
def test_a_search_with_two_workers_judges_in_them(tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    pytest.importorskip("joblib")
    # Absolute: joblib keeps its processes, and those of another test stand in another folder.
    folder = tmp_path / "sweep"
    words = [
        "train.learning_rate=tag(log,interval(0.001,0.1))",
        "sweep.trials=4",
        f"hydra.sweep.dir={folder}",
    ]
    failures, lines = sweep("sweep=optuna", *words, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert failures == [] and any(line.startswith("4 trials: ") for line in lines)
    from optuna import load_study

    from fedtune.sweeps.study import STUDY_FILE, STUDY_NAME, storage

    trials = load_study(study_name=STUDY_NAME, storage=storage(folder / STUDY_FILE)).get_trials()
    assert [len(trial.intermediate_values) for trial in trials] == [6] * 4


@pytest.mark.slow
def test_a_run_that_is_sent_away_from_the_ledgers_is_refused() -> None:
    away = Sweep(SweepOptions(), [], lambda *_: Path(), str, print, print, machine="elsewhere")
    private = load(["data=files", "data.path=x", "data.name=x"])
    with pytest.raises(LedgerError, match="lie on elsewhere"):
        away._refuse_other_machine(private)
    private.data.public = True
    away._refuse_other_machine(private)
    here = Sweep(SweepOptions(), [], lambda *_: Path(), str, print, print)
    private.data.public = False
    here._refuse_other_machine(private)


@pytest.mark.parametrize(
    ("launcher", "message"),
    [
        ("joblib", r"fedtune\[parallel\]"),
        ("ray", r"fedtune\[ray\]'.*--no-deps hydra-ray-launcher"),
        ("submitit_slurm", r"fedtune\[submitit\]"),
    ],
)
def test_a_launcher_that_is_not_installed(
    launcher: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=message):
        check_overrides([f"hydra/launcher={launcher}", "seed=1,2"], multirun=True)


@pytest.mark.slow
def test_a_launcher_that_cannot_start_says_so_in_a_paragraph(
    monkeypatch: pytest.MonkeyPatch, golden: Golden
) -> None:
    from hydra.core.plugins import Plugins

    module = "hydra_plugins.hydra_joblib_launcher.joblib_launcher"
    pytest.importorskip(module)
    launcher = Plugins.instance().class_name_to_class[f"{module}.JoblibLauncher"]  # Hydra loads it anew

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no workers\nto be had.")

    monkeypatch.setattr(launcher, "launch", broken)
    with pytest.raises(ResourceError) as raised:
        sweep("seed=0,1", "hydra.sweep.dir=sweep", "hydra/launcher=joblib")
    assert "resume=sweep" in str(raised.value)
    golden(raised)


def test_what_is_sent_to_another_process_leaves_the_search_here() -> None:
    sweep = Sweep(SweepOptions(), [], lambda *_: Path(), str, print, print, close=lambda: None)
    assert sweep.__getstate__()["close"] is None and sweep.close is not None
