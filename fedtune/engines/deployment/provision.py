"""`fedtune provision`: from one federation file to a folder for the server and one archive for each site.

    DIR/authority/   ca.key, ca.crt        keep it offline: whoever has ca.key can pose as the server
    DIR/server/      ca.crt, server.crt, server.key, operator.token, server.yaml, nodes/, README.md
    DIR/sites/       SITE.zip              node.yaml, ca.crt, README.md: nothing in it is secret

A site's key is made at the site (`fedtune node init`) and its public half enrolled at the server, as a
file `nodes/SITE.pub`; removing that file revokes the node. Called again, `provision` keeps what there is
and makes what is missing (a new site's archive); with `renew` it makes a new server certificate.
"""

from __future__ import annotations

import re
import secrets
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedtune.engines.deployment import certificates
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
        (server / "README.md").write_text(
            _SERVER_README.format(name=federation.name, address=federation.server)
        )
        for site in federation.sites:
            archive = sites / f"{site}.zip"
            if archive.exists():
                kept.append(f"archive of {site}")
                continue
            _write_archive(archive, federation, site, (authority / "ca.crt").read_text())
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
    (server / "nodes" / f"{site}.pub").write_text(line.strip() + "\n")
    return site, certificates.fingerprint(key)


def revoke(server: Path, site: str) -> None:
    """Forgets the key of `site`; a running server lets it in no more. Raises ConfigError if it has none."""
    path = server / "nodes" / f"{site}.pub"
    if not path.exists():
        raise ConfigError(
            f"No key of {site!r} is enrolled; enrolled are {', '.join(enrolled(server)) or 'none'}."
        )
    path.unlink()


def enrolled(server: Path) -> dict[str, bytes]:
    """Public keys (PEM) of the enrolled sites, by name. Raises ConfigError for a file that is no key."""
    found: dict[str, bytes] = {}
    for path in sorted((server / "nodes").glob("*.pub")):
        try:
            found[path.stem] = certificates.read_public_line(path.read_text())[0]
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
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


def _write_archive(path: Path, federation: Federation, site: str, authority: str) -> None:
    fill = {"name": federation.name, "address": federation.server, "site": site}
    temporary = path.with_suffix(".zip.new")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in (
            ("node.yaml", _NODE_YAML.format(**fill)),
            ("ca.crt", authority),
            ("README.md", _SITE_README.format(**fill)),
        ):
            archive.writestr(f"{site}/{name}", text)
    temporary.replace(path)


_SERVER_README = """\
# The server of federation {name}

Nodes reach it at {address}, over TLS. It relays messages and keeps a database (`superlink.sqlite`); it runs
nobody's code. `server.key` and `operator.token` are secret: whoever has the token may submit runs.

    fedtune server DIR                       start, from this folder (DIR); Ctrl-C ends it
    fedtune server DIR --enrol 'LINE'        let a site in, by the line that its `fedtune node init` printed
    fedtune server DIR --revoke SITE         let it in no more, at once
    fedtune status DIR                       nodes and runs
    fedtune submit DIR data=files ...        start a run; settings as of `fedtune run`

Compare a key's fingerprint with its site by telephone before you enrol it.
The certificate expires: `fedtune provision FEDERATION.yaml -o DIR --renew` makes another, and a running
server takes it up. Server and sites warn from 30 days before.
"""

_NODE_YAML = """\
# Site {site} of federation {name}. This file is yours: what it does not permit, the server cannot have.
federation: {name}
site: {site}
server: {address}
ca: ca.crt # the only authority that this node trusts
key: node.key # made here by `fedtune node init`; never send it to anybody

data:
  source: files # files | opinions (a public data set, for a trial) | hub
  name: {name} # what the ledger calls your data; a run must name the same
  path: data.csv # a file, or a folder that holds train.csv (.tsv, .jsonl, .parquet)
  text: text # column of the texts
  label: label # column of the labels
  unit: null # column that names the person a record belongs to
  declared_size: 1000 # PUBLIC: about how many records (or persons) you have; need not be exact
  public: false # true: anybody may read this data, so nothing is refused or noised

budget: # over everything that this data is ever used for
  epsilon: 8.0
  delta: 1.0e-5
  unit: null # person: refuse runs that protect single records only

permit:
  trust: [local, distributed] # mechanisms: local | distributed | central | none
  models: ["embedded:minilm"]
  adapters: [lora, ffa_lora, bitfit, head]
  min_noise_multiplier: 0.3
  max_grad_norm: 10.0
  max_local_steps: 100
  max_rounds: 200
  max_sample_rate: 0.5
  max_evaluations: 10 # noised answers about held-out data that a run may ask; 0: none

ledger: state/ledger.sqlite # what this data has released, ever. Back it up
audit_log: state/audit.jsonl # what was asked, what left, what was refused; append-only

publish_budget: false # true: the operator sees how much epsilon is left here

limits:
  threads: 2 # processor cores
  memory_gb: null # more than this, and the worker is stopped
  message_seconds: 7200 # a worker that takes longer for one message is killed; its round stays charged
"""

_SITE_README = """\
# Joining federation {name} as {site}

You need: this folder on the machine that holds the data, Python 3.11 or later, and `pip install fedtune`.
The machine opens connections to {address} and accepts none.

1. `fedtune node init --config node.yaml` makes your key, `node.key`, and prints one line. Send that line to
   the federation's operator, and compare the fingerprint below it by telephone. Never send `node.key`.
2. Edit `node.yaml`: where your data is, what budget it has, what you permit.
3. `fedtune node --config node.yaml --dry-run 'data.labels=[no,yes]'`, with the settings that the operator
   proposes (the labels at least), shows what a run would do, and whether you permit it. It trains nothing and
   sends nothing.
4. `fedtune node --config node.yaml` joins. Ctrl-C leaves; start it again and you are the same node.

What leaves this machine: in each round one array of numbers (the change of the adapter, made private by noise
added here), and public numbers (site name, declared size, steps, seconds). No text, label, count or loss. A
run with `federation.evaluation=private` also gets two noised counts, if `permit.max_evaluations` allows it.
With `publish_budget: true`, also how much of your budget is left.
`state/audit.jsonl` says for each round what was asked, what left and what your data has spent;
`state/ledger.sqlite` is the proof. The node runs the fedtune that you installed, and refuses all other code.
"""
