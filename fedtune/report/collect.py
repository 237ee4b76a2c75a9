"""Every run below some folders: finds record.json files and keeps of each what a comparison needs.

A folder of ten thousand runs holds many files that are no records (checkpoints, adapters), so the walk
enters none of those, and a record is cut down to a `Run` as soon as it is read. What cannot be used becomes
a note that says which file and why: one bad record must not cost the other 999, nor vanish in silence.

Does not do: compare (`fedtune.report.frontier`) or price (`fedtune.report.repricing`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.errors import RecordError
from fedtune.report.compared import Run, run_of
from fedtune.runs import record

__all__ = ["FAILURE_NAME", "SWEEP_NAME", "Collection", "collect"]

FAILURE_NAME = "failure.json"  # what a sweep writes instead of a record where a run failed
SWEEP_NAME = "sweep.json"  # what a sweep writes about itself
_SKIPPED = frozenset({"adapter", "checkpoint", "checkpoints", "__pycache__", ".git"})


@dataclass
class Collection:
    """Runs, and what a person should know about what was not read.

    Attributes:
        notes: one sentence each, about files that were left out or numbers that need care.
        sweeps: contents of the sweep.json files that were met, by folder.
    """

    runs: list[Run]
    notes: list[str]
    sweeps: dict[Path, dict[str, Any]] = field(default_factory=dict)


def collect(folders: Sequence[Path], *, local: bool = False) -> Collection:
    """All finished runs below `folders` (a folder, or a record.json itself), oldest first.

    `local`: with what their folders keep for the owner of the data alone; what is made of it must not be
    published.

    Raises:
        RecordError: a folder does not exist, or no usable record lies below any of them.
    """
    found = Collection([], [])
    problems: list[str] = []
    failures: list[str] = []
    unfinished: list[str] = []
    twice = 0
    seen: dict[str, Path] = {}
    shared: dict[str, dict[str, Any]] = {}
    files: set[Path] = set()
    for path in _files(folders):
        real = path.resolve()
        if real in files:
            continue  # folders that lie in one another
        files.add(real)
        if path.name == SWEEP_NAME:
            _read_sweep(path, found, problems)
        elif path.name == FAILURE_NAME:
            if not (path.parent / record.RECORD_NAME).exists():
                failures.append(_failure(path))
        elif path.name == "config.yaml":
            unfinished.append(str(path.parent))
        else:
            try:
                made = record.whole(path.parent) if local and path.name == record.RECORD_NAME else None
                run = run_of(made or record.read(path), path, shared)
            except RecordError as error:
                problems.append(str(error))
                continue
            if run.id in seen:
                twice += 1
                continue
            seen[run.id] = path
            found.runs.append(run)
    pruned = sum(run.pruned for run in found.runs)
    if pruned == len(found.runs):
        if pruned:
            problems.append(f"{pruned} runs were given up by a search before their end")
        raise RecordError(_nothing(folders, problems, failures, unfinished))
    found.runs.sort(key=lambda run: run.started)  # stable: within a second, by folder
    found.notes += _listed(problems, "record could not be used", "records could not be used")
    found.notes += _listed(failures, "run failed", "runs failed")
    found.notes += _listed(
        unfinished,
        "run is not finished (fedtune run resume=FOLDER goes on with it)",
        "runs are not finished (fedtune run resume=FOLDER goes on with one)",
    )
    if pruned:
        found.notes.append(
            f"{pruned} runs were given up by a search before their end (pruned): they are in no chart and no "
            "table, and count among the runs that used the data."
        )
    if held := sum(run.cost.seconds is None for run in found.runs):
        found.notes.append(
            f"{held:,} of these runs used data that is not declared public: their times, energy, memory and "
            "the prices of them depend on private records, so they are '-' here and lie in local.json of the "
            "run folders; `fedtune report --local` shows them to the owner of the data."
        )
    if twice:
        found.notes.append(f"{twice} further copies of the same runs (equal run.id) were left out.")
    return found


def _files(folders: Sequence[Path]) -> Iterator[Path]:
    for folder in folders:
        folder = Path(folder)
        if folder.is_file():
            yield folder
        elif folder.is_dir():
            yield from _walk(folder)
        else:
            raise RecordError(f"There is no folder {folder}. Name one that 'fedtune run' has written to.")


def _walk(folder: Path) -> Iterator[Path]:
    """Files of interest, folders in the order of their names. Links to folders are not followed."""
    stack = [str(folder)]
    while stack:
        current = stack.pop()
        try:
            entries = list(os.scandir(current))
        except OSError as error:
            raise RecordError(f"Cannot read the folder {current}: {error.strerror or error}.") from error
        names = {entry.name for entry in entries}
        for name in (SWEEP_NAME, FAILURE_NAME, record.RECORD_NAME):
            if name in names:
                yield Path(current, name)
        if "checkpoint" in names and "config.yaml" in names and record.RECORD_NAME not in names:
            yield Path(current, "config.yaml")
        below = [e for e in entries if e.name not in _SKIPPED and e.is_dir(follow_symlinks=False)]
        stack += [entry.path for entry in sorted(below, key=lambda e: e.name, reverse=True)]


def _nothing(folders: Sequence[Path], problems: list[str], failures: list[str], unfinished: list[str]) -> str:
    where = ", ".join(str(folder) for folder in folders)
    rest = problems + failures
    if unfinished and not rest:
        return (
            f"No run below {where} is finished ({len(unfinished)} are not, for instance {unfinished[0]}). "
            f"Finish it with 'fedtune run resume={unfinished[0]}'."
        )
    if not rest:
        return (
            f"There is no record.json below {where}, so there is nothing to report. Make some runs first: "
            "fedtune run -m privacy.epsilon=1,2,4,8 hydra.sweep.dir=FOLDER"
        )
    more = f" (and {len(rest) - 1} more like it)" if len(rest) > 1 else ""
    return f"None of the records below {where} can be used. {rest[0]}{more}"


def _listed(items: list[str], one: str, many: str) -> list[str]:
    if not items:
        return []
    head = f"{len(items):,} {one if len(items) == 1 else many}: "
    shown = items[:3]
    more = f"; and {len(items) - 3:,} more." if len(items) > 3 else ""
    return [head + "; ".join(shown) + more]


def _read_sweep(path: Path, found: Collection, problems: list[str]) -> None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it holds no object")
        found.sweeps[path.parent] = value
    except (OSError, ValueError) as error:
        problems.append(f"{path} cannot be read: {error}")


def _failure(path: Path) -> str:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        return f"{path.parent} ({value['error']})"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{path.parent} (its {FAILURE_NAME} cannot be read)"
