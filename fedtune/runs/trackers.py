"""A run written to TensorBoard, MLflow or Weights & Biases: the numbers of its record, as they come.

At the start the configuration; after each round accuracy, loss, epsilon with its delta, bytes and, of data
that is declared public, seconds; at the end every number of the record by its own name, the record and the
statement. Nothing else: what a tracker gets has passed `fedtune.privacy.publication`, and folders of this
machine are left out of it. The tracker's own files hold the time of each.

Each library is used by one small writer, all with the same methods, and writes files only. MLflow gets a
`file:` store and its telemetry is off; Weights & Biases runs in its offline mode, without crash reports,
facts of the machine, code and console. Whoever wants a run on a server sends the files there afterwards, with
those tools' own commands.

A tracker cannot break a run: one that raises is reported once and switched off. One that is not installed is
refused before the run begins.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import os
import re
import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fedtune.errors import ConfigError
from fedtune.privacy.publication import publish
from fedtune.runs.record import flatten

if TYPE_CHECKING:
    from fedtune.config.schema import Config
    from fedtune.federation.events import FederationResult, RoundSummary

__all__ = [
    "WRITERS",
    "MLflowWriter",
    "TensorBoardWriter",
    "Tracker",
    "WandbWriter",
    "Writer",
    "check",
    "import_library",
    "open_tracker",
    "params",
    "record_numbers",
    "where_written",
]

_log = logging.getLogger(__name__)

# Settings that name folders of this machine.
_FOLDERS = ("output", "resume", "data.path", "public.path", "engine.server", "tracker.folder")
_SECTIONS = ("run", "federation", "privacy", "metrics", "cost")
_ROUND = (
    *("accuracy", "accuracy_error", "loss", "epsilon", "bytes_up", "bytes_down", "seconds"),
    *("train_seconds", "updates"),
)


def check(config: Config) -> None:
    """Imports the tracker that was asked for, before a run begins.

    Raises:
        ConfigError: it is not installed, or cannot be imported.
    """
    name = config.tracker.name
    if name == "none":
        return
    try:
        import_library(name)
    except ImportError as error:
        raise ConfigError(
            f"tracker={name} needs the package {name}, which is not installed or cannot be imported "
            f"({error}). Install it with `pip install 'fedtune[{name}]'`, or leave tracker={name} out: "
            "record.json has the same numbers."
        ) from error


def open_tracker(config: Config, run_dir: Path) -> Tracker:
    """The tracker of `config`; with `tracker=none` one that does nothing."""
    if config.tracker.name == "none":
        return Tracker(None, config, run_dir)
    kind = WRITERS[config.tracker.name]
    return Tracker(lambda: kind(_folder(config, run_dir), config.tracker.project), config, run_dir)


def _folder(config: Config, run_dir: Path) -> Path:
    if config.tracker.folder is not None:
        return Path(config.tracker.folder).expanduser().absolute()
    # Weights & Biases makes the folder wandb/ itself.
    return run_dir if config.tracker.name == "wandb" else run_dir / config.tracker.name


def where_written(config: Config, run_dir: Path) -> str | None:
    """The command that shows, or sends, what the tracker of a finished run wrote; None without a tracker."""
    if config.tracker.name == "none":
        return None
    return _SHOWN[config.tracker.name].format(shlex.quote(str(_folder(config, run_dir))))


_SHOWN = {
    "tensorboard": "tensorboard --logdir {}",
    "mlflow": "mlflow ui --backend-store-uri {}",
    "wandb": "wandb sync {}/wandb/offline-run-*",
}


class Tracker:
    """An observer that writes to a tracker, and is given the record at the end.

    Args:
        make: opens the writer; called when the run starts. None: there is no tracker.
    """

    def __init__(self, make: Callable[[], Writer] | None, config: Config, run_dir: Path) -> None:
        self._make, self._config, self._run_dir = make, config, run_dir
        self._writer: Writer | None = None
        self._delta: float | None = None
        self._opened = False

    # --- Observer -------------------------------------------------------------------------------

    def on_start(self, info: Mapping[str, Any]) -> None:
        """See `fedtune.federation.events.Observer`."""
        self._delta, self._opened = info.get("delta"), True
        self._safely(lambda: self._start(str(info["run"]), int(info["attempt"]) > 1))

    def on_round(self, summary: RoundSummary) -> None:
        """See `fedtune.federation.events.Observer`."""
        made = summary.to_json() | {"delta": self._delta if summary.epsilon is not None else None}
        published, own = publish("round", made, public_data=self._config.data.public)
        values: dict[str, Any] = {name: published[name] for name in (*_ROUND, "delta") if name not in own}
        values["dropped"] = len(summary.dropped)
        self._call("round", summary.round, _numbers(values, "round/"))

    def on_client(self, node: str, status: str) -> None:
        """Nothing: the round's summary says who was lost."""

    def on_wait(self, reason: str) -> None:
        """Nothing."""

    def on_finish(self, result: FederationResult) -> None:
        """Nothing: the record is still to be made."""

    # --- the end of a run -----------------------------------------------------------------------

    def finish(self, record: Mapping[str, Any], result: FederationResult, statement: str) -> None:
        """The record's numbers, the record and the statement; then the tracker is closed.

        A run that is not open yet (Flower's own ServerApp runs the rounds) is written as a whole.
        """
        if self._make is not None and not self._opened:
            delta = result.plan.delta if result.plan.is_private() else None
            self.on_start({"run": result.run, "attempt": 1, "delta": delta})
            for summary in result.history:
                self.on_round(summary)
        self._call("summary", len(result.history), record_numbers(record))
        shown = json.dumps(self._without_folders(record), indent=2)
        self._call("text", "record.json", shown)
        self._call("text", "statement.md", self._without_folders(statement))
        self.close(failed=False)

    def close(self, failed: bool = True) -> None:
        """Ends the tracker's run; a second call does nothing."""
        self._call("close", failed)
        self._writer = None

    # --- pieces ---------------------------------------------------------------------------------

    def _start(self, run: str, resumed: bool) -> None:
        if self._make is None:
            return
        self._writer = self._make()
        self._writer.start(run, params(self._config), resumed)

    def _call(self, method: str, *args: Any) -> None:
        if self._writer is not None:
            self._safely(lambda: getattr(self._writer, method)(*args))

    def _safely(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:
            self._writer = None
            _log.warning(
                "tracker=%s failed (%s: %s) and is switched off; the run goes on, and record.json will hold "
                "the same numbers.",
                self._config.tracker.name,
                type(error).__name__,
                " ".join(str(error).split()),
            )

    def _without_folders(self, value: Any) -> Any:
        """`value` without this machine's folders: whole paths become their last part."""
        if isinstance(value, Mapping):
            return {key: self._without_folders(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._without_folders(item) for item in value]
        if not isinstance(value, str):
            return value
        text = value.replace(str(self._run_dir), "RUN_DIR")
        return Path(text).name if Path(text).is_absolute() else text


def params(config: Config) -> dict[str, str]:
    """The settings as texts by dotted name, without those that name folders of this machine."""
    from fedtune.config.convert import to_dict

    found = {}
    for name, value in flatten(to_dict(config)).items():
        if name in _FOLDERS:
            continue
        text = "null" if value is None else str(value)
        found[name] = Path(text).name if Path(text).is_absolute() else text
    return found


def record_numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Every number of a record, by its name in it: `record/privacy.epsilon`, `record/cost.money.total`.

    Rows of nodes are keyed by the name of the node. Rounds are left out: they were written as they ended.
    Null (an infinite epsilon, an unknown cost) is left out too.
    """
    sections = {section: record[section] for section in _SECTIONS}
    sections["metrics"] = {name: value for name, value in sections["metrics"].items() if name != "by_round"}
    for name in ("per_node", "ledger"):
        rows = sections["privacy"].get(name) or []
        sections["privacy"] = {**sections["privacy"], name: {row["node"]: row for row in rows}}
    return _numbers(flatten(sections), "record/")


def _numbers(values: Mapping[str, Any], prefix: str) -> dict[str, float]:
    return {
        prefix + name: float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


# --- how each library is written to -------------------------------------------------------------


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

    A run that was resumed is two of these with one id: `wandb sync --append` joins them. wandb writes 32 KiB
    at a time, the last when this process ends: of a run that was killed, the rounds since then are in
    record.json only.
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
    """Imports what `tracker=name` needs.

    Early, because wandb takes many seconds once torch is loaded too: its models ask `inspect` for modules,
    and each time that searches everything that is loaded.

    Raises:
        ImportError: it is not installed, or broken.
    """
    os.environ.update(_ENVIRONMENT)
    importlib.import_module(name)
