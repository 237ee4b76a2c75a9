"""What the rows of a ledger add up to: releases counted by run, node and data, by what they cost.

A state is copied before it is changed, so one that was handed out stays what it was. The ledger writes one
into itself now and then (a summary row, part of the hash chain), so that a new process need not read years
of rows. Which records the data sets share is not here but in the sets of keys
(`fedtune.privacy.ledger.key_sets`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

from fedtune.privacy.ledger.chain import GENESIS, Chain, Head, Row
from fedtune.privacy.ledger.releases import RELEASED, Planned, charged_steps, planned_in

__all__ = [
    "Charges",
    "Imported",
    "KnownSet",
    "LedgerState",
    "LedgerWriter",
    "NamedData",
    "NodeData",
    "StateReader",
    "Use",
    "replay",
    "state_from_summary",
    "summary_differs",
]

T = TypeVar("T")

_SNAPSHOT_EVERY = 256  # rows between two summaries at least; more where a summary is longer than that


class Use(NamedTuple):
    """One way in which data was used: what is counted together."""

    public: bool
    unit: str
    noised: bool
    sample_rate: float  # 1.0 if not noised
    noise_multiplier: float  # 0.0 if not noised


class NamedData(NamedTuple):
    """One body of data under one name. `fingerprint` as in `Release`."""

    dataset: str
    fingerprint: str


class NodeData(NamedTuple):
    """Whose charges are counted together within one run: which node's, for which data."""

    node: str
    data: NamedData


class Charges(NamedTuple):
    """What one node charged to one body of data in one run."""

    first: int  # row of its first release
    uses: dict[Use, int]  # noised steps (releases, if not noised)


class KnownSet(NamedTuple):
    """What the log says of a set of keys: how many, their digest, and by which old fingerprints version 0.1
    released its data."""

    records: int
    persons: int | None
    digest: str
    old: tuple[str, ...]


class Imported(NamedTuple):
    """How far the ledger of one node, written by version 0.1, was taken over."""

    node: str
    seq: int
    hash: str


@dataclass
class LedgerState:
    """The sum of all rows up to row `seq`, whose hash is `hash`."""

    seq: int = 0
    hash: str = GENESIS
    summarised: int = 0  # row of the last summary
    node: str | None = None  # of the first release
    has_budget: bool = False
    secret: str | None = None  # how the ledger knows its secret again
    runs: dict[str, dict[NodeData, Charges]] = field(default_factory=dict)
    plans: dict[str, dict[str, Planned]] = field(default_factory=dict)  # by run and node, as it began
    releases: dict[NamedData, int] = field(default_factory=dict)
    by_run: dict[str, int] = field(default_factory=dict)  # releases
    total: int = 0  # releases
    deltas: dict[NamedData, float] = field(default_factory=dict)  # the smallest that a plan named
    nodes: dict[NamedData, tuple[str, ...]] = field(default_factory=dict)  # that released it
    sets: dict[str, KnownSet] = field(default_factory=dict)
    imports: dict[str, Imported] = field(default_factory=dict)  # by the hash of the old ledger's first row
    # What follows from `releases`: data by fingerprint; of how many; and those that had no set of keys.
    by_print: dict[str, tuple[NamedData, ...]] = field(default_factory=dict, compare=False, repr=False)
    indexed: int = field(default=0, compare=False, repr=False)
    bare: dict[NamedData, None] = field(default_factory=dict, compare=False, repr=False)
    # Runs of which this state alone has the charges and plans; those of others are copied before they change.
    own: set[str] = field(default_factory=set, compare=False, repr=False)

    def copy(self) -> LedgerState:
        """A state that may be added to while this one stays; what is deeper is copied when it changes."""
        copies: dict[str, Any] = {n: dict(v) for n, v in vars(self).items() if isinstance(v, dict)}
        self.own = set()
        return replace(self, **copies, own=set())

    def add(self, row: Row) -> None:
        """Adds `row`, which must be the next one."""
        body = row.body
        if row.kind in RELEASED:
            self.count(row)
        elif row.kind == "budget":
            self.has_budget = True
        elif row.kind == "secret":
            self.secret = body["check"]
        elif row.kind == "set":
            self.sets[body["id"]] = KnownSet(
                body["records"], body["persons"], body["digest"], tuple(body["old"])
            )
        elif row.kind == "import":
            self.imports[body["ledger"]] = Imported(body["node"], body["seq"], body["hash"])
        elif row.kind == "summary":
            self.summarised = row.seq
        self.seq, self.hash = row.seq, row.hash

    def count(self, row: Row) -> None:
        """Counts the release of a row."""
        body, run = row.body, row.run or ""
        data = NamedData(body["dataset"], body["fingerprint"])
        if run not in self.own:
            self.runs[run], self.plans[run] = dict(self.runs.get(run, {})), dict(self.plans.get(run, {}))
            self.own.add(run)
        source, of_run = NodeData(body["node"], data), self.runs[run]
        before = of_run.get(source, Charges(row.seq, {}))
        uses = dict(before.uses)
        for use, steps in _uses(bool(body["public"]), body["unit"], charged_steps(body)):
            uses[use] = uses.get(use, 0) + steps
        of_run[source] = Charges(before.first, uses)
        if body["node"] not in self.plans[run]:
            self.plans[run][body["node"]] = planned_in(body)
        self.by_run[run] = self.by_run.get(run, 0) + 1
        self.total += 1
        if body["delta"] > 0.0:
            self.deltas[data] = min(body["delta"], self.deltas.get(data, 1.0))
        if data not in self.releases and self.indexed == len(self.releases):
            self._index(data)
        self.releases[data] = self.releases.get(data, 0) + 1
        known = self.nodes.get(data, ())
        if body["node"] not in known:
            self.nodes[data] = (*known, body["node"])
        self.node = self.node or body["node"]

    @property
    def size(self) -> int:
        """How many values a summary of this state holds, roughly."""
        return sum(map(len, self.runs.values())) + len(self.releases) + len(self.sets) + len(self.imports)

    def has_imported(self, ledger: str, head: Head) -> bool:
        """Whether the ledger whose first row has hash `ledger` is taken over up to its `head`."""
        known = self.imports.get(ledger)
        return known is not None and Head(known.seq, known.hash) == head

    def imported_of(self, ledger: str, hashes: Mapping[int, str]) -> int:
        """How many of the rows with these `hashes` were taken over from it before; of another copy, none."""
        known = self.imports.get(ledger)
        return known.seq if known is not None and hashes.get(known.seq) == known.hash else 0

    # --- what belongs together ----------------------------------------------------------------------

    def _index(self, data: NamedData) -> None:
        self.by_print[data.fingerprint] = (*self.by_print.get(data.fingerprint, ()), data)
        if data.fingerprint not in self.sets:
            self.bare[data] = None
        self.indexed += 1

    def _indexed(self) -> LedgerState:
        """This state, its index as its releases are."""
        if self.indexed != len(self.releases):
            self.by_print, self.bare, self.indexed = {}, {}, 0
            for data in self.releases:
                self._index(data)
        return self

    def data_of(self, name: str) -> tuple[NamedData, ...]:
        """The data that was released with fingerprint `name`."""
        return self._indexed().by_print.get(name, ())

    def without_keys(self) -> list[NamedData]:
        """The data that is not known by a set of keys: what version 0.1 wrote."""
        return [data for data in self._indexed().bare if data.fingerprint not in self.sets]

    def names_of_set(self, name: str) -> set[str]:
        """The names of the data sets under which a set of keys was released."""
        return {data.dataset for data in self.data_of(name)}

    def linked(self, names: set[str], prints: set[str], *, all_data: bool) -> set[NamedData]:
        """All data with one of `names` or `prints`, what shares either with one of these, and so on.

        Without `all_data` only data without keys is looked at: what version 0.1 wrote.
        """
        names, prints = set(names), set(prints)
        candidates = list(self.releases) if all_data else self.without_keys()
        linked: set[NamedData] = set()
        while True:
            reached = {d for d in candidates if d.dataset in names or d.fingerprint in prints} - linked
            if not reached:
                return linked
            linked |= reached
            names |= {data.dataset for data in reached}
            prints |= {data.fingerprint for data in reached}

    # --- as text ------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """For a summary row: which row and hash it stands on is in the row itself."""
        return {
            "node": self.node,
            "has_budget": self.has_budget,
            "secret": self.secret,
            "runs": [
                [
                    run,
                    *source.data,
                    source.node,
                    charges.first,
                    sorted([*use, n] for use, n in charges.uses.items()),
                ]
                for run, of_run in sorted(self.runs.items())
                for source, charges in sorted(of_run.items())
            ],
            "plans": self.plans,
            "by_run": sorted([run, count] for run, count in self.by_run.items()),
            "releases": [[*data, count] for data, count in sorted(self.releases.items())],
            "deltas": [[*data, delta] for data, delta in sorted(self.deltas.items())],
            "nodes": [[*data, list(nodes)] for data, nodes in sorted(self.nodes.items())],
            "sets": [[name, *known[:3], list(known.old)] for name, known in sorted(self.sets.items())],
            "imports": [[ledger, *known] for ledger, known in sorted(self.imports.items())],
        }


class LedgerWriter:
    """Adds rows to a ledger within one transaction, and to the state that they give."""

    def __init__(self, chain: Chain, connection: Any, state: LedgerState) -> None:
        self._chain = chain
        self.connection = connection
        self.state = state

    def write(self, kind: str, body: dict[str, Any], *, run: str | None = None) -> Row:
        """Adds one row, and a summary where it is time for one."""
        row = self._append(kind, body, run)
        if row.seq - self.state.summarised >= max(_SNAPSHOT_EVERY, self.state.size):
            self._append("summary", self.state.to_json(), None)
        return row

    def _append(self, kind: str, body: dict[str, Any], run: str | None) -> Row:
        row = self._chain.append(self.connection, kind, body, run=run, previous=self.state.hash)
        self.state.add(row)
        return row


class StateReader:
    """The state of one ledger's file; it remembers what it has read, and reads only what came after."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._state = LedgerState()
        self._kept: dict[str, Any] | None = None  # what was looked at already, within `at_once`

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it the ledger is read as it is now, and looked at once for all that is asked.

        Other processes may write meanwhile; this thread cannot, and others of this process wait.
        """
        with self._chain.reading():
            if self._kept is not None:
                yield
                return
            self._kept = {}
            try:
                yield
            finally:
                self._kept = None

    def once(self, what: str, look: Callable[[], T]) -> T:
        """What `look` gives; within `at_once`, and within a transaction, it looks once."""
        with self._chain.turn:  # whoever keeps something has it
            if self._kept is None:
                return look()
            if what not in self._kept:
                self._kept[what] = look()
            kept: T = self._kept[what]
            return kept

    def current(self) -> LedgerState:
        """The state with every row that there is.

        Raises:
            LedgerError: the file cannot be used or trusted, or what was read of it before is gone.
        """
        return self.once("state", self._read)

    def _read(self) -> LedgerState:
        with self._chain.reading() as connection:
            if connection is not None:
                self._state = self._caught_up(connection)
            elif self._state.seq:
                raise self._chain.broken("the file is gone")
        return self._state

    @contextmanager
    def writing(self) -> Iterator[LedgerWriter]:
        """A transaction that holds the writer's lock, begun after every row that there is.

        What is written is durable when the block ends, and gone if it raises.

        Raises:
            LedgerError: as `current`, or the file cannot be written.
        """
        with self._chain.writing() as connection:
            writer = LedgerWriter(self._chain, connection, self._caught_up(connection).copy())
            self._kept = {}
            try:
                yield writer
            finally:
                self._kept = None
        self._state = writer.state

    def _caught_up(self, connection: Any) -> LedgerState:
        """The state with every row that was written since; starts from the last summary if it knows none."""
        state = self._state
        if state.seq == 0:
            # From the last summary but one, so that the last is checked against the rows that it sums up.
            summaries = self._chain.latest_of_kind(connection, "summary", 2)
            if summaries:
                state = state_from_summary(summaries[0]) or state
        elif self._chain.hash_of(connection, state.seq) != state.hash:
            raise self._chain.broken(f"row {state.seq}, which this process has read, is gone or another")
        after = state
        for row in self._chain.rows(connection, state.seq, state.hash):
            if after is state:
                after = state.copy()
            if summary_differs(row, after):
                raise self._chain.broken(f"row {row.seq} sums the rows before it up wrongly")
            after.add(row)
        return after


def state_from_summary(summary: Row) -> LedgerState | None:
    """The state that a summary row holds; None for one of version 0.1, which did not count by run."""
    body = summary.body
    if "runs" not in body:
        return None
    runs: dict[str, dict[NodeData, Charges]] = {}
    for run, dataset, fingerprint, node, first, counted in body["runs"]:
        uses = {Use(*use): count for *use, count in counted}
        runs.setdefault(run, {})[NodeData(node, NamedData(dataset, fingerprint))] = Charges(first, uses)
    return LedgerState(
        seq=summary.seq,
        hash=summary.hash,
        summarised=summary.seq,
        node=body["node"],
        has_budget=body["has_budget"],
        secret=body["secret"],
        runs=runs,
        plans=body["plans"],
        releases={NamedData(*values[:-1]): values[-1] for values in body["releases"]},
        by_run=dict(body["by_run"]),
        total=sum(count for _, count in body["by_run"]),
        deltas={NamedData(*values[:-1]): values[-1] for values in body["deltas"]},
        nodes={NamedData(*values[:-1]): tuple(values[-1]) for values in body["nodes"]},
        sets={
            name: KnownSet(records, persons, digest, tuple(old))
            for name, records, persons, digest, old in body["sets"]
        },
        imports={values[0]: Imported(*values[1:]) for values in body["imports"]},
    )


def summary_differs(row: Row, state: LedgerState) -> bool:
    """Whether `row` is a summary of other rows than `state`, which those before it add up to.

    One of version 0.1 has nothing of what a state is now: the rows themselves are read then.
    """
    return row.kind == "summary" and "runs" in row.body and row.body != state.to_json()


def replay(rows: Iterable[Row]) -> tuple[LedgerState, list[str]]:
    """The state after all rows, and what is wrong with what they say of one another."""
    state, problems = LedgerState(), []
    open_reservations: set[int] = set()
    for row in rows:
        if summary_differs(row, state):
            problems.append(f"row {row.seq} sums the rows before it up wrongly")
        if row.kind == "reserved":
            open_reservations.add(row.seq)
        if row.kind == "committed" and row.body.get("reservation") not in open_reservations:
            problems.append(
                f"row {row.seq} finishes release {row.body.get('reservation')}, which nothing began"
            )
        try:
            state.add(row)
        except (KeyError, TypeError, ValueError):
            problems.append(f"row {row.seq} is not what a ledger writes")
    return state, problems


def _uses(public: bool, unit: str, steps: list[dict[str, Any]] | None) -> Iterable[tuple[Use, int]]:
    if steps is None:
        return [(Use(public, unit, False, 1.0, 0.0), 1)]
    return [(Use(public, unit, True, s["sample_rate"], s["noise_multiplier"]), s["count"]) for s in steps]
