"""A search: optuna chooses the runs of a sweep, each after having seen those before.

The study is a journal file in the sweep's folder; trial number N is the run in folder N. After `kill -9` the
trials that were under way are finished (from their checkpoints, or from their records where only the study
lacks them), and a trial that is finished is never run again. A failed run is a failed trial; a resumed search
makes others in their place. Settings that were tried are not tried twice: noise would differ, and privacy
would be spent on it. A study that belongs to other settings or objectives is refused.

What it costs in privacy. Each trial is a use of the data, which its nodes' ledgers charge, also if it is
ended early. The choice of the next trial depends on what the others released, so the bound for
publishing only the best of a random number of independent trials (`fedtune.privacy.accounting.selection`)
does not hold here: what a search tells about the data is all of its runs composed, and that is the number
it shows at its end. If noise, rates or rounds are searched too, that composition is of parameters that were
chosen after outputs were seen; see `fedtune.privacy.ledger.ledger` on what is proven of it.

Does not do: draw from the search's own seed (a resumed search would draw the same again).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.config.choices import resolved
from fedtune.errors import ConfigError, RecordError
from fedtune.federation.run_folder import lock_folder
from fedtune.report.collect import Collection, Run, collect
from fedtune.report.tuning import describe_search, tuning_of
from fedtune.report.words import format_number
from fedtune.runs import record
from fedtune.sweeps.options import (
    MEASURED,
    OBJECTIVES,
    SearchSettings,
    SweepOptions,
    distinct_jobs,
    saved_settings,
    search_settings,
    write_sweep,
)
from fedtune.sweeps.progress import SweepProgress
from fedtune.sweeps.study import (
    Pruning,
    check_identity,
    has_record,
    number_of_values,
    open_study,
    optuna_distribution,
)

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

    from fedtune.config.schema import Config
    from fedtune.config.search import Axis, Space

__all__ = ["Search", "begin_search"]

Say = Callable[[str], None]
_REPEATS = 5  # proposals that were tried already, before one is drawn uniformly from the rest


def begin_search(
    space: Space,
    options: SweepOptions,
    overrides: Sequence[str],
    saved: Mapping[str, Any] | None,
    say: Say,
    warn: Say,
) -> Search:
    """Opens the study of the search in `space.folder`, or makes it.

    Args:
        saved: `sweep.json` of the search that is resumed; None: a new one.

    Raises:
        ConfigError: settings that mean nothing, or optuna is not installed.
        CheckpointError: the study belongs to another search, or cannot be read.
    """
    if options.private_selection:
        raise ConfigError(
            "sweep.private_selection=true cannot be used with sweep=optuna: its bound (Papernot and Steinke "
            "2022) holds for trials that are drawn independently of one another, and a search chooses "
            "each by what those before released. Draw the trials of a grid at random, or search and count "
            "all runs."
        )
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise ConfigError("sweep=optuna needs optuna: pip install 'fedtune[optuna]'.") from error
    settings = search_settings(space.options if saved is None else saved_settings(saved), options)
    _refuse_measured(settings, space)
    if space.base is not None and "accuracy" in settings.objectives:
        _refuse_blind(space.base)
    identity = {
        "searched": [str(axis) for axis in space.axes],
        "the same in all runs": sorted(space.fixed),
        "objectives": list(settings.objectives),
    }
    if saved is not None:
        check_identity(saved["search"].get("identity"), identity, space.folder)
    write_sweep(space.folder, overrides, [], search={**dataclasses.asdict(settings), "identity": identity})
    return Search(space, settings, identity, say, warn)


def _refuse_measured(settings: SearchSettings, space: Space) -> None:
    """Refuses to choose trials of private data by what is measured of them.

    Which settings are tried next is published, and what a run takes depends on private records.

    Raises:
        ConfigError: an objective is measured, and the data is not declared public.
    """
    measured = [name for name in settings.objectives if name in MEASURED]
    if measured and space.base is not None and not space.base.data.public:
        raise ConfigError(
            f"sweep.objectives={','.join(settings.objectives)} is not possible on data that is not declared "
            f"public: {', '.join(measured)} would be measured, and what is measured depends on private "
            f"records and is in no epsilon. Use {', '.join(n for n in OBJECTIVES if n not in MEASURED)}."
        )


def _refuse_blind(base: Config) -> None:
    """Refuses a search by an accuracy that no run will have, while each would be charged.

    Raises:
        ConfigError: no run is evaluated.
    """
    if resolved(base).federation.evaluation == "none":
        raise ConfigError(
            "sweep.objectives=accuracy cannot be used where no run is evaluated (federation.evaluation=none, "
            "as it is by default for private data under trust=central or with a given noise_multiplier): "
            "every run would be charged and none could be compared. Declare public test data "
            "(data.test_split=test data.test_public=true), set federation.evaluation=private with "
            "federation.evaluation_epsilon, or search for something else (sweep.objectives)."
        )


class Search:
    """Chooses the runs by optuna: a `fedtune.config.search.Searcher`."""

    def __init__(
        self, space: Space, settings: SearchSettings, identity: Mapping[str, Any], say: Say, warn: Say
    ) -> None:
        self._space, self.settings, self._say, self._warn = space, settings, say, warn
        self._open = contextlib.ExitStack()
        self._open.enter_context(lock_folder(space.folder))
        try:
            self._study = open_study(space.folder, settings, identity)
            self._distributions = {axis.name: optuna_distribution(axis) for axis in space.axes}
            self.progress = SweepProgress(space.folder, settings.trials, {}, workers=space.workers)
            self._tried: set[str] = set()
            self._waiting: list[FrozenTrial] = []
            self._left = settings.trials
            self._recover()
            self.progress.refresh()
        except BaseException:
            self.close()
            raise
        rounds = (space.base.federation.num_rounds if space.base is not None else None) or 8
        self.pruning = (
            None
            if settings.pruner == "none"
            else Pruning(space.folder, settings.pruner, warm_up=max(1, rounds // 4))
        )

    def opening(self) -> str:
        """What is searched, and what it costs in privacy."""
        aims = [
            f"{name} {'up' if OBJECTIVES[name][0] == 'maximize' else 'down'}"
            for name in self.settings.objectives
        ]
        return (
            f"Search for {', '.join(aims)} over {'; '.join(map(str, self._space.axes))}. Every run is a use "
            "of the data, charged to the nodes' ledgers, and each is chosen by what the others released: "
            "what this search spends is all of its runs composed"
        )

    def ask(self, most: int) -> list[tuple[int, list[str]]]:
        """See `Searcher`."""
        batch: list[tuple[int, list[str]]] = []
        while len(batch) < most and self._left > 0:
            trial = self._waiting.pop(0) if self._waiting else self._draw()
            if trial is None:
                self._left = 0
                break
            self._left -= 1
            words = [f"{name}={_text(value)}" for name, value in trial.params.items()]
            self.progress.names[trial.number] = ",".join(
                f"{name}={_text(value, short=True)}" for name, value in trial.params.items()
            )
            batch.append((trial.number, distinct_jobs([[*self._space.fixed, *words]])[0]))
        if not batch:
            for line in result_lines(self._study, self.settings.objectives, self._space.folder):
                self._say(line)
        return batch

    def tell(self, number: int) -> None:
        """See `Searcher`."""
        from optuna.trial import TrialState

        try:
            made = record.read(self._space.folder / str(number))
        except RecordError:
            self._study.tell(number, state=TrialState.FAIL)
            return
        if made["run"].get("status") == "pruned":
            self._study.tell(number, state=TrialState.PRUNED)
            return
        values = [OBJECTIVES[name][1](made) for name in self.settings.objectives]
        unknown = [
            name
            for name, value in zip(self.settings.objectives, values, strict=True)
            if value is None or not math.isfinite(value)
        ]
        if unknown:
            self._warn(
                f"run {number + 1} is no trial of the search: its record has no {' and no '.join(unknown)}. "
                "It was charged all the same."
            )
            self._study.tell(number, state=TrialState.FAIL)
        else:
            self._study.tell(number, values)

    def close(self) -> None:
        """Lets others into the folder."""
        self._open.close()

    # --- pieces ---------------------------------------------------------------------------------

    def _recover(self) -> None:
        """Counts what earlier sessions finished, and queues what they left unfinished."""
        from optuna.trial import TrialState

        for trial in self._study.get_trials(deepcopy=False):
            if trial.state is TrialState.RUNNING:
                if set(trial.params) != set(self._distributions):  # killed while it was drawn
                    self._study.tell(trial.number, state=TrialState.FAIL)
                    continue
                if has_record(self._space.folder / str(trial.number)):
                    self.tell(trial.number)
                    trial = self._study.get_trials(deepcopy=False)[trial.number]
                else:
                    self._waiting.append(trial)
            # A run whose accuracy the noise hid is no trial, but it was made and charged: not made again.
            hidden = trial.state is TrialState.FAIL and has_record(self._space.folder / str(trial.number))
            if hidden or trial.state is not TrialState.FAIL:
                self._tried.add(_key(trial.params))
            self._left -= hidden or trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
            self.progress.names[trial.number] = ",".join(
                f"{name}={_text(value, short=True)}" for name, value in trial.params.items()
            )

    def _draw(self) -> FrozenTrial | None:
        """A new trial; None if everything was tried."""
        from optuna.trial import TrialState

        size = math.prod(number_of_values(axis) for axis in self._space.axes)
        if len(self._tried) < size:
            for repeats in itertools.count():
                if repeats >= _REPEATS:
                    self._study.enqueue_trial(self._untried())
                trial = self._study.ask(self._distributions)
                if _key(trial.params) not in self._tried:
                    self._tried.add(_key(trial.params))
                    return self._study.get_trials(deepcopy=False)[trial.number]
                self._study.tell(trial, state=TrialState.FAIL)
        self._say(
            f"The search ends before {self.settings.trials} trials: there is nothing that was not tried."
        )
        return None

    def _untried(self) -> dict[str, Any]:
        """Settings that were not tried, any with the same chance: a sampler may insist on its favourite."""
        chance = random.SystemRandom()
        while True:
            drawn = {axis.name: _any_value(axis, chance) for axis in self._space.axes}
            if _key(drawn) not in self._tried:
                return drawn


def _text(value: Any, *, short: bool = False) -> str:
    """As it is written on the command line; choices are texts of that kind already."""
    return f"{value:.4g}" if short and isinstance(value, float) else str(value)


def _any_value(axis: Axis, chance: random.Random) -> Any:
    if axis.choices:
        return chance.choice(axis.choices)
    if axis.whole or axis.step is not None:
        step = 1.0 if axis.step is None else axis.step
        value = axis.low + step * chance.randrange(int(number_of_values(axis)))
        return int(value) if axis.whole else value
    return chance.uniform(axis.low, axis.high)


def _key(params: Mapping[str, Any]) -> str:
    return json.dumps(params, sort_keys=True)


# --- its end ---------------------------------------------------------------------------------------


_MOST_SHOWN = 8


def result_lines(study: Study, objectives: Sequence[str], folder: Path) -> list[str]:
    """How many trials there were, the best of them, and the epsilon of all runs composed."""
    from optuna.trial import TrialState

    trials = study.get_trials(deepcopy=False)
    finished = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    pruned = sum(trial.state is TrialState.PRUNED for trial in trials)
    failed = sum((folder / str(trial.number) / "failure.json").exists() for trial in trials)
    counts = [f"{len(finished)} finished", f"{pruned} ended early", f"{failed} failed"]
    lines = [f"{len(finished) + pruned + failed} trials: {', '.join(counts)}."]
    if not finished:
        return lines
    best = sorted(study.best_trials, key=lambda trial: trial.values[0], reverse=objectives[0] == "accuracy")
    if len(objectives) == 1:
        lines.append(f"Best: {_trial_text(best[0], objectives)}")
    else:
        lines.append(f"{len(best)} of them are not beaten in everything by another:")
        lines += [f"  {_trial_text(trial, objectives)}" for trial in best[:_MOST_SHOWN]]
        if len(best) > _MOST_SHOWN:
            lines.append(f"  and {len(best) - _MOST_SHOWN} more: fedtune report {folder}")
    try:
        found = collect([folder])
    except RecordError:
        return lines
    return [*lines, _spent(found, folder / str(best[0].number))]


def _trial_text(trial: FrozenTrial, objectives: Sequence[str]) -> str:
    values = ", ".join(
        f"{name} {format_number(value)}" for name, value in zip(objectives, trial.values, strict=True)
    )
    chosen = ", ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in trial.params.items()
    )
    return f"run {trial.number + 1}: {values} ({chosen})"


def _spent(found: Collection, best: Path) -> str:
    """The epsilon of all runs composed, which is what the search spent, beside that of the chosen run."""
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
