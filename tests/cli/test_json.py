"""`--json`: on every command that answers, and each answer has the shape that `answers.json` promises."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest

from fedtune.cli.app import command, main
from fedtune.deploy.client import Status
from fedtune.errors import DataError
from fedtune.runs.record import Result
from fedtune.serving.model import ExportedModel
from tests.support.synthetic import write_grid

SCHEMAS: dict[str, Any] = json.loads((resources.files("fedtune.cli") / "answers.json").read_text())
GO_ON = {"serve", "follow"}  # have no answer: they go on until they are stopped


def check(name: str, value: Any) -> None:
    schema = {"$ref": f"#/$defs/{name}", "$defs": SCHEMAS["$defs"]}
    jsonschema.Draft202012Validator(schema).validate(value)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Any:
    """What a command prints with --json, held to the schema of that name."""

    def call(name: str, *words: str, status: int = 0) -> Any:
        with pytest.raises(SystemExit) as left:
            main([*words, "--json"])
        said = capsys.readouterr()
        assert left.value.code == status, said.err
        found = json.loads(said.out)
        check(name, found)
        return found

    return call


def words(world: dict[str, Path]) -> list[str]:
    return [
        "data=files", f"data.path={world['data']}", "data.site=site", "data.labels=[negative,positive]",
        "data.test_split=test", "data.test_public=true", "data.declared_size=120", "data.max_length=16",
        "partition=natural", f"model.name={world['model']}", "model.quantization=none", "adapter=head",
        "train.precision=fp32", "train.local_steps=1", "train.sample_rate=0.3", "federation.num_rounds=1",
        "device=cpu",
    ]  # fmt: skip


def test_the_schemas_are_schemas() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMAS)


def test_every_command_has_it() -> None:
    def leaves(group: click.Command, name: str = "") -> list[tuple[str, click.Command]]:
        if not isinstance(group, click.Group):
            return [(name, group)]
        return [leaf for key, one in group.commands.items() for leaf in leaves(one, f"{name} {key}".strip())]

    without = {
        name
        for name, one in leaves(command())
        if not any("--json" in parameter.opts for parameter in one.params)
    }
    assert without == GO_ON
    assert {name for name, _ in leaves(command())} - GO_ON <= set(SCHEMAS["$defs"])


@pytest.mark.slow
def test_runs(world: dict[str, Path], answer: Any) -> None:
    made = answer("run", "run", *words(world), "hydra.run.dir=one")
    assert made["epsilon"] <= 8 and Path(made["run_dir"], "record.json").is_file()
    swept = answer("run -m", "run", "-m", *words(world), "seed=1,2", "hydra.sweep.dir=two")
    assert len(swept["runs"]) == 2 and swept["failures"] == {}
    assert answer("run --show-config", "run", "--show-config", "seed=5")["seed"] == 5
    checked = answer("data check", "data", "check", *words(world))
    assert checked == answer("data check", "run", "--dry-run", *words(world))
    assert checked["data"]["train"]["records"] == 120
    assert len(answer("budget show", "budget", "show")) == 4
    assert len(answer("budget history", "budget", "history")) == 12
    assert answer("budget verify", "budget", "verify")[0]["problems"] == []
    # Less than what is spent already: said, for whoever set it may think that runs go on.
    (kept,) = answer("budget set", "budget", "set", "--epsilon", "0.1", "--delta", "1e-5")
    assert kept["over"] == ["files"]
    (kept,) = answer("budget set", "budget", "set", "--epsilon", "900", "--delta", "1e-5")
    assert kept["over"] == []


@pytest.mark.slow
def test_a_site_that_refuses_is_named_wherever_its_runs_are_told_of(
    world: dict[str, Path], answer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*given: str, status: int = 0) -> str:
        with pytest.raises(SystemExit) as left:
            main(list(given))
        found = capsys.readouterr()
        assert left.value.code == status, found.err
        return found.out + found.err

    def with_texts_of(time: str) -> list[str]:
        """Texts of their own for each time, but for those of site-1, which are the same each time."""
        folder = Path(time)
        folder.mkdir()
        shutil.copy(world["data"] / "test.csv", folder)
        rows = [f"{('good', 'bad')[i // 4 % 2]} {'both' if i % 4 == 1 else time} {i},"
                f"{('positive', 'negative')[i // 4 % 2]},site-{i % 4}\n" for i in range(160)]  # fmt: skip
        (folder / "train.csv").write_text("text,label,site\n" + "".join(rows))
        return [word if "data.path" not in word else f"data.path={folder}" for word in words(world)]

    said("run", *with_texts_of("before"), "hydra.run.dir=first")
    answer("budget set", "budget", "set", "--epsilon", "9", "--delta", "1e-5")
    alone = said("run", *with_texts_of("now"), "hydra.run.dir=second", status=3)
    assert "Partial (exit status 3): site-1 took no part." in alone and "left out" in alone
    assert [one["node"] for one in Result("second").record["federation"]["left_out"]] == ["site-1"]
    grid = [*with_texts_of("later"), "privacy.epsilon=2,3", "hydra.sweep.dir=sweep"]
    sweep = said("run", "-m", *grid, status=3)
    assert sweep.count("without site-1, which took no part") == 2 and "site-1 took no part" in sweep
    statement = said("statement", "sweep/0")
    assert any("site-1" in line and "(took no part)" in line for line in statement.splitlines())
    report = answer("report", "report", "sweep")
    assert report["groups"][0]["caveats"][0].startswith("site-1 took no part in ")
    assert "site-1 took no part" in said("report", "sweep")
    assert "site-1" in Path(report["page"]).read_text() and ",site-1," in Path(report["csv"]).read_text()


@pytest.mark.slow
def test_what_a_run_says(run_dir: Path, answer: Any) -> None:
    assert answer("statement", "statement", str(run_dir))["private"] is True
    (one,) = answer("predict", "predict", str(run_dir), "good film")
    assert one["label"] in ("negative", "positive")
    Path("x.csv").write_text("text\ngood film\n\nbad\n")
    told = answer(
        "predict --output",
        "predict",
        str(run_dir),
        "--input",
        "x.csv",
        "--column",
        "text",
        "--output",
        "y.csv",
    )
    assert told == {"output": "y.csv", "answers": len(Path("y.csv").read_text().splitlines()) - 1}
    assert answer("audit", "audit", str(run_dir), "--canaries", "40")["violated"] is False


@pytest.mark.slow
def test_reports_and_plans(tmp_path: Path, answer: Any) -> None:
    write_grid(tmp_path / "grid", seeds=2, epsilon=[1.0, 8.0])
    made = answer("report", "report", str(tmp_path / "grid"))
    assert Path(made["page"]).is_file() and made["groups"][0]["advice"].startswith("Choose epsilon")
    assert answer("plan", "plan", str(tmp_path / "grid"), "--accuracy", "0.5")[0]["met"] is True
    assert answer("plan", "plan", str(tmp_path / "grid"), "--accuracy", "0.99")[0]["relaxations"]


@pytest.mark.slow
def test_exported_models(exported: Path, world: dict[str, Path], answer: Any) -> None:
    about = json.loads((exported / "export.json").read_text())
    check("export", {"folder": str(exported), **about})
    (one,) = answer("predict", "predict", str(exported), "good film")
    assert one["label"] in about["labels"]
    with pytest.raises(DataError, match="single texts"):
        ExportedModel(exported).predict([("a", "b")])
    found = answer("evaluate", "evaluate", str(exported), str(world["data"] / "test.csv"))
    assert found["data"] and len(found["confusion"]) == 2
    private = ["evaluate", str(exported), str(world["data"] / "test.csv"), "--epsilon", "5"]
    assert answer("evaluate --epsilon", *private)["privacy"]["unit"] == "record"
    assert answer("key", "key", "clinic-1", "--keys", "keys.txt")["name"] == "clinic-1"


@pytest.mark.slow
def test_compressed_models(tmp_path: Path, answer: Any) -> None:
    measured = {
        "texts_per_second": 100.0, "accuracy": 0.8, "difference": 0.0, "difference_error": 0.01,
        "p99_ms": 4.0, "bytes": 1000, "memory_bytes": 5000, "labels_equal": 1.0,
    }  # fmt: skip
    made = {
        "schema": 1, "fedtune": "0", "made": "2026-01-01", "run": "r", "base": {}, "privacy": None,
        "settings": {"threads": 1}, "texts": {}, "processor": "one", "original": measured,
        "steps": [{"step": "prune", **measured}], "formats": {"onnx": measured},
    }  # fmt: skip
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "compression.json").write_text(json.dumps(made))
    check("compress", {"folder": "small", **made})
    assert len(answer("price", "price", "small")["variants"]) == 3
    assert answer("advise", "compress", "--advise", "small", "--within", "1")["chosen"]


@pytest.mark.slow
def test_a_real_federation(tmp_path: Path, world: dict[str, Path], answer: Any) -> None:
    Path("federation.yaml").write_text("name: wards\nserver: 127.0.0.1:9443\nsites: [east, west]\n")
    assert answer("provision", "provision", "federation.yaml", "-o", "wards")["new"]
    site = tmp_path / "site"
    site.mkdir()
    (site / "node.yaml").write_text(
        f"federation: wards\nsite: east\nserver: 127.0.0.1:9443\nca: {tmp_path}/wards/server/ca.crt\n"
        f"key: node.key\nledger: ledger.sqlite\naudit_log: audit.jsonl\n"
        f"data: {{source: files, path: {world['data']}, name: visits, declared_size: 120}}\n"
        "budget: {epsilon: 8, delta: 1.0e-5}\n"
    )
    made = answer("node", "node", "init", "--config", str(site / "node.yaml"))
    told = ("--fingerprint", made["fingerprint"])
    enrolled = answer("server", "server", "wards/server", "--enrol", made["line"], *told)
    assert enrolled == {"enrolled": "east", "fingerprint": made["fingerprint"]}
    assert answer("server", "server", "wards/server", "--revoke", "east") == {"revoked": "east"}
    alice = answer("operator", "operator", "wards/server", "--name", "alice")
    told = ("--fingerprint", alice["fingerprint"], "--rights", "read")
    made = answer("server", "server", "wards/server", "--operator", alice["line"], *told)
    assert made == {"operator": "alice", "rights": ["read"]}
    assert answer("server", "server", "wards/server", "--trail")["whole"] is True
    assert answer("node", "node", "approve", "--config", str(site / "node.yaml")) == {"runs": []}
    check("status", {**asdict(Status("a", (), ())), "sites": [], "runs": [], "waiting": [], "warnings": []})
