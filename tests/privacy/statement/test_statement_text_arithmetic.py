"""The sentences of a statement one by one: each condition from both sides."""

from __future__ import annotations

import math
from typing import Any

import pytest

from fedtune.privacy.accounting.strength import TradeOff
from fedtune.privacy.mechanisms.registry import mechanism_of
from fedtune.privacy.publication import EXPOSED
from fedtune.privacy.statement.facts import curve_of, strength_facts, strength_picture
from fedtune.privacy.statement.words import (
    _odds,
    _times,
    covered,
    finer_units,
    not_covered,
    outline,
    strength,
    strength_table,
    was_trained,
)
from tests.privacy.statement.test_statement import record


def sees(of: dict[str, Any]) -> list[str]:
    return mechanism_of(of["trust"]).who_sees_what(of)


PAIR = TradeOff(((1.0, 1e-5),), own=False)
OWN = TradeOff(((1.0, 1e-5),), own=True)
ABOUT = {"share": 0.2, "answers": 1, "mechanism": "two counts", "noise_multiplier": 4.0, "unit": "record",
         "epsilon": 0.7}  # fmt: skip


def privacy(trust: str = "local", unit: str = "record", **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = record(trust, unit, **changes)["privacy"]
    return found


def use(**changes: Any) -> dict[str, Any]:
    return {"node": "n", "dataset": "d", "releases": 9, "epsilon": 4.9, "delta": 1e-5} | changes


# --- strength


def test_the_curve_is_that_of_the_larger_epsilon() -> None:
    assert curve_of(privacy(), None) == TradeOff(((2.857, 1e-5),), own=False)
    assert curve_of(privacy(epsilon=0.5), None) == TradeOff(((0.5, 1e-5),), own=False)
    assert curve_of(privacy("distributed", epsilon_towards_nodes=3.4), None) == TradeOff(
        ((3.4, 1e-5),), own=False
    )
    assert curve_of(privacy("distributed", epsilon_towards_nodes=2.0), None) == TradeOff(
        ((2.857, 1e-5),), own=False
    )


@pytest.mark.parametrize(
    "change",
    [
        {"trust": "none"},
        {"epsilon": None},
        {"reproducible_noise": True},
        {"audit": {"violated": True}},
        {"per_node": [{"node": "a", "releases": 0}]},
    ],
)
def test_there_is_no_curve_where_nothing_is_promised(change: dict[str, Any]) -> None:
    assert curve_of({**privacy(), **change}, None) is None
    assert curve_of({**privacy(), "audit": {"violated": False}}, None) is not None
    assert curve_of({**privacy(), "audit": "not made"}, None) is not None


def test_something_was_trained_if_any_node_released_or_answered() -> None:
    assert was_trained(privacy(per_node=[]))
    assert not was_trained(privacy(per_node=[{"releases": 0}, {"releases": 0, "answers": 0}]))
    assert was_trained(privacy(per_node=[{"releases": 0}, {"releases": 2}]))
    assert was_trained(privacy(per_node=[{"releases": 0, "answers": 1}]))


def test_strength_in_one_sentence() -> None:
    words = (
        "This is a strong protection: an attacker who is wrong about 1 in 1,000 of the {} that were not in "
        "the data recognises at most 0.28 percent of those that were{}; by guessing it would be 0.1 percent."
    )
    source = " (by epsilon and delta alone; the run's own curve is not known)"
    assert strength(privacy(), OWN) == words.format("texts", "")
    assert strength(privacy(), PAIR) == words.format("texts", source)
    assert strength(privacy(unit="person"), OWN) == words.format("persons", "")
    assert strength(privacy("central", "client"), OWN) == words.format("nodes", "")
    weak = TradeOff(((9.0, 1e-5),), own=True)
    assert strength(privacy(), weak).startswith("This is a weak protection at best: ")
    assert strength(privacy(), None) == "There is no protection."
    assert strength(privacy(per_node=[{"releases": 0}]), OWN) == (
        "Nothing was trained, so nothing is said of how strong a protection is."
    )


def test_the_numbers_of_the_table() -> None:
    facts = strength_facts(privacy(), OWN)
    assert facts is not None and strength_facts(privacy(), None) is None
    assert facts == {
        "word": "strong",
        "own_curve": True,
        "advantage": OWN.advantage(),
        "found": [{"wrong": w, "found": OWN.found(w)} for w in (0.001, 0.01, 0.1)],
    }
    above, rows, below = strength_table({"strength": facts, "unit": {"name": "person"}})
    assert "each of the persons whether" in above and "from this run's own trade-off curve" in above
    assert rows == [
        ("wrong about, of the persons not in the data", "recognised at most, of the persons in it"),
        ("1 in 1,000", "0.28 percent"),
        ("1 in 100", "2.8 percent"),
        ("1 in 10", "27.2 percent"),
    ]
    assert "is 46.3 percent (the attacker's advantage)" in below
    pair = strength_table({"strength": {**facts, "own_curve": False}, "unit": {"name": "record"}})
    assert "from epsilon and delta alone" in pair[0]


def test_the_promise_below_the_picture() -> None:
    image = strength_picture(privacy(unit="person"), OWN)
    assert ">A strong protection: epsilon 2.857 at delta 1e-05; add or remove one person<" in image
    assert "of 1,000 persons in it" in image


# --- the first paragraph


def paragraph(epsilon: float | None = 1.0, **changes: Any) -> str:
    made = record(**{"epsilon": epsilon, **changes})
    return outline(made, epsilon, None if epsilon is None else 1e-5, OWN)


def test_whose_texts_and_how_many_hold_them() -> None:
    made = record(ledger=[])
    assert outline(made, 1.0, 1e-5, OWN).startswith(
        "A text classifier was trained on private texts (`visits`) that 4 nodes hold. "
    )
    made["federation"]["nodes"] = 1
    assert "(`visits`) that one node holds. It" in outline(made, 1.0, 1e-5, OWN)
    made["federation"]["nodes"] = 2
    assert "(`visits`) that 2 nodes hold. It" in outline(made, 1.0, 1e-5, OWN)
    assert "on texts that their owner declared public (`visits`)" in paragraph(data_public=True)


@pytest.mark.parametrize("unit", ["record", "person", "client"])
def test_nothing_trained_is_said_for_every_unit(unit: str) -> None:
    text = paragraph(unit=unit, per_node=[{"node": "a", "releases": 0}])
    assert text.startswith("**Nothing was trained.** No node released anything")
    assert "the private texts (`visits`) that 4 nodes hold were not used" in text


def test_a_missing_delta_is_no_guarantee_either() -> None:
    for epsilon, delta in ((1.0, None), (None, 1e-5), (None, None)):
        assert "**without any privacy guarantee**" in outline(record(), epsilon, delta, None)


def test_the_first_paragraph_word_by_word() -> None:
    text = paragraph(ledger=[])
    assert text == (
        "A text classifier was trained on private texts (`visits`) that 4 nodes hold. It was trained so that "
        "it hardly depends on any single text: with it or without it, every outcome is at most 2.72 times as "
        "likely (that is what *epsilon* 1 says), except for a chance of 1 in 100,000 (*delta*). In other "
        "words: an attacker who knows everything else, sees everything that ever left a node, and at first "
        "finds it equally likely that any single text was used or not, ends up at most 73.2 percent sure. "
        + strength(privacy(), OWN)
    )
    assert "depends on what any one person contributed:" in paragraph(unit="person")
    central = paragraph(trust="central", unit="client")
    assert "depends on what any one node holds:" in central and "sees the finished model and every" in central


@pytest.mark.parametrize("audit", [{"violated": False}, None, "not made"])
def test_an_audit_that_found_nothing_takes_nothing_back(audit: Any) -> None:
    assert "an audit has shown" not in paragraph(audit=audit)


def test_epsilon_towards_other_nodes() -> None:
    noise, more = "and the noise of one of the other nodes", "One of the nodes itself can learn somewhat more"
    for changes, has_noise, has_more in (
        ({"max_colluders": 0}, False, False),
        ({"max_colluders": 1}, True, False),
        ({"max_colluders": 0, "epsilon_towards_nodes": 1.0}, True, False),
        ({"max_colluders": 0, "epsilon_towards_nodes": 1.2}, False, True),
        ({"max_colluders": 1, "epsilon_towards_nodes": 1.2}, True, False),
    ):
        text = paragraph(trust="distributed", ledger=[], **changes)
        assert (noise in text, more in text) == (has_noise, has_more), changes
    assert "towards it epsilon is 1.2." in paragraph(
        trust="distributed", max_colluders=0, epsilon_towards_nodes=1.2
    )
    assert more not in paragraph(max_colluders=0, epsilon_towards_nodes=1.2)


def other(ledger: Any, unit: str = "record") -> str:
    """What the first paragraph says of other uses."""
    text = paragraph(ledger=ledger, unit=unit)
    return text[len(paragraph(ledger=[], unit=unit)) :]


UNKNOWN = " **What else the same data was used for is not known here**: in all, epsilon may be larger."


def test_other_uses_in_the_first_paragraph() -> None:
    together = " **Together with all other uses of the same data that are known, epsilon is {}.**"
    assert other(None) == "" and other([use(releases=0)]) == ""
    assert other([use(), use(epsilon=6.0, delta=2e-5), use(epsilon=5.0)]) == together.format(
        "6 at delta 2e-05"
    )
    assert other([use(delta=None)]) == together.format("4.9")
    assert other([use(epsilon=1.004)]) == "" and other([use(epsilon=1.006)]) == together.format(
        "1.01 at delta 1e-05"
    )
    assert other([use(), use(releases=None, epsilon=None)]) == together.format("4.9 at delta 1e-05") + UNKNOWN
    assert other([use(releases=None, epsilon=None)]) == UNKNOWN
    assert other([use(releases=0, epsilon=None)]) == ""
    none = (
        " **The same data was also used without secret noise** (see Other uses): over all its uses there is "
        "no guarantee."
    )
    assert other([use(), use(epsilon=None)]) == none


def test_total_is_compared_with_the_runs_own() -> None:
    text = outline(record(ledger=[use(epsilon=2.005)]), 2.0, 1e-5, OWN)
    assert "Together with" not in text
    assert "Together with" in outline(record(ledger=[use(epsilon=2.02)]), 2.0, 1e-5, OWN)
    assert "Together with" not in outline(record(ledger=[]), 0.5, 1e-5, OWN)
    assert "Together with" not in outline(record(ledger=[use(epsilon=1.005)]), 1.0, 1e-5, OWN)


def test_finer_units_are_those_before_the_runs_own() -> None:
    uses = [use(unit="client"), use(unit="record"), use(unit=None), use()]
    assert finer_units(privacy(unit="person", ledger=uses)) == ["record"]
    assert finer_units(privacy(unit="record", ledger=uses)) == []
    both = [use(unit="person"), use(unit="record")]
    assert finer_units(privacy("central", "client", ledger=both)) == ["record", "person"]
    assert finer_units({"unit": "person"}) == [] and finer_units(privacy(unit="person", ledger=None)) == []
    text = other([use(unit="record"), use(releases=None, epsilon=None)], "person")
    assert text == (
        " **Other runs on the same data protected single records only.** Over all uses that are known "
        "epsilon is 4.9 at delta 1e-05 for one record; for one person they promised nothing, and what is "
        "said here is this run's alone." + UNKNOWN
    )


# --- who sees what


def limits(dropouts: Any, colluders: Any) -> str:
    return sees(privacy("distributed", max_dropouts=dropouts, max_colluders=colluders))[2]


def test_how_many_the_noise_covers() -> None:
    missing = "The record does not say how many dropouts and colluding nodes the noise covers."
    assert limits(None, 1) == limits(1, None) == limits(None, None) == missing
    between = " (a round with more dropouts is discarded, and charged all the same), and "
    assert limits(2, 1) == (
        f"2 of the nodes may drop out of a round{between}1 node may tell the server what noise they added."
    )
    assert limits(0, 2) == (
        f"No node may drop out of a round{between}2 nodes may tell the server what noise they added."
    )
    assert limits(0, 0).endswith("none may help the server to unmask another's part.")


def test_answers_are_told_of_where_there_are_any() -> None:
    without = sees(privacy("distributed"))
    assert len(without) == 5 and len(sees(privacy("distributed", evaluation=ABOUT))) == 6


def test_what_a_node_knows_of_the_others() -> None:
    def of(**changes: Any) -> str:
        known = "It knows its own share of the noise and can take it off"
        line = sees(privacy("distributed", **changes))[-2]
        assert line.startswith(f"Each node sees its own data and the shared adapter of every round. {known}")
        return line.partition(known)[2]

    assert of(epsilon=None) == "."
    assert of(epsilon=None, max_colluders=1) == "."
    assert of() == ": towards it epsilon is larger than above (by how much the record does not say)."
    assert of(epsilon_towards_nodes=3.0) == ": **towards another node epsilon is 3** at the same delta."
    counts = ", which epsilon above counts with: the guarantee holds towards it too."
    assert of(epsilon_towards_nodes=2.857) == counts
    assert of(max_colluders=1, epsilon_towards_server=2.1) == (
        f"{counts} Towards the server alone it is 2.1."
    )


# --- covered, not covered


def starts(lines: list[str]) -> list[str]:
    return [" ".join(line.split()[:2]) for line in lines]


def test_what_is_covered() -> None:
    plain = ["Training: every", "What is", "Whatever anybody", "The step"]
    assert starts(covered(record(), 1.0)) == plain
    assert covered(record(), None) == ["Nothing: there is no guarantee."]
    assert starts(covered(record(evaluation=ABOUT), 1.0)) == [*plain, "Evaluation: accuracy"]
    sizes = covered(record(unit="person", sizes={"noise_multiplier": 20.0}), 1.0)
    assert starts(sizes) == [*plain, "Sizes: nobody"] and "(standard deviation 20 persons)" in sizes[-1]
    adaptive = covered(record("central", "client", adaptive_clipping=True), 1.0)
    assert starts(adaptive) == [*plain, "The clipping"] and "Each client of the training" in adaptive[2]
    assert "count, sampling rate" in adaptive[3]


def test_the_labels_are_named() -> None:
    """Whatever they are called, and of many the first."""
    labelled = record() | {"data": {"labels": ["très", "C`#", "否\n定"]}}
    assert "the label set (`très`, `C'#`, `否 定`), " in not_covered(labelled, None)[0]
    many = record() | {"data": {"labels": [str(i) for i in range(25)]}}
    assert "`19` and 5 more), " in not_covered(many, None)[0]


def test_what_is_not_covered() -> None:
    exposed = starts(list(EXPOSED))
    public, unnoised = "What the", "Evaluation: the"
    rest = ["The pretrained", "Choice of", "Uses of", "Runs whose", "Side channels:", *exposed,
            "Security and", "Facts about"]  # fmt: skip
    floats, several, nodes = "Floating-point arithmetic:", "A person", "The same"
    assert starts(not_covered(record(), None)) == [public, unnoised, *rest]
    assert starts(not_covered(record(evaluation=ABOUT), None)) == [public, unnoised, *rest]
    assert starts(not_covered(record(), 1.0)) == [several, nodes, public, unnoised, *rest, floats]
    assert starts(not_covered(record(evaluation=ABOUT), 1.0)) == [several, nodes, public, *rest, floats]
    assert starts(not_covered(record(unit="person"), 1.0)) == [public, nodes, unnoised, *rest, floats]
    client = record("central", "client")
    assert starts(not_covered(client, 1.0)) == [public, unnoised, *rest, floats]
    client["privacy"]["matrix"] = {"num_rounds": 4, "bands": 2, "min_separation": 2}
    assert starts(not_covered(client, 1.0)) == [public, unnoised, *rest, "The server's", floats]


def test_whose_evaluation_and_whose_sizes() -> None:
    def lines(**changes: Any) -> str:
        return "\n".join(not_covered(record(**changes), None))

    assert "Evaluation: the record does not say whose data the metrics come from. Accuracy" in lines()
    assert "Evaluation: a public test split. Accuracy" in lines(evaluation_data="a public test split")
    assert "the label set, the declared sizes, the maximum length" in lines()
    assert "the label set, the maximum length" in lines(sizes={"noise_multiplier": 20.0})


def test_what_differs_with_secure_aggregation() -> None:
    local, distributed = not_covered(record(), 1.0), not_covered(record("distributed"), 1.0)
    assert local[1].endswith("their epsilons add up.")
    assert distributed[1].endswith("their epsilons add up, and delta grows faster.")
    assert "noise is a float" in local[-1] and "noise is exact (discrete Gaussian)" in distributed[-1]


def test_odds_are_rounded_upwards() -> None:
    assert _odds(1e-5) == "1 in 100,000" and _odds(0.0) == "0"
    assert _times(13.81) == "perhaps more than a million times"
    assert _times(13.8) == "at most 985,000 times" and math.exp(13.8) < 985_000
    assert _times(math.log(2.001)) == "at most 2.01 times" and _times(math.log(20.01)) == "at most 20.1 times"
    assert _times(0.01) == "at most 1.02 times"
