"""Each example's gradient, of a whole micro-batch at once.

Opacus' hooks give it for every layer that has trained parameters and is run as it is. The layers of an
encoder are run merged where they are of a known make (`fedtune.models.merged_layers`), which gives the same
numbers several times as fast, in closed form from what autograd says of the layers' and the head's outputs;
nothing is then left on the model, so that micro-batches may be worked on side by side. Where a layer's
weights meet something that has no row an example (`Family.one_by_one`), hooks would be wrong: each record has
a pass of its own.

Shapes: b rows of a micro-batch, of which the first r are records.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.errors import PreflightError
from fedtune.models.classifier import AdaptedModel
from fedtune.models.frozen_outputs import Features
from fedtune.models.merged_layers import MergedLayers, Seen
from fedtune.models.quantization import Int8Linear, NF4Linear

__all__ = ["check_layers", "example_gradients", "hooks_for", "per_example_gradients"]

_MIXING = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


def check_layers(model: AdaptedModel) -> None:
    """Refuses layers whose output for one example depends on the others, and dropout.

    Raises:
        PreflightError: there is one; it is named.
    """
    for name, module in model.base.named_modules():
        if isinstance(module, _MIXING):
            raise PreflightError(
                f"Layer {name!r} ({type(module).__name__}) mixes the examples of a batch, so clipping one "
                "example's gradient does not bound its influence. Use an encoder with LayerNorm, as every "
                "BERT has."
            )
        if isinstance(module, nn.Dropout) and module.p > 0:
            raise PreflightError(
                f"Dropout {name!r} is {module.p:g}; it must be 0 for per-example gradients to be exact."
            )


@contextmanager
def per_example_gradients(model: AdaptedModel) -> Iterator[None]:
    """Within it, a backward pass leaves `grad_sample` [b, *shape] on every trainable parameter.

    Raises:
        PreflightError: the model has layers that Opacus refuses.
    """
    from opacus.grad_sample import GradSampleHooks, register_grad_sampler

    if Int8Linear not in GradSampleHooks.GRAD_SAMPLERS:

        @register_grad_sampler([Int8Linear, NF4Linear])
        def _bias_only(layer: nn.Linear, _: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
            # The weight of a quantized layer is frozen; preflight checks that only the bias is trained.
            return {layer.bias: torch.einsum("n...k->nk", backprops)}

    # True of every lowest adapted layer, whose input is data, and harmless: Opacus needs outputs' gradients.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    try:
        hooks = GradSampleHooks(model.base, loss_reduction="sum", strict=True)
    except NotImplementedError as error:
        check_layers(model)  # says it in other words than of Opacus' source code, where it can
        refused = [
            f"{name!r} ({type(module).__name__})"
            for name, module in model.base.named_modules()
            if any(p.requires_grad for p in module.parameters(recurse=False)) and list(module.buffers())
        ]
        named = ", ".join(refused[:3]) or "a layer of this model"
        raise PreflightError(
            f"Opacus has no per-example gradients for {named}: it keeps state from batch to batch, so "
            "clipping one example's gradient does not bound its influence. Train another part (adapter=lora "
            "or head), or use an encoder with LayerNorm."
        ) from error
    try:
        yield
    finally:
        hooks.cleanup()


def hooks_for(model: AdaptedModel, features: Features) -> AbstractContextManager[None]:
    """What a training on `features` must run within: `per_example_gradients`; nothing where all is in closed
    form, and the preflight of a head, which wants the hooks too, is behind this model. To set them up and
    take them off costs more than some steps of a head."""
    closed = model.runs_merged or model.one_by_one or (features.pooled and model.gradients_checked)
    return nullcontext() if closed else per_example_gradients(model)


def example_gradients(
    model: AdaptedModel,
    arguments: dict[str, Any],
    target: Tensor,
    precision: str,
    layers: MergedLayers | None,
    label_smoothing: float = 0.0,
) -> list[Tensor]:
    """Of each trained parameter, in the order of the packed adapter: its gradients, float32 [b, size].

    Without `layers` it must run within `hooks_for` the model, with them outside. The loss is summed,
    so that no example's gradient depends on b; rows from r on do not enter it, and their gradients are zero.

    Args:
        arguments: of `EncoderClassifier.forward`.
        target: int64 [r], the records' labels.
        precision: as `train.precision`, of a model without `layers`.
        layers: what runs in place of the layers from the first trained one, at the adapter as it is.
        label_smoothing: share of a label that is spread over all classes.
    """
    if model.one_by_one:
        return _one_by_one(model, arguments, target, precision, label_smoothing)
    seen: list[Seen] | None = None if layers is None else []
    logits = model.logits(arguments, precision, layers, seen)
    loss = nn.functional.cross_entropy(
        logits[: len(target)], target, reduction="sum", label_smoothing=label_smoothing
    )
    text_of: Tensor | None = arguments.get("text_of")
    if seen is None:
        loss.backward()
        return _by_text(model, _collect(model, len(logits), _taken(model)), text_of)
    # By outputs, not parameters: no weight's gradient is made.
    outputs = torch.autograd.grad(loss, [operation.y for operation in seen])
    found: dict[nn.Parameter, Tensor] = {}
    for operation, g in zip(seen, outputs, strict=True):
        for parameter, gradients in operation.per_example(g):
            # Layers that share their weights (ALBERT) meet them again.
            found[parameter] = gradients + found[parameter] if parameter in found else gradients
    return _by_text(model, _collect(model, len(logits), found), text_of)


def _by_text(model: AdaptedModel, gradients: list[Tensor], text_of: Tensor | None) -> list[Tensor]:
    """Where rows are windows of texts: each text's gradients, [b, size] a parameter, of those of its windows.

    A text's vector is the mean of its windows', so its gradient is the sum of what they give. The head has
    seen texts.
    """
    if text_of is None:
        return gradients
    return [
        gradient if head else torch.zeros_like(gradient).index_add_(0, text_of, gradient)
        for head, gradient in zip(model.heads, gradients, strict=False)
    ]


def _one_by_one(
    model: AdaptedModel,
    arguments: dict[str, Any],
    target: Tensor,
    precision: str,
    label_smoothing: float,
) -> list[Tensor]:
    """`example_gradients` by a pass for each record, with nothing but autograd."""
    parameters = list(model.parameters.values())
    rows = len(arguments["attention_mask"])
    found = [torch.zeros(rows, p.numel(), device=model.device) for p in parameters]
    text_of = arguments.get("text_of", torch.arange(rows, device=model.device))
    for row in range(len(target)):
        chosen = torch.nonzero(text_of == row)[:, 0]
        alone = {
            name: value[chosen] if isinstance(value, Tensor) else value for name, value in arguments.items()
        }
        if "text_of" in alone:
            alone["text_of"] = torch.zeros_like(chosen)
        loss = nn.functional.cross_entropy(
            model.logits(alone, precision, None)[:1], target[row : row + 1], label_smoothing=label_smoothing
        )
        gradients = torch.autograd.grad(loss, parameters)
        for whole, gradient in zip(found, gradients, strict=True):
            whole[row] = gradient.reshape(-1).float()
    return found


def _taken(model: AdaptedModel) -> dict[nn.Parameter, Any]:
    """What the hooks left on the parameters, which is taken off them."""
    found = {p: getattr(p, "grad_sample", None) for p in model.parameters.values()}
    for parameter in found:
        parameter.grad_sample = parameter.grad = None
    return found


def _collect(model: AdaptedModel, rows: int, found: dict[nn.Parameter, Any]) -> list[Tensor]:
    """Each parameter's per-example gradient, float32 [rows, size], in the order of the packed adapter.

    Raises:
        PreflightError: a parameter has none, or of another shape.
    """
    collected = []
    for name, parameter in model.parameters.items():
        sample = found.get(parameter)
        if not isinstance(sample, Tensor) or sample.shape != (rows, *parameter.shape):
            raise PreflightError(
                f"Opacus gives no per-example gradient for the trainable parameter {name!r}; it would be "
                "trained without clipping. Use another adapter, or a layer type that Opacus supports."
            )
        collected.append(sample.reshape(rows, -1).float())
    return collected
