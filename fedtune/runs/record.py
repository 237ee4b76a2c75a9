"""The RunRecord: all that one run produced, as one JSON file (`record.json`, schema 1).

`read` refuses a file of another schema (both versions named), a half-written one, one that lacks keys, and
one in which a value is not what it should be (`fedtune.config.shapes`): readers may rely on its shape.
`write` is atomic: a reader sees the whole record or none. NaN and infinities become null, since JSON has no
numbers for them. A record is for publication: what depends on private records and was not charged is null in
it (`fedtune.privacy.publication`), and lies in `local.json` beside it.

The statement is the record in words (`fedtune.privacy.statement`); this module writes it beside the record.
`Result` is a finished run as its folder holds it: what `fedtune.run` returns.

Does not do: make a record (`fedtune.runs.assemble`) or judge it (`fedtune.report.frontier`).
"""

from __future__ import annotations

import html
import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fedtune.config.files import meant_path, replace_whole
from fedtune.config.shapes import problem_in, schema_of
from fedtune.errors import RecordError, ResourceError
from fedtune.federation.run_folder import LOCAL_NAME, read_local, update_local
from fedtune.privacy.publication import merge
from fedtune.privacy.publication import publish as door

__all__ = [
    "RECORD_NAME",
    "SCHEMA",
    "Result",
    "bought_records",
    "clean",
    "flatten",
    "publish",
    "read",
    "run_folder",
    "statement_page",
    "validate",
    "whole",
    "write",
    "write_statement",
]

SCHEMA = 1
RECORD_NAME = "record.json"
PICTURE_NAME = "strength.svg"  # beside statement.md


def clean(value: Any) -> Any:
    """`value` with only JSON's own types: NaN and infinities become None, numpy numbers plain ones."""
    if isinstance(value, Mapping):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    if isinstance(value, (str, bool)) or value is None:
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return clean(value.tolist())
    return str(value)


def publish(made: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """Writes what may be published of `made` to `record.json`, and keeps the rest for the owner.

    Of data that is not declared public, `local.json` of the folder gets what was measured or found in it
    (`fedtune.federation.run_folder`), and the record has null there.

    Returns:
        What was published.

    Raises:
        ResourceError: the disk does not take it.
    """
    published, own = _split(made)
    update_local(run_dir, record=clean(own))
    write(published, run_dir / RECORD_NAME)
    return published


def whole(run_dir: Path) -> dict[str, Any]:
    """The record of a folder with what the folder keeps for the owner.

    Raises:
        RecordError: as `read` does.
    """
    own = read_local(run_dir).get("record")
    record: dict[str, Any] = merge(read(run_dir), own)
    if own is not None:
        validate(record, f"{run_dir / RECORD_NAME} with {LOCAL_NAME}, which can be deleted if need be,")
    return record


def run_folder(path: Path | str) -> Path:
    """The run folder that `path` names: itself, or the folder of the record.json that it is."""
    path = named_path(path).expanduser()
    return path.parent if path.is_file() else path


def named_path(path: Path | str) -> Path:
    """`path` as a Path. Raises `RecordError` for what names no folder, such as None."""
    try:
        return Path(path)
    except TypeError:
        raise RecordError(
            f"{path!r} names no run. Give the folder of a finished run, as a text or a Path."
        ) from None


def statement_page(record: Mapping[str, Any], folder: Path) -> str:
    """The statement of `record` as Markdown; it shows the picture of its strength if `folder` has one."""
    from fedtune.privacy.statement.facts import statement_markdown

    return statement_markdown(record, PICTURE_NAME if (folder / PICTURE_NAME).exists() else None)


def write_statement(record: Mapping[str, Any], path: Path) -> str:
    """Writes the statement to `path` and its picture beside it; returns the page."""
    from fedtune.privacy.statement.facts import statement_picture

    picture = statement_picture(record)
    if picture is None:
        (path.parent / PICTURE_NAME).unlink(missing_ok=True)  # of the same run, before an audit disproved it
    else:
        (path.parent / PICTURE_NAME).write_text(picture, encoding="utf-8")
    text = statement_page(record, path.parent)
    path.write_text(text, encoding="utf-8")
    return text


def _split(made: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    data_public = made["privacy"].get("data_public") is True
    published, own = door("record", made, public_data=data_public)
    return clean(published), own


def write(record: Mapping[str, Any], path: Path) -> None:
    """Writes what may be published of `record` to `path`, whole or not at all.

    Raises:
        ResourceError: the disk does not take it.
    """
    text = json.dumps(_split(record)[0], indent=2, allow_nan=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_whole(path, text.encode())
    except OSError as error:
        raise ResourceError(
            f"Cannot write {path}: {error.strerror or error}. The run itself is done and its "
            "checkpoint is kept; make room, then resume the run to write its record."
        ) from error


def read(path: Path | str) -> dict[str, Any]:
    """The record at `path` (a file, or a run folder), validated.

    Raises:
        RecordError: there is none, or it is unfinished, damaged or of another schema; with the way out.
    """
    path = named_path(path)
    if path.is_dir():
        folder, path = path, path / RECORD_NAME
        if not path.exists():
            raise RecordError(_no_record(folder))
    try:
        text = path.read_text(encoding="utf-8")
        record = json.loads(text)
    except FileNotFoundError:
        raise RecordError(
            f"There is no {path}. Name the folder of a finished run (it holds record.json).{meant_path(path)}"
        ) from None
    except json.JSONDecodeError as error:
        raise RecordError(
            f"{path} is half-written or damaged: {error.msg} at character {error.pos} of {len(text)}. If its "
            f"run folder still has a checkpoint, 'fedtune run resume={path.parent}' writes it again."
        ) from error
    except (OSError, ValueError, RecursionError) as error:  # no text, or a number of thousands of digits
        raise RecordError(f"Cannot read {path}: {error}.") from error
    validate(record, str(path))
    return record


def _no_record(folder: Path) -> str:
    if (folder / "checkpoint").exists():
        return (
            f"The run in {folder} is not finished: it has a checkpoint and no record.json. Finish it with "
            f"'fedtune run resume={folder}'."
        )
    return (
        f"{folder} is not the folder of a run: it has no record.json. "
        "Name one that 'fedtune run' has printed."
    )


def validate(record: Any, name: str = "record") -> None:
    """Raises `RecordError` unless `record` has this schema's version and all its keys."""
    if not isinstance(record, dict):
        raise RecordError(f"{name} is no record: it holds a {type(record).__name__}, not an object.")
    found = record.get("schema")
    if found != SCHEMA or isinstance(found, bool):
        raise RecordError(
            f"{name} has schema {reprlib.repr(found)}, and this fedtune reads schema {SCHEMA}. Use the "
            "fedtune that wrote it (run.versions.fedtune in the file), or run it again."
        )
    sections = schema_of("record")["$defs"]["record"]
    missing = []
    for section in sections["required"]:
        part = record.get(section)
        if not isinstance(part, dict):
            missing.append(section)
        else:
            keys = sections["properties"][section].get("required", ())
            missing += [f"{section}.{key}" for key in keys if key not in part]
    if missing:
        raise RecordError(f"{name} is not a whole record: it lacks {', '.join(missing)}. Run it again.")
    found = problem_in("record", record) or _odd_promise(record["privacy"]) or _odd_setting(record["config"])
    if found is not None:
        raise RecordError(
            f"{name} is damaged, or somebody edited it: {found}. Nothing of it is used. Copy it again from "
            "where it came from; if its run folder still has a checkpoint, 'fedtune run resume=RUN_DIR' "
            "writes it again."
        )


def _odd_promise(privacy: Mapping[str, Any]) -> str | None:
    """An epsilon that belongs to no delta."""
    for place, one in (
        ("privacy", privacy),
        *((f"privacy.per_node[{i}]", e) for i, e in enumerate(privacy["per_node"])),
    ):
        if one["epsilon"] is not None and one["delta"] is None:
            return f"{place}.epsilon is {one['epsilon']!r}, and there is no {place}.delta that it belongs to"
    return None


_KINDS: dict[type, type | tuple[type, ...]] = {
    bool: bool,
    int: int,
    float: (int, float),
    str: str,
    list: list,
    tuple: list,
}


def _odd_setting(config: Mapping[str, Any]) -> str | None:
    """The first setting that is of another type than the schema's; null is what an older version lacked."""
    from fedtune.config.convert import settings

    for name, setting in settings().items():
        value: Any = config
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        wrong_bool = isinstance(value, bool) and setting.kind is not bool
        if value is not None and (wrong_bool or not isinstance(value, _KINDS[setting.kind])):
            return f"config.{name} is {repr(value)[:60]}, and should be {setting.allowed}"
    return None


def bought_records(record: Mapping[str, Any]) -> int | None:
    """Declared records in all, which data is bought by; None where persons or clients are declared."""
    sizes = (record.get("data") or {}).get("declared_sizes")
    return sum(map(int, sizes.values())) if record["privacy"]["unit"] == "record" and sizes else None


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by dotted name."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found.update(flatten(value, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = value
    return found


@dataclass(frozen=True)
class Result:
    """A finished run. `Result(path)` opens one that was made earlier; nothing is read before it is asked for.

    In a notebook it shows epsilon with delta, unit and adjacency, accuracy, and what the run cost: only what
    may be published, because notebooks travel; `local.json` is for the owner of the data. Each property
    raises `RecordError` if the folder has no finished run.

    Attributes:
        path: the run folder.
    """

    path: Path

    def __post_init__(self) -> None:
        given = named_path(self.path).expanduser()
        object.__setattr__(self, "path", run_folder(given))
        # A record may have another name, and others beside it: a study keeps them all in one folder.
        object.__setattr__(self, "_file", given if given.is_file() else self.path)

    @cached_property
    def record(self) -> dict[str, Any]:
        """The whole record, `record.json`."""
        file: Path = vars(self)["_file"]
        return read(file)

    @property
    def epsilon(self) -> float | None:
        """Upper bound, accounted over the releases that were made; None if there is none (trust `none`)."""
        return self._privacy("epsilon")

    @property
    def delta(self) -> float | None:
        """The delta that `epsilon` belongs to; None where there is no epsilon."""
        return self._privacy("delta")

    @property
    def unit(self) -> str:
        """What is protected as one whole: `record`, `person` or `client`."""
        return str(self._privacy("unit"))

    @property
    def adjacency(self) -> str:
        """What neighbours differ in: `add or remove one record`."""
        return str(self._privacy("adjacency"))

    @property
    def accuracy(self) -> float | None:
        """As a share; None if it was not measured, or is hidden by its noise."""
        accuracy: float | None = self.record["metrics"]["accuracy"]
        return accuracy

    @property
    def left_out(self) -> dict[str, str]:
        """By site that should have taken part and has no part in the model, why (it refused, say)."""
        from fedtune.privacy.statement.words import left_out

        return left_out(self.record)

    @property
    def statement(self) -> str:
        """What was promised to whom, as Markdown, for a privacy officer."""
        return statement_page(self.record, self.path)

    @property
    def adapter(self) -> Path:
        """The folder of the adapter, which `peft.PeftModel.from_pretrained` loads."""
        return self.path / str(self.record["artifacts"]["adapter"])

    def _privacy(self, name: str) -> Any:
        return self.record["privacy"][name]

    def __repr__(self) -> str:
        try:
            accuracy, epsilon = self.accuracy, self.epsilon
        except RecordError:
            return f"Result({str(self.path)!r}: no finished run)"
        quality = "unknown" if accuracy is None else f"{accuracy:.3f}"
        promise = "no epsilon"
        if epsilon is not None:
            promise = f"epsilon {epsilon:.3f} at delta {self.delta:.2e}, {self.adjacency}"
        return f"Result({str(self.path)!r}: accuracy {quality}, {promise})"

    def _repr_html_(self) -> str:
        from fedtune.runs.summary import accuracy_line, facts_and_notes

        try:
            facts, notes = facts_and_notes(self.record)
        except RecordError as error:
            return f"<p>{html.escape(str(error))}</p>"
        rows = [
            ("accuracy", accuracy_line(self.record["metrics"])),
            *facts,
            *notes,
            ("folder", str(self.path)),
        ]
        cells = "".join(
            f'<tr><th style="text-align:left">{html.escape(name)}</th>'
            f'<td style="text-align:left">{html.escape(text)}</td></tr>'
            for name, text in rows
            if text
        )
        return f"<table>{cells}</table>"
