"""How long a node waits for its ledger when it has thousands of releases behind it."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from pathlib import Path

from fedtune.privacy.ledger import PrivacyLedger
from scripts.benchmarks.common import plan_for, seconds, write

EARLIER, REPEATS = 10_000, 50


def ledger() -> None:
    """Milliseconds of a durable reservation, in an empty ledger and after 10,000 releases."""
    plan = dataclasses.replace(plan_for(10_000, 0.01, 1), num_rounds=10**6)
    identity = {"dataset": "bench", "fingerprint": "f" * 64, "node": "node-0", "run": "run"}
    with tempfile.TemporaryDirectory() as folder:
        book = PrivacyLedger.open(Path(folder) / "node-0.sqlite")

        def release(round: int) -> float:
            held = []
            took = seconds(lambda: held.append(book.reserve(**identity, round=round, plan=plan, public=True)))
            book.commit(held[0])
            return 1000 * took

        first = [release(r) for r in range(REPEATS)]
        for r in range(REPEATS, EARLIER):
            release(r)
        last = [release(r) for r in range(EARLIER, EARLIER + REPEATS)]
    write(
        "ledger",
        {
            "question": f"milliseconds of a reservation after {EARLIER:,} releases, over the first {REPEATS}",
            "first_ms": [round(t, 2) for t in first],
            "last_ms": [round(t, 2) for t in last],
            "last_ms_median": round(statistics.median(last), 2),
            "last_ms_max": round(max(last), 2),
            "ratio_median": round(statistics.median(last) / statistics.median(first), 2),
            "target": "last_ms_median at most 20 ms",
        },
    )
