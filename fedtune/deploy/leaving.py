"""How a node leaves when it is told to (SIGTERM, Ctrl-C): what it has begun is finished, in a stated time.

- With no message to answer it leaves at once.
- A message that is being answered is finished and its answer sent: what was charged for it is not lost. After
  `limits.stop_seconds` the worker is stopped, the server is told so, and what was reserved stays charged.
- A message that came and was not begun is given back: nothing of it was touched, and nothing is charged.
- A second signal leaves at once, whatever goes on; when all is done, any signal does.

Then the answer has `SENDING_SECONDS` to arrive, so that a node is gone `limits.stop_seconds` and a minute
after the signal at the latest.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType

__all__ = ["SENDING_SECONDS", "Leaving"]

SENDING_SECONDS = 60.0
_ASKING_SECONDS = 5.0  # for a question to the server that is on its way
_SLICE = 0.25  # of a pause: a signal does not end `time.sleep`


class Leaving:
    """Whether this node was told to leave, and how long what it does may still take.

    Args:
        seconds: for the message that it answers (`limits.stop_seconds`).
        say: prints a line for the site's administrator.
    """

    def __init__(self, seconds: float, say: Callable[[str], None]) -> None:
        self._seconds, self._say = seconds, say
        self._at: float | None = None
        self._listening = False
        self.answering = False

    def listen(self) -> None:
        """From now on SIGTERM and Ctrl-C ask this node to leave; call it in the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGALRM, self._on_alarm)
        self._listening = True

    def all_is_done(self) -> None:
        """From now on a signal ends the process where it is: only Python's own end is left.

        It waits for threads then, and would show an exception that a signal raised in it.
        """
        if self._listening:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
                signal.signal(number, _end)

    @property
    def asked(self) -> bool:
        """It was told to leave."""
        return self._at is not None

    def overdue(self) -> str:
        """Why the worker should be stopped; empty if it should not."""
        if self._at is None or time.monotonic() - self._at <= self._seconds:
            return ""
        return f"the node was told to leave {self._seconds:g} s ago (limits.stop_seconds)"

    def leave_if_asked(self) -> None:
        """Raises SystemExit if it was told to leave; call it where nothing is begun."""
        if self.asked:
            raise SystemExit(0)

    def pause(self, seconds: float) -> None:
        """Waits, and leaves if it is told to meanwhile."""
        end = time.monotonic() + seconds
        self.leave_if_asked()
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(_SLICE, left))
            self.leave_if_asked()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise SystemExit(0)
        self._at = time.monotonic()
        if self.answering:
            self._say(
                f"told to leave: finishes the message that it answers, {self._seconds:g} s at most, and "
                f"sends the answer, {SENDING_SECONDS:g} s at most; a second signal ends it at once"
            )
            signal.setitimer(signal.ITIMER_REAL, self._seconds + SENDING_SECONDS)
        else:
            signal.setitimer(signal.ITIMER_REAL, _ASKING_SECONDS)

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:
        raise SystemExit(0)


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(0)
