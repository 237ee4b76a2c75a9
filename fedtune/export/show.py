"""What `fedtune export` prints at its end: each format with its size and its check, and where to read on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedtune.runs.summary import human_bytes

__all__ = ["show"]


def show(folder: Path, about: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints what export.json (`about`) says of the formats in `folder`."""
    console = console or Console(highlight=False)
    check = about["check"]
    table = Table(box=None, padding=(0, 2), header_style="dim")
    table.add_column("format", style="bold")
    for name in ("size", "labels equal", "accuracy"):
        table.add_column(name, justify="right")
    for name, one in about["formats"].items():
        short = name.startswith("onnx-int8") and one["labels_equal"] < check["labels_equal_asked"]
        equal = Text(f"{one['labels_equal']:.2%}", style="yellow" if short else "")
        accuracy = "-" if one["accuracy"] is None else f"{one['accuracy']:.1%}"
        table.add_row(Text(name), human_bytes(one["bytes"]), equal, accuracy)
    console.print(table)
    console.print(Text(f"  on {check['num_texts']:,} texts ({check['texts']}), beside the run's own model"))
    console.print()
    console.print(Text(f"{folder}/README.md   how to load it, and what was promised"), soft_wrap=True)
