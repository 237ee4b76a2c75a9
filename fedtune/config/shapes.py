"""JSON that was written earlier and is read again: parsed strictly and held to its schema before it is used.

The schemas are those of `files.json`, in JSON Schema (2020-12), one by the name of each kind of file; of that
language it knows what they use: type, enum, required, properties, additionalProperties, items,
minimum, maximum and $ref. A file may hold more than its schema says, for a newer version may have written it.
Beyond the schema nothing passes that no program could use: NaN, infinities, numbers that no float holds, half
of a surrogate pair, objects nested without end.

Does not do: the words of the refusal. Who reads a file knows whose it is, and the way out.
"""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

__all__ = ["ShapeError", "parse_as", "problem_in", "read_as", "schema_of"]

_WORDS = {
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
    """The first thing that is wrong with the content of a file of the kind `name`; None where nothing is.

    Args:
        value: which JSON gave.
    """
    try:
        found = _checker_of(name)(value) or _unusable(value)
    except RecursionError:
        return "it is nested too deeply"
    # What is wrong begins with its place, ".a[0].b is", or with " is" where it is the whole.
    return None if found is None else f"it{found}" if found.startswith(" ") else found.removeprefix(".")


# --- schemas as functions: of what is wrong with a value, its place first; None where nothing is -------

_Check = Callable[[Any], "str | None"]


@functools.cache
def _checker_of(name: str) -> _Check:
    return _checker(_definitions()[name])


def _checker(schema: Mapping[str, Any]) -> _Check:
    if (reference := schema.get("$ref")) is not None:
        name = reference.rpartition("/")[2]
        return lambda value: _checker_of(name)(value)
    if "enum" in schema:
        return functools.partial(_of_enum, schema["enum"])
    types = schema.get("type", [])
    kinds = frozenset((types,) if isinstance(types, str) else types)
    wanted = " or ".join(_WORDS[kind] for kind in ((types,) if isinstance(types, str) else types))
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    below = {name: _checker(one) for name, one in schema.get("properties", {}).items()}
    others = schema.get("additionalProperties", True)
    rest = _checker(others) if isinstance(others, Mapping) else None
    required = tuple(schema.get("required", ()))
    items = _checker(schema["items"]) if "items" in schema else None

    def check(value: Any) -> str | None:
        kind = _kind(value)
        if kinds and kind not in kinds and not (kind == "integer" and "number" in kinds):
            return _wrong(value, wanted)
        if kind in ("integer", "number"):
            # What is no number at all is told by `_unusable`.
            return None if low <= value <= high or value != value else _wrong(value, _bounds(low, high))
        if kind == "object":
            return _in_object(value, required, below, rest)
        if kind == "array" and items is not None:
            for i, one in enumerate(value):
                if (found := items(one)) is not None:
                    return f"[{i}]{found}"
        return None

    return check


def _in_object(
    value: Mapping[str, Any], required: Sequence[str], below: Mapping[str, _Check], rest: _Check | None
) -> str | None:
    missing = [name for name in required if name not in value]
    if missing:
        return f" lacks {', '.join(missing)}"
    for name, one in value.items():
        check = below.get(name, rest)
        if check is not None and (found := check(one)) is not None:
            return f".{name}{found}"
    return None


def _of_enum(words: Sequence[Any], value: Any) -> str | None:
    if any(value == one and type(value) is type(one) for one in words):
        return None
    return _wrong(value, " or ".join(repr(one) for one in words))


def _kind(value: Any) -> str:
    for kind, type_ in _TYPES:
        if isinstance(value, type_):
            return kind
    return "unknown"


_TYPES = (  # a boolean is an int to Python
    ("string", str),
    ("boolean", bool),
    ("integer", int),
    ("number", float),
    ("null", type(None)),
    ("object", Mapping),
    ("array", list),
)


def _bounds(low: float, high: float) -> str:
    return " and ".join([f"{low:g} or more"] * (low > -math.inf) + [f"{high:g} at most"] * (high < math.inf))


def _unusable(value: Any) -> str | None:
    """What no schema says and every reader needs: finite numbers, and texts that are whole characters."""
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            return _wrong(value.encode("utf-8", "backslashreplace").decode(), "text")
    elif isinstance(value, float):
        if not math.isfinite(value):
            return _wrong(value, "a finite number")
    elif isinstance(value, int):
        if abs(value) > _LARGEST:
            return _wrong(value, "a finite number")
    elif isinstance(value, list):
        for i, one in enumerate(value):
            if (found := _unusable(one)) is not None:
                return f"[{i}]{found}"
    elif isinstance(value, Mapping):
        for name, one in value.items():
            if (found := _unusable(name)) is not None:
                return found
            if (found := _unusable(one)) is not None:
                return f".{name}{found}"
    return None


_LARGEST = int(sys.float_info.max)


def _wrong(value: Any, wanted: str) -> str:
    shown = "null" if value is None else json.dumps(value) if isinstance(value, bool) else repr(value)
    return f" is {shown if len(shown) <= 60 else shown[:57] + '...'}, and should be {wanted}"
