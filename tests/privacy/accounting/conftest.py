"""How much work the accountant does, counted rather than timed."""

from __future__ import annotations

from collections.abc import Callable, Sized
from typing import Any

import pytest

from fedtune.privacy.accounting import epsilon, pld
from tests.support.work import Points


@pytest.fixture
def pld_points(monkeypatch: pytest.MonkeyPatch) -> Points:
    """Counts from here to the end of the test; what is cached in the process is computed anew."""
    points = Points()

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(values: Sized, *arguments: Any) -> Any:
            points.number += len(values)
            return function(values, *arguments)

        return counted

    for name in ("_divergences", "_power"):
        monkeypatch.setattr(pld, name, counting(getattr(pld, name)))
    pld.step_distribution.cache_clear()
    epsilon._epsilon.cache_clear()
    return points
