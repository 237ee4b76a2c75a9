"""Markdown of texts that somebody else chose: a label, a node or a data set may be called anything.

What such a name holds is shown and never obeyed: it begins no line, heading, link, code or table cell, and no
HTML.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from fedtune.privacy.publication import one_line

__all__ = ["bullets", "coded", "plain", "table"]

# An underscore between letters is nothing but one.
_OBEYED = re.compile(r"[\\`*\[\]<>|&~$]|(?<![^\W_])_|_(?![^\W_])")


def plain(name: object) -> str:
    """`name` within a line of text, or as a cell of a table."""
    return _OBEYED.sub(r"\\\g<0>", one_line(str(name)))


def coded(name: object) -> str:
    """`name` as code within a line of text. A backtick in it becomes an apostrophe: it would end the code."""
    return "`" + (one_line(str(name)).replace("`", "'") or " ") + "`"


def bullets(lines: Sequence[str]) -> str:
    """A list; `lines` are Markdown."""
    return "\n".join(f"- {line}" for line in lines)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; its cells are Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))
