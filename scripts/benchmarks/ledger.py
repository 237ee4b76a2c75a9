"""How long a node waits for its ledger when it has thousands of releases behind it."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

from fedtune.privacy.ledger.budget import PrivacyBudget
from fedtune.privacy.ledger.ledger import PrivacyLedger
from scripts.benchmarks.common import plan_for, seconds, write

EARLIER, REPEATS = 10_000, 100


def _fill(book: PrivacyLedger, run: str, count: int) -> None:
    """`count` further releases like the last one, each a row that the ledger's own code chains to the one
    before it, in one transaction: ten thousand durable ones would take minutes and measure the disk."""
    with book.writing() as pen:
        (last,) = book._chain.latest_of_kind(pen.connection, "reserved", 1)
        for _ in range(count):
            pen.write("reserved", last.body, run=run)


def ledger() -> None:
    """Milliseconds of a durable reservation, in an empty ledger and after 10,000 releases of one run."""
    plan = dataclasses.replace(plan_for(10_000, 0.01, 1), num_rounds=10**6, noise_multiplier=400.0)
    identity = {"dataset": "bench", "fingerprint": "f" * 64, "node": "node-0", "run": "run"}
    with tempfile.TemporaryDirectory() as folder:
        book = PrivacyLedger.open(Path(folder) / "node-0.sqlite")
        book.set_budget(PrivacyBudget(20.0, 1e-6))

        def release(round: int) -> tuple[float, float]:
            held, busy = [], time.process_time()
            took = seconds(lambda: held.append(book.reserve(**identity, round=round, plan=plan)))
            busy = time.process_time() - busy
            book.commit(held[0])
            return 1000 * took, 1000 * busy

        release(0)  # finds the rest of the run allowed: accounted once
        first = [release(r) for r in range(1, REPEATS + 1)]
        _fill(book, "run", EARLIER)
        rows, problems = book.verify()
        assert rows > EARLIER and not problems, problems
        last = [release(EARLIER + r) for r in range(REPEATS + 1)][1:]
        # A new process counts the run's rows once.
        book.close()
        book = PrivacyLedger(book.path)
        fresh, _ = release(2 * EARLIER)
    took = sorted(wall for wall, _ in last)
    write(
        "ledger",
        {
            "question": f"milliseconds of a reservation after {EARLIER:,} releases, over the first {REPEATS}",
            "first_ms": [round(wall, 2) for wall, _ in first],
            "last_ms": [round(wall, 2) for wall, _ in last],
            "last_ms_median": round(statistics.median(took), 2),
            "last_ms_95_percent": round(took[int(0.95 * len(took))], 2),
            "last_ms_max": round(took[-1], 2),
            "processor_ms_median": round(statistics.median(busy for _, busy in last), 2),
            "first_of_a_new_process_ms": round(fresh, 1),
            "ratio_median": round(statistics.median(took) / statistics.median(wall for wall, _ in first), 2),
            "target": "last_ms_median at most 20 ms",
        },
    )
