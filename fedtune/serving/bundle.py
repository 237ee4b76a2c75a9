"""An exported folder: where what lies in it, and that nothing in it was changed.

    README.md DATA.md statement.md          what the model is, on what it was trained, what was promised
    export.json                             the same for programs, and how each format was checked
    config.json tokenizer.json ...          labels and tokenizer, for every format
    model.safetensors modeling_fedtune.py   hf: transformers
    onnx/model.onnx, onnx/model_int8.onnx   onnx, onnx-int8: onnxruntime
    onnx/model_int8_static.onnx             onnx-int8-static: with ranges of public texts, if asked for
    onnx/model_int8_weights.onnx ...        onnx-int8-weights, onnx-nf4: of a compressed model, if asked for
    compression.json                        of a compressed model: what was done, and its measured effects
    adapter/                                adapter: peft, onto a base of one's own
    SHA256SUMS                              of every other file, as `sha256sum -c SHA256SUMS` reads it

`Bundle.open` compares every file with its sum before any of them is used: a file that was cut short or
changed by mistake is refused. Whoever changes a file on purpose can change its sum as well: sums from where
the folder came from are what to compare with then. Python files of a folder are never run here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.config.shapes import read_as
from fedtune.errors import ConfigError, ModelError

__all__ = ["EXPORT_NAME", "FORMATS", "OPTIONAL", "PATHS", "SUMS_NAME", "Bundle", "write_sums"]

FORMATS = ("hf", "adapter", "onnx", "onnx-int8")  # that an export has
OPTIONAL = ("onnx-int8-static",)  # that it has if it is asked for
# The file of each format that holds its weights.
PATHS: Mapping[str, str] = {
    "hf": "model.safetensors",
    "adapter": "adapter/adapter_model.safetensors",
    "onnx": "onnx/model.onnx",
    "onnx-int8": "onnx/model_int8.onnx",
    "onnx-int8-static": "onnx/model_int8_static.onnx",
    "onnx-int8-weights": "onnx/model_int8_weights.onnx",
    "onnx-nf4": "onnx/model_nf4.onnx",
}
_ALWAYS = ("DATA.md", "README.md", "config.json", "statement.md", "tokenizer.json")  # whatever the formats
EXPORT_NAME = "export.json"
SUMS_NAME = "SHA256SUMS"


@dataclass(frozen=True)
class Bundle:
    """An exported folder whose files are what they were.

    Attributes:
        folder: where it is.
        about: what `export.json` says.
    """

    folder: Path
    about: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Bundle:
        """Raises `ModelError` if `folder` is no exported model, or a file of it is missing or was changed."""
        path = folder / EXPORT_NAME
        if not path.is_file():
            what = "a run: export it first, fedtune export " + str(folder)
            raise ModelError(
                f"{folder} is not an exported model: it has no {EXPORT_NAME}. "
                + (f"It is the folder of {what}." if (folder / "record.json").is_file() else "Name a folder "
                "that 'fedtune export' made.")
            )  # fmt: skip
        summed = _check_sums(folder)
        try:
            about = read_as("export", path)
            formats = about["formats"]
            if not about["labels"] or not set(formats) <= set(PATHS):
                raise ValueError(f"labels {about['labels']} and formats {sorted(formats)}")
        except ValueError as error:
            raise ModelError(
                f"{path} is none that this fedtune reads ({error}). Export the run "
                "again with the fedtune that is installed here."
            ) from error
        # A list of sums that was itself cut short would let files pass that it does not name.
        if unsummed := sorted({*_ALWAYS, *(PATHS[name] for name in formats)} - summed):
            raise ModelError(
                f"{folder} cannot be checked: {SUMS_NAME} has no sum of {', '.join(unsummed)}. Copy the "
                "whole folder again, or export the run again."
            )
        return cls(folder, about)

    @property
    def labels(self) -> tuple[str, ...]:
        """The label names, in the order of the classes."""
        return tuple(self.about["labels"])

    @property
    def max_length(self) -> int:
        """How many tokens of a text the model is asked about, special ones included."""
        return int(self.about["max_length"])

    @property
    def pairs(self) -> bool:
        """Whether the model is asked about two texts at a time."""
        return bool(self.about.get("pairs"))

    @property
    def separator(self) -> int | None:
        """The token after which a pair's second text is another segment; None where there are no segments."""
        return self.about.get("separator")

    def chosen(self, wanted: str | None = None) -> str:
        """The format to run: the one that is `wanted`, else int8, ONNX or transformers, as they are there.

        Raises:
            ConfigError: it is not there.
        """
        runnable = [
            name
            for name in ("onnx-int8", "onnx-int8-static", "onnx", "onnx-int8-weights", "onnx-nf4", "hf")
            if name in self.about["formats"]
        ]
        if wanted is None and runnable:
            return runnable[0]
        if wanted not in runnable:
            asked = "" if wanted is None else f" {wanted!r}"
            raise ConfigError(
                f"{self.folder} has no format{asked} that can be run: it has "
                f"{', '.join(runnable) or 'the bare adapter alone'}. Export the run again with --format "
                f"{wanted or 'hf'}."
            )
        return str(wanted)

    def path(self, name: str) -> Path:
        """The file of the format `name` that holds its weights."""
        return self.folder / PATHS[name]


def write_sums(folder: Path) -> None:
    """Writes the sums of all files below `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS_NAME)
    lines = [f"{_digest(path)}  {path.relative_to(folder).as_posix()}\n" for path in files]
    (folder / SUMS_NAME).write_text("".join(lines), encoding="utf-8")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_sums(folder: Path) -> set[str]:
    """The files that have a sum; raises `ModelError` unless all of them are what they were."""
    try:
        lines = (folder / SUMS_NAME).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"{folder} cannot be checked: {SUMS_NAME} is missing or unreadable. Copy the whole folder "
            "again, or export the run again."
        ) from error
    said = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    wrong = []
    for name in sorted({EXPORT_NAME, *said}):
        path = folder / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif _digest(path) != said.get(name):
            wrong.append(f"{name} was changed")
    if wrong:
        raise ModelError(
            f"{folder} is not what was exported: {', '.join(wrong)} (by {SUMS_NAME}). Nothing of it is used. "
            "Copy the folder again from where it came from, or export the run again."
        )
    return set(said)
