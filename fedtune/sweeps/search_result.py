"""What a search found, and what it told about the data: the lines at its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.errors import RecordError
from fedtune.report.collect import Collection, Run, collect
from fedtune.report.tuning import describe_search, tuning_of
from fedtune.report.words import format_number

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

__all__ = ["closing"]

_MOST_SHOWN = 8


def closing(study: Study, objectives: Sequence[str], folder: Path) -> list[str]:
    """How many trials there were, the best of them, and the epsilon of all runs composed."""
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    finished = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    pruned = sum(trial.state is TrialState.PRUNED for trial in trials)
    failed = sum((folder / str(trial.number) / "failure.json").exists() for trial in trials)
    counts = [f"{len(finished)} finished", f"{pruned} given up early", f"{failed} failed"]
    lines = [f"{len(finished) + pruned + failed} trials: {', '.join(counts)}."]
    if not finished:
        return lines
    best = sorted(study.best_trials, key=lambda trial: trial.values[0], reverse=objectives[0] == "accuracy")
    if len(objectives) == 1:
        lines.append(f"Best: {_said(best[0], objectives)}")
    else:
        lines.append(f"{len(best)} of them are not beaten in everything by another:")
        lines += [f"  {_said(trial, objectives)}" for trial in best[:_MOST_SHOWN]]
        if len(best) > _MOST_SHOWN:
            lines.append(f"  and {len(best) - _MOST_SHOWN} more: fedtune report {folder}")
    try:
        found = collect([folder])
    except RecordError:
        return lines
    return [*lines, _spent(found, folder / str(best[0].number))]


def _said(trial: FrozenTrial, objectives: Sequence[str]) -> str:
    values = ", ".join(
        f"{name} {format_number(value)}" for name, value in zip(objectives, trial.values, strict=True)
    )
    chosen = ", ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in trial.params.items()
    )
    return f"run {trial.number + 1}: {values} ({chosen})"


def _spent(found: Collection, best: Path) -> str:
    """The epsilon of all runs composed: the chosen run's alone is not what was told."""
    chosen = next((run for run in found.runs if run.path.parent.resolve() == best.resolve()), None)
    tuning = None if chosen is None else tuning_of(found.runs, chosen, found.sweeps)
    if chosen is None or tuning is None:
        return "That run has no privacy (trust none), so nothing is promised about this search."
    text = (
        f"All {tuning.runs} private runs composed: epsilon {format_number(tuning.epsilon_composed)} (delta "
        f"{tuning.delta:.1e}, {tuning.adjacency}); run {_position(chosen)} alone would be "
        f"{format_number(tuning.epsilon_alone)}, which is not the whole truth: it was chosen by looking at "
        "the others"
    )
    if tuning.searched_mechanism or tuning.pruned:
        text += f". {describe_search(tuning).rstrip('.')}"
    if tuning.without_privacy:
        text += f". {tuning.without_privacy} more runs had no privacy: with them nothing is promised"
    if tuning.public:
        text += ". The data was declared public by its owner, so this is what it would have cost"
    return f"{text}. Failed runs are in the ledgers only: fedtune budget show."


def _position(run: Run) -> int:
    return int(run.path.parent.name) + 1
