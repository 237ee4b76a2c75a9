"""Whether a node's owner allows one more release: the composed epsilon beside the budget.

Epsilon grows with every step, so a total that was found to fit certifies every smaller one. The first
release of a run therefore accounts for the whole run, and the others find the answer known; where the
run does not fit as a whole, how far it does is found once, by bisection. Values are kept on disk
(`fedtune.privacy.cache`), so that another process need not even load the accountant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fedtune.errors import BudgetExhausted
from fedtune.privacy.accounting import Term, compose_terms, epsilon_of_terms
from fedtune.privacy.budget_file import Budgets, PrivacyBudget
from fedtune.privacy.cache import kept
from fedtune.privacy.ledger_state import LedgerState, charge_of
from fedtune.privacy.plan import UNITS, ReleasePlan

__all__ = ["Allowance", "kept_epsilon"]

_WHAT = {"training": "round {}", "evaluation": "the evaluation after round {}"}
_WAY_OUT = {
    "training": "Lower federation.num_rounds or train.local_steps, or raise privacy.noise_multiplier.",
    "evaluation": "Lower federation.evaluation_epsilon or privacy.epsilon.",
}


def kept_epsilon(terms: Mapping[Term, int] | None, delta: float) -> float:
    """`accounting.epsilon_of_terms`, kept on disk: a new process need not load the accountant."""
    if terms is None:
        return math.inf
    arguments = [[list(term), count] for term, count in sorted(terms.items())]
    return kept("epsilon", [arguments, delta], lambda: epsilon_of_terms(terms, delta))


class Allowance:
    """What budgets allow; remembers totals that were found to fit."""

    def __init__(self) -> None:
        self._certified: dict[PrivacyBudget, dict[Term, int]] = {}

    def check(
        self, budgets: Budgets, state: LedgerState, dataset: str, fingerprint: str, node: str,
        round: int, plan: ReleasePlan, left: int, public: bool, made: int = 0,
    ) -> bool:  # fmt: skip
        """Raises `BudgetExhausted` if one more release of `plan` would exceed a budget of this data.

        `left`: how many releases the run may still make, this one included: they are accounted for ahead.
        `made`: how many it has made.
        Returns whether the release counts as public: declared so, and never treated as private before.
        """
        names = state.names_of(dataset, fingerprint)
        if public and not state.is_private(names) and not (set(budgets.datasets) & names):
            return True
        for budget in budgets.of(names):
            if budget.unit is not None and _finer(plan.unit, budget.unit):
                raise BudgetExhausted(
                    f"node '{node}' refuses round {round}: the plan protects one {plan.unit}, and the "
                    f"owner's budget asks for every {budget.unit} of '{dataset}' to be protected. Set "
                    f"privacy.unit={budget.unit}.",
                    public=True,
                )
            if self._within(state, dataset, fingerprint, plan, budget, left, made):
                continue
            before = kept_epsilon(state.terms(dataset, fingerprint), budget.delta)
            after = kept_epsilon(state.adding(dataset, fingerprint, plan, 1, made), budget.delta)
            raise BudgetExhausted(
                f"node '{node}' refuses {_WHAT[plan.purpose].format(round)}: it would raise epsilon from "
                f"{before:.4g} to {after:.4g}, over its budget of {budget.epsilon:g} at delta "
                f"{budget.delta:g} for '{dataset}'. {_way_out(plan)}"
            )
        return False

    def check_run(
        self, budgets: Budgets, state: LedgerState, dataset: str, fingerprint: str, node: str,
        plans: Sequence[ReleasePlan], made: Mapping[str, int], public: bool,
    ) -> None:  # fmt: skip
        """Raises `BudgetExhausted` if what is left of all `plans` of one run would exceed a budget.

        `made`: how many releases the run has made, by purpose.
        """
        names = state.names_of(dataset, fingerprint)
        if public and not state.is_private(names) and not (set(budgets.datasets) & names):
            return
        for budget in budgets.of(names):
            before = state.terms(dataset, fingerprint)
            after = before
            for plan in plans:
                done = made.get(plan.purpose, 0)
                after = compose_terms(after, charge_of(plan, max(0, plan.num_rounds - done), done))
            now, then = kept_epsilon(before, budget.delta), kept_epsilon(after, budget.delta)
            if then > budget.epsilon:
                raise BudgetExhausted(
                    f"node '{node}' refuses the run before its first round: all of it would raise epsilon "
                    f"from {now:.4g} to {then:.4g}, over its budget of {budget.epsilon:g} at delta "
                    f"{budget.delta:g} for '{dataset}'. {_way_out(plans[0])}"
                )

    def _within(
        self, state: LedgerState, dataset: str, fingerprint: str, plan: ReleasePlan, budget: PrivacyBudget,
        left: int, made: int,
    ) -> bool:  # fmt: skip
        """Whether one more release stays within `budget`.

        Epsilon grows with every count, so a larger total that was found to fit certifies all below it. The
        whole rest of the run is tried first: then the rest of the run asks no more.
        """
        wanted = state.adding(dataset, fingerprint, plan, 1, made)
        if wanted is None:
            return False
        known = self._certified.get(budget)
        if known is not None and _covers(known, wanted):
            return True

        def fits(releases: int) -> bool:
            total = state.adding(dataset, fingerprint, plan, releases, made)
            if total is None or kept_epsilon(total, budget.delta) > budget.epsilon:
                return False
            self._certified[budget] = total
            return True

        if fits(left):
            return True
        if not fits(1):
            return False
        # How far the budget reaches, once, rather than an epsilon for every further release.
        low, high = 1, left
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return True


def _way_out(plan: ReleasePlan) -> str:
    if not plan.is_private():
        return "Without noise no budget is enough: choose privacy.trust=local, distributed or central."
    if plan.reproducible_noise:
        return "Noise from `seed` protects nobody: leave privacy.reproducible_noise out."
    return _WAY_OUT[plan.purpose]


def _finer(unit: str, than: str) -> bool:
    return UNITS.index(unit) < UNITS.index(than)


def _covers(large: Mapping[Term, int], small: Mapping[Term, int]) -> bool:
    return all(large.get(term, 0) >= count for term, count in small.items())
