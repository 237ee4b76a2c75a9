"""A sweep: many runs of one grid in one process, one line a run, that outlives failures and `kill -9`.

    1. all combinations are known and counted, and written to `sweep.json`, before the first of them runs
    2. each run is `fedtune.experiments.run`, in a folder of its own; what the process has read, tokenised and
       loaded stays (`data.prepare`, `models`), so that a later run starts at once
    3. a run that fails leaves `failure.json` with its error, and the sweep goes on
    4. `sweep.resume=FOLDER` runs what is missing: finished runs are read, begun ones resumed

With `sweep.private_selection=true` the number of runs and each run's settings are drawn at random, so that
the best of them can be published at less than the price of all (`fedtune.privacy.selection`).

Does not do: search (a sweeper of Hydra's does; then nothing is known beforehand), or compare
(`fedtune report`).
"""

from __future__ import annotations

import json
import shlex
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.config.launch import Job, JobFailure, launch
from fedtune.errors import ConfigError, RecordError
from fedtune.experiments import record
from fedtune.experiments.collect import FAILURE_NAME, SWEEP_NAME
from fedtune.experiments.export import save
from fedtune.experiments.summary import duration
from fedtune.experiments.sweep_options import (
    SweepOptions,
    draw_trials,
    meaningful,
    read_sweep,
    split_options,
    write_sweep,
)
from fedtune.experiments.words import money_text, number, percent

if TYPE_CHECKING:
    from fedtune.config.schema import Config

__all__ = ["Sweep", "run_sweep"]

Say = Callable[[str], None]


def run_sweep(
    words: Sequence[str],
    start: Callable[[Config, str], Path],
    *,
    describe: Callable[[Exception], str],
    say: Say,
    warn: Say,
    extra_dirs: Sequence[Path] = (),
) -> list[JobFailure]:
    """Runs the sweep that `words` ask for (overrides and `sweep.*` options); returns its failures.

    Args:
        start: runs one configuration, shown under a title, and returns the path of its record.
        describe: puts an exception into one paragraph, or raises it on.
        say, warn: print a line of progress, of an error.

    Raises:
        ConfigError: the words mean nothing, or the folder holds another sweep.
        CheckpointError: there is no sweep to resume in that folder.
    """
    options, overrides = split_options(words)
    kept: dict[str, Any] | None = None
    if options.resume is not None:
        kept = read_sweep(options.resume)
        overrides = [word for word in kept["overrides"] if not word.startswith("hydra.sweep.dir=")]
        overrides.append(f"hydra.sweep.dir={_quoted(options.resume)}")
    sweep = Sweep(options, list(overrides), start, describe, say, warn, kept)
    try:
        return launch(
            overrides,
            sweep.task,
            on_failure=sweep.failed,
            multirun=True,
            extra_dirs=extra_dirs,
            begin=sweep.begin,
        )
    except KeyboardInterrupt as interrupt:
        if sweep.folder is None:
            raise
        way_out = f"The sweep goes on with: fedtune run sweep.resume={shlex.quote(str(sweep.folder))}"
        raise type(interrupt)(f"{interrupt} {way_out}".strip()) from interrupt


def _quoted(folder: Path) -> str:
    """`folder` as a text in Hydra's syntax, whatever characters its name has."""
    return "'" + str(folder).replace("\\", "\\\\").replace("'", "\\'") + "'"


@dataclass
class Sweep:
    """One sweep under way: what is done, what it took, what is best so far."""

    options: SweepOptions
    overrides: list[str]
    start: Callable[[Config, str], Path]
    describe: Callable[[Exception], str]
    say: Say
    warn: Say
    kept: dict[str, Any] | None = None
    total: int | None = None
    folder: Path | None = None
    done: int = 0
    seconds: list[float] = field(default_factory=list)  # wall time of each run, as its record says
    amounts: list[tuple[float, str]] = field(default_factory=list)
    best: tuple[float, str] | None = None
    names: list[str] = field(default_factory=list)  # what sets each run apart from the others

    def begin(self, folder: Path, jobs: list[list[str]]) -> list[list[str]]:
        """Told of all combinations before the first; returns the runs to make."""
        self.folder = folder
        if self.kept is not None:
            jobs = self.kept["jobs"]
        else:
            if (folder / SWEEP_NAME).exists():
                raise ConfigError(
                    f"{folder} holds a sweep already. Go on with it by 'fedtune run sweep.resume={folder}', "
                    "or choose another folder with hydra.sweep.dir=FOLDER."
                )
            jobs = meaningful(jobs)
            drawn: dict[str, Any] = {}
            combinations = len(jobs)
            if self.options.private_selection:
                jobs, drawn = draw_trials(self.options, jobs)
                drawn = {"private_selection": drawn | {"combinations": combinations}}
            write_sweep(folder, self.overrides, jobs, **drawn)
        self.total = len(jobs)
        common = set.intersection(*(set(job) for job in jobs)) if len(jobs) > 1 else set()
        self.names = [",".join(word for word in job if word not in common) for job in jobs]
        self._look_back()
        self.say(self._opening())
        return jobs

    def task(self, job: Job) -> float | None:
        """Makes one run, or reads it if it is finished, and says one line; returns its accuracy."""
        folder = Path(job.config.output or "")
        before = self._finished(folder)
        if before is None:
            title = f"run {self._place(job)} ({self._name(job)})"
            path = self.start(self._config(job.config, folder), title)
            made = record.read(path)
            (folder / FAILURE_NAME).unlink(missing_ok=True)
            self._learn(made)
        else:
            made = before
        self.done += 1
        accuracy: float | None = made["metrics"]["accuracy"]
        if accuracy is not None and (self.best is None or accuracy > self.best[0]):
            self.best = (accuracy, self._name(job))
        self.say(self._line(job, made, before is not None))
        return accuracy

    def failed(self, job: Job | None, error: Exception) -> str:
        """Records the failure of a run, says it, and lets the sweep go on; returns its words."""
        text = self.describe(error)
        self.done += 1
        if job is not None and job.config.output:
            values = {"error": text, "overrides": job.overrides, "when": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
            save(Path(job.config.output) / FAILURE_NAME, (json.dumps(values, indent=1) + "\n").encode())
        which = f"run {self._place(job)} ({self._name(job)}) failed: " if job is not None else ""
        self.warn(f"{which}{text}")
        return text

    # --- pieces ---------------------------------------------------------------------------------

    def _finished(self, folder: Path) -> dict[str, Any] | None:
        """The record of a run that an earlier session finished."""
        if self.kept is None or not (folder / record.RECORD_NAME).exists():
            return None
        try:
            return record.read(folder)
        except RecordError as error:
            self.warn(f"{folder} is run again: {error}")
            return None

    def _config(self, config: Config, folder: Path) -> Config:
        """The configuration to start: that of the checkpoint, if the run was begun."""
        if self.kept is None or not any((folder / "checkpoint").glob("*")):
            return config
        from fedtune.config.loader import load

        return load([f"resume={_quoted(folder)}"])

    def _learn(self, made: dict[str, Any]) -> None:
        self.seconds.append(float(made["run"]["seconds"]))
        money = made["cost"]["money"]
        if money is not None and money["total"] is not None:
            self.amounts.append((float(money["total"]), str(money["currency"])))

    def _look_back(self) -> None:
        """What finished runs of this folder took, so that the rest can be estimated before it begins."""
        for number_ in range(self.total or 0):
            folder = (self.folder or Path()) / str(number_)
            if (folder / record.RECORD_NAME).exists():
                try:
                    self._learn(record.read(folder))
                except RecordError:
                    continue

    def _opening(self) -> str:
        total = self.total or 0
        finished = len(self.seconds)
        left = total - finished
        text = f"{total} run{'s' if total != 1 else ''} in {self.folder}"
        if self.options.private_selection:
            text += (
                "; their number was drawn at random. Publish the best of them and nothing else, not even "
                "this number"
            )
        if finished:
            return f"{text}; {finished} finished before, {left} to go: {self._estimate(left)}"
        return f"{text}; how long they take is known after the first"

    def _estimate(self, left: int) -> str:
        if not self.seconds:
            return "time unknown"
        # The median: the first run of a process also reads, tokenises and loads.
        text = f"about {duration(left * statistics.median(self.seconds))}"
        currencies = {currency for _, currency in self.amounts}
        if len(currencies) == 1:
            mean = statistics.fmean(amount for amount, _ in self.amounts)
            text += f" and {money_text(left * mean, currencies.pop())}"
        return text

    def _place(self, job: Job) -> str:
        shown = (job.number or 0) + 1
        return f"{shown} of {self.total}" if self.total is not None else str(shown)

    def _name(self, job: Job) -> str:
        known = self.names[job.number] if job.number is not None and job.number < len(self.names) else ""
        return known or job.overrides or "defaults"

    def _line(self, job: Job, made: dict[str, Any], before: bool) -> str:
        privacy, accuracy, money = made["privacy"], made["metrics"]["accuracy"], made["cost"]["money"]
        parts = ["accuracy unknown" if accuracy is None else f"accuracy {percent(accuracy)}"]
        if privacy["epsilon"] is None:
            parts.append("no privacy")
        else:
            parts.append(
                f"epsilon {number(privacy['epsilon'])} (delta {privacy['delta']:.1e}, {privacy['adjacency']})"
            )
        parts.append(duration(made["run"]["seconds"]))
        if money is not None and money["total"] is not None:
            parts.append(money_text(money["total"], money["currency"]))
        text = f"run {self._place(job)} ({self._name(job)}): {', '.join(parts)}"
        if before:
            text += "; finished before"
        if self.best is not None:
            text += f"; best so far {percent(self.best[0])} ({self.best[1]})"
        left = (self.total or 0) - self.done
        return f"{text}; left: {self._estimate(left)}" if left > 0 and not before else text
