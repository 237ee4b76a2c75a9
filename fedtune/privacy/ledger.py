"""What one node has released from its data so far, and whether it may release more.

The protocol is reserve, train, commit. `reserve` writes the release down, durably, before data is
touched, or refuses; `commit` notes that it came to an end. A reservation that was never committed counts as
spent, because nobody knows how far it got. So the ledger may show more than was released, never less.

It stores releases with the parameters of their event, never an epsilon: epsilon does not add up. What the
data has cost is composed anew from all releases (`fedtune.privacy.accounting`). A release whose noise came
from `seed` (`privacy.reproducible_noise`, for simulations) is written down as one without noise.

Data is known by name and by fingerprint. Releases whose name *or* fingerprint agree are composed, and so
are those that are linked through a third: the same records under a new name, or the old name after one
record was changed, find the budget where it was. Records that are copied into data with a new name and
a new fingerprint cannot be recognised; that stays with the owner.

Units. A release that protects persons or clients also says something about a single record: one record
changed replaces its person by another, so for a finer unit such a release counts as a replacement, at
twice the sensitivity. A release that protects records says nothing about persons. The epsilon of data
that was used with several units is that of the finest.

Adaptivity. Composition by loss distributions is proven for mechanisms whose parameters were fixed before
their outputs were seen; each run is such a mechanism (its plan is made before data is read). That an owner
or a server may choose the parameters of the next run after seeing the last one is proven to be harmless for
Renyi DP (Feldman and Zrnic 2021) and not, as yet, for this tighter composition. `epsilon_rdp` is there for
whoever wants that.

Purposes. A release is made for training or for evaluation (`plan.purpose`). Both compose; what a run's plan
allows is counted for each by itself.

One ledger is one node's: it is bound to the node that first reserves. Several processes may share it.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.errors import BudgetExhausted, LedgerError, PrivacyError
from fedtune.privacy.accounting import epsilon_rdp_of_terms
from fedtune.privacy.allowance import Allowance, kept_epsilon
from fedtune.privacy.budget_file import Budgets, PrivacyBudget, budgets_of, read_budgets, write_budgets
from fedtune.privacy.chain import GENESIS, Chain, Row
from fedtune.privacy.identity import Identity
from fedtune.privacy.ledger_state import (
    LedgerState,
    Release,
    charge_of,
    purpose_of,
    release_of,
    state_of,
)
from fedtune.privacy.plan import PrivacyPlan, ReleasePlan

__all__ = ["PrivacyBudget", "PrivacyLedger", "Release", "Reservation", "kept_epsilon"]

_KEPT_OPEN = 128  # ledgers that one process holds open: a simulation has one for each node
_opened: dict[tuple[str, bool, int], PrivacyLedger] = {}
_KEPT_RUNS = 16  # whose releases a process keeps count of
_SNAPSHOT_EVERY = 256  # rows between two summaries: what a new process reads at most, twice over


@dataclass(frozen=True)
class Reservation:
    """One release that may now be made, once. Hand it back to `PrivacyLedger.commit`."""

    seq: int  # row of the ledger
    hash: str
    node: str
    run: str
    round: int


@dataclass
class _Counted:
    """Releases that one node made in one run for one purpose, up to row `seq`."""

    seq: int = 0
    rounds: list[int] = field(default_factory=list)  # of each release
    agreed: float = math.inf  # the fewest that a plan allowed


class PrivacyLedger:
    """The ledger in one file. Objects are cheap; several, in several processes, may use one file.

    Guarantees: (1) when `reserve` has returned, the release is on the disk; (2) no release is reserved that
    would raise the composed epsilon over the owner's budget, nor more or closer releases of one run than its
    plan says; (3) a killed process, a full disk or a clock that goes backwards never lowers what is shown.
    """

    def __init__(self, path: Path, *, require_budget: bool = False) -> None:
        self.path = path
        self.budget_path = path.with_suffix(".budget.json")
        self._require_budget = require_budget
        self._chain = Chain(path)
        self._state = LedgerState()
        self._allowance = Allowance()
        self._counted: dict[tuple[str, str, str], _Counted] = {}

    @classmethod
    def open(cls, path: Path, *, require_budget: bool = False) -> PrivacyLedger:
        """The ledger at `path`; the file is made by the first reservation.

        With `require_budget` (a real node) nothing is released before the owner has set a budget; without
        (a simulation) data that has none is recorded and not refused. Raises `LedgerError` if there is a
        file that is no ledger, cannot be trusted or cannot be read.
        """
        # One object a file and process: it holds the connection, and knows the rows that it has read.
        key = (str(Path(path).absolute()), require_budget, os.getpid())
        ledger = _opened.get(key)
        if ledger is None:
            ledger = cls(Path(path), require_budget=require_budget)
            while len(_opened) >= _KEPT_OPEN:
                _opened.pop(next(iter(_opened))).close()
            _opened[key] = ledger
        ledger._current()
        return ledger

    def close(self) -> None:
        """Lets go of the file; the next use opens it again."""
        self._chain.close()

    # --- releasing ----------------------------------------------------------------------------------

    def reserve(
        self,
        *,
        dataset: str,
        fingerprint: str | Identity,
        node: str,
        run: str,
        round: int,
        plan: ReleasePlan,
        public: bool = False,
    ) -> Reservation:
        """Writes down that one release of `plan` is about to be made, durably, before it returns.

        Args: `dataset` and `fingerprint` say from what (`fingerprint`: the data's identity, or the text by
        which the ledger knows it); `public`: its owner declared it public, so nothing
        is refused (ignored where the same data was released as private before). Raises
        `BudgetExhausted` if the release would exceed the budget or the run's own plan, `SeparationError` if
        it comes too soon after the last one (dp_ftrl), `LedgerError` if it could not be written; then
        nothing may be released.
        """
        fingerprint = _known_as(fingerprint)
        for name, value in (("dataset", dataset), ("fingerprint", fingerprint), ("node", node), ("run", run)):
            if not isinstance(value, str) or not value:
                raise PrivacyError(f"A release needs a {name}: a text that is not empty, not {value!r}.")
        if isinstance(round, bool) or not isinstance(round, int) or round < 0:
            raise PrivacyError(f"round must be a whole number of 0 or more, not {round!r}.")
        # Accounting may take a second. It is done here first, so that it is known already when it is asked
        # for again below, where other processes wait for the lock.
        state = self._current()
        with self._chain.reading() as view:
            made, left = self._releases_left(view, plan, node, run, round)
        self._allowance.check(
            self._budgets(state), state, dataset, fingerprint, node, round, plan, left, public, made
        )
        with self._chain.writing() as connection:
            state = self._caught_up(connection)
            if state.node is not None and state.node != node:
                raise LedgerError(
                    f"The privacy ledger {self.path} belongs to node '{state.node}', but node '{node}' asks "
                    "it for a release. Two nodes with one ledger would spend one another's budget: give each "
                    "its own file."
                )
            made, left = self._releases_left(connection, plan, node, run, round)
            public = self._allowance.check(
                self._budgets(state), state, dataset, fingerprint, node, round, plan, left, public, made
            )
            body = {
                "dataset": dataset, "fingerprint": fingerprint, "node": node, "round": round,
                "public": bool(public), "trust": plan.trust, "unit": plan.unit, "delta": plan.delta,
                "num_rounds": plan.num_rounds, "reproducible_noise": plan.reproducible_noise,
                "purpose": plan.purpose, "steps": _steps(plan, made),
            }  # fmt: skip
            row, after = self._written(connection, state, body, run)
        self._state = after
        return Reservation(row.seq, row.hash, node, run, round)

    def check_run(
        self,
        *,
        dataset: str,
        fingerprint: str | Identity,
        node: str,
        run: str,
        plans: Sequence[ReleasePlan],
        public: bool = False,
    ) -> None:
        """Whether a whole run fits, before its first release; charges and writes nothing.

        Args: `plans`, one for each purpose of the run's releases (training, answers, sizes), each with all
        the releases that it allows; what this run has released already counts as part of them; the others as
        in `reserve`. Raises `BudgetExhausted` with the numbers if all of them together would
        exceed a budget of this data, `LedgerError` if the ledger cannot be used.
        """
        fingerprint = _known_as(fingerprint)
        state = self._current()
        with self._chain.reading() as view:
            rows = (
                [] if view is None else [r for r in self._chain.run_rows(view, run) if r.kind == "reserved"]
            )
        made = Counter(purpose_of(row) for row in rows if row.body["node"] == node)
        self._allowance.check_run(
            self._budgets(state), state, dataset, fingerprint, node, plans, made, public
        )

    def head(self) -> tuple[int, str]:
        """Number and hash of the last row; (0, 64 zeros) before the first."""
        state = self._current()
        return state.seq, state.hash

    def commit(self, reservation: Reservation) -> None:
        """Notes that the release came to its end. Raises `LedgerError` if it was never reserved here.

        A second commit of the same reservation changes nothing. Without any, the release counts all the same.
        """
        with self._chain.writing() as connection:
            state = self._caught_up(connection)
            if self._chain.hash_of(connection, reservation.seq) != reservation.hash:
                raise LedgerError(
                    f"The privacy ledger {self.path} holds no reservation number {reservation.seq} of run "
                    f"'{reservation.run}', round {reservation.round}: was it made in another file?"
                )
            for row in self._chain.run_rows(connection, reservation.run, after=reservation.seq):
                if row.kind == "committed" and row.body["reservation"] == reservation.seq:
                    return
            body = {"reservation": reservation.seq}
            row = self._chain.append(connection, "committed", body, run=reservation.run, previous=state.hash)
        self._state = state.with_row(row)

    # --- asking -------------------------------------------------------------------------------------

    @property
    def node(self) -> str | None:
        """The node that this ledger belongs to; None before the first reservation."""
        return self._current().node

    def releases(
        self,
        *,
        dataset: str | None = None,
        fingerprint: str | None = None,
        run: str | None = None,
        node: str | None = None,
        purpose: str | None = None,
    ) -> list[Release]:
        """All releases that agree with what is given, oldest first, unfinished ones included."""
        with self._chain.reading() as connection:
            if connection is None:
                return []
            rows = list(
                self._chain.rows(connection, 0, GENESIS)
                if run is None
                else self._chain.run_rows(connection, run)
            )
        done = {row.body["reservation"] for row in rows if row.kind == "committed"}
        wanted = {"dataset": dataset, "fingerprint": fingerprint, "node": node}
        found = [
            release_of(row, committed=row.seq in done)
            for row in rows
            if row.kind == "reserved" and all(v is None or row.body[k] == v for k, v in wanted.items())
        ]
        return [release for release in found if purpose in (None, release.purpose)]

    def epsilon(
        self, *, dataset: str, fingerprint: str | Identity, delta: float | None = None, run: str | None = None
    ) -> float:
        """Epsilon of everything this data was ever used for, or of one run's releases alone.

        `delta` None: the budget's, else the smallest that any of the releases was planned with. 0.0 before
        the first release, infinite if one had no noise. Unfinished reservations count.
        """
        fingerprint = _known_as(fingerprint)
        state = self._current()
        if run is not None:
            part = LedgerState()
            with self._chain.reading() as connection:
                rows = [] if connection is None else list(self._chain.run_rows(connection, run))
            for row in rows:
                if row.kind == "reserved":
                    part = part.counting(row)
            state = part
        names = state.names_of(dataset, fingerprint)
        terms = state.terms(dataset, fingerprint)
        if terms is None:
            return math.inf
        if not terms:
            return 0.0
        if delta is None:
            budgets = read_budgets(self.budget_path) if run is None else None
            found = budgets.of(names) if budgets else []
            delta = found[0].delta if found else state.smallest_delta(dataset, fingerprint)
        return kept_epsilon(terms, delta)

    def epsilon_rdp(self, *, dataset: str, fingerprint: str, delta: float) -> float:
        """As `epsilon` over everything, by Renyi DP: larger, and proven for parameters chosen as one goes."""
        terms = self._current().terms(dataset, fingerprint)
        return math.inf if terms is None else epsilon_rdp_of_terms(terms, delta)

    # --- budgets ------------------------------------------------------------------------------------

    def set_budget(self, budget: PrivacyBudget, *, dataset: str | None = None) -> None:
        """Sets the owner's budget for `dataset`, or for every data set without its own (None).

        The others stay as they are; where the file is lost or damaged, as the ledger's own rows say.
        """
        with self._chain.writing() as connection:
            state = self._caught_up(connection)
            old = read_budgets(self.budget_path, anew=True)
            if old is None:
                rows = self._chain.latest_of_kind(connection, "budget", state.seq)
                old = budgets_of(row.body for row in rows)
            if dataset is None:
                new = Budgets(budget, old.datasets)
            else:
                new = Budgets(old.default, {**old.datasets, dataset: budget})
            body = {"dataset": dataset, **budget.to_json()}
            row = self._chain.append(connection, "budget", body, run=None, previous=state.hash)
            # Under the lock, so that no reservation sees the row without the file.
            write_budgets(self.budget_path, new)
        self._state = state.with_row(row)

    def budget(self, *, dataset: str, fingerprint: str | None = None) -> PrivacyBudget | None:
        """The strictest budget that this data must keep, or None."""
        state = self._current()
        names = state.names_of(dataset, fingerprint) if fingerprint else {dataset}
        found = self._budgets(state).of(names)
        return found[0] if found else None

    def budgets(self) -> Budgets:
        """All budgets in the node's budget file (none where there is no file)."""
        return self._budgets(self._current())

    def state(self) -> LedgerState:
        """The releases so far, added up."""
        return self._current()

    def verify(self) -> tuple[int, list[str]]:
        """Reads the whole file: how many rows it has, and what is wrong with them (nothing: it is whole)."""
        with self._chain.reading() as connection:
            if connection is None:
                return 0, []
            rows, problems = self._chain.audit(connection)
        state = LedgerState()
        open_reservations: set[int] = set()
        for row in rows:
            if row.kind == "summary" and row.body != state.to_json():
                problems.append(f"row {row.seq} sums the rows before it up wrongly")
            if row.kind == "reserved":
                open_reservations.add(row.seq)
            if row.kind == "committed" and row.body.get("reservation") not in open_reservations:
                problems.append(
                    f"row {row.seq} finishes release {row.body.get('reservation')}, which nothing began"
                )
            try:
                state = state.with_row(row)
            except (KeyError, TypeError, ValueError):
                problems.append(f"row {row.seq} is not what a ledger writes")
        return len(rows), problems

    # --- inside -------------------------------------------------------------------------------------

    def _budgets(self, state: LedgerState) -> Budgets:
        found = read_budgets(self.budget_path)
        if found is None and state.has_budget:
            raise LedgerError(
                f"The budget file {self.budget_path} is missing, but a budget was set before. No release is "
                "made without it. Restore the file, or set a budget anew: fedtune budget set --epsilon E "
                "--delta D; at a site, start the node again, which sets what node.yaml names."
            )
        if found is None and self._require_budget:
            raise LedgerError(
                f"There is no budget file {self.budget_path}, and this node releases nothing before its "
                "owner has said what may be spent. Run: fedtune budget set --epsilon E --delta D; at a site, "
                "start the node, which sets what node.yaml names."
            )
        if self._require_budget and not state.has_budget:
            raise LedgerError(
                f"There is a budget file {self.budget_path}, but the privacy ledger {self.path} never heard "
                "of a budget: it is gone, or another. No release is made, for what was spent before would be "
                "forgotten. Restore the ledger from a backup; at a site, `fedtune node proof --config "
                "node.yaml` shows what is there."
            )
        return found or Budgets(None, {})

    def _written(
        self, connection: Any, state: LedgerState, body: dict[str, Any], run: str
    ) -> tuple[Row, LedgerState]:
        """Adds a reserved row after the rows of `state`, and a summary where it is time for one."""
        row = self._chain.append(connection, "reserved", body, run=run, previous=state.hash)
        after = state.with_row(row)
        if row.seq % _SNAPSHOT_EVERY == 0:
            summary = self._chain.append(connection, "summary", after.to_json(), run=None, previous=row.hash)
            after = after.with_row(summary)
        return row, after

    def _releases_left(
        self, connection: Any, plan: ReleasePlan, node: str, run: str, round: int
    ) -> tuple[int, int]:
        """Releases of the run so far, and how many more it may make, this one included."""
        # Only rows that this process has not counted yet: those before them are proven by the chain, whose
        # last known row is looked at before every reservation.
        key = (run, node, plan.purpose)
        if key not in self._counted and len(self._counted) >= _KEPT_RUNS:
            self._counted.clear()
        counted = self._counted.setdefault(key, _Counted())
        for row in () if connection is None else self._chain.run_rows(connection, run, after=counted.seq):
            if row.kind == "reserved" and row.body["node"] == node and purpose_of(row) == plan.purpose:
                counted.rounds.append(row.body["round"])
                counted.agreed = min(counted.agreed, row.body["num_rounds"])
            counted.seq = row.seq
        made, agreed = len(counted.rounds), min(counted.agreed, plan.num_rounds)
        if isinstance(plan, PrivacyPlan):
            plan.check_round(node, run, round, counted.rounds)
        if made >= agreed:
            what = "releases" if plan.purpose == "training" else "answers about held-out data"
            raise BudgetExhausted(
                f"node '{node}' refuses round {round} of run '{run}': its plan allows {agreed:.0f} {what}, "
                f"and {made} were made (rounds that were repeated or interrupted count, because they may "
                "have been seen). Start a new run; its noise will be calibrated for its own number of "
                "rounds.",
                public=True,
            )
        return made, int(agreed - made)

    def _current(self) -> LedgerState:
        with self._chain.reading() as connection:
            if connection is not None:
                self._state = self._caught_up(connection)
            elif self._state.seq:
                raise self._chain.broken("the file is gone")
        return self._state

    def _caught_up(self, connection: Any) -> LedgerState:
        """The state with every row that was written since; starts from the last summary if it knows none."""
        state = self._state
        if state.seq == 0:
            # From the last summary but one, so that the last is checked against the rows that it sums up.
            summaries = self._chain.latest_of_kind(connection, "summary", 2)
            if summaries:
                state = state_of(summaries[0])
        elif self._chain.hash_of(connection, state.seq) != state.hash:
            raise self._chain.broken(f"row {state.seq}, which this process has read, is gone or another")
        for row in self._chain.rows(connection, state.seq, state.hash):
            if row.kind == "summary" and row.body != state.to_json():
                raise self._chain.broken(f"row {row.seq} sums the rows before it up wrongly")
            state = state.with_row(row)
        return state


def _known_as(fingerprint: str | Identity) -> str:
    return fingerprint.fingerprint if isinstance(fingerprint, Identity) else fingerprint


def _steps(plan: ReleasePlan, made: int) -> list[dict[str, Any]] | None:
    """What the release after `made` others of its run adds to the account."""
    terms = charge_of(plan, 1, made)
    if terms is None:
        return None
    return [
        {"sample_rate": term.sample_rate, "noise_multiplier": term.noise_multiplier, "count": count}
        for term, count in sorted(terms.items())
    ]
