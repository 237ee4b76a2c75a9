"""The commands about runs of a real federation: submit, follow, stop, status."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from fedtune.cli.run_command import complete_setting, finished
from fedtune.cli.shared import (
    FAILED,
    OK,
    Command,
    Json,
    ServerFolder,
    answering,
    argument,
    help_text,
    option,
    print_json,
    status_of,
)
from fedtune.errors import ConfigError

__all__ = ["commands"]

commands = typer.Typer(rich_markup_mode="rich")
_PANEL = "A real federation"


@commands.command(
    cls=Command,
    rich_help_panel=_PANEL,
    short_help="Run over the sites of a real federation.",
    help=help_text(
        "Starts a run at the server and shows it; record.json, adapter/ and statement.md are written here. "
        "Settings as of `fedtune run`; data.* describe what the server tests on, since each site has data of "
        "its own: a split that is declared public (data.test_split=test data.test_public=true). Without one "
        "the sites answer with noised counts about what they hold out. Exit status 0 only if the run "
        "succeeded with every site; 3 if a site refused or sent nothing, and the others went on.",
        """\
fedtune submit DIR/server data=files data.name=visits data.labels=[no,yes]
fedtune submit DIR/server resume=RUN_DIR              go on after a crash
fedtune submit DIR/server data=files ... --detach     go on without this terminal
fedtune follow RUN_DIR                                look at it; Ctrl-C only looks away
fedtune stop DIR/server RUN_DIR                       end it after its round, with a result""",
        "fedtune statement RUN_DIR  what was promised to whom",
    ),
)
def submit(
    folder: ServerFolder,
    settings: Annotated[
        list[str] | None,
        argument("[NAME=VALUE]...", "As of `fedtune run`.", autocompletion=complete_setting),
    ] = None,
    detach: Annotated[bool, option("Go on without this terminal.", "--detach")] = False,
    json: Json = False,
) -> int:
    from fedtune import api
    from fedtune.config.convert import value_text
    from fedtune.config.loader import load

    if not (folder / "server.yaml").exists():
        raise ConfigError(f"{folder} is no server folder; name the one that `fedtune provision` made.")
    overrides, server = list(settings or ()), str(folder.absolute())
    if detach:
        _detach(folder, overrides, json)
        return OK
    if not any(word.startswith("resume=") for word in overrides):
        place = f"engine.server={value_text(server)}"
        result = api.run(*overrides, "engine.name=deployment", place, progress=not json)
        return finished(result, json)
    config = load(overrides)
    engine = dataclasses.replace(config.engine, name="deployment", server=server)  # it may have moved
    return finished(api.run(dataclasses.replace(config, engine=engine), progress=not json), json)


def _detach(folder: Path, overrides: list[str], json: bool) -> None:
    from fedtune.config.loader import load
    from fedtune.deploy.detached import detach, new_folder

    chosen = [one.partition("=")[2] for one in overrides if one.startswith(("hydra.run.dir=", "resume="))]
    settings = [one for one in overrides if not one.startswith("hydra.run.dir=")]
    load(settings)  # what is wrong with them is said here
    run_dir = Path(chosen[-1]) if chosen else new_folder()
    process, number = detach(folder.absolute(), settings, run_dir)
    state = f"run {number} goes on" if number else "the run has not begun: it loads, or waits for its turn"
    answering("submit --detach", json)(
        {"run_dir": str(run_dir), "process": process, "run": number},
        f"{state}, in process {process}; its folder is {run_dir}\n"
        f"look at it:  fedtune follow {run_dir}\n"
        f"end it:      fedtune stop {folder} {run_dir}",
    )


@commands.command(
    cls=Command,
    rich_help_panel=_PANEL,
    short_help="Look at a run that goes on elsewhere.",
    help=help_text(
        "Shows what a run that was submitted with --detach has said from its beginning, and what it says "
        "until it ends. On another machine than the one that submitted it, name the server folder, or an "
        "operator's (who may read), and the run's number: shown are its rounds, and the statement at the "
        "end. Ctrl-C only looks away. Exit status 0 only if the run succeeded.",
        """\
fedtune follow outputs/2026-11-30/12-00-00
fedtune follow DIR 1234567890              the number that `fedtune status DIR` shows""",
        "fedtune stop DIR/server RUN_DIR  end it after its round, with a result",
    ),
)
def follow(
    place: Annotated[Path, argument("RUN_DIR|DIR", "The run folder; or a server's, before RUN.")],
    run: Annotated[str | None, argument("[RUN]", "The number in `fedtune status`.")] = None,
) -> int:
    if run is not None:
        from fedtune.deploy.client import Server
        from fedtune.deploy.following import follow_run

        if not run.isdecimal():
            raise ConfigError(f"{run!r} is no number of a run; `fedtune status {place}` shows the numbers.")
        return OK if follow_run(Server.of(place), run, lambda line: print(line, flush=True)) else FAILED
    from fedtune.deploy import detached

    def show(text: str) -> None:
        print(text, end="", flush=True)

    if not detached.follow(place, show):
        return FAILED
    from fedtune.runs.record import Result

    return status_of(Result(place).left_out)


@commands.command(
    cls=Command,
    rich_help_panel=_PANEL,
    short_help="End a run of a real federation.",
    help=help_text(
        "Has a run end after the round that it is in, with record, adapter and statement of what it did "
        "until then: what the sites were charged has its result. With --now it ends at once; the round that "
        "it is in stays charged at the sites that had begun it, and `fedtune submit DIR resume=RUN_DIR` goes "
        "on.",
        """\
fedtune stop DIR/server RUN_DIR            the folder of the run, if it is on this machine
fedtune stop DIR/server 1234567890 --now   the number that `fedtune status` shows""",
        "fedtune submit DIR/server resume=RUN_DIR  go on with a run that ended at once",
    ),
)
def stop(
    folder: ServerFolder,
    run: Annotated[str, argument("RUN", "A run folder, or the number in `fedtune status`.")],
    now: Annotated[bool, option("Do not wait for the end of its round.", "--now")] = False,
    json: Json = False,
) -> None:
    from fedtune.deploy import submit as submission
    from fedtune.deploy.client import Server
    from fedtune.deploy.detached import end_before_it_begins

    if not run.isdecimal() and end_before_it_begins(Path(run)):
        answering("stop", json)(
            {"run": None, "now": now}, f"the run of {run} had not begun, and will not; nothing was charged"
        )
        return
    number = run if run.isdecimal() else submission.run_number_in(Path(run) / "checkpoint" / submission.NOTE)
    if number is None:
        raise ConfigError(
            f"{run!r} is no run folder from which a run was submitted, and no number of a run; `fedtune "
            f"status {folder}` shows the numbers."
        )
    Server.of(folder).stop(number, now=now)
    answering("stop", json)(
        {"run": str(number), "now": now},
        f"run {number} ends {'now' if now else 'after the round that it is in'}",
    )


@commands.command(
    cls=Command,
    rich_help_panel=_PANEL,
    short_help="Sites and runs of a real federation.",
    help=help_text(
        "Asks a running server for its sites, what they publish of their budgets, and its runs.",
        "fedtune status DIR/server",
        """\
fedtune submit DIR/server data=files ...  run over the sites
fedtune follow RUN_DIR  look at one that was detached""",
    ),
)
def status(folder: ServerFolder, json: Json = False) -> None:
    from fedtune.deploy.client import status as ask
    from fedtune.deploy.join import budget_text

    found = ask(folder)
    if json:
        from dataclasses import asdict

        print_json("status", asdict(found))
        return
    print(f"server {found.address}")
    for site in found.sites:
        budget = budget_text(site["budget"])
        print(f"site {site['site']:<20} {site['state']:<12} {site['since'][:19]:<20} {budget}")
    for run in found.runs:
        by = f"by {run['by']}" if run["by"] else ""
        print(f"run {run['run']:<21} {run['state']:<12} {run['started']} {by} {run['details']}".rstrip())
    for name in found.waiting:
        print(f"a run of {name} waits for its turn")
    for warning in found.warnings:
        print(f"Warning: {warning}.")
