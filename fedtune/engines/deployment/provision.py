"""`fedtune provision`: from one federation file to a folder for the server and one archive for each site.

    DIR/authority/   ca.key, ca.crt        keep it offline: whoever has ca.key can pose as the server
    DIR/server/      ca.crt, server.crt, server.key, operator.token, server.yaml, nodes/, README.md
    DIR/sites/       SITE.zip              node.yaml, ca.crt, README.md: nothing in it is secret

A site's key is made at the site (`fedtune node init`) and its public half enrolled at the server, as a
file `nodes/SITE.pub`; removing that file revokes the node. Called again, `provision` keeps what there is
and makes what is missing (a new site's archive); with `renew` it makes a new server certificate.
"""

from __future__ import annotations

import os
import re
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedtune.engines.deployment import certificates
from fedtune.engines.deployment.handout import server_readme, write_archive
from fedtune.errors import ConfigError, ResourceError

__all__ = [
    "Federation",
    "Provisioned",
    "enrol",
    "enrolled",
    "parse_address",
    "provision",
    "read_yaml",
    "revoke",
]

_SITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
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
        if (authority / "ca.key").exists():
            kept.append("authority")
        else:
            certificates.make_authority(authority, federation.name)
            new.append("authority")
        (server / "ca.crt").write_bytes((authority / "ca.crt").read_bytes())
        if renew or not (server / "server.crt").exists():
            host = parse_address(federation.server)[0]
            names = dict.fromkeys([host, *federation.certificate_names, "localhost", "127.0.0.1"])
            certificates.make_server_certificate(authority, server, list(names), federation.certificate_days)
            new.append(f"server certificate for {', '.join(names)}, {federation.certificate_days} days")
        else:
            kept.append("server certificate")
        if not (server / "operator.token").exists():
            certificates.write_secret(server / "operator.token", secrets.token_urlsafe(32).encode() + b"\n")
        described = {"name": federation.name, "server": federation.server, "sites": list(federation.sites)}
        (server / "server.yaml").write_text(yaml.safe_dump(described, sort_keys=False))
        (server / "README.md").write_text(server_readme(federation.name, federation.server))
        for site in federation.sites:
            archive = sites / f"{site}.zip"
            if archive.exists():
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


def enrol(server: Path, line: str) -> tuple[str, str]:
    """Enrols the public key in `line` (or in the file that `line` names): (site, fingerprint of the key).

    Raises ConfigError for an unknown site, a key that another site uses, or a line that is none.
    """
    if "\n" not in line.strip() and len(line) < 1000 and " " not in line.strip() and Path(line).is_file():
        line = Path(line).read_text()
    key, site = certificates.read_public_line(line)
    known = read_yaml(server / "server.yaml").get("sites", [])
    if site not in known:
        raise ConfigError(
            f"The key is for site {site!r}, and the federation's sites are {', '.join(known)}. Add it to the "
            "federation file and run `fedtune provision` again."
        )
    for other, used in enrolled(server).items():
        if used == key and other != site:
            raise ConfigError(
                f"The key of {site!r} is the key of {other!r} already. Each site makes its own with "
                f"`fedtune node "
                "init`; a private key must not be copied."
            )
    _replace(server / "nodes" / f"{site}.pub", line.strip() + "\n")
    return site, certificates.fingerprint(key)


def _replace(path: Path, text: str) -> None:
    """In one step, so that a running server or a crash finds the whole of it or what was there before."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".enrol")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fchmod(file.fileno(), 0o644)  # nothing secret; the server may be another user than who enrols
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def revoke(server: Path, site: str) -> None:
    """Forgets the key of `site`; a running server lets it in no more. Raises ConfigError if it has none."""
    path = server / "nodes" / f"{site}.pub"
    if not path.exists():
        raise ConfigError(
            f"No key of {site!r} is enrolled; enrolled are {', '.join(enrolled(server)) or 'none'}."
        )
    path.unlink()


def enrolled(server: Path, unreadable: dict[str, str] | None = None) -> dict[str, bytes]:
    """Public keys (PEM) of the enrolled sites, by name.

    A file that is no key is passed over, so that it keeps no other site from being let in or revoked;
    `unreadable` is given what is wrong with it, and the way out, by the site's name.
    """
    found: dict[str, bytes] = {}
    for path in sorted((server / "nodes").glob("*.pub")):
        try:
            found[path.stem] = certificates.read_public_line(path.read_text())[0]
        except FileNotFoundError:
            continue  # revoked since the folder was listed
        except (ConfigError, OSError, UnicodeDecodeError) as error:
            if unreadable is not None:
                unreadable[path.stem] = (
                    f"{path} cannot be used: {error} Enrol {path.stem} again (`fedtune server DIR --enrol "
                    f"'LINE'`), or revoke it (`fedtune server DIR --revoke {path.stem}`)."
                )
    return found


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
