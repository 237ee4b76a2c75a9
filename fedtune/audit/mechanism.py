"""Runs a plan's own sampler, clipping, noise and averaging on canaries alone: no model, no private data.

What makes a run private is a handful of methods of its `PrivacyPlan` (and, by trust model, the integers of
`DiscreteMechanism` or the trusted server's `ClippedUpdates`). They are run here as they are, for as many
steps as the run took, on synthetic gradients: every unit is a canary. Since the accountant's bound is for
the worst case, and this is close to it, the audit can come close to the claim, and takes seconds.

What it cannot see is how the gradients come about: a parameter that is trained without being clipped, a layer
that mixes examples. For that the real model must be trained (`fedtune.audit.model`), at more cost.

By trust model:

- `local`, `none`: `local_steps` steps a release, every one of which the adversary sees.
- `distributed`: one step a release, over the union, through rounding and integers. The sum holds the noise of
  as few nodes as the plan allows to count on, the worst case that is promised.
- `central`: every canary is a client and takes part in every round, as the plan assumes. Under dp_ftrl it
  takes part as often and as closely as the plan allows (rounds 1, 1 + b, 1 + 2b, ...), and the adversary, who
  sees all rounds, multiplies them by the strategy matrix: the noise is white then, the canary in more rows.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

from fedtune.audit.canaries import CANARY_NORM, GradientCanaries, Scores
from fedtune.federation.server.rounds import ClippedUpdates
from fedtune.privacy.mechanisms.discrete import DiscreteMechanism
from fedtune.privacy.mechanisms.matrix import BandedRoot, CorrelatedNoise
from fedtune.privacy.mechanisms.noise import Entropy
from fedtune.privacy.plan import PrivacyPlan

__all__ = ["canary_sum", "one_shot_cosines", "released_sum", "watch"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def watch(
    plan: PrivacyPlan, releases: int, canaries: GradientCanaries, *, repetition: int = 0
) -> dict[str, FloatArray]:
    """Makes `releases` releases of `plan` with `canaries` in them; the scores by attack, each float64 [m].

    `repetition` keeps one repetition's randomness from another's where it is reproducible.
    """
    scores = Scores(canaries, plan.sample_rate, plan.steps(releases))
    if plan.root() is not None:
        _watch_correlated(plan, releases, canaries, scores, repetition)
        return scores.result()
    for round in range(1, releases + 1):
        entropy = plan.entropy("audit", round, repetition)
        if plan.mechanism.round == "clipped":
            released, following = _central(plan, canaries, entropy)
            scores.observe(released, plan)
            plan = following
            continue
        for _ in range(plan.local_steps):
            drawn = canaries.members[plan.sample(len(canaries.members), entropy)]
            total = canary_sum(plan, canaries, drawn)
            scores.observe(plan.average(released_sum(plan, total, entropy)), plan)
    return scores.result()


def canary_sum(plan: PrivacyPlan, canaries: GradientCanaries, drawn: IntArray) -> FloatArray:
    """Sum of the clipped gradients of the canaries `drawn` [k] (their numbers), float64 [P]."""
    norms = np.full(len(drawn), canaries.norm(plan))
    total = np.zeros(canaries.size)
    # Coordinates are distinct, so that nothing is added twice.
    total[canaries.coordinates[drawn]] = plan.clip_factors(norms) * norms
    return total


def released_sum(plan: PrivacyPlan, total: FloatArray, entropy: Entropy) -> FloatArray:
    """The noised sum that an adversary sees of a clipped one, float64 [P]; not for trust central.

    For `distributed`: one node holds `total`, and as many others as can be counted on add noise alone.
    """
    if plan.mechanism.round != "secure_sum":
        return total + plan.noise(total.size, entropy)
    mechanism = DiscreteMechanism.for_plan(plan, total.size)
    integers = mechanism.share(total, entropy)  # uint32: sums wrap around, as they do behind the masks
    for _ in range(mechanism.shares - 1):
        integers = integers + mechanism.share(np.zeros(total.size), entropy)
    return mechanism.decode(integers)


def _central(
    plan: PrivacyPlan, canaries: GradientCanaries, entropy: Entropy
) -> tuple[FloatArray, PrivacyPlan]:
    return _clients(plan, canaries).release(entropy)


def _clients(plan: PrivacyPlan, canaries: GradientCanaries) -> ClippedUpdates:
    """The server's sum, with the update of every canary that exists in it."""
    server = ClippedUpdates(plan, canaries.size)
    update = np.zeros(canaries.size)
    for canary in canaries.members:
        update[canaries.coordinates[canary]] = canaries.norm(plan)
        server.add(update)
        update[canaries.coordinates[canary]] = 0.0
    return server


def _taking_part(root: BandedRoot, releases: int) -> set[int]:
    """The rounds (from 1) of a client that takes part `releases` times, as closely as it may."""
    return set(range(1, root.num_rounds + 1, root.min_separation)[:releases])


def _watch_correlated(
    plan: PrivacyPlan, releases: int, canaries: GradientCanaries, scores: Scores, repetition: int
) -> None:
    """All rounds of a dp_ftrl run, shown to `scores` after multiplication by C."""
    root = plan.root()
    assert root is not None
    coefficients, taking_part = root.coefficients(), _taking_part(root, releases)
    correlated = CorrelatedNoise(root, canaries.size)
    past: deque[tuple[FloatArray, float]] = deque(maxlen=len(coefficients))  # newest first: released, in it
    for round in range(1, root.num_rounds + 1):
        present = round in taking_part
        server = _clients(plan, canaries) if present else ClippedUpdates(plan, canaries.size)
        released, _ = server.release(plan.entropy("audit", round, repetition), correlated, round)
        past.appendleft((released, float(present)))
        row, signal = np.zeros(canaries.size), 0.0
        for coefficient, (average, there) in zip(coefficients, past, strict=False):
            row += coefficient * average
            signal += coefficient * there
        if signal:
            scores.observe(row, plan, signal)


def one_shot_cosines(
    plan: PrivacyPlan,
    releases: int,
    clients: int,
    dimension: int,
    rng: np.random.Generator,
    *,
    repetition: int = 0,
) -> FloatArray:
    """Cosines [k] of `clients` canary clients' random unit directions with all that was released, added up.

    Andrew et al. 2024, algorithm 1: each canary sends the same random direction in every round (dp_ftrl: in
    every round that it may), scaled to
    `CANARY_NORM` times the clipping norm, and the sum of the aggregates is what the adversary has (the
    final model under FedAvg). For trust `central`. They are all in: the cosine of a direction that is not
    is known without trying. `clients` should be hundreds, so that the fitted spread is close, and `dimension`
    many times more, so that they do not hide one another: the estimate is too low where they do.
    """
    directions = rng.standard_normal((clients, dimension), dtype=np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    final = np.zeros(dimension)
    root = plan.root()
    correlated = None if root is None else CorrelatedNoise(root, dimension)
    rounds = releases if root is None else root.num_rounds
    taking_part = set(range(1, rounds + 1)) if root is None else _taking_part(root, releases)
    for round in range(1, rounds + 1):
        server = ClippedUpdates(plan, dimension)
        for direction in directions if round in taking_part else ():
            server.add(CANARY_NORM * plan.max_grad_norm * direction)
        aggregate, plan = server.release(plan.entropy("audit one-shot", round, repetition), correlated, round)
        final += aggregate
    length = float(np.linalg.norm(final))
    return np.asarray(directions @ final / max(length, 1e-300), dtype=np.float64)
