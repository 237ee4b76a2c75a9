"""What `fedtune compress` prints at its end: each model with its size, speed and accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedtune.compress.card import points
from fedtune.runs.summary import human_bytes

__all__ = ["show"]


def show(folder: Path, about: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints what compression.json (`about`) says of the model in `folder`."""
    console = console or Console(highlight=False)
    of_run = "accuracy" in about["original"]
    table = Table(box=None, padding=(0, 2), header_style="dim")
    table.add_column("", style="bold")
    for name in ("size", "speed", "one text", *(("accuracy", "points") if of_run else ("cosine",))):
        table.add_column(name, justify="right")
    for name, one in (
        ("original", about["original"]),
        *((step["step"], step) for step in about["steps"]),
        *about["formats"].items(),
    ):
        says = [f"{one['accuracy']:.1%}", points(one)] if of_run else [f"{one['cosine']:.4f}"]
        table.add_row(
            Text(name), human_bytes(one["bytes"]), f"{one['ratio']:.2f}x", f"{one['p50_ms']:.1f} ms", *says
        )
    console.print(table)
    texts = about["texts"]
    console.print(Text(f"  on {texts['num_measured']:,} texts: {texts['measured_on']}"))
    for note in texts["notes"]:
        console.print(Text(note, style="yellow"))
    console.print()
    console.print(Text(f"{folder}/README.md   what was done, and how to load it"), soft_wrap=True)
