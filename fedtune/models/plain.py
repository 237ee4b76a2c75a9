"""A saved model made ready to predict without transformers and PEFT: to import them takes the most time.

For encoders of BERT's make in a folder on this machine, asked about single texts on the processor, which are
most. The encoder is written out here with the names that transformers gives its weights, the tokenizer is
that of tokenizer.json by the `tokenizers` library, and an adapter is what PEFT makes of it. A compressed
base is expanded to the numbers that it stands for, once: that takes the memory of a plain one, and no
bitsandbytes. The rest is what training uses (`EncoderStack`, `EncoderClassifier`).

It cannot be another model: the digest of encoder and tokenizer, which training noted beside the adapter, is
made anew of what was loaded here, and compared. Whatever is not as expected, `load_plain` gives nothing, and
the long way (`fedtune.models.classifier.load_saved`) loads it, or says what is wrong.

Shapes: b examples, s tokens, d width, h heads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedtune.config.schema import ModelConfig
from fedtune.models.classifier import EncoderClassifier, read_adapter
from fedtune.models.encoder import EncoderStack, model_location, select_device
from fedtune.models.families import FAMILIES
from fedtune.models.quantization import as_stored
from fedtune.models.soundness import digest_of

__all__ = ["PlainTokenizer", "load_plain"]

_KINDS = ("bert", "electra", "roberta", "xlm-roberta", "camembert")
# What config.json must say, for a default differs between families.
_SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "type_vocab_size", "pad_token_id",
)  # fmt: skip
# What would be computed in another way, and what it must say if it is there.
_AS_BERT = {
    "hidden_act": "gelu", "position_embedding_type": "absolute", "is_decoder": False, "auto_map": None,
    "chunk_size_feed_forward": 0, "quantization_config": None,
}  # fmt: skip


class _Differs(Exception):
    """This model is for the long way."""


@dataclass(frozen=True)
class _Config:
    """The part of a configuration that the computation follows from, under transformers' names."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    pad_token_id: int
    layer_norm_eps: float
    hidden_act: str = field(default="gelu", init=False)


def _linear(inner: int, outer: int) -> nn.Linear:
    """A linear layer whose numbers are to be loaded: torch's random start takes longer than that."""
    layer = nn.Linear(1, 1)
    layer.in_features, layer.out_features = inner, outer
    layer.weight, layer.bias = nn.Parameter(torch.empty(outer, inner)), nn.Parameter(torch.empty(outer))
    return layer


def _table(rows: int, width: int, padding: int | None = None) -> nn.Embedding:
    return nn.Embedding(rows, width, padding_idx=padding, _weight=torch.empty(rows, width))


class _Embeddings(nn.Module):
    def __init__(self, config: _Config) -> None:
        super().__init__()
        width, padding = config.hidden_size, config.pad_token_id
        self.word_embeddings = _table(config.vocab_size, width, padding)
        self.position_embeddings = _table(config.max_position_embeddings, width)
        self.token_type_embeddings = _table(config.type_vocab_size, width)
        self.LayerNorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.padding = padding if FAMILIES[config.model_type].from_padding else None

    def forward(self, ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Token ids [b, s] -> [b, s, d]."""
        segments = torch.zeros_like(ids) if token_type_ids is None else token_type_ids
        places = torch.arange(ids.shape[1], device=ids.device)[None]
        if self.padding is not None:
            there = (ids != self.padding).int()
            places = (torch.cumsum(there, 1) * there).long() + self.padding
        found = self.word_embeddings(ids) + self.token_type_embeddings(segments)
        output: Tensor = self.LayerNorm(found + self.position_embeddings(places))
        return output


class _SelfAttention(nn.Module):
    def __init__(self, config: _Config) -> None:
        super().__init__()
        width = config.hidden_size
        self.size = width // config.num_attention_heads
        self.query, self.key, self.value = (_linear(width, width) for _ in range(3))

    def forward(self, hidden: Tensor, bias: Tensor | None) -> Tensor:
        """[b, s, d] with the bias [b, 1, 1, s] on scores -> [b, s, d]."""
        shape = (*hidden.shape[:-1], -1, self.size)
        parts = (self.query, self.key, self.value)
        query, key, value = (part(hidden).view(shape).transpose(1, 2) for part in parts)  # [b, h, s, d / h]
        scores = torch.matmul(query, key.transpose(2, 3)) * self.size**-0.5
        weights = functional.softmax(scores if bias is None else scores + bias, dim=-1)
        seen = torch.matmul(weights, value).transpose(1, 2)
        return seen.reshape(hidden.shape).contiguous()


class _Output(nn.Module):
    def __init__(self, inner: int, config: _Config) -> None:
        super().__init__()
        self.dense = _linear(inner, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, inner: Tensor, before: Tensor) -> Tensor:
        output: Tensor = self.LayerNorm(self.dense(inner) + before)
        return output


class _Layer(nn.Module):
    def __init__(self, config: _Config) -> None:
        super().__init__()
        within = _SelfAttention(config)
        self.attention = nn.ModuleDict({"self": within, "output": _Output(config.hidden_size, config)})
        self.intermediate = nn.ModuleDict({"dense": _linear(config.hidden_size, config.intermediate_size)})
        self.output = _Output(config.intermediate_size, config)

    def forward(self, hidden: Tensor, bias: Tensor | None) -> Tensor:
        """[b, s, d] -> [b, s, d]."""
        attended = self.attention["output"](self.attention["self"](hidden, bias), hidden)
        output: Tensor = self.output(functional.gelu(self.intermediate["dense"](attended)), attended)
        return output


class _Encoder(nn.Module):
    """Names of weights as in transformers' BertModel, without the pooler."""

    def __init__(self, config: _Config) -> None:
        super().__init__()
        self.config: Any = config
        self.embeddings = _Embeddings(config)
        layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})


class _LowRank(nn.Module):
    """PEFT's LoRA on a linear layer: y += scale B A x."""

    def __init__(self, linear: nn.Module, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.linear, self.scale = linear, scale
        self.register_buffer("a", a)
        self.register_buffer("b", b)

    def forward(self, x: Tensor) -> Tensor:
        low = functional.linear(x, self.get_buffer("a"))
        output: Tensor = self.linear(x) + functional.linear(low, self.get_buffer("b")) * self.scale
        return output


class PlainTokenizer:
    """What `fedtune.data.tokenize.encoded` asks of a tokenizer of transformers', for single texts.

    Attributes:
        id: as `fedtune.models.encoder.load_tokenizer` makes it.
    """

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(path))
        self.id = hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()[:16]
        self._tokenizer.no_padding()

    def num_special_tokens_to_add(self, pair: bool) -> int:
        """As transformers' own."""
        return int(self._tokenizer.num_special_tokens_to_add(pair))

    def __call__(
        self,
        texts: Sequence[str],
        pairs: None,
        *,
        max_length: int,
        add_special_tokens: bool = True,
        **options: Any,
    ) -> dict[str, list[list[int]]]:
        """Token ids of texts, cut to `max_length`; other `options` are those that ask for ids alone."""
        self._tokenizer.enable_truncation(max_length)
        encoded = self._tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)
        return {"input_ids": [one.ids for one in encoded]}


def load_plain(folder: Path, device: str = "auto") -> tuple[nn.Module, PlainTokenizer] | None:
    """The model of the adapter in `folder`, and its tokenizer; None: it is for the long way.

    Raises:
        ResourceError: there is no such device.
    """
    if select_device(device).type != "cpu":
        return None
    try:
        return _loaded(folder)
    except Exception:  # whatever is wrong, the long way knows how to say it
        return None


def _loaded(folder: Path) -> tuple[nn.Module, PlainTokenizer]:
    saved = read_adapter(folder)
    model: ModelConfig = saved["model"]
    place = Path(model_location(model.name))
    if saved["pairs"] or not saved["digest"]:
        raise _Differs
    tokenizer = PlainTokenizer(place / "tokenizer.json")
    encoder = _encoder(place)
    if digest_of(encoder, tokenizer.id) != saved["digest"]:
        raise _Differs
    for layer in encoder.modules():
        if isinstance(layer, (nn.Linear, nn.Embedding)):
            # bitsandbytes reads such rows' blocks in another way than it made them.
            if model.quantization == "nf4" and isinstance(layer, nn.Linear) and layer.in_features % 64:
                raise _Differs
            layer.weight.data = as_stored(layer, model.quantization)
    stack, labels = EncoderStack(encoder), saved["label_names"]
    classifier = EncoderClassifier(stack, len(labels), model.pooling, normalize=model.normalize)
    _adapt(classifier, folder)
    return classifier.train(False).requires_grad_(False), tokenizer


def _encoder(folder: Path) -> _Encoder:
    """The encoder of a model's folder, in float32."""
    from safetensors.torch import load_file

    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    as_bert = all(described.get(key, worth) == worth for key, worth in _AS_BERT.items())
    if described["model_type"] not in _KINDS or not as_bert or "hidden_act" not in described:
        raise _Differs
    sizes = {key: int(described[key]) for key in _SIZES}
    config = _Config(described["model_type"], **sizes, layer_norm_eps=float(described["layer_norm_eps"]))
    encoder = _Encoder(config)
    wanted = set(encoder.state_dict())
    found = {}
    for key, value in load_file(folder / "model.safetensors").items():
        name = key if key in wanted else key.partition(".")[2]  # of a model with a head: bert.NAME
        if name in wanted:
            found[name] = value.float()
    encoder.load_state_dict(found, assign=True)
    return encoder


def _adapt(classifier: EncoderClassifier, folder: Path) -> None:
    """Puts the adapter in `folder` on its base."""
    from safetensors.torch import load_file

    settings: Mapping[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    odd = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias")
    if settings["peft_type"] != "LORA" or any(settings.get(key) for key in odd):
        raise _Differs
    found = load_file(folder / "adapter_model.safetensors")
    # With the biases PEFT saves those of the head that it has replaced, and of the new one once more.
    weights = {
        name.removeprefix("base_model.model."): value
        for name, value in found.items()
        if ".original_module." not in name and ".modules_to_save." not in name
    }
    scale = settings["lora_alpha"] / settings["r"]
    own = dict(classifier.named_parameters())
    for name in [name for name in weights if name.endswith(".lora_A.weight")]:
        place = name.removesuffix(".lora_A.weight")
        a, b = weights.pop(name), weights.pop(f"{place}.lora_B.weight")
        parent, _, child = place.rpartition(".")
        linear = classifier.get_submodule(place)
        if not isinstance(linear, nn.Linear) or a.shape[1] != linear.in_features:
            raise _Differs
        if b.shape[0] != linear.out_features:
            raise _Differs
        setattr(classifier.get_submodule(parent), child, _LowRank(linear, a, b, scale))
    for name, value in weights.items():  # head, centre, biases
        if own[name].shape != value.shape:
            raise _Differs
        own[name].data.copy_(value)
