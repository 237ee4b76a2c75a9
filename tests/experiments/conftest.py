"""One small private run, made once, whose folder the tests of this package read; and records made by hand."""

from __future__ import annotations

import copy
import io
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tiny_federation as tiny


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a random model and of made-up data."""
    tiny.one_thread()
    root = tmp_path_factory.mktemp("world")
    return {"model": tiny.make_model(root / "model"), "data": tiny.make_data(root / "data")}


@pytest.fixture(autouse=True)
def no_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    """codecarbon takes seconds to start; `tests/cost` tests it."""
    from fedtune.cost import meter

    monkeypatch.setattr(
        meter.importlib.util, "find_spec", _without_codecarbon(meter.importlib.util.find_spec)
    )


def _without_codecarbon(find_spec: Any) -> Any:
    return lambda name, *rest: None if name == "codecarbon" else find_spec(name, *rest)


@pytest.fixture(scope="session")
def finished(world: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(run folder, what was printed) of one finished private run."""
    from fedtune.cost import meter
    from fedtune.experiments.run import run

    folder, output = tmp_path_factory.mktemp("runs") / "first", io.StringIO()
    config = tiny.private(tiny.make_config(world["model"], world["data"], output=str(folder)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meter.importlib.util, "find_spec", _without_codecarbon(meter.importlib.util.find_spec))
        run(config, console=Console(file=output, width=80, highlight=False))
    return folder, output.getvalue()


@pytest.fixture
def record(finished: tuple[Path, str]) -> dict[str, Any]:
    """A copy of the finished run's record, to be changed at will."""
    from fedtune.experiments.record import read

    return copy.deepcopy(read(finished[0]))
