"""Whether one more release is allowed: by the plan that its run began with, and by its owner's budget.

**The plan.** A run is held to the plan of its first release: no more releases than it allows, none sooner,
and each for the unit of privacy and with the rate, noise and steps that it began with (`RunCounts`). Only so
may a run be accounted as one that was fixed in advance: the same noise for another unit is another promise.

**The budget.** It is enforced by a filter that is proven for releases that are chosen while their results are
seen, and one run that was fixed in advance may be admitted as a whole by its privacy loss distribution
(`fedtune.privacy.accounting.filter`, which has the proof). Both are asked for every group of keys that the
release would charge (`fedtune.privacy.ledger.accounts`): a release is allowed if it is allowed for all of
them (`Allowance`).

Sums of Renyi divergences at one order take no time; the privacy loss distribution of a run's plan does, and
is cached on disk (`fedtune.privacy.accounting.calibration`), so that another process need not even load the
accountant.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedtune.errors import BudgetExhausted, PrivacyError
from fedtune.privacy.accounting.calibration import cached_epsilon
from fedtune.privacy.accounting.epsilon import Term
from fedtune.privacy.accounting.filter import closes, order_of, renyi_budget, renyi_of_terms, spent
from fedtune.privacy.ledger.accounts import NEVER, Account, AccountKeys
from fedtune.privacy.ledger.budget import Budgets, PrivacyBudget
from fedtune.privacy.ledger.chain import Chain, Row
from fedtune.privacy.ledger.releases import RELEASED, Planned, is_coarser, purpose_of, steps_of, terms_of_plan
from fedtune.privacy.ledger.state import Use
from fedtune.privacy.plan import UNITS, PrivacyPlan, ReleasePlan

__all__ = ["Allowance", "ReleaseRequest", "RunCounts"]

_MOST_RUNS = 64  # whose releases a process counts
_RELEASES = {
    "training": "releases",
    "evaluation": "answers about held-out data",
    "confusion": "confusion matrices",
}
_WHAT = {
    "training": "round {}",
    "evaluation": "the evaluation after round {}",
    "confusion": "to tell how right a model is on its data",
    "run": "the run before its first round",
}
_WAY_OUT = {
    "training": "Lower federation.num_rounds or train.local_steps, or raise privacy.noise_multiplier.",
    "evaluation": "Lower federation.evaluation_epsilon or privacy.epsilon.",
    "confusion": "Give a smaller --epsilon.",
}
_NO_FOLLOWER = "Its first run was admitted as a whole, as it was fixed in advance, and lets no other follow."
_SPENT = "Nothing is left: use other data, or its owner allows more."


@dataclass
class _Counted:
    """Releases that one node made in one run for one purpose."""

    rounds: list[int] = field(default_factory=list)  # of each release
    agreed: float = math.inf  # the fewest that a plan allowed
    steps: Any = None  # what the first of them added to the account


@dataclass
class _OfNode:
    """What one node did in one run."""

    purposes: defaultdict[str, _Counted] = field(default_factory=lambda: defaultdict(_Counted))
    planned: tuple[Planned] | None = None  # the whole run's plan as its first release named it
    unit: str | None = None  # of privacy, of the node's first release in the run, for whatever purpose


@dataclass
class _OfRun:
    """What the rows of one run say, up to row `seq`."""

    seq: int = 0
    nodes: defaultdict[str, _OfNode] = field(default_factory=lambda: defaultdict(_OfNode))
    committed: set[int] = field(default_factory=set)  # rows of reservations


class RunCounts:
    """Counts that last from one release to the next; rows of other processes are read as they come.

    Each row is read once, whichever node asks: a simulation has thousands of nodes in one run.
    """

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._counted: dict[str, _OfRun] = {}

    def made(
        self, connection: Any, plan: ReleasePlan, planned: tuple[Planned] | None, *, node: str, run: str,
        round: int,
    ) -> int:  # fmt: skip
        """Releases for the plan's purpose so far. `planned`: the whole run's plan, if it is known.

        Raises `BudgetExhausted`, `SeparationError` or `PrivacyError` if the run may not make one more.
        """
        of_node = self._count(connection, run).nodes[node]
        counted = of_node.purposes[plan.purpose]
        made, agreed = len(counted.rounds), min(counted.agreed, plan.num_rounds)
        if isinstance(plan, PrivacyPlan):
            plan.check_round(node, run, round, counted.rounds)
        if made >= agreed:
            what = _RELEASES.get(plan.purpose, f"releases of a {plan.purpose}")
            raise BudgetExhausted(
                f"node '{node}' refuses round {round} of run '{run}': its plan allows {agreed:.0f} {what}, "
                f"and {made} were made (rounds that were repeated or interrupted count, because they may "
                "have been seen). Start a new run; its noise will be calibrated for its own number of "
                "rounds.",
                public=True,
            )
        if of_node.unit not in (None, plan.unit):
            raise PrivacyError(
                f"node '{node}' refuses round {round} of run '{run}': it is asked for a release that "
                f"protects one {plan.unit} (privacy.unit), and the run began with releases that protect one "
                f"{of_node.unit}. Start a new run."
            )
        other_steps = made > 0 and counted.steps != steps_of(plan, 0)
        if other_steps or (planned is not None and of_node.planned not in (None, planned)):
            raise PrivacyError(
                f"node '{node}' refuses round {round} of run '{run}': it is asked for releases with another "
                "sampling rate, noise, number of steps or number of rounds than the run began with. A run is "
                "accounted by the plan of its first release; start a new run."
            )
        return made

    def rounds(self, connection: Any, run: str, node: str, purpose: str | None) -> list[int]:
        """The round of each release of a node in a run, oldest first; `purpose` None: of all, by purpose."""
        of_node = self._count(connection, run).nodes[node]
        return [
            round
            for name, counted in of_node.purposes.items()
            if purpose in (None, name)
            for round in counted.rounds
        ]

    def is_committed(self, connection: Any, run: str, seq: int) -> bool:
        """Whether the reservation in row `seq` came to its end."""
        return seq in self._count(connection, run).committed

    def _count(self, connection: Any, run: str) -> _OfRun:
        # Only rows that this process has not counted yet: those before them are proven by the chain, whose
        # last known row is looked at before every reservation.
        if run not in self._counted and len(self._counted) >= _MOST_RUNS:
            self._counted.clear()
        counted = self._counted.setdefault(run, _OfRun())
        for row in () if connection is None else self._chain.run_rows(connection, run, after=counted.seq):
            if row.kind == "committed":
                counted.committed.add(row.body["reservation"])
            elif row.kind in RELEASED:
                _add(counted.nodes[row.body["node"]], row)
            counted.seq = row.seq
        return counted


def _add(of_node: _OfNode, row: Row) -> None:
    """Counts a release of the node."""
    body, counted = row.body, of_node.purposes[purpose_of(row)]
    of_node.unit = of_node.unit or body["unit"]
    if "planned" in body:
        of_node.planned = (body["planned"],)
    if not counted.rounds:
        counted.steps = body["steps"]
    counted.rounds.append(body["round"])
    counted.agreed = min(counted.agreed, body["num_rounds"])


@dataclass(frozen=True)
class ReleaseRequest:
    """What a run asks for.

    Attributes:
        run: its id.
        plan: of the release; of several, the first.
        steps: what is to be charged now, by unit of privacy; None where it has no noise.
        planned: everything that the run's plan allows, as it was fixed before its first release.
        what: `training`, `evaluation`, ... or `run`, for a refusal.
    """

    run: str
    plan: ReleasePlan
    steps: Mapping[str, Mapping[Term, int] | None]
    planned: Mapping[Term, int] | None
    what: str

    def uses(self) -> dict[Use, int]:
        """`steps` as a ledger counts them."""
        uses: dict[Use, int] = {}
        for unit, terms in self.steps.items():
            if terms is None:
                uses[Use(False, unit, False, 1.0, 0.0)] = 1
            else:
                uses |= {
                    Use(False, unit, True, t.sample_rate, t.noise_multiplier): n for t, n in terms.items()
                }
        return uses


class Allowance:
    """What budgets allow; it remembers which plans let no other run follow."""

    def __init__(self) -> None:
        self._closing: dict[tuple[object, PrivacyBudget], bool] = {}

    def check(
        self, budgets: Budgets, account: Account, request: ReleaseRequest, *, dataset: str, node: str,
        round: int, public: bool,
    ) -> bool:  # fmt: skip
        """Whether the release counts as public: declared so, and never treated as private before.

        Raises:
            BudgetExhausted: what is requested would exceed a budget of this data.
        """
        names = account.names
        if public and not account.is_private and not (set(budgets.datasets) & names):
            return True
        what = _WHAT.get(request.what, f"its {request.what} after round {{}}").format(round)
        for budget in budgets.of(names):
            if budget.unit is not None and is_coarser(budget.unit, request.plan.unit):
                raise BudgetExhausted(
                    f"node '{node}' refuses {what}: the plan protects one {request.plan.unit}, and the "
                    f"owner's budget asks for every {budget.unit} of '{dataset}' to be protected. Set "
                    f"privacy.unit={budget.unit}.",
                    public=True,
                )
            for keys in account.charged_keys(request.plan.unit):
                group = self._refused(account, keys, request, budget)
                if group is not None:
                    raise self._refusal(account, keys, group, request, budget, dataset, node, what)
        return False

    def _refused(
        self, account: Account, keys: AccountKeys, request: ReleaseRequest, budget: PrivacyBudget
    ) -> int | None:
        """The group of keys that would be charged most over its budget; None if the release is allowed."""
        order = order_of(budget.epsilon, budget.delta)
        others = account.others_spending(
            keys, request.run, order, budget,
            lambda run: any(
                self._closes(terms_of_plan(one), budget) for one in account.state.plans[run].values()
            ),
        )  # fmt: skip
        own = account.own_spending(keys, request.run, order)
        finest = np.full(len(keys.sizes), min(UNITS.index(unit) for unit in request.steps))
        for spending in (others, own):
            for unit, released in spending.units.items():
                finest[released] = np.minimum(finest[released], UNITS.index(unit))
        total = _at(finest, {(u, r): np.full(len(finest), v) for (u, r), v in _costs(request, order).items()})
        total += _at(finest, others.spent) + _at(finest, own.spent)
        touched = others.first != NEVER
        # Which run charged the group first; one that closed the account lets no other follow.
        mine = ~touched | (own.first < others.first)
        closed = np.where(mine, self._closes(request.planned, budget), others.closed)
        within = total <= renyi_budget(budget.epsilon, budget.delta, order)
        allowed = np.where(
            closed, ~touched & account.is_part(keys, request.run, request.uses(), request.planned), within
        )
        if allowed.all():
            return None
        return int(np.argmax(np.where(allowed, -1.0, total)))

    def _closes(self, planned: Mapping[Term, int] | None, budget: PrivacyBudget) -> bool:
        """`filter.closes`, remembered."""
        if planned is None:
            return False
        key = (frozenset(planned.items()), budget)
        if key not in self._closing:
            self._closing[key] = closes(planned, budget.epsilon, budget.delta, fixed=cached_epsilon)
        return self._closing[key]

    def _refusal(
        self, account: Account, keys: AccountKeys, group: int, request: ReleaseRequest, budget: PrivacyBudget,
        dataset: str, node: str, what: str,
    ) -> BudgetExhausted:  # fmt: skip
        limit, delta = budget.epsilon, budget.delta
        before = account.runs_of(keys, group)
        after = account.runs_of(keys, group, adding=(request.run, request.uses(), request.planned))
        now = spent(before, delta, limit, fixed=cached_epsilon)
        then = spent(after, delta, limit, fixed=cached_epsilon)
        text = (
            f"node '{node}' refuses {what}: it would raise epsilon from {now:.4g} to {then:.4g}, over its "
            f"budget of {limit:g} at delta {delta:g} for '{dataset}'."
        )
        seen, texts = account.seen(request.run)
        if seen:
            text += f" {seen} of its {texts} texts were used before."
        if len(after) > 1 and self._closes(after[0].planned, budget):
            return BudgetExhausted(f"{text} {_NO_FOLLOWER} {_SPENT}")
        if len(after) > 1 and now >= limit:
            return BudgetExhausted(f"{text} {_SPENT}")
        return BudgetExhausted(f"{text} {_way_out(request.plan)}")


def _at(finest: Any, spent: Mapping[tuple[str, bool], Any]) -> Any:
    """What was spent, [g]: as a replacement where the release's unit is coarser than the group's finest."""
    total = np.zeros(len(finest))
    for (unit, replaced), values in spent.items():
        total += np.where((UNITS.index(unit) > finest) == replaced, values, 0.0)
    return total


def _costs(request: ReleaseRequest, order: int) -> dict[tuple[str, bool], float]:
    """The Renyi divergence of what is requested, by unit and by whether it counts as a replacement."""
    costs: dict[tuple[str, bool], float] = {}
    for unit, terms in request.steps.items():
        for replaced in (False, True):
            costs[unit, replaced] = math.inf
            if terms is not None:
                as_seen = {Term(t.sample_rate, t.noise_multiplier, replaced): n for t, n in terms.items()}
                costs[unit, replaced] = renyi_of_terms(as_seen, order)
    return costs


def _way_out(plan: ReleasePlan) -> str:
    if not plan.is_private():
        return "Without noise no budget is enough: choose privacy.trust=local, distributed or central."
    if plan.reproducible_noise:
        return "Noise from `seed` protects nobody: leave privacy.reproducible_noise out."
    return _WAY_OUT.get(plan.purpose, _WAY_OUT["training"])
