"""The privacy statement of a run: what was promised, to whom, and what was not.

Made from the run's record alone, so that anybody who holds `record.json` can make it again. It answers
what Ponomareva et al. 2023 ("How to DP-fy ML", section 5.3) ask of every DP result (setting, unit, adjacency,
data accesses covered, what is released, accounting and its assumptions, formal statement, transparency) and
names the layers around epsilon that NIST SP 800-226 asks about (mechanism, trust model, side channels,
security, exposure while collecting). The first paragraph is for a reader who knows no mathematics.

Keys of the record that are used when they are there (DESIGN section 9 has those that always are):
`privacy.ledger` (a list of {node, dataset, releases, epsilon, delta, unit}: everything that each node's
ledger knows of the same data; null where it did not say), `privacy.target_epsilon`,
`privacy.records_per_unit`, `privacy.data_public`, `privacy.evaluation_data`, `privacy.evaluation`
(null, or how nodes answered about data that they hold out), `privacy.sizes` (null, or how they told their
sizes), `privacy.audit` ({epsilon_lower, confidence,
audited, bounds, violated} or null), `privacy.cautions` (a list of texts, from the plan),
`federation.left_out` (a list of {node, reason}: who took no part), `privacy.max_dropouts`,
`privacy.max_colluders`, `privacy.epsilon_towards_nodes` and `privacy.epsilon_towards_server` (trust
distributed),
`privacy.adaptive_clipping` (trust central), `privacy.matrix` ({num_rounds, bands, min_separation} of dp_ftrl,
or null), `data.name`, `data.public_start` (null, or which public texts the model learnt from first).
What a record lacks is stated as unknown, never made up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from fedtune.config.schema import TRUSTS
from fedtune.errors import RecordError
from fedtune.privacy.accounting.epsilon import Term, compose_terms, conversions
from fedtune.privacy.accounting.filter import FILTER
from fedtune.privacy.accounting.strength import WEAK, WRONG, TradeOff, caution, grade, trade_off
from fedtune.privacy.mechanisms.matrix import BandedRoot
from fedtune.privacy.mechanisms.registry import adds_noise, mechanism_of
from fedtune.privacy.statement.markdown import bullets, coded, plain, table
from fedtune.privacy.statement.picture import picture
from fedtune.privacy.statement.words import (
    UNITS,
    UNITS_OF,
    covered,
    finer_units,
    left_out,
    meaning_of,
    not_covered,
    outline,
    strength,
    strength_table,
    was_trained,
)

__all__ = ["statement_json", "statement_markdown", "statement_picture"]


def statement_json(record: Mapping[str, Any]) -> dict[str, Any]:
    """All facts of the statement as JSON values. Raises `RecordError` if the record lacks one it needs."""
    try:
        return _facts(record)
    except (KeyError, TypeError, AttributeError) as error:
        raise RecordError(
            f"No statement can be made: the record lacks or garbles {error}. Run `fedtune statement` on a "
            "complete record.json, as a finished run writes it."
        ) from error


def statement_picture(record: Mapping[str, Any]) -> str | None:
    """The trade-off curve of the statement as an SVG picture; None where nothing is promised or trained."""
    privacy = record["privacy"]
    curve = curve_of(privacy, _terms(privacy))
    return None if curve is None else strength_picture(privacy, curve)


def statement_markdown(record: Mapping[str, Any], image: str | None = None) -> str:
    """The statement as Markdown, first a paragraph in plain words. `image`: where what `statement_picture`
    gives lies, beside the statement."""
    facts = statement_json(record)
    parts = [
        "# Privacy statement",
        f"Run `{facts['run']['id']}`, started {facts['run']['started']}.",
        facts["summary"],
        *[f"**Caution.** {caution}" for caution in facts["cautions"]],
        "## The guarantee",
        bullets(_guarantee(facts)),
        *(_strength(facts, image) if facts["strength"] else ()),
        "## Who sees what",
        bullets(facts["trust"]["sees"]),
        "## How it was done",
        bullets(_mechanism(facts)),
        "## What is covered",
        bullets(facts["covered"]),
        "## What is not covered",
        bullets(facts["not_covered"]),
        "## Per node",
        _per_node(facts),
        "## Other uses of the same data",
        _other_uses(facts),
        "## Audit",
        _audit(facts["audit"]),
        "## How to check this",
        bullets(_transparency(facts)),
    ]
    return "\n\n".join(parts) + "\n"


def _facts(record: Mapping[str, Any]) -> dict[str, Any]:
    run, privacy = record["run"], record["privacy"]
    trust, unit = privacy["trust"], privacy["unit"]
    if unit not in UNITS or trust not in TRUSTS:
        raise RecordError(
            f"No statement can be made for unit {unit!r} and trust {trust!r}: they are unknown here."
        )
    kind = mechanism_of(trust)
    private = kind.is_private
    epsilon = privacy["epsilon"] if private else None
    delta = privacy["delta"] if private else None
    terms = _terms(privacy) if private and epsilon is not None else None
    other = conversions(terms) if terms is not None else None
    curve = curve_of(privacy, terms)
    return {
        "schema": 1,
        "run": {"id": run["id"], "started": run["started"], "engine": run["engine"]},
        "summary": outline(record, epsilon, delta, curve),
        "cautions": _cautions(record, epsilon, curve),
        "private": epsilon is not None,
        "unit": {
            "name": unit,
            "meaning": meaning_of(record, unit),
            "records_at_most": privacy.get("records_per_unit"),
            "persons_named": _persons_named(record),
        },
        "adjacency": privacy["adjacency"],
        "trust": {"model": trust, "sees": kind.who_sees_what(privacy)},
        "mechanism": {
            "description": privacy["mechanism"],
            "sampling": kind.sampling(privacy),
            "sample_rate": privacy["sample_rate"],
            "noise_multiplier": privacy["noise_multiplier"],
            "max_grad_norm": privacy["max_grad_norm"],
            "head_norm": privacy.get("head_norm", 0.0),
            "head_share": privacy.get("head_share", 0.0),
            "centre_rounds": privacy.get("centre_rounds", 0),
            "steps": privacy["steps"],
            "evaluation": dict(privacy["evaluation"]) if privacy.get("evaluation") else None,
            "matrix": privacy.get("matrix"),
            "randomness": "reproducible from the run's seed" if privacy["reproducible_noise"] else
            "the operating system's cryptographic generator" if private else "not used for privacy",
        },
        "accounting": {
            "accountant": privacy["accountant"],
            "kind": "upper bound, rounded to the safe side" if private else None,
            "epsilon": epsilon,
            "delta": delta,
            "epsilon_rdp": privacy["epsilon_rdp"] if private else None,
            "epsilon_towards_nodes": privacy.get("epsilon_towards_nodes"),
            "epsilon_towards_server": privacy.get("epsilon_towards_server"),
            "target_epsilon": privacy.get("target_epsilon"),
            "zcdp_rho": _finite(other.rho) if other else None,
            "zcdp_is": other.rho_is if other else None,
            "gdp_mu": _finite(other.mu) if other else None,
            "gdp_is": other.mu_is if other else None,
            "strength": strength(privacy, curve),
        },
        "strength": strength_facts(privacy, curve),
        "left_out": left_out(record),
        "per_node": [dict(entry) for entry in privacy["per_node"]],
        "other_uses": [dict(entry) for entry in privacy.get("ledger") or []],
        "covered": covered(record, epsilon),
        "not_covered": not_covered(record, epsilon),
        "audit": privacy["audit"],
        "reproducible_noise": bool(privacy["reproducible_noise"]),
        "transparency": {
            "versions": dict(run["versions"]),
            "commit": run["commit"],
            "dirty": run["dirty"],
        },
    }  # fmt: skip


def _persons_named(record: Mapping[str, Any]) -> bool:
    """Whether the data says whose record is whose, so that persons could have been protected."""
    return ((record.get("config") or {}).get("data") or {}).get("unit") is not None


def _terms(privacy: Mapping[str, Any]) -> dict[Term, int] | None:
    """The steps as the accountant had them, from the record's own numbers."""
    noise, steps = privacy["noise_multiplier"], privacy["steps"]
    if not noise:
        return None
    if privacy.get("matrix"):
        most = max((int(one["releases"]) for one in privacy["per_node"]), default=0)
        return BandedRoot(**privacy["matrix"]).merged(float(noise), most)
    rate = mechanism_of(privacy["trust"]).recorded_rate(privacy)
    sizes, about = privacy.get("sizes"), privacy.get("evaluation")
    answers = max((int(one.get("answers", 0)) for one in privacy["per_node"]), default=0)
    # Added up: a count may have the very noise of a step.
    return compose_terms(
        {Term(rate, float(noise)): int(steps)},
        {Term(1.0, float(sizes["noise_multiplier"])): 1} if sizes else {},
        {Term(1.0, float(about["noise_multiplier"])): answers} if about and answers else {},
    )


def curve_of(privacy: Mapping[str, Any], terms: Mapping[Term, int] | None) -> TradeOff | None:
    """What any attacker finds out, from the run's own steps where the record's epsilon is theirs.

    None where nothing is promised: no noise, noise that the seed gives away, an audit that disproved the
    claim; or where nothing was trained, so that there is nothing to praise.
    """
    audit = privacy["audit"]
    broken = privacy["reproducible_noise"] or (isinstance(audit, Mapping) and audit.get("violated"))
    if not adds_noise(privacy["trust"]) or privacy["epsilon"] is None or broken or not was_trained(privacy):
        return None
    towards = privacy.get("epsilon_towards_nodes") or 0.0  # larger in records of an earlier version
    return trade_off(terms, max(float(privacy["epsilon"]), float(towards)), float(privacy["delta"]))


def strength_facts(privacy: Mapping[str, Any], curve: TradeOff | None) -> dict[str, Any] | None:
    """The numbers of the statement's table; null where nothing is promised or was trained."""
    if curve is None:
        return None
    return {
        "word": grade(curve, float(privacy["delta"])),
        "own_curve": curve.own,
        "advantage": curve.advantage(),
        "found": [{"wrong": wrong, "found": curve.found(wrong)} for wrong in WRONG],
    }


def strength_picture(privacy: Mapping[str, Any], curve: TradeOff) -> str:
    """The curve as an SVG picture."""
    promise = (
        f"A {grade(curve, float(privacy['delta']))} protection: epsilon {privacy['epsilon']:.4g} at delta "
        f"{privacy['delta']:.3g}; {privacy['adjacency']}"
    )
    return picture(curve, UNITS_OF[privacy["unit"]], promise)


def _cautions(record: Mapping[str, Any], epsilon: float | None, curve: TradeOff | None) -> list[str]:
    privacy = record["privacy"]
    found = [str(text) for text in privacy.get("cautions") or []]
    found += [
        f"{coded(node)} took no part: its data was not used, and the model may serve it worse. {plain(why)}"
        for node, why in itertools.islice(left_out(record).items(), 8)
    ]
    if privacy["reproducible_noise"]:
        found.insert(
            0,
            "This run drew its noise from its seed (`privacy.reproducible_noise=true`). Whoever knows the "
            "seed can take the noise off again, so the numbers below are those of the same run with secret "
            "noise, and this one protects nobody.",
        )
    audit = privacy["audit"]
    if isinstance(audit, Mapping) and audit.get("violated"):
        found.insert(
            0,
            "An audit has shown that the guarantee below does not hold (see Audit). Do not publish the "
            "model.",
        )
    if adds_noise(privacy["trust"]) and epsilon is None:
        found.append(
            "The record gives no epsilon although privacy was asked for: treat the run as not private."
        )
    weak = None if curve is None else caution(curve, float(privacy["epsilon"]), float(privacy["delta"]))
    if weak is not None and not any(text.startswith(WEAK) for text in found):
        found.append(weak)
    if privacy.get("data_public"):
        found.append("The owner declared this data public: ledgers recorded the releases and refused none.")
    if record["run"]["dirty"]:
        found.append("The code had changes that are in no commit: what ran cannot be looked up.")
    return list(dict.fromkeys(found))


def _guarantee(facts: Mapping[str, Any]) -> list[str]:
    accounting, unit = facts["accounting"], facts["unit"]
    lines = [f"Unit of privacy: {unit['name']}: {unit['meaning']}."]
    if unit["name"] == "person" and unit["records_at_most"]:
        lines.append(f"At most {unit['records_at_most']} records of a person enter one step.")
    if unit["name"] == "record" and unit["persons_named"]:
        lines.append(
            "The data names persons, and single records were chosen as the unit all the same "
            "(privacy.unit=record): what is promised here is not promised to a person with several records."
        )
    lines.append(f"Adjacency: {facts['adjacency']}.")
    if accounting["epsilon"] is None:
        return [*lines, "Epsilon: none. There is no guarantee; formally, epsilon is infinite."]
    lines += [
        f"**Epsilon {accounting['epsilon']:.4g} at delta {accounting['delta']:.3g}**, "
        f"{accounting['kind']} ({accounting['accountant']}); the largest over all nodes, each for its own "
        "data. It is that of one run whose plan was fixed before its first release.",
        f"By Renyi DP, a looser method and independent code: epsilon {_shown(accounting['epsilon_rdp'])}.",
        f"As zero-concentrated DP: rho {_shown(accounting['zcdp_rho'])} ({accounting['zcdp_is']}). As "
        f"Gaussian DP: mu {_shown(accounting['gdp_mu'])} ({accounting['gdp_is']}).",
        accounting["strength"],
    ]
    return lines


def _strength(facts: Mapping[str, Any], image: str | None) -> list[str]:
    above, (head, *rows), below = strength_table(facts)
    shown = [f"![What an attacker can find out, at most]({image})"] if image else []
    return ["## How strong that is", above, table(head, rows), below, *shown]


def _mechanism(facts: Mapping[str, Any]) -> list[str]:
    mechanism = facts["mechanism"]
    lines = [f"Mechanism: {mechanism['description']}."]
    if facts["accounting"]["epsilon"] is None:
        return [*lines, "No noise was added."]
    return [
        *lines,
        f"Sampling as run: {mechanism['sampling']}.",
        *([_CENTRE] if mechanism["centre_rounds"] else []),
        _noise(mechanism),
        f"Source of the noise: {mechanism['randomness']}.",
        *_evaluation(mechanism["evaluation"]),
    ]


_CENTRE = (
    "Round 1 released, in place of a gradient, the noised mean of the texts' vectors (from which the head "
    "then sees every text): each unit's part of it was clipped and noised as a gradient is, and it is one of "
    "the accounted steps."
)


def _evaluation(about: Mapping[str, Any] | None) -> list[str]:
    if about is None:
        return []
    often = "once" if about["answers"] == 1 else f"at most {about['answers']} times"
    return [
        f"Evaluation: each node holds out a share of {about['share']:g} of its units and {often} "
        f"releases {about['mechanism']} (noise multiplier "
        f"{_shown(about['noise_multiplier'])}, one vote a {about['unit']}). By itself that is epsilon "
        f"{_shown(about['epsilon'])}; it is composed with training into the epsilon above, as if both were "
        "about the same units.",
    ]


def _noise(mechanism: Mapping[str, Any]) -> str:
    noise, norm = _shown(mechanism["noise_multiplier"]), _shown(mechanism["max_grad_norm"])
    matrix, head, share = mechanism["matrix"], mechanism["head_norm"], mechanism["head_share"]
    if head:
        whole = mechanism["max_grad_norm"]
        worth, rest = (_shown(whole * math.sqrt(part)) for part in (share, 1.0 - share))
        norm += (
            f" (the head is clipped at {_shown(head)} and scaled to {worth}, the rest clipped at {rest}: the "
            "squares of these two add up)"
        )
    if not matrix:
        return (
            f"Noise multiplier (standard deviation over clipping norm): {noise}; clipping norm (L2): {norm}; "
            f"accounted steps: {mechanism['steps']}."
        )
    root = BandedRoot(**matrix)
    return (
        f"Noise multiplier (standard deviation over the sensitivity of the whole run): {noise}; sensitivity: "
        f"{root.sensitivity():.4g} clipping norms, for {root.participations} of {root.num_rounds} rounds "
        f"that one client may take part in; clipping norm (L2): {norm}. All rounds together are accounted as "
        "one Gaussian mechanism; a node's ledger charges each participation its share of the square."
    )


def _per_node(facts: Mapping[str, Any]) -> str:
    rows = [
        (
            plain(e["node"]), _shown(e["epsilon"]), _shown(e["delta"]),
            f"{e['releases']}{' (took no part)' if e['node'] in facts['left_out'] else ''}",
        )
        for e in facts["per_node"]
    ]  # fmt: skip
    return table(("node", "epsilon", "delta", "releases"), rows)


def _other_uses(facts: Mapping[str, Any]) -> str:
    uses = facts["other_uses"]
    if not uses:
        return (
            "The record does not say what else this data was used for. The guarantee above is this run's "
            "alone; ask each node's owner what else it was used for."
        )
    head = ("node", "data set", "releases of this shard", "epsilon over all uses", "delta", "for one")
    rows = [
        (
            plain(use["node"]), plain(_known(use["dataset"])), _known(use["releases"]),
            "infinite" if use["epsilon"] is None and use["releases"] else _known(use["epsilon"]),
            _shown(use["delta"]), _known(use.get("unit")),
        )
        for use in uses
    ]  # fmt: skip
    composed = (
        "Composed over everything that each node's ledger knows this data was ever used for, this run "
        "included, under any of its names: earlier runs, interrupted and repeated rounds. These, and not the "
        "run's own, are the numbers that a person in the data should be told."
    )
    notes = [
        *([composed] if any(use["releases"] is not None for use in uses) else []),
        "Several runs together are counted by Renyi DP, and so are budgets enforced: by a "
        f"{FILTER}, which is proven for runs whose settings are chosen after looking at the results of "
        "earlier ones. A single run that was fixed in advance may be admitted as a whole by its own epsilon; "
        "then no other may follow it.",
    ]
    if finer := finer_units({"ledger": uses, "unit": facts["unit"]["name"]}):
        notes.insert(
            1,
            f"They are for one {finer[0]}, which is all that some of these runs protected. For one "
            f"{facts['unit']['name']} there is no total: what protects a {finer[0]} says little of who has "
            "many.",
        )
    if any(use["releases"] is None for use in uses):
        notes.insert(
            0,
            "**Unknown**: that node's ledger lies with the node, which did not say. Earlier uses of its data "
            "are not in any number on this page; ask its owner for `fedtune node proof --config node.yaml`.",
        )
    return "\n\n".join([table(head, rows), *notes])


def _audit(audit: Any) -> str:
    if not audit:
        return "Not audited. `fedtune audit` measures a lower bound on epsilon to set beside the claim."
    if not isinstance(audit, Mapping):
        return str(audit)
    best = max(audit.get("bounds") or [audit], key=lambda bound: bound.get("epsilon_lower") or 0.0)
    confidence = audit.get("confidence")
    sure = f" with {100 * confidence:g} percent confidence" if isinstance(confidence, int | float) else ""
    lines = [
        f"An attack on this run's {audit.get('audited', 'mechanism')} ({best.get('method', 'unnamed')} "
        f"bound) shows that epsilon is at least {_shown(audit.get('epsilon_lower'))}{sure}.",
        "A lower bound above the claim would prove the claim wrong; one below it proves nothing.",
    ]
    if audit.get("audited") == "mechanism":
        lines.append(
            "What was attacked is the sampler, the clipping and the noise, with synthetic gradients in place "
            "of people's; the training of the model was not (`fedtune audit --model` does that)."
        )
    if audit.get("violated"):
        lines.append("**It is above the claim: the guarantee on this page does not hold.**")
    return " ".join(lines)


def _transparency(facts: Mapping[str, Any]) -> list[str]:
    transparency = facts["transparency"]
    versions = ", ".join(f"{name} {version}" for name, version in sorted(transparency["versions"].items()))
    books = (
        "`fedtune node proof --config node.yaml` checks, at each site, its books"
        if facts["run"]["engine"] == "deployment"
        else "`fedtune budget verify` checks the ledgers"
    )
    return [
        f"Code: fedtune, open source, commit {transparency['commit'] or 'unknown'}"
        + (" with uncommitted changes" if transparency["dirty"] else "")
        + ".",
        f"Versions: {versions}.",
        "The sampler, the noise and the accounted event come from one object (`fedtune.privacy.plan`); its "
        "tests hold it to closed forms and to independent accountants.",
        "`record.json` holds every number above; `fedtune statement` makes this page from it again; "
        f"{books}.",
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _known(value: Any) -> str:
    """As `_shown`, where null says that it is not known."""
    return "unknown" if value is None else _shown(value)
