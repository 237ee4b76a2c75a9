"""Puts a trainable adapter on a frozen encoder, through PEFT.

    lora      low-rank updates of query and value, or of what is named (Hu et al. 2021), and the head
    ffa_lora  the same with A frozen at its random start, rows orthonormal (Sun et al. 2024, FFA-LoRA): the
              product B A is then linear in what travels, so averaging adapters averages models, noise on A
              is not multiplied with noise on B, and every direction of B weighs the same
    bitfit    the biases of the adapted layers (Ben Zaken et al. 2022), and the head
    head      the classifier alone

All of them save as one PEFT folder with the classifier in `modules_to_save`. PEFT has no tuner for the
last two: they are a LoRA configuration that targets no module, which PEFT supports for adapters that
consist of saved modules or biases only.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from fedtune.config.schema import ALL_LINEAR, AdapterConfig
from fedtune.errors import ModelError

__all__ = ["ADAPTERS", "add_adapter", "lowest_trained_layer"]

ADAPTERS = ("lora", "ffa_lora", "bitfit", "head")
# BERT and its kin; DistilBERT; MPNet; DeBERTa; ModernBERT, where they are one product, and key with them
_QUERY_AND_VALUE = ("query", "value", "q_lin", "v_lin", "q", "v", "query_proj", "value_proj", "Wqkv")
_LAYER = re.compile(r"\.layer\.(\d+)\.")


def lowest_trained_layer(config: AdapterConfig, num_layers: int) -> int:
    """Index of the lowest encoder layer with trainable parameters; `num_layers` if there is none.

    Raises:
        ModelError: there is no such adapter, or more layers are asked for than there are.
    """
    if config.name not in ADAPTERS:
        raise ModelError(
            f"adapter.name={config.name!r} is not known; it can be one of {', '.join(ADAPTERS)}."
        )
    if config.name == "head":
        return num_layers
    wanted = num_layers if config.layers is None else config.layers
    if not 1 <= wanted <= num_layers:
        raise ModelError(
            f"adapter.layers={wanted}: the encoder has {num_layers} layers, so it can be 1 to {num_layers}, "
            "or null for all. (Layers that share their weights, as ALBERT's, are one.) For none use "
            "adapter=head."
        )
    return num_layers - wanted


def _targets(model: nn.Module, config: AdapterConfig) -> list[str]:
    linear = {
        name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    linear.discard("classifier")
    if config.target_modules is None:
        return sorted(linear.intersection(_QUERY_AND_VALUE))
    if list(config.target_modules) == [ALL_LINEAR]:
        return sorted(linear)
    missing = sorted(set(config.target_modules) - linear)
    if missing:
        raise ModelError(
            f"adapter.target_modules names {', '.join(missing)}, and the encoder's linear layers are "
            f"{', '.join(sorted(linear))}; [{ALL_LINEAR}] is all of them."
        )
    return sorted(config.target_modules)


def add_adapter(model: nn.Module, config: AdapterConfig, num_layers: int, *, centred: bool = False) -> Any:
    """Wraps `model` (which has `.encoder.layer`, `.classifier` and `.centring`) as a PeftModel, in place.

    Exactly the adapter's parameters require gradients afterwards. The random start of LoRA's A comes
    from torch's global generator: seed it before. `centred`: the centre is part of the adapter; it has no
    gradient.

    Raises:
        ModelError: as `lowest_trained_layer`, or `adapter.target_modules` names a layer that is not there, or
            there is no bias to train.
    """
    import peft
    from peft.utils.constants import DUMMY_TARGET_MODULES

    lowest = lowest_trained_layer(config, num_layers)
    options: dict[str, Any] = {"modules_to_save": ["classifier", *(["centring"] if centred else [])]}
    if config.name in ("lora", "ffa_lora"):
        options |= {
            "target_modules": _targets(model, config),
            "layers_to_transform": list(range(lowest, num_layers)),
            "layers_pattern": "layer",
            "r": config.rank,
            "lora_alpha": config.alpha,
        }
    else:
        options |= {
            "target_modules": DUMMY_TARGET_MODULES,
            "bias": "all" if config.name == "bitfit" else "none",
        }
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
    for name, parameter in wrapped.named_parameters():
        if not parameter.requires_grad:
            continue
        match = _LAYER.search(name)
        if ".lora_A." in name:
            parameter.requires_grad_(config.name == "lora")
            if config.name == "ffa_lora":
                nn.init.orthogonal_(parameter)  # rank is below the width: its rows are orthonormal
        elif name.endswith(".bias") and ".classifier." not in name:
            # Biases below the adapted layers (the embeddings' LayerNorm too) stay frozen.
            parameter.requires_grad_(match is not None and int(match.group(1)) >= lowest)
        elif ".classifier.original_module." in name:
            # PEFT's bias="all" also marks the head that modules_to_save has replaced.
            parameter.requires_grad_(False)
        elif ".centring." in name:
            parameter.requires_grad_(False)
    trained = [name for name, parameter in wrapped.named_parameters() if parameter.requires_grad]
    if config.name == "bitfit" and not any(_LAYER.search(name) for name in trained):
        raise ModelError(
            "adapter=bitfit trains the biases of the encoder's layers, and this encoder's layers have none "
            "(as ModernBERT's). Use adapter=lora or adapter=ffa_lora, or adapter=head for the head alone."
        )
    return wrapped
