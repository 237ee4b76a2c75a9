from __future__ import annotations

import math
from typing import Any

import pytest

from fedtune.data.sources.columns import Columns, Table, build_corpus, derive_labels
from fedtune.errors import DataError

COLUMNS = Columns("text", "label")
NAMES = ("no", "yes")


def table(**columns: Any) -> Table:
    columns.setdefault("text", ["a b", "c", "d e", "f"])
    columns.setdefault("label", ["yes", "no", "yes", "no"])
    return Table("the split", columns)


def refusal(data: Table, columns: Columns = COLUMNS, names: tuple[str, ...] = NAMES) -> str:
    with pytest.raises(DataError) as caught:
        build_corpus("made", data, columns, names)
    return str(caught.value)


def test_labels_by_name_and_by_position() -> None:
    assert build_corpus("made", table(), COLUMNS, NAMES).labels.tolist() == [1, 0, 1, 0]
    for labels in ([1, 0, 1, 0], ["1", "0", "1", "0"], [1.0, 0.0, 1.0, 0.0]):
        assert build_corpus("made", table(label=labels), COLUMNS, NAMES).labels.tolist() == [1, 0, 1, 0]


def test_numbers_that_are_names_are_names_first() -> None:
    corpus = build_corpus("made", table(label=[1, 5, 1, 5]), COLUMNS, ("5", "1"))
    assert corpus.labels.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize("empty", ["", "   ", "\n\t", None, math.nan])
def test_records_without_text_are_dropped_and_counted(empty: Any) -> None:
    corpus = build_corpus("made", table(text=["a", empty, "b", "c"]), COLUMNS, NAMES)
    assert corpus.texts == ("a", "b", "c")
    assert corpus.labels.tolist() == [1, 1, 0]
    assert corpus.notes == ("1 of 4 records of the split have no text and were dropped.",)


def test_a_dropped_record_takes_its_person_and_place_along() -> None:
    data = table(text=["a", "", "b", "c"], who=["p", None, "q", "r"], where=["x", "", "y", "x"])
    corpus = build_corpus("made", data, Columns("text", "label", unit="who", site="where"), NAMES)
    assert corpus.units is not None and corpus.units.tolist() == ["p", "q", "r"]
    assert corpus.sites is not None and corpus.sites.tolist() == ["x", "y", "x"]


def test_all_texts_empty() -> None:
    assert "All 4 texts" in refusal(table(text=["", " ", None, "\t"]))


def test_an_empty_second_text_drops_the_pair() -> None:
    corpus = build_corpus("made", table(other=["x", "", "y", "z"]), Columns("text", "label", "other"), NAMES)
    assert corpus.pairs == ("x", "y", "z")


def test_a_column_that_holds_no_text() -> None:
    message = refusal(table(text=["a", 3, 4.5, "b"]))
    assert "float and int instead of text in 2 records (rows 2, 3)" in message
    assert "list instead of text" in refusal(table(text=["a", ["b"], "c", "d"]))


def test_one_class_only() -> None:
    assert "one class only" in refusal(table(label=["yes"] * 4))
    assert "one class only" in refusal(table(label=["yes"] * 4), names=("yes",))


def test_a_label_outside_the_label_set_is_counted_and_placed() -> None:
    assert "1 of 4 records" in refusal(table(label=["yes", "no", "maybe", "no"]))
    assert "(row 3)" in refusal(table(label=["yes", "no", "maybe", "no"]))
    assert "not in the label set of 2" in refusal(table(label=[0, 1, 2, 1]))
    assert "not in the label set" in refusal(table(label=[0, 1, -1, 1]))


def test_a_hidden_test_split() -> None:
    assert "unlabelled" in refusal(table(label=[-1] * 4))


@pytest.mark.parametrize("missing", [None, math.nan, "", " "])
def test_a_missing_label(missing: Any) -> None:
    message = refusal(table(label=["yes", missing, "no", missing]))
    assert "2 of 4 records" in message and "no label" in message and "rows 2, 4" in message


@pytest.mark.parametrize("missing", [None, math.nan, "", " "])
@pytest.mark.parametrize(("setting", "what"), [("unit", "which person"), ("site", "which site")])
def test_a_missing_person_or_site_is_counted_and_placed(missing: Any, setting: str, what: str) -> None:
    data = table(text=["a"] * 9, label=["yes", "no", "yes"] * 3, who=["p"] + [missing] * 7 + ["q"])
    message = refusal(data, Columns("text", "label", **{setting: "who"}))
    assert f"7 of 9 records of the split do not say {what}" in message
    assert "rows 2, 3, 4, 5, 6 and 2 more" in message


def test_a_label_declared_twice() -> None:
    assert "names a label twice" in refusal(table(), names=("no", "yes", "no"))


def test_persons_that_are_numbers_are_the_same_whatever_the_format() -> None:
    for who in ([1, 2, 1, 2], [1.0, 2.0, 1.0, 2.0], ["1", "2", "1 ", "2"]):
        corpus = build_corpus("made", table(who=who), Columns("text", "label", unit="who"), NAMES)
        assert corpus.units is not None and corpus.units.tolist() == ["1", "2", "1", "2"]


@pytest.mark.parametrize("setting", ["unit", "site"])
def test_spellings_of_one_person_or_site_are_one(setting: str) -> None:
    """A person who counts as two would have half the protection that is promised."""
    who = ["12", "12.0", "P7", "p7 ", "e\u0301", "\u00e9", "P\u200b7", "\u0661\u0662", "+12"]
    data = table(text=["a"] * 9, label=["yes", "no", "yes"] * 3, who=who)
    corpus = build_corpus("made", data, Columns("text", "label", **{setting: "who"}), NAMES)
    found = corpus.units if setting == "unit" else corpus.sites
    assert found is not None and found.tolist() == ["12", "12", "P7", "P7", "é", "é", "P7", "12", "12"]
    assert "5 of 9 records" in corpus.notes[0] and f"data.{setting}" in corpus.notes[0]


@pytest.mark.parametrize("lost", ["nan", "NULL", "NA", "<NA>"])
def test_how_programs_write_a_missing_person_is_none(lost: str) -> None:
    data = table(who=["p", lost, "q", lost])
    assert "2 of 4 records" in refusal(data, Columns("text", "label", unit="who"))
    if lost == "NA":  # North America, Namibia
        sites = build_corpus("made", data, Columns("text", "label", site="who"), NAMES).sites
        assert sites is not None and sites.tolist() == ["p", "NA", "q", "NA"]
    else:
        assert "2 of 4 records" in refusal(data, Columns("text", "label", site="who"))


def test_derived_labels_are_sorted_and_leave_out_the_missing() -> None:
    assert derive_labels(table(label=["b", None, "a", ""]), "label") == ("a", "b")
    assert derive_labels(table(label=[10, 9, -1, math.nan]), "label") == ("-1", "9", "10")
