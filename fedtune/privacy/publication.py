"""The one door through which everything passes that is published: each field public, charged, or local.

Noise protects what is released through it, and nothing else. A digest, a count, a duration or an error text
that was computed from private records and written beside the noised model tells of those records exactly. So
whatever leaves a node or a run (messages, record, checkpoint, what trackers get, history) is listed in
`SINKS`, field by field, with one line that says why it may leave:

    public    known without the data: settings, plans, names, sizes that an owner declared, counts of
              messages; or computed from such values and from charged ones alone
    charged   computed from private records by a mechanism that the ledger was charged for
    local     depends on private records and was not charged: it stays with the owner

`publish` splits values by these lists. On data that its owner has not declared public, a local field is blank
in what is published and goes into the second part, which `RUN_DIR/local.json` keeps (mode 0600). On data
declared public all fields pass. A field that is in no list passes never: it is left out, and
`report_undeclared` says so (the tests make that an error).

Texts of errors pass through `error_in_public`. The text itself is published only where the error says that it
is made of public values (`FedtuneError.public`); else its kind is, and the owner's own log has the rest.

Time itself cannot pass a door: when a message arrives is seen by whoever receives it. `EXPOSED` lists, for
the statement, what can be seen of private data although it is neither noised nor charged.

Pure: no torch, no Flower, no file.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fedtune.errors import FedtuneError

__all__ = [
    "EXPOSED",
    "SINKS",
    "Field",
    "charged",
    "error_in_public",
    "local",
    "merge",
    "one_line",
    "public",
    "publish",
]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Field:
    """How one field may leave.

    Attributes:
        kind: see the module.
        why: one line that says why it may leave, or may not.
        blank: what is published in a local field's place where the data is private.
    """

    kind: Literal["public", "charged", "local"]
    why: str
    blank: Any = None


def public(why: str) -> Field:
    """A field that is known without the data."""
    return Field("public", why)


def charged(why: str) -> Field:
    """A field that a charged mechanism released."""
    return Field("charged", why)


def local(why: str, blank: Any = None) -> Field:
    """A field that stays with the owner of private data; `blank` is published in its place."""
    return Field("local", why, blank)


Fields = Mapping[str, Field]

_SETTING = public("a setting, chosen before the data was read")
_NAME = public("a name: of a node, a run, a data set or a version")
_COUNT = public("a count of messages, rounds or releases")
_ENCODER = public("of the encoder's weights and tokenizer, which hold nothing of the data")
_BYTES = public("the size of what was sent, which whoever carries it sees")
_PLAN = public("of the plan, which is made from settings and declared sizes")
_EPSILON = public("computed from the plan and the number of releases")
_REASON = public("as `error_in_public` words it, or of the server's own about public values")
_QUALITY = charged(
    "on a public test split, or from noised counts that were charged; of a run without privacy, as it is"
)
_TIME = local("how long it took depends on what was drawn")
_USED = local("what it took of the machine depends on what was drawn")
_KEY = public("fresh randomness, or made of it alone")

_PLACE: Fields = {"version": _NAME, "run": _NAME, "round": _COUNT, "attempt": _COUNT}
_ANSWER: Fields = {
    **_PLACE,
    "node": _NAME,
    "refused": _REASON,
    "refusal": public("the kind of the error"),
    "error": _REASON,
}
_ROUND: Fields = {
    "round": _COUNT,
    "num_rounds": _SETTING,
    "seconds": local(_TIME.why, blank=0.0),
    "accuracy": _QUALITY,
    "accuracy_error": _QUALITY,
    "loss": _QUALITY,
    "epsilon": _EPSILON,
    "bytes_up": _BYTES,
    "bytes_down": _BYTES,
    "dropped": _REASON,
    "updates": _COUNT,
    "train_seconds": local(_TIME.why, blank=0.0),
    "void": public("whether enough nodes answered; not what was in their answers"),
}


def _below(prefix: str, fields: Fields) -> dict[str, Field]:
    return {f"{prefix}.{name}": field for name, field in fields.items()}


_RUN: Fields = {
    **dict.fromkeys(("id", "versions", "commit", "dirty", "engine"), _NAME),
    "started": public("when a person started it"),
    "seconds": _TIME,
    "seed": _SETTING,
    "hardware": public("the machine, not what it did"),
    "status": public("finished, or given up on a released accuracy"),
    "attempt": _COUNT,
}
_DATA: Fields = {
    **dict.fromkeys(("name", "source", "only_site"), _SETTING),
    "public": public("the owner's declaration"),
    "labels": public("the declared label set; else a caution says that it was taken from the records"),
    "labels_declared": public("whether the owner declared the label set"),
    "declared_sizes": public("declared by the owners, or a count that was noised and charged"),
    "test_records": public("of a public test split"),
    "notes": local("what was found while reading the records"),
    "public_start": public("of a file that was declared public; its accuracy as that of the run"),
}
_FEDERATION: Fields = {
    **dict.fromkeys(("nodes", "rounds", "cohort_size"), _COUNT),
    "node_names": _NAME,
    "recipe": public("how nodes train, in words: follows from the configuration"),
    "dropped": _REASON,
    "left_out": _REASON,
    "void_rounds": _ROUND["void"],
    "ended_early": _REASON,
    "notices": public("the server's own, about nodes, rounds and files of the run"),
    "unusable": local("what a raw update looked like, where the server is trusted with it"),
}
_PRIVACY: Fields = {
    **dict.fromkeys(
        (
            *("unit", "adjacency", "trust", "mechanism", "noise_multiplier", "max_grad_norm", "sample_rate"),
            *("local_steps", "matrix", "accountant", "delta", "target_epsilon", "records_per_unit"),
            *("head_norm", "head_share", "head_rounds", "centre_rounds"),
            *("reproducible_noise", "max_dropouts", "max_colluders", "adaptive_clipping", "evaluation_data"),
            "evaluation",
            "sizes",
        ),
        _PLAN,
    ),
    **dict.fromkeys(
        ("epsilon", "epsilon_rdp", "epsilon_towards_nodes", "epsilon_towards_server", "per_node"), _EPSILON
    ),
    "steps": _COUNT,
    "ledger": public("data set, releases and what they compose to, as the ledger has them"),
    "ledger.*.fingerprint": local("a digest of private text: whoever guesses a record could test it"),
    "data_public": public("the owner's declaration"),
    "cautions": public("of the plan and of the server; notes about records are not among them"),
    "audit": public("an attack on the mechanism with made-up gradients, or on public records"),
}
_METRICS: Fields = {
    **dict.fromkeys(("accuracy", "precision_macro", "recall_macro", "f1_macro", "loss"), _QUALITY),
    **dict.fromkeys(("per_site", "personal", "evaluation"), _QUALITY),
    "chance": public("one over the number of declared labels"),
    **dict.fromkeys(("majority_rate", "num_records"), public("of a public test split")),
    **_below("by_round.*", _ROUND),
    **dict.fromkeys(("by_round.*.seconds", "by_round.*.train_seconds"), _TIME),
}
_COST: Fields = {
    **dict.fromkeys(("seconds", "train_seconds"), _TIME),
    "flops": public("counted where the data is public, else expected from settings and published sizes"),
    **dict.fromkeys(("flops_counted", "peak_memory_bytes", "peak_device_bytes"), _USED),
    **dict.fromkeys(("energy_kwh", "energy", "carbon_kg"), _USED),
    "flops_source": public("whether flops were counted, or expected from the plan"),
    "peak_memory_note": public("what the peak covers"),
    **dict.fromkeys(("encoder_bytes", "adapter_bytes", "num_parameters"), _SETTING),
    **dict.fromkeys(("bytes_up", "bytes_down"), _BYTES),
    "money.currency": _SETTING,
    "money.network": public("bytes that were sent, times a price"),
    "money.data": public("declared sizes, times a price"),
    **dict.fromkeys(("money.compute", "money.energy", "money.total"), local("seconds, times a price")),
    "pricing": _SETTING,
}

_PUBLISHED = public("what a site's owner chose to publish of its budget")
_SERVER_METRICS: Fields = {
    **dict.fromkeys(("requests_total", "rounds_total", "updates_total"), _COUNT),
    **dict.fromkeys(("received_bytes_total", "sent_bytes_total"), _BYTES),
    "request_seconds_total": public("what the server itself took, which reads no data"),
    **dict.fromkeys(("sites", "site_connected"), public("names, and who is connected")),
    **dict.fromkeys(("site_epsilon_left", "site_epsilon_budget"), _PUBLISHED),
    "runs": _COUNT,
    **dict.fromkeys(("run_round", "run_rounds"), _COUNT),
    "run_accuracy": _QUALITY,
    "run_epsilon": _EPSILON,
    "certificate_days": _SETTING,
    "trail_lines": _COUNT,
}
_NODE_METRICS: Fields = {
    **dict.fromkeys(("joined", "worker_running"), public("whether it runs; not what it works on")),
    "answers_total": _COUNT,
    **dict.fromkeys(("received_bytes_total", "sent_bytes_total"), _BYTES),
    "answer_seconds_total": _TIME,
    **dict.fromkeys(("epsilon_left", "epsilon_budget"), _PUBLISHED),
}

SINKS: Mapping[str, Fields] = {
    # --- messages of a node ---
    "hello": {
        "version": _NAME,
        "node": _NAME,
        "software": _NAME,
        "declared_size": public("declared by the owner, or a count that was noised and charged"),
        "shards": public("how many the configuration makes"),
        "idle": public("whether the configuration has a shard for it"),
        "delta": public("of the owner's budget, which the owner sets without looking at the data"),
    },
    "join": {
        "budget": public("what is left of it: only where the owner chose that it be published"),
        "head": public("how many rows ledger and audit log have, and hashes of rows that hold no text"),
        "lost": public("that ledger or audit log do not go on from the head that the server keeps"),
        "trusts": public("fingerprints of the authorities that vouch for the server"),
    },
    "consent": {
        **{name: _ANSWER[name] for name in ("version", "run", "attempt", "node", "refused", "refusal")},
        "last_round": public("the last round of this run that the server asked for"),
    },
    "reply": {
        **_ANSWER,
        "releases": _COUNT,
        "steps": _PLAN,
        "seconds": local(_TIME.why, blank=0.0),
        "update": charged("by the plan: noised by itself, masked in a noised sum, or for a trusted server"),
    },
    "evaluation": {
        **_ANSWER,
        "answers": _COUNT,
        "right": charged("a noised count"),
        "wrong": charged("a noised count"),
    },
    # --- messages of the server, and of secure aggregation, in both directions ---
    "proposal": {"version": _NAME, "run": _NAME, "attempt": _COUNT, "plan": _PLAN, "encoder": _ENCODER},
    "request": {**_PLACE, "plan": _PLAN, "adapter": charged("made of updates that were released before")},
    "secagg": {
        **_PLACE,
        "phase": _NAME,
        "plan": _PLAN,
        "size": _PLAN,
        "names": public("who was asked, or has answered"),
        **dict.fromkeys(("sealing", "masking", "sealed", "seed_hashes", "key_hashes"), _KEY),
        **dict.fromkeys(("seed", "shares"), _KEY),
        "masked": charged("a noised share, masked, of a sum that the plan accounts for"),
    },
    # --- files of a run ---
    "record": {
        "schema": _NAME,
        **_below("run", _RUN),
        "config": _SETTING,
        **_below("data", _DATA),
        **_below("federation", _FEDERATION),
        **_below("privacy", _PRIVACY),
        **_below("metrics", _METRICS),
        **_below("cost", _COST),
        "artifacts": _NAME,
    },
    "checkpoint": {
        "config": _SETTING,
        "encoder": _ENCODER,
        "plan": _PLAN,
        "strategy": _SETTING,
        "attempt": _COUNT,
        "nodes": public("names and declared sizes"),
        **_below("history.*", _ROUND),
        "dropped": _REASON,
        "unusable": local(_FEDERATION["unusable"].why, blank=()),
        "releases": _COUNT,
        "answers": _COUNT,
        "trained": _NAME,
        "evaluation": _QUALITY,
        "exhausted": public("nodes that said that their releases are used up"),
        "seconds": local(_TIME.why, blank=0.0),
        "train_seconds": local(_TIME.why, blank=0.0),
        "flops": _USED,
        "notices": _FEDERATION["notices"],
        "ended_early": _REASON,
        "public_start": _DATA["public_start"],
    },
    "history": {
        "run": _NAME,
        "epsilon": _EPSILON,
        "delta": _PLAN,
        "releases": _COUNT,
        "ended_early": _REASON,
        "notices": _FEDERATION["notices"],
        **_below("rounds.*", _ROUND),
    },
    # A site's own part of the model: what of it a simulation puts into the run folder (its adapter).
    "personal": {
        "node": _NAME,
        "steps": _COUNT,
        "adapter": local("the site's own: made of its charged releases, and still nobody else's"),
    },
    "failure": {"error": _REASON, "overrides": _SETTING, "when": public("when it was noted")},
    # An exported model. Its check is of public texts, or of texts of which whoever exports publishes figures.
    "export": {
        **dict.fromkeys(("schema", "fedtune", "run", "labels", "inputs", "site"), _NAME),
        "made": public("the day on which it was exported"),
        **dict.fromkeys(("max_length", "window", "base", "pad_id", "pairs", "separator"), _SETTING),
        "formats": public("sizes of files, and figures of public texts"),
        "check": public("which public texts, how many, what was asked of them, and the processor"),
        "quality": public("of a public test split"),
    },
    # An exported model on private texts of an owner, who may hand this on.
    "private_evaluation": {
        **dict.fromkeys(("model", "format", "data"), _NAME),
        "privacy": _PLAN,
        **dict.fromkeys(("units", "accuracy", "precision_macro", "recall_macro", "f1_macro"), _QUALITY),
        **dict.fromkeys(
            ["per_class", "hidden", "confusion", "calibration_error", "calibration", "threshold", "per_site"],
            charged("of noised counts alone, all of one release"),
        ),
    },
    # A compressed model: made of the released one and of texts that are public or nobody's.
    "compression": {
        **dict.fromkeys(("schema", "fedtune", "run", "privacy"), _NAME),
        "made": public("the day on which it was compressed"),
        **dict.fromkeys(("base", "settings"), _SETTING),
        "texts": public("what it learnt from and was measured on, in words, and how many there were"),
        "processor": public("whose speeds these are"),
        **dict.fromkeys(("original", "steps", "formats"), public("sizes; speeds, figures of public texts")),
    },
    # --- what observers of a run get while it goes on ---
    "round": {**_ROUND, "delta": _PLAN},
    # --- what Prometheus is told, by the metric's name ---
    "server_metrics": {
        **{f"fedtune_server_{name}": field for name, field in _SERVER_METRICS.items()},
    },
    "node_metrics": {
        **{f"fedtune_node_{name}": field for name, field in _NODE_METRICS.items()},
    },
}

EXPOSED: tuple[str, ...] = (
    "Time: when messages arrive and how long a run takes is seen by whoever receives them or looks on, and "
    "the time that a node computes depends on what was drawn. No record of private data has measured times; "
    "the files of a tracker (tracker.name) keep the moment at which each round was reported.",
    "Failures: that a node refuses, fails or does not answer is seen, and the kind of the error is "
    "published; its words only where they are made of settings, plans and names.",
    "Ledger: whether a budget allows a run depends on which records were used before, so a refusal says "
    "that some were, and so does what a record says of other uses of the same data.",
    "Names: sites, and with them the number of nodes, are published as they stand: in a simulation those of "
    "the data's site column, else those of the federation's file.",
)


@dataclass
class _Branch:
    """A point of a sink's tree of names: its own field, and what is declared below it."""

    declared: Field | None = None
    below: dict[str, _Branch] = field(default_factory=dict)


@functools.cache
def _tree(sink: str) -> _Branch:
    root = _Branch()
    for path, declared in SINKS[sink].items():
        branch = root
        for name in path.split("."):
            branch = branch.below.setdefault(name, _Branch())
        branch.declared = declared
    return root


def publish(sink: str, values: Mapping[str, Any], *, public_data: bool) -> tuple[dict[str, Any], Any]:
    """Splits nested values into what may leave and what stays with the owner.

    Args:
        sink: through what they leave; a key of `SINKS`. A declaration there holds for everything below its
            name, unless a longer name says otherwise; `*` is any name or place in a list.
        values: what is to be published.
        public_data: whether the data's owner declared it public: then local fields leave too.

    Returns:
        What may leave, and what stays: of the same shape, with the local fields alone (empty with
        `public_data`). `merge` puts the two together again.

    Raises:
        KeyError: there is no such sink.
    """
    published, own = _part(sink, "", values, _tree(sink), None, public_data)
    return published, own or {}


def _part(
    sink: str, path: str, value: Any, branch: _Branch | None, inherited: Field | None, public_data: bool
) -> tuple[Any, Any]:
    """(published, local) of one value; local is None or empty where nothing is."""
    declared = inherited if branch is None or branch.declared is None else branch.declared
    if branch is not None and branch.below:
        if isinstance(value, Mapping):
            published, own = {}, {}
            for name, item in value.items():
                below = branch.below.get(name) or branch.below.get("*")
                if below is None and declared is None:
                    report_undeclared(sink, f"{path}.{name}".strip("."))
                    continue
                published[name], local_part = _part(
                    sink, f"{path}.{name}", item, below, declared, public_data
                )
                if local_part is not None:
                    own[name] = local_part
            return published, own or None
        if isinstance(value, (list, tuple)):
            parts = [
                _part(sink, f"{path}.*", item, branch.below.get("*"), declared, public_data) for item in value
            ]
            local_parts = [local_part for _, local_part in parts]
            has_local = any(local_part is not None for local_part in local_parts)
            return [item for item, _ in parts], local_parts if has_local else None
        if value is None:
            return None, None
    if declared is None:
        report_undeclared(sink, path.strip("."))
        return None, None
    if declared.kind == "local" and not public_data:
        return declared.blank, value
    return value, None


def merge(published: Any, own: Any) -> Any:
    """Both parts of `publish` in one again; where `own` has a value, it is the true one."""
    if own is None:
        return published
    if isinstance(published, Mapping) and isinstance(own, Mapping):
        names = [*published, *(name for name in own if name not in published)]
        return {name: merge(published.get(name), own.get(name)) for name in names}
    if isinstance(published, list) and isinstance(own, list) and len(published) == len(own):
        return [merge(item, local_part) for item, local_part in zip(published, own, strict=True)]
    return own


def report_undeclared(sink: str, path: str) -> None:
    """Logs that a field was left out because `SINKS` does not have it; a mistake in the program."""
    _log.error(
        "'%s' is not declared in fedtune.privacy.publication for '%s' and is left out of it.", path, sink
    )


def one_line(text: str, *, keep_blanks: bool = False) -> str:
    """`text`, which may quote what somebody else sent, as one line of printable characters.

    What a terminal would obey (escape sequences that remove or colour lines, marks that turn the direction
    of writing) is replaced, and so is half a surrogate pair, which a server's JSON can hold. Blanks become
    one each, unless columns are to stay where they are (`keep_blanks`).
    """
    line = text if keep_blanks else " ".join(text.split())
    return "".join(character if character.isprintable() else "?" for character in line)


def error_in_public(error: Exception, owner: str, *, permitted: bool = False) -> str:
    """What everybody but the data's owner may read of an error, in one line.

    fedtune's own text where it is made of public values; else the kind alone: a library's message may quote a
    text, and fedtune's own may count records.

    Args:
        error: what was raised.
        owner: whose data it was raised over.
        permitted: whether the owner declared the data public, so that every text of fedtune's own may leave.
    """
    kind = type(error).__name__
    if isinstance(error, FedtuneError) and (error.public or permitted):
        return one_line(f"{kind}: {error}")
    if isinstance(error, FedtuneError):
        return f"{kind}: node {owner!r} gives no answer, for {error.in_public}; its own log says more."
    return f"Node {owner!r} failed with {kind}; its own log says more."
