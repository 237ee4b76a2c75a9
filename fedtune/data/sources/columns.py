"""Raw columns of a table -> a checked Corpus; every complaint about the data's content is made here.

Both `hub` and `files` end here, so that the same mistake gets the same words whatever the format.
Messages name columns, counts and row numbers, never a text, a person or a label's value: an error may
be shown to the server. Rows are numbered from 1, the header not counted.

Decisions. A record without text (empty, blank or null) is dropped, and a note counts it: dropping looks
at that record alone, so privacy is not touched. A record without a label or without a person is refused:
nobody but the owner knows what it is.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedtune.config.schema import DataConfig
from fedtune.data.corpus import Corpus, StrArray
from fedtune.errors import DataError

__all__ = ["Columns", "Table", "build_corpus", "derive_labels", "missing_column"]

SHOWN_ROWS = 5


@dataclass(frozen=True)
class Columns:
    """Which column is which (see `DataConfig`)."""

    text: str
    label: str
    text_pair: str | None = None
    unit: str | None = None
    site: str | None = None

    @classmethod
    def of(cls, data: DataConfig) -> Columns:
        """As the settings name them."""
        return cls(data.text, data.label, data.text_pair, data.unit, data.site)

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
    """

    where: str
    columns: dict[str, Sequence[Any]]
    class_names: tuple[str, ...] | None = None


def missing_column(where: str, setting: str, column: str, existing: Sequence[str]) -> DataError:
    """The error for a column that is not there: which exist, and which is nearest."""
    nearest = difflib.get_close_matches(column.lower(), [name.lower() for name in existing], n=1, cutoff=0.6)
    hint = next((name for name in existing if nearest and name.lower() == nearest[0]), None)
    did_you_mean = f" Did you mean data.{setting}={hint}?" if hint else f" Set data.{setting} to one of them."
    return DataError(
        f"{where} has no column {column!r} (data.{setting}); its columns are: "
        f"{', '.join(existing) or 'none'}.{did_you_mean}"
    )


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _key(value: Any) -> str:
    """A label, person or site as text: 3, 3.0 and True are what a spreadsheet would show."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip()


def _rows(indices: Iterable[int]) -> str:
    shown = [str(i + 1) for i in indices]
    more = f" and {len(shown) - SHOWN_ROWS} more" if len(shown) > SHOWN_ROWS else ""
    return ("row " if len(shown) == 1 else "rows ") + ", ".join(shown[:SHOWN_ROWS]) + more


def derive_labels(table: Table, column: str) -> tuple[str, ...]:
    """The distinct labels of `column`, sorted (as numbers if all are). Not public: the caller must say so."""
    names = {_key(value) for value in table.columns[column] if not _is_missing(value)} - {""}
    if all(name.lstrip("-").isdigit() for name in names):
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
            raise missing_column(table.where, setting, column, existing)
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
            "Name the column that holds the texts in data.text."
        )
    notes = list(notes)
    if empty:
        notes.append(f"{len(empty)} of {len(texts)} records of {table.where} have no text and were dropped.")
    labels = _labels(table, columns.label, tuple(label_names), keep, part, fixed)
    return Corpus(
        name=name,
        texts=tuple(texts[i] for i in keep),
        pairs=None if pairs is None else tuple(pairs[i] for i in keep),
        labels=labels,
        label_names=tuple(label_names),
        units=_names(table, columns.unit, "unit", keep),
        sites=_names(table, columns.site, "site", keep),
        notes=tuple(notes),
    )


def _texts(table: Table, column: str, setting: str) -> tuple[list[str], list[int]]:
    texts: list[str] = []
    empty: list[int] = []
    wrong: list[int] = []
    for i, value in enumerate(table.columns[column]):
        text = ""
        if isinstance(value, str):
            text = value.strip()
        elif not _is_missing(value):
            wrong.append(i)
        if not text:
            empty.append(i)
        texts.append(text)
    if wrong:
        kinds = sorted({type(table.columns[column][i]).__name__ for i in wrong})
        raise DataError(
            f"Column {column!r} of {table.where} holds {' and '.join(kinds)} instead of text in {len(wrong)} "
            f"records ({_rows(wrong)}). Name the column that holds the texts in data.{setting}."
        )
    return texts, empty


def _labels(
    table: Table, column: str, names: tuple[str, ...], keep: list[int], part: bool, fixed: bool
) -> Any:
    index = {label: i for i, label in enumerate(names)}
    if len(index) != len(names):
        raise DataError(
            f"The label set of {table.where} names a label twice. Give each label once in data.labels."
        )
    if len(names) < 2:
        raise DataError(
            f"{table.where} has {'one class only' if names else 'no labels'} in column {column!r}; a"
            " classifier needs two or more. Name another column in data.label, or declare all labels in"
            " data.labels."
        )
    # Numbers are positions in the label set, unless the labels themselves are numbers.
    if not any(name.lstrip("-").isdigit() for name in names):
        index.update({str(i): i for i in range(len(names))})
    values = table.columns[column]
    found = [-2 if _is_missing(values[i]) else index.get(_key(values[i]), -1) for i in keep]
    labels = np.array(found, dtype=np.int64)
    missing = [i for i in keep if _is_missing(values[i]) or _key(values[i]) == ""]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(values)} records of {table.where} have no label in column {column!r} "
            f"({_rows(missing)}). Remove or label them."
        )
    unknown = [keep[i] for i in np.flatnonzero(labels < 0)]
    if unknown:
        if len(unknown) == len(keep) and all(_key(values[i]) == "-1" for i in unknown):
            raise DataError(
                f"{table.where} is unlabelled: every label in column {column!r} is -1, as in hidden test"
                " sets. Use another split (data.test_split=validation, or null to hold out part of the"
                " training data)."
            )
        raise DataError(
            f"{len(unknown)} of {len(values)} records of {table.where} have a label in column {column!r} that"
            f" is not in the label set of {len(names)} ({_rows(unknown)}). "
            + (
                f"The model has {', '.join(names)}: correct them, or name another column in data.label."
                if fixed
                else "Correct them, or declare all labels in data.labels."
            )
        )
    if not part and len(np.unique(labels)) < 2:
        raise DataError(
            f"{table.where} has one class only in column {column!r}: all {len(keep)} records carry the same"
            " label. A classifier needs two or more; name another column in data.label, or add records of"
            " another class."
        )
    return labels


def _names(table: Table, column: str | None, setting: str, keep: list[int]) -> StrArray | None:
    if column is None:
        return None
    values = table.columns[column]
    missing = [i for i in keep if _is_missing(values[i]) or _key(values[i]) == ""]
    if missing:
        what = "which person they belong to" if setting == "unit" else "which site they come from"
        raise DataError(
            f"{len(missing)} of {len(values)} records of {table.where} do not say {what}: column {column!r}"
            f" (data.{setting}) is empty in {_rows(missing)}. Fill it or remove these records; fedtune does"
            " not guess."
        )
    return np.array([_key(values[i]) for i in keep])
