"""`fedtune compress`: a finished model, or a base before any run, smaller and faster."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fedtune.cli.results import folders_and_prices
from fedtune.cli.shared import Command, Json, argument, help_text, option, print_json
from fedtune.errors import ConfigError

__all__ = ["commands"]

commands = typer.Typer(rich_markup_mode="rich")


class _CompressCommand(Command):
    """`fedtune compress`, whose help ends with every page and setting."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Prints typer's help, then the pages of conf/compress/ and the settings."""
        from dataclasses import asdict

        from fedtune.config.compression import Compression, pages_text
        from fedtune.config.pages import settings_text

        super().format_help(ctx, formatter)
        width = min(100, shutil.get_terminal_size().columns)
        typer.echo(f"compress=NAME: a page of conf/compress/; * is the default\n{pages_text(width)}\n")
        typer.echo("settings: name=default, what it is, and what it may be")
        typer.echo(settings_text(asdict(Compression()), width, Compression))


@commands.command(
    cls=_CompressCommand,
    rich_help_panel="Use a model elsewhere",
    short_help="A run's model smaller and faster: prune, distill, quantize.",
    help=help_text(
        "Makes a smaller model of a run's, step by step, each with its measured effect: layers, attention "
        "heads and feed-forward units are cut out, or a student of fewer layers learns from the model, and "
        "integers take the place of floats. It learns from public or unlabelled texts alone, so it costs "
        "no privacy. The folder is one that 'fedtune evaluate' and 'fedtune serve' take. Of a base encoder "
        "(its name in place of RUN_DIR) it makes one to train on.",
        """\
fedtune compress RUN_DIR
fedtune compress RUN_DIR compress=pruned prune.units=0.5
fedtune compress RUN_DIR distill.layers=3 texts=unlabelled.txt -o FOLDER
fedtune compress embedded:minilm distill.layers=3 texts=FILE -o FOLDER
fedtune run model.name=FOLDER  federate the smaller base
fedtune compress --advise DIR --within 2 --p99 5 --memory 100""",
        """\
fedtune evaluate FOLDER test.csv  how right it is
fedtune price FOLDER  what it costs to ask
fedtune serve FOLDER  as an HTTP service""",
    ),
)
def compress(
    source: Annotated[str, argument("RUN_DIR", "A run folder; or a base encoder, as model.name takes it.")],
    settings: Annotated[
        list[str] | None, argument("[SETTING...]", "compress=NAME and name=value, listed below.")
    ] = None,
    output: Annotated[
        Path | None,
        option("A new folder (default: RUN_DIR/compressed-NAME).", "--output", "-o", metavar="FOLDER"),
    ] = None,
    advise: Annotated[
        bool,
        option("Of the compressed models below the folders named: the cheapest within limits.", "--advise"),
    ] = False,
    within: Annotated[float | None, option("--advise: points of accuracy to lose.", metavar="A")] = None,
    p99: Annotated[float | None, option("--advise: milliseconds of one text.", metavar="T")] = None,
    memory: Annotated[float | None, option("--advise: megabytes of its process.", metavar="M")] = None,
    money: Annotated[float | None, option("--advise: for a million texts.", metavar="C")] = None,
    json: Json = False,
) -> None:
    import json as library

    from fedtune.compress.advise import Limits, advise_text
    from fedtune.compress.advise import advise as answer

    limits = Limits(within, p99, memory, money)
    if advise:
        folders, prices = folders_and_prices([source, *(settings or [])])
        found = answer(folders, limits, prices)
        if json:
            print_json("advise", found)
        else:
            print(advise_text(found))
        return
    if limits.given():
        raise ConfigError(f"--{limits.given()[0]} is a limit of --advise, which was not given.")

    from fedtune.compress.compress import RECORD_NAME
    from fedtune.compress.compress import compress as make

    def advance(done: int, whole: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == whole else ""
            print(f"\r{done / whole:4.0%}", end=end, file=sys.stderr, flush=True)

    folder = make(
        source,
        settings or [],
        output,
        say=lambda line: print(f"{line} ...", file=sys.stderr, flush=True),
        advance=advance,
    )
    about = library.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
    if json:
        print_json("compress", {"folder": str(folder), **about})
        return
    from fedtune.compress.show import show

    show(folder, about)
