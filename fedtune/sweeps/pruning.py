"""Giving up a bad trial of a search early: its accuracy after each round, against the other trials' then.

The accuracy is that of an adapter which the nodes have released, on public test data, so that looking at it
costs no privacy, or from noised counts that the nodes were charged for (`federation.evaluation`); in rounds
without either nothing is given up. What the run had released until then stays released, and its record and
the ledgers keep it.

A `Pruning` is a few words, because the run that it judges may be made in another process than the search:
both open the study, a journal file in the sweep's folder. Does not do: prune for several objectives, of
which a round tells only one.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.federation.events import PRUNED, RoundSummary, StopRule
from fedtune.report.words import format_percent

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.study import Study

__all__ = ["PRUNERS", "STUDY_FILE", "STUDY_NAME", "Pruning", "storage"]

STUDY_FILE = "study.journal"
STUDY_NAME = "fedtune"
PRUNERS = ("none", "median", "halving")


@dataclass(frozen=True)
class Pruning:
    """When a trial is given up.

    Attributes:
        folder: of the sweep; the study lies in it.
        pruner: `median`: worse than the median of the others at this round. `halving`: not in the better half
            of those that came as far (asynchronous successive halving, Li et al. 2020, with factor 2).
        warm_up: rounds in which no trial is given up; noise is large there, and accuracy still rising.
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

        first = self.warm_up + 1  # the first round at which a trial may be given up
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
