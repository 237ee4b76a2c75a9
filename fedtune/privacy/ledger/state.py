"""What the rows of a ledger add up to: releases counted by run, node and data, by what they cost.

A state is copied before it is changed, so one that was handed out stays what it was. The ledger writes one
into itself now and then (a summary row, part of the hash chain), so that a new process need not read years
of rows. Which records the data sets share is not here but in the sets of keys
(`fedtune.privacy.ledger.overlap`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fedtune.privacy.accounting.epsilon import Term, compose_terms
from fedtune.privacy.ledger.chain import GENESIS, Chain, Row
from fedtune.privacy.plan import UNITS, ReleasePlan

__all__ = [
    "RELEASED",
    "Body",
    "Charge",
    "Imported",
    "KnownSet",
    "LedgerState",
    "Pen",
    "Planned",
    "Release",
    "Tally",
    "Use",
    "added_up",
    "charge_of",
    "coarser",
    "is_wrong_summary",
    "planned_in",
    "purpose_of",
    "release_of",
    "state_of",
    "terms_of_plan",
    "towards",
]

Planned = (
    list[list[Any]] | None
)  # [sample_rate, noise_multiplier, count] of each kind of step; None: unnoised

_SNAPSHOT_EVERY = 256  # rows between two summaries at least; more where a summary is longer than that
_TOWARDS = "towards"  # key of a row of trust=distributed: towards whom its noise counts
_LEAST_SHARE = math.sqrt(0.5) * (1.0 - 1e-12)
RELEASED = ("reserved", "imported")  # kinds of rows that are releases: made here, or in a ledger of before


@dataclass(frozen=True)
class Release:
    """One release as the ledger holds it. `steps`: its noised steps, None if it had no noise."""

    seq: int
    time: str
    node: str
    run: str
    round: int
    dataset: str
    fingerprint: str  # the id of a set of keys; of data known without keys, what it was called by
    public: bool
    trust: str
    unit: str
    delta: float
    reproducible_noise: bool
    steps: tuple[tuple[Term, int], ...] | None
    committed: bool
    purpose: str = "training"


class Use(NamedTuple):
    """One way in which data was used: what is counted together."""

    public: bool
    unit: str
    noised: bool
    sample_rate: float  # 1.0 if not noised
    noise_multiplier: float  # 0.0 if not noised


class Body(NamedTuple):
    """One body of data under one name. `fingerprint` as in `Release`."""

    dataset: str
    fingerprint: str


class Charge(NamedTuple):
    """What was charged together within one run: by which node, for which data."""

    node: str
    body: Body


class Tally(NamedTuple):
    """What one charge comes to."""

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
    runs: dict[str, dict[Charge, Tally]] = field(default_factory=dict)
    plans: dict[str, dict[str, Planned]] = field(default_factory=dict)  # by run and node, as it began
    releases: dict[Body, int] = field(default_factory=dict)
    by_run: dict[str, int] = field(default_factory=dict)  # releases
    total: int = 0  # releases
    deltas: dict[Body, float] = field(default_factory=dict)  # the smallest that a plan named
    nodes: dict[Body, tuple[str, ...]] = field(default_factory=dict)  # that released it
    sets: dict[str, KnownSet] = field(default_factory=dict)
    imports: dict[str, Imported] = field(default_factory=dict)  # by the hash of the old ledger's first row

    def copy(self) -> LedgerState:
        """A state that may be added to while this one stays; what is deeper is replaced, never changed."""
        return LedgerState(
            self.seq, self.hash, self.summarised, self.node, self.has_budget, self.secret, dict(self.runs),
            dict(self.plans), dict(self.releases), dict(self.by_run), self.total, dict(self.deltas),
            dict(self.nodes), dict(self.sets), dict(self.imports),
        )  # fmt: skip

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
        said, run = row.body, row.run or ""
        body = Body(said["dataset"], said["fingerprint"])
        charge, charges = Charge(said["node"], body), dict(self.runs.get(run, {}))
        tally = charges.get(charge, Tally(row.seq, {}))
        counted = dict(tally.uses)
        for use, steps in _uses(bool(said["public"]), said["unit"], _steps_of(said)):
            counted[use] = counted.get(use, 0) + steps
        charges[charge] = Tally(tally.first, counted)
        self.runs[run] = charges
        if said["node"] not in self.plans.get(run, {}):
            self.plans[run] = {**self.plans.get(run, {}), said["node"]: planned_in(said)}
        self.by_run[run] = self.by_run.get(run, 0) + 1
        self.total += 1
        if said["delta"] > 0.0:
            self.deltas[body] = min(said["delta"], self.deltas.get(body, 1.0))
        self.releases[body] = self.releases.get(body, 0) + 1
        known = self.nodes.get(body, ())
        if said["node"] not in known:
            self.nodes[body] = (*known, said["node"])
        self.node = self.node or said["node"]

    @property
    def size(self) -> int:
        """How many values a summary of this state holds, roughly."""
        return sum(map(len, self.runs.values())) + len(self.releases) + len(self.sets) + len(self.imports)

    def has_imported(self, ledger: str, seq: int, digest: str) -> bool:
        """Whether the ledger whose first row has hash `ledger` is taken over up to this row."""
        known = self.imports.get(ledger)
        return seq == 0 or (known is not None and (known.seq, known.hash) == (seq, digest))

    def imported_of(self, ledger: str, hashes: Mapping[int, str]) -> int:
        """How many of the rows with these `hashes` were taken over from it before; of another copy, none."""
        known = self.imports.get(ledger)
        return known.seq if known is not None and hashes.get(known.seq) == known.hash else 0

    # --- what belongs together ----------------------------------------------------------------------

    def names_of_set(self, name: str) -> set[str]:
        """The names of the data sets under which a set of keys was released."""
        return {body.dataset for body in self.releases if body.fingerprint == name}

    def linked(self, names: set[str], prints: set[str], *, all_bodies: bool) -> set[Body]:
        """Every body with one of `names` or `prints`, those that share either with one of these, and so on.

        Without `all_bodies` only bodies without keys are asked: what version 0.1 wrote.
        """
        names, prints = set(names), set(prints)
        asked = [body for body in self.releases if all_bodies or body.fingerprint not in self.sets]
        found: set[Body] = set()
        while True:
            reached = {b for b in asked if b.dataset in names or b.fingerprint in prints} - found
            if not reached:
                return found
            found |= reached
            names |= {body.dataset for body in reached}
            prints |= {body.fingerprint for body in reached}

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
                    *charge.body,
                    charge.node,
                    tally.first,
                    sorted([*use, n] for use, n in tally.uses.items()),
                ]
                for run, charges in sorted(self.runs.items())
                for charge, tally in sorted(charges.items())
            ],
            "plans": self.plans,
            "by_run": sorted([run, count] for run, count in self.by_run.items()),
            "releases": [[*body, count] for body, count in sorted(self.releases.items())],
            "deltas": [[*body, delta] for body, delta in sorted(self.deltas.items())],
            "nodes": [[*body, list(nodes)] for body, nodes in sorted(self.nodes.items())],
            "sets": [[name, *one[:3], list(one.old)] for name, one in sorted(self.sets.items())],
            "imports": [[ledger, *one] for ledger, one in sorted(self.imports.items())],
        }


class Pen:
    """Adds rows to a ledger within one transaction, and to the state that they give."""

    def __init__(self, chain: Chain, connection: Any, state: LedgerState) -> None:
        self._chain = chain
        self.connection = connection
        self.state = state

    def write(self, kind: str, body: dict[str, Any], *, run: str | None = None) -> Row:
        """Adds one row, and a summary where it is time for one."""
        row = self._chain.append(self.connection, kind, body, run=run, previous=self.state.hash)
        self.state.add(row)
        if row.seq - self.state.summarised >= max(_SNAPSHOT_EVERY, self.state.size):
            said = self.state.to_json()
            self.state.add(
                self._chain.append(self.connection, "summary", said, run=None, previous=self.state.hash)
            )
        return row


def state_of(summary: Row) -> LedgerState | None:
    """The state that a summary row holds; None for one of version 0.1, which did not count by run."""
    said = summary.body
    if "runs" not in said:
        return None
    runs: dict[str, dict[Charge, Tally]] = {}
    for run, dataset, fingerprint, node, first, uses in said["runs"]:
        counted = {Use(*use): count for *use, count in uses}
        runs.setdefault(run, {})[Charge(node, Body(dataset, fingerprint))] = Tally(first, counted)
    return LedgerState(
        seq=summary.seq,
        hash=summary.hash,
        summarised=summary.seq,
        node=said["node"],
        has_budget=said["has_budget"],
        secret=said["secret"],
        runs=runs,
        plans=said["plans"],
        releases={Body(*values[:-1]): values[-1] for values in said["releases"]},
        by_run=dict(said["by_run"]),
        total=sum(count for _, count in said["by_run"]),
        deltas={Body(*values[:-1]): values[-1] for values in said["deltas"]},
        nodes={Body(*values[:-1]): tuple(values[-1]) for values in said["nodes"]},
        sets={
            name: KnownSet(records, persons, digest, tuple(old))
            for name, records, persons, digest, old in said["sets"]
        },
        imports={values[0]: Imported(*values[1:]) for values in said["imports"]},
    )


def is_wrong_summary(row: Row, state: LedgerState) -> bool:
    """Whether `row` is a summary of other rows than `state`, which those before it add up to.

    One of version 0.1 has nothing of what a state is now: the rows themselves are read then.
    """
    return row.kind == "summary" and "runs" in row.body and row.body != state.to_json()


def added_up(rows: Iterable[Row]) -> tuple[LedgerState, list[str]]:
    """The state after all rows, and what is wrong with what they say of one another."""
    state, problems = LedgerState(), []
    open_reservations: set[int] = set()
    for row in rows:
        if is_wrong_summary(row, state):
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


def release_of(row: Row, *, committed: bool) -> Release:
    """A row of a release as a Release."""
    body = row.body
    steps = body["steps"]
    return Release(
        seq=row.seq,
        time=row.time,
        node=body["node"],
        run=row.run or "",
        round=body["round"],
        dataset=body["dataset"],
        fingerprint=body["fingerprint"],
        public=body["public"],
        trust=body["trust"],
        unit=body["unit"],
        delta=body["delta"],
        reproducible_noise=body["reproducible_noise"],
        steps=None
        if steps is None
        else tuple((Term(s["sample_rate"], s["noise_multiplier"]), s["count"]) for s in steps),
        committed=committed,
        purpose=purpose_of(row),
    )


def charge_of(plan: ReleasePlan, releases: int, after: int = 0) -> dict[Term, int] | None:
    """What `releases` of `plan` cost the data; None without privacy.

    Noise that comes from `seed` counts as none: the seed stands in the run's record, and whoever has it can
    take the noise off. What such a run shows as its epsilon is that of the same run with secret noise.
    """
    return None if plan.reproducible_noise else plan.terms(releases, after=after)


def purpose_of(row: Row) -> str:
    """What a release is for: training, or evaluation (rows of old do not say: training)."""
    return str(row.body.get("purpose", "training"))


def planned_in(said: dict[str, Any]) -> Planned:
    """The steps of a run's whole plan, as the row of its first release names them.

    A row that does not name them (of version 0.1) tells of its own purpose: so many releases like this one.
    """
    if "planned" in said:
        return [list(step) for step in said["planned"]] if said["planned"] is not None else None
    steps = _steps_of(said)
    if steps is None:
        return None
    return [[s["sample_rate"], s["noise_multiplier"], s["count"] * said["num_rounds"]] for s in steps]


def towards(plan: ReleasePlan) -> dict[str, str]:
    """For a row of trust=distributed: its noise counts towards those, too, who know some of it."""
    shared = plan.trust == "distributed" and plan.purpose == "training"
    return {_TOWARDS: "everybody"} if shared else {}


def _steps_of(said: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The noised steps of a row as they are charged.

    Version 0.1 wrote down the noise of trust=distributed towards the server. Another node knows its own share
    of it, and is left with (h - 1) / h of the variance if h nodes add noise: half, at worst. How many there
    were such a row does not say.
    """
    steps: list[dict[str, Any]] | None = said["steps"]
    old = (
        said["trust"] == "distributed"
        and said.get("purpose", "training") == "training"
        and _TOWARDS not in said
    )
    if steps is None or not old:
        return steps
    return [{**step, "noise_multiplier": step["noise_multiplier"] * _LEAST_SHARE} for step in steps]


def terms_of_plan(planned: Planned) -> dict[Term, int] | None:
    """A plan's steps as the accountant takes them; None without privacy."""
    if planned is None:
        return None
    return compose_terms(*({Term(rate, noise): count} for rate, noise, count in planned))


def coarser(unit: str, than: str) -> bool:
    """Whether `unit` is a larger unit of privacy than `than`."""
    return UNITS.index(unit) > UNITS.index(than)


def _uses(public: bool, unit: str, steps: list[dict[str, Any]] | None) -> Iterable[tuple[Use, int]]:
    if steps is None:
        return [(Use(public, unit, False, 1.0, 0.0), 1)]
    return [(Use(public, unit, True, s["sample_rate"], s["noise_multiplier"]), s["count"]) for s in steps]
