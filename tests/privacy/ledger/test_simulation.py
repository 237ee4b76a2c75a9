"""One ledger for all simulations, and what version 0.1 wrote for each of their nodes.

The old ledgers in `ledgers_of_0_1` were written by that version: two nodes of one run, four and six
releases of five steps each, the last of each unfinished; budgets of 6 and 8.
"""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import BudgetExhausted, LedgerError
from fedtune.privacy.accounting.epsilon import Term, epsilon_of_terms
from fedtune.privacy.accounting.filter import RunSteps, spent
from fedtune.privacy.ledger import ledger as privacy_ledger
from fedtune.privacy.ledger import simulation
from fedtune.privacy.ledger.budget import Budgets, PrivacyBudget, strictest, write_budgets
from fedtune.privacy.ledger.budget_report import find_ledgers, history, show
from fedtune.privacy.ledger.chain import Chain, Row
from fedtune.privacy.ledger.ledger import PrivacyLedger
from fedtune.privacy.ledger.simulation import simulation_ledger, take_over
from tests.support.golden import Golden
from tests.support.ledgers import identity
from tests.support.plans import local_plan

OLD = Path(__file__).parent / "ledgers_of_0_1"
PRINT = "1f" * 32  # by which version 0.1 knew the data
DELTA = 1e-5
STEP = Term(0.05, 1.0)


@pytest.fixture(autouse=True)
def looks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "_looked", set())


def write_old(path: Path, node: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with sqlite3.connect(path) as connection:
        connection.executescript((OLD / f"{node}.sql").read_text())
    connection.close()
    path.chmod(0o600)
    budget = PrivacyBudget(6.0 if node == "clinic-1" else 8.0, DELTA)
    write_budgets(path.with_suffix(".budget.json"), Budgets(budget, {}))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for node in ("clinic-1", "clinic-2"):
        write_old(tmp_path / f"{node}.sqlite", node)
    return tmp_path


def release(ledger: PrivacyLedger, data: Any, **changes: Any) -> None:
    values: dict[str, Any] = {"dataset": "visits", "node": "node-0", "run": "new", "round": 0}
    ledger.reserve(fingerprint=data, plan=local_plan(), **{**values, **changes})


def test_old_ledgers_are_taken_over_once_with_all_that_they_spent(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.glob("clinic-*")}
    ledger = simulation_ledger(folder)
    assert len(ledger.releases()) == 10 and ledger.verify()[1] == []
    assert {(one.node, one.run) for one in ledger.releases()} == {
        ("clinic-1", "run-of-old"), ("clinic-2", "run-of-old")
    }  # fmt: skip
    rows = (ledger.state().seq, ledger.state().hash)
    ledger.close()
    simulation._looked.clear()  # a new process
    assert (simulation_ledger(folder).state().seq, simulation_ledger(folder).state().hash) == rows
    assert {path.name: path.read_bytes() for path in folder.glob("clinic-*") if path.name in before} == before
    # The nodes of one run had parts of the data, whichever: a record was in one of them.
    spent_before = epsilon_of_terms({STEP: 30}, DELTA)
    for known in ({"dataset": "visits", "fingerprint": identity(range(5))},
                  {"dataset": "renamed", "fingerprint": identity(range(5), fingerprint=PRINT)}):  # fmt: skip
        assert ledger.epsilon(**known, delta=DELTA) == spent_before
    assert ledger.epsilon(dataset="renamed", fingerprint=identity(range(5)), delta=DELTA) == 0.0
    # The strictest budget of the old ones holds.
    assert ledger.budgets() == Budgets(PrivacyBudget(6.0, DELTA), {})


def test_what_the_old_version_released_after_that_is_taken_over_too(folder: Path, tmp_path: Path) -> None:
    with sqlite3.connect(folder / "clinic-1.sqlite") as connection:
        connection.execute("DROP TRIGGER log_is_not_cut")
        connection.execute("DELETE FROM log WHERE seq > 5")
        connection.execute("UPDATE sqlite_sequence SET seq = 5")
        connection.execute(
            "CREATE TRIGGER log_is_not_cut BEFORE DELETE ON log BEGIN SELECT RAISE(ABORT, 'append-only'); END"
        )
    connection.close()
    ledger = simulation_ledger(folder)
    assert len(ledger.releases(node="clinic-1")) == 2
    (folder / "clinic-1.sqlite").unlink()
    write_old(folder / "clinic-1.sqlite", "clinic-1")
    simulation._looked.clear()
    assert len(simulation_ledger(folder).releases(node="clinic-1")) == 4
    assert ledger.verify()[1] == []


def test_a_record_that_is_linked_to_old_releases_takes_them_into_other_data(folder: Path) -> None:
    ledger = simulation_ledger(folder)
    ledger.set_budget(PrivacyBudget(50.0, DELTA))
    release(ledger, identity(range(10)))
    export = {"dataset": "2026-02", "fingerprint": identity(range(9, 30))}
    assert ledger.epsilon(**export, delta=DELTA) == spent(
        [RunSteps({STEP: 30}, None), RunSteps({STEP: 5}, None)], DELTA
    )


def test_an_old_budget_is_not_refilled(folder: Path) -> None:
    ledger = simulation_ledger(folder)
    ledger.set_budget(PrivacyBudget(2.0, DELTA))
    for data in (identity(range(5)), identity(range(5), fingerprint=PRINT)):
        with pytest.raises(BudgetExhausted, match=r"from 2\.944 to 3\.141, over its budget of 2"):
            release(ledger, data)


@pytest.mark.parametrize(
    "damage", ["UPDATE log SET time = '1999' WHERE seq = 3", "DELETE FROM log WHERE seq = 4"]
)
def test_an_old_ledger_that_was_edited_is_refused_and_nothing_is_half_taken_over(
    folder: Path, damage: str, golden: Golden
) -> None:
    path = folder / "clinic-2.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TRIGGER log_is_not_cut")
        connection.execute("DROP TRIGGER log_is_not_edited")
        connection.execute(damage)
    connection.close()
    for _ in range(2):
        with pytest.raises(LedgerError) as raised:
            simulation_ledger(folder)
        assert "clinic-2.sqlite" in str(raised.value)
        golden(raised)
    path.unlink()
    write_old(path, "clinic-2")
    assert len(simulation_ledger(folder).releases()) == 10


def test_a_take_over_that_fails_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise LedgerError("the disk is full")

    monkeypatch.setattr(simulation, "write_budgets", full)
    with pytest.raises(LedgerError, match="full"):
        simulation_ledger(folder)
    assert PrivacyLedger(folder / "simulation.sqlite").releases() == []
    monkeypatch.undo()
    monkeypatch.setattr(simulation, "_looked", set())
    assert len(simulation_ledger(folder).releases()) == 10


def test_a_real_node_goes_on_in_its_own_ledger_with_its_old_rows(tmp_path: Path) -> None:
    path = write_old(tmp_path / "state" / "ledger.sqlite", "clinic-1")
    ledger = PrivacyLedger.open(path, require_budget=True)
    data = identity(range(30), fingerprint=PRINT)
    assert ledger.epsilon(dataset="visits", fingerprint=data, delta=DELTA) == epsilon_of_terms(
        {STEP: 20}, DELTA
    )
    release(ledger, data, node="clinic-1")
    assert ledger.verify()[1] == [] and len(ledger.releases()) == 5
    both = spent([RunSteps({STEP: 20}, None), RunSteps({STEP: 5}, None)], DELTA)
    fresh = PrivacyLedger(path, require_budget=True)
    # Every record of it, under whatever name; others under the old name; others under another name not.
    assert fresh.epsilon(dataset="x", fingerprint=identity([7, 99]), delta=DELTA) == both
    assert fresh.epsilon(dataset="visits", fingerprint=identity([98, 99]), delta=DELTA) == epsilon_of_terms(
        {STEP: 20}, DELTA
    )
    assert fresh.epsilon(dataset="x", fingerprint=identity([98, 99]), delta=DELTA) == 0.0
    # The version that knew no keys must not write to it any more.
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA application_id").fetchone() != (0x66746C67,)
    connection.close()


def test_a_ledger_of_a_real_node_in_the_same_folder_is_left_alone(folder: Path) -> None:
    own = PrivacyLedger(folder / "hospital.sqlite")
    own.reserve(
        dataset="d", fingerprint=identity(range(3)), node="hospital", run="r", round=0, plan=local_plan()
    )
    own.close()
    assert len(simulation_ledger(folder).releases()) == 10
    paths, _ = find_ledgers(folder)
    assert [path.stem for path in paths] == ["simulation", "hospital"]
    assert find_ledgers(folder, "hospital") == ([folder / "hospital.sqlite"], None)
    assert find_ledgers(folder, "clinic-2") == ([folder / "simulation.sqlite"], "clinic-2")


def test_show_says_which_nodes_and_under_which_keyed_id(tmp_path: Path) -> None:
    ledger = simulation_ledger(tmp_path)
    data = identity(range(9))
    release(ledger, data, node="a")
    release(ledger, data, node="b", run="other")
    release(ledger, identity(range(100, 109)), node="a", run="third", dataset="letters")
    entries = show([ledger.path]).json
    assert [(one["dataset"], one["nodes"], one["node"], one["releases"]) for one in entries] == [
        ("letters", ["a"], "a", 1), ("visits", ["a", "b"], None, 2)
    ]  # fmt: skip
    assert entries[1]["fingerprint"] == ledger.known_as(data) and len(entries[1]["fingerprint"]) == 32
    assert [one["dataset"] for one in show([ledger.path], node="b").json] == ["visits"]
    assert [one["node"] for one in history([ledger.path], node="b").json] == ["b"]
    # What is shown stays where a lost secret cannot be checked.
    ledger.close()
    ledger.secret_path.unlink()
    assert show([ledger.path]).json == entries


def test_budgets_of_before_are_kept_all_at_once() -> None:
    a = Budgets(PrivacyBudget(3.0, 1e-5), {"x": PrivacyBudget(1.0, 1e-4, "person")})
    b = Budgets(None, {"y": PrivacyBudget(2.0, 1e-6), "x": PrivacyBudget(4.0, 1e-5)})
    assert strictest(a, b) == Budgets(
        PrivacyBudget(3.0, 1e-5), {"x": PrivacyBudget(1.0, 1e-5, "person"), "y": PrivacyBudget(2.0, 1e-6)}
    )
    assert strictest(a, Budgets(None, {})) == a


def test_a_copy_of_the_folder_has_secret_and_keys(tmp_path: Path) -> None:
    ledger = simulation_ledger(tmp_path / "a")
    release(ledger, identity(range(9)))
    ledger.close()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    copy = simulation_ledger(tmp_path / "b")
    assert copy.epsilon(dataset="x", fingerprint=identity([3]), delta=DELTA) > 0.0


@pytest.mark.parametrize("how", ["gone", "empty"])
def test_pitfall_34_a_ledger_that_is_lost_is_not_begun_anew(tmp_path: Path, how: str, golden: Golden) -> None:
    ledger = simulation_ledger(tmp_path)
    ledger.set_budget(PrivacyBudget(8.0, DELTA))
    ledger.close()
    simulation_ledger(tmp_path).close()
    for side in tmp_path.glob("simulation.sqlite-*"):
        side.unlink()
    if how == "gone":
        ledger.path.unlink()
    else:
        ledger.path.write_bytes(b"")
    with pytest.raises(LedgerError) as raised:
        simulation_ledger(tmp_path)
    assert "simulation.budget.json" in str(raised.value)
    golden(raised)
    ledger.budget_path.unlink()
    ledger.secret_path.unlink()
    if how == "empty":
        ledger.path.unlink()
    privacy_ledger._opened.clear()  # another process, which never saw it
    assert simulation_ledger(tmp_path).state().seq == 0


# --- a take-over, part by part -----------------------------------------------------------------------


def rows_of(path: Path) -> list[Row]:
    chain = Chain(path)
    with chain.reading() as connection:
        assert connection is not None
        rows = chain.audit(connection)[0]
    chain.close()
    return rows


def budget_rows(folder: Path) -> list[dict[str, Any]]:
    return [row.body for row in rows_of(folder / "simulation.sqlite") if row.kind == "budget"]


def test_a_take_over_says_how_many_releases_were_new(folder: Path) -> None:
    ledger = PrivacyLedger.open(folder / "simulation.sqlite", shared=True)
    counts = [take_over(ledger, folder / f"{name}.sqlite") for name in ("clinic-1", "clinic-2", "clinic-1")]
    assert counts == [4, 6, 0]


def test_a_process_looks_for_old_ledgers_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[str] = []
    monkeypatch.setattr(simulation, "take_over", lambda _, path: met.append(path.stem))
    for _ in range(2):
        simulation_ledger(folder)
    assert met == ["clinic-1", "clinic-2"]
    (folder / "more").mkdir()
    simulation_ledger(folder / "more")
    for number in range(20, 0, -1):
        (folder / "more" / f"n{number:02}.sqlite").touch()
    assert [one.stem for one in simulation._others(folder / "more")] == [f"n{i:02}" for i in range(1, 21)]


def test_the_strictest_budget_is_in_the_ledger_too(folder: Path, golden: Golden) -> None:
    write_budgets(
        folder / "clinic-2.budget.json", Budgets(None, {"visits": PrivacyBudget(5.0, DELTA, "person")})
    )
    ledger = simulation_ledger(folder)
    default = {"dataset": None, "epsilon": 6.0, "delta": DELTA}
    own = {"dataset": "visits", "epsilon": 5.0, "delta": DELTA, "unit": "person"}
    assert budget_rows(folder) == [default, default, own]
    ledger.budget_path.unlink()
    with pytest.raises(LedgerError) as raised:
        ledger.budgets()
    golden(raised)


@pytest.mark.parametrize("how", ["gone", "damaged"])
def test_an_old_budget_without_its_file_is_that_of_the_rows(folder: Path, how: str) -> None:
    for node in ("clinic-1", "clinic-2"):
        path = folder / f"{node}.budget.json"
        if how == "gone":
            path.unlink()
        else:
            path.write_text("{")
    assert simulation_ledger(folder).budgets() == Budgets(PrivacyBudget(6.0, DELTA), {})


def test_old_ledgers_without_a_budget_set_none(folder: Path) -> None:
    for node in ("clinic-1", "clinic-2"):
        write_budgets(folder / f"{node}.budget.json", Budgets(None, {}))
    ledger = simulation_ledger(folder)
    assert not ledger.budget_path.exists() and budget_rows(folder) == []


def test_an_old_ledger_whose_rows_contradict_one_another_is_refused(folder: Path) -> None:
    path = folder / "clinic-2.sqlite"
    last = rows_of(path)[-1]
    with sqlite3.connect(path) as connection:  # whole as a chain
        Chain(path).append(connection, "committed", {"reservation": 99}, run="r", previous=last.hash)
    connection.close()
    with pytest.raises(LedgerError, match=r"cannot be trusted \(row \d+ finishes release 99, which nothing"):
        simulation_ledger(folder)
