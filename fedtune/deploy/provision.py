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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import yaml

from fedtune.config.convert import build, read_yaml
from fedtune.config.files import replace_whole
from fedtune.config.schema import Before, Group, as_tuple
from fedtune.deploy import certificates
from fedtune.deploy.handout import server_readme, write_archive
from fedtune.errors import ConfigError, ResourceError

__all__ = [
    "Federation",
    "Provisioned",
    "parse_address",
    "provision",
    "read_token",
]

_SITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
TOKEN = "operator.token"
_TOKEN_BYTES = 32
_TOKEN_LENGTH = 43  # characters that 32 bytes have in base64 without padding


def _word(value: object) -> object:
    if not isinstance(value, str) or not _SITE.fullmatch(value):
        raise ValueError("a word such as 'hospitals' or 'clinic-1': letters, digits, '.', '_' and '-'")
    return value


def _sites(value: object) -> object:
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError("a list of names such as [clinic-1, clinic-2]")
    if twice := sorted({str(site) for site in value if value.count(site) > 1}):
        raise ValueError(
            f"a list with each site once (one archive, one key), and {', '.join(twice)} is there twice"
        )
    return tuple(value)


def _address(value: object) -> object:
    parse_address(str(value))
    return value


Word = Annotated[str, Before(_word)]


@dataclass(frozen=True)
class Federation(Group):
    """What a federation file, or a server folder's `server.yaml`, says.

    Attributes:
        name: of the federation.
        server: the address by which the sites reach the server, HOST:PORT.
        sites: their names.
        certificate_names: further names and addresses of the server.
        certificate_days: how long its certificate is good for.
    """

    name: Word
    server: Annotated[str, Before(_address)]
    sites: Annotated[tuple[Word, ...], Before(_sites)]
    certificate_names: Annotated[tuple[str, ...], Before(as_tuple)] = ()
    certificate_days: int = field(default=397, metadata={"ge": 1, "le": 3650})

    @classmethod
    def read(cls, path: Path) -> Federation:
        """Raises ConfigError, which names the key and what it should be."""
        return build(cls, read_yaml(path), str(path))


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
