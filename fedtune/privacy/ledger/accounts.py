"""What each key of one body of data was ever charged: by which runs, how much, in which order.

A release charges every record of the data that it touched, whoever held it and whatever it was called, and
every person in it if its unit is a person or a client. So the account of a body of data follows its keys:
for each class of keys (`fedtune.privacy.ledger.overlap`) all runs are collected that released from a set
with these keys. What the data has spent is the worst over its classes.

Nodes of one run hold disjoint parts of the data. A key that two of them have is therefore that of two records
with equal texts, and such a run is counted once, by the larger charge of each kind.

Units. A release that protects persons or clients also says something about a single record: one record
changed replaces its person by another, so for keys that were also released by record such a release counts
as a replacement, at twice the sensitivity. A release that protects records says nothing about persons.

Data without keys, as version 0.1 wrote it down, is charged by name and old fingerprint: to all records of
every data set that was ever released under that name, or is that data.

Shapes: c classes of keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fedtune.privacy.accounting.epsilon import Term, compose_terms
from fedtune.privacy.accounting.filter import Charge as Run
from fedtune.privacy.accounting.filter import renyi_of_terms
from fedtune.privacy.ledger.overlap import Classes
from fedtune.privacy.ledger.state import Body, Charge, LedgerState, Tally, Use, coarser, terms_of_plan
from fedtune.privacy.plan import UNITS

__all__ = ["NEVER", "Account", "Domain", "Line", "Standing", "account_of", "account_without_keys", "view_of"]

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

Addition = tuple[str, Mapping[Use, int], Mapping[Term, int] | None]

NEVER = np.iinfo(np.int64).max  # first row of what was never released
_CANDIDATES = 64  # distinct totals that are accounted one by one


@dataclass(frozen=True)
class Line:
    """One run, as the classes of a domain see it.

    Attributes:
        first: row of its first release that charged the class, [c]; `NEVER` if none did.
        counts: noised steps (releases, if not noised) of each use, [c].
    """

    first: IntArray
    counts: Mapping[Use, IntArray]


@dataclass(frozen=True)
class Domain:
    """Keys of one kind, in classes.

    Attributes:
        unit: whose keys: `record` or `person`.
        sizes: keys in each class, [c].
        columns: which classes each body of data holds, bool [c].
    """

    unit: str
    sizes: IntArray
    columns: Mapping[Body, BoolArray]

    def line(self, charges: Mapping[Charge, Tally]) -> Line | None:
        """What the charges of one run come to here; None if it charged nothing."""
        nodes: dict[str, dict[Use, IntArray]] = {}
        first = np.full(len(self.sizes), NEVER)
        for charge, tally in charges.items():
            column = self.columns.get(charge.body)
            uses = {use: n for use, n in tally.uses.items() if self.unit == "record" or use.unit != "record"}
            if column is None or not uses:
                continue
            first[column] = np.minimum(first[column], tally.first)
            counted = nodes.setdefault(charge.node, {})
            for use, count in uses.items():
                counted[use] = counted.get(use, 0) + column * np.int64(count)
        if not nodes:
            return None
        largest: dict[Use, IntArray] = {}
        for counted in nodes.values():
            for use, counts in counted.items():
                largest[use] = np.maximum(largest[use], counts) if use in largest else counts
        return Line(first, largest)


@dataclass
class Standing:
    """What some runs come to, in the Renyi divergence at one order.

    Attributes:
        first: row of the first release that charged the class, [c]; `NEVER` if none did.
        closed: whether the run that made it lets no other follow, [c].
        spent: by unit of the release and by whether it counts as a replacement, [c]; infinite without noise.
        units: by unit, which classes were released with it, [c].
    """

    first: IntArray
    closed: BoolArray
    spent: dict[tuple[str, bool], FloatArray]
    units: dict[str, BoolArray]

    def add(self, line: Line, order: int) -> None:
        """Adds a run."""
        zero = np.zeros(len(self.first))
        for use, counts in line.counts.items():
            self.units[use.unit] = self.units.get(use.unit, zero > 0) | (counts > 0)
            for replaced in (False, True) if use.unit != UNITS[0] else (False,):
                cost = math.inf
                if use.noised:
                    cost = renyi_of_terms({Term(use.sample_rate, use.noise_multiplier, replaced): 1}, order)
                added = np.where(counts > 0, np.maximum(counts, 1) * cost, 0.0)
                self.spent[use.unit, replaced] = self.spent.get((use.unit, replaced), zero) + added


@dataclass
class Account:
    """Everything that one body of data was charged, up to one state of the ledger."""

    state: LedgerState
    names: set[str]  # under which any of its keys was released, the one that is asked about included
    domains: list[Domain]
    kept: dict[object, tuple[int, Standing]] = field(default_factory=dict)

    @property
    def is_private(self) -> bool:
        """True if any of its keys was ever released as private."""
        return any(not use.public for _, line in self.lines() for use in line.counts)

    def lines(self, domain: Domain | None = None, but: str | None = None) -> Iterator[tuple[str, Line]]:
        """Every run that charged a class of `domain` (None: of any), except run `but`."""
        for run, charges in self.state.runs.items():
            if run != but:
                for one in self.domains if domain is None else [domain]:
                    if (line := one.line(charges)) is not None:
                        yield run, line

    def charged_domains(self, unit: str) -> list[Domain]:
        """The keys that a release of this unit of privacy is charged to."""
        return [one for one in self.domains if one.unit == "record" or unit != "record"]

    def unit(self) -> str | None:
        """The finest unit that a release of this data protects; None before the first."""
        found = {use for _, line in self.lines() for use in line.counts}
        return _finest(found) if found else None

    def seen(self, run: str | None = None) -> tuple[int, int]:
        """How many of its records were used before (by other runs than `run`), and how many it has."""
        domain = self.domains[0]
        touched = np.zeros(len(domain.sizes), dtype=np.bool_)
        for _, line in self.lines(domain, but=run):
            touched |= line.first != NEVER
        return int(domain.sizes[touched].sum()), int(domain.sizes.sum())

    def standing(
        self, domain: Domain, run: str, order: int, budget: object, closes: Callable[[str], bool]
    ) -> Standing:
        """What all runs but `run` come to, at the Renyi order of `budget`.

        `closes` says which runs let no other follow under that budget.
        """
        # Only other runs' releases change it, so round after round of one run finds it as it was.
        key, version = (domain.unit, run, budget), self.state.total - self.state.by_run.get(run, 0)
        if key not in self.kept or self.kept[key][0] != version:
            self.kept[key] = (version, self._standing(domain, run, order, closes))
        return self.kept[key][1]

    def _standing(self, domain: Domain, run: str, order: int, closes: Callable[[str], bool]) -> Standing:
        found = _nothing(len(domain.sizes))
        for name, line in self.lines(domain, but=run):
            earlier = line.first < found.first
            found.first[earlier] = line.first[earlier]
            found.closed[earlier] = closes(name)
            found.add(line, order)
        return found

    def own(self, domain: Domain, run: str, order: int) -> Standing:
        """What `run` itself came to so far."""
        found = _nothing(len(domain.sizes))
        if (line := domain.line(self.state.runs.get(run, {}))) is not None:
            found.first[:] = line.first
            found.add(line, order)
        return found

    def is_part(
        self, domain: Domain, run: str, asked: Mapping[Use, int], planned: Mapping[Term, int] | None
    ) -> bool:
        """Whether all that `run` has charged, with what it asks for, is within its plan."""
        line = domain.line(self.state.runs.get(run, {}))
        made = {} if line is None else {use: int(counts.max()) for use, counts in line.counts.items()}
        whole = compose_terms(_terms(made, None), _terms(asked, None))
        if whole is None or planned is None:
            return False
        return all(planned.get(term, 0) >= count for term, count in whole.items())

    def runs_of(
        self, domain: Domain, place: int, run: str | None = None, *, adding: Addition | None = None
    ) -> list[Run]:
        """The runs that charged class `place`, in the order of their first releases on it (or only `run`).

        `adding`: a run, what it asks for and its plan, as if that were charged too.
        """
        found: list[tuple[str, dict[Use, int], Mapping[Term, int] | None]] = []
        lines = [(name, line) for name, line in self.lines(domain) if run in (None, name)]
        for name, line in sorted(lines, key=lambda one: int(one[1].first[place])):
            charged = {use: int(counts[place]) for use, counts in line.counts.items() if counts[place]}
            if charged:
                found.append((name, charged, terms_of_plan(next(iter(self.state.plans[name].values())))))
        if adding is not None:
            name, asked, planned = adding
            known = next((charged for other, charged, _ in found if other == name), None)
            if known is None:
                found.append((name, known := {}, planned))
            for use, count in asked.items():
                known[use] = known.get(use, 0) + count
        finest = _finest(use for _, charged, _ in found for use in charged)
        return [view_of(charged, planned, finest) for _, charged, planned in found]

    @property
    def smallest_delta(self) -> float:
        """The smallest delta that a plan for this data named; 1e-6 if none did."""
        bodies = {body for domain in self.domains for body in domain.columns}
        return min((delta for body, delta in self.state.deltas.items() if body in bodies), default=1e-6)

    def histories(
        self, run: str | None = None, *, adding: Addition | None = None, unit: str = "record"
    ) -> list[list[Run]]:
        """Distinct histories of its keys, which the account is the worst of; of `run` alone, if given.

        `adding`: as if a run had released that too, with this unit of privacy (see `runs_of`). More than 64
        are bounded by one history with the largest count of each kind of step.
        """
        found: dict[object, list[Run]] = {}
        for domain in self.domains:
            places = self._distinct(domain, run)
            if len(places) > _CANDIDATES and adding is None:
                found[domain.unit, "bound"] = self._bound(domain, run)
                continue
            charged = adding if domain in self.charged_domains(unit) else None
            for place in places:
                runs = self.runs_of(domain, place, run, adding=charged)
                key = tuple((frozenset((one.charged or {}).items()), one.charged is None) for one in runs)
                found.setdefault(key, runs)
        return [runs for runs in found.values() if runs]

    def _distinct(self, domain: Domain, run: str | None) -> list[int]:
        """One class for each distinct total; classes of one run and of several are kept apart."""
        if len(domain.sizes) == 1:
            return [0]
        totals: dict[Use, IntArray] = {}
        runs = np.zeros(len(domain.sizes), dtype=np.int64)
        for name, line in self.lines(domain):
            if run in (None, name):
                runs += line.first != NEVER
                for use, counts in line.counts.items():
                    totals[use] = totals.get(use, 0) + counts
        if not totals:
            return [0]
        table = np.stack([np.minimum(runs, 2), *totals.values()], axis=1)
        return [int(place) for place in np.unique(table, axis=0, return_index=True)[1]]

    def _bound(self, domain: Domain, run: str | None) -> list[Run]:
        """No class was charged more than this, of any kind of step; as two runs, for it is of several."""
        totals: dict[Use, IntArray] = {}
        for name, line in self.lines(domain):
            if run in (None, name):
                for use, counts in line.counts.items():
                    totals[use] = totals.get(use, 0) + counts
        largest = {use: int(counts.max()) for use, counts in totals.items()}
        finest = _finest(largest)
        use = next(iter(largest))
        parts = ({use: 1}, {**largest, use: largest[use] - 1})
        return [view_of(part, None, finest) for part in parts]


def view_of(charged: Mapping[Use, int], planned: Mapping[Term, int] | None, finest: str) -> Run:
    """One run's charge in the accountant's terms, for keys whose finest unit of release is `finest`."""
    terms = _terms(charged, finest)
    if planned is not None and any(coarser(use.unit, finest) for use in charged):
        planned = {Term(one.sample_rate, one.noise_multiplier, True): count for one, count in planned.items()}
    return Run(terms, planned)


def _terms(uses: Mapping[Use, int], finest: str | None) -> dict[Term, int] | None:
    """Uses as steps, those of a unit coarser than `finest` as replacements; None if one has no noise."""
    parts: list[dict[Term, int] | None] = []
    for use, count in uses.items():
        replaced = finest is not None and coarser(use.unit, finest)
        parts.append({Term(use.sample_rate, use.noise_multiplier, replaced): count} if use.noised else None)
    return compose_terms(*parts)


def _finest(uses: Iterable[Use]) -> str:
    found = {use.unit for use in uses}
    return next((unit for unit in UNITS if unit in found), UNITS[-1])


def _nothing(count: int) -> Standing:
    return Standing(np.full(count, NEVER), np.zeros(count, dtype=np.bool_), {}, {})


def account_of(
    state: LedgerState, dataset: str, name: str, old: set[str], classes: Mapping[str, Classes]
) -> Account:
    """The account of the data with keys `name`, asked about as `dataset`.

    Args: `old`, fingerprints by which version 0.1 may know it; `classes`, by unit (`record`, `person`).
    """
    mine = {dataset} | state.names_of_set(name)
    parts = list(_components(state))
    domains, names = [], set(mine)
    for unit, one in classes.items():
        all_of_it = np.ones(len(one.sizes), dtype=np.bool_)
        sets = {**one.columns, name: all_of_it}
        columns = {body: sets[body.fingerprint] for body in state.releases if body.fingerprint in sets}
        for part in parts:
            called, prints = {body.dataset for body in part}, {body.fingerprint for body in part}
            if called & mine or prints & old:
                column = all_of_it
            else:
                column = np.zeros(len(one.sizes), dtype=np.bool_)
                for other, its in sets.items():
                    known = state.sets.get(other)
                    if state.names_of_set(other) & called or (known and prints & set(known.old)):
                        column = column | its
            if column.any():
                columns |= dict.fromkeys(part, column)
        domains.append(Domain(unit, one.sizes, columns))
        names |= {body.dataset for body in columns}
    return Account(state, names, domains)


def account_without_keys(state: LedgerState, dataset: str, fingerprint: str) -> Account:
    """The account of data of which a name and a fingerprint is all that is known, as in version 0.1."""
    bodies = state.linked({dataset}, {fingerprint}, all_bodies=True)
    one = np.ones(1, dtype=np.bool_)
    domain = Domain("record", np.zeros(1, dtype=np.int64), dict.fromkeys(bodies, one))
    return Account(state, {dataset} | {body.dataset for body in bodies}, [domain])


def _components(state: LedgerState) -> Iterator[set[Body]]:
    """Data without keys, what is linked by name or fingerprint together."""
    left = {body for body in state.releases if body.fingerprint not in state.sets}
    while left:
        body = next(iter(left))
        part = state.linked({body.dataset}, {body.fingerprint}, all_bodies=False)
        left -= part
        yield part
