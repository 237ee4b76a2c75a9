"""What people's own files look like, and what is said about them when they are not right."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.config.schema import DataConfig
from fedtune.data.corpus import Corpus
from fedtune.data.sources.files import READERS
from fedtune.data.sources.load import load_corpus
from fedtune.errors import DataError, ResourceError
from tests.support.golden import Golden

ROWS = [(f"a text of number {i}", "yes" if i % 2 else "no", f"p{i // 3}", f"s{i % 2}") for i in range(30)]
HEADER = ("text", "label", "person", "place")
BANKING = Path(__file__).parents[4] / "shared" / "data" / "banking77"


def delimited(rows: list[tuple[str, ...]], header: tuple[str, ...] = HEADER, by: str = ",") -> str:
    return "\n".join(by.join(row) for row in (header, *rows)) + "\n"


def load(folder: Path, seed: int = 0, **settings: Any) -> tuple[Corpus, Corpus]:
    return load_corpus(DataConfig(source="files", path=str(folder), name="mine", **settings), seed)


def refusal(folder: Path, **settings: Any) -> str:
    """The one paragraph of a refusal."""
    with pytest.raises(DataError) as caught:
        load(folder, **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith((".", "?"))
    return message


@pytest.fixture(params=["csv", "tsv", "jsonl", "parquet"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """ROWS as a train split, in each format."""
    if request.param == "csv":
        (tmp_path / "train.csv").write_text(delimited(ROWS))
    elif request.param == "tsv":
        (tmp_path / "train.tsv").write_text(delimited(ROWS, by="\t"))
    elif request.param == "jsonl":
        lines = [json.dumps(dict(zip(HEADER, row, strict=True))) for row in ROWS]
        (tmp_path / "train.jsonl").write_text("\n".join(lines))
    else:
        parquet(tmp_path / "train.parquet", dict(zip(HEADER, zip(*ROWS, strict=True), strict=True)))
    return tmp_path


def parquet(path: Path, columns: dict[str, Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), path)


def test_every_format_gives_the_same_corpus(folder: Path) -> None:
    train, test = load(folder, unit="person", site="place")
    assert train.num_records + test.num_records == 30
    assert {*train.texts, *test.texts} == {row[0] for row in ROWS}
    assert train.label_names == test.label_names == ("no", "yes")
    assert train.units is not None and test.units is not None
    assert not set(train.units) & set(test.units)
    together = {
        text: (train.label_names[label], unit, site)
        for corpus in (train, test)
        for text, label, unit, site in zip(
            corpus.texts, corpus.labels, corpus.units, corpus.sites, strict=True
        )
    }
    assert together == {row[0]: row[1:] for row in ROWS}


def test_one_file_is_the_train_split(folder: Path) -> None:
    (file,) = folder.iterdir()
    train, test = load(file)
    assert train.num_records + test.num_records == 30


def test_a_named_test_split_is_used_whole(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(delimited(ROWS[:20]))
    (tmp_path / "test.csv").write_text(delimited(ROWS[20:]))
    train, test = load(tmp_path, test_split="test")
    assert (train.num_records, test.num_records) == (20, 10)


def test_a_test_split_that_lies_unused_is_mentioned(tmp_path: Path) -> None:
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text(delimited(ROWS))
    train, _ = load(tmp_path)
    assert any("test.csv beside train.csv is not used" in note for note in train.notes)


def test_label_names_in_a_file_beside_the_data_are_the_public_label_set(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(delimited(ROWS))
    (tmp_path / "labels.txt").write_text("yes\nno\n\nmaybe\n")
    train, _ = load(tmp_path)
    assert train.label_names == ("yes", "no", "maybe")
    assert train.notes == ()
    (tmp_path / "categories.json").write_text('["no", "yes"]')
    assert load(tmp_path)[0].label_names == ("no", "yes")
    assert load(tmp_path, labels=["yes", "no"])[0].label_names == ("yes", "no")


@pytest.mark.parametrize("content", ["{", '{"a": 1}', "[1, 2]"])
def test_a_label_file_that_is_not_a_list_of_names(tmp_path: Path, content: str) -> None:
    (tmp_path / "train.csv").write_text(delimited(ROWS))
    (tmp_path / "categories.json").write_text(content)
    assert "categories.json" in refusal(tmp_path)


def test_number_labels_are_sorted_as_numbers(tmp_path: Path) -> None:
    rows = [(f"text {i}", str(i % 12)) for i in range(48)]
    (tmp_path / "train.csv").write_text(delimited(rows, ("text", "label")))
    assert load(tmp_path)[0].label_names == tuple(str(i) for i in range(12))


def test_number_labels_of_parquet_and_jsonl_are_positions_in_a_declared_set(tmp_path: Path) -> None:
    parquet(
        tmp_path / "train.parquet",
        {"text": [f"t{i}" for i in range(20)], "label": [i % 2 for i in range(20)]},
    )
    train, _ = load(tmp_path, labels=["bad", "good"])
    for text, label in zip(train.texts, train.labels, strict=True):
        assert label == int(text[1:]) % 2


def test_texts_are_kept_as_they_are(tmp_path: Path) -> None:
    odd = [
        "NA",
        "null",
        "007",
        "1e5",
        'say "hi", twice',
        "two\nlines",
        "Ünïcødé ☃",
        "nan",
        "a\u2028b\x85c\x0cd",
    ]
    import csv

    with (tmp_path / "train.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("text", "label"))
        writer.writerows((text, "ab"[i % 2]) for i, text in enumerate(odd))
    train, test = load(tmp_path)
    assert sorted((*train.texts, *test.texts)) == sorted(odd)


def test_a_byte_order_mark_and_windows_line_ends_are_no_trouble(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_bytes(delimited(ROWS).replace("\n", "\r\n").encode("utf-8-sig"))
    train, test = load(tmp_path)
    assert {*train.texts, *test.texts} == {row[0] for row in ROWS}
    assert train.label_names == ("no", "yes")


# Places that are not right.


def test_no_path(tmp_path: Path, golden: Golden) -> None:
    with pytest.raises(DataError) as raised:
        load_corpus(DataConfig(source="files"), 0)
    golden(raised)


def test_no_such_path(tmp_path: Path) -> None:
    assert "no such file or folder" in refusal(tmp_path / "nowhere")


def test_no_such_split(tmp_path: Path) -> None:
    (tmp_path / "training.csv").write_text(delimited(ROWS))
    message = refusal(tmp_path)
    assert "no file for split 'train'" in message and "training.csv" in message
    assert "no split 'test'" in refusal(tmp_path / "training.csv", test_split="test")


def test_an_unknown_ending(tmp_path: Path) -> None:
    (tmp_path / "train.docx").write_text("x")
    assert "no data file" in refusal(tmp_path)
    assert "ending is not known" in refusal(tmp_path / "train.docx")


def test_two_files_for_one_split(tmp_path: Path) -> None:
    for name in ("train.csv", "train.tsv"):
        (tmp_path / name).write_text(delimited(ROWS))
    assert "two files for split 'train'" in refusal(tmp_path)


def test_a_file_that_may_not_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch, golden: Golden) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    (file,) = folder.iterdir()
    monkeypatch.setitem(READERS, file.suffix, denied)
    with pytest.raises(ResourceError) as raised:
        load(folder)
    golden(raised)


# Files that are not right.


@pytest.mark.parametrize("name", ["train.csv", "train.tsv", "train.jsonl", "train.parquet"])
def test_an_empty_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    assert "is empty" in refusal(tmp_path)


def test_a_header_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\n")
    assert "holds no records" in refusal(tmp_path)
    (tmp_path / "train.csv").unlink()
    parquet(tmp_path / "train.parquet", {"text": [], "label": []})
    assert "holds no records" in refusal(tmp_path)


def test_a_missing_column_names_those_that_exist_and_the_nearest(folder: Path) -> None:
    message = refusal(folder, text="txet")
    assert "no column 'txet'" in message
    assert "text, label, person, place" in message
    assert "Did you mean data.text=text?" in message
    assert "data.label=label" in refusal(folder, label="Lable")
    assert "Set data.unit to one of them" in refusal(folder, unit="zzz")


@pytest.mark.parametrize("name", ["train.csv", "train.jsonl", "train.parquet"])
def test_a_column_twice(tmp_path: Path, name: str) -> None:
    if name == "train.csv":
        (tmp_path / name).write_text(delimited([(a, b, a) for a, b, *_ in ROWS], ("text", "label", "text")))
    elif name == "train.jsonl":
        (tmp_path / name).write_text('{"text": "a", "label": "x", "text": "b"}\n')
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table([["a", "b"], ["x", "y"], ["c", "d"]], names=["text", "label", "text"])
        pq.write_table(table, tmp_path / name)
    assert "2 columns named 'text'" in refusal(tmp_path)


def test_a_column_twice_that_is_not_in_use_is_no_matter(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(
        delimited([(a, b, c, c) for a, b, c, _ in ROWS], ("text", "label", "x", "x"))
    )
    assert load(tmp_path)[0].num_records > 0


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_bad_encoding(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"train.{ending}").write_bytes("text,label\ncafé,a\n".encode("latin-1"))
    message = refusal(tmp_path)
    assert "not UTF-8" in message and "byte 14" in message


def test_a_row_of_another_width(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text,label\na,x\nb, and more,y\n")
    message = refusal(tmp_path)
    assert "Row 2" in message and "line 3" in message and "3 fields" in message


def test_a_quote_that_never_ends(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text('text,label\n"a,x\nb,y\n')
    assert "malformed" in refusal(tmp_path)


@pytest.mark.parametrize("line", ['{"text": "a"', '["a", "b"]', '"a"'])
def test_a_line_that_is_no_json_object(tmp_path: Path, line: str) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": "x"}\n' + line + "\n")
    assert "Line 2" in refusal(tmp_path)


def test_a_broken_parquet_file(tmp_path: Path) -> None:
    (tmp_path / "train.parquet").write_bytes(b"PAR1 nonsense PAR1")
    assert "not a readable Parquet file" in refusal(tmp_path)


def test_no_error_shows_a_text_a_person_or_a_label(tmp_path: Path) -> None:
    """Errors may be shown to the server, so they name rows and columns, never values."""
    secret = ("secret-text", "secret-label", "secret-person", "")
    (tmp_path / "train.csv").write_text(delimited([*ROWS, secret]))
    for settings in ({"site": "place"}, {"labels": ["yes", "no"]}, {"text": "tex"}, {"unit": "persn"}):
        assert "secret" not in refusal(tmp_path, **settings)


# The public data set that issue reports use.


@pytest.mark.skipif(not BANKING.is_dir(), reason="banking77 is not beside the repository")
def test_banking77_reads_whole_with_its_public_label_set() -> None:
    train, test = load(BANKING, label="category", test_split="test")
    assert (train.num_records, test.num_records) == (10003, 3080)
    assert len(train.label_names) == 77
    assert train.label_names == tuple(json.loads((BANKING / "categories.json").read_text()))
    assert train.notes == test.notes == ()
    assert np.bincount(test.labels, minlength=77).tolist() == [40] * 77
