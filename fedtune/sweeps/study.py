"""The optuna study of a search: its journal file, samplers, and when a trial is ended early.

The study is opened or made, repaired after a kill, and refused if it belongs to another search.

A trial is ended early (pruned) by its accuracy after a round, compared with the other trials at that round.
The accuracy is that of an adapter which the nodes have released, on public test data, so that looking at it
costs no privacy, or from noised counts that the nodes were charged for (`federation.evaluation`); in rounds
without either no trial is ended. What the run had released until then stays released, and its record and the
ledgers keep it. A `Pruning` is small, because the run that it ends may be made in another process than the
search: both open the study. Does not do: prune for several objectives, of which a round measures only one.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.errors import CheckpointError
from fedtune.federation.events import PRUNED, RoundSummary, StopRule
from fedtune.report.words import format_percent
from fedtune.runs import record
from fedtune.sweeps.options import OBJECTIVES, SearchSettings

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.study import Study

    from fedtune.config.search import Axis

__all__ = [
    "STUDY_FILE",
    "STUDY_NAME",
    "Pruning",
    "check_identity",
    "has_record",
    "number_of_values",
    "open_study",
    "optuna_distribution",
    "storage",
]

STUDY_FILE = "study.journal"
STUDY_NAME = "fedtune"
_IDENTITY = "fedtune"  # the study's own note of what it belongs to


def open_study(folder: Path, settings: SearchSettings, identity: Mapping[str, Any]) -> Study:
    """The study in `folder`, made if there is none.

    Raises:
        CheckpointError: it is missing beside runs, damaged, or another search's.
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
    check_identity(noted, identity, path)
    return study


def check_identity(noted: Any, wanted: Mapping[str, Any], where: Path) -> None:
    """Checks that a study belongs to this search.

    Raises:
        CheckpointError: it does not; with what differs.
    """
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


def _sampler(settings: SearchSettings) -> BaseSampler:
    from optuna import samplers

    if settings.sampler == "random":
        return samplers.RandomSampler()
    if settings.sampler == "nsga2":
        return samplers.NSGAIISampler(population_size=max(4, min(50, settings.trials // 4)))
    # optuna begins with 10 random trials; of 20 that would be half.
    return samplers.TPESampler(n_startup_trials=max(4, min(10, settings.trials // 4)))


def optuna_distribution(axis: Axis) -> BaseDistribution:
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


# --- ending a trial early --------------------------------------------------------------------------


@dataclass(frozen=True)
class Pruning:
    """When a trial is ended early.

    Attributes:
        folder: of the sweep; the study lies in it.
        pruner: `median`: worse than the median of the others at this round. `halving`: not in the better half
            of those that came as far (asynchronous successive halving, Li et al. 2020, with factor 2).
        warm_up: rounds in which no trial is ended; noise is large there, and accuracy still rising.
    """

    folder: Path
    pruner: str
    warm_up: int

    def stop_rule(self, number: int) -> StopRule:
        """Says after each round why the trial `number` should end there, or None."""
        from optuna.trial import Trial

        study = self._study()
        trial = Trial(study, study.get_trials(deepcopy=False)[number]._trial_id)

        def stop_rule(summary: RoundSummary) -> str | None:
            if summary.accuracy is None:
                return None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a resumed run tells a round for the second time
                trial.report(summary.accuracy, summary.round)
            if summary.round >= summary.num_rounds or not trial.should_prune():
                return None
            against = "the median of" if self.pruner == "median" else "the better half of"
            return (
                f"{PRUNED} after {summary.round} of {summary.num_rounds} rounds: accuracy "
                f"{format_percent(summary.accuracy)} is below {against} the other trials at that round."
            )

        return stop_rule

    def _study(self) -> Study:
        import optuna

        return optuna.load_study(
            study_name=STUDY_NAME, storage=storage(self.folder / STUDY_FILE), pruner=self._pruner()
        )

    def _pruner(self) -> BasePruner:
        from optuna import pruners

        first = self.warm_up + 1  # the first round at which a trial may be ended
        if self.pruner == "median":
            return pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=first)
        return pruners.SuccessiveHalvingPruner(min_resource=first, reduction_factor=2)


def storage(path: Path) -> Any:
    """optuna's storage in the file `path`: an append-only journal, which several processes may use."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return JournalStorage(JournalFileBackend(str(path)))
