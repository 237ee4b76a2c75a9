"""A finished model elsewhere: `export`, and what it made at work: `evaluate | price | serve | key`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli.results import RunFolder, folders_and_prices
from fedtune.cli.shared import Command, Json, answering, argument, help_text, option, print_json

__all__ = ["commands"]

commands = typer.Typer(rich_markup_mode="rich")
_PANEL = "Use a model elsewhere"

ModelFolder = Annotated[Path, argument("MODEL_DIR", "A folder that 'fedtune export' made.")]
Format = Annotated[
    str | None,
    option("onnx-int8, onnx or hf (default: the first of these that is there).", "--format", metavar="NAME"),
]


@commands.command(
    cls=Command,
    rich_help_panel=_PANEL,
    short_help="A run's model as a folder that needs no fedtune.",
    help=help_text(
        "Writes a folder that people can use without fedtune: the model for transformers (adapter merged), "
        "the adapter alone, ONNX in float32 and int8, each checked against the run's own model; a model "
        "card, a data card, the privacy statement, and the sums of all files. It costs no privacy. "
        "onnx-int8-static has ranges that are fixed by public texts, for processors and programs that want "
        "those.",
        """\
fedtune export RUN_DIR
fedtune export RUN_DIR -o FOLDER --format hf,onnx-int8
fedtune export RUN_DIR --texts public.txt     check with these, one a line
fedtune export RUN_DIR --format onnx-int8-static --calibrate public.txt""",
        """\
fedtune evaluate RUN_DIR/export test.csv  how right it is
fedtune serve RUN_DIR/export  as an HTTP service""",
    ),
)
def export(
    run_dir: RunFolder,
    output: Annotated[
        Path | None, option("A new folder (default: RUN_DIR/export).", "--output", "-o", metavar="FOLDER")
    ] = None,
    formats: Annotated[
        str,
        option(
            "hf, adapter, onnx, onnx-int8, with commas (default: these); onnx-int8-static.",
            "--format",
            metavar="NAMES",
        ),
    ] = "hf,adapter,onnx,onnx-int8",
    texts: Annotated[
        Path | None,
        option(
            "Texts to check with, one a line (pairs with a tab between); figures of them are in the export "
            "(default: the run's public test split).",
            metavar="FILE",
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        option(
            "Public texts, one a line, for the ranges of onnx-int8-static (default: the run's training "
            "texts, if they are public).",
            metavar="FILE",
        ),
    ] = None,
    site: Annotated[
        str | None,
        option("Whose own model to export (train.personalize), where the run folder has it.", metavar="NAME"),
    ] = None,
    json: Json = False,
) -> None:
    import json as library

    from fedtune.export.export import export as write
    from fedtune.serving.bundle import EXPORT_NAME

    # Progress goes beside the answer, which a program may read.
    folder = write(
        run_dir,
        output,
        [name.strip() for name in formats.split(",") if name.strip()],
        texts=texts,
        calibrate=calibrate,
        site=site,
        say=lambda line: print(f"{line} ...", file=sys.stderr, flush=True),
    )
    about = library.loads((folder / EXPORT_NAME).read_text(encoding="utf-8"))
    if json:
        print_json("export", {"folder": str(folder), **about})
        return
    from fedtune.export.show import show

    show(folder, about)


@commands.command(
    cls=Command,
    rich_help_panel=_PANEL,
    short_help="How right an exported model is on labelled texts.",
    help=help_text(
        "Accuracy, rates and F1 of each class, the confusion matrix, the calibration error and the best "
        "threshold, of an exported model on labelled texts, and by site where the data names sites. "
        "Without noise: figures of private texts stay with their owner. With --epsilon, of private texts: "
        "the same from noised counts, which the ledger is charged for first and which may be handed on.",
        """\
fedtune evaluate MODEL_DIR test.csv
fedtune evaluate MODEL_DIR FOLDER data.text=review data.label=stars
fedtune evaluate MODEL_DIR test.csv -o FOLDER   with a picture
fedtune evaluate MODEL_DIR visits.csv --epsilon 0.5 data.unit=patient
fedtune evaluate MODEL_DIR visits.csv --epsilon 0.5 data.site=ward --sites north,south
fedtune evaluate MODEL_DIR visits.csv --epsilon 0.5 --node node.yaml""",
        "fedtune serve MODEL_DIR  as an HTTP service",
    ),
)
def evaluate(
    model_dir: ModelFolder,
    data: Annotated[
        Path, argument("DATA", "A .csv, .tsv, .jsonl or .parquet file, or a folder with a file test.")
    ],
    settings: Annotated[
        list[str] | None,
        argument(
            "[SETTING...]",
            "data.text, data.label, data.site: which column is which; data.test_split. With --epsilon also "
            "data.unit (persons) and data.name (as budgets call the texts).",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        option("Write evaluation.json and evaluation.png there.", "--output", "-o", metavar="FOLDER"),
    ] = None,
    wanted: Format = None,
    epsilon: Annotated[
        float | None, option("The texts are private: what their noised figures may cost.", metavar="E")
    ] = None,
    delta: Annotated[
        float | None, option("Of --epsilon (default: the owner's budget's, else 1e-6).", metavar="D")
    ] = None,
    node: Annotated[
        Path | None,
        option("A real site's node.yaml: its ledger is charged (default: of simulations).", metavar="FILE"),
    ] = None,
    sites: Annotated[
        str | None,
        option("With --epsilon: public names in the column data.site, with commas.", metavar="NAMES"),
    ] = None,
    json: Json = False,
) -> None:
    from fedtune.errors import ConfigError
    from fedtune.serving import evaluation

    def advance(done: int, whole: int) -> None:
        if sys.stderr.isatty():
            end = "\n" if done == whole else ""
            print(f"\r{done:,} of {whole:,} texts", end=end, file=sys.stderr, flush=True)

    if epsilon is not None:
        from fedtune.serving import private_evaluation

        named = [name.strip() for name in (sites or "").split(",") if name.strip()]
        told = private_evaluation.evaluate_private(
            model_dir, data, settings or [], wanted, epsilon=epsilon, delta=delta, node=node, sites=named,
            advance=advance,
        )  # fmt: skip
        paths = [] if output is None else evaluation.keep(told.found, output, mode=0o666)
        if json:
            print_json("evaluate --epsilon", told.found)
            return
        private_evaluation.show(told)
        for path in paths:
            print(path)
        return
    if delta is not None or node is not None or sites is not None:
        raise ConfigError(
            "--delta, --node and --sites are for private texts: say with --epsilon what they may cost."
        )
    found = evaluation.evaluate(model_dir, data, settings or [], wanted, advance=advance)
    paths = [] if output is None else evaluation.keep(found, output)
    if json:
        print_json("evaluate", found)
        return
    evaluation.show(found)
    for path in paths:
        print(path)


@commands.command(
    cls=Command,
    rich_help_panel=_PANEL,
    short_help="What compressed models cost to ask, and who can afford it.",
    help=help_text(
        "Prices the models that 'fedtune compress' measured, by a price book: machine, energy and "
        "software for a million texts; and counts which of the book's tasks come under their budgets, "
        "now and as prices fall.",
        """\
fedtune price FOLDER
fedtune price FOLDER OTHER pricing=edge -o FIGURES   with a picture
fedtune price FOLDER pricing.serving_hour=0.2 --loss 0.01""",
        "fedtune compress --advise FOLDER --money 5  the cheapest within limits",
    ),
)
def price(
    folders: Annotated[
        list[str],
        argument("FOLDER...", "Made by 'fedtune compress', or a run's; pricing=NAME: by that book."),
    ],
    loss: Annotated[
        float | None,
        option("Accuracy that a model may lose and still be good enough (default 0.02).", metavar="A"),
    ] = None,
    output: Annotated[
        Path | None, option("Write adoption.json and adoption.png there.", "--output", "-o", metavar="FOLDER")
    ] = None,
    json: Json = False,
) -> None:
    from dataclasses import asdict

    from fedtune.report import adoption

    paths, prices = folders_and_prices(folders)
    allowed = adoption.ALLOWED_LOSS if loss is None else loss
    found = adoption.adoption(paths, prices, allowed_loss=allowed)
    written = [] if output is None else adoption.write_adoption(found, output)
    if json:
        print_json("price", asdict(found))
        return
    print(adoption.adoption_text(found))
    for path in written:
        print(path)


@commands.command(
    cls=Command,
    rich_help_panel=_PANEL,
    short_help="Exported models as an HTTP service.",
    help=help_text(
        "Answers POST /predict with labels and probabilities, and POST /explain with the words that speak "
        "for a label. /model has the card and the privacy statement; / is a page to try it; /healthz, "
        "/readyz and /metrics are for whoever runs it; /openapi.json describes it all. Requests are "
        "batched, and texts are not logged. SIGTERM or Ctrl-C stops it when what was accepted is answered. "
        "It speaks no TLS: put it behind a proxy that does.",
        """\
fedtune serve MODEL_DIR
fedtune serve film=MODEL_DIR mood=OTHER_DIR   several models
fedtune serve MODEL_DIR --host 0.0.0.0 --keys keys.txt --rate 50
curl localhost:8000/predict -d '{"text": "what a film"}'""",
        "fedtune key clinic-1 --keys keys.txt  for serve --keys: only who has a key is answered",
    ),
)
def serve(
    model_dirs: Annotated[
        list[str],
        argument("MODEL_DIR...", "Folders that 'fedtune export' made, each as FOLDER or NAME=FOLDER."),
    ],
    host: Annotated[str, option("Address to listen on (default 127.0.0.1: this machine).")] = "127.0.0.1",
    port: Annotated[int, option("Port (default 8000; 0: any that is free).", metavar="N")] = 8000,
    wanted: Format = None,
    keys: Annotated[
        Path | None, option("Ask for a key of this file; 'fedtune key' makes them.", metavar="FILE")
    ] = None,
    rate: Annotated[
        float | None, option("Texts a second of one key, or address; more is 429.", metavar="R")
    ] = None,
    waiting: Annotated[
        int | None, option("Tokens that may wait; more is 503 (default 32768).", metavar="N")
    ] = None,
    workers: Annotated[
        int, option("Batches computed at once, at most (default: as many as cores).", metavar="N")
    ] = 0,
    threads: Annotated[int, option("Of one batch (default 1; 0: as many as cores).", metavar="N")] = 1,
) -> None:
    from fedtune.serving.serve import serve as run

    run(
        model_dirs, host, port, wanted=wanted, keys=keys, rate=rate, waiting=waiting, workers=workers,
        threads=threads,
    )  # fmt: skip


@commands.command(
    cls=Command,
    rich_help_panel=_PANEL,
    short_help="A key for a client of 'fedtune serve'.",
    help=help_text(
        "Draws a key, prints it once, and adds its hash to the file that 'fedtune serve --keys' reads. "
        "Nobody can show a key again. Delete its line, and it is worth nothing, without a restart.",
        """\
fedtune key clinic-1 --keys keys.txt
curl localhost:8000/predict -H "Authorization: Bearer KEY" -d '{"text": "what a film"}'""",
        "fedtune serve MODEL_DIR --keys keys.txt  answer only who has a key",
    ),
)
def key(
    name: Annotated[str, argument("NAME", "What the log calls the client.")],
    keys: Annotated[Path, typer.Option("--keys", help="The file.", metavar="FILE")],
    json: Json = False,
) -> None:
    from fedtune.serving.keys import make_key

    made = make_key(keys, name)
    answering("key", json)({"name": name, "key": made, "file": str(keys)}, made)
