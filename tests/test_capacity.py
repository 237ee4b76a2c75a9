"""The simulation behind docs/capacity.md is right where the answer is known, and the page is what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from scripts.benchmarks.capacity import page, simulate

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("load", [0.3, 0.6, 0.9])
def test_one_worker_and_no_batches_are_the_queue_of_the_textbook(load: float) -> None:
    """M/D/1: the mean time to the answer is s + load s / (2 (1 - load)) (Pollaczek and Khinchine)."""
    waits = simulate(load / 0.01, lambda count: 0.01, workers=1, most=1, arrivals=200_000)
    assert waits.mean() == pytest.approx(0.01 + load * 0.01 / (2 * (1 - load)), rel=0.06)
    assert len(waits) == 200_000 and waits.min() >= 0.01 - 1e-12


def test_two_workers_wait_less_than_one_that_is_as_fast() -> None:
    """Half as fast each: nearly always slower at little load, and never as slow at much as one half is."""
    single = simulate(80, lambda count: 0.01, workers=1, most=1).mean()
    double = simulate(80, lambda count: 0.02, workers=2, most=1).mean()
    assert single < double < simulate(40, lambda count: 0.02, workers=1, most=1).mean()


def test_batches_carry_a_load_that_single_texts_cannot() -> None:
    def seconds(count: int) -> float:
        return 0.01 + 0.001 * count

    overloaded = simulate(300, seconds, workers=1, most=1, arrivals=3000)
    batched = simulate(300, seconds, workers=1, most=64, arrivals=3000)
    assert overloaded.max() > 10 and np.percentile(batched, 99) < 0.1


@pytest.mark.slow
def test_the_page_is_what_the_record_gives() -> None:
    """If this fails, run `scripts/bench capacity`."""
    record = json.loads((ROOT / "simulations" / "speed" / "records" / "serving.json").read_text())
    assert (ROOT / "docs" / "capacity.md").read_text() == page(record)
