"""Whether a node's owner allows one more release: what every key was charged, beside the budget.

A budget is enforced by a filter that is proven for releases that are chosen while their results are seen,
and one run that was fixed in advance may be admitted as a whole by its privacy loss distribution
(`fedtune.privacy.accounting.filter`, which has the proof). Both are asked for every class of keys that the
release would charge (`fedtune.privacy.ledger.accounts`): a release is allowed if it is allowed for all of
them.

Sums of Renyi divergences at one order take no time; the privacy loss distribution of a run's plan does, and
is cached on disk (`fedtune.privacy.accounting.cache`), so that another process need not even load the
accountant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedtune.errors import BudgetExhausted
from fedtune.privacy.accounting.cache import cached_epsilon
from fedtune.privacy.accounting.epsilon import Term
from fedtune.privacy.accounting.filter import closes, order_of, renyi_budget, renyi_of_terms, spent
from fedtune.privacy.ledger.accounts import NEVER, Account, Domain
from fedtune.privacy.ledger.budget_file import Budgets, PrivacyBudget
from fedtune.privacy.ledger.state import Use, coarser, terms_of_plan
from fedtune.privacy.plan import UNITS, ReleasePlan

__all__ = ["Allowance", "Asked"]

_WHAT = {
    "training": "round {}",
    "evaluation": "the evaluation after round {}",
    "run": "the run before its first round",
}
_WAY_OUT = {
    "training": "Lower federation.num_rounds or train.local_steps, or raise privacy.noise_multiplier.",
    "evaluation": "Lower federation.evaluation_epsilon or privacy.epsilon.",
}
_NO_FOLLOWER = "Its first run was admitted as a whole, as it was fixed in advance, and lets no other follow."
_SPENT = "Nothing is left: use other data, or its owner allows more."


@dataclass(frozen=True)
class Asked:
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
        found: dict[Use, int] = {}
        for unit, terms in self.steps.items():
            if terms is None:
                found[Use(False, unit, False, 1.0, 0.0)] = 1
            else:
                found |= {
                    Use(False, unit, True, t.sample_rate, t.noise_multiplier): n for t, n in terms.items()
                }
        return found


class Allowance:
    """What budgets allow; remembers which plans let no other run follow."""

    def __init__(self) -> None:
        self._closing: dict[tuple[object, PrivacyBudget], bool] = {}

    def check(
        self, budgets: Budgets, account: Account, asked: Asked, *, dataset: str, node: str, round: int,
        public: bool,
    ) -> bool:  # fmt: skip
        """Raises `BudgetExhausted` if what is asked would exceed a budget of this data.

        Returns whether the release counts as public: declared so, and never treated as private before.
        """
        names = account.names
        if public and not account.is_private and not (set(budgets.datasets) & names):
            return True
        what = _WHAT.get(asked.what, f"its {asked.what} after round {{}}").format(round)
        for budget in budgets.of(names):
            if budget.unit is not None and coarser(budget.unit, asked.plan.unit):
                raise BudgetExhausted(
                    f"node '{node}' refuses {what}: the plan protects one {asked.plan.unit}, and the "
                    f"owner's budget asks for every {budget.unit} of '{dataset}' to be protected. Set "
                    f"privacy.unit={budget.unit}.",
                    public=True,
                )
            for domain in account.charged_domains(asked.plan.unit):
                place = self._refused(account, domain, asked, budget)
                if place is not None:
                    raise self._refusal(account, domain, place, asked, budget, dataset, node, what)
        return False

    def _refused(self, account: Account, domain: Domain, asked: Asked, budget: PrivacyBudget) -> int | None:
        """The class of keys that would be charged most over its budget; None if the release is allowed."""
        order = order_of(budget.epsilon, budget.delta)
        others = account.standing(
            domain, asked.run, order, budget,
            lambda run: any(
                self._closes(terms_of_plan(one), budget) for one in account.state.plans[run].values()
            ),
        )  # fmt: skip
        own = account.own(domain, asked.run, order)
        finest = np.full(len(domain.sizes), min(UNITS.index(unit) for unit in asked.steps))
        for standing in (others, own):
            for unit, released in standing.units.items():
                finest[released] = np.minimum(finest[released], UNITS.index(unit))
        total = _at(finest, {(u, r): np.full(len(finest), v) for (u, r), v in _costs(asked, order).items()})
        total += _at(finest, others.spent) + _at(finest, own.spent)
        touched = others.first != NEVER
        # Which run charged the class first; one that closed the account lets no other follow.
        mine = ~touched | (own.first < others.first)
        closed = np.where(mine, self._closes(asked.planned, budget), others.closed)
        within = total <= renyi_budget(budget.epsilon, budget.delta, order)
        allowed = np.where(
            closed, ~touched & account.is_part(domain, asked.run, asked.uses(), asked.planned), within
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
        self, account: Account, domain: Domain, place: int, asked: Asked, budget: PrivacyBudget, dataset: str,
        node: str, what: str,
    ) -> BudgetExhausted:  # fmt: skip
        limit, delta = budget.epsilon, budget.delta
        before = account.runs_of(domain, place)
        after = account.runs_of(domain, place, adding=(asked.run, asked.uses(), asked.planned))
        now = spent(before, delta, limit, fixed=cached_epsilon)
        then = spent(after, delta, limit, fixed=cached_epsilon)
        text = (
            f"node '{node}' refuses {what}: it would raise epsilon from {now:.4g} to {then:.4g}, over its "
            f"budget of {limit:g} at delta {delta:g} for '{dataset}'."
        )
        seen, records = account.seen(asked.run)
        if seen:
            text += f" {seen} of its {records} records were used before."
        if len(after) > 1 and self._closes(after[0].planned, budget):
            return BudgetExhausted(f"{text} {_NO_FOLLOWER} {_SPENT}")
        if len(after) > 1 and now >= limit:
            return BudgetExhausted(f"{text} {_SPENT}")
        return BudgetExhausted(f"{text} {_way_out(asked.plan)}")


def _at(finest: Any, spent: Mapping[tuple[str, bool], Any]) -> Any:
    """What was spent, [c]: as a replacement where the release's unit is coarser than the class's finest."""
    total = np.zeros(len(finest))
    for (unit, replaced), values in spent.items():
        total += np.where((UNITS.index(unit) > finest) == replaced, values, 0.0)
    return total


def _costs(asked: Asked, order: int) -> dict[tuple[str, bool], float]:
    """The Renyi divergence of what is asked, by unit and by whether it counts as a replacement."""
    costs: dict[tuple[str, bool], float] = {}
    for unit, terms in asked.steps.items():
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
