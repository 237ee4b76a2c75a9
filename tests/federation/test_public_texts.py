"""The file of public texts that a run may start from: how it is read, and what is refused."""

from __future__ import annotations

import csv
import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.config.choices import check_together, resolved
from fedtune.config.schema import Config, PublicConfig
from fedtune.data.corpus import Corpus
from fedtune.data.public_texts import PublicTexts, _shared
from fedtune.errors import ConfigError, DataError
from fedtune.federation.resources import RunResources
from fedtune.runs.check import check, in_text
from tests.support.tiny_federation import make_public

Make = Callable[..., Config]


@pytest.fixture
def config(tiny: Make) -> Config:
    return resolved(tiny())


def read(config: Config, path: Path, **columns: str) -> PublicTexts:
    found = RunResources(
        dataclasses.replace(config, public=PublicConfig(path=str(path), **columns))
    ).public_texts
    assert found is not None
    return found


def refusal(config: Config, path: Path, **columns: str) -> str:
    with pytest.raises(DataError) as caught:
        read(config, path, **columns)
    said = str(caught.value)
    assert "\n" not in said and str(path) in said
    return said


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def written(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_its_columns_are_those_of_the_data_or_its_own(config: Config, tmp_path: Path) -> None:
    path = make_public(tmp_path / "public.csv")
    found = read(config, path)
    assert found.corpus.num_records == found.tokens.num_records == 40
    assert found.corpus.label_names == ("negative", "positive") and set(found.corpus.labels) == {0, 1}
    rows = [{"note": row["text"], "mood": row["label"]} for row in rows_of(path)]
    other = read(config, written(tmp_path / "other.csv", rows), text="note", label="mood")
    assert other.corpus.texts == found.corpus.texts and other.digest != found.digest


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: [{**rows[0], "label": "superb"}, *rows[1:]], "superb"),
        (lambda rows: [{"words": row["text"], "label": row["label"]} for row in rows], "public.text"),
        (lambda rows: [row for row in rows if row["label"] == "positive"], "public.label"),
        (lambda rows: rows[:6], "6 texts"),
        (lambda rows: [{**rows[0], "label": ""}, *rows[1:]], "have no label"),
    ],
)
def test_what_cannot_be_learnt_from_is_refused(
    config: Config, tmp_path: Path, change: Callable[[Any], Any], words: str
) -> None:
    rows = change(rows_of(make_public(tmp_path / "public.csv")))
    said = refusal(config, written(tmp_path / "changed.csv", rows))
    assert words in said and "data.text" not in said and "data.label=" not in said


def test_a_class_without_a_text_is_named(tiny: Make, tmp_path: Path) -> None:
    config = tiny()
    config.data.labels = ["negative", "positive", "neither"]
    said = refusal(resolved(config), make_public(tmp_path / "public.csv"))
    assert "1 of the 3 classes" in said and "neither" in said


def test_no_file_no_format_no_text(config: Config, tmp_path: Path) -> None:
    assert "no such file" in refusal(config, tmp_path / "nowhere.csv")
    assert "no file" in refusal(config, tmp_path)
    (tmp_path / "texts.doc").write_text("text,label\n")
    assert "ending" in refusal(config, tmp_path / "texts.doc")
    (tmp_path / "latin.csv").write_bytes("text,label\nsch\xf6n,positive\n".encode("latin-1"))
    assert "UTF-8" in refusal(config, tmp_path / "latin.csv")


@pytest.mark.parametrize("copy", [os.link, shutil.copy, os.symlink])
def test_the_private_file_itself_is_refused(
    config: Config, tiny_parts: tuple[Path, Path], tmp_path: Path, copy: Callable[[Path, Path], Any]
) -> None:
    copy(tiny_parts[1] / "train.csv", tmp_path / "public.csv")
    said = refusal(config, tmp_path / "public.csv")
    assert "120 of the 120 texts" in said and "private training texts" in said


def test_a_part_of_the_private_file_is_refused_and_a_chance_meeting_is_told(
    config: Config, tiny_parts: tuple[Path, Path], tmp_path: Path
) -> None:
    private = [
        {**row, "text": f"  {row['text'].upper()} "} for row in rows_of(tiny_parts[1] / "train.csv")[:2]
    ]
    rows = rows_of(make_public(tmp_path / "public.csv", 198))
    private = [{name: row[name] for name in rows[0]} for row in private]
    assert "2 of the 102 texts" in refusal(config, written(tmp_path / "part.csv", [*rows[:100], *private]))
    found = read(config, written(tmp_path / "chance.csv", [*rows, *private]))
    assert found.corpus.num_records == 200  # what is private too is not left out: that would tell of it
    assert len(found.notes) == 1 and "2 of the 200 texts" in found.notes[0]
    public = dataclasses.replace(config, data=dataclasses.replace(config.data, public=True))
    assert "declared public" in read(public, tmp_path / "part.csv").notes[0]


def test_pairs_that_share_a_prompt_are_known_again_as_a_whole() -> None:
    """The prompt is in most of the one corpus, and in few of the other, where it has a mark of its own."""
    answers = [f"answer {number}" for number in range(20)]
    public = corpus_of(["prompt"] * 4 + answers[4:10], answers[:10])
    private = corpus_of(["prompt"] * 20, answers)
    assert not {row.tobytes() for row in public.marks} & {row.tobytes() for row in private.marks}
    assert _shared(public, private) == 4  # type: ignore[arg-type]
    nobody = corpus_of([], [])
    assert _shared(public, nobody) == _shared(nobody, public) == 0  # type: ignore[arg-type]


def corpus_of(texts: list[str], pairs: list[str]) -> Corpus:
    return Corpus(
        name="pairs",
        texts=tuple(texts),
        labels=np.zeros(len(texts), dtype=np.int64),
        label_names=("no", "yes"),
        pairs=tuple(pairs),
    )


def test_what_is_tested_on_is_not_learnt_from(
    config: Config, tiny_parts: tuple[Path, Path], tmp_path: Path
) -> None:
    said = refusal(config, Path(shutil.copy(tiny_parts[1] / "test.csv", tmp_path / "public.csv")))
    assert "tested on" in said
    public = dataclasses.replace(config, data=dataclasses.replace(config.data, public=True))
    assert "tested on" in refusal(public, tmp_path / "public.csv")


@pytest.mark.parametrize(
    "public",
    [PublicConfig(label="mood"), PublicConfig(text="note"), PublicConfig(path="a.csv", text_pair="second")],
)
def test_columns_of_no_file_are_refused(config: Config, public: PublicConfig) -> None:
    with pytest.raises(ConfigError, match=r"public\.(label|text|text_pair)="):
        check_together(dataclasses.replace(config, public=public))


def test_a_look_beforehand_says_what_was_understood(config: Config, tmp_path: Path) -> None:
    path = make_public(tmp_path / "public.csv")
    found = check(dataclasses.replace(config, public=PublicConfig(path=str(path))))
    assert found["data"]["public start"]["labels"] == {"negative": 20, "positive": 20}
    assert "public start  40 records" in in_text(found)
    assert check(config)["data"]["public start"] is None and "public start" not in in_text(check(config))
