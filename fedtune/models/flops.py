"""Counts floating point operations by torch's own counter, once for each shape.

The counter intercepts every operator, which costs time; the shapes are few (see `data.batches`) and an
operation's count depends on shapes alone, so each is counted the first time it occurs and looked up
afterwards.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager

__all__ = ["FlopCount"]


class FlopCount:
    """Running total of one model; `total` is in floating point operations (a multiply-add is two)."""

    def __init__(self) -> None:
        self.total = 0
        self._known: dict[Hashable, int] = {}

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
        self.total += self._known[shape]
