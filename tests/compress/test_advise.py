"""Advice is one of the variants that were measured, or says which limit must give and by how much."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.cli.app import main
from fedtune.compress.advise import Limits, advise, advise_text
from fedtune.compress.compress import RECORD_NAME
from fedtune.config.loader import load
from fedtune.cost.inference import price_inference
from fedtune.errors import ConfigError, RecordError
from tests.support.golden import Golden


def figures(accuracy: float, per_second: float, p99: float, memory: int | None = None) -> dict[str, Any]:
    one = {
        "accuracy": accuracy, "difference": accuracy - 0.8, "difference_error": 0.005, "bytes": 10**7,
        "texts_per_second": per_second, "p99_ms": p99, "ratio": per_second / 50,
    }  # fmt: skip
    return one if memory is None else {**one, "memory_bytes": memory}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run, a fast student and a slower pruned model of it, and a base."""
    formats = {
        "student": {"onnx": figures(0.785, 200, 8, 10**8), "onnx-int8": figures(0.78, 400, 4, 4 * 10**7)},
        "pruned": {"onnx-int8": figures(0.795, 150, 9, 6 * 10**7)},
    }
    for name, of in formats.items():
        (tmp_path / name).mkdir()
        made = {
            "schema": 1, "run": "r", "processor": "AVX512", "settings": {"threads": 1}, "formats": of,
            "original": figures(0.8, 50, 30), "steps": [],
        }  # fmt: skip
        (tmp_path / name / RECORD_NAME).write_text(json.dumps(made))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / RECORD_NAME).write_text(json.dumps({**made, "run": None, "formats": {}}))
    return tmp_path


@pytest.mark.parametrize(
    ("limits", "chosen"),
    [
        (Limits(within=2), "student (onnx-int8)"),
        (Limits(within=1.9), "student (onnx)"),
        (Limits(within=1), "pruned (onnx-int8)"),
        (Limits(within=0), "not compressed (PyTorch)"),
        (Limits(within=1.9, memory=70), "pruned (onnx-int8)"),
        (Limits(p99=5), "student (onnx-int8)"),
    ],
)
def test_the_cheapest_that_keeps_the_limits(folder: Path, limits: Limits, chosen: str) -> None:
    answer = advise([folder], limits)
    assert answer["chosen"]["name"].endswith(chosen) and answer["must_give"] == []
    assert chosen in advise_text(answer).splitlines()[0]
    assert len(answer["variants"]) == 4  # three formats, and the run once


def test_what_must_give(folder: Path) -> None:
    answer = advise([folder], Limits(within=1, p99=5))
    assert answer["chosen"] is None
    gives = {tuple(way["limits"]): (way["limits"], way["variant"]["name"]) for way in answer["must_give"]}
    assert set(gives) == {("within",), ("p99",)}
    assert gives["within",][0]["within"] == pytest.approx(2) and "student (onnx-int8)" in gives["within",][1]
    assert gives["p99",][0]["p99"] == 9 and "pruned" in gives["p99",][1]
    text = advise_text(answer)
    assert "--within 2 points   then" in text and "--p99 9 ms   then" in text
    # One alone does not suffice: the memory of what loses nothing is not known.
    both = advise([folder], Limits(within=0.1, p99=3, memory=50))
    assert all(len(way["limits"]) > 1 for way in both["must_give"]) and both["must_give"]


@pytest.mark.slow
def test_money_is_that_of_the_price_book(folder: Path) -> None:
    book = load(["pricing=edge"]).pricing
    answer = advise([folder], Limits(within=2), ["pricing=edge"])
    price = price_inference(book, 400)
    assert answer["chosen"]["money"] == pytest.approx(price.compute + price.energy)
    assert answer["chosen"]["money"] > 0
    assert answer["currency"] == book.currency
    cheap = advise([folder], Limits(money=1e-12))
    assert cheap["chosen"] is None and "student (onnx-int8)" in cheap["must_give"][0]["variant"]["name"]


def test_what_was_measured_elsewhere_is_said(folder: Path) -> None:
    path = folder / "pruned" / RECORD_NAME
    made = json.loads(path.read_text())
    path.write_text(json.dumps(made | {"processor": "AVX2", "run": "other"}))
    notes = advise([folder], Limits(within=2))["notes"]
    assert len(notes) == 2 and "processors" in notes[0] and "runs" in notes[1]


def test_what_cannot_be_advised(folder: Path, tmp_path: Path, golden: Golden) -> None:
    with pytest.raises(ConfigError) as raised:
        advise([folder], Limits())
    golden(raised)
    with pytest.raises(ConfigError) as raised:
        Limits(within=-1)
    golden(raised)
    with pytest.raises(RecordError) as raised:
        advise([folder / "base"], Limits(within=1))
    golden(raised)
    (folder / "pruned" / RECORD_NAME).write_text('{"schema": 2}')
    with pytest.raises(RecordError) as raised:
        advise([folder], Limits(within=1))
    golden(raised)


def test_the_command_answers_and_refuses_a_limit_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main(["compress", "--advise", str(folder), "--within", "1", "--json"])
    assert left.value.code == 0
    assert json.loads(capsys.readouterr().out)["chosen"]["name"].endswith("pruned (onnx-int8)")
    with pytest.raises(SystemExit) as left:
        main(["compress", str(folder), "--within", "1"])
    assert left.value.code == 2
    assert "--within is a limit of --advise" in capsys.readouterr().err
