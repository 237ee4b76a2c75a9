"""The commands of a real federation: `fedtune provision | server | node | submit | status`.

Arguments here, the work in `fedtune.engines.deployment`; everything heavy is imported by the command that
needs it, for `fedtune --help` reads this file too.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

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


def _provision(arguments: argparse.Namespace, rest: list[str], debug: bool) -> int:
    from fedtune.engines.deployment.provision import provision

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
