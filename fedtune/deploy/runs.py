"""Whose turn it is to start a run at a server, and which run is to stop.

Several runs may go on at once: `max_runs` of them (federation file). Who comes later waits, and asks again
every few seconds. Of those who wait, the next is of the operator with the fewest runs that go on, and of
these whoever has waited longest; so one operator's fifty runs do not keep another's first out. One starts at
a time: Flower gives the task of a run to whichever ServerApp asks first, so that two that start at the same
moment would take one another's. A site answers one message at a time, whoever's run it is of, so its memory
does not grow with the runs.

`runs.json` keeps, over a restart of the server, who started each run that goes on and whether it is to stop.
A run whose task nobody has taken after `_START_SECONDS` (its submit was killed) is stopped.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedtune.config.files import replace_whole
from fedtune.deploy.trail import Trail

__all__ = ["RUN_HEADER", "STOP_HEADER", "TICKET_HEADER", "Runs"]

TICKET_HEADER = "x-fedtune-ticket"
RUN_HEADER = "x-fedtune-run"
STOP_HEADER = "x-fedtune-stop"
_log = logging.getLogger("fedtune.server")
_ASKED_SECONDS = 30.0  # who has not asked for so long does not wait any more
_START_SECONDS = 20.0  # to take the task of a run that was started
_MOST_WAITING = 20  # of one operator
_REMEMBERED = 200  # runs that were ended at once


class Runs:
    """The runs of a server: who waits, what goes on, what is to stop. Any thread may call it.

    Args:
        state: Flower's LinkState.
        folder: of the server.
        trail: is told what begins and ends.
        most: runs that go on at once.
    """

    def __init__(
        self,
        state: Any,
        folder: Path,
        trail: Trail,
        most: int = 2,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state, self._path, self._trail, self._most = state, folder / "runs.json", trail, most
        self._clock, self._lock = clock, threading.RLock()
        self._waiting: dict[str, tuple[str, float, float]] = {}  # ticket: operator, since, last asked
        self._starting: tuple[str, float, int | None] | None = None  # ticket, until when, its run
        self._pending_since: dict[int, float] = {}
        self._stopped: dict[str, str] = {}  # the last ones that were ended at once: run, by whom
        self._active: dict[int, dict[str, Any]] = self._read()
        self.update()

    # --- starting -----------------------------------------------------------------------------------

    def turn(self, ticket: str, operator: str) -> dict[str, Any] | None:
        """None if this ticket may start a run now; else what it waits for: `running`, `before`."""
        if len(self._active) >= self._most:
            self.update()  # one may have ended since the last look
        with self._lock:
            now = self._clock()
            self._waiting = {
                one: entry for one, entry in self._waiting.items() if now - entry[2] < _ASKED_SECONDS
            }
            if self._starting is not None and self._starting[1] < now:
                self._waiting.pop(self._starting[0], None)
            waiting = Counter(one for one, _, _ in self._waiting.values())
            if ticket not in self._waiting and waiting[operator] >= _MOST_WAITING:
                return {"running": len(self._active), "before": len(self._waiting)}
            since = self._waiting.get(ticket, (operator, now, now))[1]
            self._waiting[ticket] = (operator, since, now)
            going_on = Counter(str(entry["by"]) for entry in self._active.values())
            order = sorted(
                self._waiting, key=lambda one: (going_on[self._waiting[one][0]], self._waiting[one][1])
            )
            free = len(self._active) < self._most and self._is_free_for(ticket, now)
            if not free or order[0] != ticket:
                return {"running": len(self._active), "before": order.index(ticket)}
            if self._starting is None or self._starting[0] != ticket or self._starting[1] < now:
                self._starting = (ticket, now + _START_SECONDS, None)
            return None

    def started(self, ticket: str, operator: str, run: int) -> None:
        """A run was started with this ticket."""
        with self._lock:
            self._waiting.pop(ticket, None)
            self._starting = (ticket, self._clock() + _START_SECONDS, run)
            self._active[run] = {"by": operator, "stop": None}
            self._write()
        self._trail.note("run started", operator, run=str(run))

    def may_take(self, ticket: str) -> bool:
        """Whether the task of a run may be taken with this ticket now: nobody else is about to take one."""
        with self._lock:
            return self._starting is None or self._starting[0] == ticket

    def taken(self, run: int) -> None:
        """The task of a run was taken; if it is the one that starts, the next may."""
        with self._lock:
            if self._starting is not None and self._starting[2] == run:
                self._starting = None

    def _is_free_for(self, ticket: str, now: float) -> bool:
        return self._starting is None or self._starting[0] == ticket or self._starting[1] < now

    # --- stopping -----------------------------------------------------------------------------------

    def by(self, run: int) -> str | None:
        """Who started a run that goes on."""
        with self._lock:
            entry = self._active.get(run)
            return None if entry is None else str(entry["by"])

    def state(self, run: int) -> tuple[str, bool] | None:
        """(state, whether it has ended) of a run that Flower knows, else None."""
        try:
            found = self._state.get_run_info(run_ids=[run])
        except (OverflowError, ValueError):  # larger than any number that it gives
            return None
        if not found:
            return None
        status = found[0].status
        return str(status.sub_status or status.status), status.status == "finished"

    def stop(self, run: int, by: str, *, now: bool) -> bool:
        """Has a run end after the round that it is in, or now; False if it does not go on.

        What a round has charged that is ended now stays charged, and its result is lost.
        """
        with self._lock:
            if run not in self._active:
                return False
            self._active[run]["stop"] = by
            self._active[run]["now"] = now
            self._write()
            if now:
                self._stopped = {**dict(list(self._stopped.items())[-_REMEMBERED:]), str(run): by}
        if now:
            self._state.stop_run(run)
        self._trail.note("run stopped", by, "now" if now else "after its round", run=str(run))
        return True

    def listed(self) -> dict[str, Any]:
        """What goes on, for whoever may read it."""
        with self._lock:
            return {
                "runs": {str(run): dict(entry) for run, entry in self._active.items()},
                "waiting": [operator for operator, _, _ in self._waiting.values()],
                "most": self._most,
                "stopped": dict(self._stopped),
            }

    # --- what Flower knows --------------------------------------------------------------------------

    def update(self) -> None:
        """Notes runs that have ended, and ends those that nobody took."""
        unfinished = {
            int(run.run_id): str(run.status.status)
            for run in self._state.get_run_info(statuses=["pending", "starting", "running"])
        }
        now = self._clock()
        with self._lock:
            ended = {run: self._active.pop(run) for run in list(self._active) if run not in unfinished}
            for run in unfinished:
                self._active.setdefault(run, {"by": "?", "stop": None})
            if ended:
                self._write()
            pending = [run for run, status in unfinished.items() if status != "running"]
            self._pending_since = {run: self._pending_since.get(run, now) for run in pending}
            orphans = [run for run, since in self._pending_since.items() if now - since > _START_SECONDS]
        for run, entry in ended.items():
            how = self._state.get_run_info(run_ids=[run])
            result = (how[0].status.sub_status or how[0].status.status) if how else "forgotten"
            self._trail.note("run ended", str(entry["by"]), str(result), run=str(run))
        for run in orphans:
            self._state.stop_run(run)

    def keep_updated(self, ending: threading.Event, seconds: float = 2.0) -> None:
        """Calls `update` every two seconds until `ending` is set; what fails is tried again the next time."""
        while not ending.wait(seconds):
            try:
                self.update()
            except Exception as error:  # the database is busy, say
                _log.warning("the runs could not be looked at: %s", error)

    def _read(self) -> dict[int, dict[str, Any]]:
        try:
            found = json.loads(self._path.read_text())
            return {int(run): {"by": str(entry["by"]), **entry} for run, entry in found.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}  # who started what is then unknown; the runs go on

    def _write(self) -> None:
        try:
            replace_whole(self._path, json.dumps(self._active).encode(), mode=0o600)
        except OSError as error:
            _log.warning("%s cannot be written: %s", self._path, error)
