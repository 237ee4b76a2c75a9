"""The commands of a real federation: `fedtune provision | server | node | submit | status`."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedtune.cli.run_command import complete_setting
from fedtune.cli.shared import Command, Json, ServerFolder, argument, help_text, option, print_json
from fedtune.errors import ConfigError

if TYPE_CHECKING:
    from fedtune.federation.client.policy import SiteSettings

__all__ = ["commands"]

commands = typer.Typer(rich_markup_mode="rich")
_PANEL = "A real federation"


@commands.command(
    cls=Command,
    rich_help_panel=_PANEL,
    short_help="Certificates, keys and archives for a real federation.",
    help=help_text(
        "Makes from one federation file what a server and its sites need. Called again, it keeps what there "
        "is and makes what is missing. A federation file holds three lines: 'name: hospitals', "
        "'server: fed.example.org:9443' and 'sites: [clinic-1, clinic-2, clinic-3]'.",
        """\
fedtune provision federation.yaml -o DIR
fedtune provision federation.yaml -o DIR --renew      a new server certificate""",
    ),
)
def provision(
    file: Annotated[Path, argument("FEDERATION.yaml", "The federation file.")],
    output: Annotated[Path, option("Where to write.", "-o", "--output", metavar="DIR")],
    renew: Annotated[bool, option("Make a new server certificate.", "--renew")] = False,
) -> None:
    from fedtune.deploy.provision import provision

    done = provision(file, output, renew=renew)
    for name in done.new:
        print(f"made {name}")
    for name in done.kept:
        print(f"kept {name}")
    folder = done.folder
    print(
        f"\nserver: {folder / 'server'} (its README.md says how to start it)\n"
        f"sites:  send each its archive from {folder / 'sites'}; nothing in it is secret\n"
        f"keep {folder / 'authority'} offline: whoever has ca.key can pose as the server"
    )


@commands.command(
    cls=Command,
    rich_help_panel=_PANEL,
    short_help="The server of a real federation, or let a site in or out.",
    help=help_text(
        "Starts Flower's SuperLink with TLS, node keys and a database, from the server folder that "
        "`fedtune provision` made. It relays, and runs nobody's code.",
        """\
fedtune server DIR/server
fedtune server DIR/server --enrol 'ecdsa-sha2-nistp384 AAAA... clinic-1'
fedtune server DIR/server --revoke clinic-1""",
    ),
)
def server(
    folder: ServerFolder,
    host: Annotated[str | None, option("Address of this machine to listen on (default: all).")] = None,
    enrol: Annotated[
        str | None, option("Let a site in: what `fedtune node init` printed, or a file.", metavar="LINE")
    ] = None,
    revoke: Annotated[str | None, option("Never let the key of a site in again.", metavar="SITE")] = None,
    accept_restore: Annotated[
        str | None, option("Let in a site whose books were restored from a backup.", metavar="SITE")
    ] = None,
) -> None:
    from fedtune.deploy import admission

    if enrol is not None:
        site, fingerprint = admission.enrol(folder, enrol)
        print(f"enrolled {site}; compare the fingerprint of its key with the site: {fingerprint}")
    elif revoke is not None:
        admission.revoke(folder, revoke)
        print(f"revoked {revoke}; a running server lets it in no more")
    elif accept_restore is not None:
        kept, restored = admission.BookHeads(folder).accept(accept_restore)
        print(f"accepted, and noted in heads.log: {accept_restore} goes on from {restored}, not from {kept}")
    else:
        from fedtune.deploy.server import run_server

        run_server(folder, _say("server"), host)


@commands.command(
    cls=Command,
    rich_help_panel=_PANEL,
    short_help="A site of a real federation: make its key, try a run, join.",
    help=help_text(
        "Joins a federation with this site's data. The site's own file decides what is permitted.",
        """\
fedtune node init --config node.yaml           make the key, print what to send
fedtune node --config node.yaml --dry-run       what a run would do, and whether it is permitted
fedtune node --config node.yaml --dry-run privacy.epsilon=2
fedtune node --config node.yaml                 join; Ctrl-C leaves
fedtune node proof --config node.yaml           what has left this site; are the books whole
fedtune node proof --config node.yaml --against HEAD    do they go on from a head that was kept
fedtune node accept --config node.yaml          the audit log lost lines for good: note it, go on""",
    ),
)
def node(
    config: Annotated[Path, option("The site's own file.", metavar="node.yaml")],
    step: Annotated[
        list[str] | None,
        argument(
            "[init | proof | accept | NAME=VALUE]...",
            "As in the examples; NAME=VALUE: settings of a proposed run, with --dry-run.",
        ),
    ] = None,
    against: Annotated[
        str | None, option("With proof: a head that an earlier proof printed.", metavar="HEAD")
    ] = None,
    dry_run: Annotated[bool, option("Show what a run would do here; train nothing.", "--dry-run")] = False,
) -> int:
    from fedtune.deploy import site as sites

    words = list(step or ())
    site = sites.read_site(config, with_data=words not in (["init"], ["proof"], ["accept"]))
    if words == ["init"]:
        line, fingerprint = sites.make_key(site)
        print(f"{line}\n\nSend the line above to the federation's operator, and compare this by telephone:")
        print(f"fingerprint {fingerprint}\nThe private key is {site.key}; never send it to anybody.")
        return 0
    if words == ["proof"]:
        text, whole = sites.proof(site, against)
        print(text)
        return 0 if whole else 1
    if words == ["accept"]:
        print(sites.accept(site))
        return 0
    if dry_run:
        return _dry_run(site, words)
    if words:
        raise ConfigError(f"'fedtune node' has no use for {words[0]!r}. See 'fedtune node --help'.")
    from fedtune.deploy.node import run_node

    run_node(site, _say("node"))
    return 0


def _dry_run(site: SiteSettings, overrides: list[str]) -> int:
    from fedtune.config.convert import value_text
    from fedtune.config.loader import load
    from fedtune.deploy.site import dry_run

    # What a run of this site's data asks by default, and not one of the data that `fedtune run` simulates.
    words = ["engine.name=deployment"]
    if not any(word.startswith("data=") for word in overrides):
        words.append(f"data={site.data.source}")
    if site.data.unit is not None and not any(word.startswith("data.unit=") for word in overrides):
        words.append(f"data.unit={value_text(site.data.unit)}")
    proposed = load([*words, *overrides])
    if not any(word.startswith("data.name=") for word in overrides):
        data = dataclasses.replace(proposed.data, name=site.data.name)
        proposed = dataclasses.replace(proposed, data=data)
    done = dry_run(site, proposed)
    print(done.text())
    return 1 if done.refusals else 0


@commands.command(
    cls=Command,
    rich_help_panel=_PANEL,
    short_help="Run over the sites of a real federation.",
    help=help_text(
        "Starts a run at the server and shows it; record.json, adapter/ and statement.md are written here. "
        "Settings as of `fedtune run`; data.* describe what the server tests on, since each site has data of "
        "its own: a split that is declared public (data.test_split=test data.test_public=true). Without one "
        "the sites answer with noised counts about what they hold out. Exit status 0 only if the run "
        "succeeded.",
        """\
fedtune submit DIR/server data=files data.name=visits data.labels=[no,yes]
fedtune submit DIR/server resume=RUN_DIR              go on after a crash""",
    ),
)
def submit(
    folder: ServerFolder,
    settings: Annotated[
        list[str] | None,
        argument("[NAME=VALUE]...", "As of `fedtune run`.", autocompletion=complete_setting),
    ] = None,
) -> None:
    from fedtune import api
    from fedtune.config.convert import value_text
    from fedtune.config.loader import load

    if not (folder / "server.yaml").exists():
        raise ConfigError(f"{folder} is no server folder; name the one that `fedtune provision` made.")
    overrides, server = list(settings or ()), str(folder.absolute())
    if not any(word.startswith("resume=") for word in overrides):
        api.run(*overrides, "engine.name=deployment", f"engine.server={value_text(server)}")
        return
    config = load(overrides)
    engine = dataclasses.replace(config.engine, name="deployment", server=server)  # it may have moved
    api.run(dataclasses.replace(config, engine=engine))


@commands.command(
    cls=Command,
    rich_help_panel=_PANEL,
    short_help="Sites and runs of a real federation.",
    help=help_text(
        "Asks a running server for its sites, what they publish of their budgets, and its runs.",
        "fedtune status DIR/server",
    ),
)
def status(folder: ServerFolder, json: Json = False) -> None:
    from fedtune.deploy import submit as submission
    from fedtune.deploy.join import budget_text

    found = submission.status(folder)
    if json:
        from dataclasses import asdict

        print_json(asdict(found))
        return
    print(f"server {found.address}")
    for site in found.sites:
        budget = budget_text(site["budget"])
        print(f"site {site['site']:<20} {site['state']:<12} {site['since'][:19]:<20} {budget}")
    for run in found.runs:
        print(f"run {run['run']:<21} {run['state']:<12} {run['started']} {run['details']}".rstrip())


def _say(who: str) -> Callable[[str], None]:
    def say(line: str) -> None:
        print(f"fedtune {who}: {line}", file=sys.stderr, flush=True)

    return say
