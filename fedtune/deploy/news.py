"""A node's question for messages waits at the server until there may be one (long polling).

Fifty nodes that ask once a second and are told "nothing" take half of a processor, and each message waits for
the next question.
"""

from __future__ import annotations

import asyncio
import time

__all__ = ["HOLD_SECONDS", "QUESTION", "News"]

QUESTION = "/v1/fleet/pull-messages"  # as Flower's nodes ask it

HOLD_SECONDS = 3.0  # a node that is told to leave waits 5 s for the answer to its question
_QUIET, _LATEST = 0.1, 1.0  # a message's objects follow it, and a node would ask for what is not there yet


class News:
    """Whether something came for nodes since one of them was told that there is nothing.

    Lives on one event loop.
    """

    def __init__(self) -> None:
        self._count, self._last = 0, 0.0
        self._come = asyncio.Event()
        self._knows: dict[bytes, int] = {}  # by node: how much had come when it was told "nothing"

    def came(self) -> None:
        """Something was sent to some node."""
        self._count, self._last = self._count + 1, time.monotonic()
        self._come.set()
        self._come = asyncio.Event()

    async def wait(self, node: bytes, gone: asyncio.Future[object]) -> int:
        """Returns once there may be a message for a node, after `HOLD_SECONDS`, or when it is gone.

        Returns:
            What to `note` if it is then told that there is nothing.
        """
        if self._knows.pop(node, None) == self._count:
            come = asyncio.ensure_future(self._come.wait())
            try:
                await asyncio.wait((come, gone), timeout=HOLD_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            finally:
                come.cancel()
            end = time.monotonic() + _LATEST
            while not gone.done() and time.monotonic() < min(end, self._last + _QUIET):
                await asyncio.sleep(_QUIET / 2)
        return self._count

    def note(self, node: bytes, count: int) -> None:
        """A node was told that there is nothing, when so much had come."""
        self._knows[node] = count
