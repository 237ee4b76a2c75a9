"""What the commands share: how their help is written, and how a program is answered."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand
from typer.models import ArgumentInfo
from typer.utils import get_params_from_function

__all__ = ["Command", "Json", "ServerFolder", "argument", "help_text", "option", "print_json"]


_WIDTH = 76  # of a line of examples, on a terminal of 80 columns


def option(help: str, *names: str, **more: Any) -> Any:
    """An option of a command, `None` or off unless it is given."""
    return typer.Option(*names, help=help, show_default=False, **more)


def argument(metavar: str, help: str, **more: Any) -> Any:
    """An argument of a command."""
    return typer.Argument(metavar=metavar, help=help, show_default=False, **more)


Json = Annotated[bool, option("As JSON, for a program.", "--json")]
ServerFolder = Annotated[Path, argument("DIR", "The server folder.")]


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
    """The help of a command: what it does, then examples.

    Args:
        examples: one a line: the command as it is typed, two or more blanks, and what it is for.
    """
    rows = [re.split(r" {2,}", line, maxsplit=1) for line in examples.splitlines()]
    width = max((len(row[0]) for row in rows if len(row) > 1), default=0)
    if any(width + 3 + len(row[1]) > _WIDTH for row in rows if len(row) > 1):
        lines = [f"  {part}" for row in rows for part in (row[0], *(f"    {note}" for note in row[1:]))]
    else:
        lines = [f"  {row[0]:<{width}}   {row[1]}" if len(row) > 1 else f"  {row[0]}" for row in rows]
    # Typer takes square brackets for markup, and joins lines unless a backspace forbids it.
    return f"{description}\n\n\b\nExamples:\n{chr(10).join(lines)}".replace("[", r"\[")


def print_json(value: Any) -> None:
    """Prints `value`, indented; a number that JSON does not have is an error."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))
