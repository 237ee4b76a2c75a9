"""Whether one more release is allowed: by the plan its run began with, and by the owner's budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from fedtune.errors import BudgetExhausted, PrivacyError, SeparationError
from fedtune.privacy.accounting.epsilon import Term, epsilon_of_terms
from fedtune.privacy.accounting.filter import fits, renyi_of_terms
from fedtune.privacy.ledger import allowance
from fedtune.privacy.ledger.accounts import Account, AccountKeys
from fedtune.privacy.ledger.allowance import Allowance, ReleaseRequest, RunCounts
from fedtune.privacy.ledger.budget import Budgets, PrivacyBudget
from fedtune.privacy.ledger.chain import Row
from fedtune.privacy.ledger.releases import steps_of
from fedtune.privacy.ledger.state import Charges, LedgerState, NamedData, NodeData, Use
from tests.support.golden import Golden
from tests.support.plans import central_plan, local_plan, public_plan

STEP = Term(0.05, 1.0)
BUDGET = PrivacyBudget(2.0, 1e-5)
TINY = {Term(1.0, 900.0): 1}
# Fits by the privacy loss distribution, and not by the filter: such a run is admitted whole.
WHOLE = {Term(1.0, 6.0): next(
    n for n in range(1, 99) if not fits({Term(1.0, 6.0): n}, BUDGET.epsilon, BUDGET.delta)
)}  # fmt: skip


def test_the_run_that_is_admitted_whole_is_one() -> None:
    assert epsilon_of_terms(WHOLE, BUDGET.delta) <= BUDGET.epsilon
    assert Allowance()._closes(WHOLE, BUDGET) is True
    assert Allowance()._closes(TINY, BUDGET) is False and Allowance()._closes(None, BUDGET) is False


def account(
    *released: tuple[str, str, list[bool], Mapping[Term, int]],
    plans: Mapping[str, list[Any]] | None = None,
    sizes: tuple[int, ...] = (5,),
) -> Account:
    """Records in classes of `sizes`; `released`: run, unit, which, steps; `plans`: by run, of nodes."""
    state, columns = LedgerState(), {}
    for row, (run, unit, held, steps) in enumerate(released, start=1):
        body = NamedData("visits", f"set {row}")
        columns[body] = np.array(held)
        uses = {Use(False, unit, True, t.sample_rate, t.noise_multiplier): n for t, n in steps.items()}
        state.runs.setdefault(run, {})[NodeData("clinic", body)] = Charges(row, uses)
        state.plans[run] = {"clinic": None}
        state.total += 1
        state.by_run[run] = state.by_run.get(run, 0) + 1
    for run, of_nodes in (plans or {}).items():
        state.plans[run] = {f"node {i}": planned(one) for i, one in enumerate(of_nodes)}
    return Account(state, {"visits"}, [AccountKeys("record", np.array(sizes), columns)])


def planned(terms: Mapping[Term, int]) -> list[list[Any]]:
    return [[term.sample_rate, term.noise_multiplier, count] for term, count in terms.items()]


def refused(
    held: Account, steps: Mapping[str, Any], plan: Any = None, budget: PrivacyBudget = BUDGET, run: str = "me"
) -> int | None:
    asked = ReleaseRequest(run, local_plan(), steps, plan, "training")
    return Allowance()._refused(held, held.keys[0], asked, budget)


def between(low: Mapping[Term, int], high: Mapping[Term, int]) -> PrivacyBudget:
    """A budget whose filter admits `low`, and not `high`."""
    for epsilon in np.linspace(0.2, 8.0, 157):
        if fits(low, float(epsilon), 1e-5) and not fits(high, float(epsilon), 1e-5):
            return PrivacyBudget(float(epsilon), 1e-5)
    raise AssertionError("none")


def test_what_a_step_costs_once_and_as_a_replacement() -> None:
    costs = allowance._costs(
        ReleaseRequest("r", local_plan(), {"person": {STEP: 3}, "client": None}, None, "x"), 8
    )
    assert costs == {
        ("person", False): renyi_of_terms({STEP: 3}, 8),
        ("person", True): renyi_of_terms({STEP._replace(replace=True): 3}, 8),
        ("client", False): math.inf,
        ("client", True): math.inf,
    }
    assert costs["person", True] > 1.5 * costs["person", False]


def test_a_release_of_a_coarser_unit_counts_as_a_replacement_for_finer_keys() -> None:
    ten, doubled = {STEP: 10}, {STEP._replace(replace=True): 10}
    budget = between({**ten, **TINY}, {**doubled, **TINY})
    # Persons were used before, and now records are asked for; the other way round; and both at once.
    assert refused(account(("old", "person", [True], ten)), {"person": TINY}, budget=budget) is None
    assert refused(account(("old", "person", [True], ten)), {"record": TINY}, budget=budget) == 0
    assert refused(account(("old", "person", [True], TINY)), {"person": ten}, budget=budget) is None
    assert refused(account(("old", "record", [True], TINY)), {"person": ten}, budget=budget) == 0
    assert refused(account(("me", "record", [True], TINY)), {"person": ten}, budget=budget) == 0
    for both in ({"person": ten, "record": TINY}, {"record": TINY, "person": ten}):
        assert refused(account(), both, budget=budget) == 0


def test_the_first_run_may_be_admitted_whole_and_no_further() -> None:
    more = {term: count + 1 for term, count in WHOLE.items()}
    assert refused(account(), {"record": WHOLE}, WHOLE) is None
    assert refused(account(), {"record": more}, WHOLE) == 0
    assert refused(account(), {"record": WHOLE}, TINY) == 0  # a plan that does not close: by the filter
    assert refused(account(), {"record": WHOLE}) == 0
    one = dict.fromkeys(WHOLE, 1)
    left = {term: count - 1 for term, count in WHOLE.items()}
    assert refused(account(("me", "record", [True], one)), {"record": left}, WHOLE) is None
    assert refused(account(("me", "record", [True], one)), {"record": WHOLE}, WHOLE) == 0


def test_after_a_run_that_was_admitted_whole_none_follows() -> None:
    one = ("old", "record", [True], TINY)
    assert refused(account(one, plans={"old": [WHOLE]}), {"record": TINY}, TINY) == 0
    assert refused(account(one, plans={"old": [WHOLE]}), {"record": TINY}, WHOLE) == 0
    assert refused(account(one, plans={"old": [TINY]}), {"record": TINY}, TINY) is None
    # Its nodes may have planned differently: one such plan is enough.
    assert refused(account(one, plans={"old": [WHOLE, TINY]}), {"record": TINY}, TINY) == 0
    assert refused(account(one, plans={"old": [TINY, WHOLE]}), {"record": TINY}, TINY) == 0


def test_which_run_came_first_decides() -> None:
    mine, other = ("me", "record", [True], TINY), ("old", "record", [True], TINY)
    assert refused(account(mine, other, plans={"old": [WHOLE]}), {"record": TINY}, TINY) is None
    assert refused(account(other, mine, plans={"old": [WHOLE]}), {"record": TINY}, TINY) == 0
    # Where another came after a run that closes, not even that run goes on.
    assert refused(account(mine, other, plans={"old": [TINY]}), {"record": TINY}, WHOLE) == 0


def test_the_class_that_would_be_charged_most_is_named() -> None:
    some, most = {STEP: 2000}, {STEP: 3000}
    held = account(
        ("a", "record", [False, True, False, False], some),
        ("b", "record", [False, False, True, False], most),
        sizes=(1, 2, 3, 4),
    )
    place = refused(held, {"record": {STEP: 1}})
    assert place == 2 and type(place) is int
    # A class that is allowed is not named, whatever it was charged.
    tiny = account(("old", "record", [False, True], TINY), plans={"old": [WHOLE]}, sizes=(1, 1))
    assert refused(tiny, {"record": TINY}, TINY) == 1


def test_uses_are_counted_as_a_ledger_writes_them() -> None:
    steps = {"record": {STEP: 3}, "client": None}
    assert ReleaseRequest("r", local_plan(), steps, None, "training").uses() == {
        Use(False, "record", True, 0.05, 1.0): 3,
        Use(False, "client", False, 1.0, 0.0): 1,
    }


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("training", "refuses round 3: it would"),
        ("evaluation", "refuses the evaluation after round 3: it would"),
        ("run", "refuses the run before its first round: it would"),
        ("size", "refuses its size after round 3: it would"),
    ],
)
def test_a_refusal_says_what_of(what: str, said: str) -> None:
    text = refusal(account(("me", "record", [True], {STEP: 1})), what, {STEP: 9000})
    assert f"node 'clinic' {said} raise epsilon from " in text
    assert "lets no other follow" not in text and "were used before" not in text


def refusal(held: Account, what: str, steps: Mapping[Term, int], plan: Any = None) -> str:
    asked = ReleaseRequest("me", local_plan(), {"record": steps}, plan, what)
    with pytest.raises(BudgetExhausted) as error:
        Allowance().check(
            Budgets(BUDGET, {}), held, asked, dataset="visits", node="clinic", round=3, public=False
        )
    return " ".join(str(error.value).split())


def test_a_refusal_says_why_none_may_follow_only_where_one_was_admitted_whole() -> None:
    one = ("old", "record", [True], TINY)
    text = refusal(account(one, plans={"old": [WHOLE]}), "training", TINY)
    assert "5 of its 5 texts were used before. Its first run was admitted as a whole" in text
    text = refusal(account(one, plans={"old": [TINY]}), "training", {STEP: 9000})
    assert "lets no other follow" not in text
    more = {term: count + 1 for term, count in WHOLE.items()}
    assert "lets no other follow" not in refusal(account(), "training", more, WHOLE)


def test_a_refusal_says_that_nothing_is_left_only_where_others_have_spent_it() -> None:
    left = "Lower federation.num_rounds"
    spent = refusal(account(("old", "record", [True], {STEP: 9000})), "training", TINY)
    assert allowance._SPENT in spent and left not in spent
    some = refusal(account(("old", "record", [True], TINY)), "training", {STEP: 9000})
    assert allowance._SPENT not in some and left in some
    own = refusal(account(("me", "record", [True], {STEP: 9000})), "training", TINY)
    assert allowance._SPENT not in own and left in own


def test_the_way_out_is_that_of_what_was_asked_for() -> None:
    answers = local_plan(evaluation_share=0.2, evaluation_answers=2, evaluation_noise=3.0).evaluation()
    assert answers is not None
    assert allowance._way_out(answers).startswith("Lower federation.evaluation_epsilon or ")
    assert allowance._way_out(local_plan()).startswith("Lower federation.num_rounds or ")


def test_a_release_counts_as_public_only_if_it_is_declared_so() -> None:
    asked = ReleaseRequest("me", local_plan(), {"record": TINY}, TINY, "training")
    said: dict[str, Any] = {"dataset": "visits", "node": "clinic", "round": 0}
    assert Allowance().check(Budgets(BUDGET, {}), account(), asked, **said, public=False) is False
    assert Allowance().check(Budgets(BUDGET, {}), account(), asked, **said, public=True) is True


PLAN = local_plan(num_rounds=3)
WHOLE_PLAN: Any = ([[0.05, 1.0, 15]],)


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
    books.add(kind="committed", reservation=1)
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


def test_a_run_keeps_the_unit_of_the_nodes_own_first_release(
    books: Books, counts: RunCounts, golden: Golden
) -> None:
    books.add(node="other", unit="person")
    books.add(purpose="evaluation")
    books.add(unit="person")
    assert made(counts) == 1
    with pytest.raises(PrivacyError) as raised:
        made(counts, local_plan(num_rounds=3, unit="person"))
    golden(raised)
    assert made(counts, local_plan(num_rounds=3, unit="person"), node="other") == 1


def test_a_run_keeps_the_steps_of_its_first_release(books: Books, counts: RunCounts, golden: Golden) -> None:
    other = local_plan(num_rounds=3, noise_multiplier=2.0)
    assert made(counts, other) == 0
    books.add()
    books.add(steps=steps_of(other, 0))
    assert made(counts) == 2
    with pytest.raises(PrivacyError) as raised:
        made(counts, other)
    golden(raised)
    books.add(run="once")
    with pytest.raises(PrivacyError) as raised:
        made(counts, other, run="once")
    golden(raised)


def test_a_run_keeps_the_whole_plan_that_it_began_with(
    books: Books, counts: RunCounts, golden: Golden
) -> None:
    books.add(planned=WHOLE_PLAN[0])
    books.add(node="other", planned=None)
    books.add(run="old")
    assert made(counts, planned=WHOLE_PLAN) == made(counts, planned=None) == 1
    for another in (([[0.05, 1.0, 16]],), (None,)):
        with pytest.raises(PrivacyError) as raised:
            made(counts, planned=another)
        golden(raised)
    assert made(counts, planned=WHOLE_PLAN, run="old") == 1  # a row that does not say is held to nothing
    with pytest.raises(PrivacyError):
        made(counts, planned=WHOLE_PLAN, node="other")


def test_counts_of_so_many_runs_are_kept(
    books: Books, counts: RunCounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allowance, "_MOST_RUNS", 2)
    for run in ("a", "b", "c"):
        books.add(run=run)
    for run in ("a", "b", "a", "b"):
        assert made(counts, run=run) == 1
    assert books.read == [1, 2]  # once each, and kept
    assert made(counts, run="c") == 1 and len(counts._counted) == 1
    assert made(counts, run="a") == 1 and books.read == [1, 2, 3, 1]


def test_correlated_noise_holds_rounds_apart_and_is_charged_with_the_first(
    books: Books, counts: RunCounts, golden: Golden
) -> None:
    plan = central_plan(method="dp_ftrl", num_rounds=15, bands=10, min_separation=10, cohort_size=20)
    books.add(unit="client", steps=steps_of(plan, 0), num_rounds=plan.num_rounds)
    assert counts.made(object(), plan, None, node="n", run="r", round=10) == 1
    assert counts.made(object(), plan, None, node="another", run="r", round=3) == 0
    with pytest.raises(SeparationError) as raised:
        counts.made(object(), plan, None, node="n", run="r", round=9)
    assert "'n'" in str(raised.value)
    assert "'r'" in str(raised.value)
    golden(raised)


def test_steps_as_a_row_names_them() -> None:
    assert steps_of(PLAN, 0) == [{"sample_rate": 0.05, "noise_multiplier": 1.0, "count": 5}]
    assert steps_of(public_plan(), 0) is None
