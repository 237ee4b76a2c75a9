"""docs/capacity.md: how many machines answer so many requests a second, from the service's measured times.

One machine is simulated event by event as `fedtune.serving.batcher` works: requests of one text come by
chance (a Poisson process), a worker that is free takes its share of what waits, and a batch of k texts takes
the seconds that were measured for k texts (`scripts/bench serving`, record `serving.json`), plus what HTTP
cost a text there. Requests are spread over machines by chance, so each machine sees a Poisson process of its
share. What is not in it: networks, proxies, machines that fail, and load that changes faster than machines
start.
"""

from __future__ import annotations

import heapq
import json
import math
import random
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.serving.batcher import LEAST_SHARE
from fedtune.serving.classifier import BATCH_TOKENS
from scripts.benchmarks.common import RECORDS

__all__ = ["capacity", "page", "simulate"]

RATES = (10, 1_000, 100_000)  # requests a second
LIMIT_MS = 100.0  # for 99 of 100 requests
_PAGE = Path(__file__).resolve().parents[2] / "docs" / "capacity.md"
_ARRIVALS = 20_000


def simulate(
    rate: float,
    seconds: Callable[[int], float],
    *,
    workers: int,
    most: int,
    least: int = 1,
    arrivals: int = _ARRIVALS,
    seed: int = 0,
) -> np.ndarray:
    """Seconds from each request to its answer, [arrivals].

    Args:
        rate: requests a second.
        seconds: that a batch of k texts takes.
        workers: batches at once.
        most: texts of a batch; least: that a worker takes of what waits, if there are so many.
    """
    chance, now = random.Random(seed), 0.0
    waiting: deque[float] = deque()
    busy: list[float] = []  # when each worker will be free
    waits: list[float] = []

    def begin(time: float) -> None:
        while waiting and len(busy) < workers:
            count = min(len(waiting), most, max(least, len(waiting) // workers))
            end = time + seconds(count)
            heapq.heappush(busy, end)
            waits.extend(end - waiting.popleft() for _ in range(count))

    for _ in range(arrivals):
        now += chance.expovariate(rate)
        while busy and busy[0] <= now:
            begin(heapq.heappop(busy))
        waiting.append(now)
        begin(now)
    while waiting:
        begin(heapq.heappop(busy))
    return np.array(waits)


def _times(record: Mapping[str, Any]) -> tuple[Callable[[int], float], int]:
    """(seconds of a batch of k texts, workers) of the machine in the record."""
    measured = {int(size): ms / 1000 for size, ms in record["batch_ms"].items()}
    sizes, workers = sorted(measured), int(record["machine"]["cores"])
    name = record["format"]
    http = workers / record["texts_a_second"][name] - workers / record["alone_texts_a_second"]

    def seconds(count: int) -> float:
        largest = sizes[-1]
        if count > largest:
            return count * measured[largest] / largest + max(0.0, http) * count
        return float(np.interp(count, sizes, [measured[size] for size in sizes])) + max(0.0, http) * count

    return seconds, workers


def _largest_rate(seconds: Callable[[int], float], workers: int, most: int, least: int) -> float:
    """Requests a second of one machine of which 99 in 100 are answered within `LIMIT_MS`."""
    low, high = 0.0, workers * most / seconds(most)
    for _ in range(12):
        middle = (low + high) / 2
        waits = simulate(middle, seconds, workers=workers, most=most, least=least)
        good = np.percentile(waits, 99) * 1000 <= LIMIT_MS
        low, high = (middle, high) if good else (low, middle)
    return low


def page(record: Mapping[str, Any]) -> str:
    """docs/capacity.md, from the record of `scripts/bench serving`."""
    from fedtune.config.loader import load
    from fedtune.cost.inference import price_inference

    seconds, workers = _times(record)
    tokens = record["tokens_a_text"]
    most, least = max(1, int(BATCH_TOKENS / tokens)), max(1, int(LEAST_SHARE / tokens))
    top = workers * most / seconds(most)
    largest = _largest_rate(seconds, workers, most, least)
    pricing = load(["pricing=serving"]).pricing
    rows = []
    for rate in RATES:
        machines = math.ceil(rate / largest)
        waits = 1000 * simulate(rate / machines, seconds, workers=workers, most=most, least=least)
        # One more than needed, and of many one in ten, so that one may fail or be replaced.
        spare = max(1, math.ceil(0.1 * machines))
        load_share = rate / machines / top
        month = (machines + spare) * 730 * pricing.serving_hour
        rows.append(
            f"| {rate:,} | {machines:,} + {spare:,} | {load_share:.0%} | {np.percentile(waits, 50):.0f} | "
            f"{np.percentile(waits, 99):.0f} | {month:,.0f} | {month / (rate * 2.628):,.2f} |"
        )
    name, machine = record["format"], record["machine"]
    busy = price_inference(pricing, top)
    times = ", ".join(f"{size}: {ms:.1f}" for size, ms in record["batch_ms"].items())
    lines = [
        "# How many machines",
        "",
        "*Time: 2 minutes to read.*",
        "",
        "Made by `scripts/bench capacity` from `simulations/speed/records/serving.json`: a simulation with "
        "measured service times, not a measurement of many machines. `tests/test_capacity.py` holds it to "
        "that record.",
        "",
        f"**One machine**: {machine['processor']}, {workers} cores, format `{name}`, requests of one text "
        f"of {tokens:.0f} tokens on average. Milliseconds of a batch on one core, by its texts: {times}. It "
        f"answers {record['texts_a_second'][name]:.0f} requests a second at most (measured; {top:.0f} in "
        f"full batches, simulated), and {largest:.0f} if 99 of 100 are to be answered within {LIMIT_MS:.0f} "
        "ms (simulated).",
        "",
        f"| requests a second | machines + spare | load | p50 ms | p99 ms | {pricing.currency} a month | "
        f"{pricing.currency} a million texts |",
        "|---:|---:|---:|---:|---:|---:|---:|",
        *rows,
        "",
        f"Money by the example book `{pricing.name}` ({pricing.serving_hour:g} {pricing.currency} an hour), "
        f"machines alone; a machine in full batches and busy {pricing.serving_load:.0%} of the time would "
        f"cost {busy.compute:.2f} a million.",
        "",
        "- **10 a second**: one machine, nearly idle; a second one is for the day when the first is "
        "replaced. Two pods are the autoscaler's least (`deploy/serving/kubernetes/autoscaler.yaml`).",
        "- **1,000 a second**: an ordinary cluster behind one load balancer; the autoscaler grows on "
        "tokens that wait, which are few as long as there are machines enough.",
        "- **100,000 a second**: no longer one cluster and one balancer. Before buying so many machines: "
        "ask with several texts in a request (HTTP's share falls), keep answers to texts that are asked "
        "again, take a student of two layers (`fedtune compress`), or processors with AMX or a GPU; "
        "measure, and make this page anew.",
        "",
        "Memory: half a gigabyte a machine is enough for the default model in int8. Requests beyond the "
        "limits are refused with 429 or 503 and Retry-After, so a machine that is asked too much still "
        "answers what it accepts.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def capacity() -> None:
    """Writes docs/capacity.md."""
    record = json.loads((RECORDS / "serving.json").read_text())
    _PAGE.write_text(page(record))
    print(_PAGE.read_text())
