"""A run told to TensorBoard, MLflow or Weights & Biases: the numbers of the record, while they come.

From the beginning the configuration; after each round accuracy, loss, epsilon with its delta, bytes and, of
data that is declared public, seconds; at the end every number of the record by its own name, the record and
the statement. A tracker's files say of each when it was told. Nothing else: what a tracker gets has passed
`fedtune.privacy.publication`, and folders of this machine are left out of it.

A tracker cannot break a run: one that raises is told of once and switched off. One that is not installed is
refused before the run begins. Nothing is sent anywhere (`fedtune.runs.tracker_writers`).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.errors import ConfigError
from fedtune.privacy.publication import publish
from fedtune.runs.record import flatten
from fedtune.runs.tracker_writers import WRITERS, Writer, import_library

if TYPE_CHECKING:
    from fedtune.config.schema import Config
    from fedtune.federation.events import FederationResult, RoundSummary

__all__ = ["Tracker", "check", "open_tracker", "params", "record_numbers"]

_log = logging.getLogger(__name__)

# Settings that name folders of this machine.
_FOLDERS = ("output", "resume", "data.path", "engine.server", "tracker.folder")
_SECTIONS = ("run", "federation", "privacy", "metrics", "cost")
_ROUND = (
    *("accuracy", "accuracy_error", "loss", "epsilon", "bytes_up", "bytes_down", "seconds"),
    *("train_seconds", "updates"),
)


def check(config: Config) -> None:
    """Imports the tracker that was asked for. Raises ConfigError if it is not installed, or broken."""
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
    folder = config.tracker.folder
    if folder is not None:
        where = Path(folder).expanduser().absolute()
    else:  # Weights & Biases makes the folder wandb/ itself
        where = run_dir if config.tracker.name == "wandb" else run_dir / config.tracker.name
    kind = WRITERS[config.tracker.name]
    return Tracker(lambda: kind(where, config.tracker.project), config, run_dir)


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
        self._tell("round", summary.round, _numbers(values, "round/"))

    def on_client(self, node: str, status: str) -> None:
        """Nothing: the round's summary says who was lost."""

    def on_wait(self, reason: str) -> None:
        """Nothing."""

    def on_finish(self, result: FederationResult) -> None:
        """Nothing: the record is still to be made."""

    # --- the end of a run -----------------------------------------------------------------------

    def finish(self, record: Mapping[str, Any], result: FederationResult, statement: str) -> None:
        """The record's numbers, the record and the statement; then the tracker is closed.

        A run that was not told of until now (Flower's own ServerApp runs the rounds) is told of whole.
        """
        if self._make is not None and not self._opened:
            delta = result.plan.delta if result.plan.is_private() else None
            self.on_start({"run": result.run, "attempt": 1, "delta": delta})
            for summary in result.history:
                self.on_round(summary)
        self._tell("summary", len(result.history), record_numbers(record))
        shown = json.dumps(self._without_folders(record), indent=2)
        self._tell("text", "record.json", shown)
        self._tell("text", "statement.md", self._without_folders(statement))
        self.close(failed=False)

    def close(self, failed: bool = True) -> None:
        """Ends the tracker's run; a second call does nothing."""
        self._tell("close", failed)
        self._writer = None

    # --- pieces ---------------------------------------------------------------------------------

    def _start(self, run: str, resumed: bool) -> None:
        if self._make is None:
            return
        self._writer = self._make()
        self._writer.start(run, params(self._config), resumed)

    def _tell(self, method: str, *args: Any) -> None:
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

    What a node or a site is named by stands in place of its position in a list; rounds are left out, for
    they were told when they were done. Null (an epsilon that is infinite, a cost unknown) is left out too.
    """
    told = {section: record[section] for section in _SECTIONS}
    told["metrics"] = {name: value for name, value in told["metrics"].items() if name != "by_round"}
    for name in ("per_node", "ledger"):
        rows = told["privacy"].get(name) or []
        told["privacy"] = {**told["privacy"], name: {row["node"]: row for row in rows}}
    return _numbers(flatten(told), "record/")


def _numbers(values: Mapping[str, Any], prefix: str) -> dict[str, float]:
    return {
        prefix + name: float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }
