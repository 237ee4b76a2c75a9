"""What the commands share: how their help is written, and how a program is answered."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand
from typer.models import ArgumentInfo
from typer.utils import get_params_from_function

__all__ = [
    "FAILED",
    "OK",
    "PARTIAL",
    "USAGE",
    "Command",
    "Json",
    "ServerFolder",
    "answering",
    "argument",
    "help_text",
    "option",
    "print_json",
    "progress",
    "status_of",
]

# Exit statuses; `fedtune.cli.app` says what they mean.
OK = 0
FAILED = 1
USAGE = 2
PARTIAL = 3
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


def help_text(description: str, examples: str, then: str) -> str:
    """The help of a command: what it does, examples, and what comes after it.

    Args:
        examples: one a line: the command as it is typed, two or more blanks, and what it is for.
        then: commands that are often next, in the same form.
    """
    parts = f"Examples:\n{_aligned(examples)}\nNext:\n{_aligned(then)}"
    # Typer takes square brackets for markup, and joins lines unless a backspace forbids it.
    return f"{description}\n\n\b\n{parts}".replace("[", r"\[")


def _aligned(commands: str) -> str:
    """Commands, one a line, with what they are for beside them or, where that is too wide, below."""
    rows = [re.split(r" {2,}", line, maxsplit=1) for line in commands.splitlines()]
    width = max((len(row[0]) for row in rows if len(row) > 1), default=0)
    if any(width + 3 + len(row[1]) > _WIDTH for row in rows if len(row) > 1):
        lines = [f"  {part}" for row in rows for part in (row[0], *(f"    {note}" for note in row[1:]))]
    else:
        lines = [f"  {row[0]:<{width}}   {row[1]}" if len(row) > 1 else f"  {row[0]}" for row in rows]
    return "\n".join(lines)


def status_of(left_out: Collection[str]) -> int:
    """The exit status of a finished run, by who took no part in it; says so beside the output."""
    if not left_out:
        return OK
    from fedtune.privacy.statement.words import few

    print(f"Partial (exit status {PARTIAL}): {few(left_out)} took no part.", file=sys.stderr)
    return PARTIAL


def answering(name: str, json: bool) -> Callable[[dict[str, Any], str], None]:
    """Prints an answer: as values for a program, or as text for a person."""

    def say(values: dict[str, Any], text: str) -> None:
        if json:
            print_json(name, values)
        else:
            print(text)

    return say


def progress(what: str, whole: int | None) -> Callable[[int], None]:
    """Says on a terminal, beside the output, how many of `whole` are done (None: nobody knows how many there
    are); elsewhere nothing."""

    def advance(done: int) -> None:
        if sys.stderr.isatty():
            of = "" if whole is None else f" of {whole:,}"
            # What comes next, of which nobody knows whether it is the last, is written over it.
            end = "\r" if whole is None else "\n" if done >= whole else ""
            print(f"\r{done:,}{of} {what}", end=end, file=sys.stderr, flush=True)

    return advance


def print_json(name: str, value: Any) -> None:
    """Prints `value`, indented; a number that JSON does not have is an error.

    Args:
        name: of its schema in `answers.json` beside this file.
    """
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))
