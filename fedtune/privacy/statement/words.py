"""The sentences of a privacy statement: what each setting means for a person in the data.

Apart from `statement` so that a privacy officer can review the words without reading the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from fedtune.privacy.accounting.strength import WRONG, TradeOff, grade, percent
from fedtune.privacy.mechanisms.registry import mechanism_of
from fedtune.privacy.publication import EXPOSED
from fedtune.privacy.statement.markdown import coded

__all__ = [
    "UNITS",
    "UNITS_OF",
    "covered",
    "few",
    "finer_units",
    "left_out",
    "meaning_of",
    "not_covered",
    "outline",
    "strength",
    "strength_table",
    "was_trained",
]

_SHOWN_LABELS = 20
UNITS = {
    "record": "one text with its label",
    "person": "all records that share one value of the data's unit column (a person, an author, a review)",
    "client": "everything that one node holds",
}
UNITS_OF = {"record": "texts", "person": "persons", "client": "nodes"}  # in the plural, in few words


def _of_pairs(record: Mapping[str, Any]) -> bool:
    return bool(((record.get("config") or {}).get("data") or {}).get("text_pair"))


def meaning_of(record: Mapping[str, Any], unit: str) -> str:
    """What one `unit` of a run's data is."""
    return "one pair of texts with its label" if unit == "record" and _of_pairs(record) else UNITS[unit]


def outline(
    record: Mapping[str, Any], epsilon: float | None, delta: float | None, curve: TradeOff | None
) -> str:
    """The first paragraph: no symbol that is not explained on the spot."""
    privacy, federation = record["privacy"], record["federation"]
    absent = left_out(record) if was_trained(privacy) else {}
    nodes = federation["nodes"] - sum(name in absent for name in federation.get("node_names") or ())
    name = (record.get("data") or {}).get("name")
    kind = "texts that their owner declared public" if privacy.get("data_public") else "private texts"
    what = f"{kind} ({coded(name)})" if name else kind
    holders = "one node holds" if nodes == 1 else f"{nodes} nodes hold"
    trained = f"A text classifier was trained on {what} that {holders}"
    if start := _public_start(record):
        trained += f" (after {start['texts']:,} public texts, which nothing protects)"
    if absent:
        trained += f" (and without {few([coded(one) for one in absent])}, which took no part)"
    if not was_trained(privacy):
        return (
            f"**Nothing was trained.** No node released anything (each refused, or none answered): the "
            f"{what} that {holders} were not used, and the model is as it was before. There is nothing whose "
            "protection could be called strong or weak."
        )
    if epsilon is None or delta is None:
        return (
            f"{trained}, **without any privacy guarantee**. No noise was added: from what left the nodes, "
            "and from the model itself, texts of the people in the data may be recovered. Treat the model as "
            "you treat the data."
        )
    whom = {
        "record": "any single pair of texts" if _of_pairs(record) else "any single text",
        "person": "what any one person contributed",
        "client": "what any one node holds",
    }[privacy["unit"]]
    audit = privacy.get("audit")
    if isinstance(audit, Mapping) and audit.get("violated"):
        return (
            f"{trained}. It was meant to keep epsilon {epsilon:.3g} at delta {delta:.3g}, and **an audit has "
            "shown that it does not** (see Audit): nothing is promised to the people in the data. Do not "
            "publish the model."
        )
    if privacy.get("reproducible_noise"):
        return (
            f"{trained}, in a simulation that **protects nobody**: its noise was drawn from the seed that "
            f"its record names, and whoever has that can take it off. The same run with secret noise would "
            f"keep epsilon {epsilon:.3g} at delta {delta:.3g} (what that means is said in its own statement)."
        )
    times = _times(epsilon)
    guess = 1.0 / (1.0 + math.exp(-epsilon))
    model = mechanism_of(privacy["trust"])
    seen = model.attacker_sees(privacy)
    return (
        f"{trained}. It was trained so that it hardly depends on {whom}: with it or without it, every "
        f"outcome is {times} as likely (that is what *epsilon* {epsilon:.3g} says), except for "
        f"a chance of {_odds(delta)} (*delta*). In other words: an attacker who knows everything else, sees "
        f"{seen}, and at first finds it equally likely that {whom} was used or not, ends up at most "
        f"{percent(guess)} sure. "
        + strength(privacy, curve)
        + model.epsilon_of_others(privacy)
        + _in_all(privacy, epsilon)
    )


def _in_all(privacy: Mapping[str, Any], epsilon: float) -> str:
    """What a reader who stops after the first paragraph must know: how else the data was used."""
    entries = privacy.get("ledger") or []
    used = [one for one in entries if one.get("releases")]
    if any(one["epsilon"] is None for one in used):
        return (
            " **The same data was also used without secret noise** (see Other uses): over all its uses there "
            "is no guarantee."
        )
    largest = max(used, key=lambda one: float(one["epsilon"]), default=None)
    total, delta = (float(largest["epsilon"]), largest.get("delta")) if largest else (0.0, None)
    at = "" if delta is None else f" at delta {delta:.3g}"
    unknown = (
        " **What else the same data was used for is not known here**: in all, epsilon may be larger."
        if any(one.get("releases") is None for one in entries)
        else ""
    )
    if finer := finer_units(privacy):
        return (
            f" **Other runs on the same data protected single {finer[0]}s only.** Over all uses that are "
            f"known epsilon is {total:.3g}{at} for one {finer[0]}; for one {privacy['unit']} they promised "
            f"nothing, and what is said here is this run's alone.{unknown}"
        )
    if total <= 1.005 * epsilon:
        return unknown
    return (
        f" **Together with all other uses of the same data that are known, epsilon is {total:.3g}{at}.**"
        f"{unknown}"
    )


def finer_units(privacy: Mapping[str, Any]) -> list[str]:
    """Units finer than the run's that other runs on its data protected; the total over all uses is theirs."""
    order = list(UNITS)
    found = {one.get("unit") for one in privacy.get("ledger") or []}
    return [unit for unit in order[: order.index(privacy["unit"])] if unit in found]


def covered(record: Mapping[str, Any], epsilon: float | None) -> list[str]:
    """Which accesses to private data are inside epsilon."""
    if epsilon is None:
        return ["Nothing: there is no guarantee."]
    unit = record["privacy"]["unit"]
    norm = "" if record["privacy"].get("adaptive_clipping") else "clipping norm, "
    lines = [
        "Training: every step of every round, including rounds that failed, were repeated after a crash, or "
        "whose result was thrown away.",
        "What is published: all adapters of all rounds, not only the last, so checkpoints and averages are "
        "free.",
        f"Whatever anybody computes from them later, together with anything they know from elsewhere. Each "
        f"{unit} of the training data is covered.",
        f"The step count, {norm}sampling rate and noise were fixed by settings and by what is declared "
        "public, not by any record.",
    ]
    if record["privacy"].get("evaluation"):
        lines.append(
            "Evaluation: accuracy comes from noised counts that the nodes release about units that are held "
            "out of training, and these are charged. No loss or label count of a shard leaves a node, and no "
            "size but as it is said here."
        )
    if sizes := record["privacy"].get("sizes"):
        lines.append(
            "Sizes: nobody declared how much data each node has, so each told it once, with noise (standard "
            f"deviation {sizes['noise_multiplier']:g} {unit}s), and that is charged. Expected batches follow "
            "from it; the noise does not."
        )
    if record["privacy"].get("adaptive_clipping"):
        lines.append(
            "The clipping norm follows a noised quantile of the update norms, which is paid for in epsilon."
        )
    return lines


def not_covered(record: Mapping[str, Any], epsilon: float | None) -> list[str]:
    """What a reader might think is inside epsilon and is not."""
    privacy = record["privacy"]
    kind = mechanism_of(privacy["trust"])
    evaluation = privacy.get("evaluation_data") or "the record does not say whose data the metrics come from"
    unnoised = f"Evaluation: {evaluation}. Accuracy and loss in the record are not noised."
    sizes = "" if privacy.get("sizes") else "the declared sizes, "
    lines = [
        f"What the owners declare public: the name of the data set, the label set{_labels(record)}, {sizes}"
        "the maximum length, who takes part.",
        *([] if privacy.get("evaluation") and epsilon is not None else [unnoised]),
        "The pretrained encoder: what it has learnt from its own training data.",
        *_start_not_covered(record),
        "Choice of settings. If this run was picked among several because its result was good, the choice "
        "itself leaks (Papernot and Steinke 2022), and this run's epsilon alone understates: the tables of "
        "other uses below count all runs that the ledgers know.",
        "Uses of the same data that went through no ledger: by other programs, or by people. They are in no "
        "number on this page.",
        "Runs whose settings were chosen after looking at earlier private runs: this run's epsilon is that "
        "of a run fixed in advance. Over all of them the node's budget holds, whose filter is proven for "
        "that; a total that no budget bounds is that of runs that were planned together.",
        "Side channels: the time a node takes, memory, power, logs on the node itself.",
        *EXPOSED,
        "Security and exposure: who may read the data where it lies, how it was collected, the transport "
        "(TLS) and the nodes' own machines.",
        "Facts about whole groups: that most people write so and so may be learnt, and is meant to be.",
    ]
    if epsilon is None:
        return lines
    if privacy["unit"] == "record":
        lines.insert(
            0,
            "A person with several records: this guarantee is for one record. With k records of one person "
            "epsilon is up to k times as large (and delta grows faster).",
        )
        if _of_pairs(record):
            lines.insert(
                1,
                "A text that is in several pairs: this guarantee is for one pair. For a text that k pairs "
                "have it is as for a person with k records.",
            )
    if privacy["unit"] != "client":
        lines.insert(1, f"The same person's data on several nodes: their epsilons add up{kind.adding_up}.")
    if privacy.get("matrix"):
        lines.append(
            "The server's memory: until a run ends, the server keeps the noise of its last rounds "
            "(`noise.secret` beside its checkpoint, readable by its own user). Whoever reads it can "
            "take that noise off."
        )
    lines.append(f"Floating-point arithmetic: {kind.arithmetic}")
    return lines


def _public_start(record: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the model learnt from before the nodes' texts; None if it was nothing."""
    found: Mapping[str, Any] | None = (record.get("data") or {}).get("public_start")
    return found


def _start_not_covered(record: Mapping[str, Any]) -> list[str]:
    start = _public_start(record)
    if start is None:
        return []
    return [
        f"What the model started from: {start['texts']:,} labelled texts that whoever started the run "
        f"declared public (SHA-256 of their file: {start['digest'][:16]}). The server learnt from them "
        "before the first round, without noise. A node's text is protected as it is said here, unless it is "
        "in that file too."
    ]


def _times(epsilon: float) -> str:
    """At most exp(epsilon) times, rounded up to three digits: rounded down it would be no bound."""
    if epsilon > 13.8:
        return "perhaps more than a million times"
    factor = math.exp(epsilon)
    unit = 10.0 ** (math.floor(math.log10(factor)) - 2)
    return f"at most {math.ceil(factor / unit) * unit:,.{2 if unit < 0.1 else 1 if unit < 1 else 0}f} times"


def _odds(delta: float) -> str:
    return f"1 in {1.0 / delta:,.0f}" if delta > 0 else "0"


def left_out(record: Mapping[str, Any]) -> dict[str, str]:
    """By node that should have taken part and has no part in the model, why: it refused, say.

    A record of an earlier version does not list them: there they are those that never released anything.
    """
    federation = record["federation"]
    if (listed := federation.get("left_out")) is not None:
        return {str(one["node"]): str(one["reason"]) for one in listed}
    released = {str(one["node"]) for one in record["privacy"]["per_node"] if one["releases"]}
    lost = {str(one["node"]): str(one["reason"]) for one in reversed(federation["dropped"])}
    return {node: why for node, why in sorted(lost.items()) if node not in released}


def _labels(record: Mapping[str, Any]) -> str:
    """The labels in brackets, where the record has them; of many, the first."""
    labels = (record.get("data") or {}).get("labels") or ()
    return f" ({few(map(coded, labels), _SHOWN_LABELS)})" if labels else ""


def few(names: Iterable[str], most: int = 3) -> str:
    """The first names and how many more there are: `a, b, c and 4 more`."""
    listed = list(names)
    more = f" and {len(listed) - most:,} more" if len(listed) > most else ""
    return f"{', '.join(listed[:most])}{more}"


# --- how strong it is ----------------------------------------------------------------------------------


def was_trained(privacy: Mapping[str, Any]) -> bool:
    """False if the record lists the nodes and not one of them released anything."""
    nodes = privacy["per_node"]
    return not nodes or any(one["releases"] or one.get("answers") for one in nodes)


def strength(privacy: Mapping[str, Any], curve: TradeOff | None) -> str:
    """How strong the guarantee is, in one sentence (`fedtune.privacy.accounting.strength`)."""
    if not was_trained(privacy):
        return "Nothing was trained, so nothing is said of how strong a protection is."
    if curve is None:
        return "There is no protection."
    word = grade(curve, float(privacy["delta"]))
    least = " at best" if word == "weak" else ""
    source = "" if curve.own else " (by epsilon and delta alone; the run's own curve is not known)"
    return (
        f"This is a {word} protection{least}: an attacker who is wrong about 1 in 1,000 of the "
        f"{UNITS_OF[privacy['unit']]} that were not in the data recognises at most "
        f"{percent(curve.found(WRONG[0]))} of those that were{source}; by guessing it would be 0.1 percent."
    )


def strength_table(facts: Mapping[str, Any]) -> tuple[str, list[tuple[str, ...]], str]:
    """What stands above the table, its rows, and what stands below, from the facts of a statement."""
    about, units = facts["strength"], UNITS_OF[facts["unit"]["name"]]
    source = (
        "from this run's own trade-off curve, composed of its steps (Dong, Roth and Su 2022)"
        if about["own_curve"]
        else "from epsilon and delta alone, which says much less than the run's own curve would"
    )
    above = (
        "An attacker who knows everything else looks at all that was released and says of each of the "
        f"{units} whether it was in the data. Upper bounds, {source}:"
    )
    rows: list[tuple[str, ...]] = [
        (f"wrong about, of the {units} not in the data", f"recognised at most, of the {units} in it")
    ]
    rows += [(f"1 in {round(1 / one['wrong']):,}", percent(one["found"])) for one in about["found"]]
    below = (
        "By guessing, both would be the same. The largest difference between the two, at whatever the "
        f"attacker chooses to be wrong about, is {percent(about['advantage'])} (the attacker's advantage)."
    )
    return above, rows, below
