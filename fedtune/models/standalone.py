"""What a run trained, as a model that needs no fedtune: adapter merged, weights float32, in transformers'
form.

`merged` gives a `FedtuneForSequenceClassification` (`fedtune.models.modeling_fedtune`, the file that
travels with it). A compressed base is expanded to the numbers that it stands for, which are those that the
adapter was trained on. `save_adapter` writes the adapter alone for the same class, so that it loads onto
the base as transformers has it; `on_plain_base` is what one gets there, which differs a little where the
run's base was compressed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fedtune.config.quiet import quiet_libraries
from fedtune.config.schema import DataConfig, ModelConfig
from fedtune.data.tokenize import special_tokens
from fedtune.errors import ModelError
from fedtune.models import modeling_fedtune
from fedtune.models.classifier import LENGTH, load_saved, read_saved
from fedtune.models.encoder import load_encoder_config, load_pretrained, load_tokenizer
from fedtune.models.families import family_of
from fedtune.models.modeling_fedtune import FedtuneConfig, FedtuneForSequenceClassification
from fedtune.models.quantization import dequantize

__all__ = [
    "MODELING_FILE",
    "load_merged",
    "merged",
    "on_plain_base",
    "save_adapter",
    "save_config",
    "save_tokenizer",
    "separator",
    "window_of",
    "write_config",
]

MODELING_FILE = "modeling_fedtune.py"
_WEIGHTS = "adapter_model.safetensors"


def merged(adapter: Path, window: dict[str, int] | None = None) -> FedtuneForSequenceClassification:
    """The model of a run, on the CPU and in evaluation mode, from its adapter folder.

    Args:
        window: how it sees long texts, as `window_of` says.

    Raises:
        ModelError, ResourceError: as `fedtune.models.classifier.load_saved`.
    """
    trained: Any = load_saved(adapter, "cpu")
    # PEFT merges into a layer's weight, so the layers must be plain before; merging is exact in float32.
    dequantize(trained.get_base_model().encoder)
    plain = trained.merge_and_unload()
    model = FedtuneForSequenceClassification(_config(adapter, window))
    renamed = family_of(model.config.encoder).name_in_transformers
    weights: dict[str, Tensor] = {renamed(name): value for name, value in plain.state_dict().items()}
    if not plain.normalize:
        weights = {name: value for name, value in weights.items() if not name.startswith("centring.")}
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def load_merged(folder: Path) -> FedtuneForSequenceClassification:
    """The model that `save_pretrained` of a merged one wrote, by the class that is here: no file of it is
    run.

    Raises:
        ModelError: it cannot be read.
    """
    import transformers
    from safetensors import SafetensorError

    quiet_libraries()
    transformers.logging.disable_progress_bar()
    try:
        return FedtuneForSequenceClassification.from_pretrained(folder).eval()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"{folder} holds no model in transformers' form: "
            f"{' '.join(str(error).split())[:300]}. Export the "
            "run again."
        ) from error


def on_plain_base(folder: Path, base: ModelConfig) -> nn.Module:
    """The exported adapter in `folder` (`save_adapter`, `save_config`) on `base` as transformers loads it.

    Raises:
        ModelError, ResourceError: the base cannot be loaded.
    """
    import peft

    model = FedtuneForSequenceClassification(FedtuneConfig.from_pretrained(folder))
    model.encoder = load_pretrained(base)
    loaded: nn.Module = peft.PeftModel.from_pretrained(model, str(folder))
    return loaded.eval()


def window_of(adapter: Path, seen: DataConfig) -> dict[str, int] | None:
    """`FedtuneConfig.window` of a model that was trained on texts as `seen` says; None: each in one piece.

    Raises:
        ModelError: as `load_tokenizer`.
    """
    if seen.windows == 1:
        return None
    before, after = special_tokens(load_tokenizer(read_saved(adapter)[0])[0])
    return {"tokens": seen.longest, "before": before, "after": after}


def save_config(adapter: Path, folder: Path, window: dict[str, int] | None = None) -> None:
    """Writes config.json of the standalone model, and the modelling file that it names."""
    write_config(_config(adapter, window), folder)


def write_config(config: FedtuneConfig, folder: Path) -> None:
    """Writes `config` as config.json, and the modelling file that it names."""
    config.save_pretrained(folder)
    source = Path(modeling_fedtune.__file__).read_text(encoding="utf-8")
    (folder / MODELING_FILE).write_text(source, encoding="utf-8")


def save_tokenizer(adapter: Path, folder: Path, max_length: int) -> list[str]:
    """Writes the tokenizer, which cuts to `max_length` tokens when it is told to cut.

    Returns:
        The names of the model's inputs, in the tokenizer's order.

    Raises:
        ModelError: it has no form that works without Python (`tokenizer.json`).
    """
    tokenizer, _ = load_tokenizer(read_saved(adapter)[0])
    before = tokenizer.model_max_length
    try:
        tokenizer.model_max_length = max_length
        tokenizer.save_pretrained(str(folder))
    finally:
        tokenizer.model_max_length = before
    if not (folder / "tokenizer.json").is_file():
        raise ModelError(
            f"The tokenizer of {Path(read_saved(adapter)[0].name).name} has no tokenizer.json, which an "
            "export needs. Convert it with transformers' AutoTokenizer, and name its folder by model.name."
        )
    return list(tokenizer.model_input_names)


def separator(adapter: Path) -> int | None:
    """The token after which a pair's second text is another segment, of the model with this adapter; None
    where it has no segments.

    Raises:
        ModelError, ResourceError: as `merged`.
    """
    trained: Any = load_saved(adapter, "cpu")
    found: int | None = trained.get_base_model().encoder.separator
    return found


def save_adapter(adapter: Path, folder: Path) -> None:
    """Writes the adapter alone, in PEFT's format, with the names that the standalone model has."""
    from safetensors.torch import load_file, save_file

    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    # Nothing of PEFT's needs fedtune's own class any more.
    family = family_of(load_encoder_config(read_saved(adapter)[0]))
    settings |= {"auto_mapping": None, "base_model_name_or_path": None}
    if settings.get("layers_pattern"):
        settings["layers_pattern"] = family.layers
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    weights = load_file(adapter / _WEIGHTS)
    save_file(
        {family.name_in_transformers(name): value for name, value in weights.items()}, folder / _WEIGHTS
    )


def _config(adapter: Path, window: dict[str, int] | None) -> FedtuneConfig:
    settings, labels = read_saved(adapter)
    stem = Path(MODELING_FILE).stem
    model = FedtuneForSequenceClassification.__name__
    return FedtuneConfig(
        encoder=load_encoder_config(settings),
        pooling=settings.pooling,
        vector_length=LENGTH if settings.normalize else None,
        window=window,
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
        architectures=[model],
        auto_map={
            "AutoConfig": f"{stem}.{FedtuneConfig.__name__}",
            "AutoModelForSequenceClassification": f"{stem}.{model}",
        },
    )
