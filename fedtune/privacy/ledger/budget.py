"""What a node's owner allows: a small JSON file beside the ledger, the node's own and never the server's.

    {"version": 1, "default": {"epsilon": 3.0, "delta": 1e-05}, "datasets": {"visits-2024": {...}}}

`default` holds for every data set without an entry of its own. A budget may name a `unit` too: then a
release that protects a finer unit is refused, whatever its epsilon (a guarantee for one record says little
to a person who has a thousand). A file that cannot be read, has unknown keys, or may be written by
every user of the machine is refused: a budget that anybody can raise is none.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.config.files import replace_whole
from fedtune.config.schema import UNITS
from fedtune.errors import LedgerError, PrivacyError

__all__ = [
    "Budgets",
    "PrivacyBudget",
    "budgets_in_force",
    "budgets_of",
    "read_budgets",
    "strictest",
    "write_budgets",
]

_VERSION = 1


@dataclass(frozen=True)
class PrivacyBudget:
    """At most `epsilon` at `delta`, over everything the data is ever used for."""

    epsilon: float
    delta: float
    unit: str | None = None  # the finest unit that a release may protect; None: any

    def __post_init__(self) -> None:
        for name, value in (("epsilon", self.epsilon), ("delta", self.delta)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise PrivacyError(f"A budget's {name} must be a finite number, not {value!r}.")
        if self.epsilon <= 0.0:
            raise PrivacyError(f"A budget's epsilon must be above 0, not {self.epsilon}.")
        if not 0.0 < self.delta < 1.0:
            raise PrivacyError(f"A budget's delta must lie strictly between 0 and 1, not {self.delta}.")
        if self.unit is not None and self.unit not in UNITS:
            raise PrivacyError(f"A budget's unit must be one of {', '.join(UNITS)}, not {self.unit!r}.")

    def to_json(self) -> dict[str, Any]:
        """As it stands in the file."""
        values: dict[str, Any] = {"epsilon": self.epsilon, "delta": self.delta}
        return values if self.unit is None else {**values, "unit": self.unit}


@dataclass(frozen=True)
class Budgets:
    """Everything in one file."""

    default: PrivacyBudget | None
    datasets: dict[str, PrivacyBudget]

    def of(self, names: set[str]) -> list[PrivacyBudget]:
        """The budgets that data known under `names` must keep, all of them: each name's own, else the
        default. Data that was given a second name keeps the budget of its first."""
        found = {self.datasets.get(name, self.default) for name in names}
        return sorted((b for b in found if b is not None), key=lambda b: (b.epsilon, b.delta))


def budgets_of(said: Iterable[Mapping[str, Any]]) -> Budgets:
    """What the bodies of a ledger's budget rows, oldest first, add up to: each replaces the one before it."""
    found: dict[str | None, PrivacyBudget] = {
        one["dataset"]: PrivacyBudget(one["epsilon"], one["delta"], one.get("unit")) for one in said
    }
    return Budgets(found.pop(None, None), {name: one for name, one in found.items() if name is not None})


def read_budgets(path: Path, *, anew: bool = False) -> Budgets | None:
    """The budgets in `path`; None if there is no such file. Raises `LedgerError` if it cannot be trusted.

    `anew`: it is about to be replaced, so None, too, for content that is no budget.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unusable(path, str(error)) from error
    if mode & stat.S_IWOTH:
        raise LedgerError(
            f"The budget file {path} can be written by every user of this machine, so anybody could raise "
            f"it. No release is made. Run: chmod o-w {path}"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        if not isinstance(content, dict) or set(content) - {"version", "default", "datasets"}:
            raise ValueError("it must be an object with the keys version, default and datasets")
        if content.get("version") != _VERSION or isinstance(content["version"], bool):
            raise ValueError(f"its version is {content.get('version')!r}, not {_VERSION}")
        datasets = content.get("datasets", {})
        if not isinstance(datasets, dict):
            raise ValueError("`datasets` must be an object")
        default = content.get("default")
        return Budgets(
            None if default is None else _budget(default),
            {name: _budget(value) for name, value in datasets.items()},
        )
    except (OSError, ValueError, TypeError, KeyError, PrivacyError) as error:
        if anew and not isinstance(error, OSError):
            return None
        raise _unusable(path, str(error)) from error


def budgets_in_force(path: Path, ledger: Path, *, said: Budgets | None, required: bool) -> Budgets:
    """The budgets in `path` that a release must keep. Raises `LedgerError` where there must be some.

    Args: `said`, what the ledger has heard of budgets, None if nothing; a file that differs was restored from
    an older backup, or edited. `required`, whether nothing may be released without one (a real node).
    """
    found = read_budgets(path)
    if found is not None and said is not None and found != said:
        raise LedgerError(
            f"The budget file {path} does not say what was set last, as the privacy ledger {ledger} has it: "
            "it was restored from an older backup, or edited. No release is made. Set the budget anew: "
            "fedtune budget set --epsilon E --delta D; at a site, start the node again, which sets what "
            "node.yaml names."
        )
    if found is None and said is not None:
        raise LedgerError(
            f"The budget file {path} is missing, but a budget was set before. No release is made without it. "
            "Restore the file, or set a budget anew: fedtune budget set --epsilon E --delta D; at a site, "
            "start the node again, which sets what node.yaml names."
        )
    if found is None and required:
        raise LedgerError(
            f"There is no budget file {path}, and this node releases nothing before its owner has said what "
            "may be spent. Run: fedtune budget set --epsilon E --delta D; at a site, start the node, which "
            "sets what node.yaml names."
        )
    if required and said is None:
        raise LedgerError(
            f"There is a budget file {path}, but the privacy ledger {ledger} never heard of a budget: it is "
            "gone, or another. No release is made, for what was spent before would be forgotten. Restore the "
            "ledger from a backup; at a site, `fedtune node proof --config node.yaml` shows what is there."
        )
    return found or Budgets(None, {})


def strictest(one: Budgets, other: Budgets) -> Budgets:
    """Budgets that keep both: for each name the smaller epsilon, the smaller delta and the coarser unit."""

    def both(name: str | None) -> PrivacyBudget | None:
        found = [b.datasets.get(name, b.default) if name is not None else b.default for b in (one, other)]
        kept = [budget for budget in found if budget is not None]
        if not kept:
            return None
        units = [budget.unit for budget in kept if budget.unit is not None]
        return PrivacyBudget(
            min(budget.epsilon for budget in kept),
            min(budget.delta for budget in kept),
            max(units, key=UNITS.index) if units else None,
        )

    names = sorted({*one.datasets, *other.datasets})
    return Budgets(both(None), {name: budget for name in names if (budget := both(name)) is not None})


def write_budgets(path: Path, budgets: Budgets) -> None:
    """Replaces the file in one step, readable and writable by its owner only."""
    content = {
        "version": _VERSION,
        "default": None if budgets.default is None else budgets.default.to_json(),
        "datasets": {name: budget.to_json() for name, budget in sorted(budgets.datasets.items())},
    }
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_whole(path, (json.dumps(content, indent=2) + "\n").encode(), mode=0o600)
    except OSError as error:
        raise LedgerError(
            f"The budget file {path} cannot be written: {error}. The old budget stands."
        ) from error


def _budget(value: Any) -> PrivacyBudget:
    if not isinstance(value, dict) or set(value) - {"epsilon", "delta", "unit"}:
        raise ValueError(f"a budget is an object with epsilon, delta and perhaps unit, not {value!r}")
    return PrivacyBudget(value["epsilon"], value["delta"], value.get("unit"))


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _unusable(path: Path, why: str) -> LedgerError:
    return LedgerError(
        f"The budget file {path} cannot be used ({why}). No release is made. Write it anew with "
        "`fedtune budget set`; at a site, start the node again, which writes what node.yaml names."
    )
