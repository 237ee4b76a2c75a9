"""One account for one body of data: a release charges every key that it touched, whatever it is called."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.data.partition import split_shard
from fedtune.data.sources.columns import Columns, build_corpus
from fedtune.data.sources.files import read_table
from fedtune.errors import BudgetExhausted, LedgerError, PrivacyError
from fedtune.privacy.accounting.epsilon import Term, compose_terms, epsilon_of_terms
from fedtune.privacy.accounting.filter import RunSteps, admits, fits, spent
from fedtune.privacy.ledger import accounts
from fedtune.privacy.ledger import state as ledger_state
from fedtune.privacy.ledger.budget import PrivacyBudget
from fedtune.privacy.ledger.identity import Identity
from fedtune.privacy.ledger.ledger import PrivacyLedger
from fedtune.privacy.ledger.state import Use
from fedtune.privacy.plan import UNITS, PrivacyPlan
from tests.data.test_partition import shard_of
from tests.support.golden import Golden
from tests.support.ledgers import charged, identity
from tests.support.plans import central_plan, changed, local_plan

DELTA = 1e-5
STEP = Term(0.05, 1.0)  # local_plan: five of them a release


@pytest.fixture
def ledger(tmp_path: Path) -> PrivacyLedger:
    return PrivacyLedger(tmp_path / "simulation.sqlite", shared=True)


def release(
    ledger: PrivacyLedger, data: Identity | str, plan: PrivacyPlan | None = None, **changes: Any
) -> None:
    values: dict[str, Any] = {"dataset": "visits", "node": "clinic", "run": "run-1", "round": 0}
    ledger.reserve(fingerprint=data, plan=plan or local_plan(), **{**values, **changes})


def plan_of(run: int, unit: str) -> PrivacyPlan:
    values = {"noise_multiplier": 4.0 + run, "num_rounds": 1000}
    return central_plan(**values) if unit == "client" else local_plan(unit=unit, **values)


def test_the_account_is_the_worst_over_keys_as_counted_one_key_at_a_time(ledger: PrivacyLedger) -> None:
    chance = random.Random(7)
    kinds = ("record", "person")
    bodies = [
        {"record": chance.sample(range(40), chance.randint(5, 25)), "person": chance.sample(range(8), 3)}
        for _ in range(8)
    ]
    of_body = [identity(sorted(one["record"]), [f"p{name}" for name in one["person"]]) for one in bodies]
    units = [*UNITS, *UNITS]
    said: list[tuple[int, int]] = []
    for _ in range(60):
        run, body = chance.randrange(6), chance.randrange(8)
        release(ledger, of_body[body], plan_of(run, units[run]), run=f"run-{run}", node=f"node-{body % 3}")
        said.append((run, body))
    for asked, data in enumerate(of_body):
        expected = set()
        for kind, key in [(one, key) for one in kinds for key in bodies[asked][one]]:
            touched = [
                (run, body) for run, body in said
                if key in bodies[body][kind] and (kind == "record" or units[run] != "record")
            ]  # fmt: skip
            finest = min((UNITS.index(units[run]) for run, _ in touched), default=0)
            total: dict[Term, int] = {}
            for run in {run for run, _ in touched}:
                by_node = Counter(body % 3 for other, body in touched if other == run)
                for term, count in (plan_of(run, units[run]).terms(1) or {}).items():
                    replaced = UNITS.index(units[run]) > finest
                    total[term._replace(replace=replaced)] = count * max(by_node.values())
            expected.add(frozenset(total.items()))
        histories = ledger.account(dataset="visits", fingerprint=data).histories()
        found = {
            frozenset((compose_terms(*(run.charged for run in runs)) or {}).items()) for runs in histories
        }
        assert found == expected - {frozenset()}


def test_new_data_of_an_old_name_has_its_budget_and_old_data_of_a_new_name_has_none(
    ledger: PrivacyLedger,
) -> None:
    ledger.set_budget(PrivacyBudget(4.0, DELTA), dataset="visits")
    release(ledger, identity(range(50)))
    assert ledger.epsilon(dataset="visits", fingerprint=identity(range(50, 99)), delta=DELTA) == 0.0
    assert ledger.epsilon(dataset="other", fingerprint=identity(range(50)), delta=DELTA) == epsilon_of_terms(
        {STEP: 5}, DELTA
    )
    # The strictest budget of any name under which one of its records was released holds.
    budget = ledger.budget(dataset="other", fingerprint=identity([*range(49, 90)]))
    assert budget == PrivacyBudget(4.0, DELTA)
    assert ledger.budget(dataset="other", fingerprint=identity([*range(50, 90)])) is None


def test_half_shared_persons_carry_what_they_have_spent(ledger: PrivacyLedger) -> None:
    """Two data sets with no record in common share half of their persons: releases of persons add up."""
    first = identity(range(20), [f"p{i}" for i in range(10)])
    second = identity(range(20, 40), [f"p{i}" for i in range(5, 15)])
    release(ledger, first, local_plan(unit="person"))
    assert ledger.epsilon(dataset="b", fingerprint=second, delta=DELTA) == epsilon_of_terms({STEP: 5}, DELTA)
    release(ledger, second, local_plan(unit="record"), dataset="b", run="run-2")
    # Of record 25 the first release says nothing, and of person 7 the second one promises nothing.
    assert {
        frozenset(runs[0].charged.items())
        for runs in ledger.account(dataset="b", fingerprint=second).histories()
    } == {frozenset({STEP: 5}.items())}
    release(ledger, second, local_plan(unit="person"), dataset="b", run="run-3")
    both = spent([RunSteps({STEP: 5}, None)] * 2, DELTA)
    assert ledger.epsilon(dataset="b", fingerprint=second, delta=DELTA) >= both
    assert ledger.epsilon(dataset="a", fingerprint=first, delta=DELTA) == both


def test_equal_texts_at_two_nodes_of_one_run_are_two_records(ledger: PrivacyLedger) -> None:
    one, other = identity([*range(10), "thanks"]), identity([*range(10, 20), "thanks"])
    for round in range(3):
        release(ledger, one, node="a", round=round)
        release(ledger, other, node="b", round=round)
    assert charged(ledger, "visits", one) == {STEP: 15}
    release(ledger, other, node="b", run="run-2")
    assert ledger.epsilon(dataset="visits", fingerprint=one, delta=DELTA) == spent(
        [RunSteps({STEP: 15}, None), RunSteps({STEP: 5}, None)], DELTA
    )


def test_pitfall_33_another_cut_of_spent_data_finds_no_fresh_budget(
    ledger: PrivacyLedger, golden: Golden
) -> None:
    """7.967 was spent and then, cut anew, once more; composed that is 10.47, over the budget of 8."""
    plan = local_plan(num_rounds=12, noise_multiplier=0.6444)
    natural = [identity(range(40)), identity(range(40, 90))]
    ledger.set_budget(PrivacyBudget(8.0, DELTA), dataset="visits")
    for round in range(12):
        for i, shard in enumerate(natural):
            release(ledger, shard, plan, node=f"site-{i}", round=round)
    alone = ledger.epsilon(dataset="visits", fingerprint=natural[0], delta=DELTA)
    assert alone == pytest.approx(7.967, rel=0.01)
    iid = [identity(range(0, 90, 2)), identity(range(1, 90, 2))]
    for shard in iid:
        assert ledger.epsilon(dataset="visits", fingerprint=shard, delta=DELTA) == alone
        with pytest.raises(BudgetExhausted) as raised:
            release(ledger, shard, plan, node="node-0", run="run-2")
        assert "45 of its 45" in str(raised.value)
        golden(raised)
    little = local_plan(num_rounds=1, noise_multiplier=50.0)
    for limit, why in ((8.0, "lets no other follow. "), (2.0, "used before. ")):  # closed; lowered afterwards
        ledger.set_budget(PrivacyBudget(limit, DELTA), dataset="visits")
        with pytest.raises(BudgetExhausted) as refusal:
            release(ledger, iid[0], little, node="node-0", run="run-2")
        # To advise a smaller run would be wrong.
        assert str(refusal.value).endswith(f"{why}Nothing is left: use other data, or its owner allows more.")
    twice = compose_terms(plan.terms(12), plan.terms(12))
    assert epsilon_of_terms(twice, DELTA) > 10.0


def export(path: Path, header: list[str], rows: list[dict[str, str]]) -> Identity:
    """The identity of a file's records, read as a site reads its own."""
    path.write_text(
        "\n".join([",".join(header), *(",".join(row[name] for name in header) for row in rows)]) + "\n"
    )
    columns = Columns(text="text", label="label", unit="person")
    corpus = build_corpus(path.stem, read_table(path, columns), columns, ("no", "yes"), part=True)
    return Identity(corpus.marks, np.unique(corpus.units).tolist(), corpus.fingerprint())


@pytest.mark.parametrize("unit", ["record", "person"])
def test_pitfall_33_a_monthly_export_starts_at_what_its_persons_have_spent(
    tmp_path: Path, ledger: PrivacyLedger, unit: str
) -> None:
    def rows(first: int, stop: int, shout: bool = False) -> list[dict[str, str]]:
        texts = [f"visit {i} went  well" if shout else f"Visit {i} went well" for i in range(first, stop)]
        return [
            {"text": text, "label": ("no", "yes")[i % 2], "person": f"P{i // 2}", "extra": str(i)}
            for i, text in enumerate(texts, start=first)
        ]

    january = export(tmp_path / "january.csv", ["person", "text", "label"], rows(0, 200))
    february = export(
        tmp_path / "2026-02.csv", ["extra", "label", "text", "person"], rows(20, 220, shout=True)
    )
    plan = local_plan(unit=unit, num_rounds=12, noise_multiplier=0.7245)
    ledger.set_budget(PrivacyBudget(8.0, DELTA))
    for round in range(12):
        release(ledger, january, plan, dataset="january", round=round)
    assert ledger.epsilon(dataset="january", fingerprint=january, delta=DELTA) == pytest.approx(6.0, rel=0.03)
    before = ledger.epsilon(dataset="2026-02", fingerprint=february, delta=DELTA)
    assert before == pytest.approx(6.0, rel=0.03)
    assert ledger.account(dataset="2026-02", fingerprint=february).seen() == (180, 200)
    with pytest.raises(BudgetExhausted) as refusal:
        ledger.check_run(dataset="2026-02", fingerprint=february, node="clinic", run="run-2", plans=[plan])
    text = " ".join(str(refusal.value).split())
    assert "over its budget of 8 at delta 1e-05 for '2026-02'" in text
    assert "180 of its 200 texts were used before" in text
    assert not refusal.value.public  # the owner's alone
    assert text.endswith("or raise privacy.noise_multiplier."), "a smaller run fits"
    # Those who are new have all of their budget.
    new = export(tmp_path / "new.csv", ["person", "text", "label"], rows(200, 220))
    ledger.check_run(dataset="2026-02", fingerprint=new, node="clinic", run="run-2", plans=[plan])


def test_both_parts_of_a_shard_that_is_held_out_are_charged_together(ledger: PrivacyLedger) -> None:
    whole = shard_of([f"text {i}" for i in range(50)], None)
    train, held = split_shard(whole, 0.3)
    again, _ = split_shard(train, 0.5)
    assert train.identity is held.identity is whole.identity is again.identity
    release(ledger, train.identity, run="train")
    assert ledger.epsilon(dataset="visits", fingerprint=held.identity, delta=DELTA) > 0.0


# --- the filter --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_what_is_admitted_is_what_the_filter_admits_for_every_key(tmp_path: Path, seed: int) -> None:
    """The ledger adds divergences up over classes of keys; `filter.admits` is asked one history at a time."""
    chance = random.Random(seed)
    budget = PrivacyBudget(chance.choice((3.0, 5.0, 8.0)), DELTA)
    ledger = PrivacyLedger(tmp_path / "n.sqlite", shared=True)
    ledger.set_budget(budget)
    plans = [local_plan(num_rounds=4, noise_multiplier=chance.uniform(0.7, 1.6)) for _ in range(4)]
    bodies = [identity(sorted(chance.sample(range(12), 6))) for _ in range(3)]
    asked = {"yes": 0, "no": 0}
    for attempt in range(40):
        run = chance.randrange(4)
        data, plan = bodies[run % 3], plans[run]
        account = ledger.account(dataset="visits", fingerprint=data)
        domain = account.keys[0]
        planned = compose_terms(plan.terms(plan.num_rounds))
        adding = (f"run-{run}", {Use(False, "record", True, 0.05, plan.noise_multiplier): 5}, planned)
        expected = all(
            admits(account.runs_of(domain, place, adding=adding), budget.epsilon, budget.delta)
            for place in range(len(domain.sizes))
        )
        try:
            release(ledger, data, plan, run=f"run-{run}", round=attempt)
            allowed = True
        except BudgetExhausted as error:
            if "plan allows" in str(error):
                continue
            allowed = False
        assert allowed == expected
        asked["yes" if allowed else "no"] += 1
    assert asked["yes"] > 3


def test_pitfall_37_a_budget_is_not_stopped_by_composing_what_was_chosen_on_the_way(
    ledger: PrivacyLedger,
) -> None:
    """Two runs that fit the budget by their composed loss distribution, and by no proven filter."""
    plan = local_plan(num_rounds=4, noise_multiplier=1.0)
    both = compose_terms(plan.terms(4), plan.terms(4))
    budget = PrivacyBudget(epsilon_of_terms(both, DELTA) * 1.01, DELTA)
    assert not fits(both, budget.epsilon, budget.delta)
    ledger.set_budget(budget)
    data = identity(range(9))
    for round in range(4):
        release(ledger, data, plan, round=round)
    with contextlib.suppress(BudgetExhausted):
        for round in range(4):
            release(ledger, data, plan, run="run-2", round=round)
    assert len(ledger.releases(run="run-2")) < 4


def test_a_run_that_was_admitted_whole_lets_no_other_follow_even_if_it_ended_early(
    ledger: PrivacyLedger,
) -> None:
    plan = local_plan(num_rounds=12, noise_multiplier=1.0)
    budget = PrivacyBudget(epsilon_of_terms(plan.terms(12), DELTA) * 1.01, DELTA)
    assert not fits(plan.terms(12), budget.epsilon, budget.delta)
    ledger.set_budget(budget)
    data = identity(range(9))
    release(ledger, data, plan)
    small = local_plan(num_rounds=1, local_steps=1, noise_multiplier=20.0)
    with pytest.raises(BudgetExhausted, match="lets no other follow"):
        release(ledger, identity([8, 100]), small, run="run-2")
    for round in range(1, 12):  # a new process knows the plan from the books
        release(PrivacyLedger(ledger.path, shared=True), data, plan, round=round)


def test_a_run_is_held_to_its_rate_noise_steps_and_whole_plan(ledger: PrivacyLedger, golden: Golden) -> None:
    plan, data = local_plan(), identity(range(9))
    about = dataclasses.replace(plan, evaluation_share=0.2, evaluation_answers=2, evaluation_noise=3.0)
    answers = about.evaluation()
    assert answers is not None
    release(ledger, data, plan, whole=[plan, answers])
    for change in ({"noise_multiplier": 1.1}, {"sample_rate": 0.06}, {"local_steps": 6}):
        with pytest.raises(PrivacyError) as raised:
            release(ledger, data, changed(plan, **change), round=1)
        golden(raised)
    for whole in ([plan], [plan, dataclasses.replace(answers, num_rounds=3)]):
        with pytest.raises(PrivacyError) as raised:
            release(ledger, data, plan, round=1, whole=whole)
        golden(raised)
    release(ledger, data, answers, round=1, whole=[plan, answers])
    release(ledger, data, plan, round=1, whole=[plan, answers])
    assert len(ledger.releases()) == 3


def test_check_run_counts_all_purposes_and_charges_nothing(ledger: PrivacyLedger) -> None:
    plan = local_plan(num_rounds=12, evaluation_share=0.2, evaluation_answers=2, evaluation_noise=1.5)
    answers, data = plan.evaluation(), identity(range(9))
    assert answers is not None
    ledger.set_budget(PrivacyBudget(plan.epsilon() * 1.01, plan.delta))
    asked = {"dataset": "visits", "fingerprint": data, "node": "clinic", "run": "run-1"}
    rows = (ledger.state().seq, ledger.state().hash)
    ledger.check_run(**asked, plans=[plan, answers])
    ledger.check_run(**asked, plans=[plan])
    with pytest.raises(BudgetExhausted, match="the run before its first round"):
        ledger.check_run(**asked, plans=[plan, dataclasses.replace(answers, num_rounds=8)])
    assert (ledger.state().seq, ledger.state().hash) == rows
    # A size is a release like any other: whatever has the fields of a plan is counted.
    size = dataclasses.replace(answers, noise_multiplier=20.0, num_rounds=1)
    ledger.check_run(**asked, plans=[dataclasses.replace(plan, num_rounds=11), answers, size])
    # A run that has begun asks for what is left of it.
    release(ledger, data, plan, whole=[plan, answers])
    ledger.check_run(**asked, plans=[plan, answers])
    with pytest.raises(BudgetExhausted):
        ledger.check_run(**{**asked, "run": "run-2"}, plans=[plan, answers])


# --- the books ---------------------------------------------------------------------------------------


def edited(path: Path, statement: str, *values: Any) -> None:
    with sqlite3.connect(path) as connection:
        triggers = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for name, _ in triggers:
            connection.execute(f"DROP TRIGGER {name}")
        connection.execute(statement, values)
        for _, sql in triggers:
            connection.execute(sql)
    connection.close()


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("UPDATE sets SET records = substr(records, 9)", "were changed"),
        ("UPDATE sets SET persons = NULL", "were changed"),
        ("DELETE FROM sets", "are missing"),
        ("INSERT INTO sets VALUES ('more', x'00', NULL)", "no row names them"),
    ],
)
def test_keys_that_were_edited_are_named(ledger: PrivacyLedger, statement: str, named: str) -> None:
    release(ledger, identity(range(20), ["p1", "p2"]))
    assert ledger.verify()[1] == []
    ledger.close()
    edited(ledger.path, statement)
    fresh = PrivacyLedger(ledger.path, shared=True)
    assert any(named in problem for problem in fresh.verify()[1])
    if "INSERT" not in statement:
        with pytest.raises(LedgerError, match=named):
            release(fresh, identity(range(10, 30)), run="run-2")


def test_keys_defend_themselves_against_plain_statements(ledger: PrivacyLedger) -> None:
    release(ledger, identity(range(20)))
    with sqlite3.connect(ledger.path) as connection:
        for statement in ("UPDATE sets SET records = x''", "DELETE FROM sets"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                connection.execute(statement)
    connection.close()


def test_a_new_process_finds_every_account_where_it_was(ledger: PrivacyLedger, monkeypatch: Any) -> None:
    monkeypatch.setattr(ledger_state, "_SNAPSHOT_EVERY", 6)
    for run in range(9):
        for round in range(3):
            data = identity(range(run, run + 10), [f"p{run}"])
            release(ledger, data, run=f"run-{run}", round=round, node=f"n{run % 2}")
    fresh = PrivacyLedger(ledger.path, shared=True)
    assert fresh.state() == ledger.state() and fresh.verify()[1] == []
    assert any(row == "summary" for (row,) in sqlite3.connect(ledger.path).execute("SELECT kind FROM log"))
    for run in range(9):
        known = {"dataset": "visits", "fingerprint": identity(range(run, run + 10), [f"p{run}"])}
        assert fresh.epsilon(**known, delta=DELTA) == ledger.epsilon(**known, delta=DELTA)


def test_many_histories_are_bounded_by_one(ledger: PrivacyLedger, monkeypatch: Any) -> None:
    """Where nearly every record has a history of its own, none is said to have spent less than it did."""
    chance = random.Random(1)
    whole = list(range(60))
    for run in range(8):
        chance.shuffle(whole)
        for node, part in enumerate((whole[:30], whole[30:50])):
            plan = local_plan(noise_multiplier=2.0 + run)
            release(ledger, identity(sorted(part)), plan, run=f"run-{run}", node=f"n{node}")
    data = {"dataset": "visits", "fingerprint": identity(range(60))}
    exact = ledger.epsilon(**data, delta=DELTA)
    monkeypatch.setattr(accounts, "_CANDIDATES", 3)
    bound = ledger.epsilon(**data, delta=DELTA)
    everything = spent([RunSteps({Term(0.05, 2.0 + run): 5}, None) for run in range(8)], DELTA)
    assert exact <= bound <= everything * 1.001
