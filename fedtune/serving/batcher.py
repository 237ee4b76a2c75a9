"""Texts of many requests, asked together: a queue that is bounded by tokens, and one thread that empties it.

While one batch is computed the next one gathers, in the order of arrival, up to `BATCH_TOKENS` tokens:
nobody waits for a batch to fill. A request that would make the queue longer than it may be is refused at
once, with the time that what waits before it will take, by the speed that was measured so far. What was
accepted is answered.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedtune.serving.classifier import BATCH_TOKENS

__all__ = ["Batcher", "Busy"]

Ask = Callable[[Sequence[Sequence[int]]], NDArray[np.float32]]
_LONGEST_WAIT = 60  # seconds, that a client is told at most


class Busy(Exception):
    """The queue is full, or closed. `retry_after`: seconds after which to try again."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"try again in {retry_after} s")
        self.retry_after = retry_after


@dataclass
class _Job:
    ids: list[list[int]]
    tokens: int
    answer: asyncio.Future[NDArray[np.float32]]


@dataclass
class Batcher:
    """Collects jobs and asks the model; use it in one event loop, between `start` and `stop`.

    Attributes:
        ask: token ids of n texts -> logits [n, c]; it is called in one thread.
        max_waiting: tokens that may wait. A request that is longer is accepted when nothing waits.
        waiting: tokens that were accepted and are not answered.
        batches: how many were computed.
    """

    ask: Ask
    max_waiting: int
    waiting: int = 0
    batches: int = 0
    _jobs: deque[_Job] = field(default_factory=deque)
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _closed: bool = True
    _worker: asyncio.Task[None] | None = None
    _tokens_a_second: float = 1000.0  # a guess, until a batch was measured

    @property
    def is_open(self) -> bool:
        """Whether requests are accepted."""
        return not self._closed

    def start(self) -> None:
        """Opens the queue, in the running event loop."""
        self._closed = False
        self._worker = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Accepts nothing more, and returns when all that was accepted is answered."""
        self._closed = True
        self._wake.set()
        if self._worker is not None:
            await self._worker

    async def logits(self, ids: list[list[int]]) -> NDArray[np.float32]:
        """Logits [n, c] of n texts' token ids.

        Raises:
            Busy: it is not accepted.
        """
        tokens = sum(map(len, ids))
        if self._closed:
            raise Busy(1)
        if self.waiting and self.waiting + tokens > self.max_waiting:
            raise Busy(self.retry_after())
        job = _Job(ids, tokens, asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        self.waiting += tokens
        self._wake.set()
        # A client that goes away does not take the answer from the others of its batch.
        return await asyncio.shield(job.answer)

    def retry_after(self) -> int:
        """Whole seconds that what waits will take, at least 1."""
        return min(_LONGEST_WAIT, max(1, math.ceil(self.waiting / self._tokens_a_second)))

    def _next(self) -> list[_Job]:
        """The jobs of the next batch: one at least."""
        batch = [self._jobs.popleft()]
        tokens = batch[0].tokens
        while self._jobs and tokens + self._jobs[0].tokens <= BATCH_TOKENS:
            batch.append(self._jobs.popleft())
            tokens += batch[-1].tokens
        return batch

    async def _work(self) -> None:
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="model") as thread:
            while self._jobs or not self._closed:
                if not self._jobs:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                await self._answer(self._next(), thread)

    async def _answer(self, batch: list[_Job], thread: ThreadPoolExecutor) -> None:
        tokens, started = sum(job.tokens for job in batch), time.monotonic()
        ids = [one for job in batch for one in job.ids]
        try:
            found = await asyncio.get_running_loop().run_in_executor(thread, self.ask, ids)
        except Exception as error:  # it is these requests' answer, and no end of the others'
            for job in batch:
                if not job.answer.done():
                    job.answer.set_exception(error)
        else:
            self._tokens_a_second = tokens / max(time.monotonic() - started, 1e-6)
            start = 0
            for job in batch:
                if not job.answer.done():
                    job.answer.set_result(found[start : start + len(job.ids)])
                start += len(job.ids)
        finally:
            self.waiting -= tokens
            self.batches += 1
