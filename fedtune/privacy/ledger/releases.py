"""One release as a row of the ledger: what is written down of it, and what it costs.

Rows of version 0.1 are read too, which knew less: they do not name the plan of their run, nor the purpose,
and their noise of trust=distributed was that towards the server.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedtune.errors import PrivacyError
from fedtune.privacy.accounting.epsilon import Term, compose_terms
from fedtune.privacy.ledger.chain import Row
from fedtune.privacy.ledger.identity import Identity
from fedtune.privacy.mechanisms.registry import MECHANISMS
from fedtune.privacy.plan import UNITS, ReleasePlan

__all__ = [
    "RELEASED",
    "AskedRelease",
    "Planned",
    "Release",
    "Reservation",
    "as_planned",
    "charge_of",
    "charged_steps",
    "is_coarser",
    "noise_scope",
    "planned_by",
    "planned_in",
    "purpose_of",
    "release_of",
    "steps_of",
    "terms_of_plan",
]

# [sample_rate, noise_multiplier, count] of each kind of step; None: one has no noise
Planned = list[list[Any]] | None

RELEASED = ("reserved", "imported")  # kinds of rows that are releases: made here, or in a ledger of before
_SCOPE = "towards"  # key of a row of trust=distributed: towards whom its noise counts
_LEAST_SHARE = math.sqrt(0.5) * (1.0 - 1e-12)


@dataclass(frozen=True)
class Release:
    """One release as the ledger holds it.

    Attributes:
        seq: number of its row.
        fingerprint: the id of a set of keys; of data known without keys, what it was called by.
        public: whether it counts as one of public data.
        steps: its noised steps with their counts, None if it had no noise.
        committed: whether it came to its end; one that did not counts all the same.
        purpose: `training`, `evaluation`, `confusion` or `size`.
    """

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


@dataclass(frozen=True)
class Reservation:
    """One release that may now be made, once. Hand it back to `PrivacyLedger.commit`."""

    seq: int  # row of the ledger
    hash: str
    node: str
    run: str
    round: int
    count: int  # of the node's releases in the run for the same purpose, with this one


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


@dataclass(frozen=True)
class AskedRelease:
    """One release that a node asks its ledger for.

    `dataset` and `fingerprint` say from what (see `fedtune.privacy.ledger.ledger`); `whole`: the plans of all
    releases of the run, one for each purpose, by which it may be admitted as one that was fixed in advance
    (none: `plan` alone); `public`: its owner declared the data public, so nothing is refused (ignored where a
    key of it was released as private before).
    """

    dataset: str
    fingerprint: str | Identity
    node: str
    run: str
    round: int
    plan: ReleasePlan
    whole: tuple[ReleasePlan, ...] = ()
    public: bool = False

    @property
    def planned(self) -> dict[Term, int] | None:
        """Everything that the run's plans allow."""
        return planned_by(self.whole or (self.plan,))

    def checked(self) -> str | Identity:
        """What the data is known by. Raises `PrivacyError` if something that a release needs is missing."""
        data = self.fingerprint if isinstance(self.fingerprint, Identity) else str(self.fingerprint or "")
        named = (("dataset", self.dataset), ("fingerprint", data), ("node", self.node), ("run", self.run))
        for name, value in named:
            if not isinstance(value, str | Identity) or not value:
                raise PrivacyError(f"A release needs a {name}: a text that is not empty, not {value!r}.")
        if isinstance(self.round, bool) or not isinstance(self.round, int) or self.round < 0:
            raise PrivacyError(f"round must be a whole number of 0 or more, not {self.round!r}.")
        return data


def charge_of(plan: ReleasePlan, releases: int, after: int = 0) -> dict[Term, int] | None:
    """What `releases` of `plan` cost the data; None without privacy.

    Noise that comes from `seed` counts as none: the seed stands in the run's record, and whoever has it can
    take the noise off. What such a run shows as its epsilon is that of the same run with secret noise.
    """
    return None if plan.reproducible_noise else plan.terms(releases, after=after)


def purpose_of(row: Row) -> str:
    """What a release is for; rows of version 0.1 may not say: training."""
    return str(row.body.get("purpose", "training"))


def planned_in(body: dict[str, Any]) -> Planned:
    """The steps of a run's whole plan, as the row of its first release names them.

    A row of version 0.1, which does not name them, is taken for one of `num_rounds` releases like itself.
    """
    if "planned" in body:
        return [list(step) for step in body["planned"]] if body["planned"] is not None else None
    steps = charged_steps(body)
    if steps is None:
        return None
    return [[s["sample_rate"], s["noise_multiplier"], s["count"] * body["num_rounds"]] for s in steps]


def noise_scope(plan: ReleasePlan) -> dict[str, str]:
    """What a row of shared noise says beside: it counts towards other nodes too."""
    return {_SCOPE: "everybody"} if plan.shares_noise else {}


def charged_steps(body: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The noised steps of a row as they are charged.

    Version 0.1 wrote down the noise of trust=distributed towards the server. Another node knows its own share
    of it: if h nodes add noise, (h - 1) / h of the variance is left, half of it at worst. Such a row does not
    say how many there were.
    """
    steps: list[dict[str, Any]] | None = body["steps"]
    kind = MECHANISMS.get(body["trust"])
    shared = kind is not None and kind.shares_noise and body.get("purpose", "training") == "training"
    if steps is None or not shared or _SCOPE in body:
        return steps
    return [{**step, "noise_multiplier": step["noise_multiplier"] * _LEAST_SHARE} for step in steps]


def terms_of_plan(planned: Planned) -> dict[Term, int] | None:
    """A plan's steps as the accountant takes them; None without privacy."""
    if planned is None:
        return None
    return compose_terms(*({Term(rate, noise): count} for rate, noise, count in planned))


def is_coarser(unit: str, than: str) -> bool:
    """Whether `unit` is a larger unit of privacy than `than`."""
    return UNITS.index(unit) > UNITS.index(than)


def steps_of(plan: ReleasePlan, made: int) -> list[dict[str, Any]] | None:
    """What the release after `made` others of its run adds to the account."""
    terms = charge_of(plan, 1, made)
    if terms is None:
        return None
    return [
        {"sample_rate": term.sample_rate, "noise_multiplier": term.noise_multiplier, "count": count}
        for term, count in sorted(terms.items())
    ]


def planned_by(plans: Sequence[ReleasePlan]) -> dict[Term, int] | None:
    """Everything that the plans of one run allow."""
    return compose_terms(*(charge_of(plan, plan.num_rounds) for plan in plans))


def as_planned(terms: dict[Term, int] | None) -> Planned:
    """Steps as the row of a run's first release names them; `terms_of_plan` reads them."""
    if terms is None:
        return None
    return [[term.sample_rate, term.noise_multiplier, count] for term, count in sorted(terms.items())]
