"""A statement's words and numbers on how strong the guarantee is (`fedtune.privacy.accounting.strength`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedtune.privacy.accounting.epsilon import Term
from fedtune.privacy.accounting.strength import WRONG, TradeOff, grade, percent, trade_off
from fedtune.privacy.statement.picture import picture

__all__ = [
    "curve_of",
    "strength",
    "strength_facts",
    "strength_picture",
    "strength_table",
    "was_trained",
]

_UNITS = {"record": "texts", "person": "persons", "client": "nodes"}


def curve_of(privacy: Mapping[str, Any], terms: Mapping[Term, int] | None) -> TradeOff | None:
    """What any attacker finds out, from the run's own steps where the record's epsilon is theirs.

    None where nothing is promised: no noise, noise that the seed gives away, an audit that disproved the
    claim; or where nothing was trained, so that there is nothing to praise.
    """
    audit = privacy["audit"]
    broken = privacy["reproducible_noise"] or (isinstance(audit, Mapping) and audit.get("violated"))
    if privacy["trust"] == "none" or privacy["epsilon"] is None or broken or not was_trained(privacy):
        return None
    towards = privacy.get("epsilon_towards_nodes") or 0.0  # larger in records of an earlier version
    return trade_off(terms, max(float(privacy["epsilon"]), float(towards)), float(privacy["delta"]))


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
        f"{_UNITS[privacy['unit']]} that were not in the data recognises at most "
        f"{percent(curve.found(WRONG[0]))} of those that were{source}; by guessing it would be 0.1 percent."
    )


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


def strength_table(facts: Mapping[str, Any]) -> tuple[str, list[tuple[str, ...]], str]:
    """What stands above the table, its rows, and what stands below, from the facts of a statement."""
    about, units = facts["strength"], _UNITS[facts["unit"]["name"]]
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


def strength_picture(privacy: Mapping[str, Any], curve: TradeOff) -> str:
    """The curve as an SVG picture."""
    promise = (
        f"A {grade(curve, float(privacy['delta']))} protection: epsilon {privacy['epsilon']:.4g} at delta "
        f"{privacy['delta']:.3g}; {privacy['adjacency']}"
    )
    return picture(curve, _UNITS[privacy["unit"]], promise)
