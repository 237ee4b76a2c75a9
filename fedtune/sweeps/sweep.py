"""A sweep: many runs of one command, one line a run, that outlives failures and `kill -9`.

    1. all combinations are known and counted, and written to `sweep.json`, before the first of them runs; a
       search (`fedtune.sweeps.search`) writes there what it may choose from, and chooses run by run
    2. each run is `fedtune.runs.run`, in a folder of its own; what the process has read, tokenised and
       loaded stays (`data.prepare`, `models`), so that a later run starts at once; a launcher of Hydra's may
       share the runs out to several processes
    3. a run that fails leaves `failure.json` with its error, and the sweep goes on
    4. `sweep.resume=FOLDER` runs what is missing: finished runs are read, begun ones resumed

With `sweep.private_selection=true` the number of runs and each run's settings are drawn at random, so that
the best of them can be published at less than the price of all (`fedtune.privacy.accounting.selection`).

Does not do: compare (`fedtune report`).
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.config.convert import value_text
from fedtune.config.files import save
from fedtune.config.launch import Job, JobFailure, launch
from fedtune.engines.machine import refusal_elsewhere, stays_here
from fedtune.errors import CheckpointError, ConfigError, LedgerError, RecordError
from fedtune.federation import run_folder
from fedtune.privacy.publication import error_in_public, publish
from fedtune.report.collect import FAILURE_NAME, SWEEP_NAME
from fedtune.runs import record
from fedtune.runs.history import RunEstimate, RunHistory, keeps_duration
from fedtune.sweeps.options import (
    SweepOptions,
    distinct_jobs,
    draw_trials,
    read_sweep,
    split_options,
    write_sweep,
)
from fedtune.sweeps.progress import SweepProgress
from fedtune.sweeps.spending import costliest_run, spending_text

if TYPE_CHECKING:
    from fedtune.config.schema import Config
    from fedtune.config.search import Searcher, Space
    from fedtune.federation.events import StopRule
    from fedtune.sweeps.study import Pruning

__all__ = ["Start", "Sweep", "SweepOutcome", "run_sweep"]

Say = Callable[[str], None]
# Configuration, title, who may end it early, and: is it the only run on this terminal?
Start = Callable[["Config", str, "StopRule | None", bool], Path]


@dataclass(frozen=True)
class SweepOutcome:
    """What a sweep left behind.

    Attributes:
        folder: where its runs lie; None if it ended before it had one.
        failures: its failed runs; the others finished.
        partial: of finished runs that went on without a site, who took no part, by number.
    """

    folder: Path | None
    failures: list[JobFailure]
    partial: Mapping[int, tuple[str, ...]] = field(default_factory=dict)


def run_sweep(
    words: Sequence[str],
    start: Start,
    *,
    describe: Callable[[Exception], str],
    say: Say,
    warn: Say,
    extra_dirs: Sequence[Path] = (),
) -> SweepOutcome:
    """Runs the sweep that `words` ask for (overrides and `sweep.*` options).

    Args:
        start: runs one configuration and returns the path of its record; see `Start`.
        describe: puts an exception into one paragraph, or raises it on.
        say, warn: print a line of progress, of an error.

    Raises:
        ConfigError: the words mean nothing, or the folder holds another sweep.
        CheckpointError: there is no sweep to resume in that folder.
    """
    options, overrides = split_options(words)
    saved: dict[str, Any] | None = None
    if options.resume is not None:
        saved = read_sweep(options.resume)
        overrides = [word for word in saved["overrides"] if not word.startswith("hydra.sweep.dir=")]
        overrides.append(f"hydra.sweep.dir={value_text(options.resume)}")
    sweep = Sweep(options, list(overrides), start, describe, say, warn, saved)
    try:
        failures = launch(
            overrides,
            sweep.task,
            on_failure=sweep.failed,
            multirun=True,
            extra_dirs=extra_dirs,
            watcher=sweep,
        )
        partial = {} if sweep.progress is None else sweep.progress.partial_runs()
        return SweepOutcome(sweep.folder, failures, partial)
    except KeyboardInterrupt as interrupt:
        if sweep.folder is None:
            raise
        way_out = f"The sweep goes on with: fedtune run sweep.resume={shlex.quote(str(sweep.folder))}"
        raise type(interrupt)(f"{interrupt} {way_out}".strip()) from interrupt
    finally:
        if sweep.close is not None:
            sweep.close()


@dataclass
class Sweep:
    """One sweep under way. Launchers that use several processes send a copy of it to each of them."""

    options: SweepOptions
    overrides: list[str]
    start: Start
    describe: Callable[[Exception], str]
    say: Say
    warn: Say
    saved: dict[str, Any] | None = None  # `sweep.json` of a sweep that is resumed
    progress: SweepProgress | None = None
    drawn: bool = False  # number and settings of the runs were drawn at random
    pruning: Pruning | None = None
    close: Callable[[], None] | None = None  # unlocks the folder of a search
    process: int = field(default_factory=os.getpid)
    machine: str = field(default_factory=platform.node)

    @property
    def folder(self) -> Path | None:
        """Where the sweep lies; None before it has begun."""
        return None if self.progress is None else self.progress.folder

    def __getstate__(self) -> dict[str, Any]:
        """What another process needs: the search stays in this one."""
        return {**self.__dict__, "close": None}

    # --- before the first run -------------------------------------------------------------------

    def begin(self, folder: Path, jobs: list[list[str]]) -> list[list[str]]:
        """Takes all combinations of a grid; returns the runs to make."""
        searching = self.options.search_only() or (self.saved is not None and "search" in self.saved)
        if searching:
            raise ConfigError(
                f"{', '.join(self.options.search_only()) or 'This sweep'} belongs to a search, and this is "
                "a grid of runs. Add sweep=optuna, or leave it out."
            )
        self.options.refuse_trials_of_a_grid()
        if self.saved is not None:
            jobs = self.saved["jobs"]
            self.drawn = "private_selection" in self.saved
        else:
            self._refuse_other_sweep(folder)
            jobs = distinct_jobs(jobs)
            drawn: dict[str, Any] = {}
            combinations = len(jobs)
            if self.options.private_selection:
                jobs, drawn = draw_trials(self.options, jobs)
                drawn = {"private_selection": drawn | {"combinations": combinations}}
            self.drawn = bool(drawn)
            write_sweep(folder, self.overrides, jobs, **drawn)
        common = set.intersection(*(set(job) for job in jobs)) if len(jobs) > 1 else set()
        names = {i: ",".join(word for word in job if word not in common) for i, job in enumerate(jobs)}
        self.progress = SweepProgress(folder, len(jobs), names, one_run=self.drawn)
        self.progress.refresh()
        if not jobs:
            self.say(self._opening([]))
        return jobs

    def foresee(self, configs: list[Config | None], workers: int) -> None:
        """Takes the configurations of the grid; says what it will take and spend."""
        assert self.progress is not None
        self.progress.workers = workers
        known = RunHistory()
        opening = self._opening([None if config is None else known.estimate(config) for config in configs])
        cost = spending_text([c for i, c in enumerate(configs) if not self.progress.is_finished(i)])
        self.say(f"{opening}. {cost[:1].upper()}{cost[1:]}." if cost else opening)

    def search(self, space: Space) -> Searcher:
        """Takes what may be searched; returns the search, which chooses the runs."""
        from fedtune.sweeps.search import begin_search

        if self.saved is None:
            self._refuse_other_sweep(space.folder)
        elif "search" not in self.saved:
            raise CheckpointError(f"{space.folder} holds a grid of runs, and sweep=optuna is a search.")
        search = begin_search(space, self.options, self.overrides, self.saved, self.say, self.warn)
        self.close = search.close
        self.pruning = search.pruning
        self.progress = search.progress
        alike = all(keeps_duration(axis.name) for axis in space.axes)
        estimate = RunHistory().estimate(space.base) if alike and space.base is not None else None
        left = search.progress.left
        cost = spending_text([costliest_run(space.base, space.axes)] * left, most=True)
        self.say(f"{self._opening([estimate] * left)}. {search.opening()}{f': {cost}' if cost else ''}")
        return search

    def _refuse_other_sweep(self, folder: Path) -> None:
        if (folder / SWEEP_NAME).exists():
            raise ConfigError(
                f"{folder} holds a sweep already. Go on with it by 'fedtune run sweep.resume={folder}', "
                "or choose another folder with hydra.sweep.dir=FOLDER."
            )

    def _opening(self, expected: Sequence[RunEstimate | None]) -> str:
        assert self.progress is not None
        total = self.progress.total
        text = f"{total} run{'s' if total != 1 else ''} in {self.folder}"
        if self.drawn:
            text += (
                "; their number was drawn at random. Publish the best of them and nothing else, not even "
                "this number"
            )
        return f"{text}; {self.progress.opening(expected)}" if total else text

    # --- each run -------------------------------------------------------------------------------

    def task(self, job: Job) -> float | None:
        """Makes one run, or reads it if it is finished, and prints a line; returns its accuracy."""
        assert self.progress is not None and job.number is not None
        self._refuse_other_machine(job.config)
        folder = Path(job.config.output or "")
        made = self._finished(folder)
        before = made is not None
        if made is None:
            title = f"run {self._place(job)} ({self._name(job)})"
            stop_rule = None if self.pruning is None else self.pruning.stop_rule(job.number)
            # Two live displays on one terminal would erase each other's lines.
            alone = os.getpid() == self.process
            path = self.start(self._config(job.config, folder), title, stop_rule, alone)
            made = record.whole(path.parent)
            (folder / FAILURE_NAME).unlink(missing_ok=True)
        self.progress.refresh()
        self.say(self.progress.line(self._place(job), self._name(job), made, before))
        accuracy: float | None = made["metrics"]["accuracy"]
        return accuracy

    def failed(self, job: Job | None, error: Exception) -> str:
        """Writes `failure.json`, prints the error, and lets the sweep go on; returns the error's text."""
        text = self.describe(error)
        if job is not None and job.config.output:
            folder, permitted = Path(job.config.output), job.config.data.public
            published = text if permitted else error_in_public(error, job.config.data.name)
            values = {
                "error": published,
                "overrides": job.overrides,
                "when": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            }
            values, _ = publish("failure", values, public_data=permitted)
            save(folder / FAILURE_NAME, (json.dumps(values, indent=1) + "\n").encode())
            if published != text:
                run_folder.update_local(folder, failure=text)
        which = f"run {self._place(job)} ({self._name(job)}) failed: " if job is not None else ""
        self.warn(f"{which}{text}")
        return text

    def _refuse_other_machine(self, config: Config) -> None:
        """A launcher may send a run to another machine, and the ledgers lie on this one."""
        if stays_here(config) and (elsewhere := refusal_elsewhere(self.machine)) is not None:
            raise LedgerError(elsewhere)

    def _finished(self, folder: Path) -> dict[str, Any] | None:
        """The record of a run that an earlier session finished."""
        if self.saved is None or not (folder / record.RECORD_NAME).exists():
            return None
        try:
            return record.whole(folder)
        except RecordError as error:
            self.warn(f"{folder} is run again: {error}")
            return None

    def _config(self, config: Config, folder: Path) -> Config:
        """The configuration to start: that of the checkpoint, if the run was begun."""
        if self.saved is None or not any((folder / "checkpoint").glob("*")):
            return config
        from fedtune.config.loader import load

        return load([f"resume={value_text(folder)}"])

    def _place(self, job: Job) -> str:
        assert self.progress is not None
        return f"{(job.number or 0) + 1} of {self.progress.total}"

    def _name(self, job: Job) -> str:
        assert self.progress is not None
        return self.progress.name(job.number) or job.overrides or "defaults"
