"""Options of a sweep and settings of a search, checked before anything runs; and the file that keeps them.

`sweep.NAME=VALUE` on the command line is no setting of a run: what a run does must not depend on other runs.
So these words are taken off the command line before Hydra sees it, and written to `sweep.json`, from which
`sweep.resume=FOLDER` goes on, on this machine or wherever the folder was copied to.
"""

from __future__ import annotations

import dataclasses
import json
import math
import reprlib
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.config.convert import nearest
from fedtune.config.files import meant_path, save
from fedtune.config.shapes import read_as
from fedtune.errors import CheckpointError, ConfigError
from fedtune.privacy.accounting.selection import TrialCount
from fedtune.report.collect import SWEEP_NAME
from fedtune.report.tuning import changes_mechanism

__all__ = [
    "MEASURED",
    "OBJECTIVES",
    "SearchSettings",
    "SweepOptions",
    "distinct_jobs",
    "draw_trials",
    "read_sweep",
    "saved_settings",
    "search_settings",
    "split_options",
    "write_sweep",
]

SCHEMA = 1
_SEARCH_NAMES = ("objectives", "sampler", "pruner")
_NAMES = ("resume", "private_selection", "trials", "distribution", *_SEARCH_NAMES)
_SHAPES = {"geometric": 1.0, "logarithmic": 0.0, "poisson": math.inf}
_NOT_PRIVATE = ("privacy.epsilon", "privacy.delta", "privacy.noise_multiplier")
_HEAD_ALONE = ("adapter.layers", "adapter.rank", "adapter.alpha")
# What an override leaves without meaning.
_IDLE = {
    "privacy=none": _NOT_PRIVATE,
    "privacy.trust=none": _NOT_PRIVATE,
    "adapter=head": _HEAD_ALONE,
    "adapter.name=head": _HEAD_ALONE,
}


@dataclass(frozen=True)
class SweepOptions:
    """What `sweep.*` asked for.

    Attributes:
        resume: go on with the sweep in this folder.
        private_selection: draw the number of trials and each trial's settings at random.
        trials: expected number of trials; None: as many as there are combinations. Of a search: their number.
        distribution: of the number of trials.
        objectives, sampler, pruner: of a search (`fedtune.sweeps.search`); None: as its page says.
    """

    resume: Path | None = None
    private_selection: bool = False
    trials: float | None = None
    distribution: str = "geometric"
    objectives: tuple[str, ...] | None = None
    sampler: str | None = None
    pruner: str | None = None

    def search_only(self) -> list[str]:
        """The options that were given and have a meaning for a search only."""
        return [f"sweep.{name}" for name in _SEARCH_NAMES if getattr(self, name) is not None]

    def refuse_trials_of_a_grid(self) -> None:
        """Refuses a number of trials where nothing draws or searches them.

        Raises:
            ConfigError: there is one.
        """
        if self.trials is not None and not self.private_selection:
            raise ConfigError("sweep.trials belongs to sweep.private_selection=true, or to sweep=optuna.")

    def count(self, combinations: int) -> TrialCount:
        """The distribution of the number of trials."""
        mean = self.trials if self.trials is not None else float(max(1, combinations))
        return TrialCount(mean, _SHAPES[self.distribution])


def split_options(words: Sequence[str]) -> tuple[SweepOptions, list[str]]:
    """The options in `words`, and the words that are left for Hydra.

    Raises:
        ConfigError: an option does not exist, is given twice, or has a value without meaning.
    """
    given: dict[str, str] = {}
    rest: list[str] = []
    for word in words:
        name, equals, value = word.lstrip("+").partition("=")
        if not name.startswith("sweep."):
            rest.append(word)
            continue
        short = name.removeprefix("sweep.")
        if short not in _NAMES or not equals:
            guess = nearest(short, _NAMES)
            hint = f" Did you mean sweep.{guess}=...?" if guess else ""
            names = ", ".join(f"sweep.{option}" for option in _NAMES)
            raise ConfigError(f"There is no option {name!r} of a sweep.{hint} There are: {names}.")
        if short in given:
            raise ConfigError(f"{name} is given twice. Keep one of them.")
        given[short] = value
    others = [f"sweep.{name}" for name in given if name not in ("resume", "trials")] + rest
    if "resume" in given and others:
        raise ConfigError(
            f"sweep.resume={given['resume']} goes on with the sweep as it was started, so "
            f"{', '.join(others)} cannot be given with it. Leave it out, or start a new sweep."
        )
    return _options(given), rest


def _one_of(name: str, value: str, allowed: Collection[str]) -> str:
    if value not in allowed:
        *others, last = allowed
        raise ConfigError(f"sweep.{name}={value} is not allowed: it must be {', '.join(others)} or {last}.")
    return value


def _options(given: dict[str, str]) -> SweepOptions:
    selection = _one_of(
        "private_selection", given.get("private_selection", "false").lower(), ("true", "false")
    )
    distribution = _one_of("distribution", given.get("distribution", "geometric"), _SHAPES)
    trials = None
    if "trials" in given:
        try:
            trials = float(given["trials"])
        except ValueError:
            trials = math.nan
        if not 1.0 <= trials < math.inf:
            raise ConfigError(
                f"sweep.trials={given['trials']} is not allowed: it must be a number, 1 or more."
            )
    if selection == "false" and "distribution" in given:
        raise ConfigError("sweep.distribution belongs to sweep.private_selection=true.")
    objectives = None
    if "objectives" in given:
        names = given["objectives"].strip("[]() ").split(",")
        objectives = tuple(name.strip() for name in names if name.strip())
    return SweepOptions(
        resume=Path(given["resume"]).expanduser() if "resume" in given else None,
        private_selection=selection == "true",
        trials=trials,
        distribution=distribution,
        objectives=objectives,
        sampler=given.get("sampler"),
        pruner=given.get("pruner"),
    )


def distinct_jobs(jobs: list[list[str]]) -> list[list[str]]:
    """`jobs` without settings that mean nothing beside another one, and each job once.

    So that `privacy=local,none privacy.epsilon=1,2,4` is three runs with privacy and one without.
    """
    found: dict[tuple[str, ...], None] = {}
    for job in jobs:
        idle = {name for word in job for name in _IDLE.get(word, ())}
        found[tuple(word for word in job if word.partition("=")[0] not in idle)] = None
    return [list(job) for job in found]


def draw_trials(options: SweepOptions, jobs: list[list[str]]) -> tuple[list[list[str]], dict[str, Any]]:
    """Trials drawn from `jobs` (with replacement, independently), and what `sweep.json` keeps of the draw.

    Raises:
        ConfigError: the jobs differ in privacy or data, so that they are not one mechanism.
    """
    if not jobs:
        return [], {}
    for position in range(len(jobs[0])):
        name = jobs[0][position].partition("=")[0]
        if len({job[position] for job in jobs}) > 1 and changes_mechanism(name):
            raise ConfigError(
                f"sweep.private_selection=true cannot vary {name}: its bound is that of one mechanism that "
                "is repeated, so all trials must have the same privacy, the same steps and the same data. "
                "Vary the learning rate, the adapter, the model or the seed, and choose epsilon beforehand."
            )
    count = options.count(len(jobs))
    drawn = count.draw()
    shape = None if math.isinf(count.shape) else count.shape
    draw = {"mean": count.mean, "shape": shape, "distribution": count.name, "trials": drawn}
    return [secrets.choice(jobs) for _ in range(drawn)], draw


def write_sweep(folder: Path, overrides: Sequence[str], jobs: list[list[str]], **more: Any) -> None:
    """Writes `sweep.json`, whole or not at all.

    Raises:
        ResourceError: it cannot be written.
    """
    values = {"schema": SCHEMA, "overrides": list(overrides), "jobs": jobs, **more}
    save(folder / SWEEP_NAME, (json.dumps(values, indent=1) + "\n").encode())


def read_sweep(folder: Path) -> dict[str, Any]:
    """What `write_sweep` wrote.

    Raises:
        CheckpointError: there is no such file, or it is damaged or of another version; with the way out.
    """
    path = folder / SWEEP_NAME
    try:
        values = read_as("sweep", path)
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} is not the folder of a sweep: it has no {SWEEP_NAME}. Name the folder that "
            f"'fedtune run -m' printed; a single run is resumed by resume=RUN_DIR.{meant_path(folder)}"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read, so the sweep cannot be resumed: {error}.") from error
    if (found := values.get("schema")) != SCHEMA:
        said = f"{path} has schema {reprlib.repr(found)}, and this fedtune reads schema {SCHEMA}."
        raise CheckpointError(said)
    if not {"overrides", "jobs"} <= set(values):
        raise CheckpointError(f"{path} is damaged: it lacks its overrides or its jobs.")
    return dict(values)


# --- of a search -----------------------------------------------------------------------------------

_SAMPLERS = ("tpe", "nsga2", "random")
_PRUNERS = ("none", "median", "halving")


def _money(made: Mapping[str, Any]) -> Any:
    return (made["cost"]["money"] or {}).get("total")


# Name: (optuna's direction, where the value lies in a record).
OBJECTIVES: dict[str, tuple[str, Callable[[Mapping[str, Any]], Any]]] = {
    "accuracy": ("maximize", lambda made: made["metrics"]["accuracy"]),
    "epsilon": ("minimize", lambda made: made["privacy"]["epsilon"]),
    "energy": ("minimize", lambda made: made["cost"]["energy_kwh"]),
    "bytes": ("minimize", lambda made: made["cost"]["bytes_up"] + made["cost"]["bytes_down"]),
    "money": ("minimize", _money),
    "seconds": ("minimize", lambda made: made["cost"]["train_seconds"]),
}

# Those that are measured while private records are worked on, and so not published of private data.
MEASURED = frozenset(["energy", "money", "seconds"])


@dataclasses.dataclass(frozen=True)
class SearchSettings:
    """How a search is made: `hydra.sweeper` of its page, with the command line's `sweep.*` over it."""

    trials: int
    objectives: tuple[str, ...]
    sampler: str
    pruner: str


def search_settings(page: Mapping[str, Any], options: SweepOptions) -> SearchSettings:
    """The settings of the sweeper's page, with those of the command line over them.

    Raises:
        ConfigError: a setting does not exist, or has a value without meaning.
    """
    known = tuple(item.name for item in dataclasses.fields(SearchSettings))
    for name in page:
        if name not in known:
            guess = nearest(name, known)
            hint = f" Did you mean {guess}?" if guess else ""
            raise ConfigError(f"The sweeper has no option {name!r}.{hint} There are: {', '.join(known)}.")
    objectives = options.objectives if options.objectives is not None else page["objectives"]
    objectives = tuple([objectives] if isinstance(objectives, str) else objectives)
    wrong = [name for name in objectives if name not in OBJECTIVES]
    if wrong or not objectives or len(set(objectives)) < len(objectives):
        raise ConfigError(
            f"sweep.objectives={','.join(map(str, objectives))} is not allowed: it must be one or several of "
            f"{', '.join(OBJECTIVES)}, each once (accuracy is to rise, the others to fall)."
        )
    sampler = _one_of("sampler", options.sampler or str(page["sampler"]), _SAMPLERS)
    trials = options.trials if options.trials is not None else page["trials"]
    if isinstance(trials, bool) or not isinstance(trials, (int, float)) or trials < 1 or trials % 1:
        raise ConfigError(f"sweep.trials={trials} is not allowed: a search makes a whole number of runs.")
    default = "median" if objectives == ("accuracy",) else "none"
    pruner = _one_of("pruner", str(options.pruner or page["pruner"] or default), _PRUNERS)
    if pruner != "none" and objectives != ("accuracy",):
        raise ConfigError(
            f"sweep.pruner={pruner} cannot be used with sweep.objectives={','.join(objectives)}: a trial is "
            "ended early by its accuracy after a round, and a less accurate one may be better for another "
            "objective. Leave the pruner out, or search with sweep.objectives=accuracy."
        )
    return SearchSettings(int(trials), objectives, sampler, pruner)


def saved_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in the `sweep.json` of a search, as its page would give them.

    Raises:
        CheckpointError: one of them is missing.
    """
    try:
        return {item.name: saved["search"][item.name] for item in dataclasses.fields(SearchSettings)}
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"The sweep.json of this search is damaged: it lacks {error}.") from error
