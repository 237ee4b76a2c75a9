"""A server's view of sites and runs without Flower's SuperLink: what its page and its metrics are made of."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.deploy.join import PublishedBudgets
from fedtune.deploy.progress import Progress, report_of_rounds
from fedtune.deploy.trail import Trail
from fedtune.deploy.view import ServerView
from fedtune.federation.events import RoundSummary

NASTY = "<img src=x onerror=\"document.title='stolen'\">"


class Sites:
    """Stands for `Admission` over Flower's LinkState: two sites, one that is not let in, and three runs."""

    def __init__(self) -> None:
        self.rows = [("clinic-1", "online"), ("clinic-2", "offline"), (NASTY, "online")]
        self.states = {"11": "completed", "12": "running", "13": "pending"}

    def nodes(self) -> list[Any]:
        return [
            SimpleNamespace(
                name=name, status=status, last_activated_at="2026-11-30T09:00:00+00:00",
                public_key=name.encode(), node_id=number,
            )
            for number, (name, status) in enumerate(self.rows)
        ]  # fmt: skip

    def refusal(self, key: bytes) -> tuple[int, str] | None:
        return (503, "its books went back") if key == b"clinic-2" else None

    def runs(self, states: tuple[str, ...] | None, limit: int) -> list[Any]:
        return [
            SimpleNamespace(
                run_id=int(run), pending_at=f"2026-11-{run}T10:00:00+00:00",
                status=SimpleNamespace(
                    status="finished" if state == "completed" else state,
                    sub_status=state if state == "completed" else "", details=NASTY if run == "12" else "",
                ),
            )
            for run, state in reversed(self.states.items())
            if states is None or state in states
        ][:limit]  # fmt: skip


def rounds(number: int = 12, done: int = 9) -> list[RoundSummary]:
    """Summaries of rounds as a submitter has them, with measured times."""
    return [
        RoundSummary(
            round=place, num_rounds=number, seconds=3.25, train_seconds=41.5, updates=2,
            accuracy=0.5 + 0.25 * (1 - 0.7**place), loss=0.6, epsilon=0.31 * place**0.5, bytes_up=1000,
            bytes_down=2000, dropped=[(NASTY, f"refused: {NASTY}")] if place == 2 else [],
        )
        for place in range(1, done + 1)
    ]  # fmt: skip


@pytest.fixture
def good_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's certificate is good for 300 days."""
    monkeypatch.setattr("fedtune.deploy.certificates.check_server_certificate", lambda folder: 300)


def make_view(folder: Path, statement: str = f"# Privacy statement\n\n{NASTY}\n") -> ServerView:
    """A view with progress of two of the runs and one published budget."""
    folder.mkdir(exist_ok=True)
    budgets, progress = PublishedBudgets(folder / "published.json"), Progress(folder / "progress")
    budgets.note("clinic-1", {"epsilon_left": 5.25, "epsilon": 8.0, "delta": 1e-5, "unit": "person"})
    for run, done in (("11", 12), ("12", 9)):
        report = report_of_rounds(run, rounds(done=done))
        assert progress.note(json.dumps(report).encode(), "bob")[0] == 200
    assert progress.note(json.dumps({"run": "11", "statement": statement}).encode(), "bob")[0] == 200
    admission: Any = Sites()
    queue: Any = SimpleNamespace(
        by=lambda run: "alice" if run == 12 else None, listed=lambda: {"waiting": [NASTY, "alice"]}
    )
    trail = Trail(folder)
    trail.note("server started", "server")
    return ServerView("hospitals", "fed.example.org:9443", folder, admission, budgets, progress, queue, trail)
