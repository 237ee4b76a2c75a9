"""`fedtune provision`: from one federation file to a folder for the server and one archive for each site.

    DIR/authority/   ca.key, ca.crt        keep it offline: whoever has ca.key can pose as the server
    DIR/server/      ca.crt, server.crt, server.key, operator.token, server.yaml, nodes/, README.md
    DIR/sites/       SITE.zip              node.yaml, ca.crt, README.md: nothing in it is secret

A site's key is made at the site (`fedtune node init`) and its public half enrolled at the server, as a
file `nodes/SITE.pub` (`fedtune.deploy.enrolment`). Called again, `provision` keeps what there is
and makes what is missing (a new site's archive); with `renew` it makes a new server certificate. Each file
appears whole or not at all, secrets readable by their owner only; what is there and empty, torn or another's
is refused.
"""

from __future__ import annotations

import re
import secrets
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedtune.config.files import replace_whole
from fedtune.deploy import certificates
from fedtune.deploy.handout import server_readme, write_archive
from fedtune.errors import ConfigError, ResourceError

__all__ = [
    "Federation",
    "Provisioned",
    "parse_address",
    "provision",
    "read_token",
    "read_yaml",
]

_SITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
TOKEN = "operator.token"
_TOKEN_BYTES = 32
_TOKEN_LENGTH = 43  # characters that 32 bytes have in base64 without padding
_KEYS = {"name", "server", "sites", "certificate_names", "certificate_days"}


@dataclass(frozen=True)
class Federation:
    """What a federation file says. `server` is the address by which the sites reach the server."""

    name: str
    server: str
    sites: tuple[str, ...]
    certificate_names: tuple[str, ...] = ()  # further names and addresses of the server
    certificate_days: int = 397

    @classmethod
    def read(cls, path: Path) -> Federation:
        """Raises ConfigError, which names the key and what it should be."""
        values = read_yaml(path)
        if unknown := sorted(set(values) - _KEYS):
            raise ConfigError(
                f"{path} has unknown keys {', '.join(unknown)}; known are {', '.join(sorted(_KEYS))}."
            )
        name, server, sites = values.get("name"), values.get("server"), values.get("sites")
        if not isinstance(name, str) or not _SITE.fullmatch(name):
            raise ConfigError(f"{path}: name should be a word such as 'hospitals', not {name!r}.")
        if not isinstance(server, str):
            raise ConfigError(
                f"{path}: server should be HOST:PORT, such as 'fed.example.org:9443', not {server!r}."
            )
        parse_address(server)
        if not isinstance(sites, list) or not sites or not all(isinstance(site, str) for site in sites):
            raise ConfigError(
                f"{path}: sites should be a list of names, such as [clinic-1, clinic-2], not {sites!r}."
            )
        for site in sites:
            if not _SITE.fullmatch(site):
                raise ConfigError(
                    f"{path}: {site!r} is no name for a site; use letters, digits, '.', '_' and '-'."
                )
        if twice := sorted({site for site in sites if sites.count(site) > 1}):
            raise ConfigError(
                f"{path} lists {', '.join(twice)} twice; each site has one archive and one key."
            )
        names, days = values.get("certificate_names", []), values.get("certificate_days", 397)
        if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
            raise ConfigError(f"{path}: certificate_names should be a list of host names, not {names!r}.")
        if type(days) is not int or not 1 <= days <= 3650:
            raise ConfigError(f"{path}: certificate_days should be 1 to 3650, not {days!r}.")
        return cls(name, server, tuple(sites), tuple(names), days)


@dataclass(frozen=True)
class Provisioned:
    """What `provision` made, and what was there already."""

    folder: Path
    new: tuple[str, ...]
    kept: tuple[str, ...]


def provision(file: Path, folder: Path, *, renew: bool = False) -> Provisioned:
    """Makes what is missing below `folder` for the federation in `file`; see the module's docstring.

    Raises ConfigError for a file that is wrong, ResourceError if the folder cannot be written.
    """
    federation = Federation.read(file)
    authority, server, sites = folder / "authority", folder / "server", folder / "sites"
    new: list[str] = []
    kept: list[str] = []
    try:
        for one in (authority, server, server / "nodes", sites):
            one.mkdir(mode=0o700, parents=True, exist_ok=True)
        # One whose key was never written (a full disk) and whose certificate nobody was given is made again.
        given = (server / "ca.crt").exists() or any(sites.glob("*.zip"))
        if given or (authority / "ca.key").exists():
            certificates.check_authority(authority)
            kept.append("authority")
        else:
            certificates.make_authority(authority, federation.name)
            new.append("authority")
        replace_whole(server / "ca.crt", (authority / "ca.crt").read_bytes())
        if renew or not (server / "server.crt").exists():
            host = parse_address(federation.server)[0]
            names = dict.fromkeys([host, *federation.certificate_names, "localhost", "127.0.0.1"])
            certificates.make_server_certificate(authority, server, list(names), federation.certificate_days)
            new.append(f"server certificate for {', '.join(names)}, {federation.certificate_days} days")
        else:
            certificates.load_private_key(server / "server.key")
            kept.append("server certificate")
        if (server / TOKEN).exists():
            read_token(server)
        else:
            certificates.write_secret(server / TOKEN, secrets.token_urlsafe(_TOKEN_BYTES).encode() + b"\n")
        described = {"name": federation.name, "server": federation.server, "sites": list(federation.sites)}
        replace_whole(server / "server.yaml", yaml.safe_dump(described, sort_keys=False).encode())
        replace_whole(server / "README.md", server_readme(federation.name, federation.server).encode())
        for site in federation.sites:
            archive = sites / f"{site}.zip"
            if zipfile.is_zipfile(archive):  # one that is torn is made again: nothing in it is secret
                kept.append(f"archive of {site}")
                continue
            write_archive(
                archive, federation.name, federation.server, site, (authority / "ca.crt").read_text()
            )
            new.append(f"archive of {site}")
    except OSError as error:
        raise ResourceError(
            f"{error.filename or folder} cannot be written: {error.strerror}. Choose another folder with -o."
        ) from error
    return Provisioned(folder, tuple(new), tuple(kept))


def read_token(folder: Path) -> str:
    """The operator's token of a server folder. Raises ConfigError unless it is one that `provision` wrote."""
    path = folder / TOKEN
    missing = (
        f"There is no operator's token {path}. Name the server folder that `fedtune provision` made; if the "
        "token is lost, `fedtune provision FEDERATION.yaml -o DIR` makes another."
    )
    text = certificates.read_secret(path, missing).strip()
    if not re.fullmatch(rb"[A-Za-z0-9_-]{%d}" % _TOKEN_LENGTH, text):
        raise ConfigError(
            f"The operator's token {path} is torn or was changed: it has {len(text)} characters, and the one "
            f"that `fedtune provision` wrote has {_TOKEN_LENGTH} of A-Z, a-z, 0-9, _ and -. Nobody is let in "
            "by it. Remove it, make another with `fedtune provision FEDERATION.yaml -o DIR`, and start the "
            "server again."
        )
    return text.decode()


def parse_address(address: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"{address!r} is no address; give HOST:PORT, such as 'fed.example.org:9443'.")
    return host.strip("[]"), int(port)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError if there is none."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"There is no file {path}.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} should be a mapping of settings (key: value), and is none.")
    return values
