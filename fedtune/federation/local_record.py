"""What a run keeps for the owner of its data alone: `local.json` in the run folder, readable by nobody else.

Measured time, usage of the machine, notes about records and the full text of errors depend on private records
and were not charged, so `fedtune.privacy.publication` holds them back from everything that is published;
the person at the keyboard may see them all the same. Simulated nodes, some of them in other processes, add
their reasons to `local.log` beside it, line by line; `collect_reasons` moves them.

    {"schema": 1, "note": ..., "record": {...}, "checkpoint": {...}, "reasons": [{node, round, told, reason}]}

`record` and `checkpoint` have the shape of what was published, with the local fields alone
(`publication.merge`). Both files are of mode 0600. Losing them costs their numbers and nothing else.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedtune.federation.run_folder import write_durably

__all__ = ["LOCAL_NAME", "collect_reasons", "log_reason", "read", "reasons", "restore_reasons", "update"]

LOCAL_NAME = "local.json"
_LOG_NAME = "local.log"
_NOTE = "For the owner of the data: these values depend on private records and are in no guarantee."


def read(run_dir: Path) -> dict[str, Any]:
    """What the run folder keeps for the owner; empty where there is nothing, or nothing readable."""
    try:
        values = json.loads((run_dir / LOCAL_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def update(run_dir: Path, **sections: Any) -> None:
    """Replaces `sections` of the file by name, whole or not at all.

    Raises:
        ResourceError: the file cannot be written.
    """
    before = read(run_dir)
    values = {**before, **sections}
    if values == before or (not any(sections.values()) and not before):
        return
    values = {"schema": 1, "note": _NOTE, **values}
    write_durably(run_dir / LOCAL_NAME, (json.dumps(values, indent=1) + "\n").encode(), mode=0o600)


def log_reason(run_dir: Path, node: str, round: int, published: str, reason: str) -> None:
    """Adds a node's reason, and what was `published` of it, to the folder's log.

    Never raises: the log of the process has the reason too.
    """
    line = json.dumps({"node": node, "round": round, "told": published, "reason": reason}) + "\n"
    with suppress(OSError):
        handle = os.open(run_dir / _LOG_NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)


def reasons(run_dir: Path) -> list[dict[str, Any]]:
    """All reasons that nodes have logged in this folder, oldest first."""
    collected = read(run_dir).get("reasons")
    entries = list(collected) if isinstance(collected, list) else []
    with suppress(OSError):
        for line in (run_dir / _LOG_NAME).read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                entries.append(json.loads(line))
    return entries


def restore_reasons(run_dir: Path, text: str, round: int | None = None) -> str:
    """`text` with the full reasons in place of what was published of them.

    Of several reasons with the same published text the last one counts, of `round` if that is given.
    """
    for entry in reversed(reasons(run_dir)):
        published = str(entry.get("told", ""))
        if published and published in text and (round is None or entry.get("round") == round):
            text = text.replace(published, str(entry.get("reason", published)))
    return text


def collect_reasons(run_dir: Path) -> list[dict[str, Any]]:
    """Moves the folder's log into `local.json`, and returns all reasons.

    Raises:
        ResourceError: the file cannot be written.
    """
    entries = reasons(run_dir)
    update(run_dir, reasons=entries)
    (run_dir / _LOG_NAME).unlink(missing_ok=True)
    return entries
