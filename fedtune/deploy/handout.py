"""What `fedtune provision` hands out: a README for the server, and for each site an archive.

Nothing in an archive is secret. Its node.yaml is where a site's administrator begins.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

from fedtune.config.files import replace_whole

__all__ = ["server_readme", "write_archive"]


def server_readme(name: str, address: str) -> str:
    """For the operator of federation `name`, whose sites reach the server at `address`."""
    return _SERVER_README.format(name=name, address=address)


def write_archive(path: Path, name: str, address: str, site: str, authority: str) -> None:
    """Writes SITE.zip: node.yaml, README.md and ca.crt, whose content `authority` is. Raises OSError."""
    fill = {"name": name, "address": address, "site": site}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in (
            ("node.yaml", _NODE_YAML.format(**fill)),
            ("ca.crt", authority),
            ("README.md", _SITE_README.format(**fill)),
        ):
            archive.writestr(f"{site}/{name}", text)
    replace_whole(path, buffer.getvalue())


_SERVER_README = """\
# The server of federation {name}

Nodes reach it at {address}, over TLS. It relays messages and keeps a database (`superlink.sqlite`); it runs
nobody's code. `server.key` and `operator.token` are secret: whoever has the token may submit runs.

    fedtune server DIR                       start, from this folder (DIR); Ctrl-C ends it
    fedtune server DIR --enrol 'LINE'        let a site in, by the line that its `fedtune node init` printed
    fedtune server DIR --revoke SITE         let its key in no more, at once and for good
    fedtune server DIR --accept-restore SITE let in a site whose ledger and log were restored from a backup
    fedtune status DIR                       nodes and runs
    fedtune submit DIR data=files ...        start a run; settings as of `fedtune run`

Compare a key's fingerprint with its site by telephone before you enrol it. Only `--revoke` revokes: while a
file in `nodes/` is missing or broken, its site is not let in, and when it is back, the site is too.
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
  labels: ["no", "yes"] # PUBLIC: the classes, in the order that a run must name; null: it may name any
  declared_size: 1000 # PUBLIC: about how many records (or persons) you have; need not be exact
  public: false # true: anybody may read this data, so nothing is refused or noised

budget: # over everything that this data is ever used for
  epsilon: 8.0
  delta: 1.0e-5 # PUBLIC: a run whose delta is above it is refused, and one that sets none takes it
  unit: null # the least that a run must protect; null: person where data.unit names them. record: in words

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
  min_colluders: 1 # trust=distributed: nodes that may side with the server without your data losing its noise

# Back up the whole folder state/: ledger, what SQLite may keep beside it (-wal), budget file, audit log.
ledger: state/ledger.sqlite # what this data has released, ever
audit_log: state/audit.jsonl # what was asked, what left, what was refused; append-only

publish_budget: false # true: the operator sees how much epsilon is left here

limits:
  threads: 2 # processor cores
  memory_gb: null # more than this, and the worker is stopped
  message_seconds: 7200 # a worker that takes longer for one message is killed; its round stays charged
  idle_seconds: 900 # a worker without a message for so long ends, and frees its memory; null: it stays
"""

_SITE_README = """\
# Joining federation {name} as {site}

You need: this folder on the machine that holds the data, Python 3.11 or later, and `pip install fedtune`.
The machine opens connections to {address} and accepts none.

1. `fedtune node init --config node.yaml` makes your key, `node.key`, and prints one line. Send that line to
   the federation's operator, and compare the fingerprint below it by telephone. Never send `node.key`.
2. Edit `node.yaml`: where your data is, which labels it has, what budget, what you permit. With
   `labels: null` a run may name any, and a server that tries one set after another learns which occur.
3. `fedtune node --config node.yaml --dry-run 'data.labels=[no,yes]'`, with the settings that the operator
   proposes (the labels at least), shows what a run would do, and whether you permit it. It trains nothing and
   sends nothing.
4. `fedtune node --config node.yaml` joins. Ctrl-C leaves; start it again and you are the same node.

What leaves this machine: in each round one array of numbers (the change of the adapter, made private by noise
added here), and public numbers (site name, declared size, the budget's delta, steps, how many entries your
ledger and log have). No text, label, count or loss. A run with `federation.evaluation=private` also gets two
noised counts, if `permit.max_evaluations` allows it. With `publish_budget: true`, also how much of your
budget is left.
`state/audit.jsonl` says for each round what was asked, what left and what your data has spent;
`state/ledger.sqlite` is what the budget is counted by, and each names the other's last entry. The node runs
the fedtune that you installed, and refuses all other code.

Back up the whole folder `state/` after each run: the ledger with its secret and what SQLite may keep beside
it (`-wal`), its budget file, the audit log. A ledger restored from before a run does not know what that run
released. The log notices, and so does the server, which is told the head of both (two numbers, two hashes):
the node does not start. `fedtune node proof --config node.yaml` prints the head for you to file, and checks
one that you filed (`--against HEAD`).
"""
