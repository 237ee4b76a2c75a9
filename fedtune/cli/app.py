"""The command line, `fedtune COMMAND`: reads arguments, calls the package, and says errors in one paragraph.

Nothing is decided here: each command is one call into the layers below, and all of them are imported when
their command is called, so that `fedtune --help` costs no more than typer and rich.

Exit status: 0 it did what was asked; 1 it could not; 2 the command or its configuration is wrong; 3 a run
finished without a site that should have taken part; 70 a bug of fedtune's; 130 interrupted by Ctrl-C or
SIGTERM; 141 the reader of a pipe went away.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Annotated, NoReturn

import click
import typer

from fedtune.cli import (
    budget_command,
    compress_command,
    data_command,
    deployment,
    exported,
    results,
    run_command,
    submission,
)
from fedtune.cli.shared import FAILED, OK, USAGE, help_text
from fedtune.errors import ConfigError, FedtuneError

__all__ = ["command", "main"]

BUG, INTERRUPTED, BROKEN_PIPE = 70, 130, 141  # beside those of `fedtune.cli.shared`

HELP = help_text(
    "Federated, differentially private fine-tuning of quantized BERT: several sites train one text "
    "classifier together, each keeps its text, and each person in it has a formal guarantee.",
    """\
fedtune run  four sites, epsilon 8 each
fedtune run privacy.epsilon=2 adapter=ffa_lora
fedtune data check data=files ...  your own data, before a run
fedtune run privacy=none  without privacy, to compare
fedtune run -m privacy.epsilon=1,2,4,8  one run for each value
fedtune run resume=RUN_DIR  after a crash or Ctrl-C
fedtune predict RUN_DIR "what a film"  use what was trained
fedtune export RUN_DIR  a folder to use without fedtune
fedtune compress RUN_DIR  the same, smaller and faster
fedtune statement RUN_DIR  what was promised to whom
fedtune audit RUN_DIR  what an attacker learns
fedtune budget show  what each data set has spent
fedtune report multirun  all runs on one page
fedtune plan multirun --accuracy 0.78 --epsilon 4 --money 0.01
fedtune provision federation.yaml -o DIR  a real federation""",
    """\
fedtune COMMAND --help  tells more
fedtune run --help  lists every setting""",
)
EPILOG = (
    "Exit status: 0 done, 1 failed, 2 wrong usage, 3 partial (a run finished without a site that refused or "
    "sent nothing), 70 a bug, 130 interrupted (Ctrl-C, SIGTERM)."
)

# click itself says what an unknown command may have meant; with typer's answer it would stand there twice.
app = typer.Typer(
    rich_markup_mode="rich",
    suggest_commands=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True, help=HELP, epilog=EPILOG)
def root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version and stop.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Before each command: libraries are kept quiet. Without one: the help."""
    if version:
        from fedtune.config.build import build
        from fedtune.federation.protocol import PROTOCOL

        print(f"fedtune {build()}, protocol {PROTOCOL}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
        raise typer.Exit
    from fedtune.api import keep_private
    from fedtune.config.quiet import silence

    keep_private()
    if not ctx.obj:
        silence()


app.add_typer(run_command.commands)
app.add_typer(results.commands)
app.add_typer(exported.commands)
app.add_typer(compress_command.commands)
app.add_typer(data_command.commands, rich_help_panel="Simulate")
app.add_typer(budget_command.commands, rich_help_panel="Privacy budgets")
app.add_typer(deployment.commands)
app.add_typer(submission.commands)


def command() -> click.Group:
    """The whole command, as click has it."""
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    return group


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the console script; leaves with one of the exit statuses above."""
    _prepare_streams()
    if threading.current_thread() is threading.main_thread():
        # A batch system's time limit or `kill`: as Ctrl-C, so that a run says how to go on. The commands that
        # serve have their own (`fedtune.deploy.leaving`, `fedtune.serving.serve`).
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given  # wherever it stands
    given = [argument for argument in given if argument != "--debug"]
    try:
        status = _dispatch(given, debug)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would complain once more when it flushes at exit; what is left goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = BROKEN_PIPE
    except SystemExit as left:
        if not isinstance(left.__context__, BrokenPipeError):  # rich leaves so, and has done the same
            raise
        status = BROKEN_PIPE
    except KeyboardInterrupt as interrupt:
        print(f"\n{str(interrupt) or 'Interrupted.'}", file=sys.stderr)
        status = INTERRUPTED
    except Exception as error:
        if debug:
            raise
        from fedtune.api import describe

        print(describe(error), file=sys.stderr)
        status = _status(error)
    raise SystemExit(status)


def _prepare_streams() -> None:
    """What is said to a stream that the shell closed (`>&-`) goes nowhere; no file gets its number.

    A letter that a console cannot show, since it is not UTF-8 or the letter is half of one, is escaped. A
    closed input (`<&-`) holds nothing.
    """
    if sys.stdin is None:
        sys.stdin = os.fdopen(os.open(os.devnull, os.O_RDONLY))
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))
        elif isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _check_words(given: Sequence[str]) -> None:
    """Refuses an argument that is no text: nothing could keep it, show it or send it.

    Raises:
        ConfigError: with its number.
    """
    for number, word in enumerate(given, start=1):
        try:
            word.encode()
        except UnicodeEncodeError as error:
            shown = word.encode("utf-8", "backslashreplace").decode()
            raise ConfigError(
                f"Argument {number}, {shown!r}, is not UTF-8 (from its character {error.start + 1} on), so "
                "it cannot be kept in a record. Type it in UTF-8; rename a file or folder whose name is not."
            ) from error


def _dispatch(given: list[str], debug: bool) -> int:
    """Runs the command; returns its exit status. Wrong usage is a `ConfigError`."""
    _check_words(given)
    group = command()
    if "_FEDTUNE_COMPLETE" in os.environ:
        group.main(given, prog_name="fedtune")  # answers the shell, and leaves
    try:
        # Not click's own main, which prints errors in its own form and takes Ctrl-C for its own.
        with group.make_context("fedtune", given, obj=debug) as context:
            return group.invoke(context) or OK
    except click.exceptions.Exit as left:
        return left.exit_code
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx is not None else "fedtune"
        text = error.format_message()
        end = "" if text.endswith((".", "?")) else "."
        raise ConfigError(f"{text}{end} See '{path} --help'.") from error


def _status(error: BaseException) -> int:
    if isinstance(error, ConfigError):
        return USAGE
    return FAILED if isinstance(error, (FedtuneError, OSError, MemoryError)) else BUG


if __name__ == "__main__":
    main()
