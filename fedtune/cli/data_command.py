"""`fedtune data check`: what was understood of somebody's data, and what a run of it would do and spend."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli.run_command import complete_setting, dry_run
from fedtune.cli.shared import Command, Json, argument, help_text, option
from fedtune.errors import ConfigError

__all__ = ["commands"]

commands = typer.Typer(
    name="data",
    invoke_without_command=True,
    subcommand_metavar="ACTION [ARGS]...",
    rich_markup_mode="rich",
    short_help="What was understood of your data, before anything is spent.",
    help=help_text(
        "Reads data, model and settings as a run would, and trains, charges and writes nothing.",
        "fedtune data check data=files data.path=FOLDER data.label=category",
        "fedtune run data=files data.path=FOLDER ...  train, with the same settings",
    ),
)


@commands.callback()
def choose(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        raise ConfigError("Name an ACTION: check. See 'fedtune data --help'.")


@commands.command(
    cls=Command,
    help=help_text(
        "Says what was understood of the data (records, labels with counts, persons, sites, lengths, a "
        "sample of rows), what the run would do and spend, and every caution. Settings are those of fedtune "
        "run.",
        """\
fedtune data check data=files data.path=FOLDER data.label=category
fedtune data check data=files data.path=visits.csv data.unit=patient --json""",
        "fedtune run data=files data.path=FOLDER ...  train, with the same settings",
    ),
)
def check(
    settings: Annotated[
        list[str] | None,
        argument("[NAME=VALUE]...", "As of fedtune run.", autocompletion=complete_setting),
    ] = None,
    config_dir: Annotated[
        list[Path] | None,
        option("A folder with options of your own (FOLDER/data/mine.yaml is data=mine).", metavar="FOLDER"),
    ] = None,
    json: Json = False,
) -> None:
    dry_run(list(settings or ()), list(config_dir or ()), json)
