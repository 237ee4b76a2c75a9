"""The commands of a real federation: `fedtune provision | server | node | submit | status`.

Arguments here, the work in `fedtune.deploy`; everything heavy is imported by the command that
needs it, for `fedtune --help` reads this file too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.errors import ConfigError

if TYPE_CHECKING:
    from fedtune.config.launch import Job
    from fedtune.federation.client.policy import SiteSettings

__all__ = ["add_deployment_commands"]


def add_deployment_commands(commands: Any, formatter: type[argparse.HelpFormatter]) -> None:
    """Adds the commands to argparse's `commands`; each has `call(arguments, rest, debug) -> exit status`."""
    provision = commands.add_parser(
        "provision",
        help="certificates, keys and archives for a real federation",
        description="Makes from one federation file what a server and its sites need. Called again, it "
        "keeps what there is and makes what is missing.",
        epilog="example of a federation file:\n  name: hospitals\n  server: fed.example.org:9443\n"
        "  sites: [clinic-1, clinic-2, clinic-3]\n\nexamples:\n"
        "  fedtune provision federation.yaml -o DIR\n"
        "  fedtune provision federation.yaml -o DIR --renew      a new server certificate",
        formatter_class=formatter,
    )
    provision.add_argument("file", metavar="FEDERATION.yaml", type=Path)
    provision.add_argument("-o", "--output", metavar="DIR", type=Path, required=True)
    provision.add_argument("--renew", action="store_true", help="make a new server certificate")
    provision.set_defaults(call=_provision)

    server = commands.add_parser(
        "server",
        help="the server of a real federation, or let a site in or out",
        description="Starts Flower's SuperLink with TLS, node keys and a database, from the server folder "
        "that `fedtune provision` made. It relays, and runs nobody's code.",
        epilog="examples:\n  fedtune server DIR/server\n"
        "  fedtune server DIR/server --enrol 'ecdsa-sha2-nistp384 AAAA... clinic-1'\n"
        "  fedtune server DIR/server --revoke clinic-1",
        formatter_class=formatter,
    )
    server.add_argument("folder", metavar="DIR", type=Path)
    server.add_argument("--host", help="address of this machine to listen on (default: all of them)")
    server.add_argument(
        "--enrol", metavar="LINE", help="let a site in: what `fedtune node init` printed, or a file"
    )
    server.add_argument("--revoke", metavar="SITE", help="let the key of a site in no more, ever")
    server.add_argument(
        "--accept-restore", metavar="SITE", help="let in a site whose books were restored from a backup"
    )
    server.set_defaults(call=_server)

    node = commands.add_parser(
        "node",
        help="a site of a real federation: make its key, try a run, join",
        description="Joins a federation with this site's data. The site's own file decides what is "
        "permitted.",
        epilog="examples:\n  fedtune node init --config node.yaml           make the key, print what to "
        "send\n"
        "  fedtune node --config node.yaml --dry-run       what a run would do, and whether it is permitted\n"
        "  fedtune node --config node.yaml --dry-run privacy.epsilon=2 federation.num_rounds=20\n"
        "  fedtune node --config node.yaml                 join; Ctrl-C leaves\n"
        "  fedtune node proof --config node.yaml           what has left this site; are the books whole\n"
        "  fedtune node proof --config node.yaml --against HEAD    do they go on from a head that was kept\n"
        "  fedtune node accept --config node.yaml          the audit log lost lines for good: note it, go on",
        formatter_class=formatter,
    )
    node.add_argument(
        "words",
        metavar="init | proof | accept | NAME=VALUE",
        nargs="*",
        help="of a proposed run, with --dry-run",
    )
    node.add_argument("--config", metavar="node.yaml", type=Path, required=True)
    node.add_argument("--against", metavar="HEAD", help="with proof: a head that an earlier proof printed")
    node.add_argument("--dry-run", action="store_true", help="show what a run would do here; train nothing")
    node.set_defaults(call=_node)

    submit = commands.add_parser(
        "submit",
        help="run over the sites of a real federation",
        description="Starts a run at the server and shows it; record.json, adapter/ and statement.md are "
        "written here. Settings as of `fedtune run`; data.* describe what the server tests on, since each "
        "site has data of its own: a split that is declared public (data.test_split=test "
        "data.test_public=true). Without one the sites answer with noised counts about what they hold out. "
        "Exit status 0 only if the run succeeded.",
        epilog="examples:\n  fedtune submit DIR/server data=files data.name=visits data.labels=[no,yes]\n"
        "  fedtune submit DIR/server resume=RUN_DIR              go on after a crash",
        formatter_class=formatter,
    )
    submit.add_argument("folder", metavar="DIR", type=Path)
    submit.add_argument("words", metavar="NAME=VALUE", nargs="*")
    submit.set_defaults(call=_submit)

    status = commands.add_parser(
        "status",
        help="sites and runs of a real federation",
        description="Asks a running server for its sites, what they publish of their budgets, and its runs.",
        epilog="example:\n  fedtune status DIR/server",
        formatter_class=formatter,
    )
    status.add_argument("folder", metavar="DIR", type=Path)
    status.add_argument("--json", action="store_true", help="as JSON, for a program")
    status.set_defaults(call=_status)


def _provision(arguments: argparse.Namespace, rest: list[str], debug: bool) -> int:
    from fedtune.deploy.provision import provision

    done = provision(arguments.file, arguments.output, renew=arguments.renew)
    for one in done.new:
        print(f"made {one}")
    for one in done.kept:
        print(f"kept {one}")
    folder = done.folder
    print(
        f"\nserver: {folder / 'server'} (its README.md says how to start it)\n"
        f"sites:  send each its archive from {folder / 'sites'}; nothing in it is secret\n"
        f"keep {folder / 'authority'} offline: whoever has ca.key can pose as the server"
    )
    return 0


def _server(arguments: argparse.Namespace, rest: list[str], debug: bool) -> int:
    from fedtune.deploy import admission

    if arguments.enrol is not None:
        site, fingerprint = admission.enrol(arguments.folder, arguments.enrol)
        print(f"enrolled {site}; compare the fingerprint of its key with the site: {fingerprint}")
        return 0
    if arguments.revoke is not None:
        admission.revoke(arguments.folder, arguments.revoke)
        print(f"revoked {arguments.revoke}; a running server lets it in no more")
        return 0
    if arguments.accept_restore is not None:
        from fedtune.deploy.admission import BookHeads

        kept, restored = BookHeads(arguments.folder).accept(arguments.accept_restore)
        site = arguments.accept_restore
        print(f"accepted, and noted in heads.log: {site} goes on from {restored}, not from {kept}")
        return 0
    from fedtune.deploy.server import run_server

    run_server(arguments.folder, _say("server"), arguments.host)
    return 0


def _node(arguments: argparse.Namespace, rest: list[str], debug: bool) -> int:
    from fedtune.deploy.site import read_site

    words = [*arguments.words, *rest]
    site = read_site(arguments.config, with_data=words not in (["init"], ["proof"], ["accept"]))
    if words[:1] == ["init"] and len(words) == 1:
        from fedtune.deploy.site import make_key

        line, fingerprint = make_key(site)
        print(f"{line}\n\nSend the line above to the federation's operator, and compare this by telephone:")
        print(f"fingerprint {fingerprint}\nThe private key is {site.key}; never send it to anybody.")
        return 0
    if words == ["proof"]:
        from fedtune.deploy.site import proof

        text, whole = proof(site, arguments.against)
        print(text)
        return 0 if whole else 1
    if words == ["accept"]:
        from fedtune.deploy.site import accept

        print(accept(site))
        return 0
    if arguments.dry_run:
        return _dry_run(site, words)
    if words:
        raise ConfigError(f"'fedtune node' has no use for {words[0]!r}. See 'fedtune node --help'.")
    from fedtune.deploy.node import run_node

    run_node(site, _say("node"))
    return 0


def _dry_run(site: SiteSettings, overrides: list[str]) -> int:
    from fedtune.config.loader import load
    from fedtune.deploy.site import dry_run

    # What a run of this site's data asks by default, and not one of the data that `fedtune run` simulates.
    words = ["engine.name=deployment"]
    if not any(word.startswith("data=") for word in overrides):
        words.append(f"data={site.data.source}")
    if site.data.unit is not None and not any(word.startswith("data.unit=") for word in overrides):
        words.append("data.unit='" + site.data.unit.replace("'", "\\'") + "'")
    asked = load([*words, *overrides])
    if not any(word.startswith("data.name=") for word in overrides):
        asked.data.name = site.data.name
    done = dry_run(site, asked)
    print(done.text())
    return 1 if done.refusals else 0


def _submit(arguments: argparse.Namespace, rest: list[str], debug: bool) -> int:
    from fedtune.config.launch import launch

    if not (arguments.folder / "server.yaml").exists():
        raise ConfigError(
            f"{arguments.folder} is no server folder; name the one that `fedtune provision` made."
        )
    overrides = [*arguments.words, *rest]
    folder = str(arguments.folder.absolute())
    if not any(word.startswith("resume=") for word in overrides):
        overrides += ["engine.name=deployment", "engine.server='" + folder.replace("'", "\\'") + "'"]

    def task(job: Job) -> None:
        from fedtune.runs import run

        job.config.engine.name, job.config.engine.server = "deployment", folder
        run.run(job.config)

    def on_failure(job: Job | None, error: Exception) -> str:
        raise error

    launch(overrides, task, on_failure=on_failure)
    return 0


def _status(arguments: argparse.Namespace, rest: list[str], debug: bool) -> int:
    from fedtune.deploy.join import budget_text
    from fedtune.deploy.submit import status

    found = status(arguments.folder)
    if arguments.json:
        import dataclasses
        import json

        print(json.dumps(dataclasses.asdict(found), indent=2))
        return 0
    print(f"server {found.address}")
    for one in found.sites:
        print(
            f"site {one['site']:<20} {one['state']:<12} {one['since'][:19]:<20} {budget_text(one['budget'])}"
        )
    for one in found.runs:
        print(f"run {one['run']:<21} {one['state']:<12} {one['started']} {one['details']}".rstrip())
    return 0


def _say(who: str) -> Callable[[str], None]:
    def say(line: str) -> None:
        print(f"fedtune {who}: {line}", file=sys.stderr, flush=True)

    return say
