"""Micro-batches side by side: a thread for each, rather than all threads on each product.

An encoder's products are large enough for every core; what lies between them (softmax, norms, sums, Python)
is not, and threads that meet after each of them wait for one another. On two cores a private step takes 0.9
of the time so. Only what writes nothing to the model may be done so: no hooks.

The results are those of one thread for each micro-batch, whatever runs beside it, and come in order: a sum
over them is the same number each time.
"""

from __future__ import annotations

import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

__all__ = ["side_by_side"]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
_MOST = 4  # at once: each takes the memory of a micro-batch


@functools.cache
def _pool(workers: int, threads: int) -> ThreadPoolExecutor:
    """Threads of their own for `workers` micro-batches, each of which has `threads` for its products."""
    all_there = threading.Barrier(workers + 1)

    def begin() -> None:
        torch.get_num_threads()  # a thread's first call takes the process' number over its own
        torch.set_num_threads(threads // workers)
        all_there.wait()

    pool = ThreadPoolExecutor(workers, "fedtune-batch", begin)
    for _ in range(workers):
        pool.submit(int)
    all_there.wait()
    torch.set_num_threads(threads)  # the number is each thread's own, but for those that are still to come
    return pool


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not live on in a child


def side_by_side(
    work: Callable[[_Item], _Result],
    items: Sequence[_Item],
    *,
    device: torch.device,
    alone: Callable[[_Item], bool],
) -> Iterator[_Result]:
    """`work` of each of `items`, in their order; at most four at once, and one more that waits to be taken.

    One after another in the caller's thread where there is one item, one thread, or another device than the
    CPU. What `work` raises is raised here, and when this returns, or is given up, none of it runs any more.

    Args:
        alone: asked of each item when all before it are done or running: nothing may run beside it.
    """
    threads = torch.get_num_threads()
    workers = min(_MOST, threads, len(items))
    if workers < 2 or device.type != "cpu":
        yield from map(work, items)
        return
    gradients = torch.is_grad_enabled()

    def one(item: _Item) -> _Result:
        with torch.set_grad_enabled(gradients):  # a thread's own too
            return work(item)

    pool, running = _pool(workers, threads), deque[Future[_Result]]()
    try:
        for item in items:
            single = alone(item)
            if single:
                wait(running)
            running.append(pool.submit(one, item))
            if single:
                wait(running)
            while len(running) > workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for future in running:
            future.cancel()
        wait(running)
