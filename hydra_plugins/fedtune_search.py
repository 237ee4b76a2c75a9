"""Hydra's plugin for sweeps that search: `hydra/sweeper=fedtune_optuna`, which `sweep=optuna` chooses.

Why not `hydra-optuna-sweeper` 1.3.0: it wants optuna below 3, whose SQLite storage fails with the SQLAlchemy
2.1 that flwr needs; it cannot prune, for a run cannot reach its trial; and it cannot go on with a study, for
it counts its trials and its folders from 0 each time and does not look at what the study belongs to.

This is only the part that Hydra needs: who chooses the runs is `fedtune.config.search.Searcher`, which
`fedtune.config.launch` puts into `begin`. Hydra finds the plugin because it lies in `hydra_plugins`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

__all__ = ["SearchSweeper"]

ConfigStore.instance().store(
    group="hydra/sweeper",
    name="fedtune_optuna",
    node={
        "_target_": "hydra_plugins.fedtune_search.SearchSweeper",
        "params": None,
        "trials": 20,
        "objectives": ["accuracy"],
        "sampler": "tpe",
        "pruner": None,
    },
    provider="fedtune",
)

# (axes, fixed overrides, the sweeper's settings) to the one who chooses
Begin = Callable[[Any, Any, dict[str, Any]], Any]


class SearchSweeper(Sweeper):
    """Asks for runs, launches them, and tells of their end, until no more are asked for."""

    begin: Begin | None = None
    workers: int = 1

    def __init__(self, params: DictConfig | None = None, **options: Any) -> None:
        self.params = params
        self.options = options
        self.launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """As Hydra's manual says."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[Any]:
        """Runs the search to its end; returns what the launcher returned, one for each run."""
        from fedtune.config.search import space_of

        assert self.launcher is not None and self.begin is not None and self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        words = [f"{name}={value}" for name, value in (self.params or {}).items()]
        axes, fixed = space_of(parser.parse_overrides([*words, *arguments]))
        options = {name: _plain(value) for name, value in self.options.items()}
        searcher = self.begin(axes, fixed, options)
        OmegaConf.save(self.config, Path(str(self.config.hydra.sweep.dir)) / "multirun.yaml")
        returns: list[Any] = []
        while batch := searcher.ask(self.workers):
            for numbers, jobs in _in_a_row(batch):
                returns += self.launcher.launch(jobs, initial_job_idx=numbers[0])
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
