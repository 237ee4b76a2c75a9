"""What a ledger writes, answers and remembers, on a few releases that are counted by hand."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import BudgetExhausted, LedgerError, PrivacyError
from fedtune.privacy.accounting.epsilon import Term, epsilon_of_terms
from fedtune.privacy.accounting.filter import RunSteps, spent
from fedtune.privacy.ledger import ledger as module
from fedtune.privacy.ledger.budget import Budgets, PrivacyBudget
from fedtune.privacy.ledger.chain import Chain, Row
from fedtune.privacy.ledger.identity import make_secret
from fedtune.privacy.ledger.ledger import AskedRelease, PrivacyLedger, Reservation
from tests.support.golden import Golden
from tests.support.ledgers import identity
from tests.support.plans import local_plan, public_plan

STEP = Term(0.05, 1.0)
DELTA = 1e-5


def head(ledger: PrivacyLedger) -> tuple[int, str]:
    """Number and hash of the last row."""
    state = ledger.state()
    return state.seq, state.hash


@pytest.fixture
def ledger(tmp_path: Path) -> PrivacyLedger:
    return PrivacyLedger(tmp_path / "clinic.sqlite")


def reserve(ledger: PrivacyLedger, **changes: Any) -> Reservation:
    values: dict[str, Any] = {
        "dataset": "visits", "fingerprint": "f1", "node": "clinic", "run": "run-1", "round": 0,
        "plan": local_plan(),
    }  # fmt: skip
    return ledger.reserve(**{**values, **changes})


def rows_of(ledger: PrivacyLedger) -> list[Row]:
    chain = Chain(ledger.path)
    with chain.reading() as view:
        rows = [] if view is None else chain.audit(view)[0]
    chain.close()
    return rows


def test_the_row_of_a_release(ledger: PrivacyLedger) -> None:
    first = reserve(ledger, public=True)
    second = reserve(ledger, round=1, node="clinic", public=True)
    rows = rows_of(ledger)
    body = {
        "dataset": "visits", "fingerprint": "f1", "node": "clinic", "round": 0, "public": True,
        "trust": "local", "unit": "record", "delta": DELTA, "num_rounds": 12, "reproducible_noise": False,
        "purpose": "training",
    }  # fmt: skip
    assert {k: rows[0].body[k] for k in body} == body
    assert rows[0].body["planned"] == [[0.05, 1.0, 60]] and "planned" not in rows[1].body
    assert rows[1].body["round"] == 1
    assert [(row.kind, row.run) for row in rows] == [("reserved", "run-1")] * 2
    assert first == Reservation(1, rows[0].hash, "clinic", "run-1", 0, 1)
    assert second == Reservation(2, rows[1].hash, "clinic", "run-1", 1, 2)
    assert head(ledger) == (2, rows[1].hash) and ledger.state().node == "clinic"
    assert ledger.verify() == (2, [])


def test_what_a_run_without_noise_plans(ledger: PrivacyLedger) -> None:
    reserve(ledger, plan=public_plan())
    assert rows_of(ledger)[0].body["planned"] is None
    assert module.as_planned({Term(1.0, 3.0): 2, STEP: 5}) == [[0.05, 1.0, 5], [1.0, 3.0, 2]]


def test_a_ledger_that_nobody_wrote_to(ledger: PrivacyLedger) -> None:
    assert ledger.verify() == (0, []) and ledger.releases() == [] and ledger.state().node is None
    assert head(ledger) == (0, "0" * 64) and ledger.budgets() == Budgets(None, {})
    assert ledger.epsilon(dataset="visits", fingerprint="f1", delta=DELTA) == 0.0
    assert ledger.budget(dataset="visits") is None
    assert not ledger.path.exists()
    assert (ledger.budget_path.name, ledger.secret_path.name) == ("clinic.budget.json", "clinic.key")


def test_names_and_rounds_of_a_release(ledger: PrivacyLedger, golden: Golden) -> None:
    for name in ("dataset", "fingerprint", "node", "run"):
        for value in ("", None):
            with pytest.raises(PrivacyError, match=f"needs a {name}: a text"):
                reserve(ledger, **{name: value})
    with pytest.raises(PrivacyError) as raised:
        reserve(ledger, run=3)
    golden(raised)
    for round in (-1, True, 1.0, None):
        with pytest.raises(PrivacyError, match="round must be a whole number of 0 or more"):
            reserve(ledger, round=round)
    assert not ledger.path.exists()


def test_which_releases(ledger: PrivacyLedger) -> None:
    ledger = PrivacyLedger(ledger.path, shared=True)
    first = reserve(ledger)
    reserve(ledger, dataset="calls", fingerprint="f2", run="run-2")
    reserve(ledger, node="other", run="run-3")
    ledger.commit(first)
    ledger.commit(first)
    assert [row.kind for row in rows_of(ledger)] == ["reserved"] * 3 + ["committed"]
    assert rows_of(ledger)[3].body == {"reservation": 1} and rows_of(ledger)[3].run == "run-1"

    def found(**asked: Any) -> list[int]:
        return [release.seq for release in ledger.releases(**asked)]

    assert found() == [1, 2, 3]
    assert found(dataset="visits") == [1, 3] and found(fingerprint="f2") == [2]
    assert found(run="run-2") == [2] and found(node="clinic") == [1, 2]
    assert found(dataset="visits", node="other") == [3] and found(dataset="calls", node="other") == []
    assert found(purpose="training") == [1, 2, 3] and found(purpose="evaluation") == []
    assert [release.committed for release in ledger.releases()] == [True, False, False]
    assert [release.committed for release in ledger.releases(run="run-1")] == [True]


def test_a_reservation_is_known_by_its_hash(ledger: PrivacyLedger, golden: Golden) -> None:
    made = reserve(ledger)
    for other in (dataclasses.replace(made, hash="x"), dataclasses.replace(made, seq=2)):
        with pytest.raises(LedgerError) as raised:
            ledger.commit(other)
        golden(raised)
    assert head(ledger)[0] == 1


def test_one_object_a_file_and_way_to_use_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_opened", {})
    path = tmp_path / "a.sqlite"
    first = PrivacyLedger.open(path)
    assert PrivacyLedger.open(path) is first
    assert PrivacyLedger.open(path, require_budget=True) is not first
    assert PrivacyLedger.open(path, shared=True) is not first
    assert (first._require_budget, first._shared) == (False, False)
    assert PrivacyLedger.open(path, shared=True)._shared is True
    assert PrivacyLedger.open(path, require_budget=True)._require_budget is True
    closed: list[str] = []
    monkeypatch.setattr(PrivacyLedger, "close", lambda self: closed.append(self.path.name))
    for i in range(13):
        PrivacyLedger.open(tmp_path / f"{i}.sqlite")
    assert len(module._opened) == 16 and closed == []
    PrivacyLedger.open(tmp_path / "one more.sqlite")
    assert len(module._opened) == 16 and closed == ["a.sqlite"]
    assert PrivacyLedger.open(path) is not first  # it was the first to go


def test_two_nodes(ledger: PrivacyLedger, golden: Golden) -> None:
    reserve(ledger)
    with pytest.raises(LedgerError) as raised:
        reserve(ledger, node="other", run="run-2")
    assert "'clinic'" in str(raised.value)
    assert "'other'" in str(raised.value)
    golden(raised)
    reserve(PrivacyLedger(ledger.path, shared=True), node="other", run="run-2")


def test_budgets_of_all_and_of_one(ledger: PrivacyLedger) -> None:
    a, b, c = PrivacyBudget(30.0, DELTA), PrivacyBudget(20.0, DELTA), PrivacyBudget(40.0, DELTA)
    ledger.set_budget(b, dataset="visits")
    ledger.set_budget(a)
    assert ledger.budgets() == Budgets(a, {"visits": b})
    ledger.set_budget(c)
    ledger.set_budget(c, dataset="calls")
    assert ledger.budgets() == Budgets(c, {"visits": b, "calls": c})
    assert ledger.budget(dataset="visits") == b and ledger.budget(dataset="x") == c
    assert [row.body["dataset"] for row in rows_of(ledger)[1:]] == ["visits", None, None, "calls"]
    reserve(ledger, dataset="calls")
    # Known under both names by its print: the strictest of both.
    reserve(ledger, run="run-2")
    assert ledger.budget(dataset="calls", fingerprint="f1") == b and ledger.budget(dataset="calls") == c


def test_delta_is_the_budgets_or_the_smallest_that_was_planned(ledger: PrivacyLedger) -> None:
    reserve(ledger)
    reserve(ledger, run="run-2", plan=local_plan(delta=1e-6))
    two = [RunSteps({STEP: 5}, {STEP: 60})] * 2
    of = {"dataset": "visits", "fingerprint": "f1"}
    assert ledger.epsilon(**of) == pytest.approx(ledger.epsilon(**of, delta=1e-6))
    assert ledger.epsilon(**of, delta=1e-4) == pytest.approx(spent(two, 1e-4))
    assert ledger.epsilon(**of, run="run-1", delta=1e-4) == pytest.approx(epsilon_of_terms({STEP: 5}, 1e-4))
    ledger.set_budget(PrivacyBudget(9.0, 1e-4))
    assert ledger.epsilon(**of) == pytest.approx(ledger.epsilon(**of, delta=1e-4))
    # One run is asked for at what it was planned with.
    assert ledger.epsilon(**of, run="run-1") == pytest.approx(epsilon_of_terms({STEP: 5}, 1e-6))


def test_what_is_left_of_a_run(ledger: PrivacyLedger) -> None:
    plans = [local_plan(num_rounds=3), local_plan(num_rounds=3, unit="person", noise_multiplier=2.0)]
    state, request = ledger._request("clinic", "run-1", plans[:1])
    assert (request.run, request.plan, request.steps) == ("run-1", plans[0], {"record": {STEP: 15}})
    assert request.planned == {STEP: 15} and state is ledger.state()
    reserve(ledger, plan=plans[0])
    ledger.commit(reserve(ledger, plan=plans[0], round=1))
    assert ledger._request("clinic", "run-1", plans[:1])[1].steps == {"record": {STEP: 5}}
    assert ledger._request("other", "run-1", plans[:1])[1].steps == {"record": {STEP: 15}}
    assert ledger._request("clinic", "run-2", plans[:1])[1].steps == {"record": {STEP: 15}}
    assert ledger._request("clinic", "run-2", [plans[0]] * 2)[1].steps == {"record": {STEP: 30}}
    both = ledger._request("clinic", "run-2", plans)[1]
    assert both.steps == {"record": {STEP: 15}, "person": {Term(0.05, 2.0): 15}}
    assert both.planned == {STEP: 15, Term(0.05, 2.0): 15}
    reserve(ledger, plan=plans[0], round=2)
    assert ledger._request("clinic", "run-1", [local_plan(num_rounds=1)])[1].steps == {"record": {}}
    # What the first release named, whatever is said later.
    assert ledger._request("clinic", "run-1", [local_plan(num_rounds=99)])[1].planned == {STEP: 15}


def test_a_whole_run_is_looked_at_and_nothing_written(ledger: PrivacyLedger) -> None:
    plan = local_plan(num_rounds=3)
    of: dict[str, Any] = {"dataset": "visits", "fingerprint": "f1", "node": "clinic"}
    reserve(ledger, plan=plan)
    ledger.set_budget(PrivacyBudget(epsilon_of_terms({STEP: 15}, DELTA) * 1.01, DELTA))
    rows = head(ledger)
    ledger.check_run(**of, run="run-1", plans=[plan])
    with pytest.raises(BudgetExhausted):
        ledger.check_run(**of, run="run-2", plans=[local_plan(num_rounds=60)])
    now, then = ledger.outlook(**of, run="run-1", plans=[plan], delta=DELTA)
    assert now == pytest.approx(epsilon_of_terms({STEP: 5}, DELTA))
    assert then == pytest.approx(epsilon_of_terms({STEP: 15}, DELTA))
    now, then = ledger.outlook(**of, run="run-2", plans=[plan], delta=DELTA)
    assert now == pytest.approx(epsilon_of_terms({STEP: 5}, DELTA))
    assert then == spent([RunSteps({STEP: 5}, {STEP: 15}), RunSteps({STEP: 15}, {STEP: 15})], DELTA)
    fresh = PrivacyLedger(ledger.path.with_name("fresh.sqlite"))
    assert fresh.outlook(**of, run="run-1", plans=[plan], delta=DELTA) == (
        0.0, epsilon_of_terms({STEP: 15}, DELTA)
    )  # fmt: skip
    assert head(ledger) == rows and not fresh.path.exists()


def test_data_with_keys_is_known_by_its_set(ledger: PrivacyLedger) -> None:
    data = identity(range(5))
    before = ledger.known_as(data)
    assert not ledger.secret_path.exists()  # asking makes no secret
    reserve(ledger, fingerprint=data)
    reserve(ledger, fingerprint=data, round=1)
    known = ledger.known_as(data)
    assert known != before and ledger.known_as("f1") == "f1"
    kinds = [row.kind for row in rows_of(ledger)]
    assert kinds == ["secret", "set", "reserved", "reserved"]
    assert rows_of(ledger)[2].body["fingerprint"] == known
    assert set(rows_of(ledger)[0].body) == {"check"}
    assert PrivacyLedger(ledger.path).known_as(data) == known
    ledger.secret_path.unlink()
    with pytest.raises(LedgerError):
        PrivacyLedger.open(ledger.path)


def test_a_process_that_knew_the_file_asks_for_it(ledger: PrivacyLedger, golden: Golden) -> None:
    reserve(ledger)
    ledger.close()
    for one in ledger.path.parent.glob("clinic.sqlite*"):
        one.unlink()
    with pytest.raises(LedgerError) as raised:
        head(ledger)
    golden(raised)
    reserve(PrivacyLedger(ledger.path), run="another")
    with pytest.raises(LedgerError, match="row 1, which this process has read, is gone or another"):
        head(ledger)


def test_the_record_that_has_spent_most_counts(ledger: PrivacyLedger) -> None:
    reserve(ledger, fingerprint=identity(range(5)))
    plan = local_plan(num_rounds=3)
    of: dict[str, Any] = {
        "dataset": "calls", "fingerprint": identity(range(4, 9)), "node": "clinic", "run": "run-2",
        "plans": [plan],
    }  # fmt: skip
    then = spent([RunSteps({STEP: 5}, {STEP: 60}), RunSteps({STEP: 15}, {STEP: 15})], DELTA)
    assert ledger.outlook(**of, delta=DELTA) == (epsilon_of_terms({STEP: 5}, DELTA), then)
    ledger.set_budget(PrivacyBudget(then * 1.001, DELTA))
    ledger.check_run(**of)
    ledger.set_budget(PrivacyBudget(then * 0.999, DELTA))
    with pytest.raises(BudgetExhausted):
        ledger.check_run(**of)
    ledger.check_run(**{**of, "fingerprint": identity(range(5, 9))})  # others, under a new name


def test_epsilon_is_that_of_the_record_that_has_spent_most(ledger: PrivacyLedger) -> None:
    reserve(ledger, fingerprint=identity(range(5)))
    for round in range(2):
        reserve(ledger, fingerprint=identity(range(5, 7)), dataset="letters", run="run-2", round=round)
    of: dict[str, Any] = {"dataset": "calls", "fingerprint": identity(range(4, 9)), "delta": DELTA}
    assert ledger.epsilon(**of) == pytest.approx(epsilon_of_terms({STEP: 10}, DELTA))
    assert ledger.epsilon(**of, run="run-1") == pytest.approx(epsilon_of_terms({STEP: 5}, DELTA))


def test_each_release_is_finished_by_itself(ledger: PrivacyLedger) -> None:
    first, second = reserve(ledger), reserve(ledger, round=1)
    ledger.commit(first)
    ledger.commit(second)
    assert [row.body.get("reservation") for row in rows_of(ledger)] == [None, None, 1, 2]


def test_a_budget_is_a_row_and_replaces_a_damaged_file(ledger: PrivacyLedger) -> None:
    ledger.budget_path.write_text("{")
    ledger.set_budget(PrivacyBudget(3.0, DELTA))
    assert [(row.kind, row.run) for row in rows_of(ledger)] == [("secret", None), ("budget", None)]
    assert ledger.budgets() == Budgets(PrivacyBudget(3.0, DELTA), {})


# --- several at once ---------------------------------------------------------------------------------


def asked(node: str, round: int, **changes: Any) -> AskedRelease:
    values: dict[str, Any] = {
        "dataset": "visits", "fingerprint": "f1", "node": node, "run": "run-1", "round": round,
        "plan": local_plan(num_rounds=2),
    }  # fmt: skip
    return AskedRelease(**(values | changes))


def test_releases_asked_at_once_are_those_asked_one_after_another(tmp_path: Path) -> None:
    wanted = [
        asked("a", 1), asked("b", 1), asked("a", 2), asked("a", 3),  # over the plan's two rounds
        asked("b", 2, plan=local_plan(num_rounds=2, noise_multiplier=9.0)),  # not what it began with
        asked("", 2), asked("c", 1, fingerprint=identity("xy")), asked("c", 2, fingerprint=identity("xy")),
    ]  # fmt: skip

    secret = tmp_path / "a.key"
    make_secret(secret)

    def answers(name: str, together: bool) -> tuple[list[Any], list[Any]]:
        ledger = PrivacyLedger(tmp_path / name / "l.sqlite", shared=True)
        ledger.secret_path.parent.mkdir()
        shutil.copy(secret, ledger.secret_path)  # by which it names sets of keys
        ledger.set_budget(PrivacyBudget(50.0, 1e-5))
        given: list[Any] = []
        if together:
            given = ledger.reserve_all(wanted)
        else:
            for one in wanted:
                try:
                    given.append(ledger.reserve(one))
                except PrivacyError as error:
                    given.append(error)
        assert ledger.verify()[1] == []
        said = [str(one) if isinstance(one, Exception) else (one.node, one.round, one.count) for one in given]
        return said, [(row.kind, row.run, row.body) for row in rows_of(ledger) if row.kind != "secret"]

    assert answers("together", True) == answers("alone", False)
    said, rows = answers("again", True)
    assert [one for one in said if isinstance(one, tuple)] == [
        ("a", 1, 1), ("b", 1, 1), ("a", 2, 2), ("c", 1, 1), ("c", 2, 2),
    ]  # fmt: skip
    assert "allows 2 releases, and 2 were made" in said[3] and "another sampling rate" in said[4]
    assert [row[0] for row in rows] == ["budget", *["reserved"] * 3, "set", *["reserved"] * 2]


def test_of_several_releases_all_are_written_or_none(
    ledger: PrivacyLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    reserve(ledger, round=0, plan=local_plan(num_rounds=9))
    before = ledger.releases()
    real = ledger._chain.append

    def fails_at_the_third(connection: Any, kind: str, body: dict[str, Any], **named: Any) -> Any:
        if body.get("round") == 3:
            raise OSError("no space left")
        return real(connection, kind, body, **named)

    several = [asked("clinic", round, plan=local_plan(num_rounds=9)) for round in (1, 2, 3)]
    with monkeypatch.context() as patch:
        patch.setattr(ledger._chain, "append", fails_at_the_third)
        with pytest.raises(LedgerError, match="no space left"):
            ledger.reserve_all(several)
    # What was counted within the transaction is forgotten with it.
    assert ledger.releases() == before and ledger.rounds(run="run-1", node="clinic") == [0]
    made = [one for one in ledger.reserve_all(several) if isinstance(one, Reservation)]
    assert [one.count for one in made] == [2, 3, 4]
    assert ledger.rounds(run="run-1", node="clinic") == [0, 1, 2, 3]
    ledger.commit_all(made)
    assert [one.committed for one in ledger.releases()] == [False, True, True, True]
    assert ledger.verify()[1] == []


# --- read at once -------------------------------------------------------------------------------------


def test_what_is_read_at_once_is_of_one_moment(ledger: PrivacyLedger) -> None:
    reserve(ledger)
    other = PrivacyLedger(ledger.path)
    asked: dict[str, Any] = {"dataset": "visits", "fingerprint": "f1", "node": "clinic", "run": "run-2"}
    with ledger.at_once():
        assert ledger.rounds(run="run-1", node="clinic") == [0] and ledger.budgets() == Budgets(None, {})
        reserve(other, round=1)
        other.set_budget(PrivacyBudget(1e-3, DELTA))
        with ledger.at_once():  # within it is the same moment
            assert ledger.rounds(run="run-1", node="clinic") == [0] and head(ledger)[0] == 1
        ledger.check_run(**asked, plans=[local_plan()])
    assert ledger.rounds(run="run-1", node="clinic") == [0, 1]
    with pytest.raises(BudgetExhausted), ledger.at_once():
        ledger.check_run(**asked, plans=[local_plan()])
    with pytest.raises(BudgetExhausted):  # what comes next is asked anew, whatever ended the last
        reserve(ledger, round=2)


def test_it_is_looked_at_once_for_all_that_is_asked(
    ledger: PrivacyLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = identity(range(5))
    reserve(ledger, fingerprint=data)
    ledger.set_budget(PrivacyBudget(50.0, DELTA))
    looks: list[str] = []
    for name in ("read_secret", "budgets_in_force"):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, real=real, name=name, **k: looks.append(name) or real(*a, **k)
        )
    asked: dict[str, Any] = {
        "dataset": "visits",
        "fingerprint": data,
        "node": "clinic",
        "plans": [local_plan()],
    }
    with ledger.at_once():
        for run in ("run-2", "run-3", "run-4"):
            ledger.check_run(**asked, run=run)
    assert looks == ["read_secret", "budgets_in_force"]
    ledger.check_run(**asked, run="run-2")
    assert looks == ["read_secret", "budgets_in_force"] * 2


def test_nothing_is_written_to_what_is_read_at_once(ledger: PrivacyLedger) -> None:
    reserve(ledger)
    with ledger.at_once():
        with pytest.raises(RuntimeError, match="written to while it is read"):
            reserve(ledger, round=1)
        assert ledger.rounds(run="run-1", node="clinic") == [0]
    assert reserve(ledger, round=1).count == 2


def test_a_ledger_that_is_not_there_yet_is_read_at_once(ledger: PrivacyLedger) -> None:
    with ledger.at_once():
        reserve(PrivacyLedger(ledger.path))
        assert ledger.rounds(run="run-1", node="clinic") == [] and head(ledger)[0] == 0
    assert head(ledger)[0] == 1
