"""Batches are of many requests, bounded, in order; what was accepted is answered, whatever else happens."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from fedtune.serving.batcher import Batcher, Busy
from fedtune.serving.classifier import BATCH_TOKENS


class Model:
    """Gives each text its own first token and its length; waits to be let go on."""

    def __init__(self) -> None:
        self.go, self.seen = threading.Event(), list[int]()
        self.go.set()

    def __call__(self, ids: Sequence[Sequence[int]]) -> np.ndarray:
        self.seen.append(sum(map(len, ids)))
        assert self.go.wait(60)
        if any(one[0] < 0 for one in ids):
            raise RuntimeError("broken")
        return np.array([[one[0], len(one)] for one in ids], np.float32)


def text(number: int, length: int = 4) -> list[int]:
    return [number] * length


async def held(batcher: Batcher, model: Model, number: int = 0) -> asyncio.Task[np.ndarray]:
    """A request that is being computed and does not come back before `model.go`."""
    model.go.clear()
    count = len(model.seen)
    first = asyncio.create_task(batcher.logits("m", [text(number)]))
    while len(model.seen) == count:
        await asyncio.sleep(0.001)
    return first


def test_each_gets_its_own_and_those_who_wait_share_a_batch() -> None:
    async def main() -> None:
        model = Model()
        batcher = Batcher({"m": model}, max_waiting=10_000)
        batcher.start()
        first = await held(batcher, model)
        tasks = [
            asyncio.create_task(batcher.logits("m", [text(n), text(100 + n, n + 1)])) for n in range(1, 20)
        ]
        await asyncio.sleep(0.01)
        assert batcher.waiting == 4 + sum(4 + n + 1 for n in range(1, 20))
        model.go.set()
        for number, found in enumerate(await asyncio.gather(first, *tasks)):
            expected = [[0, 4]] if number == 0 else [[number, 4], [100 + number, number + 1]]
            assert found.tolist() == expected
        assert len(model.seen) == 2 and batcher.waiting == batcher.workers == 0
        await batcher.stop()

    asyncio.run(main())


def test_a_batch_has_few_tokens_and_a_long_request_is_one_by_itself() -> None:
    async def main() -> None:
        model = Model()
        batcher = Batcher({"m": model}, max_waiting=10 * BATCH_TOKENS)
        batcher.start()
        first = await held(batcher, model)
        lengths = [BATCH_TOKENS // 2, BATCH_TOKENS // 2, BATCH_TOKENS, 3 * BATCH_TOKENS, 8, 8]
        tasks = [asyncio.create_task(batcher.logits("m", [text(1, length)])) for length in lengths]
        await asyncio.sleep(0.01)
        model.go.set()
        await asyncio.gather(first, *tasks)
        assert model.seen == [4, BATCH_TOKENS, BATCH_TOKENS, 3 * BATCH_TOKENS, 8 + 8]
        await batcher.stop()

    asyncio.run(main())


def test_a_full_queue_refuses_and_says_for_how_long() -> None:
    async def main() -> None:
        model = Model()
        batcher = Batcher({"m": model}, max_waiting=12)
        with pytest.raises(Busy):  # before it is opened
            await batcher.logits("m", [text(1)])
        batcher.start()
        await batcher.logits("m", [text(1, 50)])  # longer than the queue may be, and nothing waits
        first = await held(batcher, model)
        second = asyncio.create_task(batcher.logits("m", [text(2, 8)]))
        await asyncio.sleep(0.01)
        with pytest.raises(Busy) as refused:
            await batcher.logits("m", [text(3, 1)])
        assert 1 <= refused.value.retry_after <= 60
        batcher._tokens_a_second = 0.25
        assert batcher.retry_after() == 48
        model.go.set()
        assert (await first).tolist() == [[0, 4]] and (await second).tolist() == [[2, 8]]
        assert (await batcher.logits("m", [text(4)])).tolist() == [[4, 4]]
        await batcher.stop()

    asyncio.run(main())


def test_stopping_answers_what_was_accepted_and_nothing_else() -> None:
    async def main() -> None:
        model = Model()
        batcher = Batcher({"m": model}, max_waiting=1000)
        batcher.start()
        tasks = [
            await held(batcher, model),
            *(asyncio.create_task(batcher.logits("m", [text(n)])) for n in (1, 2)),
        ]
        await asyncio.sleep(0.01)
        stopping = asyncio.create_task(batcher.stop())
        await asyncio.sleep(0.01)
        assert not stopping.done() and not batcher.is_open
        with pytest.raises(Busy):
            await batcher.logits("m", [text(3)])
        model.go.set()
        await stopping
        assert [found.tolist() for found in await asyncio.gather(*tasks)] == [[[0, 4]], [[1, 4]], [[2, 4]]]

    asyncio.run(main())


def test_an_error_is_that_batchs_alone_and_a_client_that_leaves_takes_nothing_along() -> None:
    async def main() -> None:
        model = Model()
        batcher = Batcher({"m": model}, max_waiting=1000)
        batcher.start()
        with pytest.raises(RuntimeError, match="broken"):
            await batcher.logits("m", [text(-1)])
        first = await held(batcher, model)
        gone, stays = (asyncio.create_task(batcher.logits("m", [text(n)])) for n in (1, 2))
        await asyncio.sleep(0.01)
        gone.cancel()
        model.go.set()
        await first
        assert (await stays).tolist() == [[2, 4]] and batcher.waiting == 0
        await batcher.stop()

    asyncio.run(main())


def test_a_long_request_is_cut_into_batches_that_all_workers_share() -> None:
    async def main() -> None:
        model = Model()
        model.go.clear()
        batcher = Batcher({"m": model}, max_waiting=100, max_workers=2)
        batcher.start()
        texts = [text(n, BATCH_TOKENS // 4 + n) for n in range(12)]
        asked = asyncio.create_task(batcher.logits("m", texts))
        while len(model.seen) < 2:
            await asyncio.sleep(0.001)
        assert batcher.workers == 2 and len(model.seen) == 2
        model.go.set()
        assert (await asked).tolist() == [[n, BATCH_TOKENS // 4 + n] for n in range(12)]
        assert all(tokens <= BATCH_TOKENS for tokens in model.seen) and batcher.waiting == 0
        await batcher.stop()

    asyncio.run(main())


def test_workers_grow_with_the_queue_and_shrink_when_nothing_waits() -> None:
    async def main() -> None:
        model = Model()
        batcher = Batcher({"m": model}, max_waiting=1000, max_workers=3)
        batcher.start()
        assert batcher.workers == 0
        tasks = [await held(batcher, model)]
        for expected in (2, 3, 3, 3):
            tasks.append(asyncio.create_task(batcher.logits("m", [text(expected)])))
            while len(model.seen) < expected:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.01)
            assert batcher.workers == expected and len(model.seen) == expected
        model.go.set()
        await asyncio.gather(*tasks)
        await asyncio.sleep(0.01)
        assert batcher.workers == 0 and model.seen == [4, 4, 4, 8]
        await batcher.stop()

    asyncio.run(main())


def test_a_batch_is_of_one_model_and_nobody_is_overtaken_for_ever() -> None:
    async def main() -> None:
        first, second = Model(), Model()
        batches: list[tuple[int, int]] = []
        batcher = Batcher(
            {"m": first, "n": second}, 1000, seen=lambda texts, tokens, _: batches.append((texts, tokens))
        )
        batcher.start()
        tasks = [await held(batcher, first)]
        for number, name in enumerate("mnnmn"):
            tasks.append(asyncio.create_task(batcher.logits(name, [text(number, number + 1)])))
        await asyncio.sleep(0.01)
        first.go.set()
        found = [one.tolist() for one in await asyncio.gather(*tasks)]
        assert found == [[[0, 4]], *([[n, n + 1]] for n in range(5))]
        assert first.seen == [4, 1 + 4] and second.seen == [2 + 3 + 5]
        assert batches == [(1, 4), (2, 5), (3, 10)]
        await batcher.stop()

    asyncio.run(main())


def test_a_batch_has_the_one_that_waits_longest_and_those_of_its_length() -> None:
    async def main() -> None:
        model, batches = Model(), list[list[int]]()

        def noting(ids: Sequence[Sequence[int]]) -> np.ndarray:
            batches.append([len(one) for one in ids])
            return model(ids)

        batcher = Batcher({"m": noting}, max_waiting=10_000, max_workers=2)
        batcher.start()
        held_back = [await held(batcher, model), await held(batcher, model)]
        lengths = [30, 5, 29, 6, 31, 5, 28]
        tasks = [asyncio.create_task(batcher.logits("m", [text(1, length)])) for length in lengths]
        await asyncio.sleep(0.01)
        model.go.set()
        await asyncio.gather(*held_back, *tasks)
        # 134 tokens wait: half of them for the first worker, and the other takes 64 of the rest.
        assert sorted(map(sorted, batches[2:])) == [[5, 5, 28], [6, 29, 30], [31]]
        await batcher.stop()

    asyncio.run(main())


def test_a_worker_takes_its_share_of_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, take = [], Batcher._next

    def noting(batcher: Batcher) -> Any:
        batch = take(batcher)
        taken.append(sum(job.tokens for job in batch))
        return batch

    monkeypatch.setattr(Batcher, "_next", noting)

    async def main() -> None:
        model = Model()
        batcher = Batcher({"m": model}, max_waiting=10 * BATCH_TOKENS, max_workers=2)
        batcher.start()
        held_back = [await held(batcher, model), await held(batcher, model)]
        tasks = [asyncio.create_task(batcher.logits("m", [text(n, 100)])) for n in range(12)]
        await asyncio.sleep(0.01)
        model.go.set()
        await asyncio.gather(*held_back, *tasks)
        # 1,200 tokens wait: half for each, but no more than a batch holds; then half of the other 700.
        assert taken[:4] == [4, 4, 500, 300] and sum(model.seen) == 1208
        assert batcher._queued == 0
        await batcher.stop()

    asyncio.run(main())
