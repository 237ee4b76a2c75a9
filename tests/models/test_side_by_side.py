"""Micro-batches on several threads: the same numbers in the same order, and nothing left running."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fedtune.models.side_by_side import _MOST, side_by_side

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def never(_: object) -> bool:
    return False


class Work:
    """Takes longest for the first item; remembers what was running at once, and where.

    Three items of a `meeting` wait for one another.
    """

    def __init__(self) -> None:
        self.lock, self.now, self.together = threading.Lock(), set[int](), list[set[int]]()
        self.threads, self.started = set[str](), list[int]()
        self.meeting, self.met = frozenset[int](), threading.Barrier(3, timeout=60.0)

    def __call__(self, item: int) -> int:
        with self.lock:
            self.now.add(item)
            self.started.append(item)
            self.together.append(set(self.now))
            self.threads.add(threading.current_thread().name)
        if item in self.meeting:
            self.met.wait()  # or else a busy machine decides whether three are ever worked on at once
        time.sleep(0.05 if item == 0 else 0.005)
        with self.lock:
            self.now.discard(item)
        return item * item


def test_results_come_in_order_and_several_are_worked_on_at_once() -> None:
    work = Work()
    work.meeting = frozenset({0, 1, 2})
    assert list(side_by_side(work, range(12), device=CPU, alone=never)) == [i * i for i in range(12)]
    assert max(map(len, work.together)) == 3 <= _MOST
    assert threading.current_thread().name not in work.threads


@pytest.mark.parametrize(("threads", "items", "device"), [(1, 9, "cpu"), (3, 1, "cpu"), (3, 9, "meta")])
def test_one_item_one_thread_or_another_device_is_the_callers_own_work(
    threads: int, items: int, device: str
) -> None:
    torch.set_num_threads(threads)
    work = Work()
    got = list(side_by_side(work, range(items), device=torch.device(device), alone=never))
    assert got == [i * i for i in range(items)] and work.threads == {threading.current_thread().name}


def test_nothing_runs_beside_an_item_that_must_be_alone() -> None:
    work = Work()
    work.meeting = frozenset({2, 3, 4})
    list(side_by_side(work, range(12), device=CPU, alone=lambda item: item in (1, 7)))
    assert [at for at in work.together if at & {1, 7} and len(at) > 1] == []
    assert max(map(len, work.together)) == 3


def test_few_are_ahead_of_the_one_that_is_taken() -> None:
    """Each waits with the memory of a micro-batch."""
    work = Work()
    results = side_by_side(work, range(50), device=CPU, alone=never)
    next(results)
    time.sleep(0.1)
    assert len(work.started) <= 5
    results.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("ended_by", ["work", "caller"])
def test_when_it_ends_early_nothing_runs_any_more(ended_by: str) -> None:
    work = Work()

    def failing(item: int) -> int:
        if item == 4 and ended_by == "work":
            raise ValueError("four")
        return work(item)

    def use() -> None:
        for result in side_by_side(failing, range(50), device=CPU, alone=never):
            if result == 9 and ended_by == "caller":
                raise KeyboardInterrupt

    with pytest.raises(ValueError if ended_by == "work" else KeyboardInterrupt):
        use()
    started = len(work.started)
    assert work.now == set() and started < 12
    time.sleep(0.05)
    assert len(work.started) == started


def test_threads_and_gradients_are_the_callers() -> None:
    seen = lambda _: (torch.is_grad_enabled(), torch.get_num_threads())  # noqa: E731
    with torch.no_grad():
        assert set(side_by_side(seen, range(6), device=CPU, alone=never)) == {(False, 1)}
    assert set(side_by_side(seen, range(6), device=CPU, alone=never)) == {(True, 1)}
    torch.set_num_threads(8)
    assert set(side_by_side(seen, range(6), device=CPU, alone=never)) == {(True, 2)}
    assert torch.get_num_threads() == 8
    fresh: list[int] = []
    thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert fresh == [8]


@pytest.mark.slow
def test_the_clipped_sum_is_the_same_number_each_time_and_near_that_of_one_thread(tiny_bert: object) -> None:
    from tests.training.test_dp_step import compute, load, make_plan, make_shard

    model, shard = load(tiny_bert), make_shard()  # type: ignore[arg-type]
    model.theta += 0.05 * torch.randn(model.num_parameters, generator=torch.Generator().manual_seed(0))
    records = list(np.random.default_rng(0).integers(0, shard.data.num_records, 60))
    for units in (None, [r % 7 for r in range(60)]):
        flops = [model.flops.total]
        runs = []
        for _ in range(4):
            runs.append(compute(model, shard, records, make_plan(), units))
            flops.append(model.flops.total)
        assert all(np.array_equal(runs[0], run) for run in runs[1:])
        assert len(set(np.diff(flops))) == 1 and flops[1] > flops[0]
        torch.set_num_threads(1)
        assert compute(model, shard, records, make_plan(), units) == pytest.approx(runs[0], abs=1e-6)
        torch.set_num_threads(3)
