"""Hydra's runs and sweeps, driven by our own code: folders, failures, what reaches the task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import DictConfig

from fedtune.config import launch as launch_module
from fedtune.config.launch import ComposeOnce, Job, JobFailure, launch
from fedtune.config.loader import load, save_config
from fedtune.config.schema import Config
from fedtune.errors import ConfigError, DataError
from tests.support.golden import Golden


class Recorder:
    """A task that notes its jobs, and fails where it is told to."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.jobs: list[Job] = []
        self.failed: list[tuple[Job | None, Exception]] = []
        self.fail_at = fail_at

    def __call__(self, job: Job) -> float:
        self.jobs.append(job)
        assert job.config.output is not None and Path(job.config.output).is_dir()
        if self.fail_at is not None and self.fail_at in (job.number, -1):
            raise DataError("no such column")
        return 0.5

    def on_failure(self, job: Job | None, error: Exception) -> str:
        self.failed.append((job, error))
        return str(error)


def start(recorder: Recorder, *overrides: str, multirun: bool = False) -> list[JobFailure]:
    return launch(overrides, recorder, on_failure=recorder.on_failure, multirun=multirun)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_single_run(tmp_path: Path) -> None:
    recorder = Recorder()
    assert start(recorder, "seed=4", "hydra.run.dir=here/it is") == []
    (job,) = recorder.jobs
    assert job.config.seed == 4 and job.number is None and job.overrides == ""
    assert job.config.output == str(tmp_path / "here" / "it is")
    assert Path.cwd() == tmp_path, "relative paths keep the shell's meaning"


def test_default_run_folder(tmp_path: Path) -> None:
    recorder = Recorder()
    start(recorder)
    folder = Path(recorder.jobs[0].config.output or "")
    assert folder.parent.parent == tmp_path / "outputs"
    assert list(folder.iterdir()) == [], "Hydra leaves nothing of its own"


@pytest.mark.slow
def test_same_config_as_load() -> None:
    recorder = Recorder()
    start(recorder, "privacy.noise_multiplier=2", "adapter=head", "experiment=smoke")
    config = recorder.jobs[0].config
    config.output = None
    assert config == load(["privacy.noise_multiplier=2", "adapter=head", "experiment=smoke"])


@pytest.mark.parametrize(
    "override", ["privacy.epsilom=1", "privacy.epsilon=0", "model=nope", "privacy.epsilon=null", "seed=1,2"]
)
def test_wrong_config_makes_no_folder(tmp_path: Path, override: str) -> None:
    recorder = Recorder()
    with pytest.raises(ConfigError):
        start(recorder, override)
    assert recorder.jobs == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_sweep(tmp_path: Path) -> None:
    recorder = Recorder()
    failures = start(recorder, "privacy.epsilon=1,2", "seed=0,1", "hydra.sweep.dir=sweep", multirun=True)
    assert failures == []
    assert [(job.config.privacy.epsilon, job.config.seed) for job in recorder.jobs] == [
        (1, 0),
        (1, 1),
        (2, 0),
        (2, 1),
    ]
    assert [job.number for job in recorder.jobs] == [0, 1, 2, 3]
    assert recorder.jobs[3].overrides == "privacy.epsilon=2,seed=1"
    assert [job.config.output for job in recorder.jobs] == [
        str(tmp_path / "sweep" / str(n)) for n in range(4)
    ]


@pytest.mark.slow
def test_sweep_of_noise_and_epsilon_in_turn() -> None:
    recorder = Recorder()
    start(recorder, "privacy.noise_multiplier=1,2", multirun=True)
    assert [(j.config.privacy.epsilon, j.config.privacy.noise_multiplier) for j in recorder.jobs] == [
        (None, 1),
        (None, 2),
    ]


@pytest.mark.slow
def test_sweep_page() -> None:
    recorder = Recorder()
    start(recorder, "sweep=epsilon")
    assert [job.config.privacy.epsilon for job in recorder.jobs] == [1, 2, 4, 8]


@pytest.mark.slow
def test_one_failed_job_does_not_stop_the_others() -> None:
    recorder = Recorder(fail_at=1)
    failures = start(recorder, "seed=0,1,2", multirun=True)
    assert failures == [JobFailure(1, "no such column")]
    assert len(recorder.jobs) == 3
    ((job, error),) = recorder.failed
    assert job is recorder.jobs[1] and isinstance(error, DataError)


@pytest.mark.slow
def test_a_job_whose_settings_do_not_fit_together_is_a_failure() -> None:
    recorder = Recorder()
    failures = start(recorder, "privacy.trust=local,none", "privacy.epsilon=2", multirun=True)
    assert [failure.number for failure in failures] == [1]
    assert "privacy.trust=none adds no noise" in failures[0].message


def test_a_single_run_raises_the_tasks_own_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match="no such column"):
        start(Recorder(fail_at=-1))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("multirun", [False, True])
def test_interrupt_passes(multirun: bool) -> None:
    def interrupted(job: Job) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch(["seed=1"], interrupted, on_failure=Recorder().on_failure, multirun=multirun)


def test_resume(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    save_config(load(["seed=9"]), run_dir)
    recorder = Recorder()
    start(recorder, "resume=run")
    assert recorder.jobs[0].config.seed == 9
    assert recorder.jobs[0].config.resume == str(run_dir)
    assert [path.name for path in tmp_path.iterdir()] == ["run"], "no new run folder"


@pytest.mark.slow
def test_two_launches_in_one_process() -> None:
    recorder = Recorder()
    start(recorder, "seed=1")
    start(recorder, "seed=2")
    assert [job.config.seed for job in recorder.jobs] == [1, 2]


class Everything:
    """Watches a grid and runs all of it."""

    def begin(self, folder: Path, jobs: list[list[str]]) -> list[list[str]]:
        return jobs

    def foresee(self, configs: list[Config | None], workers: int) -> None:
        raise RuntimeError("a bug of ours")


@pytest.mark.slow
def test_a_bug_is_not_blamed_on_the_launcher() -> None:
    recorder = Recorder()
    watcher: Any = Everything()
    with pytest.raises(RuntimeError, match="a bug of ours"):
        launch(["seed=1,2"], recorder, on_failure=recorder.on_failure, multirun=True, watcher=watcher)


@pytest.mark.slow
def test_a_sweep_composes_each_job_once(monkeypatch: pytest.MonkeyPatch) -> None:
    composed: list[list[str]] = []
    compose = ConfigLoaderImpl.load_sweep_config

    def counted(self: ConfigLoaderImpl, master: DictConfig, overrides: list[str]) -> DictConfig:
        composed.append(overrides)
        return compose(self, master, overrides)

    class Look(Everything):
        def foresee(self, configs: list[Config | None], workers: int) -> None:
            assert [config.seed for config in configs if config is not None] == [1, 2, 3]

    monkeypatch.setattr(ConfigLoaderImpl, "load_sweep_config", counted)
    recorder = Recorder()
    watcher: Any = Look()
    launch(["seed=1,2,3"], recorder, on_failure=recorder.on_failure, multirun=True, watcher=watcher)
    assert [job.config.seed for job in recorder.jobs] == [1, 2, 3]
    assert sorted(composed) == [["seed=1"], ["seed=2"], ["seed=3"]]


@pytest.mark.slow
def test_a_sweep_in_batches_numbers_its_runs_on() -> None:
    recorder = Recorder()
    start(recorder, "seed=1,2,3", "hydra.sweeper.max_batch_size=2", multirun=True)
    assert [(job.number, job.config.seed) for job in recorder.jobs] == [(0, 1), (1, 2), (2, 3)]


def test_a_sweeper_that_tells_nobody_what_comes_is_refused(golden: Golden) -> None:
    recorder = Recorder()
    watcher: Any = Everything()
    with pytest.raises(ConfigError) as raised:
        launch(
            ["seed=1,2", "hydra/sweeper=other"],
            recorder,
            on_failure=recorder.on_failure,
            multirun=True,
            watcher=watcher,
        )
    assert "hydra/sweeper=other" in str(raised.value)
    golden(raised)
    assert recorder.jobs == []


def test_what_was_composed_ahead_does_not_travel() -> None:
    class Loader:
        def load_sweep_config(self, master_config: Any, sweep_overrides: list[str]) -> list[str]:
            return ["composed", *sweep_overrides]

        def list_groups(self, parent_name: str) -> list[str]:
            return [parent_name]

    once = ComposeOnce(Loader())  # type: ignore[arg-type]
    ahead = once.compose(DictConfig({}), ["seed=1"])
    assert once.load_sweep_config(DictConfig({}), ["seed=1"]) is ahead
    assert once.load_sweep_config(DictConfig({}), ["seed=1"]) is not ahead, "it is kept for one launch"
    assert once.list_groups("data") == ["data"]
    make, arguments = once.__reduce__()
    assert isinstance(make(*arguments), Loader)


def test_internals_of_hydra_are_used_in_one_place_only() -> None:
    """Hydra's documented doors hold for all versions below 1.4; the one internal is in `launch._hydra`."""
    root = Path(launch_module.__file__).parents[2]
    sources = {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
        for folder in ("fedtune", "hydra_plugins")
        for path in (root / folder).rglob("*.py")
    }
    assert len(sources) > 50
    assert [name for name, text in sources.items() if "hydra._internal" in text] == []
    assert [name for name, text in sources.items() if "hydra().run(" in text or ".multirun(" in text] == [
        "fedtune/config/launch.py"
    ]
