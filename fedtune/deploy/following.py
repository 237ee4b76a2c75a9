"""`fedtune follow DIR RUN`: a run as its server knows it, from any machine, by an operator who may read.

Whoever submits a run reports its rounds to the server, and the statement at the end
(`fedtune.deploy.progress`). Here they are asked for and shown as they come, until the run has ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from fedtune.deploy.client import Server
from fedtune.deploy.progress import checked_round
from fedtune.deploy.runs import RUN_HEADER
from fedtune.deploy.server import AFTER_HEADER, FOLLOW_PATH
from fedtune.errors import FederationError, ResourceError
from fedtune.privacy.publication import one_line

__all__ = ["follow_run"]

_ASK_SECONDS = 2.0
_LAST_SECONDS = 6.0  # for the statement, which comes after the last round


def follow_run(
    server: Server, run: str, show: Callable[[str], None], pause: Callable[[float], None] = time.sleep
) -> bool:
    """Shows the rounds of a run that the server knows, and those that come, until the run ends.

    Args:
        server: as an operator with the right to read.
        run: the server's number of the run.
        show: is given a line.
        pause: waits so many seconds.

    Returns:
        Whether it was completed.

    Raises:
        ConfigError: the server knows no such run.
        FederationError: it refuses the request, or answers in another way than fedtune's.
    """
    after, away, last = 0, False, _LAST_SECONDS
    while True:
        try:
            found = server.ask(FOLLOW_PATH, headers={RUN_HEADER: run, AFTER_HEADER: str(after)})
        except ResourceError as error:
            if not away:
                show(f"{error} Asking again until it does.")
            away = True
            pause(_ASK_SECONDS)
            continue
        away = False
        try:
            rounds, ended = [checked_round(one) for one in found["rounds"]], found["ended"] is True
            asked = ("state", "by", "statement")
            state, by, statement = (str(found[name] or "") for name in asked)
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise FederationError(
                f"The server {server.address} tells of run {run} in a way that this fedtune does not know "
                f"({type(error).__name__}); is it of the same version?"
            ) from error
        for summary in rounds:
            show(_line(summary))
            after = max(after, summary["round"])
        if ended and (statement or last <= 0):
            if statement:
                show("\n".join(one_line(line, keep_blanks=True) for line in statement.splitlines()))
            show(one_line(f"run {run}{f' of {by}' if by else ''}: {state}"))
            return state == "completed"
        last -= _ASK_SECONDS if ended else 0.0
        pause(_ASK_SECONDS)


def _line(summary: Mapping[str, Any]) -> str:
    """A round in words; its epsilon is in the statement, with delta, unit and adjacency."""
    parts = [f"round {summary['round']}/{summary['num_rounds']}:"]
    if summary["accuracy"] is not None:
        error = summary["accuracy_error"]
        about = "" if error is None else f" (standard error {error:.3f})"
        parts.append(f"accuracy {summary['accuracy']:.3f}{about}")
    if summary["loss"] is not None:
        parts.append(f"loss {summary['loss']:.3f}")
    parts.append(f"{int(summary['updates'] or 0)} updates")
    if summary["void"]:
        parts.append("no step was taken")
    parts += [f"{node}: {reason}" for node, reason in summary["dropped"]]
    return one_line("  ".join(parts), keep_blanks=True)
