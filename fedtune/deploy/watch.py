"""Whether a site's worker hangs.

A worker that is late is not always one that hangs: the first round of a large site computes the frozen layers
of all its texts, and what it has done so far helps the next round although nobody waits for its answer. So
two limits: past the time that the server waits, a worker that does nothing is given up (a deadlock, a disk
that does not answer); and past its owner's own limit (`limits.message_seconds`) any worker is.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil

__all__ = ["Watch", "processor_seconds"]

_IDLE_SECONDS = 30.0  # without work, past the time that anybody waits
_WORK = 0.01  # processor seconds a second, below which a process does nothing


def processor_seconds(pid: int) -> float | None:
    """Processor time that a process has used, all its threads together; None where that cannot be known."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return None
    return float(times.user + times.system)


class Watch:
    """One message's watch over the worker that answers it.

    Args:
        awaited: seconds for which the server waits for the answer.
        limit: seconds after which the worker is given up whatever it does.
        used: processor seconds that the worker has used so far, None if not known.
    """

    def __init__(
        self,
        awaited: float,
        limit: float,
        used: Callable[[], float | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._awaited, self._limit, self._used, self._clock = min(awaited, limit), limit, used, clock
        self._begun = self._since = clock()
        self._before = used()

    def hangs(self) -> str:
        """Why the worker is to be given up, empty while it is not. To be asked every few seconds."""
        now, used = self._clock(), self._used()
        if now - self._begun > self._limit:
            return f"it had not answered after {self._limit:g} s (limits.message_seconds)"
        if used is None or self._before is None:
            return ""
        if used - self._before > _WORK * (now - self._since):
            self._before, self._since = used, now
        if now - self._begun > self._awaited and now - self._since > _IDLE_SECONDS:
            return (
                f"it had not answered after {now - self._begun:.0f} s, of which it did nothing for the last "
                f"{now - self._since:.0f}"
            )
        return ""
