"""How many releases a run has made for each purpose, and whether one more is still the run that began.

A run is held to the plan of its first release: no more releases than it allows, none sooner, and each for
the unit of privacy and with the rate, noise and steps that it began with. Only so may a run be accounted as
one that was fixed in advance (`fedtune.privacy.accounting.filter`): the same noise for another unit is
another promise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from fedtune.errors import BudgetExhausted, PrivacyError
from fedtune.privacy.ledger.chain import Chain
from fedtune.privacy.ledger.state import RELEASED, Planned, charge_of, purpose_of
from fedtune.privacy.plan import PrivacyPlan, ReleasePlan

__all__ = ["RunCounts", "steps_of"]

_KEPT_RUNS = 1024  # of a node and purpose each, whose releases a process keeps count of
_WHAT = {"training": "releases", "evaluation": "answers about held-out data"}


@dataclass
class _Counted:
    """Releases that one node made in one run for one purpose, up to row `seq`."""

    seq: int = 0
    rounds: list[int] = field(default_factory=list)  # of each release
    agreed: float = math.inf  # the fewest that a plan allowed
    steps: Any = None  # what the first of them added to the account
    planned: tuple[Planned] | None = None  # the whole run's plan as its first release named it
    unit: str | None = None  # of privacy, of the node's first release in the run, for whatever purpose


class RunCounts:
    """Counts kept from one release to the next; rows that other processes wrote are read as they come."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._counted: dict[tuple[str, str, str], _Counted] = {}

    def made(
        self, connection: Any, plan: ReleasePlan, planned: tuple[Planned] | None, *, node: str, run: str,
        round: int,
    ) -> int:  # fmt: skip
        """Releases for the plan's purpose so far. `planned`: the whole run's plan, if it is known.

        Raises `BudgetExhausted`, `SeparationError` or `PrivacyError` if the run may not make one more.
        """
        counted = self._count(connection, plan.purpose, node, run)
        made, agreed = len(counted.rounds), min(counted.agreed, plan.num_rounds)
        if isinstance(plan, PrivacyPlan):
            plan.check_round(node, run, round, counted.rounds)
        if made >= agreed:
            what = _WHAT.get(plan.purpose, f"releases of a {plan.purpose}")
            raise BudgetExhausted(
                f"node '{node}' refuses round {round} of run '{run}': its plan allows {agreed:.0f} {what}, "
                f"and {made} were made (rounds that were repeated or interrupted count, because they may "
                "have been seen). Start a new run; its noise will be calibrated for its own number of "
                "rounds.",
                public=True,
            )
        if counted.unit not in (None, plan.unit):
            raise PrivacyError(
                f"node '{node}' refuses round {round} of run '{run}': it is asked for a release that "
                f"protects one {plan.unit} (privacy.unit), and the run began with releases that protect one "
                f"{counted.unit}. Start a new run."
            )
        other_steps = made > 0 and counted.steps != steps_of(plan, 0)
        if other_steps or (planned is not None and counted.planned not in (None, planned)):
            raise PrivacyError(
                f"node '{node}' refuses round {round} of run '{run}': it is asked for releases with another "
                "sampling rate, noise, number of steps or number of rounds than the run began with. A run is "
                "accounted by the plan of its first release; start a new run."
            )
        return made

    def _count(self, connection: Any, purpose: str, node: str, run: str) -> _Counted:
        # Only rows that this process has not counted yet: those before them are proven by the chain, whose
        # last known row is looked at before every reservation.
        key = (run, node, purpose)
        if key not in self._counted and len(self._counted) >= _KEPT_RUNS:
            self._counted.clear()
        counted = self._counted.setdefault(key, _Counted())
        for row in () if connection is None else self._chain.run_rows(connection, run, after=counted.seq):
            if row.kind in RELEASED:
                if row.body["node"] == node:
                    counted.unit = counted.unit or row.body["unit"]
                if row.body["node"] == node and "planned" in row.body:
                    counted.planned = (row.body["planned"],)
                if row.body["node"] == node and purpose_of(row) == purpose:
                    if not counted.rounds:
                        counted.steps = row.body["steps"]
                    counted.rounds.append(row.body["round"])
                    counted.agreed = min(counted.agreed, row.body["num_rounds"])
            counted.seq = row.seq
        return counted


def steps_of(plan: ReleasePlan, made: int) -> list[dict[str, Any]] | None:
    """What the release after `made` others of its run adds to the account."""
    terms = charge_of(plan, 1, made)
    if terms is None:
        return None
    return [
        {"sample_rate": term.sample_rate, "noise_multiplier": term.noise_multiplier, "count": count}
        for term, count in sorted(terms.items())
    ]
