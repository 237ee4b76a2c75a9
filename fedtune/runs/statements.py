"""A run folder's statement: the page and the picture beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["PICTURE", "page", "write"]

PICTURE = "strength.svg"  # beside statement.md


def page(record: Mapping[str, Any], folder: Path) -> str:
    """The statement of `record` as Markdown; it shows the picture if that lies in `folder`."""
    from fedtune.privacy.statement.facts import statement_markdown

    return statement_markdown(record, PICTURE if (folder / PICTURE).exists() else None)


def write(record: Mapping[str, Any], path: Path) -> str:
    """Writes the statement to `path` and its picture beside it; returns the page."""
    from fedtune.privacy.statement.facts import statement_picture

    picture = statement_picture(record)
    if picture is None:
        (path.parent / PICTURE).unlink(missing_ok=True)  # of the same run, before an audit disproved it
    else:
        (path.parent / PICTURE).write_text(picture, encoding="utf-8")
    text = page(record, path.parent)
    path.write_text(text, encoding="utf-8")
    return text
