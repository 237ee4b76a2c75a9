"""What the commands share: how their help is written, and how a program is answered."""

from __future__ import annotations

import inspect
import json
from typing import Any

from typer.core import TyperCommand
from typer.models import ArgumentInfo
from typer.utils import get_params_from_function

__all__ = ["AS_JSON", "Command", "help_text", "print_json"]

AS_JSON = "As JSON, for a program."


class Command(TyperCommand):
    """A command whose arguments say what they are: with click 8.5, typer 0.20 loses their help."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.callback is None:
            return
        declared = get_params_from_function(inspect.unwrap(self.callback))
        for parameter in self.params:
            info = declared[parameter.name].default if parameter.name in declared else None
            if isinstance(info, ArgumentInfo):
                parameter.help = info.help


def help_text(description: str, examples: str) -> str:
    """The help of a command: what it does, then examples as they are typed.

    Typer takes square brackets for markup and joins lines; both are kept as they are here.
    """
    text = f"{description}\n\n\b\nExamples:\n" + "\n".join(f"  {line}" for line in examples.splitlines())
    return text.replace("[", r"\[")


def print_json(value: Any) -> None:
    """Prints `value`, indented; a number that JSON does not have is an error."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))
