"""One run or a sweep, driven by Hydra: composes the configuration of each job and calls a task with it.

Sweeps go through the doors that Hydra documents: the sweepers are plugins
(`hydra_plugins/fedtune_sweepers.py`), any launcher runs the jobs, and `hydra.run.dir`, `hydra.sweep.dir` and
callbacks of the user's work as Hydra's manual says.

What no documented door does: start a run from given words. `@hydra.main` reads `sys.argv`, prints errors of
its own and leaves by `sys.exit`. So `run` and `multirun` are called here, on the object that
`initialize_config_dir` leaves in `GlobalHydra`; a test holds that no other internal of Hydra is used, and
this one only here. Hydra's callbacks cannot check anything before a run: an error in one becomes a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from hydra import compose
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedtune.config.loader import (
    from_hydra,
    hydra_errors,
    load,
    register_schema,
    search_path,
    started_hydra,
)
from fedtune.config.overrides import asks_for_sweep, check_overrides, named_settings
from fedtune.config.schema import Config
from fedtune.config.search import Searcher, Space
from fedtune.errors import ConfigError

__all__ = ["ComposeOnce", "Job", "JobFailure", "Watcher", "foreseen", "is_sweep", "launch"]

_MOST_COMPOSED = 2000  # configurations that wait for their run; more are composed again
_SWEEPERS = ("basic", "fedtune_optuna")


@dataclass(frozen=True)
class Job:
    """One run that is about to start.

    Attributes:
        config: complete; `config.output` is the run folder, which exists.
        number: position in a sweep, from 0; None for a single run.
        overrides: what sets it apart in a sweep ('privacy.epsilon=2'); empty for a single run.
    """

    config: Config
    number: int | None
    overrides: str


@dataclass(frozen=True)
class JobFailure:
    """What a failed job of a sweep returns, so that it is counted wherever the job ran."""

    number: int
    message: str


class Watcher(Protocol):
    """Who is told of a sweep before its first run."""

    def begin(self, folder: Path, jobs: list[list[str]]) -> list[list[str]]:
        """The jobs of a grid, each the list of its overrides; returns those to run."""

    def foresee(self, configs: list[Config | None], workers: int) -> None:
        """What those runs will be (None: this one does not fit together), so many of them side by side."""

    def search(self, space: Space) -> Searcher:
        """A sweeper that searches makes its jobs as it goes, by asking what this returns."""


def is_sweep(overrides: Sequence[str]) -> bool:
    """Do `overrides` ask for a sweep by themselves, without -m (sweep=NAME, hydra.mode=MULTIRUN)?"""
    return any(asks_for_sweep(text) for text in overrides)


def launch(
    overrides: Sequence[str],
    task: Callable[[Job], Any],
    *,
    on_failure: Callable[[Job | None, Exception], str],
    multirun: bool = False,
    extra_dirs: Sequence[Path] = (),
    watcher: Watcher | None = None,
) -> list[JobFailure]:
    """Runs `task` once, or once for each job of a sweep.

    Everything that can be checked is checked before a folder is made.

    Args:
        overrides: in Hydra's syntax.
        task: makes one run. What a single run raises passes to the caller.
        on_failure: told of each failed run of a sweep, whose others go on; returns its message.
        multirun: a sweep, whatever the overrides say.
        extra_dirs: folders with groups of the user's own.
        watcher: told what is to come in a sweep.

    Returns:
        The failures of a sweep.

    Raises:
        ConfigError: the overrides mean nothing.
    """
    checked = check_overrides(overrides, multirun=multirun, extra_dirs=extra_dirs)
    if checked.resume is not None:
        task(Job(load(overrides, extra_dirs), None, ""))
        return []
    arguments = list(checked.arguments)
    if extra_dirs:
        arguments.append(search_path(extra_dirs))
    register_schema()
    with started_hydra():
        sweeping = checked.sweeps or multirun
        if not sweeping:
            with hydra_errors():
                composed = compose("config", overrides=arguments, return_hydra_config=True)
            sweeping = composed.hydra.mode == RunMode.MULTIRUN
        if not sweeping:
            from_hydra(_without_hydra(composed), checked.keys)  # complains before there is a run folder
            _single(arguments, task)
            return []
        if watcher is not None:
            _check_sweeper(overrides)
        return _sweep(arguments, _SweepTask(task, on_failure, watcher))


def _check_sweeper(overrides: Sequence[str]) -> None:
    other = [text for text in overrides if text.startswith("hydra/sweeper=")]
    if other and other[-1].partition("=")[2] not in _SWEEPERS:
        raise ConfigError(
            f"{other[-1]}: fedtune records a sweep before it starts, which only its own sweepers do: "
            f"{' and '.join(_SWEEPERS)} (sweep=optuna). Leave it out."
        )


def _single(arguments: list[str], task: Callable[[Job], Any]) -> None:
    raised: list[Exception] = []

    def job(composed: DictConfig) -> None:
        try:
            task(_job(composed, number=None))
        except Exception as error:
            # Handed over by hand, because Hydra would print a line of its own before raising it.
            raised.append(error)

    with hydra_errors():
        _hydra().run("config", job, arguments)
    if raised:
        raise raised[0]


class _SweepTask:
    """The task of each job of a sweep, as a launcher calls it: here, or from a copy in another process."""

    def __init__(
        self,
        task: Callable[[Job], Any],
        on_failure: Callable[[Job | None, Exception], str],
        watcher: Watcher | None,
    ) -> None:
        self.task, self.on_failure, self.watcher = task, on_failure, watcher

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "watcher": None}  # who watches stays where the sweep is

    def __call__(self, composed: DictConfig) -> Any:
        job: Job | None = None
        number = int(HydraConfig.get().job.num)
        try:
            job = _job(composed, number)
            return self.task(job)
        except Exception as error:
            return JobFailure(number, self.on_failure(job, error))


def _sweep(arguments: list[str], task: _SweepTask) -> list[JobFailure]:
    with hydra_errors():
        results = _hydra().multirun("config", task, arguments)
    return [failure for failure in _returned(results) if isinstance(failure, JobFailure)]


def _hydra() -> Any:
    """The object whose `run` and `multirun` no documented door of Hydra's reaches with words of one's own."""
    return GlobalHydra.instance().hydra


class ComposeOnce:
    """Hydra's loader of configurations, for a sweeper: what was composed to look ahead is not composed again.

    Sent to another process it is the loader that it wraps.
    """

    def __init__(self, loader: ConfigLoader) -> None:
        self._loader = loader
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def __reduce__(self) -> Any:
        return _same, (self._loader,)

    def compose(self, master_config: DictConfig, job: Sequence[str]) -> DictConfig:
        """The configuration of a job that is launched later."""
        composed = self._loader.load_sweep_config(master_config, list(job))
        if len(self._composed) < _MOST_COMPOSED:
            self._composed[tuple(job)] = composed
        return composed

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """The configuration of a job that is launched now."""
        ahead = self._composed.pop(tuple(sweep_overrides), None)
        return ahead or self._loader.load_sweep_config(master_config, sweep_overrides)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def _same(loader: ConfigLoader) -> ConfigLoader:
    return loader


def foreseen(composed: DictConfig, overrides: Sequence[str]) -> Config | None:
    """The configuration of a job that is not launched yet; None if it is complete only then, or wrong."""
    try:
        return from_hydra(_without_hydra(composed), named_settings(overrides))
    except (ConfigError, OmegaConfBaseException):
        return None


def _without_hydra(composed: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])


def _job(composed: DictConfig, number: int | None) -> Job:
    state = HydraConfig.get()
    config = from_hydra(composed, named_settings(list(state.overrides.task)))
    config = replace(config, output=str(state.runtime.output_dir))
    return Job(config, number, "" if number is None else str(state.job.override_dirname))


def _returned(results: Any) -> list[Any]:
    """The return values in what a sweeper gives back, which is its own affair."""
    if isinstance(results, JobReturn):
        return [results.return_value]
    if isinstance(results, (list, tuple)):
        return [value for item in results for value in _returned(item)]
    return []
