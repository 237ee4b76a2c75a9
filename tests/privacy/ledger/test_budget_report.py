"""`fedtune budget`: readable on a terminal, exact as JSON, and a status that a script can trust."""

from __future__ import annotations

import json
import math
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from fedtune.cli import budget_command as budget
from fedtune.config.files import state_dir
from fedtune.errors import BudgetExhausted, LedgerError, PrivacyError
from fedtune.privacy.accounting.epsilon import Term, epsilon_of_terms
from fedtune.privacy.ledger.budget import Budgets, PrivacyBudget, read_budgets, write_budgets
from fedtune.privacy.ledger.ledger import PrivacyLedger
from fedtune.privacy.ledger.simulation import simulation_ledger
from tests.support.golden import Golden
from tests.support.plans import local_plan, public_plan


def folder() -> Path:
    return state_dir() / "ledgers"


def release(node: str, rounds: int = 2, plan: Any = None, **changes: Any) -> PrivacyLedger:
    ledger = PrivacyLedger.open(folder() / f"{node}.sqlite")
    values = {"dataset": "visits", "fingerprint": "f1", "run": "run-1", **changes}
    for round in range(rounds):
        reservation = ledger.reserve(node=node, round=round, plan=plan or local_plan(), **values)
        if round < rounds - 1:
            ledger.commit(reservation)
    return ledger


def main(action: str, **given: Any) -> int:
    """Runs `fedtune budget ACTION`; returns its exit status."""
    commands = {
        "show": budget.show,
        "set": budget.set_budget,
        "history": budget.history,
        "verify": budget.verify,
    }
    call: Any = commands[action]
    return int(call(**given))


def run(capsys: pytest.CaptureFixture[str], action: str, **given: Any) -> tuple[int, Any]:
    status = main(action, json=True, **given)
    return status, json.loads(capsys.readouterr().out)


def test_show_is_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    release("a")
    release("b", rounds=3, dataset="calls", fingerprint="f2")
    status, entries = run(capsys, "show")
    assert status == 0
    assert {(e["node"], e["dataset"], e["fingerprint"], e["releases"]) for e in entries} == {
        ("a", "visits", "f1", 2),
        ("b", "calls", "f2", 3),
    }
    for entry in entries:
        assert {"dataset", "fingerprint", "epsilon", "delta", "budget_epsilon", "releases"} <= set(entry)
        assert entry["budget_epsilon"] is None
        assert entry["unfinished"] == 1
        steps = {Term(0.05, 1.0): 5 * entry["releases"]}
        assert entry["epsilon"] == epsilon_of_terms(steps, entry["delta"])
    assert run(capsys, "show", node="a")[1] == [entries[0]]
    assert run(capsys, "show", dataset="calls")[1] == [entries[1]]


def test_show_says_what_was_allowed(capsys: pytest.CaptureFixture[str]) -> None:
    release("a")
    assert run(capsys, "set", epsilon=3.0, delta=1e-6, node="a")[0] == 0
    (entry,) = run(capsys, "show")[1]
    assert (entry["budget_epsilon"], entry["delta"]) == (3.0, 1e-6)
    assert entry["epsilon"] == epsilon_of_terms({Term(0.05, 1.0): 10}, 1e-6)


def test_infinity_is_null_and_said_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    release("a", plan=public_plan())
    assert run(capsys, "show")[1][0]["epsilon"] is None
    assert main("show") == 0
    assert "infinite" in capsys.readouterr().out


def test_a_terminal_gets_aligned_columns_and_the_caveat(capsys: pytest.CaptureFixture[str]) -> None:
    release("a")
    main("show")
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert " ".join(lines[0].split()) == "node data set fingerprint unit epsilon budget delta releases"
    assert lines[1].index("visits") == lines[0].index("data set")
    assert "2 (1 unfinished)" in lines[1]
    assert "upper bound" in out and max(map(len, lines[:2])) <= 110


def test_nothing_yet_is_said_and_is_no_failure(capsys: pytest.CaptureFixture[str]) -> None:
    for action, found in (("show", []), ("history", []), ("verify", [])):
        assert run(capsys, action) == (0, found)
    main("show")
    assert "No ledger knows of a release" in capsys.readouterr().out


def test_history_lists_every_release(capsys: pytest.CaptureFixture[str]) -> None:
    release("a", rounds=3)
    status, entries = run(capsys, "history")
    assert status == 0
    assert [entry["round"] for entry in entries] == [0, 1, 2]
    assert [entry["finished"] for entry in entries] == [True, True, False]
    first = entries[0]
    assert (first["steps"], first["sample_rate"], first["noise_multiplier"]) == (5, 0.05, 1.0)
    main("history")
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_history_of_a_run_without_noise(capsys: pytest.CaptureFixture[str]) -> None:
    release("a", plan=public_plan())
    entry = run(capsys, "history")[1][0]
    assert (entry["steps"], entry["noise_multiplier"], entry["delta"]) == (None, 0.0, None)
    main("history")
    assert "none" in capsys.readouterr().out


def test_history_and_show_of_noise_from_the_seed(capsys: pytest.CaptureFixture[str]) -> None:
    release("a", plan=local_plan(reproducible_noise=True))
    entry = run(capsys, "history")[1][0]
    assert (entry["reproducible_noise"], entry["noise_multiplier"]) == (True, 0.0)
    main("history")
    assert "seed's" in capsys.readouterr().out
    assert run(capsys, "show")[1][0]["epsilon"] is None


def test_verify_fails_and_names_the_row(capsys: pytest.CaptureFixture[str]) -> None:
    release("a")
    ledger = release("b")
    assert run(capsys, "verify")[0] == 0
    ledger.close()
    with sqlite3.connect(ledger.path) as connection:
        connection.execute("DROP TRIGGER log_is_not_edited")
        connection.execute("UPDATE log SET run = 'x' WHERE seq = 2")
    connection.close()
    status, results = run(capsys, "verify")
    assert status == 1
    assert results[0]["problems"] == []
    assert "row 2 was changed after it was written" in results[1]["problems"]
    assert main("verify") == 1
    out = capsys.readouterr().out
    assert "a: whole" in out and "b: NOT whole" in out and "row 2" in out


def test_set_writes_the_owners_file(capsys: pytest.CaptureFixture[str]) -> None:
    release("a")
    release("b")
    run(capsys, "set", epsilon=3.0, delta=1e-6)  # every node that has a ledger
    run(capsys, "set", epsilon=1.0, delta=1e-5, node="a", dataset="visits", unit="person")
    both = read_budgets(folder() / "a.budget.json")
    assert both == Budgets(PrivacyBudget(3.0, 1e-6), {"visits": PrivacyBudget(1.0, 1e-5, "person")})
    assert read_budgets(folder() / "b.budget.json") == Budgets(PrivacyBudget(3.0, 1e-6), {})


def test_an_empty_name_sets_no_budget(capsys: pytest.CaptureFixture[str], golden: Golden) -> None:
    """It set the budget of the data set called '' and said that it was everybody's."""
    with pytest.raises(LedgerError) as raised:
        run(capsys, "set", dataset="", epsilon=3.0, delta=1e-5)
    assert "--dataset" in str(raised.value)
    golden(raised)
    assert not folder().exists() or not list(folder().iterdir())


def test_a_budget_can_be_set_before_the_first_release(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LedgerError, match="Node 'new' has no ledger of its own.*'--node simulation' sets it"):
        main("set", epsilon=3.0, delta=1e-6, node="new", dataset="visits")
    assert not list(folder().glob("*")), "nobody's budget was set in the place of that one's"
    run(capsys, "set", epsilon=3.0, delta=1e-6, node="simulation", dataset="visits")
    (entry,) = run(capsys, "show")[1]
    assert (entry["node"], entry["dataset"], entry["epsilon"], entry["releases"]) == (None, "visits", 0.0, 0)


@pytest.mark.parametrize(
    ("epsilon", "delta"),
    [(0.0, 1e-5), (-1.0, 1e-5), (math.nan, 1e-5), (math.inf, 1e-5), (None, 1e-5), (True, 1e-5),
     (1.0, 0.0), (1.0, 1.0), (1.0, math.nan), (1.0, None), (1e-5, 8.0)],
)  # fmt: skip
def test_a_budget_without_meaning_is_refused_before_a_file_is_touched(epsilon: Any, delta: Any) -> None:
    release("a")
    with pytest.raises(PrivacyError):
        main("set", epsilon=epsilon, delta=delta)
    assert not (folder() / "a.budget.json").exists()


@pytest.mark.parametrize("node", ["../escape", "", ".", "a/b"])
def test_a_node_name_is_no_path(node: str, golden: Golden) -> None:
    with pytest.raises(LedgerError) as raised:
        main("set", epsilon=1.0, delta=1e-5, node=node)
    golden(raised)


def test_an_unknown_node_is_named_with_the_known_ones() -> None:
    release("a")
    with pytest.raises(LedgerError, match=r"'b'.*Known nodes: a"):
        main("show", node="b")


def test_simulations_have_a_budget_before_their_first_release(capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "set", epsilon=1.0, delta=1e-5)
    assert read_budgets(folder() / "simulation.budget.json") == Budgets(PrivacyBudget(1.0, 1e-5), {})
    with pytest.raises(BudgetExhausted, match="budget of 1"):
        simulation_ledger(folder()).reserve(
            dataset="visits", fingerprint="f", node="a", run="r", round=0, plan=local_plan()
        )


def test_budgets_survive_the_file(tmp_path: Path) -> None:
    budgets = Budgets(None, {"ä b": PrivacyBudget(0.5, 1e-9, "client")})
    write_budgets(tmp_path / "x.json", budgets)
    assert read_budgets(tmp_path / "x.json") == budgets
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert read_budgets(tmp_path / "none.json") is None


def test_data_with_several_names_keeps_all_their_budgets() -> None:
    strict, loose = PrivacyBudget(1.0, 1e-5), PrivacyBudget(9.0, 1e-5)
    budgets = Budgets(loose, {"a": strict})
    assert budgets.of({"a"}) == [strict]
    assert budgets.of({"b"}) == [loose]
    assert budgets.of({"a", "b"}) == [strict, loose]
    assert Budgets(None, {}).of({"a"}) == []


def test_data_that_no_ledger_knows_is_answered_with_what_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    release("a")
    for action in ("show", "history"):
        assert main(action, dataset="vists") == 0
        assert "'vists' yet" in (said := capsys.readouterr().out) and "Known data sets: visits." in said
    main("set", epsilon=3.0, delta=1e-6, dataset="vists")
    assert "No release of 'vists' is known yet. Known data sets: visits." in capsys.readouterr().out
    main("set", epsilon=3.0, delta=1e-6, dataset="visits")
    assert "No release of" not in capsys.readouterr().out.splitlines()[-1]
