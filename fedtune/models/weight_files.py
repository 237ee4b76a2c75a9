"""The files of a model's folder that hold its weights: there, whole, and of numbers that an encoder has."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fedtune.errors import ModelError

__all__ = ["BODY", "check_weights", "refuse_pointer", "some_of"]

_POINTER = b"version https://git-lfs"
_SAFE = ("model.safetensors", "model.safetensors.index.json")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# What belongs to the encoder itself, whatever is in front of it; heads of other tasks do not.
BODY = re.compile(r"(^|\.)(embeddings|encoder|transformer|layers?)\.\w")
_SHOWN = 3  # names of weights in a message
_LARGEST_HEADER = 100_000_000  # bytes, as the safetensors library has it


def check_weights(folder: Path, name: str, *, pickle: bool = False) -> None:
    """Checks the files of a folder's weights without loading them.

    Raises:
        ModelError: one is missing, empty, cut off, a pointer to another file, or a pickle that nobody asked
            for.
    """
    files = {path.name: path for path in folder.iterdir() if path.is_file()}
    for file in (*_SAFE, *_PICKLED):
        if file in files:
            refuse_pointer(files[file], name)
    if any(file in files for file in _SAFE):
        for shard in _shards(folder, files, name):
            refuse_pointer(shard, name)
            _check_safetensors(shard, name)
        return
    if not any(file in files for file in _PICKLED):
        raise ModelError(
            f"The folder {folder} (model.name) has no weights: model.safetensors is missing in it. Copy the "
            "whole folder."
        )
    if not pickle:
        raise ModelError(
            f"The folder {folder} (model.name) has its weights in a pickle (pytorch_model.bin), which may "
            "carry code. Take a copy that has model.safetensors. If you know who made this one, "
            "model.pickle=true reads it, weights alone."
        )


def refuse_pointer(path: Path, name: str) -> None:
    """Raises `ModelError` if a file is a Git LFS pointer in place of itself."""
    with path.open("rb") as file:
        if not file.read(len(_POINTER)).startswith(_POINTER):
            return
    raise ModelError(
        f"{path} is a Git LFS pointer of {path.stat().st_size} bytes in place of the file itself, so "
        f"model.name={name} cannot be loaded. Fetch the files: run `git lfs pull` in that folder."
    )


def some_of(keys: Collection[str]) -> str:
    """The first of some names of weights, and how many more there are."""
    shown = sorted(keys)[:_SHOWN]
    return ", ".join(shown) + (f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")


def _shards(folder: Path, files: Mapping[str, Path], name: str) -> list[Path]:
    """The files that hold the weights."""
    if _SAFE[0] in files:
        return [files[_SAFE[0]]]
    index = files[_SAFE[1]]
    try:
        named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [file for file in named if str(Path(file)) not in files]  # a TypeError where it is no text
    except (ValueError, RecursionError, LookupError, AttributeError, TypeError) as error:
        raise ModelError(
            f"{index} is no list of the weights' files, so model.name={name} cannot be loaded. Copy it again."
        ) from error
    if missing:
        raise ModelError(
            f"The folder {folder} (model.name) lacks {len(missing)} of the {len(named)} files of its "
            f"weights: {some_of(missing)}. Copy the whole folder."
        )
    return [files[str(Path(file))] for file in named]


def _refuse_integers(entries: Mapping[str, Any], name: str) -> None:
    """Refuses weights that are whole numbers, for their scale is unknown; places and segments are."""
    named = (key for key, entry in entries.items() if str(entry.get("dtype", "F")).startswith(("I", "U")))
    whole = [key for key in named if BODY.search(key) and not key.endswith("_ids")]
    if whole:
        raise ModelError(
            f"The model {name!r} is stored compressed: {len(whole)} of its weights are whole numbers "
            f"({some_of(whole)}). Name the model that it was made from: fedtune compresses by itself, as "
            "model.quantization says."
        )


def _refuse_no_numbers(entries: Mapping[str, Any], name: str) -> None:
    """Refuses weights that are truth values or complex: as real numbers they would be others."""
    kinds = {key: str(entry.get("dtype", "F")) for key, entry in entries.items()}
    wrong = [key for key, kind in kinds.items() if kind.startswith(("BOOL", "C")) and BODY.search(key)]
    if wrong:
        raise ModelError(
            f"The model {name!r} holds {', '.join(sorted({kinds[key] for key in wrong}))} in {len(wrong)} of "
            f"its weights, which are real numbers in an encoder: {some_of(wrong)}. Take another copy of it."
        )


def _check_safetensors(path: Path, name: str) -> None:
    """Checks that a file is as long as its header says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if size >= 8 and length <= min(size - 8, _LARGEST_HEADER) else b""
    what = f"is cut off, or no safetensors file: it has {size} bytes"
    try:
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for key, entry in entries.items() if key != "__metadata__"]
        asked = 8 + length + max(ends, default=0)
        if asked == size:
            _refuse_integers(entries, name)
            _refuse_no_numbers(entries, name)
            return
        what = f"has {size} bytes, and its header speaks of {asked}: it is not whole"
    except (ValueError, RecursionError, LookupError, AttributeError, TypeError):
        if size == 0:
            what = "is empty (0 bytes)"
    raise ModelError(f"{path} {what}, so model.name={name} cannot be loaded. Copy or download it again.")
