"""Texts of many requests, asked together: a queue that is bounded by tokens, and workers that come and go
with it.

A request that comes while fewer than `max_workers` batches are computed starts a worker; a worker takes the
one that waits longest and of those behind it, of the same model, the most like it in length, up to
`BATCH_TOKENS` tokens, and ends when nothing is left. So nobody waits for a batch to fill, nobody is overtaken
for long, batches grow as requests come faster than they are answered, and an idle service has no worker. A
request that is longer than a batch is cut into several, which all workers share.

Workers are threads over one onnxruntime session with one thread each, and not processes: a session may be
asked by many threads at once and leaves Python's lock while it computes, so that a worker costs no second
copy of the weights and starts in microseconds.

A request that would make the queue longer than it may be is refused at once, with the time that what waits
before it will take, by the speed that was measured so far. What was accepted is answered.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedtune.serving.classifier import BATCH_TOKENS, token_batches

__all__ = ["LEAST_SHARE", "Batcher", "Busy"]

Logits = NDArray[np.float32]
Ask = Callable[[Sequence[Sequence[int]]], Logits]
# Tokens of a batch, below which its own cost (of about seven) shows. Twice as many answer no more in all, and
# whoever comes behind such a batch waits for it: of two workers at 70 percent of their top, 99 of 100 were
# answered within 4.5 times the median then, and within 3.8 so (simulated, texts of 5 to 64 tokens).
LEAST_SHARE = 64
# Jobs behind the first, among which those of its length are looked for. Texts of unlike lengths are computed
# one by one (`fedtune.serving.classifier`): in the order of arrival a small batch of three or six that waited
# took 11 to 16 percent more of the processor (measured), and 99 of 100 were answered within 4.0 times the
# median (simulated as above).
_LOOK = 64
_LONGEST_WAIT = 60  # seconds, that a client is told at most


class Busy(Exception):
    """The queue is full, or closed. `retry_after`: seconds after which to try again."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"try again in {retry_after} s")
        self.retry_after = retry_after


@dataclass
class _Job:
    """Texts of one request that fit into a batch."""

    model: str
    ids: list[list[int]]
    tokens: int
    longest: int  # of its texts, in tokens
    answer: asyncio.Future[Logits]


@dataclass
class Batcher:
    """Collects jobs and asks the models; use it in one event loop, between `start` and `stop`.

    Attributes:
        asks: by the name of a model: token ids of n texts -> logits [n, c]; called in up to `max_workers`
            threads.
        max_waiting: tokens that may wait. A request that is longer is accepted when nothing waits.
        max_workers: batches that are computed at once, at most.
        seen: is told of each batch that was computed: its texts, its tokens, and its seconds.
        waiting: tokens that were accepted and are not answered.
        workers: batches that are being computed.
    """

    asks: Mapping[str, Ask]
    max_waiting: int
    max_workers: int = 1
    seen: Callable[[int, int, float], None] = lambda texts, tokens, seconds: None
    waiting: int = 0
    workers: int = 0
    _jobs: deque[_Job] = field(default_factory=deque)
    _queued: int = 0  # tokens of them
    _running: set[asyncio.Task[None]] = field(default_factory=set)
    _threads: ThreadPoolExecutor | None = None
    _closed: bool = True
    _tokens_a_second: float = 1000.0  # of one worker; a guess, until a batch was measured

    @property
    def is_open(self) -> bool:
        """Whether requests are accepted."""
        return not self._closed

    def start(self) -> None:
        """Opens the queue, in the running event loop."""
        self._threads = ThreadPoolExecutor(self.max_workers, thread_name_prefix="model")
        self._closed = False

    async def stop(self) -> None:
        """Accepts nothing more, and returns when all that was accepted is answered."""
        self._closed = True
        while self._running:
            await asyncio.wait(self._running)
        if self._threads is not None:
            self._threads.shutdown(wait=False)

    async def logits(self, model: str, ids: Sequence[list[int]]) -> Logits:
        """Logits [n, c] of n texts' token ids, one or more.

        Raises:
            Busy: it is not accepted.
        """
        tokens = sum(map(len, ids))
        if self._closed:
            raise Busy(1)
        if self.waiting and self.waiting + tokens > self.max_waiting:
            raise Busy(self.retry_after())
        self.waiting += tokens
        parts = list(token_batches([len(one) for one in ids], BATCH_TOKENS))
        answers = [self._add(model, [ids[row] for row in rows]) for rows in parts]
        # A client that goes away does not take the answer from the others of its batch.
        found = await asyncio.shield(asyncio.gather(*answers, return_exceptions=True))
        logits: Logits | None = None
        for rows, one in zip(parts, found, strict=True):
            if isinstance(one, BaseException):
                raise one
            if logits is None:
                logits = np.empty((len(ids), one.shape[1]), dtype=np.float32)
            logits[rows] = one
        assert logits is not None
        return logits

    def retry_after(self) -> int:
        """Whole seconds that what waits will take, at least 1."""
        speed = self._tokens_a_second * self.max_workers
        return min(_LONGEST_WAIT, max(1, math.ceil(self.waiting / speed)))

    def _add(self, model: str, ids: list[list[int]]) -> asyncio.Future[Logits]:
        lengths = [len(one) for one in ids]
        job = _Job(model, ids, sum(lengths), max(lengths), asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        self._queued += job.tokens
        if self.workers < self.max_workers:
            self.workers += 1
            task = asyncio.create_task(self._work())
            self._running.add(task)
            task.add_done_callback(self._running.discard)
        return job.answer

    def _next(self) -> list[_Job]:
        """The jobs of the next batch: the one that waits longest, and those of its model that fit beside it,
        the most like it in length first.

        A worker takes its share of what waits and not all of it, so that the others are not left idle.
        """
        most = min(BATCH_TOKENS, max(LEAST_SHARE, self._queued // self.max_workers))
        first = self._jobs.popleft()
        behind = [self._jobs.popleft() for _ in range(min(_LOOK, len(self._jobs)))]
        batch, tokens = [first], first.tokens
        for job in sorted(behind, key=lambda job: abs(job.longest - first.longest)):
            if job.model == first.model and tokens + job.tokens <= most:
                batch.append(job)
                tokens += job.tokens
        taken = set(map(id, batch))
        self._jobs.extendleft(job for job in reversed(behind) if id(job) not in taken)
        self._queued -= tokens
        return batch

    async def _work(self) -> None:
        try:
            while self._jobs:
                await self._answer(self._next())
        finally:
            self.workers -= 1

    async def _answer(self, batch: list[_Job]) -> None:
        tokens, started = sum(job.tokens for job in batch), time.monotonic()
        ids = [one for job in batch for one in job.ids]
        try:
            ask = self.asks[batch[0].model]
            found = await asyncio.get_running_loop().run_in_executor(self._threads, ask, ids)
        except Exception as error:  # it is these requests' answer, and no end of the others'
            for job in batch:
                job.answer.set_exception(error)
        else:
            seconds = max(time.monotonic() - started, 1e-6)
            self._tokens_a_second = tokens / seconds
            self.seen(len(ids), tokens, seconds)
            start = 0
            for job in batch:
                job.answer.set_result(found[start : start + len(job.ids)])
                start += len(job.ids)
        finally:
            self.waiting -= tokens
