"""Measured variants are priced, and counted as affordable when a month of a task comes under its budget."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedtune.errors import ConfigError, RecordError
from fedtune.report.adoption import adoption, adoption_text, serving_numbers, write_adoption
from tests.support.golden import Golden
from tests.support.synthetic import write_compressed as write

PRICES = [
    "pricing=free",
    "pricing.serving_hour=3.6",
    "pricing.serving_load=1",
    "pricing.licences=2",
    "pricing.tasks=['small, 1, 12', 'large, 10, 30', 'hopeless, 10, 1']",
]


def test_counts_by_hand(tmp_path: Path) -> None:
    # At 100 texts a second a million takes 10,000 s: 10 of money; at 200: 5; at 1,000: 1. Software is 2.
    folder = write(tmp_path / "a", fast=(1000.0, 0.785), broken=(1000.0, 0.70), unknown=(1000.0, None))
    found = adoption([folder], PRICES)
    by_name = {one.name: one for one in found.variants}
    assert [one.price.compute for one in found.variants] == pytest.approx([10, 5, 1, 1, 1])
    # small: 12 a month allows 10 + 2. large: 30 allows 28 for 10 million, so 2.8 a million.
    assert by_name["a/original"].affordable == (1, 1, 1, 1, 1)
    assert by_name["a/1 distill"].affordable == (1, 1, 1, 2, 2)  # 5 falls to 2.5, and to 1.5
    assert by_name["a/fast"].affordable == (2, 2, 2, 2, 2)
    assert by_name["a/broken"].affordable == by_name["a/unknown"].affordable == (0, 0, 0, 0, 0)
    assert adoption([folder], PRICES, allowed_loss=0.2).variants[-2].affordable == (2, 2, 2, 2, 2)
    assert by_name["a/fast"].lost == pytest.approx(0.015) and by_name["a/unknown"].lost is None


def test_words_and_files(tmp_path: Path) -> None:
    found = adoption([write(tmp_path / "a", fast=(1000.0, 0.79)), write(tmp_path / "b")], PRICES)
    text = adoption_text(found)
    for words in ("a/fast", "b/1 distill", "79.0", "1,000", "-70%", "3 tasks", "1 thread(s), AVX512"):
        assert words in text, text
    first, second = write_adoption(found, tmp_path / "figures")
    values = json.loads(first.read_text())
    assert values["cuts"][1] == 0.1 and values["variants"][0]["affordable"] == [1, 1, 1, 1, 1]
    assert second.read_bytes().startswith(b"\x89PNG") and second.stat().st_size > 10_000


def test_a_run_stands_for_what_was_compressed_below_it(tmp_path: Path) -> None:
    """As docs/service.md prices it, and as `fedtune compress --advise` finds it."""
    made = [write(tmp_path / "run" / name) for name in ("pruned", "student")]
    names = [one.name for one in adoption([tmp_path / "run"], PRICES).variants]
    assert names == [one.name for one in adoption(made, PRICES).variants] and "student/1 distill" in names
    assert names == [one.name for one in adoption([tmp_path / "run", *made], PRICES).variants]


def test_what_cannot_be_priced(tmp_path: Path, golden: Golden) -> None:
    with pytest.raises(RecordError) as raised:
        adoption([tmp_path], PRICES)
    golden(raised)
    folder = write(tmp_path / "a")
    with pytest.raises(ConfigError, match="--loss"):
        adoption([folder], PRICES, allowed_loss=-1)
    with pytest.raises(ConfigError, match="only prices"):
        adoption([folder], ["train.learning_rate=1"])
    assert "has no tasks" in adoption_text(adoption([folder], ["pricing=free"]))


@pytest.mark.slow
def test_the_report_finds_them_and_assumes_nothing_where_there_are_none(tmp_path: Path) -> None:
    nothing = serving_numbers([tmp_path], [])
    assert set(nothing) == {"text"} and "not known here, and nothing is assumed" in nothing["text"]
    for run in ("one", "two"):
        write(tmp_path / run / "small", fast=(1000.0, 0.79))
    found = serving_numbers([tmp_path], PRICES)
    assert found["tasks"] == 3 and len(found["variants"]) == 6
    names = [one["name"] for one in found["variants"]]
    assert len(set(names)) == 6 and names[0] == f"{tmp_path}/one/small/original"
    assert found["variants"][1]["affordable"] == [1, 1, 1, 2, 2]  # as by hand above
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "compression.json").write_text("{")
    torn = serving_numbers([tmp_path], PRICES)
    assert torn["variants"] == found["variants"] and "of torn cannot be read and is left out" in torn["text"]
    # A book for training has no tasks: then those of the book for serving are counted.
    other = serving_numbers([tmp_path / "one"], ["pricing=cloud_cpu"])
    assert "book 'serving'" in other["text"] and other["tasks"] == 4
    assert next(one["name"] for one in other["variants"]) == "small/original"
