"""Hydra's plugin that makes the runs of a sweep in Ray's workers: `hydra/launcher=fedtune_ray`.

Why not `hydra-ray-launcher` 1.2.2: it wants cloudpickle below 3 (for its part on AWS), and joblib 1.6, which
scikit-learn 1.9 brings, wants cloudpickle 3 or newer, so that both cannot be installed.

    fedtune run -m seed=0,1,2,3 hydra/launcher=fedtune_ray hydra.launcher.n_jobs=2
    fedtune run -m ... hydra/launcher=fedtune_ray hydra.launcher.address=auto    # a cluster that is there

A worker keeps what it has loaded for its next run. Over several machines the sweep folder must lie where all
of them find it, and `fedtune.experiments.sweep` lets only data that its owner declared public leave this one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

__all__ = ["RayLauncher"]

ConfigStore.instance().store(
    group="hydra/launcher",
    name="fedtune_ray",
    node={
        "_target_": "hydra_plugins.fedtune_ray.RayLauncher",
        "n_jobs": 2,  # runs at once
        "cpus": 1,  # processor cores that Ray reserves for each of them, and threads that torch uses
        "gpus": 0,
        "address": None,  # of a cluster; None: Ray is started here
    },
    provider="fedtune",
)


class RayLauncher(Launcher):
    """At most `n_jobs` runs at once, each in a worker of Ray's."""

    def __init__(self, n_jobs: int = 2, cpus: float = 1, gpus: float = 0, address: str | None = None) -> None:
        self.n_jobs, self.cpus, self.gpus, self.address = max(1, int(n_jobs)), cpus, gpus, address

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """As Hydra's manual says."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Returns when all have ended, in the order of `job_overrides`."""
        import ray

        setup_globals()
        if not ray.is_initialized():
            cores = None if self.address else max(1, round(self.n_jobs * self.cpus))
            ray.init(address=self.address, num_cpus=cores, include_dashboard=False, logging_level="error")
        remote = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=0)(_run)
        state, folder = Singleton.get_state(), str(Path.cwd())
        results: dict[Any, JobReturn | None] = {}
        waiting: list[Any] = []
        for position, overrides in enumerate(job_overrides):
            if len(waiting) >= self.n_jobs:
                _, waiting = ray.wait(waiting)
            number = initial_job_idx + position
            composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(composed):
                composed.hydra.job.id = f"{composed.hydra.job.name}_{number}"
                composed.hydra.job.num = number
            sent = remote.remote(self.hydra_context, composed, self.task_function, state, folder)
            results[sent] = None
            waiting.append(sent)
        return [ray.get(sent) for sent in results]


def _run(
    context: HydraContext, config: DictConfig, task: TaskFunction, state: dict[Any, Any], folder: str
) -> JobReturn:
    """In the worker: as Hydra's own launcher does it, in the folder that the command was given in."""
    if Path(folder).is_dir():
        os.chdir(folder)
    setup_globals()
    Singleton.set_state(state)
    HydraConfig.instance().set_config(config)
    return run_job(
        hydra_context=context,
        task_function=task,
        config=config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )
