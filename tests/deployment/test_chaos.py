"""A short round of the chaos that `simulations/deployment/chaos.py` makes at full size.

Four sites: one is killed in the middle and started again, one is slow, one sends garbage.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

STUDIES = Path(__file__).parents[2] / "simulations" / "deployment"


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(STUDIES))
    import processes

    yield processes
    sys.modules.pop("processes", None)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_ends_and_the_books_are_whole_whatever_three_of_four_nodes_do(
    processes: Any, tmp_path: Path
) -> None:
    rounds, timeout = 5, 120  # a dead node is known after 20 s; the rest is for busy machines
    federation = processes.Federation(tmp_path, processes.tiny(tmp_path, 4, rows=60, test=100))
    strange = {"site-03": ("slow", "1", "3"), "site-04": ("garbage",)}
    try:
        federation.start_server()
        federation.start_nodes(wait=1.0, strange=strange)
        submitted = federation.start_submit(
            "run", f"federation.num_rounds={rounds}", f"federation.round_timeout={timeout}"
        )
        federation.until("submit-run", "round 1/", 600)
        killed = federation.processes["site-02"]
        killed.kill()
        assert submitted.process.wait(600) == 0, federation.log("submit-run")[-3000:]
        end = time.monotonic() + 60
        while killed.starts < 2 and time.monotonic() < end:
            time.sleep(0.2)
        assert killed.starts == 2
        record = processes.record_of(tmp_path / "runs" / "run")
        books = federation.books()
    finally:
        federation.close()
    assert record["federation"]["rounds"] == rounds
    assert record["privacy"]["epsilon"] <= 8.0
    reasons: dict[str, list[str]] = {}
    for drop in record["federation"]["dropped"]:
        reasons.setdefault(drop["node"], []).append(drop["reason"])
    # Every kind of garbage is refused, by name; the healthy node loses nothing.
    assert len(reasons["site-04"]) == rounds
    assert "site-01" not in reasons
    for site, book in books.items():
        assert book["ledger_verifies"] and book["audit_log_verifies"], site
        # What left is charged; what was charged may not have left.
        assert book["released"] <= book["releases"] <= rounds, site
    assert books["site-04"]["releases"] == rounds  # garbage is paid for as well
