"""The command line, `fedtune COMMAND`: reads arguments, calls the package, and says errors in one paragraph.

Nothing is decided here: each command is one call into the layers below, and all of
them are imported when their command is called, so that `fedtune --help` costs no more than Python itself.

Exit status: 0 it did what was asked; 1 it could not; 2 the command or its configuration is wrong; 70 a bug
of fedtune's; 130 interrupted by Ctrl-C; 141 the reader of a pipe went away.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from fedtune import __version__
from fedtune.cli.deployment import add_deployment_commands
from fedtune.errors import ConfigError, FedtuneError

__all__ = ["main"]

_WORDS_ANYWHERE = ("report", "plan", "submit", "node")  # commands whose words may come after options

OK, FAILED, USAGE, BUG, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 70, 130, 141

DESCRIPTION = """\
Federated, differentially private fine-tuning of quantized BERT: several sites train one text
classifier together, each keeps its text, and each person in it has a formal guarantee.
"""

EXAMPLES = """\
examples:
  fedtune run                                  four sites, one classifier, epsilon 8 each
  fedtune run privacy.epsilon=2 adapter=ffa_lora
  fedtune run privacy=none                     the same without privacy, to see what it costs
  fedtune run -m privacy.epsilon=1,2,4,8       one run for each value
  fedtune run resume=RUN_DIR                   go on after a crash or Ctrl-C
  fedtune predict RUN_DIR "what a film"        use what was trained
  fedtune statement RUN_DIR                    what was promised to whom, for a privacy officer
  fedtune audit RUN_DIR                        what an attacker learns, beside what was promised
  fedtune budget show                          what each data set has spent so far
  fedtune report multirun                      all runs on one page: frontier, costs, advice
  fedtune plan multirun --accuracy 0.78 --epsilon 4 --money 0.01
  fedtune provision federation.yaml -o DIR     a real federation: certificates, an archive for each site

'fedtune COMMAND --help' tells more; 'fedtune run --help' lists every setting.
"""

RUN_HELP = """\
Simulates a federation on this machine: reads the data, cuts it into one shard a node, trains in
rounds, shows progress, and writes RUN_DIR/record.json, adapter/ and statement.md.

examples:
  fedtune run
  fedtune run privacy.epsilon=2 adapter=ffa_lora model.quantization=nf4
  fedtune run partition=dirichlet federation.nodes=10
  fedtune run data=files data.path=FOLDER data.text=text data.label=category
  fedtune run hydra.run.dir=FOLDER             choose the run folder
  fedtune run -m privacy.epsilon=1,2,4,8       a sweep; hydra.sweep.dir=FOLDER chooses its folder
  fedtune run sweep.resume=FOLDER              run what is missing of a sweep, here or on another machine
  fedtune run resume=RUN_DIR                   go on with an interrupted run
"""


class _Parser(argparse.ArgumentParser):
    """argparse, with one paragraph instead of the usage and a message."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[:1].upper()}{message[1:]}. See '{self.prog} --help'.")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the console script; leaves with one of the exit statuses above."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    try:
        status = _dispatch(given, debug)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python would complain once more when it flushes at exit; what is left goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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


def _dispatch(given: list[str], debug: bool) -> int:
    parser = _parser()
    arguments, rest = parser.parse_known_args(given)
    # argparse reads words after an option of these commands as strangers; options it really does not know.
    strangers = [word for word in rest if word.startswith("-") or arguments.command not in _WORDS_ANYWHERE]
    if strangers and arguments.command != "run":
        parser.error(f"unrecognized arguments: {' '.join(strangers)}")
    if arguments.command is None:
        parser.print_help()
        return OK
    from fedtune.api import keep_private, silence_libraries

    keep_private()
    if not debug:
        silence_libraries()
    result: int = arguments.call(arguments, rest, debug)
    return result


def _parser() -> _Parser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = _Parser(prog="fedtune", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=raw)
    parser.add_argument("--version", action="version", version=f"fedtune {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")

    run = commands.add_parser("run", help="simulate a federation: train, account, record", add_help=False)
    run.add_argument("-m", "--multirun", action="store_true")
    run.add_argument("--config-dir", type=Path, action="append", default=[])
    run.add_argument("--show-config", action="store_true")
    run.add_argument("-h", "--help", action="store_true", dest="show_help")
    run.set_defaults(call=_run)

    statement = commands.add_parser(
        "statement",
        help="the privacy statement of a run",
        description="Prints what a finished run promises to whom, in Markdown, from its record.json alone.",
        epilog="example:\n  fedtune statement outputs/2026-11-21/18-00-00 > statement.md",
        formatter_class=raw,
    )
    statement.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="run folder, or a record.json")
    statement.add_argument("--json", action="store_true", help="as JSON, for a program")
    statement.set_defaults(call=_statement)

    predict = commands.add_parser(
        "predict",
        help="labels with probabilities, from a finished run",
        description="Classifies texts with the model that a run trained.",
        epilog='examples:\n  fedtune predict RUN_DIR "what a film" "never again"\n'
        "  fedtune predict RUN_DIR - < texts.txt         one text a line",
        formatter_class=raw,
    )
    predict.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="run folder")
    predict.add_argument("texts", metavar="TEXT", nargs="+", help="a text; '-' reads lines")
    predict.add_argument("--json", action="store_true", help="as JSON, for a program")
    predict.set_defaults(call=_predict)

    report = commands.add_parser(
        "report",
        help="all runs below some folders on one page, with the frontier",
        description="Writes report.html (one file, no network), frontier.png, frontier.csv and "
        "frontier.parquet from every record.json below the folders. Nothing is run again.",
        epilog="examples:\n  fedtune report multirun\n  fedtune report multirun outputs pricing=edge    what "
        "the same runs cost elsewhere\n  fedtune report multirun pricing.device_hour=0.2 --output FOLDER",
        formatter_class=raw,
    )
    _add_folders(report)
    report.add_argument("--output", metavar="FOLDER", type=Path, help="where to (default: the first DIR)")
    report.add_argument("--local", action="store_true", help="with times and prices of private data")
    report.set_defaults(call=_report)

    plan = commands.add_parser(
        "plan",
        help="the cheapest finished configuration that meets your wishes",
        description="Answers from finished runs: the cheapest configuration with that accuracy, epsilon and "
        "money, or which of the three must be relaxed and how far.",
        epilog="examples:\n  fedtune plan multirun --accuracy 0.78 --epsilon 4 --money 0.01\n"
        "  fedtune plan multirun --accuracy 0.8 pricing=edge",
        formatter_class=raw,
    )
    _add_folders(plan)
    plan.add_argument("--accuracy", metavar="A", type=float, help="at least, as a share (0.8)")
    plan.add_argument("--epsilon", metavar="E", type=float, help="at most")
    plan.add_argument("--money", metavar="M", type=float, help="at most, for one run, in the book's currency")
    plan.add_argument("--json", action="store_true", help="as JSON, for a program")
    plan.set_defaults(call=_plan)

    budget = commands.add_parser(
        "budget",
        help="what each data set has spent, and what its owner allows",
        description="Reads the ledgers, which remember every release. All simulated nodes share one.",
        epilog="examples:\n  fedtune budget show                             epsilon so far, of what budget\n"
        "  fedtune budget set --epsilon 3 --delta 1e-5     for all data without a budget of its own\n"
        "  fedtune budget set --dataset visits --epsilon 3 --delta 1e-5\n"
        "  fedtune budget history --dataset opinions       every release, with its parameters\n"
        "  fedtune budget verify                           was a ledger edited?",
        formatter_class=raw,
    )
    budget.set_defaults(call=_budget)
    actions = budget.add_subparsers(dest="action", metavar="ACTION", required=True, title="actions")
    for name, text in (
        ("show", "what each data set has spent, and of how much"),
        ("set", "allow data so much epsilon, in all, ever"),
        ("history", "every release, oldest first"),
        ("verify", "read every row; exit status 1 if one was edited, moved or removed"),
    ):
        action = actions.add_parser(name, help=text, description=f"{text[:1].upper()}{text[1:]}.")
        action.add_argument("--node", help="a node with its own ledger, or a simulated one; left out: all")
        if name != "verify":
            action.add_argument("--dataset", help="this data set only")
        if name == "set":
            action.add_argument("--epsilon", type=float, required=True)
            action.add_argument("--delta", type=float, required=True)
            action.add_argument(
                "--unit", choices=("record", "person", "client"), help="the finest unit that may be protected"
            )
        action.add_argument("--json", action="store_true", help="as JSON, for a program")

    audit = commands.add_parser(
        "audit",
        help="attack a run's mechanism: a lower bound on epsilon beside the claimed one",
        description="Runs the mechanism of a finished run again with canaries, on synthetic gradients, and "
        "tells what an attacker learns of them. Touches no private data and no budget. Exit status 1 if "
        "the claim does not stand.",
        epilog="examples:\n  fedtune audit RUN_DIR\n"
        "  fedtune audit RUN_DIR --seeds 5               five repetitions together show more\n"
        "  fedtune audit RUN_DIR --model                 train the real model, on the public test split",
        formatter_class=raw,
    )
    audit.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="run folder, or a record.json")
    audit.add_argument("--canaries", metavar="N", type=int, help="canaries in each repetition")
    audit.add_argument("--seeds", metavar="K", type=int, default=1, help="repetitions (default 1)")
    audit.add_argument(
        "--confidence", metavar="C", type=float, default=0.95, help="of all bounds together (default 0.95)"
    )
    audit.add_argument("--model", action="store_true", help="train the real model: minutes, not seconds")
    audit.add_argument("--json", action="store_true", help="as JSON, for a program")
    audit.set_defaults(call=_audit)
    add_deployment_commands(commands, raw)
    return parser


def _add_folders(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "words",
        metavar="DIR",
        nargs="+",
        help="folder with runs below it; pricing=NAME prices them by that book of conf/pricing/",
    )


# --- commands ------------------------------------------------------------------------------------


def _run(arguments: argparse.Namespace, overrides: list[str], debug: bool) -> int:
    if arguments.show_help:
        print(_run_help())
        return OK
    for word in overrides:
        if word.startswith("-"):
            raise ConfigError(f"'fedtune run' has no option {word}. See 'fedtune run --help'.")
    if arguments.show_config:
        return _show_config(overrides, arguments.config_dir)
    from fedtune import api
    from fedtune.config.launch import is_sweep

    resumes = any(word.startswith("sweep.resume=") for word in overrides)
    if not (arguments.multirun or resumes or is_sweep(overrides)):
        api.run(*overrides, config_dirs=arguments.config_dir)
        return OK
    made = api.sweep({}, *overrides, config_dirs=arguments.config_dir, debug=debug)
    if made.failures:
        numbers = ", ".join(str(number) for number in made.failures)
        raise FedtuneError(
            f"{len(made.failures)} of the sweep's runs failed (number {numbers}); the others finished."
        )
    return OK


def _show_config(overrides: list[str], extra_dirs: list[Path]) -> int:
    import yaml

    from fedtune.config.loader import load, to_dict

    print(yaml.safe_dump(to_dict(load(overrides, extra_dirs)), sort_keys=False, allow_unicode=True), end="")
    return OK


def _statement(arguments: argparse.Namespace, rest: list[str], debug: bool) -> int:
    from fedtune.privacy.statement.facts import statement_json
    from fedtune.runs import record

    finished = record.read(arguments.run_dir)
    if arguments.json:
        _print_json(statement_json(finished))
    else:
        print(record.statement_page(finished, record.run_folder(arguments.run_dir)).rstrip())
    return OK


def _predict(arguments: argparse.Namespace, rest: list[str], debug: bool) -> int:
    from dataclasses import asdict

    from fedtune import api
    from fedtune.runs.predict import show

    texts: list[str] = []
    for text in arguments.texts:
        texts += [line for line in sys.stdin.read().splitlines() if line.strip()] if text == "-" else [text]
    predictions = api.load(arguments.run_dir).predict(texts)
    if arguments.json:
        _print_json([asdict(prediction) for prediction in predictions])
    else:
        show(predictions)
    return OK


def _report(arguments: argparse.Namespace, rest: list[str], debug: bool) -> int:
    from fedtune.report.page import write_report

    folders, prices = _folders_and_prices([*arguments.words, *rest])
    made = write_report(folders, prices, arguments.output, local=arguments.local)
    print(made.text)
    print()
    for path in (made.page, made.picture, made.csv, made.parquet):
        print(path)
    return OK


def _plan(arguments: argparse.Namespace, rest: list[str], debug: bool) -> int:
    from fedtune.report.constraints import Constraints, plan

    folders, prices = _folders_and_prices([*arguments.words, *rest])
    constraints = Constraints(arguments.accuracy, arguments.epsilon, arguments.money)
    text, values = plan(folders, prices, constraints)
    if arguments.json:
        _print_json(values)
    else:
        print(text)
    return OK


def _folders_and_prices(words: list[str]) -> tuple[list[Path], list[str]]:
    """Folders and prices, given in any order; a word with '=' is a price unless there is such a folder."""
    prices = [word for word in words if "=" in word and not Path(word).exists()]
    folders = [Path(word) for word in words if word not in prices]
    if not folders:
        raise ConfigError("No folder with runs was named. See 'fedtune report --help'.")
    return folders, prices


def _budget(arguments: argparse.Namespace, rest: list[str], debug: bool) -> int:
    from fedtune.privacy.ledger import budget_report as budget

    return budget.main(arguments)


def _audit(arguments: argparse.Namespace, rest: list[str], debug: bool) -> int:
    from rich.console import Console

    from fedtune.runs import audit

    found = audit.audit(
        arguments.run_dir,
        canaries=arguments.canaries,
        seeds=arguments.seeds,
        confidence=arguments.confidence,
        model=arguments.model,
        console=None if arguments.json else Console(highlight=False),
    )
    if arguments.json:
        _print_json(found)
    audit.check(found)
    return OK


# --- what all commands share ---------------------------------------------------------------------


def _run_help() -> str:
    from fedtune.config.help import groups_text, settings_text

    return f"""\
usage: fedtune run [-m] [--config-dir FOLDER] [--show-config] [--debug] [NAME=VALUE ...]

{RUN_HELP}
options:
  -m, --multirun        run once for each combination of values given with commas
  --config-dir FOLDER   a folder with options of your own (FOLDER/data/mine.yaml is data=mine)
  --show-config         print the complete configuration and stop
  --debug               show the traceback of an error

groups: NAME=OPTION chooses a page of conf/NAME/; * is the default
{groups_text()}

settings: name=default, what it is, and what it may be
{settings_text()}

of a sweep (-m), not of a run:
  sweep.resume=FOLDER             run what is missing of the sweep in this folder
  sweep.private_selection=true    draw the number of trials, and which, at random: the best may then
                                  be published, and nothing else, for less than the price of all
  sweep.trials=N                  how many are expected; default: as many as there are combinations
  sweep.distribution=NAME         of their number: *geometric logarithmic poisson

of a search (sweep=optuna 'train.learning_rate=tag(log,interval(0.001,0.1))'):
  sweep.trials=N                  how many runs; with sweep.resume=FOLDER: how many in all
  sweep.objectives=NAME,NAME      *accuracy epsilon energy bytes money seconds
  sweep.sampler=NAME              *tpe nsga2 random
  sweep.pruner=NAME               *median halving none; only for accuracy alone

several runs at once: hydra/launcher=joblib hydra.launcher.n_jobs=N (or ray, submitit_slurm: README)

Hydra's own: hydra.run.dir=FOLDER, hydra.sweep.dir=FOLDER
State (ledgers, caches) lives below FEDTUNE_HOME, by default the platform's user folders."""


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def _status(error: BaseException) -> int:
    if isinstance(error, ConfigError):
        return USAGE
    return FAILED if isinstance(error, (FedtuneError, OSError, MemoryError)) else BUG


if __name__ == "__main__":
    main()
