"""What every test gets: a state folder of its own, a cache shared by the session, no network of the hub.

The environment is set when this file is imported, before any test module imports a library that reads it.
"""

from __future__ import annotations

import atexit
import copy
import io
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from rich.console import Console

import fedtune
from tests.support import tiny_federation as tiny
from tests.support.draws import repeatable
from tests.support.golden import Golden

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    FLWR_TELEMETRY_ENABLED="0",
    FLWR_DISABLE_UPDATE_CHECK="1",
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
    RAY_USAGE_STATS_ENABLED="0",
)
# Models of tests are tiny: threads cost more than they bring, and the cores are busy with other tests.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Subprocesses of tests find the package that is tested, installed or not, from any folder; and no codecarbon,
# which takes seconds to start in each of them and in each run here.
NO_ENERGY = Path(__file__).parent / "support" / "no_energy"
_PACKAGE = str(Path(fedtune.__file__).resolve().parent.parent)
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(NO_ENERGY), _PACKAGE, os.environ.get("PYTHONPATH")])
)
sys.modules["codecarbon"] = None  # type: ignore[assignment]

# The same examples in every session, so that a change is what makes a test fail; no clock, for it is shared.
# HYPOTHESIS_PROFILE=search draws others, and more of them.
settings.register_profile("tests", derandomize=True, deadline=None, database=None, max_examples=40)
settings.register_profile("search", deadline=None, database=None, max_examples=2_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "tests"))

# Fixtures of a module or the session run before any function's, so there is a home from the start.
_HOME = Path(tempfile.mkdtemp(prefix="fedtune-tests-"))
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ["FEDTUNE_HOME"] = str(_HOME)
(_HOME / "state").mkdir(mode=0o700)
# One cache for all processes of the session (pytest-xdist's workers inherit the variable), and for later
# sessions too where FEDTUNE_TEST_CACHE is set by hand: data that was fetched need not be fetched again.
if shared := os.environ.get("FEDTUNE_TEST_CACHE"):
    (_HOME / "cache").symlink_to(Path(shared).absolute(), target_is_directory=True)
else:
    (_HOME / "cache").mkdir(mode=0o700)
    os.environ["FEDTUNE_TEST_CACHE"] = str(_HOME / "cache")


_homes = itertools.count()  # `mktemp` looks through all folders that there are, for each test


def _new_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = folder / "homes" / str(next(_homes))
    home.mkdir(mode=0o700, parents=True)
    (home / "state").mkdir(mode=0o700)
    (home / "cache").symlink_to(_HOME / "cache", target_is_directory=True)
    monkeypatch.setenv("FEDTUNE_HOME", str(home))
    return home


@pytest.fixture(autouse=True)
def fedtune_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh FEDTUNE_HOME: no test sees another's ledgers; the cache is the session's."""
    return _new_home(tmp_path_factory.getbasetemp(), monkeypatch)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """What a test draws from the system's entropy is the same in every session."""
    if item.get_closest_marker("system_entropy"):
        return (yield)
    with repeatable(item.nodeid):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Generator[None, object, object]:
    """What several tests share is the same whichever comes first: its draws, and ledgers that are empty."""
    if fixturedef.scope == "function":
        return (yield)
    with repeatable(f"{fixturedef.baseid} {fixturedef.argname}"), pytest.MonkeyPatch.context() as patch:
        _new_home(_HOME, patch)
        return (yield)


@pytest.fixture(autouse=True)
def everything_published_is_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A field that the door does not know is left out at run time; here it is an error."""
    from fedtune.privacy import publication

    def undeclared(sink: str, path: str) -> None:
        raise AssertionError(f"{path!r} is published through {sink!r} and not declared in publication.SINKS")

    monkeypatch.setattr(publication, "report_undeclared", undeclared)


@pytest.fixture
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    """Holds the text of an error to the one in tests/golden/errors.md."""
    test = request.node.nodeid.removeprefix("tests/").replace("\n", " ")
    return Golden(test, tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a random model and of made-up data."""
    tiny.one_thread()
    root = tmp_path_factory.mktemp("world")
    return {"model": tiny.make_model(root / "model"), "data": tiny.make_data(root / "data")}


@pytest.fixture(scope="session")
def finished(world: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(run folder, what was printed) of one finished private run."""
    from fedtune.runs.run import run

    folder, output = tmp_path_factory.mktemp("runs") / "first", io.StringIO()
    config = tiny.private(tiny.make_config(world["model"], world["data"], output=str(folder)))
    run(config, console=Console(file=output, width=80, highlight=False))
    return folder, output.getvalue()


@pytest.fixture(scope="session")
def run_dir(world: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished private run, with so little noise that its model says both labels."""
    from fedtune.runs.run import run

    folder = tmp_path_factory.mktemp("runs") / "trained"
    config = tiny.make_config(
        world["model"], world["data"], output=str(folder), federation__num_rounds=12, train__learning_rate=0.3
    )
    run(tiny.private(config, epsilon=500.0), console=Console(quiet=True))
    return folder


@pytest.fixture(scope="session")
def exported(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `fedtune export` makes of `run_dir`."""
    from fedtune.export.export import export

    return export(run_dir, tmp_path_factory.mktemp("export") / "model")


@pytest.fixture
def record(finished: tuple[Path, str]) -> dict[str, Any]:
    """A copy of the finished run's record, to be changed at will."""
    from fedtune.runs.record import read

    return copy.deepcopy(read(finished[0]))
