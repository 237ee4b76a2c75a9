"""The commands of a real federation: its server, its sites and its operators."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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
)
from fedtune.errors import ConfigError

if TYPE_CHECKING:
    pass

__all__ = ["commands"]

commands = typer.Typer(rich_markup_mode="rich")
_PANEL = "A real federation"

Monitor = Annotated[
    str | None,
    option(
        "Answer for /metrics and /healthz there; the server has a page, too. 9464: this machine alone.",
        metavar="[HOST:]PORT",
    ),
]
LogJson = Annotated[bool, option("Log one JSON object a line.", "--log-json")]


_AFTER = {  # each step of a rotation: what comes next
    "announce": "The running server tells the sites. Give each operator operator.zip again. When the sites "
    "know (two minutes, if all are there), go on with --rotate switch.",
    "switch": "The running server shows its new certificate from now on. A run that was submitted before the "
    "announcement ends, and goes on with resume=RUN_DIR. When nothing is amiss, go on with --rotate retire.",
    "retire": "The sites trust the former authority no more. Destroy its ca.key; operators, and sites that "
    "were left behind, need their new archives.",
}


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
fedtune provision federation.yaml -o DIR --renew      a new server certificate
fedtune provision federation.yaml -o DIR --rotate announce    a new authority, in three steps
fedtune provision federation.yaml -o DIR --rotate switch      when the sites trust it
fedtune provision federation.yaml -o DIR --rotate retire      and the former one no more""",
        """\
fedtune server DIR/server  start the server
fedtune node init --config node.yaml  at each site, from its archive""",
    ),
)
def provision(
    file: Annotated[Path, argument("FEDERATION.yaml", "The federation file.")],
    output: Annotated[Path, option("Where to write.", "-o", "--output", metavar="DIR")],
    renew: Annotated[bool, option("Make a new server certificate.", "--renew")] = False,
    rotate: Annotated[
        str | None,
        option("Take a step to a new authority: announce, switch, then retire.", metavar="STEP"),
    ] = None,
    without: Annotated[
        str, option("With --rotate switch: sites that may be left behind; with commas.", metavar="SITES")
    ] = "",
    json: Json = False,
) -> None:
    from fedtune.deploy.provision import provision

    behind = [site.strip() for site in without.split(",") if site.strip()]
    done = provision(file, output, renew=renew, rotate=rotate, without=behind)
    if json:
        made = {"new": list(done.new), "kept": list(done.kept), "authority": done.authority}
        print_json("provision", {"folder": str(done.folder), **made})
        return
    for name in done.new:
        print(f"made {name}")
    for name in done.kept:
        print(f"kept {name}")
    folder = done.folder
    print(
        f"\nserver: {folder / 'server'} (its README.md says how to start it)\n"
        f"sites:  send each its archive from {folder / 'sites'}; nothing in it is secret\n"
        f"keep {folder / 'authority'} offline: whoever has ca.key can pose as the server\n"
        f"fingerprint of the authority, to read to each site by telephone: {done.authority}"
    )
    if rotate is not None:
        print(f"\n{_AFTER[rotate]}")


@commands.command(
    cls=Command,
    rich_help_panel=_PANEL,
    short_help="The server of a real federation, or let a site in or out.",
    help=help_text(
        "Starts Flower's SuperLink with TLS, node keys and a database, from the server folder that "
        "`fedtune provision` made. It relays, and runs nobody's code.",
        """\
fedtune server DIR/server
fedtune server DIR/server --monitor 9464             its page: http://127.0.0.1:9464/
fedtune server DIR/server --enrol 'ecdsa-sha2-nistp384 AAAA... clinic-1' --fingerprint '7f3a 01bc ...'
fedtune server DIR/server --revoke clinic-1
fedtune server DIR/server --operator 'ecdsa-... alice' --fingerprint '...' --rights submit,read
fedtune server DIR/server --revoke-operator alice    at once, without a restart
fedtune server DIR/server --trail                    who did what: runs, joins, refusals
fedtune server DIR/server --trail --against HEAD     does it go on from a head that was kept""",
        """\
fedtune status DIR/server  who has joined
fedtune submit DIR/server data=files ...  run over the sites""",
    ),
)
def server(
    folder: ServerFolder,
    host: Annotated[str | None, option("Address of this machine to listen on (default: all).")] = None,
    enrol: Annotated[
        str | None, option("Let a site in: what `fedtune node init` printed, or a file.", metavar="LINE")
    ] = None,
    fingerprint: Annotated[
        str | None,
        option("Of the key in LINE, as its owner told it by telephone; asked for otherwise.", metavar="HEX"),
    ] = None,
    revoke: Annotated[str | None, option("Never let the key of a site in again.", metavar="SITE")] = None,
    accept_restore: Annotated[
        str | None, option("Let in a site whose books were restored from a backup.", metavar="SITE")
    ] = None,
    operator: Annotated[
        str | None, option("Let an operator in: what `fedtune operator` printed, or a file.", metavar="LINE")
    ] = None,
    rights: Annotated[
        str, option("What the operator may do: submit, stop, enrol, read; with commas.", metavar="RIGHTS")
    ] = "submit,read",
    revoke_operator: Annotated[
        str | None, option("Never let the key of an operator in again.", metavar="NAME")
    ] = None,
    trail: Annotated[bool, option("Show who did what, and whether the trail is whole.", "--trail")] = False,
    against: Annotated[
        str | None, option("With --trail: a head that it printed before and was kept.", metavar="HEAD")
    ] = None,
    monitor: Monitor = None,
    log_json: LogJson = False,
    json: Annotated[bool, option("What --enrol and the like did, as JSON.", "--json")] = False,
) -> int:
    from fedtune.deploy import admission, operators

    say = answering("server", json)

    if enrol is not None:
        line = admission.line_of(enrol)
        _compare_fingerprint(line, fingerprint)
        site, shown = _enrol(folder, line)
        say({"enrolled": site, "fingerprint": shown}, f"enrolled {site}, fingerprint {shown}")
    elif revoke is not None:
        _revoke(folder, revoke)
        say({"revoked": revoke}, f"revoked {revoke}; a running server lets it in no more")
    elif operator is not None:
        line = admission.line_of(operator)
        _compare_fingerprint(line, fingerprint)
        made = operators.add(folder, line, [right.strip() for right in rights.split(",")])
        may = sorted(made.rights)
        say(
            {"operator": made.name, "rights": may},
            f"operator {made.name} may {', '.join(may)}; a running server knows it in 2 s",
        )
    elif revoke_operator is not None:
        operators.revoke(folder, revoke_operator)
        say(
            {"revoked_operator": revoke_operator},
            f"revoked operator {revoke_operator}; a running server lets that key in no more",
        )
    elif trail:
        from fedtune.deploy.trail import Trail

        text, whole = Trail(folder).text()
        if against is not None and (lacks := Trail(folder).against(against)):
            text, whole = f"{text}\nthe trail was changed or damaged: {lacks}", False
        say({"whole": whole, "text": text.splitlines()}, text)
        return OK if whole else FAILED
    elif accept_restore is not None:
        from fedtune.deploy.heads import BookHeads

        kept, restored = BookHeads(folder).accept(accept_restore)
        say(
            {"accepted": accept_restore, "goes_on_from": str(restored), "not_from": str(kept)},
            f"accepted, and noted in heads.log: {accept_restore} goes on from {restored}, not from {kept}",
        )
    elif json:
        raise ConfigError("--json is for --enrol and the like; a server that runs has no answer.")
    else:
        from fedtune.deploy.server import run_server

        run_server(folder, _log("server", log_json), host, monitor)
    return OK


def _compare_fingerprint(line: str, told: str | None) -> None:
    """Refuses a line whose key has another fingerprint than the one that its owner told."""
    from fedtune.deploy.admission import check_fingerprint
    from fedtune.deploy.certificates import read_public_line

    _, name = read_public_line(line)
    if told is None:
        if not sys.stdin.isatty():
            raise ConfigError(
                f"Who sent this line is not known yet. Call {name}, have the fingerprint of their key read "
                "to you, and give it: --fingerprint 'HEX'. Nobody was let in."
            )
        told = typer.prompt(f"Call {name}, and type the fingerprint that they read to you")
    check_fingerprint(line, told)


def _enrol(folder: Path, line: str) -> tuple[str, str]:
    """Enrols a site in this server folder, or at the server of an operator's folder."""
    from fedtune.deploy import admission
    from fedtune.deploy.operator_key import OPERATOR_KEY

    if not (folder / OPERATOR_KEY).exists():
        return admission.enrol(folder, line)
    from fedtune.deploy.client import Server
    from fedtune.deploy.server import ENROL_HEADER, ENROL_PATH

    done = Server.of(folder).ask(ENROL_PATH, "POST", {ENROL_HEADER: line})
    return str(done["enrolled"]), str(done["fingerprint"])


def _revoke(folder: Path, site: str) -> None:
    from fedtune.deploy import admission
    from fedtune.deploy.operator_key import OPERATOR_KEY

    if not (folder / OPERATOR_KEY).exists():
        return admission.revoke(folder, site)
    from fedtune.deploy.client import Server
    from fedtune.deploy.server import ENROL_PATH, REVOKE_HEADER

    Server.of(folder).ask(ENROL_PATH, "POST", {REVOKE_HEADER: site})
    return None


@commands.command(
    cls=Command,
    rich_help_panel=_PANEL,
    short_help="An operator's own key, by which a server knows them.",
    help=help_text(
        "Makes the key of an operator in a folder that holds the server's server.yaml and ca.crt "
        "(`operator.zip`, which `fedtune provision` makes), and prints the line that the server's "
        "administrator lets them in by; called again, it prints the line again. The key stays in the folder.",
        "fedtune operator DIR --name alice",
        "fedtune submit DIR data=files ...  with the right to submit",
    ),
)
def operator(
    folder: Annotated[Path, argument("DIR", "A folder with server.yaml and ca.crt.")],
    name: Annotated[str, option("Who you are: a word.", metavar="NAME")],
    json: Json = False,
) -> None:
    from fedtune.deploy.operator_key import OPERATOR_KEY, operator_line

    line, fingerprint, new = operator_line(folder, name)
    answering("operator", json)(
        {"line": line, "fingerprint": fingerprint, "key": str(folder / OPERATOR_KEY), "new": new},
        f"{line}\n\nSend the line above to the server's administrator, and compare this by telephone:\n"
        f"fingerprint {fingerprint}\n{'Made' if new else 'Kept'} {folder / OPERATOR_KEY}; never send it.",
    )


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
fedtune node accept --config node.yaml          the audit log lost lines for good: note it, go on
fedtune node approve --config node.yaml         runs that wait for you, and what each would spend
fedtune node approve 7f3a01bc99d24e10a6c53b7700f1e2d4 --config node.yaml    asks, and lets it in once
fedtune node backup --config node.yaml -o FILE.zip      all that this site must not lose
fedtune node restore FILE.zip --config node.yaml        its books as they were in a backup""",
        "fedtune status DIR/server  for the operator: who has joined",
    ),
)
def node(
    config: Annotated[Path, option("The site's own file.", metavar="node.yaml")],
    step: Annotated[
        list[str] | None,
        argument(
            "[init | proof | accept | approve [RUN] | backup | restore FILE | NAME=VALUE]...",
            "As in the examples; NAME=VALUE: settings of a proposed run, with --dry-run.",
        ),
    ] = None,
    against: Annotated[
        str | None, option("With proof: a head that an earlier proof printed.", metavar="HEAD")
    ] = None,
    output: Annotated[
        Path | None, option("With backup: the file to write.", "-o", "--output", metavar="FILE.zip")
    ] = None,
    forget: Annotated[
        int | None,
        option("With restore: releases that the backup does not know, and may forget.", metavar="N"),
    ] = None,
    yes: Annotated[bool, option("With approve RUN: do not ask; for scripts.", "--yes")] = False,
    dry_run: Annotated[bool, option("Show what a run would do here; train nothing.", "--dry-run")] = False,
    monitor: Monitor = None,
    log_json: LogJson = False,
    json: Annotated[
        bool, option("Of init, proof, accept, backup, restore and --dry-run: as JSON.", "--json")
    ] = False,
) -> int:
    from fedtune.cli.site_steps import approve, back_up, try_run
    from fedtune.deploy import site as sites

    say = answering("node", json)
    words = list(step or ())
    needs_data = not words or words[0] not in ("init", "proof", "accept", "backup", "restore")
    site = sites.read_site(config, with_data=needs_data)
    if words == ["init"]:
        authority, sealed = sites.check_files(site, config.absolute().parent)
        line, fingerprint, new = sites.make_key(site)
        say(
            {"line": line, "fingerprint": fingerprint, "key": str(site.key), "authority": authority},
            f"{line}\n\nSend the line above to the federation's operator, and call them to compare these:\n"
            f"fingerprint {fingerprint}\nauthority   {authority} ({sealed})\n"
            f"{'Made' if new else 'Kept'} the private key {site.key}; never send it to anybody.",
        )
        return OK
    if words == ["proof"]:
        text, whole = sites.proof(site, against)
        say({"whole": whole, "text": text.splitlines()}, text)
        return OK if whole else FAILED
    if words == ["accept"]:
        text = sites.accept(site)
        say({"text": text.splitlines()}, text)
        return OK
    if words[:1] == ["approve"]:
        at_terminal = not json and sys.stdin.isatty()
        say(*approve(site, words[1:], yes=yes, ask=_ask_yes if at_terminal else None))
        return OK
    if words[:1] in (["backup"], ["restore"]):
        say(*back_up(site, config, words, output, forget))
        return OK
    if dry_run:
        done = try_run(site, words)
        found = {"permitted": not done.refusals, "refusals": list(done.refusals)}
        say({**found, "run": {name: str(value) for name, value in done.lines}}, done.text())
        return FAILED if done.refusals else OK
    if json:
        raise ConfigError("--json is for what ends: init, proof, accept, approve, backup, restore, dry runs.")
    if words:
        raise ConfigError(f"'fedtune node' has no use for {words[0]!r}. See 'fedtune node --help'.")
    from fedtune.deploy.node import run_node

    run_node(site, _log("node", log_json), monitor, log_json=log_json)
    return OK


def _ask_yes(text: str) -> bool:
    print(text)
    return typer.confirm("Approve this run, once?", default=False)


def _log(part: str, as_json: bool) -> Callable[[str], None]:
    """Sends the log of this process to stderr; what adds a line to it."""
    import logging

    from fedtune.monitoring.logs import log_to_stderr

    log_to_stderr(part, as_json=as_json)
    return logging.getLogger(f"fedtune.{part}").info
