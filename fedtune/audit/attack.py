"""Audits a plan: runs its mechanism, or the real model, with canaries, and sets what shows beside the claim.

    1  coins, and places of the canaries, from a generator that the mechanism never sees
    2  the releases, as many as the run made, by `canaries.watch` or `model.watch`; `repeats` times
    3  scores of all repetitions together, and from them bounds that hold jointly at one confidence
    4  beside the claim: is any of them above it?

Repetitions are pooled: each has canaries of its own, so together they are one mechanism with more canaries.

Joint confidence. Half of the error goes to the one-run bound, a quarter to each of the two that take canaries
as independent; so a right mechanism is convicted by any of them with probability at most 1 - confidence. For
the real model a quarter of all goes to the input canaries first; and there canaries meet in the weights, so
that they are independent only as far as what one canary does to the gradients of the others is small beside
the noise.

Costs nothing of anybody's privacy: `mechanism` has synthetic gradients, `model` public records.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtune.audit import canaries as gradient_canaries
from fedtune.audit import verdict
from fedtune.audit.bounds import epsilon_one_shot
from fedtune.audit.canaries import GradientCanaries
from fedtune.audit.verdict import Bound
from fedtune.config.schema import Config
from fedtune.errors import PrivacyError
from fedtune.privacy.plan import PrivacyPlan

__all__ = ["AuditResult", "audit_mechanism", "audit_model", "default_canaries"]

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Progress = Callable[[int, int], None]  # (done, to do)

_STREAM = 0xA0D17  # keeps the auditor's draws apart from every other use of small seeds
_ONE_SHOT_CLIENTS, _ONE_SHOT_DIMENSION = 500, 20_000


@dataclass(frozen=True, eq=False)
class AuditResult:
    """What an audit shows.

    Fields: `audited`, mechanism or model; `claimed` epsilon at `delta` (None: nothing was claimed), and
    `accounted`, what the accountant says of the plan for as many releases; `bounds`, jointly at
    `confidence`; `estimate`, of epsilon, which is no bound (trust `central`); `scores` and `included` of
    the gradient canaries, for a figure.
    """

    audited: str
    plan: PrivacyPlan
    releases: int
    claimed: float | None
    accounted: float | None
    confidence: float
    canaries: int
    repeats: int
    bounds: tuple[Bound, ...]
    estimate: float | None = None
    scores: dict[str, FloatArray] = field(default_factory=dict, repr=False)
    included: BoolArray = field(default_factory=lambda: np.zeros(0, dtype=np.bool_), repr=False)

    @property
    def best(self) -> Bound:
        """The largest of the lower bounds."""
        return max(self.bounds, key=lambda bound: bound.epsilon_lower)

    @property
    def violated(self) -> bool:
        """True where some bound is above the claim: the code does not do what is promised."""
        return self.claimed is not None and self.best.epsilon_lower > self.claimed

    @property
    def understated(self) -> bool:
        """True where the accountant's own epsilon for these releases is above the claim."""
        if self.claimed is None or self.accounted is None:
            return False
        return self.accounted > self.claimed * (1.0 + 1e-3) + 1e-6

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, as `privacy.audit` of a record holds them."""
        plan, best = self.plan, self.best
        return {
            "epsilon_lower": best.epsilon_lower,
            "confidence": self.confidence,
            "method": f"{_WORDS[best.method]}, assuming {best.assumes}",
            "epsilon_claimed": self.claimed,
            "epsilon_accounted": _finite(self.accounted),
            "delta": plan.delta if plan.is_private() else None,
            "unit": plan.unit,
            "adjacency": plan.adjacency(),
            "violated": self.violated or self.understated,
            "audited": self.audited,
            "canaries": self.canaries,
            "repeats": self.repeats,
            "releases": self.releases,
            "steps": plan.steps(self.releases),
            "bounds": [bound.to_json() for bound in self.bounds],
            "estimate": None
            if self.estimate is None
            else {
                "epsilon": _finite(self.estimate),
                "method": "one-shot random canary clients (Andrew et al. 2024); an estimate, no bound",
            },
            "private_data": _DATA[self.audited],
        }


_WORDS = {
    "one-run": "gradient canaries in one run (Steinke, Nasr and Jagielski 2023)",
    "two-sample": "gradient canaries at one threshold (Clopper and Pearson 1934)",
    "curve": "gradient canaries against the plan's whole privacy curve",
    "one-run, input canaries": "mislabelled records, by the final model alone (Steinke et al. 2023)",
}
_DATA = {
    "mechanism": "none: every unit was a canary with a synthetic gradient",
    "model": "none: trained on the public test split",
}


def default_canaries(plan: PrivacyPlan, audited: str) -> int:
    """How many canaries an audit takes if it is not told: what a minute of one core allows."""
    if audited == "model":
        return 1000
    return 4000 if plan.mechanism.round == "clipped" else 20_000


def audit_mechanism(
    plan: PrivacyPlan,
    releases: int,
    *,
    claimed: float | None,
    canaries: int | None = None,
    repeats: int = 1,
    confidence: float = 0.95,
    progress: Progress | None = None,
) -> AuditResult:
    """Audits the plan's own sampler, clipping, noise and averaging on synthetic gradients.

    Args: `releases` that the run made; `claimed`, epsilon at the plan's delta; `canaries` in each of
    `repeats` repetitions, half of which exist. Raises `PrivacyError` for numbers that allow no audit.
    """
    canaries = default_canaries(plan, "mechanism") if canaries is None else canaries
    _check(releases, canaries, repeats, confidence)
    found, coins = [], []
    for repeat in range(repeats):
        placed = GradientCanaries.spread(canaries, 2 * canaries, _auditor(repeat))
        found.append(gradient_canaries.watch(plan, releases, placed, repetition=repeat))
        coins.append(placed.included)
        if progress is not None:
            progress(repeat + 1, repeats)
    scores, included = _pooled(found), np.concatenate(coins)
    estimate = None
    if plan.mechanism.round == "clipped":
        cosines = gradient_canaries.one_shot_cosines(
            plan, releases, _ONE_SHOT_CLIENTS, _ONE_SHOT_DIMENSION, _auditor(repeats)
        )
        estimate = epsilon_one_shot(cosines, _ONE_SHOT_DIMENSION, plan.delta)
    return AuditResult(
        audited="mechanism",
        plan=plan,
        releases=releases,
        claimed=claimed,
        accounted=plan.epsilon(releases) if plan.is_private() else None,
        confidence=confidence,
        canaries=canaries,
        repeats=repeats,
        bounds=_bounds(scores, included, plan, releases, 1.0 - confidence),
        estimate=estimate,
        scores=scores,
        included=included,
    )


def audit_model(
    config: Config,
    plan: PrivacyPlan,
    releases: int,
    *,
    claimed: float | None,
    canaries: int | None = None,
    repeats: int = 1,
    confidence: float = 0.95,
    progress: Progress | None = None,
) -> AuditResult:
    """Audits training itself, on public records; see `fedtune.audit.model`. Args as `audit_mechanism`.

    Raises `PrivacyError` as there, for dp_ftrl, and as a run does.
    """
    from fedtune.audit import model

    if plan.root() is not None:
        raise PrivacyError(
            "The real model is not audited under privacy.mechanism=dp_ftrl: a client takes part in few of "
            "its rounds, and one client's training in all of them would show another mechanism. Audit the "
            "mechanism itself, which is what makes the noise: leave --model out."
        )
    canaries = default_canaries(plan, "model") if canaries is None else canaries
    _check(releases, canaries, repeats, confidence)
    runs = []
    for repeat in range(repeats):
        start = repeat * releases

        def shown(done: int, _: int, start: int = start) -> None:
            if progress is not None:
                progress(start + done, repeats * releases)

        runs.append(
            model.watch(config, plan, releases, canaries, _auditor(repeat), repetition=repeat, progress=shown)
        )
    scores = _pooled([run.gradient for run in runs])
    included = np.concatenate([run.gradient_included for run in runs])
    inputs = _pooled([run.inputs for run in runs])
    error = 1.0 - confidence
    coins = np.concatenate([run.inputs_included for run in runs])
    black = verdict.one_run(inputs, coins, delta=plan.delta, confidence=1.0 - error / 4.0)
    black = dataclasses.replace(black, method="one-run, input canaries")
    return AuditResult(
        audited="model",
        plan=plan,
        releases=releases,
        claimed=claimed,
        accounted=plan.epsilon(releases) if plan.is_private() else None,
        confidence=confidence,
        canaries=len(included) // repeats,
        repeats=repeats,
        bounds=(*_bounds(scores, included, plan, releases, 0.75 * error), black),
        scores=scores,
        included=included,
    )


# --- inside --------------------------------------------------------------------------------------


def _bounds(
    scores: dict[str, FloatArray], included: BoolArray, plan: PrivacyPlan, releases: int, error: float
) -> tuple[Bound, ...]:
    """What gradient canaries show, wrong in any of its bounds with probability at most `error`."""
    one = verdict.one_run(scores, included, delta=plan.delta, confidence=1.0 - error / 2.0)
    two = verdict.two_sample(scores, included, delta=plan.delta, confidence=1.0 - error / 4.0)
    terms = plan.terms(releases)
    if not terms:
        return one, two
    quarter = 1.0 - error / 4.0
    return one, two, verdict.curve(scores, included, terms, delta=plan.delta, confidence=quarter)


def _auditor(repeat: int) -> np.random.Generator:
    """Coins and places of one repetition. No part of a mechanism reads this stream."""
    return np.random.default_rng([_STREAM, repeat])


def _pooled(found: list[dict[str, FloatArray]]) -> dict[str, FloatArray]:
    return {name: np.concatenate([scores[name] for scores in found]) for name in found[0]}


def _check(releases: int, canaries: int, repeats: int, confidence: float) -> None:
    if releases < 1:
        raise PrivacyError("There is nothing to audit: the run has released nothing.")
    if canaries < 20 or repeats < 1:
        raise PrivacyError(
            f"An audit with {canaries} canaries and {repeats} repetitions can show nothing: take 20 canaries "
            "or more (thousands show most), and one repetition or more."
        )
    if not 0.5 <= confidence < 1.0:
        raise PrivacyError(f"confidence must lie in [0.5, 1), not {confidence:g}; 0.95 is usual.")


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
