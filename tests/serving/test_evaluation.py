"""`fedtune evaluate` measures what the run measured, and says what is wrong with the data."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from fedtune.errors import ConfigError, DataError, ModelError
from fedtune.runs import record as records
from fedtune.serving.bundle import EXPORT_NAME
from fedtune.serving.evaluation import draw, evaluate, keep, show
from tests.support.golden import Golden


@pytest.mark.parametrize("wanted", ["hf", "onnx", None])
def test_it_measures_what_the_run_measured(
    exported: Path, run_dir: Path, world: dict[str, Path], wanted: str | None
) -> None:
    seen: list[tuple[int, int]] = []
    found = evaluate(
        exported,
        world["data"],
        ["data.site=site"],
        wanted,
        advance=lambda done, whole: seen.append((done, whole)),
    )
    made = records.read(run_dir)["metrics"]
    # The fastest is in int8, where a few of the 40 texts may change sides: the run's noise is drawn anew.
    close = 0.1 if wanted is None else 1e-4
    for name in ("accuracy", "f1_macro", "loss"):
        assert found[name] == pytest.approx(made[name], abs=close)
    assert {site: one["num_records"] for site, one in found["per_site"].items()} == {
        site: one["num_records"] for site, one in made["per_site"].items()
    }
    assert found["format"] == (wanted or "onnx-int8") and found["num_records"] == 40
    assert seen[-1] == (40, 40)
    quality = json.loads((exported / EXPORT_NAME).read_text())["quality"]
    assert found["confusion"] == quality["confusion"] or wanted is None


def test_a_file_by_any_name_with_columns_by_any_name(exported: Path, tmp_path: Path) -> None:
    rows = ["review\tstars", "the film was good\tpositive", "an awful day\tnegative", "sad\t0"]
    (tmp_path / "new.tsv").write_text("\n".join(rows) + "\n")
    found = evaluate(exported, tmp_path / "new.tsv", ["data.text=review", "data.label=stars"])
    assert found["num_records"] == 3 and found["per_class"]["negative"]["num_records"] == 2
    assert found["per_site"] == {} and found["data"] == "new.tsv"


@pytest.mark.slow
def test_it_is_kept_as_json_and_picture(exported: Path, world: dict[str, Path], tmp_path: Path) -> None:
    found = evaluate(exported, world["data"] / "test.csv", ["data.site=site"])
    first, second = keep(found, tmp_path / "new")
    assert json.loads(first.read_text()) == found
    # What is told exactly of texts that may be private is their owner's alone.
    assert [path.stat().st_mode & 0o077 for path in (first, second)] == [0, 0]
    assert second.read_bytes().startswith(b"\x89PNG") and len(second.read_bytes()) > 10_000


@pytest.mark.slow
def test_a_label_that_looks_like_a_formula_is_drawn_as_it_is(exported: Path, world: dict[str, Path]) -> None:
    found = evaluate(exported, world["data"] / "test.csv")
    one, other = found["per_class"].values()
    named = found | {"per_class": {"$x_$": one, "under $100 or over $200": other}}
    assert draw(named).startswith(b"\x89PNG")


def test_what_it_prints(exported: Path, world: dict[str, Path]) -> None:
    found = evaluate(exported, world["data"], ["data.site=site"])
    console = Console(file=io.StringIO(), width=100, highlight=False)
    show(found, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for words in (f"accuracy {found['accuracy']:.1%}", "negative", "site-2", "Saying 'positive' from"):
        assert words in text


def test_a_label_that_the_model_does_not_have(exported: Path, tmp_path: Path, golden: Golden) -> None:
    (tmp_path / "other.csv").write_text("text,label\nthe film was good,happy\nan awful day,negative\n")
    with pytest.raises(DataError) as raised:
        evaluate(exported, tmp_path / "other.csv")
    golden(raised)


@pytest.mark.slow
def test_what_cannot_be_evaluated(
    exported: Path, world: dict[str, Path], tmp_path: Path, golden: Golden
) -> None:
    with pytest.raises(ConfigError) as raised:
        evaluate(exported, world["data"], ["model.name=other"])
    golden(raised)
    with pytest.raises(DataError) as raised:
        evaluate(exported, tmp_path / "gone.csv")
    golden(raised)
    with pytest.raises(DataError, match=r"data\.text=text"):
        evaluate(exported, world["data"], ["data.text=tex"])
    with pytest.raises(DataError, match="data.test_split"):
        evaluate(exported, world["data"], ["data.test_split=validation"])
    with pytest.raises(ConfigError, match="--format gguf"):
        evaluate(exported, world["data"], [], "gguf")
    with pytest.raises(ModelError, match="is not an exported model"):
        evaluate(tmp_path, world["data"])
    (tmp_path / "empty.csv").write_text("text,label\n")
    with pytest.raises(DataError, match="no records"):
        evaluate(exported, tmp_path / "empty.csv")


@pytest.mark.slow
def test_without_onnxruntime_the_way_out_is_said(
    exported: Path, world: dict[str, Path], monkeypatch: pytest.MonkeyPatch, golden: Golden
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError) as raised:
        evaluate(exported, world["data"])
    golden(raised)
    assert evaluate(exported, world["data"], [], "hf")["num_records"] == 40
