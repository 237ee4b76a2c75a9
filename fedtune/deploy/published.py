"""What a site publishes of its budget, if its owner wants it: how much epsilon is left, with delta and unit.

By default nothing. With `publish_budget: true` in its node.yaml a node tells the server when it joins and
within a minute of each release, in a request signed by its key (`join`), and its audit log says so before.
The server keeps what it was told last (`published.json`) and shows it to whoever has the operator's token:
`fedtune status`.
"""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

from fedtune.config.files import replace_whole
from fedtune.config.schema import UNITS
from fedtune.deploy.site import open_ledger
from fedtune.federation.client.policy import SiteSettings

__all__ = ["Board", "checked", "of_site", "shown"]

_KEYS = ("epsilon_left", "epsilon", "delta", "unit")
_UNITS = (*UNITS, "any")


def of_site(site: SiteSettings) -> dict[str, Any] | None:
    """What this site publishes now; None if its owner did not ask for it. Raises LedgerError.

    `epsilon_left` is what no release has spent, of whichever state of its data has spent most, rounded down.
    """
    if not site.publish_budget:
        return None
    ledger, budget = open_ledger(site), site.budget
    releases = [one for one in ledger.releases() if not one.public]
    used = {(one.dataset, one.fingerprint) for one in releases}
    spent = max(
        (ledger.epsilon(dataset=name, fingerprint=mark, delta=budget.delta) for name, mark in used),
        default=0.0,
    )
    return {
        "epsilon_left": math.floor(max(0.0, budget.epsilon - spent) * 1e4) / 1e4,
        "epsilon": budget.epsilon,
        "delta": budget.delta,
        "unit": budget.unit or "any",
    }


def checked(values: Any) -> dict[str, Any] | None:
    """`values` if a site may have published them; None for anything else."""
    if not isinstance(values, dict) or set(values) != set(_KEYS) or values["unit"] not in _UNITS:
        return None
    numbers = [values[name] for name in _KEYS[:3]]
    right = all(type(one) in (int, float) and math.isfinite(one) and one >= 0 for one in numbers)
    return values if right else None


def shown(values: dict[str, Any] | None) -> str:
    """For a person."""
    if values is None:
        return "budget not published"
    unit = "" if values["unit"] == "any" else f", unit {values['unit']}"
    return (
        f"epsilon {values['epsilon_left']:g} of {values['epsilon']:g} left at delta {values['delta']:g}{unit}"
    )


class Board:
    """What the sites published last, by name; in a file of the server's, so that it outlives it."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()

    def all(self) -> dict[str, Any]:
        """By site; nothing where the file is missing or cannot be read."""
        try:
            found = json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def note(self, site: str, values: dict[str, Any] | None) -> None:
        """Keeps what a site published; None takes it down."""
        with self._lock:
            kept = self.all()
            if kept.get(site) == values:
                return
            kept[site] = values
            content = json.dumps({name: one for name, one in kept.items() if one is not None})
            replace_whole(self._path, content.encode(), mode=0o600)
