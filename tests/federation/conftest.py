"""A tiny federation on disk, made once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.config.schema import Config
from fedtune.federation.server import loop
from tests.support import tiny_federation


@pytest.fixture(scope="session")
def tiny_parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(model folder, data folder)."""
    tiny_federation.one_thread()
    folder = tmp_path_factory.mktemp("tiny")
    return tiny_federation.make_model(folder / "model"), tiny_federation.make_data(folder / "data")


@pytest.fixture
def tiny(tiny_parts: tuple[Path, Path]) -> Callable[..., Config]:
    """Makes a configuration of the tiny federation; see `tiny_federation.make_config`."""

    def make(**changes: Any) -> Config:
        return tiny_federation.make_config(*tiny_parts, **changes)

    return make


@pytest.fixture
def adapters(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The server's adapter after each round."""
    seen: list[np.ndarray] = []
    real = loop._step

    def noting(*arguments: Any) -> np.ndarray:
        seen.append(real(*arguments))
        return seen[-1]

    monkeypatch.setattr(loop, "_step", noting)
    return seen
