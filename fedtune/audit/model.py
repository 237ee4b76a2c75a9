"""Trains the real model with canaries, on public records: what `mechanism` cannot see, at more cost.

The model, its preflight, per-example gradients, clipping, sampler, noise, optimizer and rounds are those of a
run; one node trains, as often as the run's plan says. Beside its units stand two kinds of canaries:

- gradient canaries (`fedtune.audit.canaries`), on coordinates of the real adapter, as many in each
  parameter as there is room for: a strong adversary who sees every step;
- input canaries: records with a wrong label, each in by a fair coin. The adversary sees the final
  model only, and scores how far training lowered the loss of the wrong label: a weak one, and a real one.

Private data. Training with canaries is a release like any other, and would have to be charged to the
node's ledger. So no private record is trained on: the node's shard is a part of the run's *test split*, which
its owner declared public (evaluation is not charged for the same reason). Nothing is lost for the audit: what
is audited is the code, and the promise is for any data beside a canary. So the part is small: other records'
gradients only hide the canaries from an adversary who does not know them. What it does not see: whether a
real node's ledger or data path was changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fedtune.audit.canaries import GradientCanaries, Scores, released_sum
from fedtune.config.choices import resolved
from fedtune.config.schema import Config, TrainConfig
from fedtune.data.corpus import Shard, TokenizedCorpus
from fedtune.errors import DataError
from fedtune.federation.resources import run_resources
from fedtune.federation.server.centring import next_adapter
from fedtune.federation.server.optimizers import server_optimizer
from fedtune.federation.server.rounds import ClippedUpdates
from fedtune.models.classifier import AdaptedModel
from fedtune.privacy.mechanisms.noise import Entropy
from fedtune.privacy.plan import PrivacyPlan
from fedtune.training.dp_step import clip_and_sum
from fedtune.training.evaluation import predict_probabilities
from fedtune.training.example_gradients import hooks_for
from fedtune.training.local import ShardView, train_locally
from fedtune.training.preflight import preflight

__all__ = ["CanaryView", "InputCanaries", "ModelScores", "watch"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

_BACKGROUND, _INPUT_CANARIES = 100, 200  # records that are trained on beside, and that carry a wrong label
_ROWS = 16  # canaries whose dense gradients are in memory at once


class CanaryView(ShardView):
    """A shard's units with gradient canaries beside them: drawn, clipped and summed by the same code."""

    def __init__(
        self, model: AdaptedModel, shard: Shard, unit: str, train: TrainConfig, canaries: GradientCanaries
    ) -> None:
        super().__init__(model, shard, unit, train)
        self.num_real = self.num_units
        self.num_units = self.num_real + len(canaries.members)
        self._canaries = canaries

    def clipped_sum(self, drawn: IntArray, plan: PrivacyPlan, entropy: Entropy, round: int) -> FloatArray:
        """As `ShardView.clipped_sum`; units from `num_real` on are the canaries that exist."""
        total = super().clipped_sum(drawn[drawn < self.num_real], plan, entropy, round)
        canaries = self._canaries
        mine = canaries.members[drawn[drawn >= self.num_real] - self.num_real]
        for start in range(0, len(mine), _ROWS):
            places = canaries.coordinates[mine[start : start + _ROWS]]
            rows = torch.zeros(len(places), canaries.size)
            rows[torch.arange(len(places)), torch.from_numpy(places)] = canaries.norm(plan)
            total += torch.cat(clip_and_sum(self.model.split(rows), plan, self.model.heads)).double().numpy()
        return total


@dataclass(frozen=True, eq=False)
class InputCanaries:
    """Public records with a wrong label, and the background that they are trained with.

    Fields: `canaries`, all of them, in or out; `included` bool [m], the coins; `shard`, what is trained on:
    background records and the canaries that are in.
    """

    canaries: TokenizedCorpus
    included: BoolArray
    shard: Shard

    @classmethod
    def draw(
        cls,
        public: TokenizedCorpus,
        count: int,
        others: int,
        declared_size: int,
        rng: np.random.Generator,
    ) -> InputCanaries:
        """`count` canaries (at most a half of all) and at most `others` other records of `public`.

        Raises `DataError` if there are fewer than four records.
        """
        if public.num_records < 4 or len(public.label_names) < 2:
            raise DataError(
                f"An audit of the model trains on the public test split, and this one has "
                f"{public.num_records} records. Audit the mechanism instead (leave --model out)."
            )
        order = rng.permutation(public.num_records).astype(np.int64)
        count = min(count, public.num_records // 2)
        canaries, background = order[:count], order[count : count + others]
        included = rng.random(count) < 0.5
        wrong = public.labels.copy()
        shift = rng.integers(1, len(public.label_names), size=count)
        wrong[canaries] = (wrong[canaries] + shift) % len(public.label_names)
        units = None
        if public.units is not None:
            # A canary is a person of its own, or it would share a clip with its author's other records.
            units = public.units.astype(np.str_, copy=True).astype("U64")
            units[canaries] = [f"canary {i}" for i in range(count)]
        marked = dataclasses.replace(public, labels=wrong, units=units)
        rows = np.concatenate([background, canaries[included]])
        data = marked.subset(rows)
        shard = Shard("audit", data, declared_size, data.fingerprint, "public test split", rows)
        return cls(marked.subset(canaries), included, shard)


@dataclass(frozen=True, eq=False)
class ModelScores:
    """What one training gave: scores by attack and coins, of gradient and of input canaries."""

    gradient: dict[str, FloatArray]
    gradient_included: BoolArray
    inputs: dict[str, FloatArray]
    inputs_included: BoolArray


def watch(
    config: Config,
    plan: PrivacyPlan,
    releases: int,
    canaries: int,
    rng: np.random.Generator,
    *,
    repetition: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> ModelScores:
    """Trains one node for `releases` rounds of `plan`, with up to `canaries` canaries of each kind.

    Raises `DataError`, `ModelError`, `PreflightError` or `UpdateRejected` as a run does.
    """
    config = resolved(config)
    if config.federation.evaluation != "public":
        raise DataError(
            "An audit of the model trains on test data that is declared public, and this run has none: it "
            "would train on private records, uncharged. Audit the mechanism instead (leave --model out)."
        )
    resources = run_resources(config)
    public = InputCanaries.draw(
        resources.prepared.test, min(canaries, _INPUT_CANARIES), _BACKGROUND, plan.declared_size, rng
    )
    # However many steps a node takes by itself: under `distributed` it takes the plan's one.
    steps = (plan.mechanism.client_training() or plan.mechanism).steps_per_release()
    train = dataclasses.replace(config.train, local_steps=steps)
    with resources.using_model() as model:
        blocks = [int(np.prod(shape)) for _, shape in model.layout()]
        count = min(canaries, model.num_parameters // 2)
        gradient = GradientCanaries.spread(count, model.num_parameters, rng, blocks)
        scores = Scores(gradient, plan.sample_rate, plan.steps(releases))
        before = _loss(model, model.initial, public.canaries, train)
        training = _Training(config, train, model, public.shard, gradient, scores)
        adapter = model.initial
        for round in range(1, releases + 1):
            adapter, plan = training.round(adapter, plan, round, repetition)
            if progress is not None:
                progress(round, releases)
        after = _loss(model, adapter, public.canaries, train)
    found = before - after
    return ModelScores(scores.result(), gradient.included, {"loss": found}, public.included)


class _Training:
    """The rounds of one node, by trust model, with everything that the adversary sees shown to `scores`."""

    def __init__(
        self,
        config: Config,
        train: TrainConfig,
        model: AdaptedModel,
        shard: Shard,
        canaries: GradientCanaries,
        scores: Scores,
    ) -> None:
        self.train, self.model, self.shard = train, model, shard
        self.canaries, self.scores = canaries, scores
        self.gradients = config.federation.strategy == "fedsgd"
        self.optimizer = server_optimizer(config)

    def round(
        self, adapter: npt.NDArray[np.float32], plan: PrivacyPlan, round: int, repetition: int
    ) -> tuple[npt.NDArray[np.float32], PrivacyPlan]:
        """The next adapter and the next round's plan."""
        if plan.mechanism.round == "clipped":
            return self._central(adapter, plan, round, repetition)
        view = CanaryView(self.model, self.shard, plan.unit, self.train, self.canaries)
        if plan.mechanism.round == "secure_sum":
            gradient = self._distributed(adapter, plan, view, round, repetition)
            return self._next(adapter, -gradient, plan, round), plan
        result = train_locally(
            self.model,
            self.shard,
            plan,
            adapter,
            self.train,
            round=round,
            repetition=repetition,
            gradients=self.gradients,
            view=view,
            observe=lambda released: self.scores.observe(released, plan, self._signal(plan)),
        )
        return self._next(adapter, result.update, plan, round), plan

    def _next(
        self,
        adapter: npt.NDArray[np.float32],
        aggregate: FloatArray | npt.NDArray[np.float32],
        plan: PrivacyPlan,
        round: int,
    ) -> npt.NDArray[np.float32]:
        sizes, centre = {self.shard.node: plan.declared_size}, self.model.centre_size
        return next_adapter(self.optimizer, adapter, aggregate, plan, round, sizes, centre)

    def _distributed(
        self,
        adapter: npt.NDArray[np.float32],
        plan: PrivacyPlan,
        view: CanaryView,
        round: int,
        repetition: int,
    ) -> FloatArray:
        self.model.set_vector(adapter)
        entropy = plan.entropy(self.shard.node, round, repetition)
        theta = torch.nn.Parameter(self.model.theta, requires_grad=True)
        with hooks_for(self.model, view.features):
            preflight(self.model, view.features, plan, theta, self.train)
            total = view.clipped_sum(plan.sample(view.num_units, entropy), plan, entropy, round)
        gradient = plan.average(released_sum(plan, total, entropy))
        self.scores.observe(gradient, plan, self._signal(plan))
        return plan.clipping.undone(gradient, self.model.head)

    def _signal(self, plan: PrivacyPlan) -> FloatArray:
        """What clipping lets through of each canary over the clipping norm, float64 [m].

        A canary is on one coordinate: it shows no more than the norm of the group that this belongs to.
        """
        heads, whole = self.model.heads, self.canaries.unit(plan)
        most = np.zeros(len(heads))
        for group in plan.clipping.groups(heads):
            most[group.members] = min(group.most * group.factor, whole) / whole
        sizes = [int(np.prod(shape)) for _, shape in self.model.layout()]
        return np.asarray(np.repeat(most, sizes)[self.canaries.coordinates])

    def _central(
        self, adapter: npt.NDArray[np.float32], plan: PrivacyPlan, round: int, repetition: int
    ) -> tuple[npt.NDArray[np.float32], PrivacyPlan]:
        """One client trains on the public records; the canaries are clients beside it."""
        inner = plan.training_plan(self.shard.declared_size)
        result = train_locally(
            self.model, self.shard, inner, adapter, self.train, round=round, repetition=repetition
        )
        server = ClippedUpdates(plan, self.canaries.size)
        server.add(result.update)
        update = np.zeros(self.canaries.size)
        for place in self.canaries.coordinates[self.canaries.members]:
            update[place] = self.canaries.norm(plan)
            server.add(update)
            update[place] = 0.0
        aggregate, following = server.release(plan.entropy("audit", round, repetition))
        self.scores.observe(aggregate, plan)
        return self.optimizer.step(adapter, aggregate), following


def _loss(
    model: AdaptedModel, adapter: npt.NDArray[np.float32], data: TokenizedCorpus, train: TrainConfig
) -> FloatArray:
    """Cross-entropy of each record, float64 [n]."""
    model.set_vector(adapter)
    probabilities = predict_probabilities(model, data, train)
    chosen = probabilities[np.arange(data.num_records), data.labels].astype(np.float64)
    return -np.log(np.maximum(chosen, 1e-12))
