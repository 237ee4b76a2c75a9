"""Text with a record a line and a delimiter between fields -> rows, as people write such files.

The delimiter is the one of the file's ending, unless the header has the columns in use only by another one
(spreadsheets of half of Europe write semicolons into .csv), or a first line `sep=;` says so.

Quotes. CSV has them: a quoted field may hold delimiters and line ends. A TSV as people write it has none, so
that a text may begin with a quote: where each line by itself has the header's fields, a TSV is read without
quoting, unless all of its quotes are of whole quoted fields, as pandas writes them. Where a quote swallows
lines each of which looks like a record of its own, the file is refused, with the lines.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedtune.errors import DataError

__all__ = ["Delimited", "read_delimited"]

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_DECLARED = re.compile(r"sep=(.)\r?$", re.IGNORECASE)
_QUOTED = re.compile(r'"(?:[^"]|"")*"')


@dataclass(frozen=True)
class Delimited:
    """A file's header and rows; every row has as many fields as the header.

    Attributes:
        header: names of columns, without blanks around them.
        rows: fields as they are written.
        notes: what was decided while reading.
    """

    header: list[str]
    rows: list[list[str]]
    notes: tuple[str, ...] = ()


@dataclass
class _Row:
    first: int  # line on which it begins, from 1
    last: int
    fields: list[str]


def read_delimited(path: Path, text: str, delimiter: str, used: Collection[str], label: str) -> Delimited:
    """The rows of a file.

    Args:
        path: names it in messages.
        text: what is in it.
        delimiter: that its ending promises.
        used: names of the columns in use.
        label: the one among them that holds labels.

    Raises:
        DataError: it is empty, a row has another number of fields, or a quote is not where one may be.
    """
    notes: list[str] = []
    skipped = 0
    first, _, rest = text.partition("\n")
    if (declared := _DECLARED.fullmatch(first)) is not None:
        chosen, text, skipped = declared[1], rest, 1
    else:
        chosen = _delimiter(text, delimiter, used)
    if chosen != delimiter:
        notes.append(
            f"{path.name} has {_DELIMITERS.get(chosen, repr(chosen))} between its fields; it was read so."
        )
    rows = _without_quotes(text) if chosen == "\t" else None
    if rows is None:
        rows = list(_quoted(path, text, chosen, skipped))
    if not rows:
        raise DataError(f"{path} is empty. Name a file that holds records.")
    header = [name.strip().strip("\ufeff\u200b") for name in rows[0].fields]
    # A row of blanks alone is what a spreadsheet leaves below its table.
    rows = [row for row in rows[1:] if any(field.strip() for field in row.fields)]
    for number, row in enumerate(rows, start=1):
        if len(row.fields) != len(header):
            raise DataError(
                f"Row {number} of {path} (line {row.first + skipped}) has {len(row.fields)} fields, the "
                f"header {len(header)}. Put quotes around texts that hold "
                f"{_DELIMITERS.get(chosen, repr(chosen))} or line ends."
            )
    if label in header:
        _refuse_swallowed(path, text, chosen, rows, len(header), header.index(label), skipped)
    return Delimited(header, [row.fields for row in rows], tuple(notes))


def _delimiter(text: str, expected: str, used: Collection[str]) -> str:
    """`expected`, unless another one makes the columns in use of the header, or it makes one name of it."""
    line = text.lstrip("\r\n").partition("\n")[0].strip()
    names = {
        delimiter: [name.strip(' \t"\ufeff') for name in line.split(delimiter)]
        for delimiter in (expected, *_DELIMITERS)
    }
    fitting = [delimiter for delimiter, found in names.items() if set(used) <= set(found)]
    if fitting:
        return fitting[0]
    return expected if len(names[expected]) > 1 else max(names, key=lambda delimiter: len(names[delimiter]))


def _without_quotes(text: str) -> list[_Row] | None:
    """The rows of a TSV in which a quote is a quote; None: it has quoting, as CSV."""
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    rows = [_Row(n, n, line.split("\t")) for n, line in enumerate(lines, start=1) if line.strip()]
    quotes = [field for row in rows for field in row.fields if '"' in field]
    if not quotes or "\r" in "".join(lines) or len({len(row.fields) for row in rows}) > 1:
        return None
    return None if all(_QUOTED.fullmatch(field) for field in quotes) else rows


def _quoted(path: Path, text: str, delimiter: str, skipped: int) -> Iterator[_Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    # Line ends are kept, because a quoted text may hold its own; str.splitlines would also cut at U+2028.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    last = 0
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            opened = (
                f" of a record that begins on line {last + 1 + skipped}" if reader.line_num > last + 1 else ""
            )
            raise DataError(
                f"{path} is malformed near line {reader.line_num + skipped}{opened}: {error}. A quote that "
                'belongs to a text is written twice (""), and a text that holds quotes is quoted as a whole.'
            ) from error
        if fields is None:
            return
        if fields:
            yield _Row(last + 1, reader.line_num, fields)
        last = reader.line_num


def _refuse_swallowed(
    path: Path, text: str, delimiter: str, rows: Sequence[_Row], width: int, label: int, skipped: int
) -> None:
    """Refuses rows of several lines each of which is a record by itself, with a label that others have "
    "too."""
    long = [row for row in rows if row.last > row.first]
    labels = {row.fields[label].strip() for row in rows if row.last == row.first}
    lines = re.split(r"\r\n|\r|\n", text) if long else []
    for row in long:
        alone = [line.split(delimiter) for line in lines[row.first - 1 : row.last]]
        if all(len(one) == width and one[label].strip().strip('"') in labels for one in alone):
            raise DataError(
                f"Lines {row.first + skipped} to {row.last + skipped} of {path} are one record, since a "
                "quote opens in the first of them and closes in the last, and yet each looks like a record "
                'of its own. Write a quote that belongs to a text twice ("") and quote that text as a '
                "whole, or take the quote out."
            )
