"""How runs go on, told to the server by whoever submits them: for its page, its metrics, and who follows.

The server relays messages and reads none, so it knows neither rounds nor accuracies. The process that submits
a run reports each round when it is done, and the statement at the end, over the operators' interface; what
it sends has passed the door of `fedtune.privacy.publication` as for private data, so that no measured time is
in it. The server keeps it in `progress/RUN.json` of its folder, of the newest runs. A report that does not
arrive goes with the next one, and none holds up or ends a run.
"""

from __future__ import annotations

import json
import logging
import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.config.files import replace_whole
from fedtune.federation.events import NullObserver
from fedtune.privacy.publication import publish

if TYPE_CHECKING:
    from fedtune.federation.events import FederationResult, RoundSummary

__all__ = ["MAX_REPORT", "PATH", "Progress", "Reporter", "checked_round", "report_of_rounds"]

PATH = "/v1/fedtune/progress"
MAX_REPORT = 2**20  # bytes
_KEPT = 200  # runs
_ROUNDS = 100_000  # of a run
_AT_ONCE = 200  # rounds in a report
_MOST_KEPT = 2**23  # bytes of a run
_RUN = re.compile(r"[0-9]{1,20}")
_NUMBERS = ("accuracy", "accuracy_error", "loss", "epsilon", "bytes_up", "bytes_down", "updates")
_log = logging.getLogger("fedtune.server")


class Progress:
    """What was reported of runs, in a folder of the server's.

    Args:
        folder: where it is kept.
        started_by: the operator who started a run that goes on (`?`: nobody knows); None for other runs.

    Attributes:
        rounds: how many rounds were reported since the server started, by `complete` or `void`.
        updates: how many updates, by `used` or `lost`.
    """

    def __init__(self, folder: Path, started_by: Callable[[int], str | None] = lambda _: "?") -> None:
        self._folder, self._started_by, self._lock = folder, started_by, threading.Lock()
        self.rounds: Counter[str] = Counter()
        self.updates: Counter[str] = Counter()

    def of(self, run: str) -> dict[str, Any]:
        """What is known of a run: its number, its `rounds` in order, its `statement`. Else empty."""
        if not _RUN.fullmatch(run):
            return {}
        try:
            kept = json.loads((self._folder / f"{run}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return kept if isinstance(kept, dict) and isinstance(kept.get("rounds"), list) else {}

    def note(self, body: bytes, by: str = "") -> tuple[int, dict[str, Any]]:
        """Keeps a report of the operator `by`, of a run of theirs. Returns (HTTP status, answer)."""
        try:
            report = _checked(json.loads(body))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            return 422, {"error": f"This is no report of a run ({type(error).__name__})."}
        with self._lock:
            run, owner = report["run"], self._started_by(int(report["run"]))
            kept = self.of(run) or {"run": run, "by": owner, "rounds": [], "statement": ""}
            if kept["by"] is None:
                return 404, {"error": f"No run {run} goes on here."}
            if kept["by"] not in (by, "?"):
                return 403, {"error": "Another operator started this run, and reports it."}
            kept["by"] = by  # of a run that nobody is known to have started: whoever reports it first
            before = {entry["round"]: entry for entry in kept["rounds"]}
            rounds = before | {entry["round"]: entry for entry in report["rounds"]}
            kept["rounds"] = [rounds[number] for number in sorted(rounds)]
            kept["statement"] = report["statement"] or kept["statement"]
            if len(content := json.dumps(kept).encode()) > _MOST_KEPT:
                return 413, {"error": f"What is kept of a run may have {_MOST_KEPT} bytes."}
            try:
                self._folder.mkdir(mode=0o700, exist_ok=True)
                replace_whole(self._folder / f"{run}.json", content, mode=0o600)
                self._forget_old()
            except OSError as error:
                _log.warning("a report of run %s cannot be kept: %s", run, error.strerror)
                return 503, {"error": "The server cannot keep this report now."}
            for entry in (rounds[number] for number in rounds.keys() - before.keys()):
                self.rounds["void" if entry["void"] else "complete"] += 1
                self.updates["used"] += int(entry["updates"] or 0)
                self.updates["lost"] += len(entry["dropped"])
        return 200, {}

    def _forget_old(self) -> None:
        files = sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
        for path in files[:-_KEPT]:
            path.unlink(missing_ok=True)


def _checked(values: Any) -> dict[str, Any]:
    """A report with the fields that it may have, each of its own kind. Raises ValueError and the like."""
    if not (isinstance(values, dict) and isinstance(values["run"], str) and _RUN.fullmatch(values["run"])):
        raise ValueError("no run")
    rounds = values.get("rounds", [])
    if not isinstance(rounds, list):
        raise ValueError("no rounds")
    statement = values.get("statement", "")
    if not isinstance(statement, str):
        raise ValueError("no statement")
    return {"run": values["run"], "rounds": list(map(checked_round, rounds)), "statement": statement}


def checked_round(values: Any) -> dict[str, Any]:
    """A round with the fields that it may have, each of its own kind. Raises ValueError and the like."""
    if not isinstance(values, dict):
        raise ValueError("no round")
    numbers = {name: values.get(name) for name in _NUMBERS}
    for value in numbers.values():
        if value is not None and not (type(value) in (int, float) and math.isfinite(value) and value >= 0):
            raise ValueError("no number")
    number, num_rounds = values["round"], values["num_rounds"]
    if not all(type(one) is int and 0 < one <= _ROUNDS for one in (number, num_rounds)):
        raise ValueError("no round")
    dropped = [[str(node)[:100], str(reason)[:1000]] for node, reason in values["dropped"]]
    about = {"round": number, "num_rounds": num_rounds, "void": values["void"] is True}
    return {**about, "dropped": dropped, **numbers}


# --- at whoever submits the run -----------------------------------------------------------------------


def report_of_rounds(run: str, rounds: Sequence[RoundSummary]) -> dict[str, Any]:
    """What may be told of rounds: no measured time, whatever the submitter says of its data."""
    told = [publish("round", summary.to_json(), public_data=False)[0] for summary in rounds]
    return {"run": run, "rounds": told}


class Reporter(NullObserver):
    """Reports each round of a run that this process submitted.

    Args:
        run: the server's number of the run.
        send: sends a report to the server; True if it arrived.
    """

    def __init__(self, run: str, send: Callable[[Mapping[str, Any]], bool]) -> None:
        self._run, self._send = run, send
        self._waiting: list[RoundSummary] = []

    def on_round(self, summary: RoundSummary) -> None:
        """Reports it, with those before it that did not arrive."""
        self._waiting.append(summary)
        if self._send(report_of_rounds(self._run, self._waiting)):
            self._waiting = []

    def on_finish(self, result: FederationResult) -> None:
        """Reports all rounds, those before a resume too."""
        for first in range(0, len(result.history), _AT_ONCE):
            self._send(report_of_rounds(self._run, result.history[first : first + _AT_ONCE]))
