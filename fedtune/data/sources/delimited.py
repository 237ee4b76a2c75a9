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
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedtune.data.sources.decoding import open_text
from fedtune.data.sources.spellings import column_name
from fedtune.errors import DataError

__all__ = ["Delimited", "open_delimited"]

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_DECLARED = re.compile(r'"?sep ?= ?(.)"?', re.IGNORECASE)
_QUOTED = re.compile(r'"(?:[^"]|"")*"')


@dataclass(frozen=True)
class Delimited:
    """A file that is being read.

    Attributes:
        header: names of columns, without blanks around them.
        rows: fields as they are written, as many as the header has; reading on raises as `open_delimited`.
        notes: what was decided.
    """

    header: list[str]
    rows: Iterator[list[str]]
    notes: tuple[str, ...] = ()


@dataclass
class _Row:
    first: int  # line on which it begins, from 1
    last: int
    fields: list[str]


@contextmanager
def open_delimited(
    path: Path, delimiter: str, used: Collection[str], label: str | None = None
) -> Iterator[Delimited]:
    """The rows of a file, one at a time.

    Args:
        path: of the file.
        delimiter: that its ending promises.
        used: names of the columns in use.
        label: the one among them that holds labels, by which a quote that swallows rows is noticed.

    Raises:
        DataError: it is empty, a row has another number of fields, or a quote is not where one may be.
    """
    with open_text(path) as text:
        declared = _DECLARED.fullmatch(text.readline().rstrip("\r\n"))
    chosen = _delimiter(path, delimiter, used) if declared is None else declared[1]
    skipped = 0 if declared is None else 1
    named = _DELIMITERS.get(chosen, repr(chosen))
    notes = () if chosen == delimiter else (f"{path.name} has {named} between its fields; it was read so.",)
    bare = chosen == "\t" and _has_bare_quotes(path, skipped)
    with open_text(path, "\n" if bare else "") as text:
        for _ in range(skipped):
            text.readline()
        rows = _bare(text) if bare else _quoted(path, text, chosen, skipped)
        first = next((row for row in rows if not _is_blank(row)), None)
        if first is None:
            raise DataError(f"{path} is empty. Name a file that holds records.")
        header = [column_name(name) for name in first.fields]
        yield Delimited(header, _checked(path, rows, header, chosen, label, skipped), notes)


def _checked(
    path: Path, rows: Iterator[_Row], header: list[str], delimiter: str, label: str | None, skipped: int
) -> Iterator[list[str]]:
    """The fields of `rows`; raises `DataError` at the first that are too few or too many, and at the end for
    rows that were swallowed."""
    at = header.index(label) if label is not None and label in header else None
    number, labels, long = 0, set[str](), list[tuple[int, int]]()
    for row in rows:
        if _is_blank(row):
            continue
        number += 1
        while len(row.fields) > len(header) and not row.fields[-1].strip():
            row.fields.pop()  # a delimiter at the end of each line, but of the header's
        if len(header) == 1 and number == 1 < len(row.fields):
            raise DataError(
                f"The first line of {path} that is not blank is no header: it names one column, and the next "
                f"has {len(row.fields)} fields. Take out what stands above the line with the columns' names."
            )
        if len(row.fields) != len(header):
            raise DataError(
                f"Row {number} of {path} (line {row.first + skipped}) has {len(row.fields)} fields, the "
                f"header {len(header)}. Put quotes around texts that hold "
                f"{_DELIMITERS.get(delimiter, repr(delimiter))} or line ends."
            )
        if [column_name(field) for field in row.fields] == header:
            raise DataError(
                f"Row {number} of {path} (line {row.first + skipped}) is the header again, as of two "
                "files that were put together. Take that line out: its words would be a record."
            )
        if at is not None and row.last > row.first:
            long.append((row.first, row.last))
        elif at is not None:
            labels.add(row.fields[at].strip())
        yield row.fields
    if at is not None and long:
        _refuse_swallowed(path, delimiter, long, len(header), at, labels, skipped)


def _is_blank(row: _Row) -> bool:
    """Is it of blanks alone, as a spreadsheet leaves below its table, or a mark of the file's end?"""
    return not any(field.strip().strip("\x00\x1a") for field in row.fields)


def _delimiter(path: Path, expected: str, used: Collection[str]) -> str:
    """`expected`, unless another one makes the columns in use of the header, or it makes one name of it."""
    with open_text(path) as text:
        line = next((line for line in text if line.strip()), "").strip()
    if line.startswith(("{", "[")):
        raise DataError(f"{path} is JSON, by its content. Let its name end in .jsonl.")
    names = {
        delimiter: [column_name(name.strip(' \t"\ufeff')) for name in line.split(delimiter)]
        for delimiter in (expected, *_DELIMITERS)
    }
    fitting = [delimiter for delimiter, found in names.items() if set(used) <= set(found)]
    if fitting:
        return fitting[0]
    return expected if len(names[expected]) > 1 else max(names, key=lambda delimiter: len(names[delimiter]))


def _has_bare_quotes(path: Path, skipped: int) -> bool:
    """Is in a TSV a quote a quote? False: it has quoting, as CSV, or no quotes."""
    width, quotes, all_whole = None, False, True
    with open_text(path, "\n") as text:
        for number, line in enumerate(text):
            line = _without_end(line)
            if "\r" in line:
                return False
            if number < skipped or not line.strip():
                continue
            fields = line.split("\t")
            if width not in (None, len(fields)):
                return False
            width = len(fields)
            if '"' in line:
                quotes = True
                all_whole &= all(_QUOTED.fullmatch(field) for field in fields if '"' in field)
    return quotes and not all_whole


def _bare(text: Iterable[str]) -> Iterator[_Row]:
    for number, line in enumerate(text, start=1):
        if line.strip():
            yield _Row(number, number, _without_end(line).split("\t"))


def _without_end(line: str) -> str:
    return line.removesuffix("\n").removesuffix("\r")


def _quoted(path: Path, text: Iterable[str], delimiter: str, skipped: int) -> Iterator[_Row]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    # Line ends are kept, because a quoted text may hold its own.
    reader = csv.reader(text, delimiter=delimiter, strict=True)
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
    path: Path,
    delimiter: str,
    long: Sequence[tuple[int, int]],
    width: int,
    label: int,
    labels: Collection[str],
    skipped: int,
) -> None:
    """Refuses rows of several lines (`long`, first and last) each of which is a record by itself, with a
    label that others have too."""
    wanted = {number for first, last in long for number in range(first, last + 1)}
    with open_text(path) as text:
        numbered = enumerate(text, start=1 - skipped)
        lines = {
            number: line.rstrip("\r\n").split(delimiter) for number, line in numbered if number in wanted
        }
    for first, last in long:
        alone = [lines[number] for number in range(first, last + 1)]
        if all(len(one) == width and one[label].strip().strip('"') in labels for one in alone):
            raise DataError(
                f"Lines {first + skipped} to {last + skipped} of {path} are one record, since a "
                "quote opens in the first of them and closes in the last, and yet each looks like a record "
                'of its own. Write a quote that belongs to a text twice ("") and quote that text as a '
                "whole, or take the quote out."
            )
