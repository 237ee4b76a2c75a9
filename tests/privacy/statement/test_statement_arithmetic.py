"""The facts of a statement and the parts of its page, each condition from both sides."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from fedtune.errors import RecordError
from fedtune.privacy.accounting.epsilon import Conversions, Term
from fedtune.privacy.accounting.strength import WEAK, TradeOff
from fedtune.privacy.mechanisms.matrix import BandedRoot
from fedtune.privacy.mechanisms.registry import mechanism_of
from fedtune.privacy.statement import facts as statement
from fedtune.privacy.statement.facts import (
    _audit,
    _cautions,
    _evaluation,
    _guarantee,
    _noise,
    _other_uses,
    _per_node,
    _terms,
    _transparency,
    statement_json,
    statement_markdown,
)
from fedtune.privacy.statement.words import UNITS, strength
from tests.privacy.statement.test_statement import record


def sampling(of: dict[str, Any]) -> str:
    return mechanism_of(of["trust"]).sampling(of)


OWN = TradeOff(((1.0, 1e-5),), own=True)
ABOUT = {"share": 0.2, "answers": 1, "mechanism": "two counts", "noise_multiplier": 4.0, "unit": "record",
         "epsilon": 0.7}  # fmt: skip


def privacy(trust: str = "local", unit: str = "record", **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = record(trust, unit, **changes)["privacy"]
    return found


def use(**changes: Any) -> dict[str, Any]:
    return {"node": "n", "dataset": "d", "releases": 9, "epsilon": 4.9, "delta": 1e-5} | changes


# --- the facts


@pytest.fixture(autouse=True)
def curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The accountant's curve is not what these tests are about, and takes a while."""
    monkeypatch.setattr(statement, "curve_of", lambda privacy, terms: OWN if privacy["epsilon"] else None)


def refused(**changes: Any) -> str:
    with pytest.raises(RecordError) as refusal:
        statement_json(record(**changes))
    return str(refusal.value)


def test_an_unknown_unit_or_trust_is_named() -> None:
    words = "No statement can be made for unit {} and trust {}: they are unknown here."
    assert refused(unit="user") == words.format("'user'", "'local'")
    assert refused(trust="blind") == words.format("'record'", "'blind'")


def test_the_facts_of_a_private_run() -> None:
    matrix = {"num_rounds": 4, "bands": 2, "min_separation": 2}
    made = record(
        records_per_unit=8, evaluation=ABOUT, epsilon_towards_nodes=3.0, epsilon_towards_server=2.0,
        target_epsilon=4.0,
    )  # fmt: skip
    facts = statement_json(made)
    assert facts["schema"] == 1 and facts["private"] is True
    assert facts["unit"] == {
        "name": "record", "meaning": UNITS["record"], "records_at_most": 8, "persons_named": False
    }  # fmt: skip
    assert facts["trust"]["model"] == "local"
    mechanism = facts["mechanism"]
    assert mechanism["sample_rate"] == 0.05 and mechanism["evaluation"] == ABOUT and mechanism["steps"] == 60
    assert mechanism["matrix"] is None and statement_json(record())["mechanism"]["evaluation"] is None
    assert mechanism["randomness"] == "the operating system's cryptographic generator"
    central = statement_json(record("central", "client", matrix=matrix))
    assert central["mechanism"]["matrix"] == matrix
    accounting = facts["accounting"]
    assert accounting["kind"] == "upper bound, rounded to the safe side"
    assert accounting["epsilon_towards_nodes"] == 3.0 and accounting["epsilon_towards_server"] == 2.0
    assert accounting["target_epsilon"] == 4.0 and accounting["epsilon_rdp"] == 3.368


def test_the_facts_of_a_run_without_noise() -> None:
    made = statement_json(record("none", epsilon=1.0, delta=1e-5, epsilon_rdp=2.0, noise_multiplier=1.0))
    assert made["mechanism"]["randomness"] == "not used for privacy"
    accounting = made["accounting"]
    for name in ("kind", "epsilon", "delta", "epsilon_rdp", "zcdp_rho", "zcdp_is", "gdp_mu", "gdp_is"):
        assert accounting[name] is None, name
    lost = statement_json(record(epsilon=None))
    assert lost["accounting"]["zcdp_rho"] is None, "no number where there is no epsilon"
    assert "epsilon_towards_nodes" in lost["accounting"] and lost["accounting"]["target_epsilon"] is None


def test_infinite_conversions_are_null(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = Conversions(math.inf, "exact", math.inf, "exact")
    monkeypatch.setattr(statement, "conversions", lambda terms: endless)
    accounting = statement_json(record())["accounting"]
    assert accounting["zcdp_rho"] is None and accounting["gdp_mu"] is None


@pytest.mark.parametrize(
    ("config", "named"),
    [({}, False), (None, False), ({"data": None}, False), ({"data": {"unit": None}}, False),
     ({"data": {"unit": "author"}}, True)],
)  # fmt: skip
def test_whether_the_data_names_persons(config: Any, named: bool) -> None:
    made = {**record(), "config": config}
    assert statement_json(made)["unit"]["persons_named"] is named
    words = "The data names persons, and single records were chosen as the unit all the same"
    assert (words in statement_markdown(made)) is named
    persons = {**record(unit="person"), "config": config}
    assert words not in statement_markdown(persons)
    without = {name: value for name, value in made.items() if name != "config"}
    assert statement_json(without)["unit"]["persons_named"] is False


# --- the steps, as the accountant had them


def nodes(*answers: int, releases: int = 12) -> list[dict[str, Any]]:
    return [{"node": str(i), "epsilon": 1.0, "delta": 1e-5, "releases": releases - i, "answers": one}
            for i, one in enumerate(answers)]  # fmt: skip


def test_steps_sizes_and_answers() -> None:
    steps = {Term(0.05, 1.0): 60}
    assert _terms(privacy()) == steps
    assert _terms(privacy(noise_multiplier=0.0)) is None
    assert _terms(privacy("central", "client")) == {Term(1.0, 1.0): 60}
    assert _terms(privacy(sizes={"noise_multiplier": 20.0})) == {**steps, Term(1.0, 20.0): 1}
    assert _terms(privacy(evaluation=ABOUT)) == steps, "no node has answered"
    assert _terms(privacy(per_node=nodes(1, 2))) == steps, "answers to nothing"
    assert _terms(privacy(evaluation=ABOUT, per_node=nodes(3, 1))) == {**steps, Term(1.0, 4.0): 3}
    assert _terms(privacy(evaluation=ABOUT, per_node=[])) == steps
    central = privacy("central", "client", evaluation={**ABOUT, "noise_multiplier": 1.0}, per_node=nodes(2))
    assert _terms(central) == {Term(1.0, 1.0): 62}
    from_json = _terms(privacy(steps=60.0, evaluation=ABOUT, per_node=[{"releases": 1, "answers": "2"}]))
    assert from_json == {**steps, Term(1.0, 4.0): 2} and all(type(n) is int for n in from_json.values())


def test_steps_of_a_matrix_mechanism() -> None:
    matrix = {"num_rounds": 6, "bands": 2, "min_separation": 2}
    root = BandedRoot(**matrix)

    def of(per_node: list[dict[str, Any]]) -> Any:
        return _terms(privacy("central", "client", matrix=matrix, noise_multiplier=2.0, per_node=per_node))

    assert of(nodes(0, 0, releases=3)) == root.merged(2.0, 3) != root.merged(2.0, 2)
    assert of([]) == {} and of([{"releases": "1"}]) == root.merged(2.0, 1)


def test_how_was_sampled() -> None:
    matrix = {"num_rounds": 6, "bands": 2, "min_separation": 3}
    assert "each at most once in 3 rounds" in sampling(privacy("central", "client", matrix=matrix))
    assert sampling(privacy(unit="person", sample_rate=1.0)) == "every person takes part in every step"
    assert "each person is drawn by itself with probability 0.5," in sampling(
        privacy(unit="person", sample_rate=0.5)
    )
    assert sampling(privacy("central", "client", sample_rate=1.0)).startswith("the server chooses clients")


# --- cautions

SEED, AUDIT = "This run drew its noise from its seed", "An audit has shown that the guarantee below"
PUBLIC, DIRTY = "The owner declared this data public:", "The code had changes that are in no commit:"
LOST = "The record gives no epsilon although privacy was asked for:"


def cautions(curve: TradeOff | None = None, epsilon: float | None = 9.0, **changes: Any) -> list[str]:
    return _cautions(record(epsilon=epsilon, **changes), epsilon, curve)


def test_cautions_in_their_order() -> None:
    def found(*starts: str, **changes: Any) -> bool:
        told = cautions(**changes)
        return len(told) == len(starts) and all(map(str.startswith, told, starts))

    assert cautions() == [] and cautions(cautions=None) == []
    assert cautions(cautions=["one", "two", "one"]) == ["one", "two"]
    assert found(SEED, "one", cautions=["one"], reproducible_noise=True)
    assert found(AUDIT, SEED, "one", cautions=["one"], reproducible_noise=True, audit={"violated": True})
    assert found(audit={"violated": False}) and found(audit="not made") and found(audit={})
    assert found(LOST, epsilon=None) and found(epsilon=None, trust="none")
    assert found("one", PUBLIC, data_public=True, cautions=["one"])
    made = record()
    made["run"]["dirty"] = True
    assert [text[:43] for text in _cautions(made, 1.0, None)] == [DIRTY]
    assert isinstance(cautions(cautions=["one"]), list)


def test_a_weak_protection_is_cautioned_against_once() -> None:
    weak = TradeOff(((9.0, 1e-5),), own=False)
    (said,) = cautions(weak)
    assert said.startswith(f"{WEAK}, epsilon 9 at delta 1e-05: ")
    assert cautions(weak, cautions=["something else"]) == ["something else", said]
    assert cautions(weak, cautions=["one", f"{WEAK}, said"]) == ["one", f"{WEAK}, said"]
    assert cautions(OWN) == []


# --- the parts of the page


def test_the_guarantee_line_by_line() -> None:
    made = record(unit="person", records_per_unit=8, epsilon_rdp=3.36789)
    lines = _guarantee(statement_json(made))
    assert lines[1] == "At most 8 records of a person enter one step."
    assert lines[2] == "Adjacency: add or remove one person."
    assert lines[4].endswith("epsilon 3.368.")
    assert re.fullmatch(
        r"As zero-concentrated DP: rho 30 \(.+\)\. As Gaussian DP: mu [\d.]{4,6} \(.+\)\.", lines[5]
    )
    assert lines[6] == strength(privacy(unit="person"), OWN)
    assert len(_guarantee(statement_json(record(records_per_unit=8)))) == 6, "records a person: for persons"
    assert "epsilon none." in _guarantee(statement_json(record(epsilon_rdp=None)))[3]


def test_a_picture_is_shown_where_there_is_one() -> None:
    assert "![" not in statement_markdown(record()) and "](a.svg)" in statement_markdown(record(), "a.svg")


def test_numbers_of_evaluation_and_noise_are_short() -> None:
    about = {**ABOUT, "noise_multiplier": 4.123456, "epsilon": 0.712345}
    assert _evaluation(None) == []
    (line,) = _evaluation(about)
    assert "a share of 0.2 of its units and once releases two counts (noise multiplier 4.123, " in line
    assert "one vote a record). By itself that is epsilon 0.7123;" in line
    made = statement_json(record(max_grad_norm=0.7123456, noise_multiplier=1.23456))["mechanism"]
    assert _noise(made) == (
        "Noise multiplier (standard deviation over clipping norm): 1.235; clipping norm (L2): 0.7123; "
        "accounted steps: 60."
    )
    groups = statement_json(record(max_grad_norm=2.0, head_norm=3.5, head_share=0.25))["mechanism"]
    assert "(L2): 2 (the head is clipped at 3.5 and scaled to 1, the rest clipped at 1.732: " in _noise(
        groups
    )
    matrix = {"num_rounds": 6, "bands": 2, "min_separation": 3}
    root = BandedRoot(**matrix)
    line = _noise({**made, "matrix": matrix})
    assert "(standard deviation over the sensitivity of the whole run): 1.235; sensitivity: " in line
    assert f"{root.sensitivity():.4g} clipping norms, for {root.participations} of 6 rounds" in line


def test_tables_of_nodes_and_of_other_uses() -> None:
    entry = {"node": "a", "epsilon": 1.23456, "delta": 1e-5, "releases": 3}
    assert _per_node({"per_node": [entry], "left_out": {}}) == (
        "| node | epsilon | delta | releases |\n| --- | --- | --- | --- |\n| a | 1.235 | 1e-05 | 3 |"
    )
    assert "| none |" in _per_node({"per_node": [{**entry, "epsilon": None}], "left_out": {}})

    def uses(*entries: dict[str, Any], unit: str = "record") -> list[str]:
        return _other_uses({"other_uses": list(entries), "unit": {"name": unit}}).split("\n\n")

    assert uses()[0].startswith("The record does not say what else this data was used for.")
    table, composed, several = uses(use(unit="person"))
    assert table == (
        "| node | data set | releases of this shard | epsilon over all uses | delta | for one |\n"
        "| --- | --- | --- | --- | --- | --- |\n| n | d | 9 | 4.9 | 1e-05 | person |"
    )
    assert composed.startswith("Composed over everything") and several.startswith("Several runs together")
    silent = use(dataset=None, releases=None, epsilon=None)
    table, unknown, several = uses(silent)
    assert table.endswith("| n | unknown | unknown | unknown | 1e-05 | unknown |")
    assert unknown.startswith("**Unknown**") and several.startswith("Several runs together")
    assert [part[:10] for part in uses(use(), silent)[1:]] == ["**Unknown*", "Composed o", "Several ru"]
    finer = uses(use(unit="record"), unit="person")[1:]
    assert [part[:10] for part in finer] == ["Composed o", "They are f", "Several ru"]
    assert "for one record, which is all" in finer[1] and "For one person there is no total" in finer[1]
    assert uses(use(epsilon=None))[0].endswith("| n | d | 9 | infinite | 1e-05 | unknown |")
    assert "infinite" not in uses(use(epsilon=None, releases=0))[0]


def test_the_audit_names_its_best_bound() -> None:
    assert _audit(None).startswith("Not audited.") and _audit("by hand") == "by hand"
    bounds = [{"method": "one-run", "epsilon_lower": 0.1}, {"method": "two-sample", "epsilon_lower": 0.25},
              {"method": "none"}]  # fmt: skip
    text = _audit({"epsilon_lower": 0.256789, "audited": "model", "bounds": bounds})
    assert text.startswith(
        "An attack on this run's model (two-sample bound) shows that epsilon is at least 0.2568. A lower"
    )
    alone = _audit({"epsilon_lower": 0.2, "confidence": 0.95})
    assert alone.startswith(
        "An attack on this run's mechanism (unnamed bound) shows that epsilon is at least 0.2 with 95 percent"
    )
    assert "What was attacked is the sampler" in _audit(
        {"audited": "mechanism"}
    ) and "at least none" in _audit({"audited": "mechanism"})


def test_how_to_check() -> None:
    made = record()
    made["run"]["versions"] = {"torch": "2", "fedtune": "1"}
    lines = _transparency(statement_json(made))
    assert lines[0] == "Code: fedtune, open source, commit abc1234."
    assert lines[1] == "Versions: fedtune 1, torch 2."
    assert "`fedtune budget verify` checks the ledgers" in lines[3]
    made["run"] |= {"commit": None, "dirty": True, "engine": "deployment"}
    lines = _transparency(statement_json(made))
    assert lines[0] == "Code: fedtune, open source, commit unknown with uncommitted changes."
    assert "`fedtune node proof --config node.yaml` checks, at each site, its books" in lines[3]
