"""The model that is federated: frozen encoder, pooling, linear head, and the adapter as one flat vector.

`EncoderClassifier` is our own small class rather than transformers' `...ForSequenceClassification`,
which puts a second, randomly started dense layer in front of the head for some families and pools at
the first token; sentence encoders such as MiniLM are trained for the mean over tokens, and under
differential privacy each needless parameter costs noise. To load a saved adapter:

    model = fedtune.models.classifier.load_base(folder)          # encoder and head, as when trained
    model = peft.PeftModel.from_pretrained(model, folder)
    logits = model(input_ids=..., attention_mask=...)
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedtune.config.schema import AdapterConfig, ModelConfig
from fedtune.config.shapes import read_as
from fedtune.data.batches import MicroBatch
from fedtune.errors import ModelError
from fedtune.models.adapters import add_adapter, lowest_trained_layer
from fedtune.models.encoder import (
    EncoderStack,
    autocast,
    computes_in,
    load_encoder,
    select_device,
)
from fedtune.models.flops import FlopCount
from fedtune.models.merged_layers import MergedLayers, Seen
from fedtune.models.pooling import of_texts
from fedtune.models.quantization import stored_bytes
from fedtune.models.side_by_side import side_by_side
from fedtune.models.soundness import computation_of

__all__ = [
    "LENGTH",
    "AdaptedModel",
    "EncoderClassifier",
    "load_base",
    "load_model",
    "load_saved",
    "read_adapter",
    "read_saved",
]

_Result = TypeVar("_Result")

# Of a text's vector as the head sees it. Weights and bias share one clipped gradient by how long their inputs
# are: at 3 the bias, whose input is 1, has a tenth of it (squared); beside a vector of length 1 it had half.
LENGTH = 3.0
_BASE = "fedtune.json"  # beside the adapter: what the base model was
# By encoder, pooling and first trained layer: what is below never changes, and models may share an encoder.
_DIGESTS: WeakKeyDictionary[nn.Module, dict[tuple[str, int], str]] = WeakKeyDictionary()


def _digest_below(encoder: EncoderStack, pooling: str, first_layer: int) -> str:
    digest = hashlib.sha256(f"{pooling}|{encoder.separator}{computation_of(encoder.config)}".encode())
    for name, parameter in encoder.named_parameters():
        if name.startswith("layer.") and int(name.split(".")[1]) >= first_layer:
            continue
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Centring(nn.Module):
    """Vectors p [b, d] to `LENGTH` (u - m) / |u - m|, u = p / |p|: their direction from the centre m [d].

    An encoder's vectors share a direction, which tells nothing and takes most of their length: seen from
    their mean, texts differ more. The centre is nobody's gradient: a round of its own sets it
    (`PrivacyPlan.centres`). At zero, which it starts at, vectors are scaled and no more.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__()
        self.centre = nn.Parameter(torch.zeros(width, device=device), requires_grad=False)

    def forward(self, pooled: Tensor) -> Tensor:
        """A vector of zeros stays one."""
        length = torch.linalg.vector_norm(pooled, dim=-1, keepdim=True)
        return LENGTH * nn.functional.normalize(pooled - length * self.centre, dim=-1)


class EncoderClassifier(nn.Module):
    """Encoder, pooling over tokens, each text's vector centred and scaled to one length, linear head.

    Shapes: b examples, s tokens, d width, c classes. The scaling (`normalize`) is a function of one text
    and the adapter. The head starts at zero: it is convex, so a random start is nothing but noise to be
    unlearnt.
    """

    def __init__(
        self, encoder: EncoderStack, num_labels: int, pooling: str, *, normalize: bool = True
    ) -> None:
        super().__init__()
        if pooling not in ("mean", "cls"):
            raise ModelError(f"model.pooling={pooling!r} is not known; it can be mean or cls.")
        self.encoder = encoder
        self.pooling = pooling
        self.normalize = normalize
        self.num_labels = num_labels
        device = next(encoder.parameters()).device
        self.classifier = nn.Linear(encoder.width, num_labels, device=device)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        self.centring = Centring(encoder.width, device)

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """[b, s, d] and mask [b, s] -> [b, d]."""
        if self.pooling == "cls":
            return hidden[:, 0]
        weights = mask.to(hidden.dtype)[..., None]
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1.0)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        hidden: Tensor | None = None,
        first_layer: int | None = None,
        pooled: Tensor | None = None,
        layers: MergedLayers | None = None,
        seen: list[Seen] | None = None,
        text_of: Tensor | None = None,
    ) -> Tensor:
        """Logits [b, c] from ids [b, s] with mask [b, s]; or from `hidden` [b, s, d], the input of layer
        `first_layer`; or from `pooled` [b, d], as `pool` gave it, before it is scaled. `layers` run in place
        of the encoder's own from where they begin, and list in `seen` what is trained, the head too. With
        `text_of` [b] rows are windows of texts, and logits of texts, as in `of_texts`."""
        if pooled is None:
            if attention_mask is None:
                if input_ids is None:
                    raise ValueError("attention_mask is needed when input_ids are not given")
                attention_mask = torch.ones_like(input_ids)
            mask = attention_mask.bool()
            if hidden is None:
                if input_ids is None:
                    raise ValueError("give input_ids, hidden or pooled")
                hidden, first_layer = self.encoder.embed(input_ids, mask), 0
            if first_layer is None:
                raise ValueError("hidden needs first_layer: which layer it is the input of")
            last = len(self.encoder.layer) if layers is None else layers.first
            hidden = self.encoder.run(hidden, mask, first_layer, last)
            hidden = hidden if layers is None else layers.run(hidden, mask, seen)
            pooled = of_texts(self.pool(hidden, mask), text_of)
        if seen is None:
            return self.classifier(self.scaled(pooled))
        one_token = self.scaled(pooled)[:, None]
        logits = self.classifier(one_token)
        seen.append(Seen.of_linear(self.classifier, one_token, logits))
        return logits[:, 0]

    def scaled(self, pooled: Tensor) -> Tensor:
        """What the head sees of `pooled` [b, d]: in float32 whatever the encoder computed in; a vector of
        zeros stays one."""
        if not self.normalize:
            return pooled
        scaled: Tensor = self.centring(pooled.float())
        return scaled


class AdaptedModel:
    """One resident model whose adapter is a flat float32 vector [P] that can be read and replaced.

    The trainable parameters are views into `theta`, one contiguous tensor [P]: packing, unpacking, the
    optimizer step and the noise each are one operation, and no parameter can be trained without being in
    it. Of a `centred` model the centre [d], which has no gradient, comes last in it. The model is one for all
    nodes of a process; it holds no node's state between two calls of `set_vector`. Not thread-safe: callers
    take turns.
    """

    def __init__(
        self,
        classifier: EncoderClassifier,
        model: ModelConfig,
        adapter: AdapterConfig,
        label_names: tuple[str, ...],
        *,
        centred: bool = False,
    ) -> None:
        self.base = classifier
        self.model_config, self.adapter_config, self.label_names = model, adapter, label_names
        self.num_layers = len(classifier.encoder.layer)
        self.first_layer = lowest_trained_layer(adapter, self.num_layers)
        self.encoder_bytes = stored_bytes(classifier.encoder)
        self.peft_model = add_adapter(classifier, adapter, self.num_layers, centred=centred)
        self.device = next(classifier.encoder.parameters()).device
        named = dict(self.peft_model.named_parameters())
        self.parameters = {n: p for n, p in named.items() if p.requires_grad}
        self.centre = {n: p for n, p in named.items() if ".centring.modules_to_save." in n}
        self.packed = self.parameters | self.centre
        self.num_parameters = sum(p.numel() for p in self.packed.values())
        self.adapter_bytes = 4 * self.num_parameters
        self.theta = torch.empty(self.num_parameters, device=self.device)
        start = 0
        for parameter in self.packed.values():
            view = self.theta[start : start + parameter.numel()].view_as(parameter)
            view.copy_(parameter.detach())
            parameter.data = view
            start += parameter.numel()
        self.initial: NDArray[np.float32] = self.get_vector()
        self.flops = FlopCount()
        self.gradients_checked = False  # set by the preflight of the training layer

    def layout(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and shape of each parameter of the adapter, in the order in which they are packed."""
        return [(name, tuple(p.shape)) for name, p in self.packed.items()]

    @property
    def centre_size(self) -> int:
        """How many of the packed adapter's numbers, its last ones, are the centre: d, or 0 without one."""
        return sum(p.numel() for p in self.centre.values())

    @property
    def heads(self) -> tuple[bool, ...]:
        """Which of the parameters in `layout` are the classifier's."""
        return tuple("classifier" in name for name in self.packed)

    @property
    def head(self) -> NDArray[np.bool_]:
        """Which of the packed adapter's numbers are the classifier's, bool [P]."""
        return np.repeat(self.heads, [p.numel() for p in self.packed.values()])

    def head_inputs(
        self, pooled: NDArray[np.floating[Any]], centre: NDArray[np.floating[Any]] | None = None
    ) -> NDArray[np.float64]:
        """`EncoderClassifier.scaled` of `pooled` [b, d], by numpy (torch takes longer to begin), in float64.

        `centre`: one a row, [b, d]; None: the adapter's as it is.
        """
        vectors = pooled.astype(np.float64)
        if not self.base.normalize:
            return vectors
        if self.centre:
            centre = self.get_vector()[-self.centre_size :] if centre is None else centre
            vectors -= np.sqrt(np.square(vectors).sum(1, keepdims=True)) * centre
        vectors *= LENGTH / np.maximum(np.sqrt(np.square(vectors).sum(1, keepdims=True)), 1e-12)
        return vectors

    def split(self, packed: Tensor) -> tuple[Tensor, ...]:
        """`packed` [u, P] as one [u, n] a parameter, in the order of `layout`."""
        return packed.split([p.numel() for p in self.packed.values()], dim=1)

    def get_vector(self) -> NDArray[np.float32]:
        """A copy of the adapter, float32 [P]."""
        return self.theta.detach().cpu().numpy().copy()

    def set_vector(self, vector: NDArray[np.floating[Any]]) -> None:
        """Replaces the adapter by `vector` [P].

        Raises:
            ModelError: its shape is another, as it is when two nodes run different configurations.
        """
        if vector.shape != (self.num_parameters,):
            raise ModelError(
                f"An adapter of shape {tuple(vector.shape)} does not fit this model, whose "
                f"{self.adapter_config.name} adapter has {self.num_parameters} trainable parameters. Model, "
                "adapter and number of classes must be the same at the server and at every node.",
                public=True,
            )
        with torch.no_grad():
            self.theta.copy_(torch.from_numpy(np.ascontiguousarray(vector, dtype=np.float32)))

    @property
    def digest(self) -> str:
        """Of the encoder as it was loaded, and its tokenizer: the same for the same weights anywhere."""
        return self.base.encoder.digest

    @property
    def notes(self) -> tuple[str, ...]:
        """What was decided while the encoder was loaded."""
        return self.base.encoder.notes

    @property
    def frozen_digest(self) -> str:
        """Changes whenever the output of the layers below `first_layer` would: the key of its cache.

        Adapters of any kind that leave the same layers frozen share it.
        """
        known = _DIGESTS.setdefault(self.base.encoder, {})
        key = (self.base.pooling, self.first_layer)
        if key not in known:
            known[key] = _digest_below(self.base.encoder, *key)
        return known[key]

    @property
    def runs_merged(self) -> bool:
        """Whether there are `merged_layers`."""
        first, last = self.first_layer, self.num_layers
        return first < last and MergedLayers.takes(self.base.encoder, first, last)

    @property
    def one_by_one(self) -> bool:
        """Whether an example's gradient must be taken by itself: `Family.one_by_one`, of a trained layer."""
        return self.first_layer < self.num_layers and self.base.encoder.family.one_by_one

    def merged_layers(self, precision: str, first: int | None = None) -> MergedLayers | None:
        """The layers from `first` (None: the first trained one), with the adapter as it is now; None where
        there are none, or they are of a make that must run as it is. `precision` as `train.precision`."""
        first = self.first_layer if first is None else first
        if first == self.num_layers:
            return None
        bf16 = computes_in(self.device, precision) == "bf16"
        dtype = torch.bfloat16 if bf16 else torch.float32
        return MergedLayers.of(self.base.encoder, first, self.num_layers, dtype)

    def each(
        self,
        what: str,
        work: Callable[[MicroBatch], _Result],
        batches: Sequence[MicroBatch],
        layers: MergedLayers | None,
    ) -> Iterator[_Result]:
        """`work` of each of `batches`, in turn; with `layers`, in which nothing is written, side by side.

        `what`: `work` counts its operations as `flops.counting((what, *batch.shape))`.
        """
        if layers is None:
            return map(work, batches)
        alone = lambda batch: not self.flops.knows((what, *batch.shape))  # noqa: E731
        return side_by_side(work, batches, device=self.device, alone=alone)

    def logits(
        self,
        arguments: dict[str, Any],
        precision: str,
        layers: MergedLayers | None,
        seen: list[Seen] | None = None,
    ) -> Tensor:
        """Logits [b, c] of `EncoderClassifier.forward`; without `layers` by the model as it is."""
        with autocast(self.device, precision) if layers is None else nullcontext():
            logits: Tensor = self.base(**arguments, layers=layers, seen=seen)
        return logits.float()

    def save(self, folder: Path) -> None:
        """Writes the adapter in PEFT's own format, and beside it what `load_base` needs.

        Raises:
            OSError: the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.peft_model.save_pretrained(str(folder))
        base: dict[str, Any] = {"model": asdict(self.model_config), "adapter": asdict(self.adapter_config)}
        base |= {"digest": self.digest, "pairs": self.base.encoder.separator is not None}
        (folder / _BASE).write_text(
            json.dumps(base | {"label_names": list(self.label_names)}, indent=2) + "\n"
        )


def load_model(
    model: ModelConfig,
    adapter: AdapterConfig,
    num_labels: int,
    seed: int,
    device: str = "auto",
    label_names: tuple[str, ...] = (),
    *,
    centred: bool = False,
    pairs: bool = False,
) -> AdaptedModel:
    """Loads encoder, head and adapter; the same arguments give the same start on every machine.

    The last two models are kept in memory and handed out again (with the adapter at its start). `centred`:
    the adapter has a centre; `pairs`: texts come in pairs.

    Raises:
        ModelError: encoder or adapter are missing, unsupported, or do not fit.
        ResourceError: there is no such device, or the hub cannot be reached.
    """
    key = json.dumps([asdict(model), asdict(adapter)], sort_keys=True)
    loaded = _load(key, num_labels, seed, str(select_device(device)), tuple(label_names), centred, pairs)
    loaded.set_vector(loaded.initial)
    return loaded


def forget_models() -> None:
    """Keeps none of the models in memory: whoever has one has it alone, and the next call loads afresh."""
    _load.cache_clear()
    _bare_encoder.cache_clear()


@functools.lru_cache(maxsize=2)
def _load(
    key: str,
    num_labels: int,
    seed: int,
    device: str,
    label_names: tuple[str, ...],
    centred: bool,
    pairs: bool,
) -> AdaptedModel:
    model_options, adapter_options = json.loads(key)
    model, adapter = ModelConfig(**model_options), AdapterConfig(**adapter_options)
    if adapter.name == "head":
        # Nothing of the encoder is ever changed, so that the runs of a sweep over seeds share one.
        encoder = _bare_encoder(json.dumps(model_options, sort_keys=True), device, pairs)
    else:
        encoder = load_encoder(model, torch.device(device), pairs=pairs)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AdaptedModel(
            EncoderClassifier(encoder, num_labels, model.pooling, normalize=model.normalize),
            model,
            adapter,
            label_names,
            centred=centred,
        )


@functools.lru_cache(maxsize=1)
def _bare_encoder(model: str, device: str, pairs: bool) -> EncoderStack:
    return load_encoder(ModelConfig(**json.loads(model)), torch.device(device), pairs=pairs)


def read_saved(folder: str | Path) -> tuple[ModelConfig, tuple[str, ...]]:
    """(settings of the base, label names in the order of the classes) of the adapter in `folder`.

    Raises:
        ModelError: `folder` holds no adapter that fedtune saved.
    """
    saved = read_adapter(folder)
    return saved["model"], saved["label_names"]


def read_adapter(folder: str | Path) -> dict[str, Any]:
    """What `AdaptedModel.save` wrote beside the adapter. Raises `ModelError` if there is none."""
    path = Path(folder) / _BASE
    try:
        saved = read_as("adapter", path)
        # Earlier versions took vectors as they were, read any file, and told pairs by the separator alone.
        model = ModelConfig(**{"normalize": False, "pickle": True, **saved["model"]})
        return {
            "pairs": True,
            "digest": "",
            **saved,
            "model": model,
            "label_names": tuple(saved["label_names"]),
        }
    except FileNotFoundError as error:
        raise ModelError(f"{folder} holds no adapter saved by fedtune: {path.name} is missing.") from error
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"{folder} holds no adapter saved by fedtune: {path.name} is unreadable ({error}). Copy the "
            "whole folder again, or resume the run, which writes it anew."
        ) from error


def load_base(folder: str | Path, device: str = "auto") -> EncoderClassifier:
    """The model that the adapter in `folder` was trained on, ready for `PeftModel.from_pretrained`.

    Raises:
        ModelError: `folder` holds no adapter that fedtune saved, or its encoder is not the one that it was
            trained on.
    """
    saved = read_adapter(folder)
    model: ModelConfig = saved["model"]
    encoder = load_encoder(model, select_device(device), pairs=saved["pairs"])
    if saved["digest"] not in ("", encoder.digest):
        raise ModelError(
            f"The adapter in {folder} was trained on another encoder than the one that {model.name!r} is "
            f"now: its digest was {saved['digest'][:12]} and is {encoder.digest[:12]}. Put the model back "
            "that it was trained on, or train again."
        )
    return EncoderClassifier(encoder, len(saved["label_names"]), model.pooling, normalize=model.normalize)


def load_saved(folder: str | Path, device: str = "auto") -> nn.Module:
    """The model of a finished run, ready to predict: its base and, through peft, the adapter in `folder`.

    Raises:
        ModelError: as `load_base` does, or the adapter is damaged, or of another base.
    """
    import peft
    from safetensors import SafetensorError

    base = load_base(folder, device)
    try:
        model: nn.Module = peft.PeftModel.from_pretrained(base, str(folder))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(
            f"{folder} holds no adapter that fits its base: {' '.join(str(error).split())[:300]}. Copy the "
            f"whole run folder again, or resume the run, which writes it anew: fedtune run resume="
            f"{Path(folder).parent}"
        ) from error
    model.train(False)
    return model
