"""Trains the adapter on one node's shard for one round.

    for each step:   draw units (Poisson) -> sum of clipped gradients -> noise -> divide by a public
                     constant -> optimizer step

Everything that decides privacy comes from the PrivacyPlan: who is drawn, how much is clipped, how
much noise, what is divided by. The optimizer sees the noised average and nothing else, so what it does
with it (momentum, Adam, weight decay, FedProx' pull to the round's start) is post-processing.

Where the plan's unit is the client, or its trust is distributed, the noise is added elsewhere;
`train_locally` then leaves it out, and `fedtune.federation` must add it.

The steps of one node and those of several that train heads (`train_together`) are the same lines: arrays have
a row a node.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim.sgd import sgd

from fedtune.config.schema import DataConfig, TrainConfig
from fedtune.data.corpus import Shard
from fedtune.errors import ConfigError, PreflightError, UpdateRejected
from fedtune.models.classifier import AdaptedModel
from fedtune.models.frozen_outputs import Features, Progress
from fedtune.privacy.mechanisms.noise import Entropy
from fedtune.privacy.plan import PrivacyPlan
from fedtune.training.dp_step import Drawn, clipped_sum, head_sums
from fedtune.training.example_gradients import hooks_for
from fedtune.training.made_up import made_up
from fedtune.training.preflight import preflight

__all__ = [
    "LocalResult",
    "Sgd",
    "ShardView",
    "flops_of_record",
    "make_optimizer",
    "train_locally",
    "train_together",
]


@dataclass(frozen=True)
class LocalResult:
    """What training on a node gives.

    `update` float32 [P] may leave the node as the plan allows. `seconds` and `flops` are what the steps
    took; they depend on how many units were drawn, so they are the node's own and must not travel raw.
    """

    update: NDArray[np.float32]
    steps: int
    seconds: float
    flops: int


class ShardView:
    """A shard with its features, and its records grouped by unit."""

    def __init__(
        self,
        model: AdaptedModel,
        shard: Shard,
        unit: str,
        train: TrainConfig,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.train = model, train
        tokens, precision = train.micro_batch_tokens, train.precision
        self.features = Features.of(model, shard.data, tokens, progress, precision=precision)
        self.by_person = unit == "person"
        data = shard.data
        self.num_units = data.num_units if self.by_person else data.num_records
        if self.by_person:
            order = np.argsort(data.unit_index, kind="stable")
            self._members = np.split(order, np.flatnonzero(np.diff(data.unit_index[order])) + 1)

    def records_of(
        self, drawn: NDArray[np.int64], limit: int, entropy: Entropy
    ) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
        """Rows of the shard that belong to the drawn units, and the unit of each (None for records).

        Of a person with more than `limit` records, `limit` are drawn anew each time. Which ones does not
        matter to privacy: the person's summed gradient is clipped whatever they are.
        """
        if not self.by_person:
            return drawn, None
        rows: list[NDArray[np.int64]] = []
        for person in drawn:
            members = self._members[person]
            rows.append(
                members if len(members) <= limit else members[entropy.permutation(len(members))[:limit]]
            )
        if not rows:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        return np.concatenate(rows), np.repeat(drawn, [len(r) for r in rows])

    def clipped_sum(
        self, drawn: NDArray[np.int64], plan: PrivacyPlan, entropy: Entropy, round: int
    ) -> NDArray[np.float64]:
        """Sum over the drawn units (numbers below `num_units`) of their clipped gradients, or of what else
        `round` (from 1) asks of them, float64 [P]."""
        records, units = self.records_of(drawn, plan.records_per_unit, entropy)
        return clipped_sum(
            self.model,
            self.features,
            records,
            units,
            plan,
            micro_batch_tokens=self.train.micro_batch_tokens,
            precision=self.train.precision,
            label_smoothing=self.train.label_smoothing or 0.0,
            centre=plan.centres(round),
        )


class Sgd:
    """`torch.optim.SGD` of one parameter, to the last bit, without the hooks that it calls around a step.

    They take several times as long as the step of a small head.
    """

    def __init__(self, theta: torch.nn.Parameter, rate: float, momentum: float, decay: float) -> None:
        self._theta, self._rate, self._momentum, self._decay = theta, rate, momentum, decay
        self._buffers: list[torch.Tensor | None] = [None]

    @torch.no_grad()
    def step(self) -> None:
        """Takes a step along the parameter's gradient."""
        assert self._theta.grad is not None
        sgd(
            [self._theta], [self._theta.grad], self._buffers, foreach=False, weight_decay=self._decay,
            momentum=self._momentum, lr=self._rate, dampening=0.0, nesterov=False, maximize=False,
        )  # fmt: skip


def make_optimizer(theta: torch.nn.Parameter, train: TrainConfig) -> torch.optim.Optimizer | Sgd:
    """The optimizer over the whole packed adapter.

    Raises:
        ConfigError: there is no such optimizer, or no rate.
    """
    if train.learning_rate is None:
        raise ConfigError("train.learning_rate is not set, and the recipe that sets it was not asked.")
    rate, decay = train.learning_rate, train.weight_decay
    if train.optimizer == "sgd":
        return Sgd(theta, rate, train.momentum, decay)
    if train.optimizer == "adam":
        return torch.optim.Adam([theta], lr=rate)
    if train.optimizer == "adamw":
        return torch.optim.AdamW([theta], lr=rate, weight_decay=decay)
    if train.optimizer == "adam_mini":
        raise ConfigError(
            "train.optimizer=adam_mini is the server's, with federation.strategy=fedsgd. Where nodes train "
            "by themselves use adam, adamw or sgd."
        )
    raise ConfigError(f"train.optimizer={train.optimizer!r} is not known; it can be sgd, adam or adamw.")


def train_locally(
    model: AdaptedModel,
    shard: Shard,
    plan: PrivacyPlan,
    start: NDArray[np.float32],
    train: TrainConfig,
    *,
    round: int,
    repetition: int = 0,
    gradients: bool = False,
    part: NDArray[np.bool_] | None = None,
    progress: Progress | None = None,
    view: ShardView | None = None,
    observe: Callable[[NDArray[np.float64]], None] | None = None,
) -> LocalResult:
    """Runs `plan.local_steps` steps from the adapter `start` [P] and returns the change.

    Args:
        model: the resident model; its adapter is replaced.
        shard: what is trained on.
        plan: who is drawn, how much is clipped, how much noise, what is divided by.
        start: the adapter to start from, float32 [P].
        train: learning rate, optimizer, precision.
        round: of the federation, from 1.
        repetition: tells one run of the plan from another; for an audit.
        gradients: the change is minus the gradient of the one step, which the server takes (FedSGD).
        part: where the head alone is trained: which numbers of the adapter the `model`, a bare head, has,
            bool [P]. The others have noise like these, which is dropped, and do not change. None: all.
        progress: called with (texts done, texts to do) while frozen layers are computed.
        view: the shard's units, with canaries beside them; for an audit.
        observe: is shown what each step releases, float64 [P] (the noised average, which the accountant
            takes as published anyway); for an audit.

    Guarantee: for `trust=local` the update is a function of `plan.local_steps` Gaussian releases with
    Poisson sampling, which is what `plan.terms(1)` accounts for. The caller must have reserved that in
    the node's ledger before.

    Raises:
        PreflightError: model, plan, sampler and accountant disagree; nothing was trained.
        UpdateRejected: training diverged.
    """
    views = None if view is None else [view]
    (result,) = _train(
        model, [shard], plan, start[None], train, round, repetition, gradients, part, progress, views, observe
    )
    if isinstance(result, UpdateRejected):
        raise result
    return result


def train_together(
    model: AdaptedModel,
    shards: Sequence[Shard],
    plan: PrivacyPlan,
    starts: NDArray[np.float32],
    train: TrainConfig,
    *,
    round: int,
    gradients: bool = False,
    part: NDArray[np.bool_] | None = None,
) -> list[LocalResult | UpdateRejected]:
    """`train_locally` of k nodes that train heads on kept outputs, each from its own of `starts` [k, P].

    All take a step at the same time, so that what a step costs beside its arithmetic is paid once. What a
    node gets, and its guarantee, are those of `train_locally`, whoever the others are; and so is its error.

    Raises:
        PreflightError: as `train_locally`, or it is not heads that this round trains; nobody was trained.
    """
    if plan.centres(round) or model.first_layer < model.num_layers:
        raise PreflightError("Nodes train together in rounds that train heads on kept outputs alone.")
    return _train(model, shards, plan, starts, train, round, 0, gradients, part)


def _train(
    model: AdaptedModel,
    shards: Sequence[Shard],
    plan: PrivacyPlan,
    starts: NDArray[np.float32],
    train: TrainConfig,
    round: int,
    repetition: int,
    gradients: bool,
    part: NDArray[np.bool_] | None,
    progress: Progress | None = None,
    views: Sequence[ShardView] | None = None,
    observe: Callable[[NDArray[np.float64]], None] | None = None,
) -> list[LocalResult | UpdateRejected]:
    """The steps of k nodes: of one, or of several as `train_together`."""
    mine: Any = slice(None) if part is None else part
    head = model.head if part is None else part
    alone, size = len(shards) == 1, starts.shape[1]
    model.set_vector(starts[0, mine])
    if views is None:
        views = [ShardView(model, shard, plan.unit, train, progress) for shard in shards]
    entropies = [plan.entropy(shard.node, round, repetition) for shard in shards]
    # That of one node shares its storage with the model.
    adapters = model.theta[None] if alone else torch.from_numpy(starts[:, mine].copy()).to(model.device)
    theta = torch.nn.Parameter(adapters, requires_grad=True)
    # Under FedSGD the step is the server's: a rate of 1 from `start` would lose the gradient's low digits.
    optimizer = None if gradients else make_optimizer(theta, train)
    updates: NDArray[np.float32] = np.zeros_like(starts)
    anchor = adapters.clone()
    began, flops = time.perf_counter(), model.flops.total
    with hooks_for(model, views[0].features):
        # Nothing of it is about their data, so it holds for all of them.
        preflight(model, views[0].features, plan, theta if alone else model.theta, train)
        for _ in range(plan.local_steps):
            totals = np.zeros((len(shards), size))
            totals[:, mine] = _sums(model, adapters, views, plan, entropies, train, round)
            averages = plan.average(totals + _noises(plan, size, entropies))
            if observe is not None:
                observe(averages[0])
            averages = plan.clipping.undone(averages, head, alone=part is not None)[:, mine]
            if optimizer is None:
                updates[:, mine] = -averages.astype(np.float32)
                continue
            theta.grad = torch.from_numpy(averages.astype(np.float32)).to(model.device)
            if train.proximal_mu:
                theta.grad += train.proximal_mu * (theta.detach() - anchor)
            optimizer.step()
    if optimizer is not None:
        updates[:, mine] = adapters.cpu().numpy() - starts[:, mine]
    seconds, flops = (time.perf_counter() - began) / len(shards), model.flops.total - flops
    finite = [bool(np.isfinite(update).all()) for update in updates]
    return [
        LocalResult(update, plan.local_steps, seconds, flops // len(shards))
        if is_finite
        else UpdateRejected(
            f"Training at node {shard.node!r} diverged in round {round}: the adapter is no longer finite. "
            f"Lower train.learning_rate, which is {train.learning_rate}."
        )
        for shard, update, is_finite in zip(shards, updates, finite, strict=True)
    ]


def _sums(
    model: AdaptedModel,
    adapters: torch.Tensor,
    views: Sequence[ShardView],
    plan: PrivacyPlan,
    entropies: Sequence[Entropy],
    train: TrainConfig,
    round: int,
) -> NDArray[np.float64]:
    """Each node's clipped sum over units that it draws anew, at its own of `adapters` [k, n]; as these."""
    drawn = [plan.sample(view.num_units, entropy) for view, entropy in zip(views, entropies, strict=True)]
    if len(views) == 1:
        return views[0].clipped_sum(drawn[0], plan, entropies[0], round)[None]
    records = [
        Drawn(view.features, *view.records_of(units, plan.records_per_unit, entropy))
        for view, units, entropy in zip(views, drawn, entropies, strict=True)
    ]
    return head_sums(model, adapters.cpu().numpy(), records, plan, train.label_smoothing or 0.0)


def _noises(plan: PrivacyPlan, size: int, entropies: Sequence[Entropy]) -> NDArray[np.float64]:
    """The plan's noise for the sum of each node, from its own of `entropies` [k], float64 [k, size].

    System entropy has no state: one draw of all of it is k draws.
    """
    if any(entropy.is_reproducible for entropy in entropies):
        return np.stack([plan.noise(size, entropy) for entropy in entropies])
    return plan.noise(len(entropies) * size, entropies[0]).reshape(len(entropies), size)


def flops_of_record(model: AdaptedModel, plan: PrivacyPlan, data: DataConfig, train: TrainConfig) -> float:
    """Floating point operations of one step for one made-up record, counted by torch.

    What a node really computed depends on who was drawn and how long the texts are, so that number is the
    owner's. Here every record is as long as texts are cut to (`data.max_length`, `data.max_windows`), a
    public number.
    A full micro-batch of such records is worked on once; nothing of it is kept. What is computed once a text
    and cached (layers below the lowest adapted one) is not in it, as it is not in what is measured.
    """
    length = data.longest * data.windows
    count = max(1, min(64, train.micro_batch_tokens // length))
    features = made_up(model, [length] * count, data.longest)
    before = model.flops.total
    with hooks_for(model, features):
        tokens, precision = train.micro_batch_tokens, train.precision
        clipped_sum(
            model, features, np.arange(count), None, plan, micro_batch_tokens=tokens, precision=precision
        )
    return (model.flops.total - before) / count
