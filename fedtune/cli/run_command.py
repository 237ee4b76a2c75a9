"""`fedtune run`: one run, a grid or a search; settings are free words, with help and completion."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedtune.cli.shared import OK, Command, Json, argument, help_text, option, print_json, status_of
from fedtune.errors import ConfigError, FedtuneError

if TYPE_CHECKING:
    from fedtune.api import Result, SweepResult

__all__ = ["commands", "complete_setting", "dry_run", "finished"]

commands = typer.Typer(rich_markup_mode="rich")

_SETTINGS_HELP = """\
groups: NAME=OPTION chooses a page of conf/NAME/; * is the default
{groups}

settings: name=default, what it is, and what it may be
{settings}

of a sweep (-m), not of a run:
  sweep.resume=FOLDER           run what is missing of the sweep in this folder
  sweep.private_selection=true  draw the number of trials, and which, at random:
                                the best may then be published, and nothing
                                else, for less than the price of all
  sweep.trials=N                how many are expected; default: as many as
                                there are combinations
  sweep.distribution=NAME       of their number: *geometric logarithmic poisson

of a search (sweep=optuna 'train.learning_rate=tag(log,interval(0.001,0.1))'):
  sweep.trials=N                how many runs; with sweep.resume=FOLDER: in all
  sweep.objectives=NAME,NAME    *accuracy epsilon energy bytes money seconds
  sweep.sampler=NAME            *tpe nsga2 random
  sweep.pruner=NAME             *median halving none; only for accuracy alone

several runs at once: hydra/launcher=joblib hydra.launcher.n_jobs=N
(or ray, submitit_slurm: docs/sweeps.md)

Hydra's own: hydra.run.dir=FOLDER, hydra.sweep.dir=FOLDER
State (ledgers, caches) lives below FEDTUNE_HOME, by default the platform's
user folders."""


class _RunCommand(Command):
    """`fedtune run`, whose help ends with every group and setting."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Prints typer's help, then the settings."""
        from fedtune.config.loader import defaults
        from fedtune.config.pages import groups_text, settings_text

        super().format_help(ctx, formatter)
        width = min(100, shutil.get_terminal_size().columns)
        groups, settings = groups_text(width), settings_text(defaults(), width)
        typer.echo(_SETTINGS_HELP.format(groups=groups, settings=settings))


def complete_setting(ctx: typer.Context, incomplete: str) -> list[str]:
    """What may follow `incomplete`: names of settings and groups, and after '=' the values of a closed set.

    Bash takes '=' for a word of its own, which click leaves out where it is the last; other shells do not.
    """
    from fedtune.config.convert import settings
    from fedtune.config.pages import GROUPS, group_options

    before = list(ctx.params.get("settings") or ())
    names = (*GROUPS, *settings())
    if not incomplete and before[-1:] and before[-1] in names and before[-2:-1] != ["="]:
        name, typed, prefix = before[-1], "", ""
    elif before[-1:] == ["="] and len(before) > 1:
        name, typed, prefix = before[-2], incomplete, ""
    elif "=" in incomplete:
        name, _, typed = incomplete.partition("=")
        prefix = f"{name}="
    else:
        return [f"{name}=" for name in names if name.startswith(incomplete)]
    options: list[str] = []
    if name in GROUPS:
        options = group_options(name)
    elif name in settings():
        options = list(settings()[name].choices) or (
            ["true", "false"] if settings()[name].kind is bool else []
        )
    return [prefix + option for option in options if option.startswith(typed)]


@commands.command(
    cls=_RunCommand,
    rich_help_panel="Simulate",
    short_help="Simulate a federation: train, account, record.",
    help=help_text(
        "Simulates a federation on this machine: reads the data, cuts it into one shard a node, trains in "
        "rounds, shows progress, and writes RUN_DIR/record.json, adapter/ and statement.md. Exit status 3: "
        "it finished without a site that should have taken part (it refused, or sent nothing).",
        """\
fedtune run
fedtune run privacy.epsilon=2 adapter=ffa_lora model.quantization=nf4
fedtune run partition=dirichlet federation.nodes=10
fedtune run data=files data.path=FOLDER data.text=text data.label=category
fedtune run hydra.run.dir=FOLDER             choose the run folder
fedtune run -m privacy.epsilon=1,2,4,8       a sweep (hydra.sweep.dir=FOLDER)
fedtune run sweep.resume=FOLDER              run what is missing of a sweep
fedtune run --dry-run data=files data.path=FOLDER   what it would do and spend
fedtune run resume=RUN_DIR                   go on with an interrupted run""",
        """\
fedtune predict RUN_DIR "what a film"  use what was trained
fedtune statement RUN_DIR  what was promised to whom
fedtune report multirun  after a sweep: all runs on one page""",
    ),
)
def run(
    ctx: typer.Context,
    settings: Annotated[
        list[str] | None,
        argument("[NAME=VALUE]...", "As listed below.", autocompletion=complete_setting),
    ] = None,
    multirun: Annotated[
        bool, option("Run once for each combination of values given with commas.", "-m", "--multirun")
    ] = False,
    config_dir: Annotated[
        list[Path] | None,
        option("A folder with options of your own (FOLDER/data/mine.yaml is data=mine).", metavar="FOLDER"),
    ] = None,
    show_config: Annotated[
        bool, option("Print the complete configuration and stop.", "--show-config")
    ] = False,
    only_check: Annotated[
        bool,
        option("Say what the run would do and spend, as fedtune data check; train nothing.", "--dry-run"),
    ] = False,
    cfg: Annotated[str | None, option("Hydra's name for --show-config.", metavar="job")] = None,
    json: Json = False,
) -> int:
    overrides, folders = list(settings or ()), list(config_dir or ())
    if cfg not in (None, "job"):
        raise ConfigError(f"--cfg {cfg} is not known: --cfg job prints the complete configuration.")
    if show_config or cfg:
        _show_config(overrides, folders, json)
        return OK
    if only_check:
        dry_run(overrides, folders, json)
        return OK
    from fedtune import api
    from fedtune.config.launch import is_sweep

    resumes = any(word.startswith("sweep.resume=") for word in overrides)
    if not (multirun or resumes or is_sweep(overrides)):
        return finished(api.run(*overrides, config_dirs=folders, progress=not json), json)
    made = api.sweep({}, *overrides, config_dirs=folders, debug=bool(ctx.obj), progress=not json)
    if json:
        print_json("run -m", _sweep_json(made))
    if made.failures:
        raise FedtuneError(_failed(made))
    return status_of(sorted({site for sites in made.partial.values() for site in sites}))


def _failed(made: SweepResult) -> str:
    """Which runs of a sweep failed: by number, as their lines have it (from 1), and by folder (from 0)."""
    from fedtune.privacy.statement.words import few

    count = len(made.failures)
    numbers = few([str(number + 1) for number in made.failures], most=20)
    folders = few([str(made.path / str(number)) for number in made.failures])
    rest = "the others finished" if made.runs else "none finished"
    return f"{count} of the sweep's runs failed (run {numbers}; {folders}); {rest}."


def dry_run(overrides: list[str], folders: list[Path], json: bool) -> None:
    """Prints what one run by these settings would do, and spend; trains nothing."""
    from fedtune.config.loader import load
    from fedtune.runs.check import check, in_text

    found = check(load(overrides, folders))
    if json:
        print_json("data check", found)
    else:
        print(in_text(found))


def finished(result: Result, json: bool) -> int:
    """The end of `fedtune run` and `fedtune submit`; returns the exit status."""
    if json:
        print_json("run", _result_json(result))
    return status_of(result.left_out)


def _result_json(result: Result) -> dict[str, Any]:
    """What of a record a script asks for first; the rest lies in record.json."""
    return {
        "run_dir": str(result.path),
        "run": result.record["run"]["id"],
        "status": result.record["run"]["status"],
        **{name: getattr(result, name) for name in ("epsilon", "delta", "unit", "adjacency", "accuracy")},
        "left_out": result.left_out,
        "cautions": result.record["privacy"].get("cautions") or [],
    }


def _sweep_json(made: SweepResult) -> dict[str, Any]:
    return {
        "folder": str(made.path),
        "runs": [_result_json(result) for result in made.runs],
        "failures": {str(number): error for number, error in made.failures.items()},
    }


def _show_config(overrides: list[str], folders: list[Path], json: bool) -> None:
    import yaml

    from fedtune.config.loader import load, to_dict

    if json:
        print_json("run --show-config", to_dict(load(overrides, folders)))
        return
    print(yaml.safe_dump(to_dict(load(overrides, folders)), sort_keys=False, allow_unicode=True), end="")
