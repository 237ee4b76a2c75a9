"""A run in which sites have parts of their own: what of them is measured, shown, saved, and what stays."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import tests.support.tiny_federation as tiny
from fedtune import api
from fedtune.config.schema import AdapterConfig
from fedtune.errors import RecordError
from fedtune.report.collect import run_of
from fedtune.runs import summary
from fedtune.runs.record import read
from fedtune.runs.run import run
from tests.support.golden import Golden

NAMES = [f"site-{i}" for i in range(4)]


def made(world: dict[str, Path], folder: Path, **changes: Any) -> tuple[Path, str]:
    settings: dict[str, Any] = {
        "adapter": AdapterConfig(name="head"), "train__personalize": "head", "train__local_steps": 1,
        "train__sample_rate": 1.0, "train__learning_rate": 0.2, "output": str(folder / "run"),
    }  # fmt: skip
    config = tiny.private(tiny.make_config(world["model"], world["data"]))
    for name, value in (settings | changes).items():
        section, _, field = name.partition("__")
        setattr(getattr(config, section) if field else config, field or section, value)
    run(config, console=Console(file=(shown := io.StringIO()), width=80))
    return folder / "run", shown.getvalue()


@pytest.fixture(scope="module")
def public(world: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    return made(world, tmp_path_factory.mktemp("public"), data__public=True, data__declared_size=None)


def test_both_models_of_each_site_are_in_the_record_and_the_summary(public: tuple[Path, str]) -> None:
    metrics = read(public[0])["metrics"]
    rows = metrics["per_site"]
    assert [rows[name]["personal"]["steps"] for name in NAMES] == [3] * 4
    together = sum(row["num_records"] * row["personal"]["accuracy"] for row in rows.values())
    assert metrics["personal"]["accuracy"] == pytest.approx(together / metrics["num_records"])
    assert any(row["personal"]["accuracy"] != row["accuracy"] for row in rows.values())
    table = public[1]
    assert "common model" in table and "with its own part" in table
    for name in NAMES:
        (line,) = [line for line in table.splitlines() if line.split()[:1] == [name]]
        own, common = rows[name]["personal"]["accuracy"], rows[name]["accuracy"]
        assert line.split()[1:] == ["10", f"{100 * common:.1f}", "%", f"{100 * own:.1f}", "%"]
    assert run_of(read(public[0]), public[0], {}).personal == {
        name: rows[name]["personal"]["accuracy"] for name in NAMES
    }


def test_the_saved_model_of_a_site_predicts_as_it_was_measured(
    public: tuple[Path, str], world: dict[str, Path], golden: Golden
) -> None:
    import csv

    with (world["data"] / "test.csv").open(newline="") as file:
        texts = [row for row in csv.DictReader(file) if row["site"] == "site-1"]
    model = api.load(public[0], site="site-1")
    right = [
        one.label == row["label"]
        for one, row in zip(model.predict([r["text"] for r in texts]), texts, strict=True)
    ]
    measured = read(public[0])["metrics"]["per_site"]["site-1"]["personal"]["accuracy"]
    assert sum(right) / len(right) == pytest.approx(measured, abs=0.101)  # a text may lie on the border
    common = api.load(public[0]).predict(["good film"])[0].probability
    assert model.predict(["good film"])[0].probability != pytest.approx(common, abs=1e-4)
    with pytest.raises(RecordError) as raised:
        api.load(public[0], site="nowhere")
    golden(raised)


def test_of_private_data_the_models_of_sites_are_measured_and_not_saved(
    world: dict[str, Path], tmp_path: Path, golden: Golden
) -> None:
    folder, _ = made(world, tmp_path)
    record = read(folder)
    assert all(
        "personal" in record["metrics"]["per_site"][name] for name in NAMES
    )  # the test split is public
    assert not (folder / "personal").exists() and "personal" not in record["artifacts"]
    with pytest.raises(RecordError) as raised:
        api.load(folder, site="site-1")
    golden(raised)


@pytest.mark.slow
def test_nodes_answer_about_the_model_that_they_use(world: dict[str, Path], tmp_path: Path) -> None:
    folder, table = made(world, tmp_path, federation__evaluation="private", federation__evaluation_share=0.3)
    metrics = read(folder)["metrics"]
    assert metrics["evaluation"]["model"] == "personal"
    assert metrics["personal"]["accuracy"] == metrics["accuracy"]
    for row in metrics["per_site"].values():
        assert row["accuracy"] is None and set(row["personal"]) == {"accuracy", "standard_error"}
    assert [one["answers"] for one in read(folder)["privacy"]["per_node"]] == [1] * 4
    (line,) = [line for line in table.splitlines() if line.split()[:1] == ["all"]]
    assert line.split()[2] == "-"  # of the common model nothing is known


def test_a_part_that_was_lost_on_the_way_is_noticed(
    world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.federation.client import app

    train = app._train

    def loses(release: Any, request: Any) -> Any:
        result = train(release, request)
        if request.round == 2 and release.shard.node == "site-2":
            release.place.unlink()
        return result

    monkeypatch.setattr(app, "_train", loses)
    folder, _ = made(world, tmp_path)
    notices = read(folder)["federation"]["notices"]
    assert [notice for notice in notices if "site-2 moved for 1 of its 3 releases" in notice]
    assert json.dumps(notices).count("personal part") == 1


def test_a_record_without_parts_shows_one_column(public: tuple[Path, str]) -> None:
    record = read(public[0])
    record["metrics"]["personal"] = None
    summary.summary(record, public[0], Console(file=(shown := io.StringIO()), width=80))
    assert "with its own part" not in shown.getvalue()
