"""Runs without codecarbon, which takes seconds to start; `tests/cost` tests it."""

from __future__ import annotations

import pytest

from tests.support.tiny_federation import without_codecarbon


@pytest.fixture(autouse=True)
def no_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    """codecarbon takes seconds to start; `tests/cost` tests it."""
    from fedtune.cost import meter

    monkeypatch.setattr(meter.importlib.util, "find_spec", without_codecarbon(meter.importlib.util.find_spec))
