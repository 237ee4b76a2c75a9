"""Hydra's plugins for sweeps: `basic`, all combinations, and `fedtune_optuna`, a search.

Both tell a watcher (`fedtune.config.launch.Watcher`) what is to come before the first run starts, and leave
to it which runs are made. The watcher comes with the task, the one object that Hydra hands to a sweeper.

Why not Hydra's own sweeper of grids: it does not look ahead, and composes each job twice. Ours takes its
name, for a page (`sweep=optuna`) can choose another sweeper than Hydra's default, not than one that
`conf/config.yaml` chose. Why not `hydra-optuna-sweeper` 1.3.0: it wants optuna below 3, whose SQLite storage
fails with the SQLAlchemy 2.1 that flwr needs; it cannot prune, for a run cannot reach its trial; and it
cannot go on with a study.

Hydra finds the plugins because this file lies in `hydra_plugins`, and imports it a second time for itself:
no other module may compare these classes or keep state in this one.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

__all__ = ["GridSweeper", "SearchSweeper"]

_TARGET = "hydra_plugins.fedtune_sweepers."
_GRID = {"_target_": f"{_TARGET}GridSweeper", "params": None, "max_batch_size": None}
_SEARCH = {
    "_target_": f"{_TARGET}SearchSweeper",
    "params": None,
    "trials": 20,
    "objectives": ["accuracy"],
    "sampler": "tpe",
    "pruner": None,
}
for _name, _node in (("basic", _GRID), ("fedtune_optuna", _SEARCH)):
    ConfigStore.instance().store(group="hydra/sweeper", name=_name, node=_node, provider="fedtune")


class _WatchedSweeper(Sweeper):
    """What a grid and a search have in common: they look ahead, and launch."""

    config: DictConfig
    hydra_context: HydraContext
    launcher: Launcher

    def __init__(self, params: DictConfig | None) -> None:
        self.params: dict[str, Any] = {} if params is None else {str(name): params[name] for name in params}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """As Hydra's manual says."""
        from fedtune.config.launch import ComposeOnce

        self.loader = ComposeOnce(hydra_context.config_loader)
        loader: Any = self.loader  # it does all that a ConfigLoader does
        self.hydra_context = dataclasses.replace(hydra_context, config_loader=loader)
        self.config, self.watcher = config, getattr(task_function, "watcher", None)
        self.folder = Path(str(config.hydra.sweep.dir))
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=self.hydra_context, task_function=task_function, config=config
        )

    def parsed(self, arguments: list[str]) -> list[Override]:
        """The overrides of a page and of the command line; the later of two with one name counts."""
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        return parser.parse_overrides(
            [*(f"{name}={value}" for name, value in self.params.items()), *arguments]
        )

    def save(self) -> None:
        """Writes what Hydra writes of a sweep into its folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, self.folder / "multirun.yaml")

    def launch(self, jobs: Sequence[Sequence[str]], first: int) -> Sequence[JobReturn]:
        """Runs jobs, numbered from `first`. Raises ResourceError if the launcher fails, not a run in it."""
        from fedtune.errors import FedtuneError, ResourceError

        try:
            return self.launcher.launch(jobs, initial_job_idx=first)
        except (FedtuneError, HydraException, OmegaConfBaseException):
            raise
        except Exception as error:
            name = self.config.hydra.runtime.choices["hydra/launcher"]
            if name == "basic":  # runs all in this process: the error is ours
                raise
            reason = " ".join(str(error).split()).rstrip(".")
            raise ResourceError(
                f"hydra/launcher={name} could not make the runs: {reason}. What was finished is kept: mend "
                f"it and go on with 'fedtune run sweep.resume={self.folder}', or begin anew without that "
                "launcher."
            ) from error

    def workers(self, most: int | None = None) -> int:
        """How many jobs the launcher runs side by side, as far as its settings say; at most `most`."""
        launcher = self.config.hydra.launcher
        asked = OmegaConf.select(launcher, "n_jobs")  # joblib's; below 0: as many as there are cores
        if asked is None and "ray" in launcher:
            asked = launcher.ray.init.get("num_cpus") or -1
        if asked is None and "submitit_folder" in launcher:
            asked = launcher.get("array_parallelism") or most or 1  # a queue takes all at once
        workers = 1 if asked is None else int(asked) if int(asked) > 0 else os.cpu_count() or 1
        return max(1, workers if most is None else min(workers, most))


class GridSweeper(_WatchedSweeper):
    """Runs every combination of the values that were given."""

    def __init__(self, params: DictConfig | None = None, max_batch_size: int | None = None) -> None:
        super().__init__(params)
        self.max_batch_size = max_batch_size

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        """Runs the grid to its end; returns what the launcher returned, one for each run."""
        from fedtune.config.launch import foreseen

        jobs = self.combinations(self.parsed(arguments))
        if self.watcher is not None:
            jobs = self.watcher.begin(self.folder, jobs)
        self.save()
        # Every job composes, or the sweep does not begin.
        configs = [foreseen(self.loader.compose(self.config, job), job) for job in jobs]
        if self.watcher is not None and jobs:
            self.watcher.foresee(configs, self.workers(len(jobs)))
        returns: list[JobReturn] = []
        while batch := jobs[len(returns) :][: self.max_batch_size]:
            returns += self.launch(batch, len(returns))
        return returns

    @staticmethod
    def combinations(overrides: Sequence[Override]) -> list[list[str]]:
        """The overrides of each job. Raises ConfigError for an interval, which has no values."""
        from fedtune.errors import ConfigError

        axes: dict[str, list[str]] = {}
        for override in overrides:
            name = override.get_key_element()
            if not override.is_sweep_override():
                axes[name] = [f"{name}={override.get_value_element_as_str()}"]
            elif override.is_discrete_sweep():
                axes[name] = [f"{name}={value}" for value in override.sweep_string_iterator()]
            else:
                raise ConfigError(
                    f"{override.input_line} is an interval, and a grid needs values: give some, with "
                    "commas, or search the interval with sweep=optuna."
                )
        return [list(job) for job in itertools.product(*axes.values())]


class SearchSweeper(_WatchedSweeper):
    """Asks the watcher for runs, launches them, and tells of their end, until no more are asked for."""

    def __init__(self, params: DictConfig | None = None, **options: Any) -> None:
        super().__init__(params)
        self.options = options

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        """Runs the search to its end; returns what the launcher returned, one for each run."""
        from fedtune.config.launch import foreseen
        from fedtune.config.search import Space, space_of
        from fedtune.errors import ConfigError

        if self.watcher is None:
            raise ConfigError("This command cannot search. Use 'fedtune run sweep=optuna ...'.")
        axes, fixed = space_of(self.parsed(arguments))
        options = {name: _plain(value) for name, value in self.options.items()}
        base = foreseen(self.loader.load_sweep_config(self.config, list(fixed)), fixed)
        searcher = self.watcher.search(Space(self.folder, axes, fixed, options, base, self.workers()))
        self.save()
        returns: list[JobReturn] = []
        while batch := searcher.ask(self.workers()):
            for numbers, jobs in _in_a_row(batch):
                returns += self.launch(jobs, numbers[0])
                for number in numbers:
                    searcher.tell(number)
        return returns


def _in_a_row(batch: Sequence[tuple[int, list[str]]]) -> list[tuple[list[int], list[list[str]]]]:
    """The batch in parts whose numbers follow one another: a launcher counts up from the first."""
    parts: list[tuple[list[int], list[list[str]]]] = []
    for number, job in batch:
        if parts and parts[-1][0][-1] == number - 1:
            parts[-1][0].append(number)
            parts[-1][1].append(job)
        else:
            parts.append(([number], [job]))
    return parts


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
