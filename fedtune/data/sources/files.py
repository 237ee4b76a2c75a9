"""`data=files`: CSV, TSV, JSONL and Parquet, one file a split, read as they are.

`data.path` is a folder with `train.csv` (and, if wished, `test.csv` and others), or one file that is the
train split. Nothing is guessed about types: a CSV cell `NA` or `007` is that text. The label set comes
from `data.labels`, else from `categories.json` (a JSON list) or `labels.txt` (one label a line) beside
the data; only without these is it taken from the data, and then a note says so, because a label that
only one person has would be a release (PITFALLS 19).

What it does not do: recursive folders, compressed files, other encodings than UTF-8.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fedtune.config.schema import DataConfig
from fedtune.data.sources.columns import Columns, Table
from fedtune.errors import DataError, ResourceError

__all__ = ["LABEL_FILES", "beside", "find_split", "list_splits", "read_table", "state_of"]

LABEL_FILES = ("categories.json", "labels.txt")


def _root(config: DataConfig) -> Path:
    if not config.path:
        raise DataError(
            "data=files needs data.path: a folder with train.csv (or .tsv, .jsonl, .parquet), or one file."
        )
    path = Path(config.path).expanduser()
    if not path.exists():
        raise DataError(f"data.path is {path}, and there is no such file or folder. Name one that exists.")
    return path


def list_splits(config: DataConfig) -> dict[str, Path]:
    """Split name -> file, of the data files in `data.path` (a single file is the train split)."""
    root = _root(config)
    if root.is_file():
        return {config.train_split: root}
    splits: dict[str, Path] = {}
    for path in sorted(root.iterdir()):
        if path.suffix.lower() not in READERS or not path.is_file():
            continue
        if path.stem in splits:
            raise DataError(
                f"The folder {root} has two files for split {path.stem!r}: {splits[path.stem].name} and"
                f" {path.name}. Remove one, or let data.path name one file."
            )
        splits[path.stem] = path
    return splits


def find_split(config: DataConfig, setting: str) -> Path:
    """The file of `data.train_split` or `data.test_split` (`setting` says which)."""
    split = getattr(config, setting)
    root = _root(config)
    splits = list_splits(config)
    if split in splits:
        path = splits[split]
        if path.suffix.lower() not in READERS:
            raise DataError(
                f"data.path is {path}, whose ending is not known. fedtune reads {', '.join(READERS)}."
            )
        return path
    if root.is_file():
        raise DataError(
            f"data.path names one file, {root}, which has no split {split!r} (data.{setting}). Let data.path"
            " name the folder, or set data.test_split=null to hold out part of the training data."
        )
    raise DataError(
        f"The folder {root} has no file for split {split!r} (data.{setting}): it holds "
        f"{', '.join(path.name for path in splits.values()) or 'no data file'}. fedtune reads "
        f"{split}{f' or {split}'.join(READERS)}; set data.{setting} to a split that is there."
    )


def state_of(root: Path) -> list[tuple[str, int, int]]:
    """(name, bytes, time of change in ns) of every file that a Corpus from `root` may depend on."""
    files = sorted(root.iterdir()) if root.is_dir() else [root, *(root.parent / name for name in LABEL_FILES)]
    known = [file for file in files if file.name in LABEL_FILES or file.suffix.lower() in READERS]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in known if file.is_file()]


def beside(path: Path) -> tuple[str, ...] | None:
    """The public label set from a file beside the data, or None if there is none."""
    for name in LABEL_FILES:
        file = path.parent / name
        if not file.is_file():
            continue
        text = _text(file)
        if file.suffix == ".txt":
            labels = [line.strip() for line in text.splitlines() if line.strip()]
        else:
            try:
                labels = json.loads(text)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"The label set {file} is not JSON: {error}. Give a list of label names."
                ) from error
            if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
                raise DataError(f"The label set {file} is not a JSON list of label names.")
        return tuple(labels)
    return None


def read_table(path: Path, columns: Columns) -> Table:
    """Reads the columns in use; columns that are not there are left for `build_corpus` to name.

    Raises:
        DataError: the file is empty, malformed, not UTF-8, or has a column in use twice.
        ResourceError: it may not be read.
    """
    try:
        header, values = READERS[path.suffix.lower()](path, columns)
    except PermissionError as error:
        raise ResourceError(f"{path} may not be read: {error.strerror}. Change its permissions.") from error
    for setting, column in columns.used().items():
        if header.count(column) > 1:
            raise DataError(
                f"{path} has {header.count(column)} columns named {column!r} (data.{setting}); fedtune does"
                " not guess which. Rename them."
            )
    return Table(where=str(path), columns=values)


Read = tuple[list[str], dict[str, Any]]


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8, for instance with "
            "'iconv -f WINDOWS-1252 -t UTF-8'."
        ) from error


def _empty(path: Path) -> DataError:
    return DataError(f"{path} is empty. Name a file that holds records.")


def _delimited(delimiter: str) -> Callable[[Path, Columns], Read]:
    def read(path: Path, columns: Columns) -> Read:
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        # Line ends are kept, because a quoted text may hold its own; str.splitlines would also cut at U+2028.
        rows = csv.reader(io.StringIO(_text(path), newline=""), delimiter=delimiter, strict=True)
        try:
            header = next(rows, None)
            if not header:
                raise _empty(path)
            wanted = {column: header.index(column) for column in columns.used().values() if column in header}
            values: dict[str, list[str]] = {name: [] for name in header}
            for number, row in enumerate(rows, start=1):
                if not row:
                    continue
                if len(row) != len(header):
                    raise DataError(
                        f"Row {number} of {path} (line {rows.line_num}) has {len(row)} fields, the header "
                        f"{len(header)}. Put quotes around texts that hold "
                        f"{'tabs' if delimiter == chr(9) else 'commas'} or line ends."
                    )
                for column, at in wanted.items():
                    values[column].append(row[at])
        except csv.Error as error:
            raise DataError(
                f"{path} is malformed near line {rows.line_num}: {error}. Check its quotes."
            ) from error
        return header, values

    return read


def _jsonl(path: Path, columns: Columns) -> Read:
    wanted = list(columns.used().values())
    header: dict[str, None] = {}
    records: list[dict[str, Any]] = []
    repeated: list[str] = []

    def unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(items)
        if len(record) < len(items):
            names = [name for name, _ in items]
            repeated.extend({name for name in names if names.count(name) > 1} & set(wanted))
        return record

    for number, line in enumerate(_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=unique)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(
                f"Line {number} of {path} is not JSON: {error}. Each line is one JSON object."
            ) from error
        if not isinstance(record, dict):
            raise DataError(
                f'Line {number} of {path} is not a JSON object. Each line is one, such as {{"text": ...}}.'
            )
        header.update(dict.fromkeys(record))
        records.append({name: record.get(name) for name in wanted})
    if not records:
        raise _empty(path)
    values = {name: [record[name] for record in records] if name in wanted else [] for name in header}
    return [*header, *set(repeated)], values


def _parquet(path: Path, columns: Columns) -> Read:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.stat().st_size == 0:
        raise _empty(path)
    try:
        with pq.ParquetFile(path) as file:
            header = list(file.schema_arrow.names)
            wanted = [name for name in columns.used().values() if header.count(name) == 1]
            table = file.read(columns=wanted)
            values: dict[str, Iterable[Any]] = {name: [] for name in header}
            for name in wanted:
                column = table.column(name)
                if pa.types.is_dictionary(column.type):
                    column = column.cast(column.type.value_type)
                values[name] = column.to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise DataError(f"{path} is not a readable Parquet file: {reason}. Write it anew.") from error
    return header, values


READERS: dict[str, Callable[[Path, Columns], Read]] = {
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}
