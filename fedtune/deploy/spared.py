"""What a node's frequent calls do not ask Flower's database: each is made a dozen times for a message.

Nothing here takes anything from Flower; `fedtune.deploy.flower` hands in its LinkState and its functions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

__all__ = ["NodesByKey", "RunsThatGoOn", "at_most_each", "spare_database"]

_LOOK, _LOOK_SECONDS = "_cleanup_expired_task_tokens", 1.0
_RUN_SECONDS = 0.5  # for so long a run that was stopped may still be served


def spare_database(state: Any) -> None:
    """Leaves out of Flower's LinkState what a frequent call would read or write there without need."""
    # It looks for tasks that have ended without a word whenever it is asked for anything.
    setattr(state, _LOOK, at_most_each(_LOOK_SECONDS, getattr(state, _LOOK)))
    # It adds up each call's bytes and each task's seconds, a write a call; nothing here reads these sums.
    state.store_traffic = state.add_clientapp_runtime = lambda *_, **__: None
    nodes = NodesByKey(state.get_node_id_by_public_key, state.delete_node)
    state.get_node_id_by_public_key, state.delete_node = nodes.number, nodes.delete


class NodesByKey:
    """The numbers of nodes by public key, asked of Flower's LinkState once: only a deletion changes one."""

    def __init__(self, ask: Callable[[bytes], int | None], delete: Callable[..., None]) -> None:
        self._ask, self._delete = ask, delete
        self._known: dict[bytes, int] = {}

    def number(self, key: bytes) -> int | None:
        """As `LinkState.get_node_id_by_public_key`."""
        known = self._known  # if a node is deleted meanwhile, the answer is kept where nobody looks
        if key not in known:
            number = self._ask(key)
            if number is None:
                return None
            known[key] = number
        return known[key]

    def delete(self, *named: Any) -> None:
        """As `LinkState.delete_node`."""
        try:
            self._delete(*named)
        finally:
            self._known = {}


class RunsThatGoOn:
    """Flower's `check_abort`, asked for a run at most twice a second while it has nothing against it."""

    def __init__(self, check_abort: Callable[[int, list[str], Any], str | None]) -> None:
        self._check_abort = check_abort
        self._until: dict[int, float] = {}

    def __call__(self, run_id: int, states: list[str], state: Any) -> str | None:
        """Why a node's call is refused, or None; nodes are refused in the same `states` of a run always."""
        if time.monotonic() < self._until.get(run_id, 0.0):
            return None
        reason = self._check_abort(run_id, states, state)
        if reason is None:
            now = time.monotonic()
            going_on = {run: until for run, until in self._until.items() if until > now}
            self._until = {**going_on, run_id: now + _RUN_SECONDS}
        return reason


def at_most_each(seconds: float, call: Callable[[], None]) -> Callable[[], None]:
    """`call`, made once in so many seconds however often it is asked for; the first time at once."""
    due = 0.0

    def called() -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + seconds
            call()

    return called
