"""What finished runs say: `fedtune statement | predict | audit` of one, `report | plan` of many."""

from __future__ import annotations

import itertools
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import click
import typer

from fedtune.cli.shared import Command, Json, argument, help_text, option, print_json, progress
from fedtune.errors import ConfigError

if TYPE_CHECKING:
    from fedtune.runs.predict import Asked, Model

__all__ = ["commands", "folders_and_prices"]

commands = typer.Typer(rich_markup_mode="rich")
_PANEL = "Read results"

RunFolder = Annotated[Path, argument("RUN_DIR", "Run folder, or its record.json.")]
Folders = Annotated[
    list[str], argument("DIR...", "Folder with runs below it; pricing=NAME: by that book of conf/pricing/.")
]


@commands.command(
    cls=Command,
    rich_help_panel=_PANEL,
    short_help="The privacy statement of a run.",
    help=help_text(
        "Prints what a finished run promises to whom, in Markdown, from its record.json alone.",
        "fedtune statement outputs/2026-11-21/18-00-00 > statement.md",
        "fedtune audit RUN_DIR  what an attacker learns, beside the claim",
    ),
)
def statement(run_dir: RunFolder, json: Json = False) -> None:
    from fedtune.privacy.statement.facts import statement_json
    from fedtune.runs.record import Result

    result = Result(run_dir)
    if json:
        print_json("statement", statement_json(result.record))
    else:
        print(result.statement.rstrip())


@commands.command(
    cls=Command,
    rich_help_panel=_PANEL,
    short_help="Labels with probabilities, from a finished run.",
    help=help_text(
        "Classifies texts with the model that a run trained, or with an exported one.",
        """\
fedtune predict RUN_DIR "what a film" "never again"
fedtune predict RUN_DIR - < texts.txt         one text a line
fedtune predict MODEL_DIR "what a film"       of 'fedtune export': at once
fedtune predict RUN_DIR --input new.csv --column text --output answers.csv
fedtune predict RUN_DIR --input pairs.csv --column premise --pair-column hypothesis
fedtune predict RUN_DIR --site movies "so so"  with the part that is this site's own""",
        """\
fedtune export RUN_DIR  a folder to use without fedtune
fedtune statement RUN_DIR  what was promised to whom""",
    ),
)
def predict(
    run_dir: RunFolder,
    texts: Annotated[list[str] | None, argument("[TEXT]...", "A text; '-' reads lines.")] = None,
    file: Annotated[
        Path | None,
        option("Take the texts of this file (.csv, .tsv, .json, .jsonl, .parquet, .xlsx).", "--input"),
    ] = None,
    column: Annotated[
        str | None, option("Its column with the texts (default: the run's, data.text).", metavar="NAME")
    ] = None,
    pair_column: Annotated[
        str | None, option("Of a run on pairs: the column of the second text.", metavar="NAME")
    ] = None,
    output: Annotated[
        Path | None, option("Write a CSV with one row a text to this file.", "--output", metavar="FILE")
    ] = None,
    site: Annotated[
        str | None,
        option(
            "Whose own part of the model to use (train.personalize); a new site has none.", metavar="NAME"
        ),
    ] = None,
    json: Json = False,
) -> None:
    from dataclasses import asdict

    from fedtune import api
    from fedtune.runs.predict import answers, columns_of, read_texts, show, write_answers
    from fedtune.serving.bundle import EXPORT_NAME
    from fedtune.serving.model import ExportedModel

    given = texts or []
    if file is None and not given:
        raise click.UsageError("Missing TEXT: give one or more, '-' for lines, or a file by --input.")
    if file is not None and given:
        raise ConfigError("Give texts, or a file of texts by --input, not both.")
    if file is not None and output is not None and file.expanduser().resolve() == output.resolve():
        raise ConfigError(f"--output names {file}, which --input reads, and would replace it. Name another.")
    for option_name, value in (("--column", column), ("--pair-column", pair_column)):
        if file is None and value is not None:
            raise ConfigError(
                f"{option_name} names a column of a file. Give the file by --input, or leave it out."
            )
    if output is not None and _is_no_csv(output):
        meant = output.with_name(output.name.split(".")[0] + ".csv")
        raise ConfigError(
            f"--output is {output}, and answers are written as CSV. Give --output {shlex.quote(str(meant))}."
        )
    own = ExportedModel(run_dir) if (run_dir / EXPORT_NAME).is_file() else None
    if own is not None and (site is not None or (pair_column is not None and own.columns[1] is None)):
        what = "no sites" if site is not None else "no pairs"
        raise ConfigError(f"{run_dir} is an exported model, which has {what}. Name the run.")
    columns: tuple[str, str | None] = (column or "text", None)
    if own is not None:
        columns = (column or "text", pair_column or own.columns[1])
    elif file is not None:
        columns = columns_of(run_dir, column, pair_column)
    asked: list[Asked] = []
    for text in given:
        asked += _lines_of(sys.stdin) if text == "-" else [text]
    records = iter(asked) if file is None else read_texts(file, *columns)
    first = list(itertools.islice(records, 1))  # a file that cannot be read is said before a model is loaded
    model: Model | ExportedModel = own or api.load(run_dir, site=site)
    # Of lines and files each has an answer, a blank one too; a blank word on the command line is a mistake.
    if file is not None or "-" in given:
        advance = progress("texts", None if file is not None else len(asked))
        found = answers(model, itertools.chain(first, records), advance)
    else:
        found = iter(model.predict(asked))
    if output is not None:
        count = write_answers(output, columns, found)
        if json:
            print_json("predict --output", {"output": str(output), "answers": count})
        else:
            print(f"{count:,} answers in {output}", file=sys.stderr)
    elif json:
        print_json("predict", [asdict(prediction) for prediction in found])
    else:
        show(list(found))


def _is_no_csv(path: Path) -> bool:
    """Would its ending be taken for something else than CSV, by `--input` for one?"""
    from fedtune.data.sources.decoding import ENDINGS
    from fedtune.data.sources.files import READERS

    return path.suffix.lower() in {*READERS, *ENDINGS, ".md", ".html"} - {".csv"}


def _lines_of(stream: TextIO) -> list[str]:
    """The lines of a stream, as many as it has line ends; one that is not UTF-8 has U+FFFD in its place."""
    from fedtune.data.sources.decoding import text_of

    raw = getattr(stream, "buffer", None)
    text = stream.read() if raw is None else text_of(raw.read())
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines[:-1] if not lines[-1] else lines


@commands.command(
    cls=Command,
    rich_help_panel=_PANEL,
    short_help="All runs below some folders on one page, with the frontier.",
    help=help_text(
        "Writes report.html (one file, no network), frontier.png, frontier.csv and frontier.parquet from "
        "every record.json below the folders. Nothing is run again.",
        """\
fedtune report multirun
fedtune report multirun outputs pricing=edge    what they cost elsewhere
fedtune report multirun pricing.device_hour=0.2 --output FOLDER""",
        "fedtune plan multirun --accuracy 0.78 --epsilon 4  which one to take",
    ),
)
def report(
    runs: Folders,
    output: Annotated[
        Path | None, option("Where to write (default: the first DIR).", metavar="FOLDER")
    ] = None,
    local: Annotated[
        bool, option("Show measured times and costs of private data too: for its owner only.", "--local")
    ] = False,
    json: Json = False,
) -> None:
    from fedtune.report.page import write_report

    folders, prices = folders_and_prices(runs)
    made = write_report(folders, prices, output, local=local)
    if json:
        print_json("report", made.to_json())
        return
    print(made.text)
    print()
    for path in (made.page, made.picture, made.csv, made.parquet):
        print(path)


@commands.command(
    cls=Command,
    rich_help_panel=_PANEL,
    short_help="The cheapest finished configuration within your limits.",
    help=help_text(
        "Answers from finished runs: the cheapest configuration with that accuracy, epsilon and money, or "
        "which of the three must give and by how much.",
        """\
fedtune plan multirun --accuracy 0.78 --epsilon 4 --money 0.01
fedtune plan multirun --accuracy 0.8 pricing=edge""",
        """\
fedtune export RUN_DIR  of the one that was chosen
fedtune statement RUN_DIR  what it promises to whom""",
    ),
)
def plan(
    runs: Folders,
    accuracy: Annotated[float | None, option("At least, as a share (0.8).", metavar="A")] = None,
    epsilon: Annotated[float | None, option("At most.", metavar="E")] = None,
    money: Annotated[
        float | None, option("At most, for one run, in the book's currency.", metavar="M")
    ] = None,
    json: Json = False,
) -> None:
    from fedtune.report.constraints import Constraints
    from fedtune.report.constraints import plan as answer

    folders, prices = folders_and_prices(runs)
    text, values = answer(folders, prices, Constraints(accuracy, epsilon, money))
    if json:
        print_json("plan", values)
    else:
        print(text)


@commands.command(
    cls=Command,
    rich_help_panel=_PANEL,
    short_help="Attack a run's mechanism: a lower bound on epsilon beside the claimed one.",
    help=help_text(
        "Runs the mechanism of a finished run again with canaries, on synthetic gradients, and tells what an "
        "attacker learns of them. Touches no private data and no budget. Exit status 1 if the claim does not "
        "stand.",
        """\
fedtune audit RUN_DIR
fedtune audit RUN_DIR --seeds 5               five repetitions together show more
fedtune audit RUN_DIR --model                 train the real model on public data""",
        "fedtune statement RUN_DIR  has what was found",
    ),
)
def audit(
    run_dir: RunFolder,
    canaries: Annotated[int | None, option("Canaries in each repetition.", metavar="N")] = None,
    seeds: Annotated[int, option("Repetitions (default 1).", metavar="K")] = 1,
    confidence: Annotated[float, option("Of all bounds together (default 0.95).", metavar="C")] = 0.95,
    model: Annotated[bool, option("Train the real model: minutes, not seconds.", "--model")] = False,
    json: Json = False,
) -> None:
    from rich.console import Console

    from fedtune.runs import audit as audits

    console = None if json else Console(highlight=False)
    found = audits.audit(
        run_dir, canaries=canaries, seeds=seeds, confidence=confidence, model=model, console=console
    )
    if json:
        print_json("audit", found)
    audits.check(found)


def folders_and_prices(words: list[str]) -> tuple[list[Path], list[str]]:
    """Folders and prices, given in any order; a word with '=' is a price unless there is such a folder."""
    prices = [word for word in words if "=" in word and not Path(word).exists()]
    folders = [Path(word) for word in words if word not in prices]
    if not folders:
        raise ConfigError("No folder with runs was named. See 'fedtune report --help'.")
    return folders, prices
