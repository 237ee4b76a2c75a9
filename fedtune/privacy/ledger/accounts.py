"""What each key of one body of data was ever charged: by which runs, how much, in which order.

A release charges every record of the data that it touched, whoever held it and whatever it was called, and
every person in it if its unit is a person or a client. So the account of a body of data follows its keys:
for each group of keys (`KeyGroups`) all runs are collected that released from a set with these keys. What the
data has spent is the worst over its groups.

Nodes of one run hold disjoint parts of the data. A key that two of them have is therefore that of two records
with equal texts, and such a run is counted once, by the larger charge of each kind.

Units. A release that protects persons or clients also says something about a single record: one record
changed replaces its person by another, so for keys that were also released by record such a release counts
as a replacement, at twice the sensitivity. A release that protects records says nothing about persons.

Data without keys, as version 0.1 wrote it down, is charged by name and old fingerprint: to all records of
every data set that was ever released under that name, or is that data.

Shapes: g groups of keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fedtune.privacy.accounting.epsilon import Term, compose_terms
from fedtune.privacy.accounting.filter import RunSteps, renyi_of_terms
from fedtune.privacy.ledger.releases import is_coarser, terms_of_plan
from fedtune.privacy.ledger.state import Charges, LedgerState, NamedData, NodeData, Use
from fedtune.privacy.plan import UNITS

__all__ = [
    "NEVER",
    "Account",
    "AccountKeys",
    "ChargedRun",
    "KeyGroups",
    "Spending",
    "account_of",
    "account_without_keys",
    "run_steps",
]

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

Addition = tuple[str, Mapping[Use, int], Mapping[Term, int] | None]

NEVER = np.iinfo(np.int64).max  # first row of what was never released
_CANDIDATES = 64  # distinct totals that are accounted one by one


@dataclass(frozen=True)
class KeyGroups:
    """Keys of one body of data, in groups of those that are in the same sets: they were charged alike.

    Attributes:
        sizes: keys in each group, [g].
        columns: by set, which groups are in it, bool [g]; only sets that share a key with the body.
    """

    sizes: IntArray
    columns: Mapping[str, BoolArray]


@dataclass(frozen=True)
class ChargedRun:
    """What one run charged to some groups of keys.

    Attributes:
        first: row of its first release that charged the group, [g]; `NEVER` if none did.
        counts: noised steps (releases, if not noised) of each use, [g].
    """

    first: IntArray
    counts: Mapping[Use, IntArray]


@dataclass(frozen=True)
class AccountKeys:
    """The keys of one kind that an account follows, in groups.

    Attributes:
        unit: whose keys: `record` or `person`.
        sizes: keys in each group, [g].
        columns: which groups each body of data holds, bool [g].
    """

    unit: str
    sizes: IntArray
    columns: Mapping[NamedData, BoolArray]

    def charged_run(
        self, charged: Mapping[NodeData, Charges], holders: Mapping[NamedData, Iterable[str]] | None = None
    ) -> ChargedRun | None:
        """What the charges of one run come to here; None if it charged nothing. `holders`: the nodes that
        ever released a body of data; of a run of many nodes only those of this data are looked at then."""
        nodes: dict[str, dict[Use, IntArray]] = {}
        first = np.full(len(self.sizes), NEVER)
        if holders is not None and len(charged) > len(self.columns):
            mine = [NodeData(node, data) for data in self.columns for node in holders.get(data, ())]
            charged = {source: charged[source] for source in mine if source in charged}
        for source, charges in charged.items():
            column = self.columns.get(source.data)
            uses = {
                use: n for use, n in charges.uses.items() if self.unit == "record" or use.unit != "record"
            }
            if column is None or not uses:
                continue
            first[column] = np.minimum(first[column], charges.first)
            counted = nodes.setdefault(source.node, {})
            for use, count in uses.items():
                counted[use] = counted.get(use, 0) + column * np.int64(count)
        if not nodes:
            return None
        largest: dict[Use, IntArray] = {}
        for counted in nodes.values():
            for use, counts in counted.items():
                largest[use] = np.maximum(largest[use], counts) if use in largest else counts
        return ChargedRun(first, largest)


@dataclass
class Spending:
    """What some runs come to, in the Renyi divergence at one order.

    Attributes:
        first: row of the first release that charged the group, [g]; `NEVER` if none did.
        closed: whether the run that made it lets no other follow, [g].
        spent: by unit of the release and by whether it counts as a replacement, [g]; infinite without noise.
        units: by unit, which groups were released with it, [g].
    """

    first: IntArray
    closed: BoolArray
    spent: dict[tuple[str, bool], FloatArray]
    units: dict[str, BoolArray]

    @classmethod
    def nothing(cls, groups: int) -> Spending:
        """Of no run."""
        return cls(np.full(groups, NEVER), np.zeros(groups, dtype=np.bool_), {}, {})

    def add(self, run: ChargedRun, order: int) -> None:
        """Adds a run."""
        zero = np.zeros(len(self.first))
        for use, counts in run.counts.items():
            self.units[use.unit] = self.units.get(use.unit, zero > 0) | (counts > 0)
            for replaced in (False, True) if use.unit != UNITS[0] else (False,):
                cost = math.inf
                if use.noised:
                    cost = renyi_of_terms({Term(use.sample_rate, use.noise_multiplier, replaced): 1}, order)
                added = np.where(counts > 0, np.maximum(counts, 1) * cost, 0.0)
                self.spent[use.unit, replaced] = self.spent.get((use.unit, replaced), zero) + added


@dataclass
class Account:
    """Everything that one body of data was charged, up to one state of the ledger.

    Attributes:
        state: of the ledger.
        names: under which any of its keys was released, the one that is asked about included.
        keys: those of its records, and of its persons where the data names them.
        cached: spending of other runs, as it was last computed.
    """

    state: LedgerState
    names: set[str]
    keys: list[AccountKeys]
    cached: dict[object, tuple[int, Spending]] = field(default_factory=dict)

    @property
    def is_private(self) -> bool:
        """True if any of its keys was ever released as private."""
        return any(not use.public for _, run in self.charged_runs() for use in run.counts)

    def charged_runs(
        self, keys: AccountKeys | None = None, but: str | None = None
    ) -> Iterator[tuple[str, ChargedRun]]:
        """Every run that charged a group of `keys` (None: of any), except run `but`."""
        for name, charged in self.state.runs.items():
            if name != but:
                for kind in self.keys if keys is None else [keys]:
                    if (run := kind.charged_run(charged, self.state.nodes)) is not None:
                        yield name, run

    def charged_keys(self, unit: str) -> list[AccountKeys]:
        """The keys that a release of this unit of privacy is charged to."""
        return [keys for keys in self.keys if keys.unit == "record" or unit != "record"]

    def unit(self) -> str | None:
        """The finest unit that a release of this data protects; None before the first."""
        uses = {use for _, run in self.charged_runs() for use in run.counts}
        return _finest(uses) if uses else None

    def seen(self, run: str | None = None) -> tuple[int, int]:
        """How many of its texts were used before (by other runs than `run`), and how many it has."""
        records = self.keys[0]
        touched = np.zeros(len(records.sizes), dtype=np.bool_)
        for _, charged in self.charged_runs(records, but=run):
            touched |= charged.first != NEVER
        return int(records.sizes[touched].sum()), int(records.sizes.sum())

    def others_spending(
        self, keys: AccountKeys, run: str, order: int, budget: object, closes: Callable[[str], bool]
    ) -> Spending:
        """What all runs but `run` come to, at the Renyi order of `budget`.

        `closes` says which runs let no other follow under that budget.
        """
        # Only other runs' releases change it, so round after round of one run finds it as it was.
        key, version = (keys.unit, run, budget), self.state.total - self.state.by_run.get(run, 0)
        if key not in self.cached or self.cached[key][0] != version:
            total = Spending.nothing(len(keys.sizes))
            for name, charged in self.charged_runs(keys, but=run):
                earlier = charged.first < total.first
                total.first[earlier] = charged.first[earlier]
                total.closed[earlier] = closes(name)
                total.add(charged, order)
            self.cached[key] = (version, total)
        return self.cached[key][1]

    def own_spending(self, keys: AccountKeys, run: str, order: int) -> Spending:
        """What `run` itself came to so far."""
        total = Spending.nothing(len(keys.sizes))
        if (charged := keys.charged_run(self.state.runs.get(run, {}), self.state.nodes)) is not None:
            total.first[:] = charged.first
            total.add(charged, order)
        return total

    def is_part(
        self, keys: AccountKeys, run: str, requested: Mapping[Use, int], planned: Mapping[Term, int] | None
    ) -> bool:
        """Whether all that `run` has charged, with what it asks for, is within its plan."""
        charged = keys.charged_run(self.state.runs.get(run, {}), self.state.nodes)
        made = {} if charged is None else {use: int(counts.max()) for use, counts in charged.counts.items()}
        whole = compose_terms(_terms(made, None), _terms(requested, None))
        if whole is None or planned is None:
            return False
        return all(planned.get(term, 0) >= count for term, count in whole.items())

    def runs_of(
        self, keys: AccountKeys, group: int, run: str | None = None, *, adding: Addition | None = None
    ) -> list[RunSteps]:
        """The runs that charged a group, in the order of their first releases on it (or only `run`).

        `adding`: a run, what it asks for and its plan, as if that were charged too.
        """
        runs: list[tuple[str, dict[Use, int], Mapping[Term, int] | None]] = []
        charged_runs = [(name, charged) for name, charged in self.charged_runs(keys) if run in (None, name)]
        for name, charged in sorted(charged_runs, key=lambda named: int(named[1].first[group])):
            uses = {use: int(counts[group]) for use, counts in charged.counts.items() if counts[group]}
            if uses:
                runs.append((name, uses, terms_of_plan(next(iter(self.state.plans[name].values())))))
        if adding is not None:
            name, requested, planned = adding
            known = next((uses for other, uses, _ in runs if other == name), None)
            if known is None:
                runs.append((name, known := {}, planned))
            for use, count in requested.items():
                known[use] = known.get(use, 0) + count
        finest = _finest(use for _, uses, _ in runs for use in uses)
        return [run_steps(uses, planned, finest) for _, uses, planned in runs]

    @property
    def smallest_delta(self) -> float:
        """The smallest delta that a plan for this data named; 1e-6 if none did."""
        mine = {data for keys in self.keys for data in keys.columns}
        return min((self.state.deltas[data] for data in mine if data in self.state.deltas), default=1e-6)

    def histories(
        self, run: str | None = None, *, adding: Addition | None = None, unit: str = "record"
    ) -> list[list[RunSteps]]:
        """Distinct histories of its keys, which the account is the worst of; of `run` alone, if given.

        `adding`: as if a run had released that too, with this unit of privacy (see `runs_of`). More than 64
        are bounded by one history with the largest count of each kind of step.
        """
        histories: dict[object, list[RunSteps]] = {}
        for keys in self.keys:
            groups = self._distinct(keys, run)
            if len(groups) > _CANDIDATES and adding is None:
                histories[keys.unit, "bound"] = self._bound(keys, run)
                continue
            charged = adding if keys in self.charged_keys(unit) else None
            for group in groups:
                runs = self.runs_of(keys, group, run, adding=charged)
                key = tuple((frozenset((one.charged or {}).items()), one.charged is None) for one in runs)
                histories.setdefault(key, runs)
        return [runs for runs in histories.values() if runs]

    def _totals(self, keys: AccountKeys, run: str | None) -> tuple[IntArray, dict[Use, IntArray]]:
        """How many runs charged each group, [g], and the sum of each use over them, [g]."""
        totals: dict[Use, IntArray] = {}
        runs = np.zeros(len(keys.sizes), dtype=np.int64)
        for name, charged in self.charged_runs(keys):
            if run in (None, name):
                runs += charged.first != NEVER
                for use, counts in charged.counts.items():
                    totals[use] = totals.get(use, 0) + counts
        return runs, totals

    def _distinct(self, keys: AccountKeys, run: str | None) -> list[int]:
        """One group for each distinct total; groups of one run and of several are told apart."""
        if len(keys.sizes) == 1:
            return [0]
        runs, totals = self._totals(keys, run)
        if not totals:
            return [0]
        table = np.stack([np.minimum(runs, 2), *totals.values()], axis=1)
        return [int(group) for group in np.unique(table, axis=0, return_index=True)[1]]

    def _bound(self, keys: AccountKeys, run: str | None) -> list[RunSteps]:
        """No group was charged more than this, of any kind of step; as two runs, for it is of several."""
        largest = {use: int(counts.max()) for use, counts in self._totals(keys, run)[1].items()}
        finest = _finest(largest)
        use = next(iter(largest))
        parts = ({use: 1}, {**largest, use: largest[use] - 1})
        return [run_steps(part, None, finest) for part in parts]


def run_steps(uses: Mapping[Use, int], planned: Mapping[Term, int] | None, finest: str) -> RunSteps:
    """One run's charge in the accountant's terms, for keys whose finest unit of release is `finest`."""
    if planned is not None and any(is_coarser(use.unit, finest) for use in uses):
        planned = {Term(t.sample_rate, t.noise_multiplier, True): count for t, count in planned.items()}
    return RunSteps(_terms(uses, finest), planned)


def account_of(
    state: LedgerState, dataset: str, name: str, old: set[str], groups: Mapping[str, KeyGroups]
) -> Account:
    """The account of one body of data.

    Args:
        state: of the ledger.
        dataset: what the data is called.
        name: the id of its set of keys.
        old: fingerprints by which version 0.1 may know it.
        groups: of its keys, by unit (`record`, `person`).
    """
    mine = {dataset} | state.names_of_set(name)
    without_keys = list(_components(state))
    every, names = [], set(mine)
    for unit, of_unit in groups.items():
        all_of_it = np.ones(len(of_unit.sizes), dtype=np.bool_)
        sets = {**of_unit.columns, name: all_of_it}
        columns = {data: column for other, column in sets.items() for data in state.data_of(other)}
        for part in without_keys:
            called, prints = {data.dataset for data in part}, {data.fingerprint for data in part}
            if called & mine or prints & old:
                column = all_of_it
            else:
                column = np.zeros(len(of_unit.sizes), dtype=np.bool_)
                for other, its in sets.items():
                    known = state.sets.get(other)
                    if state.names_of_set(other) & called or (known and prints & set(known.old)):
                        column = column | its
            if column.any():
                columns |= dict.fromkeys(part, column)
        every.append(AccountKeys(unit, of_unit.sizes, columns))
        names |= {data.dataset for data in columns}
    return Account(state, names, every)


def account_without_keys(state: LedgerState, dataset: str, fingerprint: str) -> Account:
    """The account of data of which a name and a fingerprint is all that is known, as in version 0.1."""
    linked = state.linked({dataset}, {fingerprint}, all_data=True)
    whole = np.ones(1, dtype=np.bool_)
    keys = AccountKeys("record", np.zeros(1, dtype=np.int64), dict.fromkeys(linked, whole))
    return Account(state, {dataset} | {data.dataset for data in linked}, [keys])


def _terms(uses: Mapping[Use, int], finest: str | None) -> dict[Term, int] | None:
    """Uses as steps, those of a unit coarser than `finest` as replacements; None if one has no noise."""
    parts: list[dict[Term, int] | None] = []
    for use, count in uses.items():
        replaced = finest is not None and is_coarser(use.unit, finest)
        parts.append({Term(use.sample_rate, use.noise_multiplier, replaced): count} if use.noised else None)
    return compose_terms(*parts)


def _finest(uses: Iterable[Use]) -> str:
    units = {use.unit for use in uses}
    return next((unit for unit in UNITS if unit in units), UNITS[-1])


def _components(state: LedgerState) -> Iterator[set[NamedData]]:
    """Data without keys, what is linked by name or fingerprint together."""
    left = set(state.without_keys())
    while left:
        data = next(iter(left))
        part = state.linked({data.dataset}, {data.fingerprint}, all_data=False)
        left -= part
        yield part
