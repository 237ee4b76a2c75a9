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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from fedtune.config.files import meant_path
from fedtune.config.schema import DataConfig
from fedtune.data.sources.columns import Columns, Table
from fedtune.data.sources.decoding import bare_name, is_workbook, kind_of, open_bytes, open_text, read_text
from fedtune.data.sources.delimited import open_delimited
from fedtune.data.sources.spellings import column_name
from fedtune.errors import DataError, ResourceError

__all__ = [
    "LABEL_FILES",
    "Records",
    "beside",
    "find_split",
    "list_splits",
    "open_records",
    "read_table",
    "readable",
    "state_of",
]

LABEL_FILES = ("categories.json", "labels.txt")
_BATCH = 1024  # rows of a Parquet file that are in memory as Python's own values at once


def _root(config: DataConfig) -> Path:
    if not config.path:
        raise DataError(
            "data=files needs data.path: a folder with train.csv (or .tsv, .jsonl, .parquet), or one file."
        )
    path = Path(config.path).expanduser()
    if not path.exists():
        raise DataError(
            f"data.path is {path}, and there is no such file or folder. Name one that exists."
            + meant_path(path)
        )
    if not (path.is_file() or path.is_dir()):
        raise DataError(f"data.path is {path}, a pipe or device, which can be read once only. Name a file.")
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
        named = kind_of(path)
        raise DataError(
            f"{setting} is {path}, whose ending is not known. fedtune reads {', '.join(READERS)}, also "
            f"compressed.{f' By its content it is {named}' if named else ''}"
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
        if not labels:
            raise DataError(f"The label set {file} is empty. Write the labels into it, or remove it.")
        return tuple(labels)
    return None


@dataclass
class Records:
    """A file of records that is being read.

    Attributes:
        header: names of its columns, without blanks around them; of JSON, those of the records so far.
        rows: of each record what it has in the columns in use, in their order; None where it lacks one.
        notes: what was decided.
        complete: no more names come into the header.
    """

    header: list[str]
    rows: Iterator[tuple[Any, ...]]
    notes: tuple[str, ...] = ()
    complete: bool = True


@contextmanager
def open_records(path: Path, used: Mapping[str, str], label: str | None = None) -> Iterator[Records]:
    """Opens a file whose records are then read one by one, in bounded memory: of JSON if each has its line.

    Args:
        path: of the file.
        used: the columns in use, by the setting or option that names each.
        label: the one among them that holds labels.

    Raises:
        DataError: the file is empty, malformed, no text, or has a column in use twice; wherever that is met
            in reading on.
        ResourceError: it may not be read.
    """

    def refuse_twice(header: Sequence[str]) -> None:
        for setting, column in used.items():
            if header.count(column) > 1:
                raise DataError(
                    f"{path} has {header.count(column)} columns named {column!r} ({setting}); fedtune "
                    "does not guess which. Rename them."
                )

    try:
        with READERS[_ending(path)](path, tuple(dict.fromkeys(used.values())), label) as found:
            refuse_twice(found.header)
            yield found
            refuse_twice(found.header)
    except PermissionError as error:
        raise ResourceError(f"{path} may not be read: {error.strerror}. Change its permissions.") from error


def read_table(path: Path, columns: Columns) -> Table:
    """Reads the columns in use; columns that are not there are left for `build_corpus` to name.

    Raises:
        DataError, ResourceError: as `open_records`.
    """
    used = {f"{columns.group}.{setting}": column for setting, column in columns.used().items()}
    with open_records(path, used, columns.label) as found:
        rows = list(found.rows)
    values: dict[str, Sequence[Any]] = {name: [] for name in found.header}
    for at, name in enumerate(dict.fromkeys(used.values())):
        if name in values:
            values[name] = [row[at] for row in rows]
    return Table(where=str(path), columns=values, notes=found.notes, group=columns.group)


def _empty(path: Path) -> DataError:
    return DataError(f"{path} is empty. Name a file that holds records.")


def _picked(
    header: Sequence[str], rows: Iterable[Sequence[Any]], used: Sequence[str]
) -> Iterator[tuple[Any, ...]]:
    """Of rows of fields those in the columns `used`; None where a row has none."""
    places = [header.index(name) if name in header else len(header) for name in used]
    for row in rows:
        yield tuple(row[at] if at < len(row) else None for at in places)


def _delimited(delimiter: str) -> Reader:
    @contextmanager
    def read(path: Path, used: Sequence[str], label: str | None) -> Iterator[Records]:
        if is_workbook(path):
            with _workbook(path, used, label) as records:
                yield records
            return
        with open_delimited(path, delimiter, used, label) as found:
            yield Records(found.header, _picked(found.header, found.rows, used), found.notes)

    return read


@contextmanager
def _workbook(path: Path, used: Sequence[str], label: str | None) -> Iterator[Records]:
    """The first sheet of a workbook of Excel, whose first row is the header."""
    try:
        openpyxl = importlib.import_module("openpyxl")  # nobody needs it who has no workbook
    except ImportError as error:
        raise DataError(
            f"{path} is a workbook of Excel, by its content, and reading one needs openpyxl: pip install "
            "openpyxl. Or open it in Excel and save it as CSV UTF-8."
        ) from error
    with open_bytes(path) as file:
        rows = _sheet(path, openpyxl, file.read())
        first = next(rows, None)
        if first is None:
            raise _empty(path)
        header = ["" if cell is None else column_name(str(cell)) for cell in first]
        notes = (f"{path.name} is a workbook of Excel: its first sheet was read.",)
        yield Records(header, _picked(header, rows, used), notes)


def _sheet(path: Path, openpyxl: Any, content: bytes) -> Iterator[tuple[Any, ...]]:
    """The rows of a workbook's first sheet, blank ones left out."""
    try:
        sheet = openpyxl.load_workbook(io.BytesIO(content), read_only=True, data_only=True).worksheets[0]
        for row in sheet.iter_rows(values_only=True):
            if any(cell not in (None, "") for cell in row):
                yield row
    except Exception as error:  # the library raises what it likes
        raise DataError(
            f"{path} is a workbook of Excel that cannot be read. Open it in Excel and save it as CSV UTF-8."
        ) from error


@contextmanager
def _json(path: Path, used: Sequence[str], label: str | None) -> Iterator[Records]:
    """JSONL, one object a line; or a JSON array of objects, which is read whole."""
    header, known, repeated = list[str](), set[str](), set[str]()
    known_columns = set(used)

    def unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [column_name(name) for name, _ in items]
        record = dict(zip(names, (value for _, value in items), strict=True))
        if len(record) < len(items):
            repeated.update({name for name in names if names.count(name) > 1} & set(used))
        return record

    def parsed(content: str, where: str, expected: str) -> Any:
        try:
            return json.loads(content, object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            long = "set_int_max_str_digits" in str(error)  # advice for whoever writes the program
            reason = "it has a number of more than 4,300 digits" if long else str(error).rstrip(".")
            raise DataError(f"{where} is not JSON: {reason}. {expected}") from error

    def placed(text: TextIO) -> Iterator[tuple[str, Any]]:
        written = ((number, line) for number, line in enumerate(text, start=1) if line.strip())
        for place, (number, line) in enumerate(written):
            if place == 0 and line.lstrip().startswith("["):
                expected = "It begins as an array of objects, and should end as one."
                listed = parsed(line + text.read(), str(path), expected)
                yield from ((f"Element {n} of {path}", one) for n, one in enumerate(listed, start=1))
                return
            where = f"Line {number} of {path}"
            yield where, parsed(line, where, "Each line is one JSON object.")

    def rows(text: TextIO) -> Iterator[tuple[Any, ...]]:
        empty = True
        for where, record in placed(text):
            if not isinstance(record, dict):
                raise DataError(f'{where} is not a JSON object. Each is one, such as {{"text": ...}}.')
            tables = [value for value in record.values() if isinstance(value, (list, dict))]
            if empty and tables and (len(tables) == len(record) or not known_columns & record.keys()):
                raise DataError(
                    f"{where} is one object with whole columns or tables in it. Write one object a record, "
                    "each on a line or in an array; in pandas: to_json(FILE, orient='records', lines=True)."
                )
            header.extend(name for name in record if name not in known)
            known.update(record)
            empty = False
            yield tuple(record.get(name) for name in used)
        if empty:
            raise _empty(path)
        header.extend(repeated)

    with open_text(path) as text:
        yield Records(header, rows(text), complete=False)


@contextmanager
def _parquet(path: Path, used: Sequence[str], label: str | None) -> Iterator[Records]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    @contextmanager
    def named() -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError, ValueError, OverflowError, TypeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise DataError(f"{path} is not a readable Parquet file: {reason}. Write it anew.") from error

    def values(column: Any) -> Any:
        dictionary = pa.types.is_dictionary(column.type)
        return (column.cast(column.type.value_type) if dictionary else column).to_pylist()

    def rows(batches: Iterator[Any], places: Mapping[str, int]) -> Iterator[tuple[Any, ...]]:
        while True:
            with named():
                batch = next(batches, None)
                if batch is None:
                    return
                columns = [
                    values(batch.column(places[name])) if name in places else [None] * batch.num_rows
                    for name in used
                ]
            yield from zip(*columns, strict=True)

    if path.stat().st_size == 0:
        raise _empty(path)
    with ExitStack() as opened:
        with named():
            file = opened.enter_context(pq.ParquetFile(path))
            names = list(file.schema_arrow.names)
            header = [column_name(name) for name in names]
            wanted = [
                name for name, plain in zip(names, header, strict=True)
                if plain in used and header.count(plain) == 1
            ]  # fmt: skip
            batches = file.iter_batches(batch_size=_BATCH, columns=wanted)
        yield Records(header, rows(batches, {column_name(name): at for at, name in enumerate(wanted)}))


# Opens a file: its path, the columns in use, and that of labels.
Reader = Callable[[Path, Sequence[str], str | None], AbstractContextManager[Records]]
READERS: dict[str, Reader] = {
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".jsonl": _json,
    ".json": _json,
    ".xlsx": _workbook,
    ".parquet": _parquet,
}
