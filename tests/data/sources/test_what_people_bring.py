"""Files as programs and people write them: read for what they are, or named, with the rows and a way out."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fedtune.config.schema import DataConfig
from fedtune.data.corpus import Corpus
from fedtune.data.sources.load import load_corpus
from fedtune.errors import DataError

# Without the time of day: names of tests are made of it, and each process that runs tests made its own.
gzipped = partial(gzip.compress, mtime=0)

ROWS = [(f"text number {i}", "yes" if i % 2 else "no", f"s{i % 2}") for i in range(30)]
HEADER = ("text", "label", "site")


def table(by: str = ",", rows: Any = ROWS, header: tuple[str, ...] = HEADER, end: str = "\n") -> str:
    return end.join(by.join(row) for row in (header, *rows)) + end


def labelled(*labels: Any) -> str:
    """JSON lines, 30 of them, with these labels in turn."""
    lines = [{"text": f"text number {i}", "label": labels[i % len(labels)]} for i in range(30)]
    return "\n".join(json.dumps(line) for line in lines)


def whole(path: Path, **settings: Any) -> Corpus:
    config = DataConfig(source="files", path=str(path), name="mine", **settings)
    return load_corpus(config, 0, testing=False)[0]


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)
    return folder


def refused(path: Path, **settings: Any) -> str:
    with pytest.raises(DataError) as raised:
        whole(path, **settings)
    text = str(raised.value)
    assert "\n" not in text and text.endswith((".", "?"))
    text.encode()  # a message itself is text
    return text


@pytest.mark.parametrize(
    "content",
    [
        table().encode("utf-16"),
        codecs.BOM_UTF16_BE + table().encode("utf-16-be"),
        table().encode("utf-16-le"),
        table().encode("utf-16-be"),
        table().encode("utf-32"),
        gzipped(table().encode()),
        gzipped(table().encode("utf-16")),
        codecs.BOM_UTF8 + table(";", end="\r\n").encode(),
        ("sep=;\n" + table(";")).encode(),
        table("\t").encode(),
        table("|").encode(),
        table(header=(" text ", "label ", " site")).encode(),
        (table() + "   \n\n,,\n").encode(),
        table(end="\r").encode(),
        table().encode("utf-32-le"),
        table().encode("utf-32-be"),
        ('"sep=;"\r\n' + table(";", end="\r\n")).encode(),
        ("sep=^\n" + table("^")).encode(),
        ("\n  \n" + table()).encode(),
        table(end=",\n").replace("site,", "site", 1).encode(),
        (table() + "\x1a").encode(),
        table(header=("\ufefftext", "label\u200b", '"site\n"')).encode(),
    ],
    ids=["utf-16", "utf-16-be", "utf-16-le bare", "utf-16-be bare", "utf-32", "gzip", "gzip utf-16",
         "semicolons", "sep line", "tabs", "bars", "header blanks", "blank rows below", "old Mac",
         "utf-32-le bare", "utf-32-be bare", "sep quoted", "sep of its own", "blank rows above",
         "delimiter at the end", "end of file", "marks in the header"],
)  # fmt: skip
def test_a_csv_is_read_whatever_wrote_it(tmp_path: Path, content: bytes) -> None:
    corpus = whole(written(tmp_path, "train.csv", content), site="site")
    assert corpus.texts == tuple(row[0] for row in ROWS)
    assert [corpus.label_names[i] for i in corpus.labels] == [row[1] for row in ROWS]
    assert corpus.sites is not None and list(corpus.sites) == [row[2] for row in ROWS]


def test_another_delimiter_is_said(tmp_path: Path) -> None:
    assert (
        "train.csv has semicolons between its fields"
        in whole(written(tmp_path, "train.csv", table(";"))).notes[0]
    )


@pytest.mark.parametrize("name", ["train.csv.gz", "train.jsonl.gz", "train.json"])
def test_names_of_compressed_files_and_json(tmp_path: Path, name: str) -> None:
    objects = [dict(zip(HEADER, row, strict=True)) for row in ROWS]
    content = {"train.json": json.dumps(objects), "train.jsonl.gz": "\n".join(map(json.dumps, objects))}
    data = content.get(name, table()).encode()
    written(tmp_path, name, gzipped(data) if name.endswith("gz") else data)
    assert whole(tmp_path).texts == tuple(row[0] for row in ROWS)


def zipped(**files: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return packed.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.csv.bz2", bz2.compress(table().encode())),
        ("train.csv.xz", lzma.compress(table().encode())),
        ("train.csv.zip", zipped(**{"a/train.csv": table().encode(), "__MACOSX/a/._train.csv": b"x"})),
        ("train.csv", zipped(data=table(";").encode("utf-16"))),
    ],
)
def test_compressed_files_are_read(tmp_path: Path, name: str, content: bytes) -> None:
    assert whole(written(tmp_path, name, content)).texts == tuple(row[0] for row in ROWS)


def workbook() -> bytes:
    return zipped(**{"xl/workbook.xml": b"<workbook/>"})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (workbook(), "workbook of Excel"),
        (b"PK\x03\x04rest", "compressed by ZIP, and damaged or cut off"),
        (zipped(a=b"1", b=b"2"), "ZIP archive of several files"),
        (lzma.compress(table().encode())[:-30], "compressed by xz, and damaged or cut off"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "old Office"),
        (b"PAR1rest", "name end in .parquet"),
        (b"%PDF-1.7", "PDF"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (gzipped(table().encode())[:-20], "damaged or cut off"),
        (gzipped(gzipped(table().encode())), "compressed by gzip twice"),
        (gzipped(b"train.csv".ljust(257, b"\0") + b"ustar"), "is a tar archive"),
        (
            b"PK\x03\x04".ljust(30, b"\0") + b"mimetypeapplication/vnd.oasis.opendocument",
            "damaged or cut off",
        ),
        (zipped(**{"[Content_Types].xml": b"", "word/document.xml": b""}), "document of Office"),
        (zipped(mimetype=b"application/vnd.oasis.opendocument.spreadsheet", a=b""), "OpenDocument"),
        (b"\x93NUMPY\x01\x00", "binary data (byte 0)"),
        (json.dumps([dict(zip(HEADER, row, strict=True)) for row in ROWS]).encode(), "JSON, by its content"),
        (labelled("a", "b").encode(), "name end in .jsonl"),
        (b"<table><tr><td>text", "web page"),
        (b"# exported\n" + table().encode(), "no header: it names one column, and the next has 3 fields"),
        (table("~").encode(), "has no column 'label' (data.label) but one only, text~label~site"),
        ("text,label\ncaf\xe9,a\n".encode("latin-1"), "iconv -f WINDOWS-1252 -t UTF-8"),
    ],
)
def test_what_is_no_csv_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    assert words in refused(written(tmp_path, "train.csv", content))


def test_a_tsv_has_no_quoting_unless_all_of_its_quotes_are(tmp_path: Path) -> None:
    rows = [('"so good', "a", "s"), ("plain", "b", "s"), ('bad"', "a", "s"), ('6" or 7"', "b", "s")]
    assert whole(written(tmp_path, "train.tsv", table("\t", rows))).texts == tuple(row[0] for row in rows)
    rows = [('"he said ""x"""', "a", "s"), ('"tab\there"', "b", "s"), ('"two\nlines"', "a", "s")]
    read = whole(written(tmp_path, "train.tsv", table("\t", rows))).texts
    assert read == ('he said "x"', "tab\there", "two\nlines")


def test_a_quote_that_swallows_records_is_refused_with_its_lines(tmp_path: Path) -> None:
    rows = [*ROWS[:6], ('"a stray one', "yes", "s1"), *ROWS[7:12], ('and its end"', "no", "s0"), *ROWS[13:]]
    assert "Lines 8 to 14" in refused(written(tmp_path, "train.csv", table(rows=rows)))


def test_texts_of_several_lines_are_texts(tmp_path: Path) -> None:
    rows = [('"Dear sir,\nno thanks,\nyours"', "no", "s0"), ('"one, two\nthree"', "yes", "s1"), *ROWS]
    assert whole(written(tmp_path, "train.csv", table(rows=rows))).texts[0] == "Dear sir,\nno thanks,\nyours"


@pytest.mark.parametrize("label", [["a", "b"], [0, 1], {"a": 1}, []])
def test_a_label_that_is_several_is_refused(tmp_path: Path, label: Any) -> None:
    text = refused(written(tmp_path, "train.jsonl", labelled("a", "b", label)))
    assert "in 10 records (rows 3, 6, 9, 12, 15 and 5 more)" in text and "multi-label" in text


@pytest.mark.parametrize(
    "label", ["['sad', 'angry']", '["sad"]', "[0 1]", "[]", "{'a': 1}", "('sad',)", "(0, 1)", "{'a'}"]
)
def test_a_label_that_is_several_written_as_text_is_refused_unless_declared(
    tmp_path: Path, label: str
) -> None:
    text = refused(written(tmp_path, "train.jsonl", labelled("a", "b", label)))
    assert "in 10 records" not in text and "10 of 30 records" in text and "multi-label" in text
    written(tmp_path, "labels.txt", f"a\nb\n{label}\n")
    assert whole(tmp_path).label_names == ("a", "b", label)


@pytest.mark.parametrize(
    "content",
    [
        {"text": ["a", "b"], "label": ["x", "y"]},
        {"text": {"0": "a"}, "label": {"0": "x"}},  # as pandas writes a table unless it is told otherwise
        {"data": [{"text": "a", "label": "x"}]},
    ],
)
def test_a_table_in_one_object_is_refused_with_the_way_to_write_it(tmp_path: Path, content: Any) -> None:
    assert "orient='records'" in refused(written(tmp_path, "train.json", json.dumps(content)))


def test_a_column_is_found_in_either_unicode_form(tmp_path: Path) -> None:
    header = "te\u0301xte,label\n"
    written(tmp_path, "train.csv", header + "".join(f"words {i},{'ab'[i % 2]}\n" for i in range(8)))
    assert whole(tmp_path, text="t\u00e9xte").num_records == 8


@pytest.mark.parametrize("column", ["text", "label", "site"])
def test_half_a_character_is_refused_with_its_row(tmp_path: Path, column: str) -> None:
    lines = [dict(zip(HEADER, row, strict=True)) for row in ROWS]
    lines[4][column] += "\ud83d"
    written(tmp_path, "train.jsonl", "\n".join(map(json.dumps, lines)))
    text = refused(tmp_path, site="site")
    assert "holds half a character in 1 records (row 5)" in text and column in text


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (("0", "1", "0.0", "1.0"), ("0", "1")),
        ((0, 1, 0.0, "1.00"), ("0", "1")),
        (("élevé", "bas", "e\u0301leve\u0301", "bas"), ("bas", "élevé")),
        (("urgent", "routine", "URGENT", "Routine "), ("Routine", "URGENT")),
        (("very  good", "bad", "Very good", "bad"), ("Very good", "bad")),
        (("①", "1"), ("1", "①")),
        (("2²", "1"), ("1", "2²")),
        (("--1", "2"), ("--1", "2")),
        (("9" * 5000, "1"), ("1", "9" * 5000)),
        ((True, False), ("False", "True")),
        (("007", "7"), ("007", "7")),
        (("yes", "yes\u200b", "no", "y\u00ades"), ("no", "yes")),
        (("1", "\uff11", "2"), ("1", "2")),
        (("[a]", "[b]"), ("[a]", "[b]")),
        (("(a)", "(b)"), ("(a)", "(b)")),
        (("1", "+1", "-1", "1.0"), ("-1", "1")),
        (("1", "\u0661", "2", "\u0662"), ("1", "2")),
        (("İyi", "iyi", "kırık", "KIRIK"), ("KIRIK", "iyi")),
    ],
)  # fmt: skip
def test_spellings_of_one_label_are_one_class(tmp_path: Path, labels: Any, classes: tuple[str, ...]) -> None:
    corpus = whole(written(tmp_path, "train.jsonl", labelled(*labels)))
    assert corpus.label_names == classes
    assert len(set(corpus.labels)) == len(classes)


def test_another_spelling_is_counted_in_a_note(tmp_path: Path) -> None:
    corpus = whole(
        written(tmp_path, "train.jsonl", labelled("urgent", "no", "Urgent")), labels=["no", "urgent"]
    )
    assert corpus.notes[0].startswith("10 of 30 records")


def test_labels_that_are_others_joined_are_said(tmp_path: Path) -> None:
    corpus = whole(written(tmp_path, "train.jsonl", labelled("sad", "angry", "sad|Angry")))
    assert "1 of the 3 labels" in corpus.notes[0] and "multi-label" in corpus.notes[0]
    written(tmp_path, "train.jsonl", labelled("r&d", "sales", "law & order"))
    assert not whole(tmp_path, labels=["r&d", "sales", "law & order"]).notes


def test_texts_that_programs_write_for_none_are_said(tmp_path: Path) -> None:
    rows = [("nan" if i in (3, 5) else f"text {i}", "ab"[i % 2], "s") for i in range(8)]
    lines = "\n".join(json.dumps(dict(zip(HEADER, row, strict=True))) for row in rows)
    corpus = whole(written(tmp_path, "train.jsonl", lines))
    assert corpus.num_records == 8 and "2 of 8 texts" in corpus.notes[0] and "rows 4, 6" in corpus.notes[0]


def test_a_label_set_may_tell_spellings_apart(tmp_path: Path) -> None:
    corpus = whole(written(tmp_path, "train.jsonl", labelled("us", "US")), labels=["US", "us"])
    assert list(corpus.labels[:2]) == [1, 0]
    with pytest.raises(DataError, match="10 of 30"):
        whole(written(tmp_path, "train.jsonl", labelled("us", "US", "Us")), labels=["US", "us"])


def test_booleans_are_the_labels_of_a_file_that_says_true_and_false(tmp_path: Path) -> None:
    written(tmp_path, "labels.txt", "false\ntrue\n")
    corpus = whole(written(tmp_path, "train.jsonl", labelled(True, False)))
    assert corpus.label_names == ("false", "true") and list(corpus.labels[:2]) == [1, 0]


@pytest.mark.parametrize("lost", ["nan", "NaN", "null", "None", "#N/A", "<NA>"])
def test_how_programs_write_a_missing_label_is_no_class(tmp_path: Path, lost: str) -> None:
    text = refused(written(tmp_path, "train.jsonl", labelled("a", "b", lost)))
    assert "10 of 30" in text and "data.labels" in text
    assert whole(tmp_path, labels=["a", "b", lost]).label_names == ("a", "b", lost)


def test_a_column_of_persons_is_no_label(tmp_path: Path) -> None:
    text = refused(written(tmp_path, "train.jsonl", labelled(*(f"patient-{i}" for i in range(25)))))
    assert "25 different values in 30 records" in text and "patient-3" not in text
    written(tmp_path, "labels.txt", "\n".join(f"patient-{i}" for i in range(25)))
    assert len(whole(tmp_path).label_names) == 25


def test_one_column_cannot_be_label_and_person(tmp_path: Path) -> None:
    written(tmp_path, "train.csv", table())
    assert "both name column 'label'" in refused(tmp_path, unit="label")
    assert "both name column 'text'" in refused(tmp_path, label="text")


@pytest.mark.parametrize(
    "line", ['{"text": ' + "9" * 5000 + "}", "[" * 100_000, "[1, 2]", '[{"text": 1}', "1"]
)
def test_json_that_python_cannot_hold(tmp_path: Path, line: str) -> None:
    assert "JSON" in refused(written(tmp_path, "train.jsonl", line))


def test_a_header_that_comes_again_is_no_record(tmp_path: Path) -> None:
    twice = table(rows=ROWS[:15]) + table(rows=ROWS[15:])
    text = refused(written(tmp_path, "train.csv", twice), site="site")
    assert "Row 16 of" in text and "(line 17) is the header again" in text


@pytest.mark.parametrize(
    ("one", "other"), [("\u2764", "\u2764\ufe0f"), ("sad", "s\x00ad"), ("-1", "\u22121")], ids=ascii
)
def test_what_nobody_sees_in_a_label_makes_no_class(tmp_path: Path, one: str, other: str) -> None:
    corpus = whole(written(tmp_path, "train.jsonl", labelled(one, other, "x")))
    assert len(corpus.label_names) == 2 and any("differs from one of" in note for note in corpus.notes)


@pytest.mark.parametrize("setting", ["unit", "site"])
@pytest.mark.parametrize(
    ("one", "other"), [("\u2764", "\u2764\ufe0f"), ("sad", "s\x00ad"), ("-1", "\u22121")], ids=ascii
)
def test_what_nobody_sees_in_a_name_makes_no_person_or_site(
    tmp_path: Path, one: str, other: str, setting: str
) -> None:
    lines = [{"text": f"number {i}", "label": i % 2, "who": (one, other, "x")[i % 3]} for i in range(30)]
    corpus = whole(written(tmp_path, "train.jsonl", "\n".join(map(json.dumps, lines))), **{setting: "who"})
    found = corpus.units if setting == "unit" else corpus.sites
    assert found is not None and len(set(found)) == 2
    assert any("were taken for one" in note for note in corpus.notes)


@pytest.mark.parametrize(
    "labels",
    [("0.5", "0.50", "1"), (".5", "0.5", "1"), ("True", "1", "0"), ("false", "0", "TRUE"), (True, 1)],
)
def test_one_number_in_two_writings_is_no_two_classes(tmp_path: Path, labels: tuple[Any, ...]) -> None:
    text = refused(written(tmp_path, "train.jsonl", labelled(*labels)))
    assert "one number or truth value in two writings" in text and "declare all labels in data.labels" in text
    declared = sorted({str(label) for label in labels})
    assert len(whole(tmp_path, labels=declared).label_names) == len(declared), "the way out works"


@pytest.mark.parametrize("labels", [("1.1", "1.2", "1"), ("true", "1st", "1"), ("1", "0"), (True, 0)])
def test_numbers_and_truth_values_in_one_writing_are_classes(tmp_path: Path, labels: tuple[Any, ...]) -> None:
    assert len(whole(written(tmp_path, "train.jsonl", labelled(*labels))).label_names) == len(labels)


def test_letters_of_another_alphabet_that_look_the_same_are_said(tmp_path: Path) -> None:
    lines = [
        {
            "text": f"number {i}",
            "label": ("cop", "\u0441\u043e\u0440", "b")[i % 3],
            "who": ("A1", "\u0391" + "1")[i % 2],
        }
        for i in range(30)
    ]
    corpus = whole(written(tmp_path, "train.jsonl", "\n".join(map(json.dumps, lines))), unit="who")
    assert len(corpus.label_names) == 3
    assert any("2 of the 3 labels of" in note and "look like another" in note for note in corpus.notes)
    assert any("2 names in column 'who'" in note and "protected by itself" in note for note in corpus.notes)
    plain = whole(written(tmp_path, "train.jsonl", labelled("\u0434\u0430", "\u043d\u0435\u0442")))
    assert not any("look like another" in note for note in plain.notes)


def test_a_label_file_with_nothing_in_it_is_named(tmp_path: Path) -> None:
    written(tmp_path, "labels.txt", "\n")
    assert "labels.txt is empty" in refused(written(tmp_path, "train.csv", table()))


def test_half_a_character_among_declared_labels(tmp_path: Path) -> None:
    written(tmp_path, "categories.json", '["no", "yes", "\\ud83d"]')
    assert "has 1 labels with half a character" in refused(written(tmp_path, "train.csv", table()))


def test_declared_labels_that_look_alike_are_said(tmp_path: Path) -> None:
    written(tmp_path, "labels.txt", "no\nyes\nYes\n")
    notes = whole(written(tmp_path, "train.csv", table())).notes
    assert any("1 of the 3 labels declared" in note for note in notes)


@pytest.mark.parametrize(
    ("setting", "words"), [("site", "name of a site"), ("text_pair", "both name column")]
)
def test_a_text_is_no_site_and_no_second_text(tmp_path: Path, setting: str, words: str) -> None:
    assert words in refused(written(tmp_path, "train.csv", table()), **{setting: "text"})


def test_texts_without_letters_are_said(tmp_path: Path) -> None:
    rows = [(str(i), label, site) for i, (_, label, site) in enumerate(ROWS)]
    notes = whole(written(tmp_path, "train.csv", table(rows=rows))).notes
    assert any("30 of 30 texts in column 'text'" in note and "no letter" in note for note in notes)


def test_records_below_a_name_are_named(tmp_path: Path) -> None:
    records = json.dumps({"data": [{"text": "a", "label": "b"}], "version": "1.1"})
    assert "one object with whole columns or tables" in refused(written(tmp_path, "train.json", records))


def test_a_number_too_long_to_read_is_named(tmp_path: Path) -> None:
    text = refused(written(tmp_path, "train.jsonl", '{"text": "a", "label": ' + "9" * 5000 + "}"))
    assert "a number of more than 4,300 digits" in text and "sys." not in text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("train.csv.zst", b"\x28\xb5\x2f\xfd123", "compressed by Zstandard"),
        ("train.tar.gz", gzipped(b"x"), "compressed by gzip. Let its name say"),
        ("train.zip", b"PK\x03\x04" + bytes(40), "compressed by ZIP. Let its name say what is in it"),
        ("train.txt", b"text,label\n", "also compressed."),
    ],
)
def test_an_ending_that_is_not_known_is_named_by_its_content(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    written(tmp_path, name, content)
    assert words in refused(tmp_path / name)


def test_an_archive_with_nothing_in_it(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    zipfile.ZipFile(buffer, "w").close()
    assert "with nothing in it" in refused(written(tmp_path, "train.csv.zip", buffer.getvalue()))
