"""The sum of clipped gradients over one drawn batch: the only place where private data meets the adapter.

`fedtune.training.example_gradients` gives each example's gradient; everything that touches sensitivity is
here, in one page:

    1. the drawn units' records are cut into micro-batches of like length
    2. each example's gradient, of the summed loss (so no example's gradient depends on b); of a head on
       outputs that are kept, each unit's norm and its part of the sum in closed form (`head_sums`, which
       takes several nodes at once)
    3. gradients of one unit's records are added up, then scaled to an L2 norm of at most
       `plan.max_grad_norm` over all trainable parameters at once (Abadi et al. 2016, Algorithm 1); or head
       and rest each by itself, so that the squares add up to that of this norm (`fedtune.privacy.clipping`)
    4. a unit whose norm is not finite contributes exactly zero
    5. the sum is taken in float64; nothing is divided here

In a round that sets the centre (`PrivacyPlan.centres`) a unit contributes where its texts lie instead of a
gradient, clipped to the same norm (`_centre_sum`); else the centre's part of the sum is zero.

Guarantee: adding or removing one unit changes the result by at most `plan.max_grad_norm` in L2 norm, up to
rounding: of the unit's own scaled gradient and of a micro-batch's sum in float32 (relative errors near 1e-5);
and of the others', which are cut into other micro-batches then, where a product may add up in another order.
Measured on the default model: that moves the sum of 100 others by 1e-6 of the clip, or, in bfloat16 on two
threads, that of 250 by 3e-3, at right angles to the unit's own part, so that all of the change was at most
1.00005 clips. For trust `distributed` there is a margin (`fedtune.privacy.mechanisms.discrete.FLOAT_MARGIN`);
elsewhere arithmetic is taken as exact, as the privacy statement says. An empty batch gives zeros, and is a
step like any other.

Shapes: b rows of a micro-batch, u units in it, P trainable parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedtune.data.batches import LENGTH_STEP, MicroBatch
from fedtune.errors import PreflightError
from fedtune.models.classifier import AdaptedModel
from fedtune.models.frozen_outputs import Features
from fedtune.models.merged_layers import MergedLayers
from fedtune.privacy.plan import PrivacyPlan
from fedtune.training.example_gradients import example_gradients

__all__ = ["Drawn", "clip_and_sum", "clipped_sum", "head_sums"]

_Result = TypeVar("_Result")
_ROWS = 4096  # of a head's batch at once
_PAIRED = 1024  # of them where records of one unit are paired, of whole units
_BLOCK = 1 << 25  # numbers of units' summed gradients in memory at once; bounds it, and changes nothing else
_MOST_AT_ONCE = 1 << 27  # numbers of a micro-batch's gradients; so are these


def clip_and_sum(gradients: Sequence[Tensor], plan: PrivacyPlan, heads: Sequence[bool]) -> list[Tensor]:
    """[u, n] a parameter -> [n] a parameter, each unit scaled by its clip factor over each group of them.

    The one place where a unit's gradient is clipped, be it a record's, a person's or an audit's canary.
    `heads`: which of the parameters are the head's. A unit that is broken in one group is zero in both.
    """
    # In float64, and so on the CPU: not every device has it (MPS).
    by_parameter = torch.stack([torch.linalg.vector_norm(g, dim=1) for g in gradients]).cpu().double()
    squares = by_parameter.square()
    broken = ~np.isfinite(squares.sum(0).numpy())
    if broken.any():
        # 0 x NaN is NaN: the factor alone would let it through.
        keep = torch.from_numpy(~broken).to(gradients[0].device)[:, None]
        gradients = [torch.where(keep, g, 0.0) for g in gradients]
    sums: list[Tensor] = [gradients[0]] * len(gradients)
    for group in plan.clipping.groups(heads):
        norms = squares[group.members].sum(0).sqrt().numpy()
        scaled = group.factor * plan.clip_factors(norms, group.most)
        factors = torch.from_numpy(np.where(broken, 0.0, scaled)).to(gradients[0].dtype)
        factors = factors.to(gradients[0].device)
        for index in group.members:
            sums[index] = factors @ gradients[index]
    return sums


def _of_micro_batches(
    model: AdaptedModel,
    features: Features,
    records: NDArray[np.int64],
    micro_batch_tokens: int,
    precision: str,
    label_smoothing: float,
    layers: MergedLayers | None,
    then: Callable[[NDArray[np.int64], list[Tensor]], _Result],
) -> Iterator[_Result]:
    """Of each micro-batch, in turn: `then` of positions [r] in `records` and of their gradients [r, n] a
    parameter. With `layers`, which are the model's merged ones at the adapter as it is, several threads work
    on as many micro-batches, `then` included.
    """
    labels_of = features.corpus.labels

    def work(batch: MicroBatch) -> _Result:
        rows = records[batch.records]
        arguments = features.inputs(rows, batch.rows, batch.length, model.device)
        target = torch.from_numpy(labels_of[rows]).to(model.device)
        with model.flops.counting(("train", *batch.shape)):
            gradients = example_gradients(model, arguments, target, precision, layers, label_smoothing)
        # Nobody's gradient moves the centre.
        gradients += [torch.zeros(batch.rows, p.numel(), device=model.device) for p in model.centre.values()]
        return then(batch.records, [g[: len(rows)] for g in gradients])

    # Each row has a gradient of its own. Bounded by the model, or memory would grow with how many texts are
    # short, and a server that asks for much at once could see where a node runs out of it.
    most = LENGTH_STEP * max(1, _MOST_AT_ONCE // model.num_parameters)
    batches = features.batches(records, min(micro_batch_tokens, most))
    return model.each("train", work, batches, layers)


def _blocks(
    units: NDArray[np.int64] | None, count: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64] | None]]:
    """Positions of `count` records, block by block, and the unit of each within its block: units stay whole.
    None for units: each record is its own."""
    if units is None:
        for start in range(0, count, _ROWS):
            yield np.arange(start, min(count, start + _ROWS)), None
        return
    _, whose, sizes = np.unique(units, return_inverse=True, return_counts=True)
    order, ends, first = np.argsort(whose, kind="stable"), np.cumsum(sizes), 0
    while first < len(sizes):
        begin = int(ends[first] - sizes[first])
        last = max(first + 1, int(np.searchsorted(ends, begin + _PAIRED, "right")))
        chosen = order[begin : ends[last - 1]]
        yield chosen, whose[chosen] - first
        first = last


@dataclass(frozen=True)
class Drawn:
    """What a node drew for a step: `records` [m] of its `features`, and the unit of each (None: its own)."""

    features: Features
    records: NDArray[np.int64]
    units: NDArray[np.int64] | None


def _stacks(
    drawn: Sequence[Drawn],
) -> Iterator[tuple[list[int], list[NDArray[np.int64]], NDArray[np.int64] | None]]:
    """What is worked on at once: nodes, the positions that are taken of each one's records, and the unit of
    each record; None where each is its own. Records that must be paired are of one node."""
    nodes, taken = list[int](), list[NDArray[np.int64]]()
    for node, one in enumerate(drawn):
        for positions, whose in _blocks(one.units, len(one.records)):
            if whose is not None:
                yield [node], [positions], whose
                continue
            if nodes and sum(map(len, taken)) + len(positions) > _ROWS:
                yield nodes, taken, None
                nodes, taken = [], []
            nodes.append(node)
            taken.append(positions)
    if nodes:
        yield nodes, taken, None


def head_sums(
    model: AdaptedModel,
    adapters: NDArray[np.float32],
    drawn: Sequence[Drawn],
    plan: PrivacyPlan,
    label_smoothing: float,
) -> NDArray[np.float64]:
    """`clipped_sum` of heads alone, in closed form, float64 [k, P]: of k nodes, each at its own of `adapters`
    [k, P]. A node's sum does not depend on which others are there, to the last bit.

    A record of features x [d] whose softmax is off by e [c] has the gradient e x^T (weight) and e (bias), so
    its squared norm is |e|^2 (|x|^2 + 1). Of two records the product is (e . e') (x . x' + 1); a unit's
    squared norm is its sum over all pairs of its records, and the clipped sum is two products of matrices
    (Goodfellow 2015, arXiv 1510.01799; "ghost norm" in Li et al. 2022). No example's gradient [c, d] is ever
    written out.
    """
    classes, width = model.parameters[_head_parameters(model)[0]].shape
    numbers = adapters.astype(np.float64)
    weights = numbers[:, : classes * width].reshape(-1, classes, width)
    biases = numbers[:, classes * width : classes * (width + 1)]
    centres = numbers[:, -model.centre_size :] if model.centre_size else None
    totals = np.zeros(numbers.shape, dtype=np.float64)
    (group,) = plan.clipping.groups(model.heads)
    for nodes, taken, whose in _stacks(drawn):
        rows = [drawn[node].records[positions] for node, positions in zip(nodes, taken, strict=True)]
        seen = [drawn[node].features for node in nodes]
        labels = np.concatenate([one.corpus.labels[mine] for one, mine in zip(seen, rows, strict=True)])
        counts, count = [len(mine) for mine in rows], len(labels)
        ends = np.cumsum(counts)
        spans = [(node, slice(end - size, end)) for node, end, size in zip(nodes, ends, counts, strict=True)]
        with np.errstate(invalid="ignore", over="ignore"):  # of a record that is broken
            # In float64: thousands that pull one way would lose one of them by 4e-4 of C. By numpy, which
            # takes one thread for a few rows: torch's wait for one another longer than they compute.
            inputs = model.head_inputs(
                np.concatenate([one.vectors(mine) for one, mine in zip(seen, rows, strict=True)]),
                None if centres is None else np.repeat(centres[nodes], counts, axis=0),
            )
            logits = np.repeat(biases[nodes], counts, axis=0)
            for node, span in spans:
                logits[span] += inputs[span] @ weights[node].T
            error = _softmax(logits)
            error -= label_smoothing / classes
            error[np.arange(count), labels] -= 1.0 - label_smoothing
            squares = np.square(error).sum(1) * (np.square(inputs).sum(1) + 1.0)
            if whose is not None and count > _PAIRED:  # of one unit, whose pairs would fill the memory
                whole = error.T @ inputs
                squares = np.square(whole).sum(keepdims=True).ravel() + np.square(error.sum(0)).sum()
            elif whose is not None:
                products = (error @ error.T) * (inputs @ inputs.T + 1.0)
                products = np.where(whose[:, None] == whose, products, 0.0)
                # Where a unit's records pull against one another little is left of large products but their
                # rounding, which must not pass for a norm of 0: at most so many units in the last place of
                # the square of what they would come to side by side.
                most = np.square(np.bincount(whose, np.sqrt(squares)))
                rounding = (classes + width + 2 * count) * np.finfo(np.float64).eps * most
                squares = np.maximum(np.bincount(whose, products.sum(1)), 0.0) + rounding
                model.flops.total += 2 * count**2 * (classes + width)
            norms = np.sqrt(squares)
        factors, broken = group.factor * plan.clip_factors(norms, group.most), ~np.isfinite(norms)
        if whose is not None:
            factors, broken = factors[whose], broken[whose]
        if broken.any():  # 0 x NaN is NaN: the factor alone would let it through
            error[broken], inputs[broken] = 0.0, 0.0
        error *= factors[:, None]
        model.flops.total += 4 * count * classes * width
        for node, span in spans:
            totals[node, : classes * width] += (error[span].T @ inputs[span]).ravel()
            totals[node, classes * width : classes * (width + 1)] += error[span].sum(0)
    return totals


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """[b, c] -> [b, c], each row sums to 1."""
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(powers / powers.sum(1, keepdims=True))


def _centre_sum(
    model: AdaptedModel,
    features: Features,
    records: NDArray[np.int64],
    units: NDArray[np.int64] | None,
    plan: PrivacyPlan,
) -> NDArray[np.float64]:
    """`clipped_sum` of a round that sets the centre: at its place, the sum of where each unit's texts lie.

    That is the mean of a unit's vectors, each scaled to length 1, times `plan.clipping.whole`; so its norm is
    no larger than a clipped gradient's, and it is clipped all the same. It is zero elsewhere.
    """
    if not (model.centre and features.pooled):
        raise PreflightError("This model has no centre that a round could set: the plan is another model's.")
    whose = np.arange(len(records)) if units is None else np.unique(units, return_inverse=True)[1]
    total = np.zeros(model.num_parameters, dtype=np.float64)
    for start in range(0, int(whose.max(initial=-1)) + 1, _ROWS):
        chosen = np.flatnonzero((whose >= start) & (whose < start + _ROWS))
        pooled = features.inputs(records[chosen], len(chosen), 1, model.device)["pooled"]
        vectors = nn.functional.normalize(pooled.cpu().double(), dim=1)
        row_of = torch.from_numpy(whose[chosen] - start)
        counts = torch.bincount(row_of)
        sums = torch.zeros(len(counts), vectors.shape[1], dtype=torch.float64).index_add_(0, row_of, vectors)
        means = plan.clipping.whole * sums / counts[:, None]
        norms = torch.linalg.vector_norm(means, dim=1)
        factors = torch.from_numpy(plan.clip_factors(norms.numpy()))
        means = torch.where(torch.isfinite(norms)[:, None], means, 0.0)  # 0 x NaN is NaN
        total[-model.centre_size :] += (factors @ means).numpy()
    return total


def _head_parameters(model: AdaptedModel) -> tuple[str, str]:
    """Names of the weight and the bias of a head that is all there is to train, in the order of the adapter.

    Raises:
        PreflightError: the adapter is not made of these two.
    """
    names = tuple(model.parameters)
    if len(names) != 2 or not names[0].endswith(".weight") or not names[1].endswith(".bias"):
        raise PreflightError(f"A head has a weight and a bias, and this one has {', '.join(names)}.")
    return names[0], names[1]


def clipped_sum(
    model: AdaptedModel,
    features: Features,
    records: NDArray[np.int64],
    units: NDArray[np.int64] | None,
    plan: PrivacyPlan,
    *,
    micro_batch_tokens: int,
    precision: str = "auto",
    label_smoothing: float = 0.0,
    centre: bool = False,
) -> NDArray[np.float64]:
    """Sum over the drawn units of their clipped gradients, float64 [P]; see the module's guarantee.

    Must run within `hooks_for(model, features)`.

    Args:
        features: of the shard's data.
        records: [m] rows of the shard's data that were drawn, m may be 0.
        units: [m] the unit of each record, or None where each record is its own unit.
        label_smoothing: share of a label that is spread over all classes (Szegedy et al. 2016): examples that
            are right then stop pulling, where clipping would let the logits grow for ever.
        centre: this round sets the centre.
    """
    if centre:
        return _centre_sum(model, features, records, units, plan)
    if features.pooled:
        one = Drawn(features, records, units)
        return head_sums(model, model.get_vector()[None], [one], plan, label_smoothing)[0]
    total = torch.zeros(model.num_parameters, dtype=torch.float64)
    layers = model.merged_layers(precision) if len(records) else None
    options = (micro_batch_tokens, precision, label_smoothing, layers)
    if units is None:

        def clipped(_: NDArray[np.int64], gradients: list[Tensor]) -> Tensor:
            return torch.cat(clip_and_sum(gradients, plan, model.heads)).cpu().double()

        for part in _of_micro_batches(model, features, records, *options, clipped):
            total += part
        return total.numpy()
    # Units come in blocks: a unit's records may then lie in micro-batches with others of like length, and
    # its gradients are added up in the block's row for it, and clipped when all of them are there.
    names, together = np.unique(units), max(1, _BLOCK // model.num_parameters)
    for start in range(0, len(names), together):
        block = names[start : start + together]
        chosen = np.flatnonzero((units >= block[0]) & (units <= block[-1]))
        row_of = np.searchsorted(block, units[chosen])
        sums = torch.zeros(len(block), model.num_parameters, device=model.device)
        joined = lambda positions, gradients: (positions, torch.cat(gradients, dim=1))  # noqa: E731
        for positions, packed in _of_micro_batches(model, features, records[chosen], *options, joined):
            sums.index_add_(0, torch.from_numpy(row_of[positions]).to(model.device), packed)
        total += torch.cat(clip_and_sum(model.split(sums), plan, model.heads)).cpu().double()
    return total.numpy()
