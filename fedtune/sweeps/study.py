"""The optuna study of a search: opened or made, mended after a kill, refused if it is another search's."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.errors import CheckpointError
from fedtune.runs import record
from fedtune.sweeps.pruning import STUDY_FILE, STUDY_NAME, storage
from fedtune.sweeps.search_settings import OBJECTIVES, Settings

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.samplers import BaseSampler
    from optuna.study import Study

    from fedtune.config.search import Axis

__all__ = ["distribution", "has_record", "number_of_values", "open_study", "same"]

_IDENTITY = "fedtune"  # the study's own note of what it belongs to


def open_study(folder: Path, settings: Settings, identity: Mapping[str, Any]) -> Study:
    """The study in `folder`, made if there is none.

    Raises: CheckpointError if it is missing beside runs, damaged, or another search's.
    """
    import optuna

    path = folder / STUDY_FILE
    if not path.exists() and any(has_record(run) for run in folder.glob("[0-9]*")):
        raise CheckpointError(
            f"{folder} holds runs of a search, and its study {STUDY_FILE} is missing, so it is not "
            "known what they were. Copy the file, too, or begin a new search in another folder."
        )
    _mend(path)
    try:
        study = optuna.create_study(
            study_name=STUDY_NAME,
            storage=storage(path),
            sampler=_sampler(settings),
            directions=[OBJECTIVES[name][0] for name in settings.objectives],  # type: ignore[misc]
            load_if_exists=True,
        )
        noted, trials = study.user_attrs.get(_IDENTITY), len(study.get_trials(deepcopy=False))
        if noted is None and not trials:
            study.set_user_attr(_IDENTITY, dict(identity))
            return study
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RuntimeError) as error:
        raise CheckpointError(f"The study {path} cannot be read: {' '.join(str(error).split())}.") from error
    same(noted, identity, path)
    return study


def same(noted: Any, wanted: Mapping[str, Any], where: Path) -> None:
    """Raises `CheckpointError`, with what differs, unless a study belongs to this search."""
    if noted == wanted:
        return
    parts = []
    for name, mine in wanted.items():
        its = noted.get(name, []) if isinstance(noted, Mapping) else ["unknown"]
        if its != mine:
            parts.append(
                f"{name}: there {'; '.join(map(str, its)) or 'nothing'}, here {'; '.join(mine) or 'nothing'}"
            )
    raise CheckpointError(
        f"{where} belongs to another search ({', and '.join(parts)}). Its trials say nothing about this one: "
        "go on with it by its own command, or choose another folder with hydra.sweep.dir=FOLDER."
    )


def _mend(path: Path) -> None:
    """Takes off the half of a line that a killed process left, and its lock: the folder's lock is ours."""
    path.with_name(path.name + ".lock").unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
        text = file.read()
        if text and not text.endswith(b"\n"):
            file.truncate(text.rfind(b"\n") + 1)


def _sampler(settings: Settings) -> BaseSampler:
    from optuna import samplers

    if settings.sampler == "random":
        return samplers.RandomSampler()
    if settings.sampler == "nsga2":
        return samplers.NSGAIISampler(population_size=max(4, min(50, settings.trials // 4)))
    # optuna begins with 10 random trials; of 20 that would be half.
    return samplers.TPESampler(n_startup_trials=max(4, min(10, settings.trials // 4)))


def distribution(axis: Axis) -> BaseDistribution:
    """An axis of the search as Optuna has it."""
    from optuna import distributions

    if axis.choices:
        return distributions.CategoricalDistribution(axis.choices)
    if axis.whole:
        step = 1 if axis.step is None else int(axis.step)
        return distributions.IntDistribution(int(axis.low), int(axis.high), log=axis.log, step=step)
    return distributions.FloatDistribution(axis.low, axis.high, log=axis.log, step=axis.step)


def number_of_values(axis: Axis) -> float:
    """How many values it has."""
    if axis.choices:
        return len(axis.choices)
    step = 1.0 if axis.whole and axis.step is None else axis.step
    return math.inf if step is None else math.floor((axis.high - axis.low) / step + 1e-9) + 1


def has_record(folder: Path) -> bool:
    """Did the run in this folder finish?"""
    return (folder / record.RECORD_NAME).exists()
