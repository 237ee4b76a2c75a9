"""What a node has released from its data so far, and whether it may release more.

The protocol is reserve, train, commit. `reserve` writes the release down, durably, before data is
touched, or refuses; `commit` notes that it came to an end. A reservation that was never committed counts as
spent, because nobody knows how far it got. So the ledger may show more than was released, never less.

It stores releases with the parameters of their event, never an epsilon: epsilon does not add up. What the
data has cost is composed anew from all releases. A release whose noise came from `seed`
(`privacy.reproducible_noise`, for simulations) is written down as one without noise.

One account for one body of data. A release is charged to every record that it touched, and to every person
if its unit is a person or a client, by keys that only this node can make
(`fedtune.privacy.ledger.identity`). What data has spent is the worst over its keys of all that each was
ever charged, and the strictest budget of any of their names holds. So neither a new name, nor another file,
another cut into shards, or next month's export of the same people finds a fresh budget.
(Units of privacy, equal texts at several nodes, rows of version 0.1: `fedtune.privacy.ledger.accounts`.)

Budgets stop by a filter that is proven for releases chosen while results are seen
(`fedtune.privacy.accounting.filter`). `epsilon` of one run is that of its privacy loss distribution, of
several the Renyi number, which is larger. A run is held to its plan: what a release adds never changes.

A release has a purpose (`plan.purpose`: training, evaluation, ...). All compose; each is counted by itself.
A real node's ledger is bound to the node that first reserves; all nodes of simulations share one
(`fedtune.privacy.ledger.simulation`). Several processes may share a ledger.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fedtune.config.files import sync_folder
from fedtune.errors import LedgerError, PrivacyError
from fedtune.privacy.accounting.calibration import cached_epsilon
from fedtune.privacy.accounting.epsilon import Term, compose_terms
from fedtune.privacy.accounting.filter import spent
from fedtune.privacy.ledger.accounts import Account
from fedtune.privacy.ledger.allowance import Allowance, ReleaseRequest, RunCounts
from fedtune.privacy.ledger.budget import (
    Budgets,
    PrivacyBudget,
    budgets_in_force,
    budgets_of,
    read_budgets,
    write_budgets,
)
from fedtune.privacy.ledger.chain import GENESIS, Chain
from fedtune.privacy.ledger.identity import (
    Identity,
    KeySet,
    check_of,
    check_secret,
    keyed,
    make_secret,
    read_secret,
)
from fedtune.privacy.ledger.key_sets import KeySets
from fedtune.privacy.ledger.releases import (
    RELEASED,
    AskedRelease,
    Release,
    Reservation,
    as_planned,
    charge_of,
    noise_scope,
    planned_by,
    release_of,
    steps_of,
    terms_of_plan,
)
from fedtune.privacy.ledger.state import LedgerState, LedgerWriter, StateReader, replay
from fedtune.privacy.plan import ReleasePlan

__all__ = ["AskedRelease", "PrivacyBudget", "PrivacyLedger", "Release", "Reservation"]

T = TypeVar("T")
Beside = Mapping[str, Sequence[ReleasePlan]] | None  # plans of other runs, by run

_MOST_OPEN = 16  # ledgers that one process holds open
_opened: dict[tuple[str, bool, bool, int], PrivacyLedger] = {}
_NO_SECRET = secrets.token_bytes(32)


class PrivacyLedger:
    """The ledger in one file. Objects are cheap; several, in several processes, may use one file.

    Guarantees: (1) when `reserve` has returned, the release is on the disk; (2) no release is reserved that
    would take a key over the owner's budget, nor more, closer or other releases of one run than its plan
    says; (3) a killed process, a full disk or a clock that goes backwards never lowers what is shown.

    Wherever data is asked for, `fingerprint` is its `Identity`, or the text by which the ledger knows it: the
    id that it gave the data's keys, or, for data without keys, any name of it.
    """

    def __init__(self, path: Path, *, require_budget: bool = False, shared: bool = False) -> None:
        self.path = path
        self.budget_path = path.with_suffix(".budget.json")
        self.secret_path = path.with_suffix(".key")
        self._require_budget = require_budget
        self._shared = shared
        self._chain = Chain(path)
        self._sets = KeySets(self._chain)
        self._reader = StateReader(self._chain)
        self._allowance = Allowance()
        self._runs = RunCounts(self._chain)

    @classmethod
    def open(cls, path: Path, *, require_budget: bool = False, shared: bool = False) -> PrivacyLedger:
        """The ledger at `path`; the file is made by the first reservation.

        With `require_budget` (a real node) nothing is released before the owner has set a budget; without
        (a simulation) data that has none is recorded and not refused. `shared`: of several nodes. Raises
        `LedgerError` if there is a file that is no ledger, cannot be trusted or cannot be read, or if its
        secret is missing, damaged or another.
        """
        # One object a file and process: it holds the connection, and knows the rows that it has read.
        key = (str(Path(path).absolute()), require_budget, shared, os.getpid())
        ledger = _opened.get(key)
        if ledger is None:
            ledger = cls(Path(path), require_budget=require_budget, shared=shared)
            while len(_opened) >= _MOST_OPEN:
                _opened.pop(next(iter(_opened))).close()
            _opened[key] = ledger
        ledger._secret(ledger.state())
        return ledger

    def close(self) -> None:
        """Lets go of the file; the next use opens it again."""
        self._chain.close()

    # --- releasing ----------------------------------------------------------------------------------

    def reserve(self, asked: AskedRelease | None = None, **fields: Any) -> Reservation:
        """Writes down that one release is about to be made, durably, before it returns.

        Args: `asked`, or its fields. Raises `BudgetExhausted` if the release would exceed a budget or
        the run's own plan, `SeparationError` if it comes too soon after the last one (dp_ftrl),
        `PrivacyError` if it is another than the run's first ones were, `LedgerError` if it could not be
        written; then nothing may be released.
        """
        (answer,) = self.reserve_all([asked or AskedRelease(**fields)])
        if isinstance(answer, PrivacyError):
            raise answer
        return answer

    def reserve_all(self, asked: Sequence[AskedRelease]) -> list[Reservation | PrivacyError]:
        """`reserve` for several releases in one transaction: when it returns, all are on the disk together.

        In their order, each checked after those before it. For one that `reserve` would refuse its answer is
        the error. Raises `LedgerError` if they could not be written; then none of them may be made.
        """
        answers: list[Reservation | PrivacyError] = []
        # Keys and accounting may take a second. They are made here first, so that they are known already when
        # they are asked for again below, where other processes wait for the lock.
        with self.at_once() if self.state().secret else nullcontext():
            allowed = [_refusal(partial(self._ahead, one)) for one in asked]
        if all(isinstance(one, PrivacyError) for one in allowed):
            return [one for one in allowed if isinstance(one, PrivacyError)]
        with self.writing() as writer:
            for one, ahead in zip(asked, allowed, strict=True):
                if isinstance(ahead, PrivacyError):
                    answers.append(ahead)
                else:
                    answers.append(_refusal(partial(self._reserved, one, ahead, writer)))
        return answers

    def _ahead(self, asked: AskedRelease) -> KeySet | str:
        """What `asked` is a release from; raises as `reserve`."""
        known = self._keys(asked.checked(), register=True)
        state = self.state()
        with self._chain.reading() as view:
            self._allowed(asked, known, view, state)
        return known

    def _allowed(
        self, asked: AskedRelease, known: KeySet | str, connection: Any, state: LedgerState
    ) -> tuple[int, bool]:
        """How many such releases were made, and whether this one is of public data; raises as `reserve`."""
        plan, node, run, round = asked.plan, asked.node, asked.run, asked.round
        planned = asked.planned
        named = (as_planned(planned),) if asked.whole else None
        made = self._runs.made(connection, plan, named, node=node, run=run, round=round)
        steps = {plan.unit: charge_of(plan, 1, made)}
        request = ReleaseRequest(run, plan, steps, self._planned(state, run, node, planned), plan.purpose)
        account = self._sets.account(connection, state, asked.dataset, known)
        return made, self._allowance.check(
            self._budgets(connection, state), account, request,
            dataset=asked.dataset, node=node, round=round, public=asked.public,
        )  # fmt: skip

    def _reserved(self, asked: AskedRelease, known: KeySet | str, writer: LedgerWriter) -> Reservation:
        """Writes the row of `asked`, if it is allowed after the rows before it."""
        state, plan, node, run = writer.state, asked.plan, asked.node, asked.run
        if state.node is not None and state.node != node and not self._shared:
            raise LedgerError(
                f"The privacy ledger {self.path} belongs to node '{state.node}', but node '{node}' asks "
                "it for a release. Two nodes with one ledger would spend one another's budget: give each "
                "its own file."
            )
        made, public = self._allowed(asked, known, writer.connection, state)
        if isinstance(known, KeySet) and known.id not in state.sets:
            writer.write("set", self._sets.add(writer.connection, known, state))
        body: dict[str, Any] = {
            "dataset": asked.dataset, "fingerprint": known.id if isinstance(known, KeySet) else known,
            "node": node, "round": asked.round, "public": bool(public), "trust": plan.trust,
            "unit": plan.unit, "delta": plan.delta, "num_rounds": plan.num_rounds,
            "reproducible_noise": plan.reproducible_noise, "purpose": plan.purpose,
            "steps": steps_of(plan, made), **noise_scope(plan),
        }  # fmt: skip
        if node not in state.plans.get(run, {}):
            body["planned"] = as_planned(asked.planned)
        row = writer.write("reserved", body, run=run)
        return Reservation(row.seq, row.hash, node, run, asked.round, made + 1)

    def check_run(
        self,
        *,
        dataset: str,
        fingerprint: str | Identity,
        node: str,
        run: str,
        plans: Sequence[ReleasePlan],
        beside: Beside = None,
        public: bool = False,
    ) -> None:
        """Whether a whole run fits, before its first release; charges and writes nothing.

        Args: `plans`, one for each purpose of the run's releases (training, answers, sizes), each with all
        the releases that it allows; what this run has released already counts as part of them; `beside`,
        those of other runs, of which what is left must fit as well; the others as in `reserve`. Raises
        `BudgetExhausted` with the numbers if it all would exceed a budget of this data, `LedgerError`.
        """
        with self.at_once(), self._chain.reading() as view:
            known = self._keys(fingerprint)
            state, request = self._request(node, run, plans, beside)
            account, budgets = self._sets.account(view, state, dataset, known), self._budgets(view, state)
        self._allowance.check(budgets, account, request, dataset=dataset, node=node, round=0, public=public)

    def outlook(
        self,
        *,
        dataset: str,
        fingerprint: str | Identity,
        node: str,
        run: str,
        plans: Sequence[ReleasePlan],
        delta: float,
        epsilon: float | None = None,
    ) -> tuple[float, float]:
        """(epsilon now, epsilon after all of `plans`) at `delta`, over everything this data was used for.

        `epsilon`: that of the owner's budget; then the second number is above it where `check_run` refuses.
        """
        known = self._keys(fingerprint)
        state, request = self._request(node, run, plans)
        with self._chain.reading() as view:
            account = self._sets.account(view, state, dataset, known)
        adding = (run, request.uses(), request.planned)
        now, then = (
            max((spent(one, delta, epsilon, fixed=cached_epsilon) for one in runs), default=0.0)
            for runs in (account.histories(), account.histories(adding=adding, unit=plans[0].unit))
        )
        return now, then

    def commit(self, reservation: Reservation) -> None:
        """Notes that the release came to its end. Raises `LedgerError` if it was never reserved here.

        A second commit of the same reservation changes nothing. Without any, the release counts all the same.
        """
        self.commit_all([reservation])

    def commit_all(self, reservations: Iterable[Reservation]) -> None:
        """`commit` for several releases in one transaction."""
        with self.writing() as writer:
            for one in reservations:
                if self._chain.hash_of(writer.connection, one.seq) != one.hash:
                    raise LedgerError(
                        f"The privacy ledger {self.path} holds no reservation number {one.seq} of run "
                        f"'{one.run}', round {one.round}: was it made in another file?"
                    )
                if not self._runs.is_committed(writer.connection, one.run, one.seq):
                    writer.write("committed", {"reservation": one.seq}, run=one.run)

    @contextmanager
    def writing(self) -> Iterator[LedgerWriter]:
        """A transaction that holds the writer's lock (`StateReader.writing`)."""
        try:
            with self._reader.writing() as writer:
                yield writer
        except BaseException:
            # They may have counted rows of this transaction, which are not in the file now.
            self._sets, self._runs = KeySets(self._chain), RunCounts(self._chain)
            raise

    # --- asking -------------------------------------------------------------------------------------

    def at_once(self) -> AbstractContextManager[None]:
        """Within it the ledger is looked at once for all that is asked; `StateReader.at_once`."""
        return self._reader.at_once()

    def known_as(self, fingerprint: str | Identity) -> str:
        """The text by which this ledger knows data. Local to the node: never to be sent or published."""
        known = self._keys(fingerprint)
        return known.id if isinstance(known, KeySet) else known

    def releases(
        self,
        *,
        dataset: str | None = None,
        fingerprint: str | None = None,
        run: str | None = None,
        node: str | None = None,
        purpose: str | None = None,
    ) -> list[Release]:
        """All releases that agree with what is given, oldest first, unfinished ones included.

        Those of version 0.1 that were taken over count as finished.
        """
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
            release_of(row, committed=row.seq in done or row.kind == "imported")
            for row in rows
            if row.kind in RELEASED and all(v is None or row.body[k] == v for k, v in wanted.items())
        ]
        return [release for release in found if purpose in (None, release.purpose)]

    def rounds(self, *, run: str, node: str, purpose: str | None = None) -> list[int]:
        """The round of each release of `node` in `run` (`purpose` None: of all, by purpose), oldest first."""
        self.state()  # raises if what was counted before is gone
        with self._chain.reading() as view:
            return self._runs.rounds(view, run, node, purpose)

    def account(self, *, dataset: str, fingerprint: str | Identity) -> Account:
        """Everything that this data was ever charged; see `fedtune.privacy.ledger.accounts`."""
        known, state = self._keys(fingerprint), self.state()
        with self._chain.reading() as view:
            return self._sets.account(view, state, dataset, known)

    def epsilon(
        self,
        *,
        dataset: str,
        fingerprint: str | Identity,
        delta: float | None = None,
        run: str | None = None,
    ) -> float:
        """Epsilon of everything this data was ever used for, or of one run's releases alone.

        Of one run it is that of its privacy loss distribution, as it was fixed in advance; of several it is
        the Renyi number (`fedtune.privacy.accounting.filter.spent`), larger and proven for runs that were
        chosen one after another. `delta` None: the budget's, else the smallest that any of the releases was
        planned with. 0.0 before the first release, infinite if one had no noise. Unfinished reservations
        count.
        """
        account = self.account(dataset=dataset, fingerprint=fingerprint)
        if delta is None:
            budgets = read_budgets(self.budget_path) if run is None else None
            found = budgets.of(account.names) if budgets else []
            delta = found[0].delta if found else account.smallest_delta
        return max((spent(r, delta, fixed=cached_epsilon) for r in account.histories(run)), default=0.0)

    # --- budgets ------------------------------------------------------------------------------------

    def set_budget(self, budget: PrivacyBudget, *, dataset: str | None = None) -> None:
        """Sets the owner's budget for `dataset`, or for every data set without its own (None).

        The others stay as the ledger's own rows have them, whatever became of the file.
        """
        if self.state().seq == 0:
            self._own_secret()  # a first row: a budget file beside an empty ledger means that one was lost
        with self.writing() as writer:
            old = self.stored_budgets(writer.connection, writer.state)
            if dataset is None:
                new = Budgets(budget, old.datasets)
            else:
                new = Budgets(old.default, {**old.datasets, dataset: budget})
            writer.write("budget", {"dataset": dataset, **budget.to_json()})
            # Under the lock, so that no reservation sees the row without the file.
            write_budgets(self.budget_path, new)

    def budget(self, *, dataset: str, fingerprint: str | Identity | None = None) -> PrivacyBudget | None:
        """The strictest budget that this data must keep, or None."""
        names = {dataset}
        if fingerprint is not None:
            names = self.account(dataset=dataset, fingerprint=fingerprint).names
        found = self.budgets().of(names)
        return found[0] if found else None

    def budgets(self) -> Budgets:
        """All budgets in the node's budget file (none where there is no file)."""
        state = self.state()
        with self._chain.reading() as view:
            return self._budgets(view, state)

    def state(self) -> LedgerState:
        """The releases so far, added up.

        Raises:
            LedgerError: the file cannot be used or trusted.
        """
        return self._reader.current()

    def stored_budgets(self, connection: Any, state: LedgerState) -> Budgets:
        """What the rows up to `state` say; where they say nothing, the budget file."""
        return self._said(connection, state) or read_budgets(self.budget_path, anew=True) or Budgets(None, {})

    def verify(self) -> tuple[int, list[str]]:
        """Reads the whole file: how many rows it has, and what is wrong with them (nothing: it is whole)."""
        with self._chain.reading() as connection:
            if connection is None:
                return 0, []
            rows, problems = self._chain.audit(connection)
            state, wrong = replay(rows)
            problems += wrong + self._sets.problems(connection, state)
        return len(rows), problems

    # --- inside -------------------------------------------------------------------------------------

    def _secret(self, state: LedgerState) -> bytes | None:
        """The ledger's secret; None where it has none yet. Raises `LedgerError` if it is not what it was."""
        secret = self._reader.once("secret", lambda: read_secret(self.secret_path))
        return secret if state.secret is None else check_secret(self.secret_path, secret, state.secret)

    def _keys(self, data: str | Identity, *, register: bool = False) -> KeySet | str:
        """Data as the ledger knows it. `register`: it is to be released, so a secret is made if need be."""
        if not isinstance(data, Identity):
            return data
        state = self.state()
        secret = self._secret(state)
        if state.secret is None and register:
            secret = self._own_secret()
        # Without a secret there are no keys yet that these could agree with.
        return keyed(data, secret or _NO_SECRET)

    def _own_secret(self) -> bytes:
        """The ledger's secret; made, and known by the ledger, if it has none."""
        with self.writing() as writer:
            secret = self._secret(writer.state) or make_secret(self.secret_path)
            if writer.state.secret is None:
                sync_folder(self.secret_path.parent)  # whoever made it may have died before that
                writer.write("secret", {"check": check_of(secret)})
        return secret

    def _request(
        self, node: str, run: str, plans: Sequence[ReleasePlan], beside: Beside = None
    ) -> tuple[LedgerState, ReleaseRequest]:
        """What is left of `plans` in a run that may have begun, and of those of the runs `beside`."""
        state = self.state()
        steps: dict[str, dict[Term, int] | None] = {}
        every = {run: plans, **(beside or {})}.items()
        for name, plan in ((name, plan) for name, its in every for plan in its):
            done = len(self.rounds(run=name, node=node, purpose=plan.purpose))
            further = charge_of(plan, max(0, plan.num_rounds - done), done)
            steps[plan.unit] = compose_terms(steps.get(plan.unit, {}), further)
        planned = self._planned(state, run, node, planned_by(plans))
        return state, ReleaseRequest(run, plans[0], steps, planned, "run")

    def _planned(
        self, state: LedgerState, run: str, node: str, planned: dict[Term, int] | None
    ) -> dict[Term, int] | None:
        """The run's whole plan as the node's first release named it; before that, as it is named now."""
        known = state.plans.get(run, {})
        return terms_of_plan(known[node]) if node in known else planned

    def _budgets(self, connection: Any, state: LedgerState) -> Budgets:
        def look() -> Budgets:
            said, required = self._said(connection, state), self._require_budget
            return budgets_in_force(self.budget_path, self.path, said=said, required=required)

        return self._reader.once("budgets", look)

    def _said(self, connection: Any, state: LedgerState) -> Budgets | None:
        """What the rows up to `state` say of budgets; None if nothing."""
        if connection is None or not state.has_budget:
            return None
        return budgets_of(row.body for row in self._chain.latest_of_kind(connection, "budget", state.seq))


def _refusal(ask: Callable[[], T]) -> T | PrivacyError:
    """What `ask` returns, or the refusal that it raises; a ledger that cannot be used is none."""
    try:
        return ask()
    except LedgerError:
        raise
    except PrivacyError as error:
        return error
