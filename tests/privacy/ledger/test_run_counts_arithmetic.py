"""How many releases a run has made, on rows that are written down by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fedtune.errors import BudgetExhausted, PrivacyError, SeparationError
from fedtune.privacy.ledger import run_counts
from fedtune.privacy.ledger.chain import Row
from fedtune.privacy.ledger.run_counts import RunCounts, steps_of
from tests.support.plans import central_plan, local_plan, public_plan

PLAN = local_plan(num_rounds=3)
WHOLE: Any = ([[0.05, 1.0, 15]],)


class Books:
    """In place of the chain: rows by run, and which were read."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.read: list[int] = []

    def add(self, node: str = "n", run: str = "r", kind: str = "reserved", **said: Any) -> None:
        body = {
            "node": node, "unit": "record", "steps": steps_of(PLAN, 0), "round": 0, "num_rounds": 3, **said,
        }  # fmt: skip
        self.rows.append(Row(len(self.rows) + 1, "", kind, run, body, "", ""))

    def run_rows(self, connection: Any, run: str, *, after: int = 0) -> Iterator[Row]:
        for row in self.rows:
            if row.run == run and row.seq > after:
                self.read.append(row.seq)
                yield row


@pytest.fixture
def books() -> Books:
    return Books()


@pytest.fixture
def counts(books: Books) -> RunCounts:
    return RunCounts(books)  # type: ignore[arg-type]


def made(counts: RunCounts, plan: Any = PLAN, planned: Any = None, node: str = "n", run: str = "r") -> int:
    return counts.made(object(), plan, planned, node=node, run=run, round=0)


def test_releases_of_one_run_node_and_purpose_are_counted(books: Books, counts: RunCounts) -> None:
    assert made(counts) == 0
    books.add()
    books.add(node="other")
    books.add(run="another")
    books.add(kind="committed")
    books.add(purpose="evaluation")
    books.add(kind="imported", purpose="training")
    assert made(counts) == 2 and made(counts, node="other") == 1 and made(counts, run="another") == 1
    assert counts.made(None, PLAN, None, node="n", run="r", round=0) == 2
    books.read.clear()
    assert made(counts) == 2 and books.read == []


def test_a_run_ends_at_the_fewest_releases_that_any_plan_of_its_allowed(
    books: Books, counts: RunCounts
) -> None:
    longer = local_plan(num_rounds=9)
    books.add(num_rounds=9)
    books.add(num_rounds=3)
    books.add(num_rounds=9)
    with pytest.raises(BudgetExhausted, match="allows 3 releases, and 3 were made"):
        made(counts, longer)
    books.add(run="r2", num_rounds=9)
    assert made(counts, longer, run="r2") == 1
    with pytest.raises(BudgetExhausted, match="allows 1 releases, and 1 were made"):
        made(counts, local_plan(num_rounds=1), run="r2")
    answers = local_plan(evaluation_share=0.2, evaluation_answers=1, evaluation_noise=3.0).evaluation()
    books.add(run="r3", purpose="evaluation")
    with pytest.raises(BudgetExhausted, match="allows 1 answers about held-out data, and 1 were made"):
        made(counts, answers, run="r3")


def test_a_run_keeps_the_unit_of_the_nodes_own_first_release(books: Books, counts: RunCounts) -> None:
    books.add(node="other", unit="person")
    books.add(purpose="evaluation")
    books.add(unit="person")
    assert made(counts) == 1
    with pytest.raises(
        PrivacyError, match=r"protects one person.*began with releases that protect one record"
    ):
        made(counts, local_plan(num_rounds=3, unit="person"))
    assert made(counts, local_plan(num_rounds=3, unit="person"), node="other") == 1


def test_a_run_keeps_the_steps_of_its_first_release(books: Books, counts: RunCounts) -> None:
    other = local_plan(num_rounds=3, noise_multiplier=2.0)
    assert made(counts, other) == 0
    books.add()
    books.add(steps=steps_of(other, 0))
    assert made(counts) == 2
    with pytest.raises(PrivacyError, match="another sampling rate"):
        made(counts, other)
    books.add(run="once")
    with pytest.raises(PrivacyError, match="another sampling rate"):
        made(counts, other, run="once")


def test_a_run_keeps_the_whole_plan_that_it_began_with(books: Books, counts: RunCounts) -> None:
    books.add(planned=WHOLE[0])
    books.add(node="other", planned=None)
    books.add(run="old")
    assert made(counts, planned=WHOLE) == made(counts, planned=None) == 1
    for another in (([[0.05, 1.0, 16]],), (None,)):
        with pytest.raises(PrivacyError, match="number of rounds than the run began with"):
            made(counts, planned=another)
    assert made(counts, planned=WHOLE, run="old") == 1  # a row that does not say is held to nothing
    with pytest.raises(PrivacyError):
        made(counts, planned=WHOLE, node="other")


def test_counts_of_so_many_runs_are_kept(
    books: Books, counts: RunCounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_counts, "_KEPT_RUNS", 2)
    for run in ("a", "b", "c"):
        books.add(run=run)
    for run in ("a", "b", "a", "b"):
        assert made(counts, run=run) == 1
    assert books.read == [1, 2]  # once each, and kept
    assert made(counts, run="c") == 1 and len(counts._counted) == 1
    assert made(counts, run="a") == 1 and books.read == [1, 2, 3, 1]


def test_correlated_noise_holds_rounds_apart_and_is_charged_with_the_first(
    books: Books, counts: RunCounts
) -> None:
    plan = central_plan(mechanism="dp_ftrl", num_rounds=15, bands=10, min_separation=10, cohort_size=20)
    books.add(unit="client", steps=steps_of(plan, 0), num_rounds=plan.num_rounds)
    assert counts.made(object(), plan, None, node="n", run="r", round=10) == 1
    assert counts.made(object(), plan, None, node="another", run="r", round=3) == 0
    with pytest.raises(SeparationError, match="'n'.*'r'"):
        counts.made(object(), plan, None, node="n", run="r", round=9)


def test_steps_as_a_row_names_them() -> None:
    assert steps_of(PLAN, 0) == [{"sample_rate": 0.05, "noise_multiplier": 1.0, "count": 5}]
    assert steps_of(public_plan(), 0) is None
