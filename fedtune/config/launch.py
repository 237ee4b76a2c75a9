"""One run or a sweep, driven by Hydra: composes the configuration of each job and calls a task with it.

Hydra's own `@hydra.main` is not used: it reads `sys.argv`, prints errors of its own and leaves by
`sys.exit`. The same that it does, `Hydra.run` and the steps of `Hydra.multirun`, is done here, so that
`hydra.run.dir`, `hydra.sweep.dir`, launchers and sweepers work as Hydra's manual says; they are internals of
hydra 1.3, which is why pyproject.toml holds hydra-core below 1.4 and this is the only place that knows.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedtune.config.groups import conf_dir
from fedtune.config.loader import from_hydra, hydra_errors, load, register_schema, search_path
from fedtune.config.overrides import asks_for_sweep, check_overrides, named_settings
from fedtune.config.schema import Config
from fedtune.config.search import Axis, Searcher, Space
from fedtune.errors import ConfigError, FedtuneError, ResourceError

__all__ = ["Job", "JobFailure", "Watcher", "is_sweep", "launch"]

_MOST_KEPT = 2000  # composed configurations that wait for their run; more are composed again


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
    """Runs `task` once, or once for each job of a sweep; returns the failures of the sweep.

    A single run's exception passes to the caller. In a sweep, `on_failure` is told of each and returns its
    message, and the other jobs go on; `watcher` is told what is to come. Everything that can be checked is
    checked before a folder is made. Raises `ConfigError`.
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
            return _sweep(hydra, arguments, task, on_failure, watcher)
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
    watcher: Watcher | None,
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
        results = _multirun(hydra, job, arguments, watcher)
    return [failure for failure in _returned(results) if isinstance(failure, JobFailure)]


def _multirun(
    hydra: Hydra, job: Callable[[DictConfig], Any], arguments: list[str], watcher: Watcher | None
) -> Any:
    """`Hydra.multirun`, with a look at what is to come before the first job starts."""
    config = hydra.compose_config("config", arguments, RunMode.MULTIRUN)
    callbacks = Callbacks(config)
    callbacks.on_multirun_start(config=config, config_name="config")
    context = HydraContext(config_loader=hydra.config_loader, callbacks=callbacks)
    sweeper: Any = Plugins.instance().instantiate_sweeper(
        config=config, hydra_context=context, task_function=job
    )
    # Hydra's own sweeper of grids has this method; one that searches does not know its jobs beforehand.
    if watcher is not None and hasattr(sweeper, "split_arguments"):
        _watch_grid(sweeper, config, watcher)
    elif hasattr(sweeper, "begin"):
        _watch_search(sweeper, config, watcher)
    task_overrides: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    try:
        results = sweeper.sweep(arguments=task_overrides)
    except (FedtuneError, HydraException, OmegaConfBaseException):
        raise
    except Exception as error:
        if _in_this_process(sweeper):
            raise
        # A run's own errors were caught in the run: this is the launcher's, which lacks something or lost it.
        name, said = config.hydra.runtime.choices["hydra/launcher"], " ".join(str(error).split())
        raise ResourceError(
            f"hydra/launcher={name} could not make the runs: {said.rstrip('.')}. What was finished is kept: "
            f"mend it and go on with 'fedtune run sweep.resume={config.hydra.sweep.dir}', or begin anew "
            "without that launcher."
        ) from error
    callbacks.on_multirun_end(config=config, config_name="config")
    return results


def _watch_grid(sweeper: Any, config: DictConfig, watcher: Watcher) -> None:
    split, loader = sweeper.split_arguments, sweeper.hydra_context.config_loader
    compose = loader.load_sweep_config
    kept: dict[tuple[str, ...], DictConfig] = {}

    def chosen(overrides: Any, batch_size: int | None) -> list[list[list[str]]]:
        for one in overrides:
            if one.is_interval_sweep():
                raise ConfigError(
                    f"{one.input_line} is an interval, and a grid needs values: give some, with commas, or "
                    "search the interval with sweep=optuna."
                )
        jobs = [job for batch in split(overrides, batch_size) for job in batch]
        jobs = watcher.begin(Path(str(config.hydra.sweep.dir)), jobs)
        return [jobs] if jobs else []

    def check(batch: Sequence[Sequence[str]]) -> None:
        """Every job composes, or the sweep does not begin. What was composed is kept for its launch."""
        configs = []
        for job in batch:
            composed = compose(config, list(job))
            if len(kept) < _MOST_KEPT:
                kept[tuple(job)] = composed
            configs.append(_foreseen(composed, list(job)))
        watcher.foresee(configs, _workers(config, len(batch)))

    def once(master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        return kept.pop(tuple(sweep_overrides), None) or compose(master_config, sweep_overrides)

    sweeper.split_arguments = chosen
    sweeper.validate_batch_is_legal = check
    if _in_this_process(sweeper):  # others send the loader to another one
        loader.load_sweep_config = once


def _in_this_process(sweeper: Any) -> bool:
    """By name, because Hydra's search for plugins imports its own modules a second time, and the class of its
    launcher is not the one that an import gives."""
    return type(sweeper.launcher).__qualname__ == BasicLauncher.__qualname__


def _watch_search(sweeper: Any, config: DictConfig, watcher: Watcher | None) -> None:
    if watcher is None:
        raise ConfigError("This command cannot search. Use 'fedtune run sweep=optuna ...'.")
    sweeper.workers = workers = _workers(config)

    def begin(axes: tuple[Axis, ...], fixed: tuple[str, ...], options: dict[str, Any]) -> Searcher:
        composed = sweeper.hydra_context.config_loader.load_sweep_config(config, list(fixed))
        base = _foreseen(composed, list(fixed))
        folder = Path(str(config.hydra.sweep.dir))
        return watcher.search(Space(folder, axes, fixed, options, base, workers))

    sweeper.begin = begin


def _foreseen(composed: DictConfig, overrides: list[str]) -> Config | None:
    """The configuration of a job that is not launched yet; None if it is complete only then, or wrong."""
    try:
        own = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
        return from_hydra(own, named_settings(overrides))
    except (ConfigError, OmegaConfBaseException):
        return None


def _workers(config: DictConfig, most: int | None = None) -> int:
    """How many jobs the launcher runs side by side, as far as its settings say."""
    asked = OmegaConf.select(config, "hydra.launcher.n_jobs")  # joblib's; below 0: as many as there are cores
    if asked is None and "ray" in config.hydra.launcher:
        asked = config.hydra.launcher.ray.init.get("num_cpus") or -1
    if asked is None and "submitit_folder" in config.hydra.launcher:
        asked = config.hydra.launcher.get("array_parallelism") or most or 1  # a queue takes all at once
    workers = 1 if asked is None else int(asked) if int(asked) > 0 else os.cpu_count() or 1
    return max(1, workers if most is None else min(workers, most))


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
