"""What the commands share: how their help is written, and how a program is answered."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["AS_JSON", "help_text", "print_json"]

AS_JSON = "As JSON, for a program."


def help_text(description: str, examples: str) -> str:
    """The help of a command: what it does, then examples as they are typed.

    Typer takes square brackets for markup and joins lines; both are kept as they are here.
    """
    text = f"{description}\n\n\b\nExamples:\n" + "\n".join(f"  {line}" for line in examples.splitlines())
    return text.replace("[", r"\[")


def print_json(value: Any) -> None:
    """Prints `value`, indented; a number that JSON does not have is an error."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))
