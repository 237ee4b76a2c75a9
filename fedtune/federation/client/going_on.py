"""The runs that go on at a site, whose plans a run that is new must leave room for.

Several runs may go on at once, and each was agreed to as a whole when the budget reached for it. Each release
by itself is held to the budget, so without this two runs that fit one by one would share out what is there,
and both would end in the middle: spent, and nothing gained (PITFALLS 40). So what is left of a run that has
begun counts where another is proposed, and again at the other's first release.

Kept by the process that answers, for real sites: a run that was ended early says so to nobody, and is
forgotten when it has been silent for long. Nothing is ever allowed for what is noted here, only refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fedtune.privacy.plan import ReleasePlan

__all__ = ["SILENT_SECONDS", "GoingOn", "going_on"]

SILENT_SECONDS = 600.0  # without a release of it, until a run counts as ended


class GoingOn:
    """The runs that have begun, by ledger, with when each was heard of last."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._runs: dict[tuple[Path, str], tuple[float, tuple[ReleasePlan, ...]]] = {}

    def heard(self, ledger: Path, run: str, plans: Sequence[ReleasePlan]) -> None:
        """A release of `run`, which may make all of `plans`, was charged."""
        self._runs[ledger, run] = (self._clock(), tuple(plans))

    def others(self, ledger: Path, run: str) -> dict[str, tuple[ReleasePlan, ...]]:
        """The plans of all runs but `run` that go on, by run."""
        oldest = self._clock() - SILENT_SECONDS
        self._runs = {key: entry for key, entry in self._runs.items() if entry[0] > oldest}
        return {name: plans for (at, name), (_, plans) in self._runs.items() if at == ledger and name != run}


going_on = GoingOn()
