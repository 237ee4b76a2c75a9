"""Gradient canaries: units whose only purpose is to be noticed, and what an adversary makes of the releases.

A canary is one unit whose gradient has a single nonzero coordinate, its own, and a norm ten times the
clipping norm, so that the clipping has something to do. Whether it exists is decided by a fair coin; if it
does, it is drawn, clipped and summed like any unit, in every step of the run. This is the strongest adversary
of DP-SGD: it sees every noised gradient, knows where to look, and no other unit is in its way (Nasr et al.
2021; the Dirac canaries of Steinke, Nasr and Jagielski 2023).

`Scores` watches the released vectors and gives each canary scores, each the log likelihood ratio of
"it is in" against "it is out", by several ideas of how batches are made:

- `poisson`: it is in each batch with probability q, anew each time;
- `fixed`: it is in every batch, or in none: what a batch does that is always the same;
- `periodic`: batches repeat with period 1/q and it is in one of them, nobody knows which: what a cyclic or
  fixed order of the data does. Against a Poisson sampler the last two are merely weaker attacks.

The noise is measured, not believed: half of the coordinates, the controls, hold no canary and therefore
show noise alone. They are taken in small blocks, so that parameters without noise are noticed, and at each
step, so that a step without noise is. Scores are functions of the output alone; what they prove is for
`fedtune.audit.verdict`.

`watch` runs a plan's own sampler, clipping, noise and averaging on canaries alone: no model, no private data.
What makes a run private is a handful of methods of its `PrivacyPlan` (and the integers of `DiscreteMechanism`
or the trusted server's `ClippedUpdates`). They are run as they are, for as many steps as the run took; every
unit is a canary, so that the audit can come close to the claim, in seconds. What it cannot see is how the
gradients come about: a parameter that is trained without being clipped, a layer that mixes examples
(`fedtune.audit.model`). By how the mechanism's sum is formed:

- `plain`: every noised step of a release, each of which the adversary sees.
- `secure_sum`: one step a release, over the union, through rounding and integers, with the noise of as few
  nodes as the plan allows to count on.
- `clipped`: every canary is a client and takes part in every round, as the plan assumes. Under dp_ftrl it
  takes part as often and as closely as the plan allows, and the adversary, who sees all rounds, multiplies
  them by the strategy matrix: the noise is white then, the canary in more rows.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedtune.federation.server.rounds import ClippedUpdates
from fedtune.privacy.mechanisms.discrete import DiscreteMechanism
from fedtune.privacy.mechanisms.matrix import BandedRoot, CorrelatedNoise
from fedtune.privacy.mechanisms.noise import Entropy
from fedtune.privacy.plan import PrivacyPlan

__all__ = ["GradientCanaries", "Scores", "canary_sum", "one_shot_cosines", "released_sum", "watch"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

CANARY_NORM = 10.0  # of a canary's gradient, over the clipping norm
_WINDOW = 64  # controls that one local measurement of the noise is made of
_MAX_PERIODS = 200  # longer cycles are not tried: each costs a number for each canary
_TINY = 1e-9  # of the clipping norm: what counts as no noise


@dataclass(frozen=True, eq=False)
class GradientCanaries:
    """Where the canaries are, and which of them exist.

    Fields: `size` P, numbers in a release; `coordinates` int64 [m], each canary's own; `included` bool [m],
    the coins; `controls` int64 [c], coordinates without a canary; `windows` int64 [m] and `control_windows`
    int64 [c], which block each lies in, numbered from 0.
    """

    size: int
    coordinates: IntArray
    included: BoolArray
    controls: IntArray
    windows: IntArray
    control_windows: IntArray

    @classmethod
    def spread(
        cls, canaries: int, size: int, rng: np.random.Generator, blocks: Sequence[int] = ()
    ) -> GradientCanaries:
        """`canaries` of them over `size` coordinates, as evenly over the blocks as their sizes allow.

        Args: `blocks`, sizes that add up to `size` (parameters of a model, in order; neighbours are joined
        until a block holds 128 numbers); empty: every 128 coordinates are one. In each, canaries and
        controls are a random sample. `rng` decides places and coins, none of which the mechanism may know.
        Raises `ValueError` if there is no room: two coordinates are needed for each canary.
        """
        if not 1 <= canaries <= size // 2:
            raise ValueError(f"{size} coordinates have room for {size // 2} canaries, not {canaries}")
        edges = _edges(size, blocks)
        quota = _quota(canaries, np.diff(edges) // 2)
        places, controls, windows, control_windows = [], [], [], []
        for block, count in enumerate(quota):
            width = int(edges[block + 1] - edges[block])
            free = max(count, min(width - count, _WINDOW))
            chosen = edges[block] + rng.permutation(width)[: count + free]
            places.append(chosen[:count])
            controls.append(chosen[count:])
            windows.append(np.full(count, block))
            control_windows.append(np.full(len(chosen) - count, block))
        return cls(
            size=size,
            coordinates=np.concatenate(places).astype(np.int64),
            included=rng.random(canaries) < 0.5,
            controls=np.concatenate(controls).astype(np.int64),
            windows=np.concatenate(windows).astype(np.int64),
            control_windows=np.concatenate(control_windows).astype(np.int64),
        )

    @property
    def count(self) -> int:
        """m."""
        return len(self.coordinates)

    @property
    def members(self) -> IntArray:
        """Canaries that exist, int64 [k]: the units that a sampler draws from."""
        return np.flatnonzero(self.included).astype(np.int64)

    def norm(self, plan: PrivacyPlan) -> float:
        """L2 norm of a canary's gradient before clipping."""
        return CANARY_NORM * plan.max_grad_norm if math.isfinite(plan.max_grad_norm) else 1.0

    def unit(self, plan: PrivacyPlan) -> float:
        """What a right mechanism lets through of one: the clipping norm (without privacy: all of it)."""
        return plan.clipping.whole


class Scores:
    """Watches releases, and scores how much more likely each canary is in than out."""

    def __init__(self, canaries: GradientCanaries, rate: float, steps: int) -> None:
        """`rate`: probability that a canary that is in is drawn at a step; `steps`: that there will be."""
        self._canaries, self._rate = canaries, rate
        period = round(1.0 / rate)
        self._period = period if 2 <= period <= min(_MAX_PERIODS, steps) else 0
        self._poisson = np.zeros(canaries.count)
        self._fixed = np.zeros(canaries.count)
        self._phases = np.zeros((self._period, canaries.count))
        self._step = 0

    def observe(self, released: FloatArray, plan: PrivacyPlan, signal: float | FloatArray = 1.0) -> None:
        """Takes one released average, float64 [P], made by `plan`.

        `signal`: what a canary that is in and drawn shows there, over the clipping norm; of all, or [m].
        """
        canaries = self._canaries
        sums = np.asarray(released, dtype=np.float64) * (plan.expected_batch_size() / canaries.unit(plan))
        noise = _noise(sums[canaries.controls], canaries.control_windows)  # [blocks]
        variance = np.square(np.maximum(noise, _TINY))[canaries.windows]
        # log N(x; signal, s^2) - log N(x; 0, s^2)
        ratio = signal * (sums[canaries.coordinates] - 0.5 * signal) / variance
        self._fixed += ratio
        if self._rate >= 1.0:
            self._poisson += ratio
        else:
            self._poisson += np.logaddexp(math.log1p(-self._rate), math.log(self._rate) + ratio)
        if self._period:
            self._phases[self._step % self._period] += ratio
        self._step += 1

    def result(self) -> dict[str, FloatArray]:
        """The scores by attack, each float64 [m]: larger means more likely in."""
        found = {"poisson": self._poisson.copy()}
        if self._rate < 1.0:
            found["fixed"] = self._fixed.copy()
        if self._period:
            found["periodic"] = np.logaddexp.reduce(self._phases, axis=0)
        return found


def _edges(size: int, blocks: Sequence[int]) -> IntArray:
    """Boundaries of the blocks, int64 [blocks + 1], from 0 to `size`."""
    if blocks and sum(blocks) != size:
        raise ValueError(f"blocks add up to {sum(blocks)}, not {size}")
    edges = [0]
    for end in np.cumsum(blocks) if blocks else range(2 * _WINDOW, size + 1, 2 * _WINDOW):
        if end - edges[-1] >= 2 * _WINDOW:
            edges.append(int(end))
    if len(edges) == 1:
        edges.append(size)
    edges[-1] = size  # a small rest joins its neighbour
    return np.asarray(edges, dtype=np.int64)


def _quota(total: int, room: IntArray) -> list[int]:
    """`total` shared out as evenly as `room` [b] allows."""
    quota = np.zeros(len(room), dtype=np.int64)
    while (left := total - int(quota.sum())) > 0:
        open_ = np.flatnonzero(quota < room)
        share = max(1, left // len(open_))
        for block in open_[: left if share == 1 else None]:
            quota[block] += min(share, room[block] - quota[block], total - int(quota.sum()))
    return [int(count) for count in quota]


def _noise(controls: FloatArray, windows: IntArray) -> FloatArray:
    """Standard deviation of the noise in each block, [blocks], in units of the clipping norm.

    The median over all blocks, except where a block is so far from it that chance does not explain it:
    a local measurement is worse than a common one unless there is something local to measure.
    """
    counts = np.bincount(windows)
    local = np.sqrt(np.bincount(windows, weights=np.square(controls)) / counts)
    common = float(np.median(local))
    # A standard deviation from n numbers is off by a part of 1 / sqrt(2 n); five of these are not chance.
    off = np.abs(local - common) > 5.0 * common / np.sqrt(2.0 * counts)
    return np.where(off, local, common)


# --- a plan's own mechanism --------------------------------------------------------------------------


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
            released, following = _clients(plan, canaries).release(entropy)
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
