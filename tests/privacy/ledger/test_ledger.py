"""The ledger: durable, one node's, impossible to refill by another name, and it refuses with numbers."""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fedtune.config.schema import Config
from fedtune.errors import BudgetExhausted, LedgerError, PrivacyError
from fedtune.privacy.accounting.epsilon import Term, epsilon_of_terms
from fedtune.privacy.accounting.filter import RunSteps, spent
from fedtune.privacy.ledger import allowance
from fedtune.privacy.ledger import state as ledger_state
from fedtune.privacy.ledger.allowance import steps_of
from fedtune.privacy.ledger.budget import PrivacyBudget
from fedtune.privacy.ledger.chain import Chain
from fedtune.privacy.ledger.ledger import AskedRelease, PrivacyLedger, Reservation
from fedtune.privacy.plan import PrivacyPlan, make_plan
from tests.support.golden import Golden
from tests.support.ledgers import charged, identity
from tests.support.plans import central_plan, distributed_plan, local_plan, public_plan
from tests.support.work import calls_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledgers" / "clinic.sqlite"


def reserve(ledger: PrivacyLedger, plan: PrivacyPlan | None = None, **changes: Any) -> Reservation:
    values: dict[str, Any] = {
        "dataset": "visits",
        "fingerprint": "f1",
        "node": "clinic",
        "run": "run-1",
        "round": 0,
        "plan": plan or local_plan(),
    }
    return ledger.reserve(**{**values, **changes})


def fresh(path: Path) -> PrivacyLedger:
    """As a new process sees it: nothing remembered."""
    return PrivacyLedger(path)


def edit(path: Path, statement: str, values: tuple[Any, ...] = ()) -> None:
    """A hand in the file: the locks are taken off and put back as they were."""
    with sqlite3.connect(path) as connection:
        triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        connection.execute(statement, values)
        for _, sql in triggers:
            connection.execute(sql)
    connection.close()


# --- the protocol ------------------------------------------------------------------------------------


def test_a_release_is_on_the_disk_before_reserve_returns(path: Path) -> None:
    reserve(PrivacyLedger.open(path))
    (release,) = fresh(path).releases()
    assert (release.dataset, release.node, release.run, release.round) == ("visits", "clinic", "run-1", 0)
    assert release.steps == ((Term(0.05, 1.0), 5),)
    assert not release.committed


def test_an_unfinished_release_counts_as_spent(path: Path) -> None:
    ledger = PrivacyLedger.open(path)
    reservation = reserve(ledger)
    unfinished = fresh(path).epsilon(dataset="visits", fingerprint="f1", delta=1e-5)
    assert unfinished == epsilon_of_terms({Term(0.05, 1.0): 5}, 1e-5)
    ledger.commit(reservation)
    assert fresh(path).epsilon(dataset="visits", fingerprint="f1", delta=1e-5) == unfinished


def test_commit_is_noted_once(path: Path) -> None:
    ledger = PrivacyLedger.open(path)
    reservation = reserve(ledger)
    ledger.commit(reservation)
    rows = fresh(path).verify()[0]
    fresh(path).commit(reservation)
    assert fresh(path).releases()[0].committed
    assert fresh(path).verify() == (rows, [])


def test_a_reservation_of_another_file_is_refused(path: Path, golden: Golden) -> None:
    foreign = reserve(PrivacyLedger.open(path.with_name("other.sqlite")))
    reserve(PrivacyLedger.open(path), round=1)
    with pytest.raises(LedgerError) as raised:
        PrivacyLedger.open(path).commit(foreign)
    golden(raised)
    with pytest.raises(LedgerError) as raised:
        PrivacyLedger.open(path).commit(dataclasses.replace(foreign, seq=99))
    golden(raised)


def test_epsilon_is_composed_over_all_releases_and_not_added_up(path: Path) -> None:
    ledger = PrivacyLedger.open(path)
    for run in ("a", "b"):
        for round in range(3):
            reserve(ledger, run=run, round=round)
    everything = ledger.epsilon(dataset="visits", fingerprint="f1", delta=1e-5)
    one_run = ledger.epsilon(dataset="visits", fingerprint="f1", delta=1e-5, run="a")
    # One run was fixed in advance; that another followed was chosen, so both are counted by Renyi DP.
    assert everything == spent([RunSteps({Term(0.05, 1.0): 15}, None)] * 2, 1e-5)
    assert one_run == epsilon_of_terms({Term(0.05, 1.0): 15}, 1e-5)
    assert epsilon_of_terms({Term(0.05, 1.0): 30}, 1e-5) < everything < 2 * one_run
    assert ledger.epsilon(dataset="other", fingerprint="f9") == 0.0
    assert ledger.epsilon(dataset="visits", fingerprint="f1", run="never") == 0.0


def test_a_release_without_noise_is_never_forgotten(path: Path) -> None:
    ledger = PrivacyLedger.open(path)
    reserve(ledger, public_plan(), run="first")
    reserve(ledger, run="second")
    assert fresh(path).epsilon(dataset="visits", fingerprint="f1") == math.inf
    assert fresh(path).epsilon(dataset="visits", fingerprint="f1", run="second") < math.inf


def test_a_run_makes_no_more_releases_than_its_plan_agreed_to(path: Path) -> None:
    plan = local_plan(num_rounds=3)
    ledger = PrivacyLedger.open(path)
    for attempt in range(3):
        reserve(ledger, plan, round=0)  # the same round, killed and repeated
        assert len(ledger.releases(run="run-1")) == attempt + 1
    with pytest.raises(BudgetExhausted, match=r"plan allows 3 releases, and 3\s+were made"):
        reserve(fresh(path), plan, round=1)
    # Neither a longer plan under the same name, nor a shorter one, gives room.
    with pytest.raises(BudgetExhausted, match="allows 3"):
        reserve(fresh(path), local_plan(num_rounds=100), round=1)
    reserve(fresh(path), plan, run="run-2")
    assert ledger.epsilon(dataset="visits", fingerprint="f1", run="run-1", delta=plan.delta) <= plan.epsilon()


@pytest.mark.parametrize(
    "changes",
    [
        {"dataset": ""},
        {"dataset": None},
        {"fingerprint": ""},
        {"node": ""},
        {"run": ""},
        {"run": 3},
        {"round": -1},
        {"round": True},
        {"round": 1.5},
    ],
)
def test_a_release_must_say_what_it_is(path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(PrivacyError):
        reserve(PrivacyLedger.open(path), **changes)
    assert fresh(path).releases() == []


@pytest.mark.parametrize(
    "plan", [local_plan(unit="person"), distributed_plan(), central_plan(), public_plan()]
)
def test_every_kind_of_plan_is_kept_as_its_event(path: Path, plan: PrivacyPlan) -> None:
    ledger = PrivacyLedger.open(path)
    for round in range(4):
        ledger.commit(reserve(ledger, plan, round=round))
    assert charged(fresh(path), "visits", "f1") == plan.terms(4)


def test_a_copy_of_the_one_file_has_every_release(path: Path, tmp_path: Path) -> None:
    """A backup that lacks the latest releases would give back budget that is spent."""
    ledger = PrivacyLedger.open(path)
    ledger.set_budget(PrivacyBudget(50.0, 1e-5))
    with PrivacyLedger(path)._chain.reading():  # a reader in between must not keep what comes after it back
        pass
    for count in range(1, 6):
        reserve(ledger, local_plan(num_rounds=5), round=count)
        copy = tmp_path / f"copy-{count}.sqlite"
        shutil.copyfile(path, copy)
        assert len(fresh(copy).releases()) == count and fresh(copy).verify() == (count + 2, [])
    # One that reads right now may: nobody waits for it, and the next row takes them along.
    with fresh(path)._chain.reading() as view:
        assert view is not None and view.execute("SELECT count(*) FROM log").fetchone() == (7,)
        reserve(ledger, local_plan(num_rounds=5), run="run-2", round=1)
    reserve(ledger, local_plan(num_rounds=5), run="run-2", round=2)
    shutil.copyfile(path, tmp_path / "last.sqlite")
    assert len(fresh(tmp_path / "last.sqlite").releases()) == 7


def test_every_commit_reaches_the_disk(path: Path) -> None:
    """A test cannot cut the power; it can see that SQLite was told to wait for the disk (2 is FULL)."""
    ledger = PrivacyLedger.open(path)
    reserve(ledger)
    with ledger._chain.writing() as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


# --- budgets -----------------------------------------------------------------------------------------


def test_it_refuses_with_the_numbers_and_the_way_out(path: Path) -> None:
    ledger = PrivacyLedger.open(path)
    ledger.set_budget(PrivacyBudget(2.3, 1e-5))
    made = spend(ledger, "run-1")
    with pytest.raises(BudgetExhausted) as refusal:
        reserve(ledger, round=made, plan=local_plan(num_rounds=500))
    # A run that does not fit as a whole goes as far as the filter reaches, and is told in its numbers.
    plan = {Term(0.05, 1.0): 2500}
    before, after = (
        spent([RunSteps({Term(0.05, 1.0): 5 * count}, plan)], 1e-5, 2.3) for count in (made, made + 1)
    )
    assert made > 0 and before <= 2.3 < after
    text = " ".join(str(refusal.value).split())
    assert f"node 'clinic' refuses round {made}" in text
    assert f"from {before:.4g} to {after:.4g}, over its budget of 2.3 at delta 1e-05" in text
    assert "federation.num_rounds" in text
    assert len(fresh(path).releases()) == made


def test_a_new_process_a_new_run_and_a_new_object_find_the_budget_where_it_was(path: Path) -> None:
    ledger = PrivacyLedger.open(path)
    ledger.set_budget(PrivacyBudget(2.3, 1e-5))
    made = spend(ledger, "run-1")
    with pytest.raises(BudgetExhausted):
        reserve(fresh(path), run="run-2")
    assert len(fresh(path).releases()) == made


def spend(ledger: PrivacyLedger, run: str, **changes: Any) -> int:
    made = 0
    try:
        while True:
            reserve(ledger, local_plan(num_rounds=500), run=run, round=made, **changes)
            made += 1
    except BudgetExhausted:
        return made


def test_renaming_the_data_does_not_refill_the_budget(path: Path) -> None:
    ledger = PrivacyLedger.open(path)
    ledger.set_budget(PrivacyBudget(2.3, 1e-5))
    spend(ledger, "run-1")
    with pytest.raises(BudgetExhausted):
        reserve(fresh(path), dataset="visits-renamed", run="run-2")
    with pytest.raises(BudgetExhausted):  # one record changed: same name, other fingerprint
        reserve(fresh(path), fingerprint="f2", run="run-3")


def test_names_and_fingerprints_link_through_third_ones(path: Path) -> None:
    ledger = PrivacyLedger.open(path)
    reserve(ledger, dataset="a", fingerprint="1", run="1")
    reserve(ledger, dataset="b", fingerprint="1", run="2")  # renamed
    reserve(ledger, dataset="b", fingerprint="2", run="3")  # and then changed
    reserve(ledger, dataset="z", fingerprint="9", run="4")  # something else
    together = spent([RunSteps({Term(0.05, 1.0): 5}, None)] * 3, 1e-5)
    for dataset, fingerprint in (("a", "1"), ("b", "1"), ("b", "2"), ("new", "2"), ("a", "new")):
        assert ledger.epsilon(dataset=dataset, fingerprint=fingerprint, delta=1e-5) == together
    assert ledger.epsilon(dataset="z", fingerprint="9", delta=1e-5) < together


def test_swapped_name_and_fingerprint_do_not_link_by_accident(path: Path) -> None:
    ledger = PrivacyLedger.open(path)
    reserve(ledger, dataset="a", fingerprint="b", run="1")
    assert ledger.epsilon(dataset="b", fingerprint="a") == 0.0


def test_the_strictest_budget_of_all_names_holds(path: Path, golden: Golden) -> None:
    ledger = PrivacyLedger.open(path)
    ledger.set_budget(PrivacyBudget(50.0, 1e-5))
    ledger.set_budget(PrivacyBudget(2.6, 1e-5), dataset="visits")
    made = spend(ledger, "run-1")
    assert 0 < made < 50
    with pytest.raises(BudgetExhausted) as raised:
        reserve(ledger, dataset="anything", run="run-2")  # same records, a name with a larger budget
    assert "2.6" in str(raised.value)
    golden(raised)
    reserve(ledger, dataset="anything", fingerprint="other", run="run-3")
    assert ledger.budget(dataset="anything", fingerprint="f1") == PrivacyBudget(2.6, 1e-5)
    assert ledger.budget(dataset="else") == PrivacyBudget(50.0, 1e-5)


def test_a_budget_may_ask_for_persons_to_be_protected(path: Path) -> None:
    ledger = PrivacyLedger.open(path)
    ledger.set_budget(PrivacyBudget(8.0, 1e-5, unit="person"))
    with pytest.raises(BudgetExhausted, match=r"privacy\.unit=person"):
        reserve(ledger)
    reserve(ledger, local_plan(unit="person"))


def test_a_run_without_privacy_does_not_fit_any_budget(path: Path, golden: Golden) -> None:
    ledger = PrivacyLedger.open(path)
    ledger.set_budget(PrivacyBudget(1000.0, 1e-5))
    with pytest.raises(BudgetExhausted) as raised:
        reserve(ledger, public_plan())
    assert "privacy.trust=local" in str(raised.value)
    golden(raised)


def test_noise_that_the_seed_tells_is_charged_as_none(path: Path, golden: Golden) -> None:
    """Whoever has the run's record has its seed: for the data such a release is one without noise."""
    simulated, secret = local_plan(reproducible_noise=True), local_plan()
    ledger = PrivacyLedger.open(path)
    reserve(ledger, simulated, public=True)
    assert ledger.epsilon(dataset="visits", fingerprint="f1", delta=1e-5) == math.inf
    (release,) = ledger.releases()
    assert release.steps is None and release.reproducible_noise
    # Secret noise afterwards makes it no better, and in data of its own is what it was.
    reserve(ledger, secret, run="run-2", public=True)
    assert ledger.epsilon(dataset="visits", fingerprint="f1", delta=1e-5) == math.inf
    reserve(ledger, secret, run="run-3", dataset="letters", fingerprint="f2")
    kept = ledger.epsilon(dataset="letters", fingerprint="f2", delta=1e-5)
    assert kept == epsilon_of_terms(secret.terms(1), 1e-5)
    ledger.set_budget(PrivacyBudget(1000.0, 1e-5))
    with pytest.raises(BudgetExhausted) as raised:
        reserve(ledger, simulated, run="run-4", dataset="letters", fingerprint="f2")
    assert "privacy.reproducible_noise" in str(raised.value)
    golden(raised)
    assert fresh(path).verify()[1] == []


def test_public_data_is_recorded_and_not_refused(path: Path) -> None:
    ledger = PrivacyLedger.open(path)
    ledger.set_budget(PrivacyBudget(0.1, 1e-5))
    for round in range(3):
        reserve(ledger, public_plan(), round=round, public=True)
    assert [release.public for release in fresh(path).releases()] == [True] * 3


def test_private_data_cannot_be_declared_public_afterwards(path: Path) -> None:
    ledger = PrivacyLedger.open(path)
    ledger.set_budget(PrivacyBudget(2.3, 1e-5))
    spend(ledger, "run-1")
    for name in ("visits", "renamed"):
        with pytest.raises(BudgetExhausted):
            reserve(ledger, run="run-2", dataset=name, public=True)
    ledger.set_budget(PrivacyBudget(1e-4, 1e-5), dataset="owned")
    with pytest.raises(BudgetExhausted):
        reserve(ledger, run="run-3", dataset="owned", fingerprint="o", public=True)


def test_a_real_node_releases_nothing_before_its_owner_set_a_budget(path: Path, golden: Golden) -> None:
    ledger = PrivacyLedger.open(path, require_budget=True)
    with pytest.raises(LedgerError) as raised:
        reserve(ledger)
    golden(raised)
    assert fresh(path).releases() == []
    ledger.set_budget(PrivacyBudget(8.0, 1e-5))
    reserve(ledger)


def test_a_budget_file_that_vanished_is_not_taken_for_no_budget(path: Path) -> None:
    ledger = PrivacyLedger.open(path)
    ledger.set_budget(PrivacyBudget(8.0, 1e-5))
    ledger.budget_path.unlink()
    with pytest.raises(LedgerError, match="missing"):
        reserve(fresh(path))
    assert fresh(path).releases() == []


def test_pitfall_34_a_budget_file_that_was_wound_back_is_noticed(path: Path, golden: Golden) -> None:
    ledger = PrivacyLedger.open(path)
    ledger.set_budget(PrivacyBudget(50.0, 1e-5))
    older = ledger.budget_path.read_bytes()
    ledger.set_budget(PrivacyBudget(1.0, 1e-5))
    ledger.budget_path.write_bytes(older)
    with pytest.raises(LedgerError) as raised:
        reserve(fresh(path))
    golden(raised)
    # Another data set's budget does not make the old file right.
    ledger.set_budget(PrivacyBudget(2.0, 1e-5), dataset="other")
    assert ledger.budgets().default == PrivacyBudget(1.0, 1e-5)
    assert fresh(path).releases() == []


def test_a_budget_file_anybody_may_write_is_refused(path: Path, golden: Golden) -> None:
    ledger = PrivacyLedger.open(path)
    ledger.set_budget(PrivacyBudget(8.0, 1e-5))
    assert stat.S_IMODE(ledger.budget_path.stat().st_mode) == 0o600
    ledger.budget_path.chmod(0o666)
    with pytest.raises(LedgerError) as raised:
        reserve(ledger)
    golden(raised)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"version": 1, "default": {"epsilon": NaN, "delta": 1e-5}}',
        '{"version": 1, "default": {"epsilon": Infinity, "delta": 1e-5}}',
        '{"version": 1, "default": {"epsilon": 1e999, "delta": 1e-5}}',
        '{"version": 1, "default": {"epsilon": true, "delta": 1e-5}}',
        '{"version": 1, "default": {"epsilon": "8", "delta": 1e-5}}',
        '{"version": 1, "default": {"epsilon": -1, "delta": 1e-5}}',
        '{"version": 1, "default": {"epsilon": 8, "delta": 0}}',
        '{"version": 1, "default": {"epsilon": 8, "delta": 1}}',
        '{"version": 1, "default": {"epsilon": 8}}',
        '{"version": 1, "default": {"epsilon": 8, "delta": 1e-5, "unit": "user"}}',
        '{"version": 1, "default": {"epsilon": 8, "delta": 1e-5, "typo": 1}}',
        '{"version": 2, "default": {"epsilon": 8, "delta": 1e-5}}',
        '{"default": {"epsilon": 8, "delta": 1e-5}}',
        '{"version": 1, "defualt": {"epsilon": 8, "delta": 1e-5}}',
        '{"version": 1, "datasets": []}',
        '{"version": 1, "datasets": {"visits": 8}}',
    ],
)
def test_a_budget_file_that_is_malformed_refuses_every_release(path: Path, text: str) -> None:
    ledger = PrivacyLedger.open(path)
    ledger.budget_path.parent.mkdir(parents=True, exist_ok=True)
    ledger.budget_path.write_text(text)
    with pytest.raises(LedgerError, match=r"budget\.json"):
        reserve(ledger)
    assert fresh(path).releases() == []


# --- units -------------------------------------------------------------------------------------------


def test_a_guarantee_for_persons_is_weaker_for_one_record_and_counted_so(path: Path) -> None:
    ledger = PrivacyLedger.open(path)
    reserve(ledger, local_plan(unit="person"), run="1")
    alone = ledger.epsilon(dataset="visits", fingerprint="f1", delta=1e-5)
    assert alone == epsilon_of_terms({Term(0.05, 1.0): 5}, 1e-5)
    reserve(ledger, local_plan(unit="record"), run="2")
    mixed = ledger.epsilon(dataset="visits", fingerprint="f1", delta=1e-5)
    assert charged(ledger, "visits", "f1") == {Term(0.05, 1.0): 5, Term(0.05, 1.0, replace=True): 5}
    assert mixed > epsilon_of_terms({Term(0.05, 1.0): 5, Term(0.05, 1.0, replace=True): 5}, 1e-5)
    assert ledger.account(dataset="visits", fingerprint="f1").unit() == "record"


# --- one node, several processes ---------------------------------------------------------------------


def test_two_nodes_with_one_ledger_are_refused(path: Path, golden: Golden) -> None:
    reserve(PrivacyLedger.open(path))
    with pytest.raises(LedgerError) as raised:
        reserve(fresh(path), node="other")
    assert "'clinic'" in str(raised.value)
    assert "'other'" in str(raised.value)
    golden(raised)
    assert fresh(path).state().node == "clinic"


def _work(path: Path, name: str, count: int) -> None:
    ledger = PrivacyLedger.open(path)
    for round in range(count):
        ledger.commit(reserve(ledger, local_plan(num_rounds=count), run=name, round=round))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_several_processes_share_one_ledger(path: Path, method: str) -> None:
    context = multiprocessing.get_context(method)
    workers = [context.Process(target=_work, args=(path, f"run-{i}", 6)) for i in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert len(fresh(path).releases()) == 18
    assert fresh(path).verify() == (36, [])


def _try_one(path: Path, i: int, results: Any) -> None:
    try:
        reserve(PrivacyLedger.open(path), local_plan(num_rounds=1), run=f"run-{i}")
        results.put(1)
    except BudgetExhausted:
        results.put(0)


def test_a_race_for_the_last_release_has_one_winner(path: Path) -> None:
    ledger = PrivacyLedger.open(path)
    ledger.set_budget(PrivacyBudget(epsilon_of_terms({Term(0.05, 1.0): 5}, 1e-5) + 1e-6, 1e-5))
    ledger.close()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    racers = [context.Process(target=_try_one, args=(path, i, results)) for i in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)
    assert sorted(results.get() for _ in racers) == [0, 0, 0, 1]
    assert len(fresh(path).releases()) == 1


def _open_and_reserve(path: Path, i: int) -> None:
    ledger = PrivacyLedger.open(path)
    if i == 0:
        ledger.set_budget(PrivacyBudget(60.0, 1e-5))
    reserve(ledger, run=f"run-{i}")


def test_many_processes_may_make_the_file_and_its_budget_at_once(path: Path) -> None:
    context = multiprocessing.get_context("fork")
    epsilon_of_terms({Term(0.05, 1.0): 60}, 1e-5)  # the accountant is loaded before the race
    for attempt in range(3):
        file = path.with_name(f"race-{attempt}.sqlite")
        racers = [context.Process(target=_open_and_reserve, args=(file, i)) for i in range(12)]
        for racer in racers:
            racer.start()
        for racer in racers:
            racer.join(60)
        assert [racer.exitcode for racer in racers] == [0] * 12
        assert len(fresh(file).releases()) == 12
        assert fresh(file).verify() == (14, [])  # the secret, the budget, the releases


def test_a_connection_is_not_carried_over_a_fork(path: Path) -> None:
    ledger = PrivacyLedger.open(path)
    reserve(ledger, run="parent")
    child = multiprocessing.get_context("fork").Process(
        target=lambda: (reserve(ledger, run="child"), os._exit(0))
    )
    child.start()
    child.join(30)
    assert child.exitcode == 0
    reserve(ledger, run="parent", round=1)
    assert [release.run for release in ledger.releases()] == ["parent", "child", "parent"]


def test_threads_take_turns(path: Path) -> None:
    ledger = PrivacyLedger.open(path)
    failed: list[BaseException] = []

    def work(i: int) -> None:
        try:
            for round in range(5):
                reserve(ledger, run=f"run-{i}", round=round)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert fresh(path).verify() == (20, [])


# --- tampering ---------------------------------------------------------------------------------------


@pytest.fixture
def used(path: Path) -> Path:
    ledger = PrivacyLedger.open(path)
    for round in range(4):
        ledger.commit(reserve(ledger, round=round))
    ledger.close()
    return path


def test_an_untouched_ledger_is_whole(used: Path) -> None:
    assert fresh(used).verify() == (8, [])


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("UPDATE log SET body = replace(body, '\"count\":5', '\"count\":1') WHERE seq = 3", "row 3"),
        ("UPDATE log SET run = 'other' WHERE seq = 3", "row 3"),
        ("UPDATE log SET kind = 'note' WHERE seq = 3", "row 3"),
        ("UPDATE log SET time = '1999' WHERE seq = 5", "row 5"),
        ("UPDATE log SET body = 'x' WHERE seq = 3", "row 3"),
        ("UPDATE log SET hash = 'x' WHERE seq = 8", "row 8"),
        ("DELETE FROM log WHERE seq = 3", "row 3"),
        ("DELETE FROM log WHERE seq IN (3, 4)", "rows 3 to 4"),
        ("DELETE FROM log WHERE seq > 6", "row 8"),
        ("DELETE FROM log", "row 8"),
    ],
)
def test_a_row_that_was_edited_by_hand_is_named(used: Path, statement: str, named: str) -> None:
    edit(used, statement)
    rows, problems = fresh(used).verify()
    assert any(named in problem for problem in problems), (rows, problems)
    with pytest.raises(LedgerError):
        reserve(fresh(used), run="run-2")


def test_the_table_defends_itself_against_plain_statements(used: Path) -> None:
    with sqlite3.connect(used) as connection:
        for statement in ("UPDATE log SET run = 'x'", "DELETE FROM log WHERE seq = 8"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                connection.execute(statement)
    connection.close()


def test_taking_the_locks_off_is_noticed(used: Path) -> None:
    with sqlite3.connect(used) as connection:
        connection.execute("DROP TRIGGER log_is_not_edited")
    connection.close()
    assert fresh(used).verify()[1] == ["the locks against editing were taken off the table"]


def test_a_row_with_a_forged_hash_breaks_the_next_one(used: Path) -> None:
    from fedtune.privacy.ledger.chain import _digest

    with sqlite3.connect(used) as connection:
        seq, *values = connection.execute(
            "SELECT seq, time, kind, run, body, previous FROM log WHERE seq = 3"
        ).fetchone()
    connection.close()
    body = values[3].replace('"count":5', '"count":1')
    forged = _digest(seq, values[0], values[1], values[2], body, values[4])
    edit(used, "UPDATE log SET body = ?, hash = ? WHERE seq = 3", (body, forged))
    assert "row 4 does not follow row 3: one of them was replaced" in fresh(used).verify()[1]
    with pytest.raises(LedgerError, match="row 4 does not follow row 3"):
        reserve(fresh(used), run="run-2")


def test_a_process_that_knew_more_than_the_file_refuses(used: Path, golden: Golden) -> None:
    ledger = PrivacyLedger(used)
    backup = used.with_name("backup")
    ledger.close()
    backup.write_bytes(used.read_bytes())
    reserve(ledger, run="later")
    ledger.close()
    backup.replace(used)  # an older copy takes its place
    with pytest.raises(LedgerError) as raised:
        reserve(ledger, run="again")
    golden(raised)
    used.unlink()
    with pytest.raises(LedgerError, match="gone"):
        ledger.epsilon(dataset="visits", fingerprint="f1")
    with pytest.raises(LedgerError, match="gone"):
        reserve(ledger, run="again")
    assert not used.exists()


def test_old_rows_edited_behind_a_summary_do_not_refill_the_budget(path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(ledger_state, "_SNAPSHOT_EVERY", 4)
    ledger = PrivacyLedger.open(path)
    ledger.set_budget(PrivacyBudget(3.2, 1e-5))
    made = spend(ledger, "run-1")
    assert made > 4
    ledger.close()
    edit(path, "UPDATE log SET body = replace(body, '\"count\":5', '\"count\":1') WHERE seq = 3")
    with pytest.raises(BudgetExhausted):
        reserve(fresh(path), run="run-2")
    assert any("row 3" in problem for problem in fresh(path).verify()[1])


def test_a_summary_that_lies_is_named(path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(ledger_state, "_SNAPSHOT_EVERY", 4)
    ledger = PrivacyLedger.open(path)
    for round in range(9):
        reserve(ledger, round=round)
    summaries = [
        row[0] for row in sqlite3.connect(path).execute("SELECT seq FROM log WHERE kind = 'summary'")
    ]
    assert len(summaries) == 2
    assert fresh(path).verify()[1] == []
    assert fresh(path).state() == ledger.state()
    assert charged(fresh(path), "visits", "f1") == {Term(0.05, 1.0): 45}


def test_a_last_summary_that_was_rewritten_whole_is_refused(
    path: Path, monkeypatch: Any, golden: Golden
) -> None:
    """The last row has no successor to vouch for it: someone who makes its hash anew must still add up."""
    from fedtune.privacy.ledger.chain import _digest

    monkeypatch.setattr(ledger_state, "_SNAPSHOT_EVERY", 4)
    ledger = PrivacyLedger.open(path)
    for round in range(8):
        reserve(ledger, round=round)
    ledger.close()
    connection = sqlite3.connect(path)
    seq, *values = connection.execute(
        "SELECT seq, time, kind, run, body, previous FROM log ORDER BY seq DESC LIMIT 1"
    ).fetchone()
    connection.close()
    assert values[1] == "summary"
    body = json.loads(values[3])
    body["runs"][0][-1][0][-1] = 1
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    forged = _digest(seq, values[0], values[1], values[2], text, values[4])
    edit(path, "UPDATE log SET body = ?, hash = ? WHERE seq = ?", (text, forged, seq))
    with pytest.raises(LedgerError) as raised:
        reserve(fresh(path), run="run-2")
    golden(raised)
    assert any("sums" in problem for problem in fresh(path).verify()[1])


def test_something_added_to_the_file_is_noticed(used: Path) -> None:
    with sqlite3.connect(used) as connection:
        connection.execute(
            "CREATE TRIGGER helpful AFTER INSERT ON log BEGIN SELECT 1; END"  # could as well forget rows
        )
    connection.close()
    assert fresh(used).verify()[1] == ["there is something in the file that a ledger does not have"]


def test_another_sqlite_file_is_no_ledger(path: Path, golden: Golden) -> None:
    path.parent.mkdir(parents=True)
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE log (seq INTEGER)")
    connection.close()
    with pytest.raises(LedgerError) as raised:
        PrivacyLedger.open(path)
    golden(raised)
    with pytest.raises(LedgerError) as raised:
        reserve(PrivacyLedger(path))
    golden(raised)


@pytest.mark.parametrize("content", [b"not sqlite, not at all, by no means" * 100, b"\x00" * 5000])
def test_a_damaged_file_is_refused(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(LedgerError):
        reserve(PrivacyLedger(path))


def test_a_ledger_anybody_may_write_is_refused(used: Path, golden: Golden) -> None:
    used.chmod(0o666)
    with pytest.raises(LedgerError) as raised:
        reserve(fresh(used), run="run-2")
    golden(raised)


# --- a hostile world ---------------------------------------------------------------------------------


def test_a_clock_that_goes_backwards_is_harmless(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datetime as real

    from fedtune.privacy.ledger import chain

    times = iter([2030, 2020, 1980, 2025])

    class Clock(real.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> real.datetime:
            return real.datetime(next(times), 1, 1, tzinfo=tz)

    monkeypatch.setattr(chain, "datetime", Clock)
    ledger = PrivacyLedger.open(path)
    for round in range(4):
        reserve(ledger, round=round)
    found = fresh(path).releases()
    assert [release.round for release in found] == [0, 1, 2, 3]
    assert [release.time[:4] for release in found] == ["2030", "2020", "1980", "2025"]
    assert fresh(path).verify() == (4, [])


_LIMITED = """
import resource, signal, sys
from pathlib import Path
from fedtune.errors import LedgerError
from fedtune.privacy.ledger.ledger import PrivacyLedger
from tests.support.plans import local_plan
path = Path(sys.argv[1])
ledger = PrivacyLedger.open(path)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
made = 0
try:
    for round in range(2000):
        ledger.reserve(dataset="visits", fingerprint="f1", node="clinic", run="run-1", round=round,
                       plan=local_plan(num_rounds=5000))
        made += 1
except LedgerError as error:
    print(made, "cannot be used" in str(error))
"""


@pytest.mark.slow
@pytest.mark.parametrize("limit", [0, 20_000, 60_000])
def test_a_full_disk_is_a_refusal_and_loses_nothing(path: Path, limit: int) -> None:
    out = subprocess.run(
        [sys.executable, "-c", _LIMITED, str(path), str(limit)], capture_output=True, text=True, check=True
    ).stdout.split()
    made = int(out[0])
    assert out[1] == "True"
    assert made > 0 or limit < 60_000
    assert len(fresh(path).releases()) == made
    assert fresh(path).verify()[1] == []
    reserve(fresh(path), local_plan(num_rounds=5000))  # with room again, it goes on


@pytest.mark.slow
def test_a_read_only_file_is_a_refusal(used: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from fedtune.errors import LedgerError
from fedtune.privacy.ledger.ledger import PrivacyLedger
from tests.support.plans import local_plan
if os.geteuid() == 0:  # root may write anything: become nobody
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
ledger = PrivacyLedger(Path(sys.argv[1]))
try:
    ledger.reserve(dataset="visits", fingerprint="f1", node="clinic", run="r", round=0, plan=local_plan())
except LedgerError as error:
    print("refused", len(ledger.releases()))
"""
    with tempfile.TemporaryDirectory() as name:  # where nobody, too, may go
        folder = Path(name)
        copy = folder / "clinic.sqlite"
        shutil.copy(used, copy)
        copy.chmod(0o444)
        folder.chmod(0o555)
        done = subprocess.run(
            [sys.executable, "-c", code, str(copy)], capture_output=True, text=True, check=False
        )
        folder.chmod(0o755)
    assert done.stdout.split() == ["refused", "4"], done.stderr


def test_a_folder_that_cannot_be_made_is_a_refusal(tmp_path: Path, golden: Golden) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerError) as raised:
        reserve(PrivacyLedger(tmp_path / "file" / "clinic.sqlite"))
    golden(raised)


# --- speed -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("short_runs", [True, False])  # or one run of 10,000 releases
def test_a_reservation_is_as_much_work_after_10000_as_after_100(
    path: Path, monkeypatch: pytest.MonkeyPatch, short_runs: bool
) -> None:
    in_database = 0
    connect = sqlite3.connect

    def counting(*arguments: Any, **named: Any) -> sqlite3.Connection:
        def tick() -> None:
            nonlocal in_database
            in_database += 1

        connection = connect(*arguments, **named)
        connection.set_progress_handler(tick, 100)  # instructions of SQLite's machine
        return connection

    monkeypatch.setattr(sqlite3, "connect", counting)
    plan = local_plan(num_rounds=20_000, noise_multiplier=400.0)

    def work_after(releases: int) -> tuple[list[int], int]:
        nonlocal in_database
        name = path.with_name(f"{releases}.sqlite")
        fill(name, releases, short_runs=short_runs)
        ledger = PrivacyLedger(name)
        ledger.set_budget(PrivacyBudget(20.0, 1e-5))
        reserve(ledger, plan, run="warm")  # accounts for the whole run ahead
        in_database = 0
        calls = [calls_of(partial(reserve, ledger, plan, run="warm", round=i)) for i in range(1, 6)]
        return calls, in_database

    (few, few_in_database), (many, many_in_database) = work_after(100), work_after(10_000)
    assert max(many) < 1.1 * min(few) and max(many) < 3_000
    assert many_in_database <= few_in_database + 2
    in_database = 0
    # A new process reads a summary, not 10,000 rows: each row takes more than 20 calls.
    assert calls_of(fresh(path.with_name("10000.sqlite")).state) < 100_000
    assert in_database < 200
    assert fresh(path.with_name("10000.sqlite")).state().releases[("visits", "f1")] == 10_006


def rows_read(ledger: PrivacyLedger, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the rows of runs that `ledger` reads from now on, as it reads them."""
    read: list[int] = []
    real = ledger._chain.run_rows

    def counting(*arguments: Any, **named: Any) -> Any:
        for row in real(*arguments, **named):
            read.append(row.seq)
            yield row

    monkeypatch.setattr(ledger._chain, "run_rows", counting)
    return read


def test_what_a_process_has_counted_is_read_no_more_and_what_others_wrote_is(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = local_plan(num_rounds=6)
    ledger, other = PrivacyLedger(path), PrivacyLedger(path)
    read = rows_read(ledger, monkeypatch)
    for round in range(4):
        ledger.commit(reserve(ledger, plan, round=round))
    assert len(read) <= 8  # every row once: 4 reserved, 4 committed
    reserve(other, plan, round=4)  # another process of the node
    reserve(ledger, plan, round=5)
    with pytest.raises(BudgetExhausted, match="allows 6 releases, and 6 were made"):
        reserve(ledger, plan, round=6)
    with pytest.raises(BudgetExhausted, match="allows 6 releases, and 6 were made"):
        reserve(other, plan, round=6)


def test_each_row_of_a_run_is_read_once_for_all_of_its_nodes(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A simulation of 100 nodes read every row of its run for each of them, twice a round."""
    ledger, plan, nodes = PrivacyLedger(path, shared=True), local_plan(num_rounds=6), range(4)
    read = rows_read(ledger, monkeypatch)
    for round in (1, 2, 3):
        for i in nodes:
            asked = {"run": "run-1", "node": f"n{i}"}
            assert ledger.rounds(**asked, purpose="training") == list(range(1, round))
            ledger.commit(reserve(ledger, plan, node=f"n{i}", round=round))
            assert ledger.rounds(**asked) == list(range(1, round + 1))
    assert len(read) == len(set(read)) == 3 * 2 * len(nodes)
    other = PrivacyLedger(path, shared=True)
    reserve(other, plan, node="n0", round=4)
    assert ledger.rounds(run="run-1", node="n0", purpose="training") == [1, 2, 3, 4]
    assert ledger.rounds(run="run-1", node="n0", purpose="size") == []
    shown = [release.round for release in ledger.releases(run="run-1", node="n0")]
    assert shown == ledger.rounds(run="run-1", node="n0")


@pytest.mark.slow
def test_a_new_node_is_as_much_work_beside_1000_as_beside_100(path: Path, monkeypatch: Any) -> None:
    """Each looked through the keys of all others: a run of n nodes took n squared."""
    plan = local_plan(num_rounds=4)
    read: list[str] = []
    real = Chain.set_of

    def counting(self: Chain, connection: Any, name: str) -> Any:
        read.append(name)
        return real(self, connection, name)

    def ask(node: int, round: int = 1) -> AskedRelease:
        mine = identity([f"{node}-{record}" for record in range(5)])
        return AskedRelease("visits", mine, f"n{node}", "run-1", round, plan)

    monkeypatch.setattr(Chain, "set_of", counting)
    ledger = PrivacyLedger(path, shared=True)
    ledger.set_budget(PrivacyBudget(20.0, 1e-5))
    work = {}
    for count in (100, 1000):
        there = ledger.state().total
        ledger.reserve_all([ask(node) for node in range(there, count)])
        read.clear()
        work[count] = min(calls_of(partial(ledger.reserve, ask(-count - i))) for i in range(5))
        again = min(calls_of(partial(ledger.reserve, ask(count - 1 - i, 2))) for i in range(5))
        assert again < 2 * work[count]
        assert len(read) <= 2 * 5  # each set once, when it is new
    assert work[1000] < 1.3 * work[100] < 6_000


def fill(path: Path, count: int, *, short_runs: bool) -> None:
    """`count` releases written in one transaction, as the ledger itself writes them."""
    reserve(PrivacyLedger(path), run="run-0")
    ledger = PrivacyLedger(path)
    plan = local_plan(num_rounds=20_000, noise_multiplier=400.0)
    with ledger.writing() as writer:
        body = json.loads(writer.connection.execute("SELECT body FROM log WHERE seq = 1").fetchone()[0])
        body |= {"steps": steps_of(plan, 0), "num_rounds": plan.num_rounds, "planned": [[0.05, 400.0, 10**5]]}
        for i in range(count - 1):
            writer.write("reserved", body, run=f"run-{i // 12 + 1}" if short_runs else "warm")


def test_a_run_that_was_fixed_in_advance_is_accounted_once(path: Path, monkeypatch: Any) -> None:
    ledger = PrivacyLedger.open(path)
    plan = make_plan(Config(), [9000])
    asked: list[object] = []
    real = allowance.cached_epsilon
    monkeypatch.setattr(
        allowance, "cached_epsilon", lambda terms, delta: asked.append(terms) or real(terms, delta)
    )
    # More than the run's distribution says, less than the filter would ask for.
    ledger.set_budget(PrivacyBudget(plan.epsilon() * 1.01, plan.delta))
    for round in range(plan.num_rounds):
        reserve(ledger, plan, round=round)
    assert len(asked) == 1
