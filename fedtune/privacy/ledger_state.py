"""What the rows of a ledger add up to: releases counted by what they cost, per data set.

Pure values: a state is never changed, each row gives a new one. The ledger writes one into itself now and
then (a summary row, part of the hash chain), so that a new process need not read years of rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from fedtune.privacy.accounting import Term
from fedtune.privacy.chain import GENESIS, Row
from fedtune.privacy.plan import UNITS, ReleasePlan

__all__ = ["LedgerState", "Release", "Use", "charge_of", "purpose_of", "release_of", "state_of"]


@dataclass(frozen=True)
class Release:
    """One release as the ledger holds it. `steps`: its noised steps, None if it had no noise."""

    seq: int
    time: str
    node: str
    run: str
    round: int
    dataset: str
    fingerprint: str
    public: bool
    trust: str
    unit: str
    delta: float
    reproducible_noise: bool
    steps: tuple[tuple[Term, int], ...] | None
    committed: bool
    purpose: str = "training"


class Use(NamedTuple):
    """One way in which one data set was used: what is counted together."""

    dataset: str
    fingerprint: str
    public: bool
    unit: str
    noised: bool
    sample_rate: float  # 1.0 if not noised
    noise_multiplier: float  # 0.0 if not noised


class _Key(NamedTuple):
    dataset: str
    fingerprint: str


@dataclass(frozen=True)
class LedgerState:
    """The sum of all rows up to row `seq`, whose hash is `hash`."""

    seq: int = 0
    hash: str = GENESIS
    node: str | None = None
    has_budget: bool = False
    steps: Mapping[Use, int] = field(default_factory=dict)  # noised steps (releases, if not noised)
    releases: Mapping[_Key, int] = field(default_factory=dict)
    deltas: Mapping[_Key, float] = field(default_factory=dict)  # the smallest that a plan named

    def with_row(self, row: Row) -> LedgerState:
        """The state after `row`, which must be the next one."""
        state = self.counting(row) if row.kind == "reserved" else self
        if row.kind == "budget":
            state = replace(state, has_budget=True)
        return replace(state, seq=row.seq, hash=row.hash)

    def counting(self, row: Row) -> LedgerState:
        """The state with the release of a reserved row counted."""
        body = row.body
        key = _Key(body["dataset"], body["fingerprint"])
        steps = dict(self.steps)
        for use, count in _uses(key, bool(body["public"]), body["unit"], body["steps"]):
            steps[use] = steps.get(use, 0) + count
        deltas = dict(self.deltas)
        if body["delta"] > 0.0:
            deltas[key] = min(body["delta"], deltas.get(key, 1.0))
        return replace(
            self,
            node=self.node or body["node"],
            steps=steps,
            releases={**self.releases, key: self.releases.get(key, 0) + 1},
            deltas=deltas,
        )

    # --- what belongs together ----------------------------------------------------------------------

    def linked(self, dataset: str, fingerprint: str) -> set[tuple[str, str]]:
        """All (name, fingerprint) pairs that share a name or a fingerprint with this one, directly or
        through others; this one included."""
        names, prints = {dataset}, {fingerprint}
        found: set[tuple[str, str]] = {(dataset, fingerprint)}
        while True:
            reached = {(n, p) for n, p in self.releases if (n in names or p in prints)} - found
            if not reached:
                return found
            found |= reached
            names |= {name for name, _ in reached}
            prints |= {fingerprint for _, fingerprint in reached}

    def releases_of(self, dataset: str, fingerprint: str) -> int:
        """Releases of this data under this very name and fingerprint, without those that are linked to it."""
        return self.releases.get(_Key(dataset, fingerprint), 0)

    def names_of(self, dataset: str, fingerprint: str) -> set[str]:
        """All names under which this data is known."""
        return {name for name, _ in self.linked(dataset, fingerprint)}

    def is_private(self, names: set[str]) -> bool:
        """True if data under one of `names` was released as private."""
        return any(use.dataset in names and not use.public for use in self.steps)

    def unit_of(self, dataset: str, fingerprint: str) -> str | None:
        """The finest unit that a release of this data protects; None before the first."""
        return _finest(use.unit for use in self._uses_of(dataset, fingerprint))

    def smallest_delta(self, dataset: str, fingerprint: str) -> float:
        """The smallest delta that a plan for this data named; 1e-6 if none did."""
        linked = self.linked(dataset, fingerprint)
        return min((d for key, d in self.deltas.items() if tuple(key) in linked), default=1e-6)

    def terms(self, dataset: str, fingerprint: str) -> dict[Term, int] | None:
        """Everything this data was used for, composed for its finest unit; None without privacy."""
        return _terms(self._uses_of(dataset, fingerprint))

    def adding(
        self, dataset: str, fingerprint: str, plan: ReleasePlan, releases: int, after: int = 0
    ) -> dict[Term, int] | None:
        """As `terms`, with `releases` further releases of `plan`, in a run that has made `after` of them."""
        uses = dict(self._uses_of(dataset, fingerprint))
        noised = charge_of(plan, releases, after)
        if noised is None:
            return None
        for term, count in noised.items():
            use = Use(dataset, fingerprint, False, plan.unit, True, term.sample_rate, term.noise_multiplier)
            uses[use] = uses.get(use, 0) + count
        return _terms(uses)

    def _uses_of(self, dataset: str, fingerprint: str) -> dict[Use, int]:
        linked = self.linked(dataset, fingerprint)
        return {u: n for u, n in self.steps.items() if (u.dataset, u.fingerprint) in linked}

    # --- as text ------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """For a summary row: which row and hash it stands on is in the row itself."""
        return {
            "node": self.node,
            "has_budget": self.has_budget,
            "steps": [[*use, count] for use, count in sorted(self.steps.items())],
            "releases": [[*key, count] for key, count in sorted(self.releases.items())],
            "deltas": [[*key, delta] for key, delta in sorted(self.deltas.items())],
        }


def state_of(summary: Row) -> LedgerState:
    """The state that a summary row holds."""
    body = summary.body
    return LedgerState(
        seq=summary.seq,
        hash=summary.hash,
        node=body["node"],
        has_budget=body["has_budget"],
        steps={Use(*values[:-1]): values[-1] for values in body["steps"]},
        releases={_Key(*values[:-1]): values[-1] for values in body["releases"]},
        deltas={_Key(*values[:-1]): values[-1] for values in body["deltas"]},
    )


def release_of(row: Row, *, committed: bool) -> Release:
    """A reserved row as a Release."""
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
    """What a reserved row's release is for: training, or evaluation (rows of old do not say: training)."""
    return str(row.body.get("purpose", "training"))


def _uses(
    key: _Key, public: bool, unit: str, steps: list[dict[str, Any]] | None
) -> Iterable[tuple[Use, int]]:
    if steps is None:
        return [(Use(*key, public, unit, False, 1.0, 0.0), 1)]
    return [
        (Use(*key, public, unit, True, s["sample_rate"], s["noise_multiplier"]), s["count"]) for s in steps
    ]


def _finest(units: Iterable[str]) -> str | None:
    found = set(units)
    return next((unit for unit in UNITS if unit in found), None)


def _terms(uses: Mapping[Use, int]) -> dict[Term, int] | None:
    finest = _finest(use.unit for use in uses)
    terms: dict[Term, int] = {}
    for use, count in uses.items():
        if not use.noised:
            return None
        # Of a coarser unit: one record changed replaces its person (or client) by another.
        term = Term(use.sample_rate, use.noise_multiplier, replace=use.unit != finest)
        terms[term] = terms.get(term, 0) + count
    return terms
