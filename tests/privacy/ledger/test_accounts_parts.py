"""What classes of keys were charged, on states that are written down by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from fedtune.privacy.accounting.epsilon import Term
from fedtune.privacy.accounting.filter import RunSteps, renyi_of_terms
from fedtune.privacy.ledger import accounts
from fedtune.privacy.ledger.accounts import (
    NEVER,
    Account,
    AccountKeys,
    KeyGroups,
    Spending,
    account_of,
    account_without_keys,
    run_steps,
)
from fedtune.privacy.ledger.state import Charges, KnownSet, LedgerState, NamedData, NodeData, Use

STEP, OTHER = Term(0.05, 1.0), Term(0.1, 2.0)
RECORD, PERSON = Use(False, "record", True, 0.05, 1.0), Use(False, "person", True, 0.05, 1.0)
CLIENT, BARE = Use(False, "client", True, 0.1, 2.0), Use(False, "record", False, 1.0, 0.0)
A, B, C = NamedData("a", "1"), NamedData("b", "2"), NamedData("c", "3")


def at(body: NamedData, node: str = "n") -> NodeData:
    return NodeData(node, body)


def domain(unit: str = "record", sizes: tuple[int, ...] = (4, 2, 1), **columns: list[bool]) -> AccountKeys:
    bodies = {"a": A, "b": B, "c": C}
    return AccountKeys(
        unit, np.array(sizes), {bodies[name]: np.array(held) for name, held in columns.items()}
    )


THREE = domain(a=[True, True, False], b=[False, True, True])


def account(
    runs: Mapping[str, Mapping[NodeData, Charges]], *domains: AccountKeys, plans: Any = None
) -> Account:
    held = {name: dict(charges) for name, charges in runs.items()}
    state = LedgerState(runs=held, plans=plans or {name: {"n": None} for name in runs})
    state.by_run = dict.fromkeys(runs, 1)
    state.total = len(runs)
    return Account(state, {"a"}, list(domains) or [THREE])


def test_one_run_is_counted_by_group_of_keys() -> None:
    charged = THREE.charged_run({at(A): Charges(7, {RECORD: 5}), at(B): Charges(3, {RECORD: 2, BARE: 1})})
    assert charged is not None and charged.first.tolist() == [7, 3, 3]
    assert {use: counts.tolist() for use, counts in charged.counts.items()} == {
        RECORD: [5, 7, 2],
        BARE: [0, 1, 1],
    }
    # Nodes hold disjoint parts: a key that two of them have is counted by the larger charge of each kind.
    charged = THREE.charged_run(
        {at(A): Charges(7, {RECORD: 5}), at(B, "m"): Charges(9, {RECORD: 8, BARE: 1})}
    )
    assert charged is not None and charged.first.tolist() == [7, 7, 9]
    assert {use: counts.tolist() for use, counts in charged.counts.items()} == {
        RECORD: [5, 8, 8],
        BARE: [0, 1, 1],
    }
    assert THREE.charged_run({at(C): Charges(1, {RECORD: 5})}) is None and THREE.charged_run({}) is None
    charged = THREE.charged_run({at(C): Charges(1, {RECORD: 5}), at(A): Charges(2, {RECORD: 1})})
    assert charged is not None and charged.first.tolist() == [2, 2, NEVER]


def test_releases_of_records_say_nothing_of_persons() -> None:
    persons = domain("person", a=[True, True, False])
    assert persons.charged_run({at(A): Charges(1, {RECORD: 5, BARE: 1})}) is None
    charged = persons.charged_run({at(A): Charges(1, {RECORD: 5, PERSON: 2, CLIENT: 3})})
    assert charged is not None
    assert {use: counts.tolist() for use, counts in charged.counts.items()} == {
        PERSON: [2, 2, 0],
        CLIENT: [3, 3, 0],
    }


def test_spending_adds_divergences_by_unit() -> None:
    found = Spending.nothing(3)
    charged = THREE.charged_run({at(A): Charges(1, {PERSON: 5}), at(B): Charges(2, {RECORD: 2, PERSON: 1})})
    assert charged is not None
    found.add(charged, 8)
    found.add(charged, 8)
    one, twice = renyi_of_terms({STEP: 1}, 8), renyi_of_terms({STEP._replace(replace=True): 1}, 8)
    assert set(found.spent) == {("record", False), ("person", False), ("person", True)}
    assert found.spent["record", False] == pytest.approx(np.array([0, 4, 4]) * one)
    assert found.spent["person", False] == pytest.approx(np.array([10, 12, 2]) * one)
    assert found.spent["person", True] == pytest.approx(np.array([10, 12, 2]) * twice)
    assert {unit: held.tolist() for unit, held in found.units.items()} == {
        "record": [False, True, True], "person": [True, True, True],
    }  # fmt: skip
    bare = THREE.charged_run({at(A): Charges(1, {BARE: 1})})
    assert bare is not None
    found.add(bare, 8)
    assert found.spent["record", False].tolist() == [math.inf, math.inf, pytest.approx(4 * one)]
    assert found.units["record"].tolist() == [True, True, True]


def test_what_others_and_a_run_itself_came_to() -> None:
    runs = {
        "x": {at(B): Charges(5, {RECORD: 1})},
        "y": {at(A): Charges(2, {RECORD: 3})},
        "me": {at(B): Charges(1, {RECORD: 9})},
    }
    one = renyi_of_terms({STEP: 1}, 8)
    held = account(runs)
    others = held.others_spending(THREE, "me", 8, "budget", lambda name: name == "x")
    assert others.first.tolist() == [2, 2, 5] and others.closed.tolist() == [False, False, True]
    assert others.spent["record", False] == pytest.approx(np.array([3, 4, 1]) * one)
    own = held.own_spending(THREE, "me", 8)
    assert own.first.tolist() == [NEVER, 1, 1] and not own.closed.any()
    assert own.spent["record", False] == pytest.approx(np.array([0, 9, 9]) * one)
    nothing = held.own_spending(THREE, "new", 8)
    assert nothing.first.tolist() == [NEVER] * 3 and nothing.spent == {} and nothing.units == {}


def test_spending_of_others_stays_while_only_the_run_itself_goes_on() -> None:
    held = account({"x": {at(B): Charges(5, {RECORD: 1})}, "me": {at(B): Charges(6, {RECORD: 1})}})
    first = held.others_spending(THREE, "me", 8, "budget", bool)
    held.state.total, held.state.by_run["me"] = 3, 2
    assert held.others_spending(THREE, "me", 8, "budget", bool) is first
    assert held.others_spending(THREE, "me", 8, "another", bool) is not first
    assert held.others_spending(THREE, "new", 8, "budget", bool) is not first
    held.state.total = 4
    assert held.others_spending(THREE, "me", 8, "budget", bool) is not first


def test_what_an_account_knows_of_its_data() -> None:
    persons = domain("person", (1, 1), a=[True, False])
    held = account(
        {"x": {at(A): Charges(1, {PERSON: 1})}, "y": {at(B): Charges(2, {CLIENT: 1})}}, THREE, persons
    )
    assert held.charged_keys("record") == [THREE]
    assert held.charged_keys("person") == held.charged_keys("client") == [THREE, persons]
    assert held.unit() == "person" and held.is_private is True
    assert account({}).unit() is None and account({}).is_private is False
    public = account({"x": {at(A): Charges(1, {RECORD._replace(public=True): 1})}})
    assert public.is_private is False and public.unit() == "record"
    assert held.seen() == (7, 7) and held.seen("x") == (3, 7) and held.seen("y") == (6, 7)
    assert [name for name, _ in held.charged_runs()] == ["x", "x", "y"]
    assert [name for name, _ in held.charged_runs(persons, but="y")] == ["x"]


def test_whether_a_run_is_within_its_plan() -> None:
    held = account({"me": {at(A): Charges(1, {RECORD: 3})}})
    assert held.is_part(THREE, "me", {RECORD: 2}, {STEP: 5}) is True
    assert held.is_part(THREE, "me", {RECORD: 3}, {STEP: 5}) is False
    assert held.is_part(THREE, "new", {RECORD: 5}, {STEP: 5, OTHER: 1}) is True
    assert held.is_part(THREE, "new", {RECORD: 1, CLIENT: 1}, {STEP: 5}) is False
    assert held.is_part(THREE, "new", {BARE: 1}, {STEP: 5}) is False
    assert held.is_part(THREE, "new", {RECORD: 1}, None) is False
    # A unit that is coarser costs no more here: the plan counts it as it was written.
    assert held.is_part(THREE, "new", {PERSON: 1, RECORD: 1}, {STEP: 2}) is True


def test_runs_of_a_class_stand_in_the_order_of_their_first_releases() -> None:
    runs = {
        "x": {at(B): Charges(5, {RECORD: 1})},
        "y": {at(A): Charges(2, {PERSON: 3})},
    }
    held = account(runs, plans={"x": {"n": [[0.05, 1.0, 9]]}, "y": {"n": [[0.1, 2.0, 4]]}})
    replaced = STEP._replace(replace=True)
    x, y = RunSteps({STEP: 1}, {STEP: 9}), RunSteps({STEP: 3}, {OTHER: 4})
    y_replaced = RunSteps({replaced: 3}, {OTHER._replace(replace=True): 4})
    assert held.runs_of(THREE, 0) == [y] and held.runs_of(THREE, 2) == [x]
    assert held.runs_of(THREE, 1) == [y_replaced, x]  # this class was released by record too
    assert held.runs_of(THREE, 1, "y") == [y]
    assert held.runs_of(THREE, 0, adding=("new", {PERSON: 2}, {STEP: 2})) == [
        y,
        RunSteps({STEP: 2}, {STEP: 2}),
    ]
    more = held.runs_of(THREE, 2, adding=("x", {RECORD: 2, CLIENT: 1}, None))
    assert more == [
        RunSteps({STEP: 3, OTHER._replace(replace=True): 1}, {STEP: 9, OTHER._replace(replace=True): 1})
    ] or (more[0].charged == {STEP: 3, OTHER._replace(replace=True): 1})


def test_a_run_in_the_accountants_terms() -> None:
    replaced = STEP._replace(replace=True)
    assert run_steps({RECORD: 2}, {STEP: 5}, "record") == RunSteps({STEP: 2}, {STEP: 5})
    assert run_steps({PERSON: 2}, {STEP: 5}, "record") == RunSteps({replaced: 2}, {replaced: 5})
    assert run_steps({PERSON: 2}, {STEP: 5}, "person") == RunSteps({STEP: 2}, {STEP: 5})
    assert run_steps({BARE: 1, RECORD: 2}, None, "record") == RunSteps(None, None)


def test_the_smallest_delta_of_its_data() -> None:
    held = account({})
    assert held.smallest_delta == 1e-6
    held.state.deltas = {A: 1e-3, B: 1e-4, C: 1e-9}
    assert held.smallest_delta == 1e-4


def test_histories_are_distinct_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = {"x": {at(A): Charges(1, {RECORD: 3})}, "y": {at(B): Charges(2, {RECORD: 4})}}
    held = account(runs)
    x, y = RunSteps({STEP: 3}, None), RunSteps({STEP: 4}, None)
    assert sorted(map(len, held.histories())) == [1, 1, 2]
    assert [x, y] in held.histories() and [x] in held.histories() and [y] in held.histories()
    assert held.histories("x") == [[x]] and held.histories("never") == []
    # One run of seven steps and two that come to seven are kept apart.
    two = account(
        {**runs, "z": {at(C): Charges(3, {RECORD: 7})}},
        domain(a=[True, False], b=[True, False], c=[False, True], sizes=(1, 1)),
    )
    assert sorted(map(len, two.histories())) == [1, 2]
    monkeypatch.setattr(accounts, "_CANDIDATES", 3)
    assert sorted(map(len, held.histories())) == [1, 1, 2]
    monkeypatch.setattr(accounts, "_CANDIDATES", 2)
    assert held.histories() == [[RunSteps({STEP: 1}, None), RunSteps({STEP: 6}, None)]]
    assert held.histories("y") == [[y]]
    adding = ("new", {RECORD: 1}, None)
    new = RunSteps({STEP: 1}, None)
    assert sorted(map(len, held.histories(adding=adding))) == [2, 2, 3]
    assert all(runs[-1] == new for runs in held.histories(adding=adding))


def test_an_account_is_of_all_data_with_its_keys() -> None:
    state = LedgerState(
        releases={
            A: 1,
            NamedData("old", "print"): 1,
            NamedData("far", "else"): 1,
            NamedData("a", "x"): 1,
            NamedData("set", "2"): 1,
        },
        sets={"1": KnownSet(4, None, "", ()), "2": KnownSet(2, None, "", ("else",))},
    )
    classes = {"record": KeyGroups(np.array([3, 1]), {"2": np.array([True, False])})}
    held = account_of(state, "mine", "1", {"print"}, classes)
    assert {body: column.tolist() for body, column in held.keys[0].columns.items()} == {
        A: [True, True], NamedData("set", "2"): [True, False], NamedData("old", "print"): [True, True],
        NamedData("a", "x"): [True, True], NamedData("far", "else"): [True, False],
    }  # fmt: skip
    assert held.names == {"mine", "a", "old", "far", "set"}
    alone = account_of(state, "mine", "1", set(), {"record": KeyGroups(np.array([4]), {})})
    assert set(alone.keys[0].columns) == {A, NamedData("a", "x")} and alone.names == {"mine", "a"}


def test_data_without_keys_is_also_what_was_released_with_keys_under_its_name() -> None:
    state = LedgerState(releases={NamedData("mine", "1"): 2}, sets={"1": KnownSet(4, None, "", ())})
    held = account_without_keys(state, "mine", "never seen")
    assert set(held.keys[0].columns) == {NamedData("mine", "1")}


def test_data_without_keys_is_of_its_name_and_fingerprint() -> None:
    state = LedgerState(releases={A: 1, NamedData("b", "1"): 1, C: 1})
    held = account_without_keys(state, "new", "1")
    assert held.names == {"new", "a", "b"} and held.keys[0].unit == "record"
    assert {body: column.tolist() for body, column in held.keys[0].columns.items()} == {
        A: [True], NamedData("b", "1"): [True],
    }  # fmt: skip
    assert held.seen() == (0, 0)
