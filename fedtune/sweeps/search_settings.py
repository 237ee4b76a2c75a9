"""How a search is made: objectives, number of trials, sampler, pruner; checked before anything runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from fedtune.config.convert import nearest
from fedtune.errors import CheckpointError, ConfigError
from fedtune.sweeps.options import SweepOptions
from fedtune.sweeps.pruning import PRUNERS

__all__ = ["MEASURED", "OBJECTIVES", "SAMPLERS", "Settings", "kept_settings", "settings_of"]

SAMPLERS = ("tpe", "nsga2", "random")


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
class Settings:
    """How a search is made: `hydra.sweeper` of its page, with the command line's `sweep.*` over it."""

    trials: int
    objectives: tuple[str, ...]
    sampler: str
    pruner: str


def settings_of(page: Mapping[str, Any], options: SweepOptions) -> Settings:
    """Raises `ConfigError` for a setting that does not exist, or has a value without a meaning."""
    known = tuple(item.name for item in dataclasses.fields(Settings))
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
    sampler = options.sampler or str(page["sampler"])
    if sampler not in SAMPLERS:
        raise ConfigError(f"sweep.sampler={sampler} is not allowed: it must be one of {', '.join(SAMPLERS)}.")
    trials = options.trials if options.trials is not None else page["trials"]
    if (
        isinstance(trials, bool)
        or not isinstance(trials, (int, float))
        or trials != int(trials)
        or trials < 1
    ):
        raise ConfigError(f"sweep.trials={trials} is not allowed: a search makes a whole number of runs.")
    asked = options.pruner or page["pruner"]
    pruner = str(asked or ("median" if objectives == ("accuracy",) else "none"))
    if pruner not in PRUNERS:
        raise ConfigError(f"sweep.pruner={pruner} is not allowed: it must be one of {', '.join(PRUNERS)}.")
    if pruner != "none" and objectives != ("accuracy",):
        raise ConfigError(
            f"sweep.pruner={pruner} cannot be used with sweep.objectives={','.join(objectives)}: a trial is "
            "given up by its accuracy round by round, and one that is less accurate may be the better one "
            "for another objective. Leave the pruner out, or search with sweep.objectives=accuracy."
        )
    return Settings(int(trials), objectives, sampler, pruner)


def kept_settings(kept: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in the `sweep.json` of a search, as its page would give them. Raises `CheckpointError`."""
    try:
        return {item.name: kept["search"][item.name] for item in dataclasses.fields(Settings)}
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"The sweep.json of this search is damaged: it lacks {error}.") from error
