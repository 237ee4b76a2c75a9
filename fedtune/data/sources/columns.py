"""Raw columns of a table -> a checked Corpus; every complaint about the data's content is made here.

Both `hub` and `files` end here, so that the same mistake gets the same words whatever the format.
Messages name columns, counts and row numbers, never a text, a person or a label's value (but of a public
table, the labels that nobody knows): an error may be shown to the server. Rows are numbered from 1, the
header not counted.

Decisions. A record without text (empty, blank or null) is dropped, and a note counts it: dropping looks
at that record alone, so privacy is not touched. A record without a label or without a person is refused:
nobody but the owner knows what it is. Labels that are one word in two spellings (Unicode forms, capitals,
blanks, `1` and `1.0`) are one class, and a note says so; one that is a list, a mapping or half a character is
refused. A label set is taken from the data only where its labels recur: a column of persons is none.
Persons and sites in two spellings are one, too: two persons taken for one are protected together, one taken
for two would have half the protection.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedtune.config.convert import value_text
from fedtune.config.schema import DataConfig
from fedtune.data.corpus import Corpus, StrArray
from fedtune.data.sources.spellings import (
    INTEGER,
    JOINED,
    LOST,
    SEVERAL,
    as_label,
    as_text,
    column_name,
    folded,
    is_missing,
    look_alikes,
    one_spelling,
    written_twice,
)
from fedtune.errors import DataError

__all__ = ["Columns", "Table", "build_corpus", "derive_labels", "missing_column"]

_LETTER = re.compile(r"[^\W\d_]")
SHOWN_ROWS, SHOWN_COLUMNS, SHOWN_LETTERS = 5, 20, 40
# A label set taken from the data has no more labels than this, or on average this many records of each: a
# column of persons has more and fewer.
MOST_LABELS, RECORDS_A_LABEL = 20, 10


@dataclass(frozen=True)
class Columns:
    """Which column is which (see `DataConfig`)."""

    text: str
    label: str
    text_pair: str | None = None
    unit: str | None = None
    site: str | None = None
    group: str = "data"

    @classmethod
    def of(cls, data: DataConfig, group: str = "data") -> Columns:
        """As the settings name them; `group`: of which settings messages speak.

        Raises:
            DataError: the label is the text or the person itself.
        """
        named = (data.text, data.label, data.text_pair, data.unit, data.site)
        text, label, pair, unit, site = (column_name(name) if name else None for name in named)
        if site == text or pair == text:
            setting = "site" if site == text else "text_pair"
            raise DataError(
                f"{group}.{setting} and {group}.text both name column {text!r}"
                + (": each text would be published as the name of a site." if site == text else ".")
                + f" Name another column in {group}.{setting}."
            )
        for setting, column in (("text", text), ("unit", unit)):
            if column == label:
                raise DataError(
                    f"{group}.label and {group}.{setting} both name column {label!r}: what is to be told is "
                    f"then what it is told from. Name the column that holds the labels in {group}.label."
                )
        return cls(str(text), str(label), pair, unit, site, group)

    def used(self) -> dict[str, str]:
        """Setting -> column name, of those that are set."""
        return {
            setting: column
            for setting in ("text", "text_pair", "label", "unit", "site")
            if (column := getattr(self, setting)) is not None
        }


@dataclass(frozen=True)
class Table:
    """One split as it was read.

    Attributes:
        where: names it in messages.
        columns: name -> n values.
        class_names: the label names that the source itself declares, if any.
        notes: what was decided while reading.
        group: of the settings that name its columns, for messages: `data`, or `public`.
    """

    where: str
    columns: dict[str, Sequence[Any]]
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    group: str = "data"


def missing_column(
    where: str, setting: str, column: str, existing: Sequence[str], group: str = "data"
) -> DataError:
    """The error for a column that is not there: which exist, and which is nearest."""
    if len(existing) == 1 and existing[0].lower() != column.lower():
        return DataError(
            f"{where} has no column {column!r} ({group}.{setting}) but one only, {_named(existing)}. Between "
            "the columns of a CSV commas, semicolons, tabs and bars are recognised, and what a line sep=: "
            "above them names."
        )
    nearest = difflib.get_close_matches(column.lower(), [name.lower() for name in existing], n=1, cutoff=0.6)
    hint = next((name for name in existing if nearest and name.lower() == nearest[0]), None)
    did_you_mean = (
        f" Did you mean {group}.{setting}={value_text(hint)}?"
        if hint
        else f" Set {group}.{setting} to one of them; or write a line with names first, if that is a record."
    )
    return DataError(
        f"{where} has no column {column!r} ({group}.{setting}); its columns are: "
        f"{_named(existing)}.{did_you_mean}"
    )


def _named(columns: Sequence[str]) -> str:
    """Names of columns, cut: of a file without a header they are its first record."""
    shown = [name if len(name) <= SHOWN_LETTERS else name[:SHOWN_LETTERS] + "..." for name in columns]
    line = ", ".join(shown[:SHOWN_COLUMNS]) or "none"
    line = "".join(letter if letter.isprintable() else " " for letter in line)
    return line + (f" and {len(shown) - SHOWN_COLUMNS} more" if len(shown) > SHOWN_COLUMNS else "")


def _is_half(text: str) -> bool:
    """Does it hold half a character, which no encoding can write?"""
    return any("\ud800" <= letter <= "\udfff" for letter in text) if not text.isascii() else False


def _rows(indices: Iterable[int]) -> str:
    shown = [str(i + 1) for i in indices]
    more = f" and {len(shown) - SHOWN_ROWS} more" if len(shown) > SHOWN_ROWS else ""
    return ("row " if len(shown) == 1 else "rows ") + ", ".join(shown[:SHOWN_ROWS]) + more


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN_COLUMNS} more" if len(names) > SHOWN_COLUMNS else ""
    return ", ".join(names[:SHOWN_COLUMNS]) + more


def _values(table: Table, column: str, rows: Iterable[int]) -> str:
    """The labels at `rows`, where the table is public: else no message names one."""
    if table.group != "public":
        return ""
    return f": {_few(sorted({as_label(table.columns[column][i])[:SHOWN_LETTERS] for i in rows}))}"


def derive_labels(table: Table, column: str) -> tuple[str, ...]:
    """The distinct labels of `column`, sorted (as numbers if all are). Not public: the caller must say so.

    Raises:
        DataError: they are no labels, or one is how a program writes that there is none.
    """
    values = table.columns[column]
    _refuse_kinds(table, column, "label", range(len(values)))
    keys = [as_label(value) for value in values if not is_missing(value)]
    lost = [i for i, value in enumerate(values) if not is_missing(value) and as_label(value) in LOST]
    if lost:
        raise DataError(
            f"{len(lost)} of {len(values)} records of {table.where} have a label in column {column!r} that "
            f"is how programs write a missing value ({_rows(lost)}). Label or remove them; or, if it is a "
            "class, declare all labels in data.labels."
        )
    several = [
        i for i, value in enumerate(values) if isinstance(value, str) and SEVERAL.fullmatch(value.strip())
    ]
    if several:
        raise DataError(
            f"{len(several)} of {len(values)} records of {table.where} have a label in column {column!r} "
            f"that is a list or a mapping, written as text ({_rows(several)}). Several labels a record "
            "(multi-label) are not supported. Give each record one; or, if such a text is a class, declare "
            "all labels in labels.txt beside the data, one a line."
        )
    names = set(one_spelling(set(keys) - {""}).values())
    if twice := set(written_twice(names)):
        rows = [i for i, value in enumerate(values) if not is_missing(value) and as_label(value) in twice]
        raise DataError(
            f"{len(twice)} labels in column {column!r} of {table.where} are one number or truth value in two "
            f"writings, as 0.5 and 0.50, or True and 1 ({_rows(rows)}). Write each in one way; or, if they "
            "are classes of their own, declare all labels in data.labels."
        )
    if len(names) > MOST_LABELS and len(keys) < RECORDS_A_LABEL * len(names):
        raise DataError(
            f"Column {column!r} of {table.where} (data.label) has {len(names)} different values in "
            f"{len(keys)} records, as a column of names or numbers has, and nobody declared that they are "
            "classes. As labels they would be published. Name another column in data.label; or, if they "
            "are classes, declare them in data.labels, or one a line in labels.txt beside the data."
        )
    if all(INTEGER.fullmatch(name) for name in names):
        return tuple(sorted(names, key=int))
    return tuple(sorted(names))


def build_corpus(
    name: str,
    table: Table,
    columns: Columns,
    label_names: Sequence[str],
    notes: Sequence[str] = (),
    *,
    part: bool = False,
    fixed: bool = False,
) -> Corpus:
    """Checks `table` and makes it a Corpus.

    Args:
        name: what the ledger calls this data.
        table: as it was read.
        columns: which column is which.
        label_names: the label set; labels may be names in it, or numbers 0..k-1 that index it.
        notes: what was decided on the way here.
        part: others hold the rest of the data, so all records here may be of one class.
        fixed: the label set is that of a model, which no setting changes.

    Raises:
        DataError: a column or value is missing, a text is no text, a label is not in the label set, or
            nothing is left.
    """
    existing = list(table.columns)
    for setting, column in columns.used().items():
        if column not in table.columns:
            raise missing_column(table.where, setting, column, existing, table.group)
    if not len(table.columns[columns.text]):
        raise DataError(f"{table.where} holds no records. Name a file or split that has some.")
    texts, empty = _texts(table, columns.text, "text")
    pairs: list[str] | None = None
    if columns.text_pair is not None:
        pairs, empty_pairs = _texts(table, columns.text_pair, "text_pair")
        empty = sorted({*empty, *empty_pairs})
    dropped = set(empty)
    keep = [i for i in range(len(texts)) if i not in dropped]
    if not keep:
        raise DataError(
            f"All {len(texts)} texts in column {columns.text!r} of {table.where} are empty. "
            f"Name the column that holds the texts in {table.group}.text."
        )
    notes = [*table.notes, *notes]
    if empty:
        notes.append(f"{len(empty)} of {len(texts)} records of {table.where} have no text and were dropped.")
    labels, respelt = _labels(table, columns.label, tuple(label_names), keep, part, fixed)
    if respelt:
        notes.append(
            f"{respelt} of {len(keep)} records of {table.where} have a label that differs from one of the "
            "label set in capitals, blanks, Unicode form or the writing of a number alone; it was taken for "
            "that one."
        )
    notes += _cautions(table, columns.text, texts, label_names)
    units, sites = (
        _names(table, column, setting, keep, notes)
        for column, setting in ((columns.unit, "unit"), (columns.site, "site"))
    )
    return Corpus(
        name=name,
        texts=tuple(texts[i] for i in keep),
        pairs=None if pairs is None else tuple(pairs[i] for i in keep),
        labels=labels,
        label_names=tuple(label_names),
        units=units,
        sites=sites,
        notes=tuple(notes),
    )


def _cautions(table: Table, column: str, texts: Sequence[str], labels: Sequence[str]) -> list[str]:
    """Notes of what is read as it stands, and is perhaps not meant so."""
    found = []
    if lost := [i for i, text in enumerate(texts) if text in LOST]:
        found.append(
            f"{len(lost)} of {len(texts)} texts in column {column!r} of {table.where} are how programs write "
            f"a missing value ({_rows(lost)}), and count as texts. Remove these records if they have none."
        )
    known = {folded(label) for label in labels}
    if len(known) < len(labels):
        found.append(
            f"{len(labels) - len(known)} of the {len(labels)} labels declared for {table.where} differ "
            "from another in capitals, blanks or Unicode form alone. Each is a class of its own."
        )
    if alike := look_alikes(labels):
        found.append(
            f"{len(alike)} of the {len(labels)} labels of {table.where} look like another, with letters of "
            "another alphabet (a Cyrillic or Greek letter for a Latin one). Each is a class of its own: if "
            "it is not meant so, write them anew."
        )
    if (bare := sum(bool(text) and not _LETTER.search(text) for text in texts)) > len(texts) / 2:
        found.append(
            f"{bare} of {len(texts)} texts in column {column!r} of {table.where} have no letter in them. "
            f"If the texts stand in another column, name it in {table.group}.text."
        )
    joined = [label for label in labels if len(parts := JOINED.split(label)) > 1
              and {folded(part) for part in parts} <= known]  # fmt: skip
    if joined:
        found.append(
            f"{len(joined)} of the {len(labels)} labels of {table.where} are others joined by a sign, as "
            "several labels of one record are written. Each is a class of its own: several labels a record "
            "(multi-label) are not supported."
        )
    return found


def _texts(table: Table, column: str, setting: str) -> tuple[list[str], list[int]]:
    texts: list[str] = []
    empty: list[int] = []
    wrong: list[int] = []
    half: list[int] = []
    for i, value in enumerate(table.columns[column]):
        text = ""
        if isinstance(value, str):
            text = value.strip()
            if _is_half(text):
                half.append(i)
        elif not is_missing(value):
            wrong.append(i)
        if not text:
            empty.append(i)
        texts.append(text)
    if wrong:
        kinds = sorted({type(table.columns[column][i]).__name__ for i in wrong})
        raise DataError(
            f"Column {column!r} of {table.where} holds {' and '.join(kinds)} instead of text in {len(wrong)} "
            f"records ({_rows(wrong)}). Name the column that holds the texts in "
            f"{table.group}.{setting}."
        )
    if half:
        raise _half_characters(table, column, half)
    return texts, empty


def _half_characters(table: Table, column: str, rows: Sequence[int]) -> DataError:
    return DataError(
        f"Column {column!r} of {table.where} holds half a character in {len(rows)} records "
        f"({_rows(rows)}): a surrogate such as \\ud83d without its other half, of an emoji that was cut in "
        "two. No text can hold one. Write these records anew, or remove them."
    )


def _refuse_kinds(table: Table, column: str, setting: str, rows: Iterable[int]) -> None:
    """Refuses labels, persons and sites that are no names: lists, mappings, bytes, halves of characters."""
    values = table.columns[column]
    wrong, half = [], []
    for i in rows:
        if isinstance(values[i], (list, tuple, dict, set, bytes, np.ndarray)):
            wrong.append(i)
        elif isinstance(values[i], str) and _is_half(values[i]):
            half.append(i)
    if wrong:
        kinds = sorted({"list" if isinstance(values[i], (tuple, np.ndarray)) else type(values[i]).__name__
                        for i in wrong})  # fmt: skip
        what = "one label, which is a text or a number" if setting == "label" else "one name"
        several = " Several labels a record (multi-label) are not supported." if setting == "label" else ""
        raise DataError(
            f"Column {column!r} of {table.where} ({table.group}.{setting}) holds a {' and a '.join(kinds)} "
            f"in {len(wrong)} records ({_rows(wrong)}), and each record has {what}.{several} Give each "
            f"record one, or name another column in {table.group}.{setting}."
        )
    if half:
        raise _half_characters(table, column, half)


def _labels(
    table: Table, column: str, names: tuple[str, ...], keep: list[int], part: bool, fixed: bool
) -> tuple[Any, int]:
    """Positions in the label set, int64 [n], and how many records spell theirs in another way."""
    index = {as_label(label): i for i, label in enumerate(names)}
    if len(index) != len(names):
        raise DataError(
            f"The label set of {table.where} names a label twice. Give each label once in data.labels."
        )
    if halves := [label for label in names if _is_half(label)]:
        raise DataError(
            f"The label set of {table.where} has {len(halves)} labels with half a character: a surrogate "
            "such as \\ud83d without its other half, of an emoji that was cut in two. Write them anew."
        )
    if len(names) < 2:
        raise DataError(
            f"{table.where} has {'one class only' if names else 'no labels'} in column {column!r}; a"
            f" classifier needs two or more. Name another column in {table.group}.label, or declare all"
            " labels in data.labels."
        )
    # Another spelling will do where only one label can be meant.
    by_form: dict[str, int] = {}
    for label, i in index.items():
        by_form[folded(label)] = -1 if folded(label) in by_form else i
    # Numbers are positions in the label set, unless the labels themselves are numbers.
    if not any(INTEGER.fullmatch(name) for name in names):
        index.update({str(i): i for i in range(len(names)) if str(i) not in index})
    values = table.columns[column]
    _refuse_kinds(table, column, "label", keep)
    found, respelt = [], 0
    for i in keep:
        key = "" if is_missing(values[i]) else as_label(values[i])
        place = index.get(key)
        if place is None:
            place = by_form.get(folded(key), -1)
            respelt += place >= 0
        found.append(place)
    labels = np.array(found, dtype=np.int64)
    missing = [i for i in keep if is_missing(values[i]) or as_text(values[i]) == ""]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(values)} records of {table.where} have no label in column {column!r} "
            f"({_rows(missing)}). Remove or label them."
        )
    unknown = [keep[i] for i in np.flatnonzero(labels < 0)]
    if unknown:
        if len(unknown) == len(keep) and all(as_text(values[i]) == "-1" for i in unknown):
            raise DataError(
                f"{table.where} is unlabelled: every label in column {column!r} is -1, as in hidden test"
                " sets. Use another split (data.test_split=validation, or null to hold out part of the"
                " training data)."
            )
        raise DataError(
            f"{len(unknown)} of {len(values)} records of {table.where} have a label in column {column!r} that"
            f" is not in the label set of {len(names)} ({_rows(unknown)}{_values(table, column, unknown)}). "
            + (
                f"The model has {_few(names)}: correct them, or name another column in {table.group}.label."
                if fixed
                else "Correct them, or declare all labels in data.labels."
            )
        )
    if not part and len(np.unique(labels)) < 2:
        raise DataError(
            f"{table.where} has one class only in column {column!r}: all {len(keep)} records carry the same"
            f" label. A classifier needs two or more; name another column in {table.group}.label, or add"
            " records of another class."
        )
    return labels, respelt


def _names(
    table: Table, column: str | None, setting: str, keep: list[int], notes: list[str]
) -> StrArray | None:
    """Persons or sites, str [n]; a spelling that stands for another adds to `notes`."""
    if column is None:
        return None
    values = table.columns[column]
    _refuse_kinds(table, column, setting, keep)
    # NA may be a site, as a part of the world is called.
    lost = LOST if setting == "unit" else LOST - {"NA"}
    missing = [i for i in keep if is_missing(values[i]) or as_text(values[i]) in {"", *lost}]
    if missing:
        what = "which person they belong to" if setting == "unit" else "which site they come from"
        raise DataError(
            f"{len(missing)} of {len(values)} records of {table.where} do not say {what}: column {column!r}"
            f" ({table.group}.{setting}) is empty, or how programs write a missing value, in "
            f"{_rows(missing)}. Fill it or remove these records; fedtune does not guess."
        )
    keys = [as_text(values[i]) for i in keep]
    spelt = one_spelling(set(keys))
    found = [spelt[key] for key in keys]
    if respelt := sum(name != key for name, key in zip(found, keys, strict=True)):
        what = "persons" if setting == "unit" else "sites"
        notes.append(
            f"{respelt} of {len(keep)} records of {table.where} have a name in column {column!r} "
            f"({table.group}.{setting}) that differs from another in capitals, blanks, Unicode form or the "
            f"writing of a number alone; such {what} were taken for one."
        )
    if alike := look_alikes(spelt.values()):
        what = "persons, each protected by itself" if setting == "unit" else "sites"
        notes.append(
            f"{len(alike)} names in column {column!r} of {table.where} ({table.group}.{setting}) look like "
            "another, with letters of another alphabet (a Cyrillic or Greek letter for a Latin one). They "
            f"count as different {what}: if they are not, write them anew."
        )
    return np.array(found)
