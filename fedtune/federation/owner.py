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

from fedtune.federation.server.checkpoint import write_durably

__all__ = ["LOCAL_NAME", "collect_reasons", "in_full", "keep", "note_reason", "read", "reasons"]

LOCAL_NAME = "local.json"
_LOG_NAME = "local.log"
_NOTE = "For the owner of the data: these values depend on private records and are in no guarantee."


def read(run_dir: Path) -> dict[str, Any]:
    """What the run folder keeps for the owner; empty where there is nothing, or nothing readable."""
    try:
        found = json.loads((run_dir / LOCAL_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def keep(run_dir: Path, **sections: Any) -> None:
    """Puts `sections` in the place of what there was under their names, whole or not at all.

    Raises: ResourceError.
    """
    before = read(run_dir)
    values = {**before, **sections}
    if values == before or (not any(sections.values()) and not before):
        return
    values = {"schema": 1, "note": _NOTE, **values}
    write_durably(run_dir / LOCAL_NAME, (json.dumps(values, indent=1) + "\n").encode(), mode=0o600)


def note_reason(run_dir: Path, node: str, round: int, told: str, reason: str) -> None:
    """Adds a node's reason, and what others were `told` of it, to the folder's log.

    Never raises, for the log of the process has it too.
    """
    line = json.dumps({"node": node, "round": round, "told": told, "reason": reason}) + "\n"
    with suppress(OSError):
        handle = os.open(run_dir / _LOG_NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)


def reasons(run_dir: Path) -> list[dict[str, Any]]:
    """All reasons that nodes have noted in this folder, oldest first."""
    kept = read(run_dir).get("reasons")
    found = list(kept) if isinstance(kept, list) else []
    with suppress(OSError):
        for line in (run_dir / _LOG_NAME).read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
    return found


def in_full(run_dir: Path, text: str, round: int | None = None) -> str:
    """`text` with the owner's own reasons in the place of what others were told, the last of `round`, or of
    all."""
    for one in reversed(reasons(run_dir)):
        said = str(one.get("told", ""))
        if said and said in text and (round is None or one.get("round") == round):
            text = text.replace(said, str(one.get("reason", said)))
    return text


def collect_reasons(run_dir: Path) -> list[dict[str, Any]]:
    """Moves the folder's log into `local.json`, and returns all reasons. Raises: ResourceError."""
    found = reasons(run_dir)
    keep(run_dir, reasons=found)
    (run_dir / _LOG_NAME).unlink(missing_ok=True)
    return found
