"""What it costs to know a million records again, and data that many runs have cut anew."""

from __future__ import annotations

import dataclasses
import hashlib
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from fedtune.privacy.ledger.budget import PrivacyBudget
from fedtune.privacy.ledger.identity import Identity, mark_of
from fedtune.privacy.ledger.ledger import PrivacyLedger
from scripts.benchmarks.common import plan_for, seconds, write

RECORDS, SHARED, REPEATS = 1_000_000, 0.9, 50
SWEEP_RECORDS, SWEEP_RUNS, NODES = 24_000, 100, 4


def _texts(first: int, count: int) -> list[str]:
    """Texts of about a hundred characters."""
    return [
        f"Record {i}: {hashlib.sha256(str(i).encode()).hexdigest()} was seen on {i % 365}"
        for i in range(first, first + count)
    ]


def _identity(first: int, count: int) -> Identity:
    """Records with three to a person, marked as data is when it is loaded."""
    marks = b"".join(mark_of((text, None)) for text in _texts(first, count))
    persons = [f"person {i // 3}" for i in range(first, first + count, 3)]
    return Identity(np.frombuffer(marks, dtype=np.uint8).reshape(-1, 32), persons, f"{first}")


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _million(folder: Path) -> dict[str, object]:
    plan = dataclasses.replace(plan_for(RECORDS, 0.01, 1), num_rounds=10**6, noise_multiplier=400.0)
    book = PrivacyLedger.open(folder / "node.sqlite")
    book.set_budget(PrivacyBudget(20.0, 1e-7))
    held: list[Identity] = []
    marking = seconds(lambda: held.append(_identity(0, RECORDS)))
    before = _peak()

    def release(data: Identity, name: str, round: int) -> float:
        return seconds(
            lambda: book.reserve(
                dataset=name, fingerprint=data, node="clinic", run=name, round=round, plan=plan
            )
        )

    registering = release(held[0], "january", 0)
    book.close()
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    later = [1000 * release(held[0], "january", round) for round in range(1, REPEATS + 1)]
    following = release(_identity(round(RECORDS * (1 - SHARED)), RECORDS), "february", 0)
    return {
        "marking_seconds": round(marking, 2),
        "register_seconds": round(registering, 2),
        "megabytes": round(size, 1),
        "peak_megabytes": round(_peak() - before),
        "release_ms_median": round(statistics.median(later), 2),
        "next_export_seconds": round(following, 2),
        "seen_before": book.account(dataset="february", fingerprint=book.releases()[-1].fingerprint).seen(
            "february"
        )[0],
        "verify_seconds": round(seconds(book.verify), 2),
    }


def _sweep(folder: Path) -> dict[str, object]:
    """Each run cuts the same records anew, so that nearly every record ends with a history of its own."""
    whole = _identity(0, SWEEP_RECORDS)
    book = PrivacyLedger.open(folder / "simulation.sqlite", shared=True)
    book.set_budget(PrivacyBudget(1e4, 1e-5))
    chance = np.random.default_rng(0)
    first, others = [], []
    for run in range(SWEEP_RUNS):
        plan = dataclasses.replace(
            plan_for(SWEEP_RECORDS // NODES, 0.05, 1), num_rounds=12, noise_multiplier=1.0 + run / 100
        )
        node_of = chance.integers(0, NODES, SWEEP_RECORDS)
        parts = [Identity(whole.records[node_of == i], None, "whole") for i in range(NODES)]
        for number in range(3):
            for i, part in enumerate(parts):
                asked = {"fingerprint": part, "node": f"node-{i}", "run": f"run-{run}", "plan": plan}
                start = time.perf_counter()
                book.reserve(dataset="opinions", round=number, **asked)
                took = 1000 * (time.perf_counter() - start)
                (others if number else first).append(took)
    last = {"dataset": "opinions", "fingerprint": book.releases()[-1].fingerprint}
    return {
        "sweep_runs": SWEEP_RUNS,
        "sweep_first_ms": [round(ms, 1) for ms in first[:: NODES * 10]],
        "sweep_first_ms_max": round(max(first), 1),
        "sweep_later_ms_max": round(max(others), 1),
        "sweep_epsilon_seconds": round(seconds(lambda: book.epsilon(**last, delta=1e-5)), 2),
        "sweep_megabytes": round(sum(path.stat().st_size for path in folder.iterdir()) / 1e6, 1),
    }


def identity() -> None:
    """Seconds and megabytes of registering a million records, and of accounts of many cuts."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        result = _million(Path(one)) | _sweep(Path(other))
    write(
        "identity",
        {
            "question": f"registering {RECORDS:,} records and their persons with a ledger, once",
            **result,
            "target": "60 s and 100 MB",
        },
    )
