"""How many floating point operations a model did."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

__all__ = ["FlopCount"]


class FlopCount:
    """Counts a model's floating point operations (a multiply-add is two) by torch's own counter.

    The counter intercepts every operator, which costs time; the shapes are few (see `fedtune.data.batches`)
    and an operation's count depends on shapes alone, so each is counted the first time it occurs and looked
    up afterwards.
    """

    def __init__(self) -> None:
        self.total = 0
        self._known: dict[Hashable, int] = {}
        self._adding = threading.Lock()

    def knows(self, shape: Hashable) -> bool:
        """Whether `counting` of it looks up; where it counts, no other thread may use the model."""
        return shape in self._known

    @contextmanager
    def counting(self, shape: Hashable) -> Iterator[None]:
        """Adds what the block costs; blocks with the same `shape` must do the same operations."""
        if shape in self._known:
            yield
        else:
            from torch.utils.flop_counter import FlopCounterMode

            with FlopCounterMode(display=False) as counter:
                yield
            self._known[shape] = counter.get_total_flops()
        with self._adding:
            self.total += self._known[shape]
