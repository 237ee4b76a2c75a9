"""How far a sweep is: what its finished runs took, the best of them, and what the rest should take.

Read from the records in the sweep's folder and not from memory, so that it is right in every process that
makes runs of the sweep. Before the first run it is what this machine knows of such runs
(`fedtune.runs.history`); where it knows nothing, it says so.
"""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.errors import RecordError
from fedtune.privacy.statement.words import few, left_out
from fedtune.report.collect import FAILURE_NAME, configuration_key
from fedtune.report.difference import paired
from fedtune.report.words import format_money, format_number, format_percent
from fedtune.runs import record
from fedtune.runs.history import RunEstimate, again
from fedtune.runs.summary import duration

__all__ = ["SweepProgress"]

_SEED = re.compile(r"(?:^|,)seed=\d+(?=,|$)")


@dataclass
class SweepProgress:
    """A sweep of `total` runs in `folder`, `workers` of them side by side.

    Attributes:
        names: what sets a run apart from the others, by its number.
        one_run: a single run is to be chosen, and not a configuration over its seeds (private selection).
        best: accuracy and name of the best finished configuration, compared over the seeds that both have.
        partial: who took no part, by the number of the finished run.
    """

    folder: Path
    total: int
    names: dict[int, str]
    workers: int = 1
    one_run: bool = False
    outside: list[float] = field(default_factory=list)  # wall seconds of each run, but for its rounds
    in_rounds: list[float] = field(default_factory=list)
    amounts: list[tuple[float, str]] = field(default_factory=list)
    best: tuple[float, str] | None = None
    partial: dict[int, tuple[str, ...]] = field(default_factory=dict)
    failures: int = 0
    begun: float = field(default_factory=time.time)
    _seen: set[str] = field(default_factory=set)
    _rated: dict[str, dict[int, float]] = field(default_factory=dict)  # accuracy by configuration and seed
    _named: dict[str, str] = field(default_factory=dict)
    _hidden: set[str] = field(default_factory=set)  # configurations of which a run has no accuracy
    _leader: str | None = None

    def refresh(self) -> None:
        """Reads what has finished, or failed, since the last time."""
        try:
            entries = [entry for entry in os.scandir(self.folder) if entry.name.isdecimal()]
        except OSError:
            return
        failures = 0
        for entry in entries:
            if entry.name in self._seen:
                continue
            folder = Path(entry.path)
            if (folder / record.RECORD_NAME).exists():
                try:
                    self._add(int(entry.name), record.whole(folder))
                    self._seen.add(entry.name)
                except RecordError:
                    continue
            else:
                failures += _newer(folder / FAILURE_NAME, self.begun)
        self.failures = failures

    @property
    def finished(self) -> int:
        """Runs with a record."""
        return len(self._seen)

    def is_finished(self, position: int) -> bool:
        """Whether the run at `position` has a record."""
        return str(position) in self._seen

    @property
    def left(self) -> int:
        """Runs that neither finished nor failed."""
        return max(0, self.total - self.finished - self.failures)

    def name(self, position: int | None) -> str:
        """What sets the run apart; empty if nothing does."""
        return "" if position is None else self.names.get(position, "")

    def partial_runs(self) -> dict[int, tuple[str, ...]]:
        """Of all finished runs, those that went on without a site: who took no part, by number."""
        self.refresh()  # other processes may have made runs since the last line
        return dict(sorted(self.partial.items()))

    def rest(self) -> str:
        """What the runs that are left should take, going by those that finished."""
        if not self.outside:
            return "time unknown"
        seconds = self.left * again(self.outside, self.in_rounds, self.workers)
        text = f"about {duration(self._wall(seconds))}"
        currencies = {currency for _, currency in self.amounts}
        if len(currencies) == 1:
            mean = statistics.fmean(amount for amount, _ in self.amounts)
            text += f" and {format_money(self.left * mean, currencies.pop())}"
        return text

    def opening(self, expected: Sequence[RunEstimate | None]) -> str:
        """What is to come, by what finished runs in the folder took, or by `expected`, one for each run."""
        if self.finished:
            return f"{self.finished} finished before, {self.left} to go: {self.rest()}"
        known = [estimate for estimate in expected if estimate is not None]
        if not known:
            return "how long they take is known after the first: this machine has made none of their kind"
        # What is prepared once for all runs of a kind is counted once.
        once = {estimate.kind: estimate.seconds - estimate.again for estimate in known}
        seconds = sum(once.values()) + self._wall(sum(estimate.again for estimate in known))
        text = f"about {duration(seconds)}"
        amounts = [e.money for e in known if e.money is not None and e.money.total is not None]
        if len(amounts) == len(known) and len({money.currency for money in amounts}) == 1:
            text += f" and {format_money(sum(money.total or 0.0 for money in amounts), amounts[0].currency)}"
        if len(known) < len(expected):
            text += f" for {len(known)} of them, and no estimate for those of a kind that is new here"
        return f"{text}, going by runs of the same kind on this machine"

    def line(self, place: str, name: str, made: dict[str, Any], before: bool) -> str:
        """One finished run, and where the sweep stands."""
        privacy, accuracy, money = made["privacy"], made["metrics"]["accuracy"], made["cost"]["money"]
        hidden = (made["metrics"].get("evaluation") or {}).get("data") == "private"
        unknown = "accuracy hidden by the noise" if hidden else "accuracy unknown"
        parts = [unknown if accuracy is None else f"accuracy {format_percent(accuracy)}"]
        if made["run"].get("status") == "pruned":
            rounds, asked = made["federation"]["rounds"], made["config"]["federation"]["num_rounds"]
            parts.insert(0, f"ended early after {rounds} of {asked} rounds")
        if privacy["epsilon"] is None:
            parts.append("no privacy")
        else:
            parts.append(
                f"epsilon {format_number(privacy['epsilon'])} "
                f"(delta {privacy['delta']:.1e}, {privacy['adjacency']})"
            )
        if (seconds := made["run"]["seconds"]) is not None:
            parts.append(duration(seconds))
        if money is not None and money["total"] is not None:
            parts.append(format_money(money["total"], money["currency"]))
        if absent := left_out(made):
            parts.append(f"without {few(absent)}, which took no part")
        text = f"run {place} ({name}): {', '.join(parts)}"
        if before:
            text += "; finished before"
        if self.best is not None:
            text += f"; best so far {format_percent(self.best[0])} ({self.best[1]})"
            if self.left == 0:
                text += self._distance()
        return f"{text}; left: {self.rest()}" if self.left > 0 and not before else text

    def _wall(self, seconds: float) -> float:
        return seconds / max(1, min(self.workers, self.left or 1))

    def _add(self, position: int, made: dict[str, Any]) -> None:
        rounds = [one["seconds"] for one in made["metrics"]["by_round"]]
        if (seconds := made["run"]["seconds"]) is not None and None not in rounds:
            self.in_rounds.append(float(sum(rounds)))
            self.outside.append(max(0.0, float(seconds) - self.in_rounds[-1]))
        money = made["cost"]["money"]
        if money is not None and money["total"] is not None:
            self.amounts.append((float(money["total"]), str(money["currency"])))
        if absent := left_out(made):
            self.partial[position] = tuple(absent)
        accuracy = made["metrics"]["accuracy"]
        if made["run"].get("status") == "pruned":
            return
        key = str(position) if self.one_run else configuration_key(made["config"])
        if accuracy is None:
            self._drop(key)
        if key in self._hidden:
            return
        self._named.setdefault(key, _SEED.sub("", self.name(position)).strip(",") or "defaults")
        mine = self._rated.setdefault(key, {})
        mine[int(made["run"]["seed"])] = float(accuracy)
        self._lead(key)

    def _drop(self, key: str) -> None:
        """Rates `key` no more: what is low is hidden, so that the mean of the others is too high."""
        self._hidden.add(key)
        self._rated.pop(key, None)
        if self._leader == key:
            self._leader = self.best = None
            for other in self._rated:
                self._lead(other)

    def _lead(self, key: str) -> None:
        """Compares the configuration `key`, of which a run has just finished, with the best one so far."""
        ahead = {key: 0.0}
        for other in self._rated if self._leader == key else filter(None, [self._leader]):
            ahead[other] = paired(self._rated[other], self._rated[key]).mean
        self._leader = max(ahead, key=ahead.__getitem__)
        accuracies = self._rated[self._leader].values()
        over = f", mean of {len(accuracies)} seeds" if len(accuracies) > 1 else ""
        self.best = (statistics.fmean(accuracies), f"{self._named[self._leader]}{over}")

    def _distance(self) -> str:
        """By how much the best configuration is ahead of the one that comes nearest, seed by seed."""
        if self._leader is None or len(self._rated) < 2:
            return ""
        mine = self._rated[self._leader]
        ahead = {key: paired(mine, rated) for key, rated in self._rated.items() if key != self._leader}
        nearest = min(ahead, key=lambda key: ahead[key].mean)
        found = ahead[nearest]
        over = f" over {found.seeds} common seeds" if found.seeds > 1 else ""
        return f", {found.points()} above {self._named[nearest]}{over}"


def _newer(path: Path, than: float) -> bool:
    try:
        return path.stat().st_mtime >= than
    except OSError:
        return False
