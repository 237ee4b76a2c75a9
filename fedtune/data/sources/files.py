"""`data=files`: CSV, TSV, JSON, JSONL and Parquet, one file a split, read as they are.

`data.path` is a folder with `train.csv` (and, if wished, `test.csv` and others), or one file that is the
train split. Nothing is guessed about types: a CSV cell `NA` or `007` is that text. The label set comes
from `data.labels`, else from `categories.json` (a JSON list) or `labels.txt` (one label a line) beside
the data; only without these is it taken from the data, and then a note says so, because a label that
only one person has would be a release (PITFALLS 19).

A file of text may be compressed (`train.csv.gz`, .bz2, .xz, .zip) and in any Unicode encoding
(`fedtune.data.sources.decoding`). Blanks around the name of a column do not count.

What it does not do: recursive folders, encodings of one byte a letter.
"""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fedtune.config.schema import DataConfig
from fedtune.data.sources.columns import Columns, Table
from fedtune.data.sources.decoding import bare_name, is_workbook, read_bytes, read_text
from fedtune.data.sources.delimited import read_delimited
from fedtune.errors import DataError, ResourceError

__all__ = ["LABEL_FILES", "beside", "find_split", "list_splits", "read_table", "readable", "state_of"]

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
        if _ending(path) not in READERS or not path.is_file():
            continue
        split = bare_name(path).stem
        if split in splits:
            raise DataError(
                f"The folder {root} has two files for split {split!r}: {splits[split].name} and"
                f" {path.name}. Remove one, or let data.path name one file."
            )
        splits[split] = path
    return splits


def find_split(config: DataConfig, setting: str) -> Path:
    """The file of `data.train_split` or `data.test_split` (`setting` says which)."""
    split = getattr(config, setting)
    root = _root(config)
    splits = list_splits(config)
    if split in splits:
        return readable(splits[split], "data.path")
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


def readable(path: Path, setting: str) -> Path:
    """`path`, if its ending is one that is read; `setting` named it. Raises `DataError` if not."""
    if _ending(path) not in READERS:
        raise DataError(
            f"{setting} is {path}, whose ending is not known. fedtune reads {', '.join(READERS)}."
        )
    return path


def _ending(path: Path) -> str:
    return bare_name(path).suffix.lower()


def state_of(root: Path) -> list[tuple[str, int, int]]:
    """(name, bytes, time of change in ns) of every file that a Corpus from `root` may depend on."""
    files = sorted(root.iterdir()) if root.is_dir() else [root, *(root.parent / name for name in LABEL_FILES)]
    known = [file for file in files if file.name in LABEL_FILES or _ending(file) in READERS]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in known if file.is_file()]


def beside(path: Path) -> tuple[str, ...] | None:
    """The public label set from a file beside the data, or None if there is none."""
    for name in LABEL_FILES:
        file = path.parent / name
        if not file.is_file():
            continue
        text = read_text(file)
        if file.suffix == ".txt":
            labels = [line.strip() for line in text.splitlines() if line.strip()]
        else:
            try:
                labels = json.loads(text)
            except (ValueError, RecursionError) as error:
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
        DataError: the file is empty, malformed, no text, or has a column in use twice.
        ResourceError: it may not be read.
    """
    notes: tuple[str, ...] = ()
    try:
        header, values, notes = READERS[_ending(path)](path, columns)
    except PermissionError as error:
        raise ResourceError(f"{path} may not be read: {error.strerror}. Change its permissions.") from error
    for setting, column in columns.used().items():
        if header.count(column) > 1:
            raise DataError(
                f"{path} has {header.count(column)} columns named {column!r} ({columns.group}.{setting});"
                " fedtune does not guess which. Rename them."
            )
    return Table(where=str(path), columns=values, notes=notes, group=columns.group)


Read = tuple[list[str], dict[str, Any], tuple[str, ...]]  # header, values by column, notes


def _empty(path: Path) -> DataError:
    return DataError(f"{path} is empty. Name a file that holds records.")


def _delimited(delimiter: str) -> Callable[[Path, Columns], Read]:
    def read(path: Path, columns: Columns) -> Read:
        content = read_bytes(path)
        if is_workbook(content):
            return _workbook(path, columns)
        used = list(columns.used().values())
        found = read_delimited(path, read_text(path, content), delimiter, used, columns.label)
        values: dict[str, list[str]] = {name: [] for name in found.header}
        for column in used:
            if column in found.header:
                at = found.header.index(column)
                values[column] = [row[at] for row in found.rows]
        return found.header, values, found.notes

    return read


def _workbook(path: Path, columns: Columns) -> Read:
    """The first sheet of a workbook of Excel, whose first row is the header."""
    try:
        openpyxl = importlib.import_module("openpyxl")  # nobody needs it who has no workbook
    except ImportError as error:
        raise DataError(
            f"{path} is a workbook of Excel, by its content, and reading one needs openpyxl: pip install "
            "openpyxl. Or open it in Excel and save it as CSV UTF-8."
        ) from error
    try:
        sheet = openpyxl.load_workbook(
            io.BytesIO(read_bytes(path)), read_only=True, data_only=True
        ).worksheets[0]
        rows = [
            row for row in sheet.iter_rows(values_only=True) if any(cell not in (None, "") for cell in row)
        ]
    except Exception as error:  # the library raises what it likes
        raise DataError(
            f"{path} is a workbook of Excel that cannot be read. Open it in Excel and save it as CSV UTF-8."
        ) from error
    if not rows:
        raise _empty(path)
    header = ["" if cell is None else str(cell).strip() for cell in rows[0]]
    values: dict[str, Any] = {name: [] for name in header}
    for name in columns.used().values():
        if name in header:
            values[name] = [row[header.index(name)] for row in rows[1:]]
    return header, values, (f"{path.name} is a workbook of Excel: its first sheet was read.",)


def _json(path: Path, columns: Columns) -> Read:
    """JSONL, one object a line; or a JSON array of objects."""
    wanted = list(columns.used().values())
    header: dict[str, None] = {}
    records: list[dict[str, Any]] = []
    repeated: list[str] = []

    def unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name.strip() for name, _ in items]
        record = dict(zip(names, (value for _, value in items), strict=True))
        if len(record) < len(items):
            repeated.extend({name for name in names if names.count(name) > 1} & set(wanted))
        return record

    def parsed(text: str, where: str, expected: str) -> Any:
        try:
            return json.loads(text, object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not JSON: {str(error).rstrip('.')}. {expected}") from error

    text, each = read_text(path), "Each line is one JSON object."
    if text.lstrip().startswith("["):
        listed = parsed(text, str(path), "It begins as an array of objects, and should end as one.")
        found = [(f"Element {number} of {path}", one) for number, one in enumerate(listed, start=1)]
    else:
        lines = enumerate(text.split("\n"), start=1)
        found = [
            (f"Line {number} of {path}", parsed(line, f"Line {number} of {path}", each))
            for number, line in lines
            if line.strip()
        ]
    for where, record in found:
        if not isinstance(record, dict):
            raise DataError(f'{where} is not a JSON object. Each is one, such as {{"text": ...}}.')
        header.update(dict.fromkeys(record))
        records.append({name: record.get(name) for name in wanted})
    if not records:
        raise _empty(path)
    values = {name: [record[name] for record in records] if name in wanted else [] for name in header}
    return [*header, *set(repeated)], values, ()


def _parquet(path: Path, columns: Columns) -> Read:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.stat().st_size == 0:
        raise _empty(path)
    try:
        with pq.ParquetFile(path) as file:
            names = list(file.schema_arrow.names)
            header = [name.strip() for name in names]
            used = columns.used().values()
            wanted = [name for name in names if name.strip() in used and header.count(name.strip()) == 1]
            table = file.read(columns=wanted)
            values: dict[str, Iterable[Any]] = {name: [] for name in header}
            for name in wanted:
                column = table.column(name)
                if pa.types.is_dictionary(column.type):
                    column = column.cast(column.type.value_type)
                values[name.strip()] = column.to_pylist()
    except (pa.ArrowException, OSError, ValueError, OverflowError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(f"{path} is not a readable Parquet file: {reason}. Write it anew.") from error
    return header, values, ()


READERS: dict[str, Callable[[Path, Columns], Read]] = {
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".jsonl": _json,
    ".json": _json,
    ".xlsx": _workbook,
    ".parquet": _parquet,
}
