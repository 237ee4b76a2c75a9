"""`fedtune provision`: from one federation file to a folder for the server and one archive for each site.

    DIR/authority/   ca.key, ca.crt        keep it offline: whoever has ca.key can pose as the server
    DIR/server/      ca.crt, server.crt, server.key, operator.token, server.yaml, nodes/, README.md
    DIR/sites/       SITE.zip              node.yaml, ca.crt, README.md, signed: nothing in it is secret
    DIR/operator.zip                       server.yaml, ca.crt: for each operator, who makes their own key

A site's key is made at the site (`fedtune node init`) and its public half enrolled at the server, as a
file `nodes/SITE.pub` (`fedtune.deploy.admission`). Called again, `provision` keeps what there is
and makes what is missing (a new site's archive); with `renew` it makes a new server certificate, with
`rotate` it takes a step to a new authority (`fedtune.deploy.rotation`). Each file appears whole or not at
all, secrets readable by their owner only; what is there and empty, torn or another's is refused.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import yaml

from fedtune import __version__
from fedtune.config.convert import build, read_yaml
from fedtune.config.files import replace_whole
from fedtune.config.schema import Before, Group, as_tuple
from fedtune.deploy import certificates, rotation
from fedtune.deploy.archives import holds, write_archive
from fedtune.deploy.authorities import authority_fingerprint
from fedtune.deploy.certificates import parse_address
from fedtune.errors import ConfigError, ResourceError

__all__ = [
    "Federation",
    "Provisioned",
    "check_word",
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


def check_word(name: str) -> str:
    """`name`, if it can name a site or an operator. Raises ConfigError."""
    try:
        return str(_word(name))
    except ValueError as error:
        raise ConfigError(f"{name[:80]!r} is no name; it should be {error}.") from error


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
        max_runs: runs that go on at once; later ones wait.
    """

    name: Word
    server: Annotated[str, Before(_address)]
    sites: Annotated[tuple[Word, ...], Before(_sites)]
    certificate_names: Annotated[tuple[str, ...], Before(as_tuple)] = ()
    certificate_days: int = field(default=397, metadata={"ge": 1, "le": 3650})
    max_runs: int = field(default=2, metadata={"ge": 1, "le": 100})

    @classmethod
    def read(cls, path: Path) -> Federation:
        """Raises ConfigError, which names the key and what it should be."""
        return build(cls, read_yaml(path), str(path))


@dataclass(frozen=True)
class Provisioned:
    """What `provision` made, and what was there already. `authority`: the fingerprint of the newest."""

    folder: Path
    new: tuple[str, ...]
    kept: tuple[str, ...]
    authority: str


def provision(
    file: Path, folder: Path, *, renew: bool = False, rotate: str | None = None, without: Sequence[str] = ()
) -> Provisioned:
    """Makes what is missing below `folder` for the federation in `file`; see the module's docstring.

    Args:
        file: the federation file.
        folder: where to write.
        renew: make a new server certificate.
        rotate: the step to take to a new authority, one of `rotation.STEPS`.
        without: sites that such a step may leave behind.

    Raises:
        ConfigError: the file is wrong, or it is not the turn of this step.
        ResourceError: the folder cannot be written.
    """
    federation = Federation.read(file)
    authority, server, sites = folder / "authority", folder / "server", folder / "sites"
    new: list[str] = []
    kept: list[str] = []
    try:
        for needed in (authority, server, server / "nodes", sites):
            needed.mkdir(mode=0o700, parents=True, exist_ok=True)
        held = rotation.Held.read(authority)
        # One whose key was never written (a full disk) and whose certificate nobody was given is made again.
        given = (server / "ca.crt").exists() or any(sites.glob("*.zip"))
        if given or (held.newest / "ca.key").exists():
            for number in held.trusted:
                certificates.check_authority(held.place(number))
            kept.append("authority")
        else:
            certificates.make_authority(authority, federation.name)
            new.append("authority")
        if rotate is not None:
            held = rotation.advance(held, rotate, federation.name, server, without)
            new.append(f"step to a new authority: {rotate}")
        certificate = b"".join(held.certificates())
        replace_whole(server / "ca.crt", certificate)
        mine = server / "server.crt"
        foreign = held.notices > 0 and not certificates.is_issued_by(mine, held.signing / "ca.crt")
        if renew or foreign or not mine.exists():
            host = parse_address(federation.server)[0]
            names = dict.fromkeys([host, *federation.certificate_names, "localhost", "127.0.0.1"])
            certificates.make_server_certificate(
                held.signing, server, list(names), federation.certificate_days
            )
            new.append(f"server certificate for {', '.join(names)}, {federation.certificate_days} days")
        else:
            certificates.load_private_key(server / "server.key")
            kept.append("server certificate")
        if rotation.put_notice(held, federation.name, server):
            new.append(f"notice {held.notices} to the sites, which the server tells them")
        if (server / TOKEN).exists():
            read_token(server)
        else:
            certificates.write_secret(server / TOKEN, secrets.token_urlsafe(_TOKEN_BYTES).encode() + b"\n")
        described = {
            "name": federation.name,
            "server": federation.server,
            "sites": list(federation.sites),
            "max_runs": federation.max_runs,
        }
        replace_whole(server / "server.yaml", yaml.safe_dump(described, sort_keys=False).encode())
        readme = _SERVER_README.format(name=federation.name, address=federation.server, version=__version__)
        replace_whole(server / "README.md", readme.encode())
        for site in federation.sites:
            archive = sites / f"{site}.zip"
            if holds(archive, certificate):  # one that is torn is made again: nothing in it is secret
                kept.append(f"archive of {site}")
                continue
            fill = {"name": federation.name, "address": federation.server, "site": site}
            fill["version"] = __version__
            files = {"node.yaml": _NODE_YAML.format(**fill), "README.md": _SITE_README.format(**fill)}
            content = {name: text.encode() for name, text in files.items()}
            write_archive(archive, site, {**content, "ca.crt": certificate}, held.newest)
            new.append(f"archive of {site}")
        described_files = {"server.yaml": (server / "server.yaml").read_bytes(), "ca.crt": certificate}
        write_archive(folder / "operator.zip", federation.name, described_files, held.newest)
    except OSError as error:
        raise ResourceError(
            f"{error.filename or folder} cannot be written: {error.strerror}. Choose another folder with -o."
        ) from error
    return Provisioned(folder, tuple(new), tuple(kept), authority_fingerprint(held.newest / "ca.crt"))


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


# --- what is handed out: a README for the server, and for each site an archive with nothing secret in it


_SERVER_README = """\
# The server of federation {name}

Nodes reach it at {address}, over TLS. It relays messages and keeps a database (`superlink.sqlite`); it runs
nobody's code. `server.key` and `operator.token` are secret: whoever has the token may submit runs.

    fedtune server DIR                       start, from this folder (DIR); Ctrl-C ends it
    fedtune server DIR --enrol 'LINE'        let a site in, by the line that its `fedtune node init` printed
    fedtune server DIR --revoke SITE         let its key in no more, at once and for good
    fedtune server DIR --operator 'LINE' --rights submit,read
                                             let an operator in, by the line that `fedtune operator` printed
    fedtune server DIR --revoke-operator NAME
    fedtune server DIR --trail               who did what: enrolments, runs, joins, refusals (trail.jsonl)
    fedtune server DIR --accept-restore SITE let in a site whose ledger and log were restored from a backup
    fedtune status DIR                       nodes and runs
    fedtune submit DIR data=files ...        start a run; settings as of `fedtune run`
    fedtune stop DIR RUN                     end it after its round, with a result

Send each site its archive and the wheel of the fedtune that runs here, `fedtune-{version}-py3-none-any.whl`,
and tell it by telephone what `sha256sum` says of that file. `pip wheel --no-deps -w dist .` makes it.

You are asked for a key's fingerprint before its owner is let in: have it read to you by telephone. Only
`--revoke` revokes: while a file in `nodes/` is missing or broken, its site is not let in, and when it is
back, the site is too.
The certificate expires: `fedtune provision FEDERATION.yaml -o DIR --renew` makes another, and a running
server takes it up. Server and sites warn from 30 days before. Another authority takes the place of this one
in three steps, in which no site is locked out: `--rotate announce`, `--rotate switch`, `--rotate retire`.
"""

_NODE_YAML = """\
# Site {site} of federation {name}. This file is yours:
# what it does not permit, the server cannot have.
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
  labels: ["no", "yes"] # PUBLIC: the classes, in the order that a run must name; null: it may name any
  declared_size: 1000 # PUBLIC: about how many records (or persons) you have; need not be exact
  public: false # true: anybody may read this data, so nothing is refused or noised

budget: # over everything that this data is ever used for
  epsilon: 8.0
  delta: 1.0e-5 # PUBLIC: a run whose delta is above it is refused, and one that sets none takes it
  unit: null # the least that a run must protect; null: person where data.unit names them. record: in words

permit:
  trust: [local, distributed] # mechanisms: local | distributed | central | none
  models: ["embedded:minilm"] # as NAME, or NAME@REVISION for a revision of a hub's model
  pickle: false # true: a model's weights may come as a pickle, which is read by a reader that runs none of it
  adapters: [lora, ffa_lora, bitfit, head]
  max_rank: 64 # of the two matrices of lora and ffa_lora
  max_length: 512 # tokens that texts are cut to
  max_micro_batch_tokens: 16384 # computed at once: memory grows with it
  max_epsilon: null # of one run; null: what is left of the budget
  min_noise_multiplier: 0.3
  max_grad_norm: 10.0
  max_local_steps: 100
  max_rounds: 200
  max_sample_rate: 1.0
  max_evaluations: 10 # noised answers about held-out data that a run may ask; 0: none
  min_colluders: 1 # trust=distributed: nodes that may side with the server without your data losing its noise

# Back up the whole folder state/: ledger, what SQLite may keep beside it (-wal), budget file, audit log.
ledger: state/ledger.sqlite # what this data has released, ever
audit_log: state/audit.jsonl # what was asked, what left, what was refused; append-only

publish_budget: false # true: the operator sees how much epsilon is left here
submitters: [] # operators whose runs you take, by the lines that they give you; []: any the server lets in
approval: false # true: each run waits until you approve it: fedtune node approve --config node.yaml

limits:
  threads: 2 # processor cores
  memory_gb: 8 # of the worker, which fails at a message that needs more; null: any
  message_seconds: 7200 # a worker that takes longer for one message is killed; its round stays charged
  idle_seconds: 900 # a worker without a message for so long ends, and frees its memory; null: it stays
  stop_seconds: 60 # told to leave (SIGTERM, Ctrl-C), the node finishes its message, so long at most
"""

_SITE_README = """\
# Joining federation {name} as {site}

You need: this folder on the machine that holds the data, which runs Linux, with Python 3.11 or later; and
the file `fedtune-{version}-py3-none-any.whl` from the federation's operator. Install that file, and no
package of this name from a public index, which may be anybody's:

    sha256sum fedtune-{version}-py3-none-any.whl    # compare this by telephone, too
    python3 -m venv fedtune-env && fedtune-env/bin/pip install ./fedtune-{version}-py3-none-any.whl

`fedtune` below is `fedtune-env/bin/fedtune`. The machine opens connections to {address} and accepts none.

1. `fedtune node init --config node.yaml` checks that these files are as the federation's authority signed
   them, and prints its fingerprint: call the operator, and compare it. Then it makes your key, `node.key`,
   and prints one line. Send that line to the operator, and read out its fingerprint on the same call. Never
   send `node.key`.
2. Edit `node.yaml`: where your data is, which labels it has, what budget, what you permit. With
   `labels: null` a run may name any, and a server that tries one set after another learns which occur.
3. `fedtune node --config node.yaml --dry-run 'data.labels=[no,yes]'`, with the settings that the operator
   proposes (the labels at least), shows what a run would do, and whether you permit it. It trains nothing and
   sends nothing.
4. `fedtune node --config node.yaml` joins. Ctrl-C or SIGTERM leaves: the message that is being answered is
   finished and sent, within `limits.stop_seconds` and a minute; one that was not begun is given back,
   uncharged. Start it again and you are the same node.

What leaves this machine: in each round one array of numbers (the change of the adapter, made private by noise
added here), and public numbers (site name, declared size, the budget's delta, steps, how many entries your
ledger and log have). No text, label, count or loss. A run with `federation.evaluation=private` also gets two
noised counts, if `permit.max_evaluations` allows it. With `publish_budget: true`, also how much of your
budget is left.
`state/audit.jsonl` says for each round what was asked, what left and what your data has spent;
`state/ledger.sqlite` is what the budget is counted by, and each names the other's last entry. The node runs
the fedtune that you installed, and refuses all other code. When `audit.jsonl` is large it is set aside as
`audit.jsonl.FIRST-LAST`; log rotation of the machine's own may rename it too, and compress it (`.gz`). Keep
every part of it in `state/`: they are read as one, and a part that is deleted is missed.

Back up the whole folder `state/` after each run: the ledger with its secret and what SQLite may keep beside
it (`-wal`), its budget file, the audit log. A ledger restored from before a run does not know what that run
released. The log notices, and so does the server, which is told the head of both (two numbers, two hashes):
the node does not start. `fedtune node proof --config node.yaml` prints the head for you to file, and checks
one that you filed (`--against HEAD`).
"""
