"""One run or a sweep, driven by Hydra: composes the configuration of each job and calls a task with it.

Hydra's own `@hydra.main` is not used: it reads `sys.argv`, prints errors of its own and leaves by
`sys.exit`. The same two calls that it makes, `Hydra.run` and `Hydra.multirun`, are made here, so that
`hydra.run.dir`, `hydra.sweep.dir`, launchers and sweepers work as Hydra's manual says; they are internals of
hydra 1.3, which is why pyproject.toml holds hydra-core below 1.4 and this is the only place that knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.types import RunMode
from omegaconf import DictConfig

from fedtune.config.groups import conf_dir
from fedtune.config.loader import from_hydra, hydra_errors, load, register_schema, search_path
from fedtune.config.overrides import check_overrides, named_settings
from fedtune.config.schema import Config

__all__ = ["Job", "JobFailure", "launch"]


@dataclass(frozen=True)
class Job:
    """One run that is about to start."""

    config: Config  # complete; `config.output` is the run folder, which exists
    number: int | None  # position in a sweep, from 0; None for a single run
    overrides: str  # what sets it apart in a sweep ('privacy.epsilon=2'); empty for a single run


@dataclass(frozen=True)
class JobFailure:
    """What a failed job of a sweep returns, so that it is counted wherever the job ran."""

    number: int
    message: str


def launch(
    overrides: Sequence[str],
    task: Callable[[Job], Any],
    *,
    on_failure: Callable[[Job | None, Exception], str],
    multirun: bool = False,
    extra_dirs: Sequence[Path] = (),
) -> list[JobFailure]:
    """Runs `task` once, or once for each job of a sweep; returns the failures of the sweep.

    A single run's exception passes to the caller. In a sweep, `on_failure` is told of each and returns its
    message, and the other jobs go on. Everything that can be checked is checked before a folder is made.
    Raises `ConfigError`.
    """
    checked = check_overrides(overrides, multirun=multirun, extra_dirs=extra_dirs)
    if checked.resume is not None:
        task(Job(load(overrides, extra_dirs), None, ""))
        return []
    arguments = list(checked.arguments)
    if extra_dirs:
        arguments.append(search_path(extra_dirs))
    register_schema()
    GlobalHydra.instance().clear()
    with hydra_errors():
        source = create_config_search_path(f"file://{conf_dir()}")
        hydra = Hydra.create_main_hydra2("fedtune", source)
    try:
        if checked.sweeps or multirun or hydra.get_mode("config", arguments) == RunMode.MULTIRUN:
            return _sweep(hydra, arguments, task, on_failure)
        load(overrides, extra_dirs)  # complains now, before Hydra makes the run folder
        _single(hydra, arguments, task)
        return []
    finally:
        GlobalHydra.instance().clear()


def _single(hydra: Hydra, arguments: list[str], task: Callable[[Job], Any]) -> None:
    raised: list[Exception] = []

    def job(composed: DictConfig) -> None:
        try:
            task(_job(composed, number=None))
        except Exception as error:
            # Handed over by hand, because Hydra would print a line of its own before raising it.
            raised.append(error)

    with hydra_errors():
        hydra.run("config", job, arguments)
    if raised:
        raise raised[0]


def _sweep(
    hydra: Hydra,
    arguments: list[str],
    task: Callable[[Job], Any],
    on_failure: Callable[[Job | None, Exception], str],
) -> list[JobFailure]:
    def job(composed: DictConfig) -> Any:
        this: Job | None = None
        number = int(HydraConfig.get().job.num)
        try:
            this = _job(composed, number)
            return task(this)
        except Exception as error:
            return JobFailure(number, on_failure(this, error))

    with hydra_errors():
        results = hydra.multirun("config", job, arguments)
    return [failure for failure in _returned(results) if isinstance(failure, JobFailure)]


def _job(composed: DictConfig, number: int | None) -> Job:
    state = HydraConfig.get()
    named = named_settings(list(state.overrides.task))
    config = from_hydra(composed, named)
    config.output = str(state.runtime.output_dir)
    return Job(config, number, "" if number is None else str(state.job.override_dirname))


def _returned(results: Any) -> list[Any]:
    """The return values in what a sweeper gives back, which is its own affair."""
    if isinstance(results, JobReturn):
        return [results.return_value]
    if isinstance(results, (list, tuple)):
        return [value for item in results for value in _returned(item)]
    return []
