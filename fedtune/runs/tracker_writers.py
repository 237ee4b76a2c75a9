"""How TensorBoard, MLflow and Weights & Biases are written to: one small class each, with the same methods.

All of them write files and nothing else. MLflow gets a `file:` store and its telemetry is off; Weights &
Biases runs in its offline mode, without crash reports, facts of the machine, code and console. A person who
wants a run on a server sends the files there afterwards, with those tools' own commands.

Does not do: decide what is written, or survive an error (`fedtune.runs.trackers`).
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

__all__ = ["WRITERS", "MLflowWriter", "TensorBoardWriter", "WandbWriter", "Writer", "import_library"]


class Writer(Protocol):
    """A tracker that is open for one run."""

    def start(self, run: str, params: Mapping[str, str], resumed: bool) -> None:
        """The run begins, or goes on if `resumed`."""

    def round(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one round."""

    def summary(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of the whole run, when it is done."""

    def text(self, name: str, content: str) -> None:
        """An artifact, by its file name."""

    def close(self, failed: bool) -> None:
        """The last call."""


class TensorBoardWriter:
    """Event files for `tensorboard --logdir`; artifacts are shown under Text, for it keeps no files."""

    def __init__(self, folder: Path, project: str) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def start(self, run: str, params: Mapping[str, str], resumed: bool) -> None:
        """See `Writer`."""
        if not resumed:
            rows = "\n".join(f"| {name} | {value} |" for name, value in params.items())
            self._writer.add_text("config", f"| setting | value |\n|---|---|\n{rows}", 0)
        self._writer.flush()

    def round(self, step: int, values: Mapping[str, float]) -> None:
        """See `Writer`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, new_style=True, double_precision=True)
        self._writer.flush()

    summary = round

    def text(self, name: str, content: str) -> None:
        """See `Writer`."""
        self._writer.add_text(name, content if name.endswith(".md") else f"```\n{content}\n```", 0)

    def close(self, failed: bool) -> None:
        """See `Writer`."""
        self._writer.close()


class MLflowWriter:
    """A local store of files; `mlflow ui --backend-store-uri FOLDER` shows it, for all runs of one folder."""

    def __init__(self, folder: Path, project: str) -> None:
        import_library("mlflow")
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        folder.mkdir(parents=True, exist_ok=True)
        self._client = MlflowClient(tracking_uri=folder.as_uri())
        found = self._client.get_experiment_by_name(project)
        if found is None:
            # Two processes of one sweep may both see that it is not there yet.
            with contextlib.suppress(MlflowException):
                self._client.create_experiment(project)
            found = self._client.get_experiment_by_name(project)
        if found is None:
            raise RuntimeError(f"MLflow has made no experiment {project!r} in {folder}")
        self._experiment = found.experiment_id
        self._run = ""

    def start(self, run: str, params: Mapping[str, str], resumed: bool) -> None:
        """See `Writer`."""
        if resumed:
            same = self._client.search_runs([self._experiment], f"tags.`fedtune.run` = '{run}'")
            if same:
                self._run = same[0].info.run_id
                self._client.update_run(self._run, status="RUNNING")
                return
        made = self._client.create_run(self._experiment, tags={"fedtune.run": run}, run_name=run)
        self._run = made.info.run_id
        from mlflow.entities import Param

        rows = [Param(name, value) for name, value in params.items()]
        for first in range(0, len(rows), 100):  # more are refused
            self._client.log_batch(self._run, params=rows[first : first + 100])

    def round(self, step: int, values: Mapping[str, float]) -> None:
        """See `Writer`."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        rows = [Metric(_mlflow_name(name), value, now, step) for name, value in values.items()]
        for first in range(0, len(rows), 1000):
            self._client.log_batch(self._run, metrics=rows[first : first + 1000])

    summary = round

    def text(self, name: str, content: str) -> None:
        """See `Writer`."""
        self._client.log_text(self._run, content, name)

    def close(self, failed: bool) -> None:
        """See `Writer`."""
        if self._run:
            self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


class WandbWriter:
    """An offline run below FOLDER/wandb; `wandb sync` sends it to a server, if a person wants that.

    A run that was resumed is two of these with one id: `wandb sync --append` joins them.
    """

    def __init__(self, folder: Path, project: str) -> None:
        import_library("wandb")
        import wandb

        folder.mkdir(parents=True, exist_ok=True)  # where it cannot write it takes /tmp, silently
        self._wandb, self._folder, self._project = wandb, folder, project
        self._run: Any = None

    def start(self, run: str, params: Mapping[str, str], resumed: bool) -> None:
        """See `Writer`."""
        quiet = self._wandb.Settings(
            console="off",
            silent=True,
            save_code=False,
            disable_git=True,
            disable_code=True,
            disable_job_creation=True,
            host="",
            program="fedtune",
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        self._run = self._wandb.init(
            project=self._project,
            id=run,
            name=run,
            dir=str(self._folder),
            config=dict(params),
            mode="offline",
            reinit="create_new",
            settings=quiet,
        )

    def round(self, step: int, values: Mapping[str, float]) -> None:
        """See `Writer`."""
        self._run.log(dict(values), step=step)

    def summary(self, step: int, values: Mapping[str, float]) -> None:
        """See `Writer`."""
        for name, value in values.items():
            self._run.summary[name] = value

    def text(self, name: str, content: str) -> None:
        """See `Writer`."""
        path = Path(self._run.dir) / name
        path.write_text(content, encoding="utf-8")
        self._run.save(str(path), base_path=self._run.dir, policy="end")

    def close(self, failed: bool) -> None:
        """See `Writer`."""
        if self._run is not None:
            self._run.finish(exit_code=int(failed))


def _mlflow_name(name: str) -> str:
    """A site may be called whatever its owner likes; MLflow takes letters, digits and `_-./ :` only."""
    return re.sub(r"[^\w\-./ :]", "_", name)


WRITERS: dict[str, type[Any]] = {
    "tensorboard": TensorBoardWriter,
    "mlflow": MLflowWriter,
    "wandb": WandbWriter,
}

# What the libraries read when they are imported.
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_FILE_STORE": "true",  # 3.17 asks whether files are really meant
    "WANDB_ERROR_REPORTING": "false",
}


def import_library(name: str) -> None:
    """Imports what `tracker=name` needs; early, for wandb takes many seconds once torch is loaded too (its
    models ask `inspect` for their modules, which looks through all that is loaded, each time).

    Raises: ImportError.
    """
    os.environ.update(_ENVIRONMENT)
    importlib.import_module(name)
