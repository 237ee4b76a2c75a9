"""Numbers of the accountant, cached on disk between processes.

Each number is a pure function of its arguments. It has one small file below `cache_dir()`, written whole or
not at all, with its arguments and a checksum over both: a damaged file is ignored and made again, never
believed. The version of the accountant is part of the arguments. Losing the folder costs time and nothing
else, and so does being unable to write.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from fedtune.config.files import cache_dir, replace_whole
from fedtune.errors import ResourceError
from fedtune.privacy.accounting.epsilon import Term, epsilon_of_terms

__all__ = ["cached", "cached_epsilon"]

_FORMAT = 3  # raise it when any cached function changes its results
_memory: dict[str, float] = {}


def cached_epsilon(terms: Mapping[Term, int] | None, delta: float) -> float:
    """`epsilon_of_terms`, cached on disk, so that a new process need not even load the accountant."""
    if terms is None:
        return math.inf
    arguments = [[list(term), count] for term, count in sorted(terms.items())]
    return cached("epsilon", [arguments, delta], lambda: epsilon_of_terms(terms, delta))


def cached(kind: str, arguments: list[Any], compute: Callable[[], float]) -> float:
    """`compute()`, or what it gave for the same arguments before.

    Args:
        kind: what is computed; it names the folder.
        arguments: everything that the number depends on, as JSON values.
        compute: called where no number is cached.
    """
    key = json.dumps([kind, _FORMAT, _accountant(), arguments])
    # The folder belongs to the memory's key, so that whoever moves FEDTUNE_HOME gets files there too.
    remembered = f"{os.environ.get('FEDTUNE_HOME', '')}\n{key}"
    if remembered in _memory:
        return _memory[remembered]
    path = _path(kind, key)
    value = _read(path, key) if path else None
    if value is None:
        value = compute()
        if path:
            _write(path, key, value)
    if len(_memory) > 10_000:
        _memory.clear()
    _memory[remembered] = value
    return value


@lru_cache(maxsize=1)
def _accountant() -> str:
    return metadata.version("dp-accounting")


def _path(kind: str, key: str) -> Path | None:
    try:
        return cache_dir() / kind / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    except ResourceError:
        return None


def _checksum(key: str, value: float) -> str:
    return hashlib.sha256(f"{key} {value!r}".encode()).hexdigest()


def _read(path: Path, key: str) -> float | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        value = content["value"]
        # The checksum binds the value to its arguments: a wrong noise multiplier here would break a
        # guarantee without a sound.
        if type(value) is float and content["key"] == key and content["checksum"] == _checksum(key, value):
            return value
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _write(path: Path, key: str, value: float) -> None:
    content = json.dumps({"key": key, "value": value, "checksum": _checksum(key, value)})
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_whole(path, content.encode(), mode=0o600)
