"""What rows add up to, by hand: every value of a state, its summary, and what is wrong with rows."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from fedtune.privacy.accounting.epsilon import Term
from fedtune.privacy.ledger import state as ledger_state
from fedtune.privacy.ledger.chain import GENESIS, Head, Row
from fedtune.privacy.ledger.releases import (
    charge_of,
    is_coarser,
    noise_scope,
    planned_in,
    purpose_of,
    release_of,
    terms_of_plan,
)
from fedtune.privacy.ledger.state import (
    Charges,
    Imported,
    KnownSet,
    LedgerState,
    LedgerWriter,
    NamedData,
    NodeData,
    Use,
    replay,
    state_from_summary,
    summary_differs,
)
from tests.support.plans import central_plan, distributed_plan, local_plan, public_plan

STEPS = [{"sample_rate": 0.05, "noise_multiplier": 1.0, "count": 5}]
USE, BARE = Use(False, "record", True, 0.05, 1.0), Use(True, "person", False, 1.0, 0.0)


def row(seq: int, kind: str, run: str | None = None, /, **body: Any) -> Row:
    return Row(seq, f"t{seq}", kind, run, body, f"h{seq - 1}", f"h{seq}")


def released(seq: int, run: str | None = "r1", kind: str = "reserved", **said: Any) -> Row:
    body = {
        "dataset": "visits", "fingerprint": "s1", "node": "a", "public": False, "unit": "record",
        "steps": STEPS, "num_rounds": 3, "delta": 1e-5, "round": 0, "trust": "local",
        "reproducible_noise": False, **said,
    }  # fmt: skip
    return row(seq, kind, run, **body)


def rows() -> list[Row]:
    return [
        row(1, "secret", check="c"),
        row(2, "budget", epsilon=1.0),
        row(3, "set", id="s1", records=7, persons=None, digest="d", old=["o1", "o2"]),
        released(4),
        released(5, delta=1e-6, planned=[[0.05, 1.0, 99]], round=1),
        released(6, node="b", planned=None, delta=0.0),
        released(
            7, run="r2", dataset="b", fingerprint="old", unit="person", public=True, steps=None, delta=0.5
        ),
        released(8, run="r2", kind="imported", steps=[*STEPS, {**STEPS[0], "noise_multiplier": 2.0}]),
        row(9, "import", ledger="first", node="a", seq=40, hash="h40"),
        row(10, "committed", "r1", reservation=4),
        released(11, run=None, dataset="b", fingerprint="old", steps=None, public=True, unit="person"),
        row(12, "set", id="s2", records=3, persons=2, digest="e", old=[]),
    ]


def test_a_state_is_the_sum_of_its_rows() -> None:
    state, problems = replay(rows())
    visits, old = NamedData("visits", "s1"), NamedData("b", "old")
    assert problems == []
    assert state == LedgerState(
        seq=12,
        hash="h12",
        summarised=0,
        node="a",
        has_budget=True,
        secret="c",
        runs={
            "r1": {NodeData("a", visits): Charges(4, {USE: 10}), NodeData("b", visits): Charges(6, {USE: 5})},
            "r2": {
                NodeData("a", old): Charges(7, {BARE: 1}),
                NodeData("a", visits): Charges(8, {USE: 5, USE._replace(noise_multiplier=2.0): 5}),
            },
            "": {NodeData("a", old): Charges(11, {BARE: 1})},
        },
        plans={"r1": {"a": [[0.05, 1.0, 15]], "b": None}, "r2": {"a": None}, "": {"a": None}},
        releases={visits: 4, old: 2},
        by_run={"r1": 3, "r2": 2, "": 1},
        total=6,
        deltas={visits: 1e-6, old: 1e-5},
        nodes={visits: ("a", "b"), old: ("a",)},
        sets={"s1": KnownSet(7, None, "d", ("o1", "o2")), "s2": KnownSet(3, 2, "e", ())},
        imports={"first": Imported("a", 40, "h40")},
    )
    assert state.size == 5 + 2 + 2 + 1
    assert LedgerState() == LedgerState(hash=GENESIS)


def test_a_summary_says_all_of_a_state_and_gives_it_back() -> None:
    state, _ = replay(rows())
    said = state.to_json()
    use = [False, "record", True, 0.05]
    assert said == {
        "node": "a",
        "has_budget": True,
        "secret": "c",
        "runs": [
            ["", "b", "old", "a", 11, [[True, "person", False, 1.0, 0.0, 1]]],
            ["r1", "visits", "s1", "a", 4, [[*use, 1.0, 10]]],
            ["r1", "visits", "s1", "b", 6, [[*use, 1.0, 5]]],
            ["r2", "b", "old", "a", 7, [[True, "person", False, 1.0, 0.0, 1]]],
            ["r2", "visits", "s1", "a", 8, [[*use, 1.0, 5], [*use, 2.0, 5]]],
        ],
        "plans": {"r1": {"a": [[0.05, 1.0, 15]], "b": None}, "r2": {"a": None}, "": {"a": None}},
        "by_run": [["", 1], ["r1", 3], ["r2", 2]],
        "releases": [["b", "old", 2], ["visits", "s1", 4]],
        "deltas": [["b", "old", 1e-5], ["visits", "s1", 1e-6]],
        "nodes": [["b", "old", ["a"]], ["visits", "s1", ["a", "b"]]],
        "sets": [["s1", 7, None, "d", ["o1", "o2"]], ["s2", 3, 2, "e", []]],
        "imports": [["first", "a", 40, "h40"]],
    }
    summary = row(13, "summary", **json.loads(json.dumps(said)))
    assert not summary_differs(summary, state)
    again = state_from_summary(summary)
    state.add(summary)
    assert (state.seq, state.hash, state.summarised) == (13, "h13", 13)
    assert again == state
    assert state_from_summary(row(13, "summary", releases=[])) is None


def test_the_order_of_rows_does_not_change_a_summary() -> None:
    one = [
        released(1, run="b", steps=[STEPS[0], {**STEPS[0], "sample_rate": 0.1}]),
        released(2, run="a", node="z"),
        row(3, "set", id="x", records=1, persons=1, digest="", old=[]),
        row(4, "set", id="w", records=1, persons=1, digest="", old=[]),
        row(5, "import", ledger="l2", node="a", seq=1, hash="h"),
        row(6, "import", ledger="l1", node="a", seq=1, hash="h"), released(7, dataset="a", run="a"),
    ]  # fmt: skip
    said = replay(one)[0].to_json()
    for key in ("runs", "by_run", "releases", "deltas", "nodes", "sets", "imports"):
        assert said[key] == sorted(said[key]), key
        assert len(said[key]) > 1, key


def test_a_copy_is_added_to_alone() -> None:
    state, _ = replay(rows())
    before = state.to_json()
    copy = state.copy()
    assert copy == state and copy is not state
    for one in (
        released(13, run="new", node="c", dataset="n"), released(14, delta=1e-9, node="d"),
        row(15, "summary"),
        row(16, "secret", check="d"), row(17, "set", id="s3", records=1, persons=1, digest="", old=[]),
        row(18, "import", ledger="l", node="n", seq=1, hash="h"),
    ):  # fmt: skip
        copy.add(one)
    assert state.to_json() == before and (state.seq, state.hash, state.total) == (12, "h12", 6)
    assert copy.summarised == 15 and state.summarised == 0
    # A run's charges are copied once a copy, not for each of its nodes.
    copy = state.copy()
    copy.add(released(13, node="e"))
    of_run = copy.runs["r1"]
    copy.add(released(14, node="f"))
    assert copy.runs["r1"] is of_run and len(of_run) == len(state.runs["r1"]) + 2
    # The one that was copied may be added to as well.
    state.add(released(13, node="g"))
    other = copy.copy()
    copy.add(released(15, node="h"))
    assert {source.node for source in state.runs["r1"]} == {"a", "b", "g"}
    assert {source.node for source in copy.runs["r1"]} == {"a", "b", "e", "f", "h"}
    assert {source.node for source in other.runs["r1"]} == {"a", "b", "e", "f"}
    assert set(other.plans["r1"]) == {"a", "b", "e", "f"} and set(state.plans["r1"]) == {"a", "b", "g"}


def test_what_follows_from_releases_is_found_however_they_came() -> None:
    state, _ = replay(rows())
    visits, old = NamedData("visits", "s1"), NamedData("b", "old")
    assert state.data_of("s1") == (visits,) and state.data_of("s9") == ()
    assert state.without_keys() == [old]
    copy = state.copy()
    copy.add(released(13, dataset="again", fingerprint="s1"))
    assert copy.data_of("s1") == (visits, NamedData("again", "s1")) and state.data_of("s1") == (visits,)
    again = state_from_summary(row(13, "summary", **json.loads(json.dumps(copy.to_json()))))
    assert again is not None
    assert set(again.data_of("s1")) == set(copy.data_of("s1")) and again.without_keys() == [old]


def test_what_was_taken_over_is_known_by_row_and_hash() -> None:
    state, _ = replay(rows())
    assert state.has_imported("first", Head(40, "h40")) is True
    assert (
        state.has_imported("first", Head(41, "h40")) is False
        and state.has_imported("first", Head(40, "x")) is False
    )
    assert state.has_imported("other", Head(40, "h40")) is False
    assert state.imported_of("first", {39: "h39", 40: "h40"}) == 40
    assert state.imported_of("first", {40: "x"}) == state.imported_of("first", {}) == 0
    assert state.imported_of("other", {40: "h40"}) == 0


def test_names_and_fingerprints_are_followed() -> None:
    state = LedgerState(
        releases=dict.fromkeys(
            (
                NamedData("a", "1"),
                NamedData("b", "1"),
                NamedData("b", "2"),
                NamedData("c", "3"),
                NamedData("b", "s"),
            ),
            1,
        ),
        sets={"s": KnownSet(1, None, "", ())},
    )
    linked = {NamedData("a", "1"), NamedData("b", "1"), NamedData("b", "2")}
    assert state.linked({"a"}, set(), all_data=False) == linked
    assert state.linked(set(), {"2"}, all_data=True) == linked | {NamedData("b", "s")}
    assert state.linked({"1"}, {"a"}, all_data=True) == set()
    assert state.names_of_set("1") == {"a", "b"} and state.names_of_set("a") == set()


def test_rows_that_contradict_one_another_are_named() -> None:
    lie = row(13, "summary", **{**replay(rows())[0].to_json(), "node": "z"})
    assert replay([*rows(), lie])[1] == ["row 13 sums the rows before it up wrongly"]
    assert replay([*rows(), row(13, "summary", old=1)])[1] == []  # of version 0.1
    assert replay([row(1, "other", runs=[])])[1] == []
    assert replay([released(1), row(2, "committed", reservation=9)])[1] == [
        "row 2 finishes release 9, which nothing began"
    ]
    assert replay([row(1, "committed")])[1] == ["row 1 finishes release None, which nothing began"]
    assert replay([released(1, kind="imported"), row(2, "committed", reservation=1)])[1] != []
    for wrong in (row(1, "set", id="x"), released(1, delta="x"), released(1, steps=[3])):
        assert replay([wrong])[1] == ["row 1 is not what a ledger writes"]


def test_a_release_is_told_as_it_was_written() -> None:
    one = release_of(released(4, round=2, purpose="evaluation", public=True), committed=True)
    assert (one.seq, one.time, one.node, one.run, one.round) == (4, "t4", "a", "r1", 2)
    assert (one.dataset, one.fingerprint, one.public, one.trust) == ("visits", "s1", True, "local")
    assert (one.unit, one.delta, one.reproducible_noise, one.committed) == ("record", 1e-5, False, True)
    assert one.steps == ((Term(0.05, 1.0), 5),) and one.purpose == "evaluation"
    bare = release_of(released(4, run=None, steps=None), committed=False)
    assert bare.steps is None and bare.run == "" and bare.purpose == "training" and not bare.committed
    assert purpose_of(row(1, "reserved")) == "training"


def test_plans_as_rows_name_them() -> None:
    assert planned_in({"planned": [(0.05, 1.0, 9)], "steps": STEPS}) == [[0.05, 1.0, 9]]
    assert planned_in({"planned": None, "steps": STEPS}) is None
    assert planned_in({**released(1).body}) == [[0.05, 1.0, 15]]
    assert planned_in({**released(1).body, "steps": None}) is None
    assert terms_of_plan(None) is None
    assert terms_of_plan([[0.05, 1.0, 9], [1.0, 4.0, 2], [0.05, 1.0, 1]]) == {
        Term(0.05, 1.0): 10,
        Term(1.0, 4.0): 2,
    }


def test_what_a_release_costs() -> None:
    plan = local_plan()
    assert charge_of(plan, 2) == {Term(0.05, 1.0): 10}
    assert charge_of(public_plan(), 1) is None
    assert charge_of(local_plan(reproducible_noise=True), 1) is None
    assert is_coarser("person", "record") is True and is_coarser("record", "record") is False
    assert is_coarser("record", "client") is False


def test_noise_that_nodes_share_counts_towards_another_node() -> None:
    """A row of version 0.1 has the noise towards the server: half the variance is left towards a node."""
    shared = released(1, trust="distributed").body
    told = {**shared, **noise_scope(distributed_plan())}
    assert planned_in(told) == [[0.05, 1.0, 15]]
    ((rate, noise, count),) = planned_in(shared) or []
    assert (rate, count) == (0.05, 15)
    assert math.sqrt(0.5) * (1 - 1e-9) < noise < math.sqrt(0.5)  # rounded to the safe side
    assert noise_scope(local_plan()) == {} and noise_scope(distributed_plan()) == {"towards": "everybody"}


class Paper:
    """In place of the chain."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def append(self, connection: Any, kind: str, body: Any, *, run: str | None, previous: str) -> Row:
        self.rows.append(Row(len(self.rows) + 1, "", kind, run, body, previous, f"h{len(self.rows) + 1}"))
        return self.rows[-1]


def test_a_summary_is_written_when_it_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_state, "_SNAPSHOT_EVERY", 4)
    paper = Paper()
    writer = LedgerWriter(paper, object(), LedgerState())  # type: ignore[arg-type]
    for place in range(9):
        written = writer.write("budget", {}, run=f"r{place}")
        assert written.kind == "budget" and written.run == f"r{place}"
    assert [one.seq for one in paper.rows if one.kind == "summary"] == [4 + 1, 5 + 4 + 1]
    assert [one.previous for one in paper.rows] == [GENESIS, *(f"h{seq}" for seq in range(1, 11))]
    assert (writer.state.seq, writer.state.summarised) == (11, 10)
    assert paper.rows[4].body == LedgerState(has_budget=True).to_json() and paper.rows[4].run is None


def test_a_long_summary_is_written_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_state, "_SNAPSHOT_EVERY", 2)
    paper = Paper()
    sets = {f"s{i}": KnownSet(1, None, "", ()) for i in range(6)}
    writer = LedgerWriter(paper, object(), LedgerState(sets=sets))  # type: ignore[arg-type]
    for _ in range(7):
        writer.write("budget", {})
    assert [one.seq for one in paper.rows if one.kind == "summary"] == [7]


def test_a_charge_begins_with_the_first_round() -> None:
    """A plan of correlated noise is charged from its first round, whose share is not that of the second."""
    plan = central_plan(method="dp_ftrl", num_rounds=15, bands=10, min_separation=10, cohort_size=20)
    assert charge_of(plan, 1) == plan.terms(1, after=0) != plan.terms(1, after=1)
