"""What a running server knows of its sites and runs, for its page and its metrics.

All of it is public by `fedtune.privacy.publication`: names and whether a site is connected, what a site's
owner chose to publish of its budget, and what was reported of a run (`fedtune.deploy.progress`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune import __version__
from fedtune.deploy import certificates
from fedtune.deploy.admission import Admission
from fedtune.deploy.join import PublishedBudgets, checked_budget
from fedtune.deploy.progress import Progress
from fedtune.deploy.runs import Runs
from fedtune.deploy.trail import Trail
from fedtune.privacy.publication import one_line

__all__ = ["LIVE", "ServerView", "run_row", "site_row"]

LIVE = ("pending", "starting", "running")
_SHOWN = 50  # runs


def site_row(node: Any, budget: dict[str, Any] | None) -> dict[str, Any]:
    """A site, of Flower's NodeInfo and what it publishes of its budget."""
    return {
        "site": one_line(node.name),
        "state": one_line(node.status),
        "since": one_line(node.last_activated_at or ""),
        "budget": budget,
    }


def run_row(run: Any, by: str) -> dict[str, str]:
    """A run, of Flower's Run and who started it (empty: not known); its submitter wrote the details."""
    row = {
        "run": str(run.run_id),
        "state": run.status.sub_status or run.status.status,
        "details": run.status.details,
        "started": str(run.pending_at),
        "by": by,
    }
    return {name: one_line(value) for name, value in row.items()}


@dataclass(frozen=True)
class ServerView:
    """Sites and runs as a running server knows them.

    Args:
        name: of the federation.
        address: by which its sites reach it.
        folder: of the server.
        admission: whom it lets in.
        budgets: what sites publish.
        progress: what was reported of runs.
        queue: whose turn it is to start a run.
        trail: who did what.
    """

    name: str
    address: str
    folder: Path
    admission: Admission
    budgets: PublishedBudgets
    progress: Progress
    queue: Runs
    trail: Trail

    def sites(self) -> list[dict[str, Any]]:
        """Each registered site; `suspended` is the state of one that is not let in for now."""
        budgets = self.budgets.all()
        rows = []
        for node in self.admission.nodes():
            row = site_row(node, checked_budget(budgets.get(node.name)))
            if self.admission.refusal(bytes(node.public_key)) is not None:
                row["state"] = "suspended"
            rows.append(row)
        return sorted(rows, key=lambda row: str(row["site"]))

    def runs(self, *states: str) -> list[dict[str, Any]]:
        """Runs in one of `states` (none: the newest of all), newest first, with their last round."""
        rows = []
        for run in self.admission.runs(states or None, _SHOWN):
            reported = self.progress.of(str(run.run_id))
            by = self.queue.by(int(run.run_id)) or str(reported.get("by", ""))
            rows.append({**run_row(run, by), "last": (reported.get("rounds") or [None])[-1]})
        return rows

    def waiting(self) -> list[str]:
        """The operators whose runs wait for their turn."""
        return [str(name) for name in self.queue.listed()["waiting"]]

    def days(self) -> int:
        """Until the server's certificate expires."""
        return certificates.check_server_certificate(self.folder)

    def status(self) -> dict[str, Any]:
        """What the page shows."""
        return {
            "federation": self.name,
            "address": self.address,
            "fedtune": __version__,
            "certificate_days": self.days(),
            "trail": self.trail.head(),
            "sites": self.sites(),
            "runs": self.runs(),
            "waiting": self.waiting(),
        }
