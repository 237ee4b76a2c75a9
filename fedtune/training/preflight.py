"""What is checked before any step is taken: model, optimizer, sampler and accountant agree.

Each check answers a bug that has shipped somewhere: parameters that were trained but neither clipped
nor noised (opacus issues 632, 732), layers that mix examples (346, 841), per-example gradients that
became wrong with a library upgrade (820). A failure raises, and nothing has been trained or released.

The gradient check runs on records of nobody, at an adapter of nobody's choice: a server could choose one with
which the check fails, and is seen to fail, where a real text has some word. It is made once for a process and
model: the code does not change between rounds.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedtune.config.schema import TrainConfig
from fedtune.errors import PreflightError
from fedtune.models.classifier import AdaptedModel
from fedtune.models.frozen_outputs import Features
from fedtune.privacy.plan import PrivacyPlan
from fedtune.training.example_gradients import check_layers, example_gradients
from fedtune.training.made_up import made_up

__all__ = ["check_gradients", "check_memory", "check_parameters", "check_plan", "preflight"]

_TOLERANCE = 2e-3  # of a parameter's own gradient; a wrong one is off by far more
_ROUNDING = 1e-4  # of the example's largest: a gradient that is zero by nature (a key's bias) is rounding


def check_parameters(model: AdaptedModel, optimized: Tensor) -> None:
    """Trainable parameters == optimizer's parameters == parameters that are clipped and noised.

    All three must be the same memory: the packed adapter.

    Raises:
        PreflightError: they differ; the parameters are named.
    """
    trained = {n: p for n, p in model.base.named_parameters() if p.requires_grad}
    packed = {id(p) for p in model.parameters.values()}
    stray = [n for n, p in trained.items() if id(p) not in packed]
    if stray or len(trained) != len(model.parameters):
        raise PreflightError(
            f"{len(trained)} parameters are trainable and {len(model.parameters)} are clipped and noised; "
            f"not in both: {', '.join(stray[:5]) or 'frozen ones'}. Do not change requires_grad after the "
            "model is loaded."
        )
    check_memory(model, optimized)


def check_memory(model: AdaptedModel, optimized: Tensor) -> None:
    """The last part of `check_parameters`: what is clipped and noised is the memory that is optimized.

    Raises:
        PreflightError: it is other memory.
    """
    begin, offset = model.theta.data_ptr(), 0
    for name, parameter in model.packed.items():
        if parameter.data_ptr() != begin + 4 * offset or parameter.dtype != torch.float32:
            raise PreflightError(
                f"Parameter {name!r} is no longer a part of the packed adapter (was the model moved or cast "
                "after it was loaded?): it would be trained without noise. Choose the device by device=..."
            )
        offset += parameter.numel()
    if optimized.data_ptr() != begin or optimized.numel() != offset:
        raise PreflightError(
            f"The optimizer holds {optimized.numel()} numbers and the adapter has {offset}: they are not "
            "the same memory."
        )


def check_gradients(model: AdaptedModel, *, windows: bool = False) -> None:
    """Vectorized per-example gradients equal those of one example at a time, on a made-up micro-batch.

    They are compared beside the adapter that the model starts with: there LoRA has B = 0 and the head is
    zero, where every gradient but the head's is zero and a wrong one would look right. The adapter is put
    back. Must run within `hooks_for(model, features)` of features like those that are trained on.

    Args:
        model: whose gradients.
        windows: of texts that have several.

    Raises:
        PreflightError: they differ by more than rounding; the parameter is named.
    """
    adapter = model.get_vector()
    model.set_vector(model.initial)
    model.theta += 0.05 * torch.randn(model.num_parameters, generator=torch.Generator().manual_seed(0)).to(
        model.device
    )
    try:
        _compare(model, made_up(model, (5, 13, 20), 8) if windows else made_up(model, (3, 6, 8)))
    finally:
        model.set_vector(adapter)
        for parameter in model.parameters.values():
            parameter.grad_sample = parameter.grad = None


def _compare(model: AdaptedModel, features: Features) -> None:
    corpus = features.corpus
    records = np.arange(corpus.num_records)
    labels = torch.from_numpy(corpus.labels[records]).to(model.device)

    def inputs(rows: NDArray[np.int64]) -> dict[str, Any]:
        return features.inputs(rows, *features.shape(rows), model.device)

    try:
        together = example_gradients(model, inputs(records), labels, "fp32", model.merged_layers("fp32"))
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        # Layers that Opacus does not know go through functorch, which has its own limits and says so there.
        kinds = sorted({type(m).__name__ for m in model.base.modules() if _trained(m)})
        raise PreflightError(
            f"Opacus cannot compute per-example gradients of this model ({type(error).__name__}; its trained "
            f"layers are {', '.join(kinds)}). Use another adapter, or layer types that Opacus supports."
        ) from error
    for row in range(len(records)):
        only = slice(row, row + 1)
        # The model as transformers and PEFT run it, and nothing but autograd.
        loss = nn.functional.cross_entropy(model.base(**inputs(records[only]))[:1], labels[only])
        alone = torch.autograd.grad(loss, list(model.parameters.values()), allow_unused=True)
        for parameter in model.parameters.values():
            parameter.grad_sample = None
        largest = max(float(g.abs().max()) for g in alone if g is not None)
        for name, got, expected in zip(model.parameters, (g[row] for g in together), alone, strict=True):
            want = torch.zeros_like(got) if expected is None else expected.reshape(-1)
            difference, own = float((got - want).abs().max()), float(want.abs().max())
            if not difference <= _TOLERANCE * own + _ROUNDING * largest + 1e-8:
                raise PreflightError(
                    f"The per-example gradient of {name!r} is wrong: vectorized and one at a time differ by "
                    f"{difference:.2g}, where it is up to {own:.2g}, of a made-up record. Epsilon would not "
                    f"be true with these versions of torch ({torch.__version__}), opacus and peft; use the "
                    "pinned ones."
                )


def _trained(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters(recurse=False))


def check_plan(plan: PrivacyPlan, train: TrainConfig) -> None:
    """Sampler, clip, noise and accounted steps come from one plan that promises something, or nothing.

    Raises:
        PreflightError: the plan has no clip or no noise, or `train` takes other steps than it accounts for.
    """
    if plan.is_private() and not (math.isfinite(plan.max_grad_norm) and plan.noise_multiplier > 0):
        raise PreflightError(
            f"The plan promises privacy with a clip of {plan.max_grad_norm} and a noise multiplier of "
            f"{plan.noise_multiplier}; both must be positive and finite."
        )
    if plan.local_steps != train.local_steps or plan.sample_rate != train.sample_rate:
        raise PreflightError(
            f"The plan accounts for {plan.local_steps} steps at a sampling rate of {plan.sample_rate:g}, and "
            f"training is set to {train.local_steps} steps at {train.sample_rate:g}."
        )


def preflight(
    model: AdaptedModel, features: Features, plan: PrivacyPlan, theta: Tensor, train: TrainConfig
) -> None:
    """Runs every check; see the module. Must run within `hooks_for(model, features)`.

    What belongs to the model alone is checked once: a layer that is unfrozen later is in no optimizer.

    Raises:
        PreflightError: one of them failed.
    """
    check_plan(plan, train)
    if model.gradients_checked:
        check_memory(model, theta)
        return
    check_layers(model)
    check_parameters(model, theta)
    check_gradients(model, windows=features.corpus.window is not None)
    model.gradients_checked = True
