"""JSON that was written earlier and is read again: parsed strictly and held to its schema before it is used.

The schemas are those of `files.json`, in JSON Schema (2020-12), one by the name of each kind of file; of that
language `problem` knows what they use: type, enum, required, properties, additionalProperties, items,
minimum, maximum and $ref. A file may hold more than its schema says, for a newer version may have written it.
Beyond the schema nothing passes that no program could use: NaN, infinities, numbers that no float holds, half
of a surrogate pair, objects nested without end.

Does not do: the words of the refusal. Who reads a file knows whose it is, and the way out.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

__all__ = ["ShapeError", "parse_as", "problem", "problem_in", "read_as", "schema_of"]

_KINDS = {
    "object": "an object",
    "array": "a list",
    "string": "a text",
    "number": "a number",
    "integer": "a whole number",
    "boolean": "true or false",
    "null": "null",
}


class ShapeError(ValueError):
    """A JSON text is damaged, or a value in it is not what its schema says; the text is one clause."""


@functools.cache
def _definitions() -> dict[str, Any]:
    text = (resources.files("fedtune.config") / "files.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)["$defs"]
    return found


def schema_of(name: str) -> dict[str, Any]:
    """The JSON Schema of the kind of file `name`, whole."""
    return {"$ref": f"#/$defs/{name}", "$defs": _definitions()}


def read_as(name: str, path: Path) -> Any:
    """The content of a JSON file of the kind `name`.

    Raises:
        ShapeError: it is damaged, or a value in it is not what it should be.
        OSError: it cannot be read.
    """
    try:
        return parse_as(name, path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ShapeError(f"it is not UTF-8 at byte {error.start}") from error


def parse_as(name: str, text: str) -> Any:
    """The content of a JSON text of the kind `name`. Raises `ShapeError` as `read_as` does."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ShapeError(
            f"it is half-written or damaged: {error.msg} at character {error.pos} of {len(text)}"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        raise ShapeError(f"it is damaged: {error}") from error
    if (found := problem_in(name, value)) is not None:
        raise ShapeError(found)
    return value


def problem_in(name: str, value: Any) -> str | None:
    """The first thing that is wrong with the content of a file of the kind `name`; None where nothing is."""
    return problem(value, _definitions()[name], _definitions())


def problem(value: Any, schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str | None:
    """The first thing that is wrong with `value`, which JSON gave; None where nothing is."""
    try:
        return _problem(value, schema, definitions, "") or _unusable(value, "")
    except RecursionError:
        return "it is nested too deeply"


def _problem(value: Any, schema: Mapping[str, Any], definitions: Mapping[str, Any], where: str) -> str | None:
    while (reference := schema.get("$ref")) is not None:
        schema = definitions[reference.rpartition("/")[2]]
    types = schema.get("type", ())
    wanted = (types,) if isinstance(types, str) else types
    if wanted and not any(_is(kind, value) for kind in wanted):
        return _wrong(where, value, " or ".join(_KINDS[kind] for kind in wanted))
    if "enum" in schema and not any(value == one and type(value) is type(one) for one in schema["enum"]):
        return _wrong(where, value, " or ".join(repr(one) for one in schema["enum"]))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return _out_of_bounds(value, schema, where)
    if isinstance(value, Mapping):
        return _in_object(value, schema, definitions, where)
    if isinstance(value, list) and "items" in schema:
        found = (_problem(one, schema["items"], definitions, f"{where}[{i}]") for i, one in enumerate(value))
        return next((one for one in found if one is not None), None)
    return None


def _in_object(
    value: Mapping[str, Any], schema: Mapping[str, Any], definitions: Mapping[str, Any], where: str
) -> str | None:
    missing = [name for name in schema.get("required", ()) if name not in value]
    if missing:
        return f"{where or 'it'} lacks {', '.join(missing)}"
    known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name, one in value.items():
        below = known.get(name, others)
        if isinstance(below, Mapping):
            found = _problem(one, below, definitions, f"{where}.{name}" if where else name)
            if found is not None:
                return found
    return None


def _is(kind: str, value: Any) -> bool:
    if kind == "null":
        return value is None
    if kind == "boolean" or isinstance(value, bool):
        return kind == "boolean" and isinstance(value, bool)
    types: Mapping[str, type | tuple[type, ...]] = {
        "object": Mapping, "array": list, "string": str, "integer": int, "number": (int, float),
    }  # fmt: skip
    return isinstance(value, types[kind])


def _out_of_bounds(value: float, schema: Mapping[str, Any], where: str) -> str | None:
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    if low <= value <= high or value != value:  # NaN is told below
        return None
    bounds = [f"{low:g} or more"] * (low > -math.inf) + [f"{high:g} at most"] * (high < math.inf)
    return _wrong(where, value, " and ".join(bounds))


def _unusable(value: Any, where: str) -> str | None:
    """What no schema says and every reader needs: finite numbers, and texts that are whole characters."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return _wrong(where, value.encode("utf-8", "backslashreplace").decode(), "text")
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            finite = math.isfinite(float(value))
        except OverflowError:
            finite = False
        return None if finite else _wrong(where, value, "a finite number")
    elif isinstance(value, (Mapping, list)):
        items: Sequence[tuple[str, Any]] = (
            [(f"{where}[{i}]", one) for i, one in enumerate(value)]
            if isinstance(value, list)
            else [part for name, one in value.items() for part in ((where, name), (f"{where}.{name}", one))]
        )
        wrong = (_unusable(one, at.strip(".")) for at, one in items)
        return next((one for one in wrong if one is not None), None)
    return None


def _wrong(where: str, value: Any, wanted: str) -> str:
    shown = "null" if value is None else json.dumps(value) if isinstance(value, bool) else repr(value)
    return f"{where or 'it'} is {shown if len(shown) <= 60 else shown[:57] + '...'}, and should be {wanted}"
