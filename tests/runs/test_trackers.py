"""Trackers: what each of them wrote is read back with its own tools and compared with the record."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from fedtune.config.convert import from_dict
from fedtune.config.schema import Config, TrackerConfig
from fedtune.errors import ConfigError
from fedtune.federation.events import RoundSummary
from fedtune.runs import record as records
from fedtune.runs import summary, trackers
from fedtune.runs.run import run
from tests.support import tiny_federation as tiny
from tests.support.synthetic import make_record

NAMES = ("tensorboard", "mlflow", "wandb")
READ_BACK = ["tensorboard", "mlflow", pytest.param("wandb", marks=pytest.mark.slow)]
ROUND = ("accuracy", "loss", "epsilon", "bytes_up", "bytes_down", "seconds")


@pytest.fixture
def record() -> dict[str, Any]:
    """A whole record of a private run, without a run: these tests are about what is written of it."""
    made = make_record(epsilon=8.0)
    for one in made["metrics"]["by_round"]:
        for name, value in (("loss", 0.5), ("bytes_up", 1000), ("bytes_down", 4000), ("seconds", 2.5)):
            one.setdefault(name, value)
    return made


def config_of(record: dict[str, Any], **tracker: Any) -> Config:
    config = from_dict(record["config"])
    config.tracker = TrackerConfig(**tracker)
    return config


def rounds_of(record: dict[str, Any]) -> list[RoundSummary]:
    return [
        RoundSummary(num_rounds=record["federation"]["rounds"], dropped=[], **one)
        for one in record["metrics"]["by_round"]
    ]


def result_of(record: dict[str, Any]) -> Any:
    plan = SimpleNamespace(delta=record["privacy"]["delta"], is_private=lambda: True)
    return SimpleNamespace(run=record["run"]["id"], plan=plan, history=rounds_of(record))


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("tensorboard", "tensorboard --logdir '{}/a run/tensorboard'"),
        ("mlflow", "mlflow ui --backend-store-uri '{}/a run/mlflow'"),
        ("wandb", "wandb sync '{}/a run'/wandb/offline-run-*"),
    ],
)
def test_where_a_tracker_wrote_is_said(
    record: dict[str, Any], tmp_path: Path, name: str, command: str
) -> None:
    tracked = trackers.where_written(config_of(record, name=name), tmp_path / "a run")
    assert tracked == command.format(tmp_path)
    console = Console(file=io.StringIO(), width=200)
    summary.summary(record, tmp_path, console, tracked)
    assert tracked in console.file.getvalue()  # type: ignore[attr-defined]
    assert trackers.where_written(config_of(record), tmp_path) is None


def told(record: dict[str, Any], name: str, folder: Path, run_dir: Path, **options: Any) -> None:
    """Tells a tracker of a finished run, as the server loop and `run.finish` do."""
    config = config_of(record, name=name, folder=str(folder))
    tracker = trackers.open_tracker(config, run_dir)
    first = options.get("first", 0)
    info = {"run": record["run"]["id"], "attempt": options.get("attempt", 1)}
    tracker.on_start({**info, "delta": record["privacy"]["delta"]})
    for one in rounds_of(record)[first : options.get("last")]:
        tracker.on_round(one)
    if options.get("last") is None:
        tracker.finish(record, result_of(record), "# A statement\n")
    else:
        tracker.close()


def read_tensorboard(folder: Path) -> dict[str, Any]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    scalars: dict[str, dict[int, float]] = {}
    texts = {}
    for tag in events.Tags()["tensors"]:
        for event in events.Tensors(tag):
            value = make_ndarray(event.tensor_proto)
            if value.dtype == object:
                texts[tag.removesuffix("/text_summary")] = value.flatten()[0].decode()
            else:
                scalars.setdefault(tag, {})[event.step] = float(value)
    rows = [row.strip("| ").split(" | ") for row in texts.pop("config").splitlines()[2:]]
    params = {row[0]: row[1] for row in rows if len(row) == 2}
    files = {name: text.strip("`\n") for name, text in texts.items()}
    return {"numbers": scalars, "params": params, "files": files}


def read_mlflow(folder: Path) -> dict[str, Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=folder.as_uri())
    experiment = client.get_experiment_by_name("fedtune")
    (made,) = client.search_runs([experiment.experiment_id])
    numbers = {
        name: {one.step: one.value for one in client.get_metric_history(made.info.run_id, name)}
        for name in made.data.metrics
    }
    artifacts = folder / experiment.experiment_id / made.info.run_id / "artifacts"
    files = {path.name: path.read_text() for path in artifacts.iterdir()}
    assert made.info.status == "FINISHED"
    return {"numbers": numbers, "params": dict(made.data.params), "files": files}


# In a process of its own: with torch loaded, importing wandb takes too long for a test.
_WANDB = """
import json, sys
from pathlib import Path
from fedtune.runs.trackers import WandbWriter, import_library
import_library("wandb")
folder, writer = Path(sys.argv[1]), None
for method, *arguments in json.load(sys.stdin):
    if method == "open":
        writer = WandbWriter(folder, "fedtune")
    else:
        getattr(writer, method)(*arguments)

import wandb
wandb.teardown()  # what it does when a process ends: only then is every file whole

from wandb.proto import wandb_internal_pb2 as pb
from wandb.sdk.internal.datastore import DataStore
numbers, params, ids = {}, {}, set()
for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
    store = DataStore()
    store.open_for_scan(str(path))
    while (data := store.scan_data()) is not None:
        row = pb.Record()
        row.ParseFromString(data)
        if row.HasField("run"):
            ids.add(row.run.run_id)
            params.update({one.key: json.loads(one.value_json) for one in row.run.config.update})
        rows = row.history.item if row.HasField("history") else row.summary.update
        for item in rows:
            name, value = item.key or ".".join(item.nested_key), json.loads(item.value_json)
            if name[0] != "_" and isinstance(value, (int, float)):
                step = row.history.step.num if row.HasField("history") else 6
                numbers.setdefault(name, {})[step] = value
(latest,) = [p.parent for p in folder.glob("wandb/offline-run-*/files/record.json")]
files = {path.name: path.read_text() for path in latest.iterdir()}
print("FOUND", json.dumps({"numbers": numbers, "params": params, "files": files, "ids": sorted(ids)}))
"""


def read_wandb(folder: Path) -> dict[str, Any]:
    calls = (folder / "calls.json").read_text()
    (folder / "calls.json").unlink()
    done = subprocess.run(
        [sys.executable, "-c", _WANDB, str(folder)], input=calls, capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert lines, done.stderr
    found: dict[str, Any] = json.loads(lines[0][6:])
    assert len(found["ids"]) == 1
    steps = {name: {int(step): value for step, value in by.items()} for name, by in found["numbers"].items()}
    return found | {"numbers": steps}


class _Later:
    """Writes down what it is told, for the process that has wandb."""

    def __init__(self, folder: Path, project: str) -> None:
        folder.mkdir(exist_ok=True)
        self._path = folder / "calls.json"
        self._add("open")

    def _add(self, *call: Any) -> None:
        before = json.loads(self._path.read_text()) if self._path.exists() else []
        self._path.write_text(json.dumps([*before, call]))

    def __getattr__(self, method: str) -> Any:
        return lambda *arguments, **named: self._add(method, *arguments, *named.values())


READ = {"tensorboard": read_tensorboard, "mlflow": read_mlflow, "wandb": read_wandb}


def everything_written(folder: Path) -> bytes:
    return b"\n".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())


@pytest.mark.slow
@pytest.mark.parametrize("name", READ_BACK)
def test_a_tracker_has_the_numbers_of_the_record(
    name: str, record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trackers.WRITERS, "wandb", _Later)
    run_dir = tmp_path / "private-folder"
    record["config"]["output"] = str(run_dir)
    record["config"]["data"]["path"] = str(tmp_path / "hospital-data")
    record["federation"]["notices"] = [f"a broken checkpoint in {run_dir} was passed over"]
    record["metrics"]["per_site"]["süd & west"] = {"accuracy": 0.5, "num_records": 4}
    told(record, name, tmp_path / "tracker", run_dir)
    found = READ[name](tmp_path / "tracker")

    for one in record["metrics"]["by_round"]:
        for key in ROUND:
            assert found["numbers"][f"round/{key}"][one["round"]] == pytest.approx(one[key]), key
        assert found["numbers"]["round/delta"][one["round"]] == record["privacy"]["delta"]
    expected = trackers.record_numbers(record)
    assert expected["record/privacy.epsilon"] == record["privacy"]["epsilon"]
    assert expected["record/cost.money.total"] == record["cost"]["money"]["total"]
    assert expected["record/privacy.per_node.movies.epsilon"] == record["privacy"]["per_node"][1]["epsilon"]
    assert len(expected) > 60
    clean = trackers._mlflow_name if name == "mlflow" else str
    for key, value in expected.items():
        assert found["numbers"][clean(key)] == {6: pytest.approx(value)}, key
    assert found["params"]["privacy.epsilon"] == "8.0"
    assert found["params"]["train.learning_rate"] == str(record["config"]["train"]["learning_rate"])
    assert not {"output", "data.path"} & set(found["params"])

    kept = json.loads(found["files"]["record.json"])
    assert kept["privacy"] == record["privacy"] and kept["metrics"] == record["metrics"]
    assert "A statement" in found["files"]["statement.md"]
    assert kept["config"]["output"] in ("RUN_DIR", "private-folder")
    written = everything_written(tmp_path / "tracker").replace(str(tmp_path / "tracker").encode(), b"")
    for private in ("private-folder/", "hospital-data/", str(tmp_path / "hospital-data")):
        assert private.encode() not in written


@pytest.mark.slow
@pytest.mark.parametrize("name", READ_BACK)
def test_a_resumed_run_goes_on_where_it_was(
    name: str, record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(trackers.WRITERS, "wandb", _Later)
    told(record, name, tmp_path / "tracker", tmp_path / "run", last=2)
    told(record, name, tmp_path / "tracker", tmp_path / "run", first=2, attempt=2)
    found = READ[name](tmp_path / "tracker")
    assert set(found["numbers"]["round/accuracy"]) == {1, 2, 3, 4, 5, 6}
    assert found["params"]["privacy.epsilon"] == "8.0"


@pytest.mark.parametrize("name", NAMES)
def test_one_that_is_not_installed_is_refused_with_the_line_that_installs_it(
    name: str, world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    config = tiny.make_config(world["model"], world["data"], output=str(tmp_path / "run"))
    config.tracker.name = name
    with pytest.raises(ConfigError) as raised:
        run(config, console=Console(file=io.StringIO()))
    assert f"pip install 'fedtune[{name}]'" in str(raised.value)
    assert not (tmp_path / "run").exists()


class Memory:
    """A writer that remembers, and fails where it is told to."""

    calls: list[tuple[Any, ...]]
    fail = ""

    def __init__(self, folder: Path, project: str) -> None:
        type(self).calls = [("open", folder, project)]

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)

        def call(*arguments: Any, **named: Any) -> None:
            type(self).calls.append((method, *arguments, *named.values()))
            if method == type(self).fail:
                raise OSError("no space left")

        return call


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> type[Memory]:
    monkeypatch.setitem(trackers.WRITERS, "tensorboard", Memory)
    monkeypatch.setattr(Memory, "fail", "")
    return Memory


def tracked(world: dict[str, Path], folder: Path) -> Config:
    return tiny.private(
        tiny.make_config(
            world["model"], world["data"], output=str(folder), tracker__name="tensorboard",
            federation__num_rounds=2, train__local_steps=1,
        )
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_tells_its_tracker(world: dict[str, Path], tmp_path: Path, memory: type[Memory]) -> None:
    folder = tmp_path / "run"
    made = records.read(run(tracked(world, folder), console=Console(file=io.StringIO())))
    assert memory.calls[0] == ("open", folder / "tensorboard", "fedtune")
    assert [call[0] for call in memory.calls[1:]] == [
        "start",
        "round",
        "round",
        "summary",
        "text",
        "text",
        "close",
    ]
    _, run_id, params, resumed = memory.calls[1]
    assert run_id == made["run"]["id"] and not resumed and params["privacy.epsilon"] == "8.0"
    assert memory.calls[3][2]["round/epsilon"] == pytest.approx(made["privacy"]["epsilon"])
    assert memory.calls[4][2] == trackers.record_numbers(made)
    assert memory.calls[6][1:] == ("statement.md", (folder / "statement.md").read_text())
    assert memory.calls[-1] == ("close", False)
    assert str(tmp_path) not in json.dumps(memory.calls[1:], default=str)


@pytest.mark.parametrize("where", ["open", "start", "round", "summary", "close"])
def test_a_tracker_that_fails_is_switched_off_and_the_run_goes_on(
    where: str, record: dict[str, Any], tmp_path: Path, memory: type[Memory], caplog: pytest.LogCaptureFixture
) -> None:
    memory.fail = where
    if where == "open":
        (tmp_path / "tracker").write_text("in the way")
        trackers.WRITERS["tensorboard"] = _Unopened
    with caplog.at_level(logging.WARNING):
        told(record, "tensorboard", tmp_path / "tracker", tmp_path / "run")
    warnings = [one.getMessage() for one in caplog.records if "tracker=tensorboard" in one.getMessage()]
    assert len(warnings) == 1 and "OSError" in warnings[0] and "the run goes on" in warnings[0]
    if where != "open":
        assert memory.calls[-1][0] == where  # nothing was asked of it afterwards


class _Unopened:
    def __init__(self, folder: Path, project: str) -> None:
        raise OSError("in the way")


def test_a_run_that_was_not_watched_is_told_of_whole(
    record: dict[str, Any], tmp_path: Path, memory: type[Memory]
) -> None:
    """`flwr run`: Flower's ServerApp runs the rounds, and only the end comes by here."""
    tracker = trackers.open_tracker(config_of(record, name="tensorboard"), tmp_path)
    tracker.finish(record, result_of(record), "statement")
    assert [call[0] for call in memory.calls].count("round") == 6
    assert memory.calls[1][0] == "start" and memory.calls[-1] == ("close", False)


def test_an_interrupted_run_is_closed_as_failed(
    record: dict[str, Any], tmp_path: Path, memory: type[Memory]
) -> None:
    tracker = trackers.open_tracker(config_of(record, name="tensorboard"), tmp_path)
    tracker.on_start({"run": "r", "attempt": 1, "delta": None})
    tracker.close()
    tracker.close()
    assert memory.calls[-1] == ("close", True) and len(memory.calls) == 3


def test_without_privacy_epsilon_and_delta_are_not_made_up(
    record: dict[str, Any], tmp_path: Path, memory: type[Memory]
) -> None:
    tracker = trackers.open_tracker(config_of(record, name="tensorboard"), tmp_path)
    tracker.on_start({"run": "r", "attempt": 1, "delta": None})
    tracker.on_round(RoundSummary(1, 3, 0.5, accuracy=float("nan"), dropped=[("a", "late")]))
    values = memory.calls[-1][2]
    assert not {"round/epsilon", "round/delta", "round/accuracy"} & set(values)
    assert values["round/dropped"] == 1


def test_no_tracker_is_the_default_and_writes_nothing(record: dict[str, Any], tmp_path: Path) -> None:
    told(record, "none", tmp_path / "tracker", tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_wandb_stays_offline_whatever_the_environment_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    asked: dict[str, Any] = {}
    wandb = SimpleNamespace(init=lambda **named: asked.update(named), Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    trackers.WandbWriter(tmp_path, "fedtune").start("r", {}, False)
    assert asked["mode"] == "offline" and asked["id"] == "r"
    quiet = asked["settings"]
    assert quiet["x_disable_stats"] and quiet["x_disable_meta"] and quiet["x_disable_machine_info"]
    assert quiet["console"] == "off" and not quiet["save_code"] and quiet["disable_git"]
