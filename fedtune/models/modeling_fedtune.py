"""A text classifier that was trained by fedtune, for transformers alone: an exported model ships this file.

transformers' own `...ForSequenceClassification` reads the first token, through a dense layer for some
families. These models take the mean over tokens, see each text's vector from a centre, at one length, and
put a linear head on it. So the folder holds this file, and transformers asks before it runs it:

    model = AutoModelForSequenceClassification.from_pretrained(FOLDER, trust_remote_code=True)

It imports torch and transformers and nothing of fedtune. For inference and further fine-tuning; a loss is
computed where labels are given (cross-entropy).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

__all__ = ["FedtuneConfig", "FedtuneForSequenceClassification", "layers_of"]


class FedtuneConfig(PreTrainedConfig):
    """What a `FedtuneForSequenceClassification` is made of.

    Args:
        encoder: the configuration of the encoder, with its `model_type`.
        pooling: `mean` over the tokens of a text, or `cls`, its first token.
        vector_length: of the vector that the head sees; None: vectors are taken as they are.
        cut: how many `heads` and `units` (of the feed-forward part) each layer has, where some were cut out;
            None: as the encoder's configuration says.
        window: `tokens` that the encoder sees at once of a text, `before` and `after` of them special ones
            around it: a longer text is cut into windows, as even as they can be, and its vector is the mean
            of theirs; None: the encoder sees a text as a whole.
    """

    model_type = "fedtune"
    sub_configs = {"encoder": AutoConfig}

    def __init__(
        self,
        encoder: Any = None,
        pooling: str = "mean",
        vector_length: float | None = None,
        cut: dict[str, list[int]] | None = None,
        window: dict[str, int] | None = None,
        **options: Any,
    ) -> None:
        if isinstance(encoder, dict):
            encoder = AutoConfig.for_model(**encoder)
        self.encoder = encoder
        self.pooling = pooling
        self.vector_length = vector_length
        self.cut = cut
        self.window = window
        super().__init__(**options)


class Centring(nn.Module):
    """Vectors p [b, d] to `length` (u - m) / |u - m|, u = p / |p|: their direction from the centre m [d]."""

    def __init__(self, width: int, length: float) -> None:
        super().__init__()
        self.length = length
        self.centre = nn.Parameter(torch.zeros(width))

    def forward(self, pooled: Tensor) -> Tensor:
        """A vector of zeros stays one."""
        length = torch.linalg.vector_norm(pooled, dim=-1, keepdim=True)
        return self.length * nn.functional.normalize(pooled - length * self.centre, dim=-1)


class FedtuneForSequenceClassification(PreTrainedModel):
    """Encoder, pooling over tokens, each text's vector centred and scaled to one length, linear head.

    Shapes: b texts, s tokens, d width, c classes.
    """

    config_class = FedtuneConfig
    base_model_prefix = "encoder"
    _supports_sdpa = True

    def __init__(self, config: FedtuneConfig) -> None:
        super().__init__(config)
        self.num_labels = len(config.id2label or ())
        # BERT's pooler, which reads the first token, is not made: nothing here looks at it.
        without = {"add_pooling_layer": False} if _has_pooler(config.encoder) else {}
        self.encoder = AutoModel.from_config(config.encoder, **without)
        width = int(config.encoder.hidden_size)
        if config.cut is not None:
            size = width // config.encoder.num_attention_heads
            for layer, heads, units in zip(
                layers_of(self.encoder), config.cut["heads"], config.cut["units"], strict=True
            ):
                _shrink(layer, heads * size, units)
        if config.vector_length is not None:
            self.centring = Centring(width, config.vector_length)
        self.classifier = nn.Linear(width, self.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **options: Any,
    ) -> SequenceClassifierOutput:
        """Logits [b, c] of token ids [b, s] with their mask [b, s], as the tokenizer makes them."""
        if input_ids is None:
            raise ValueError("input_ids are needed")
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        text_of = None
        window = self.config.window
        if window is not None and int(attention_mask.sum(1).max()) > window["tokens"]:
            input_ids, attention_mask, text_of = _in_windows(
                input_ids, attention_mask, **window, pad_id=self.config.encoder.pad_token_id or 0
            )
            token_type_ids = None  # of single texts, which are all of the first segment
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None and getattr(self.config.encoder, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = token_type_ids
        hidden = self.encoder(**inputs).last_hidden_state  # [b, s, d]
        if self.config.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            weights = attention_mask.to(hidden.dtype)[..., None]
            pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1.0)
        if text_of is not None:
            counts = torch.bincount(text_of).to(pooled.dtype)  # [b]
            pooled = pooled.new_zeros(len(counts), pooled.shape[1]).index_add(0, text_of, pooled)
            pooled = pooled / counts[:, None]
        if self.config.vector_length is not None:
            pooled = self.centring(pooled)
        logits = self.classifier(pooled)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def _in_windows(
    ids: Tensor, mask: Tensor, tokens: int, before: int, after: int, pad_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Texts [b, s] -> their windows [w, `tokens` or less], the mask of those, and whose each one is [w].

    A text longer than `tokens` loses the special tokens around it, and each of its windows gets them.
    """
    windows, text_of = [], []
    for text, row in enumerate(ids[number][mask[number].bool()] for number in range(len(ids))):
        content = row[before : len(row) - after]
        count = 1 if len(row) <= tokens else -(-len(content) // (tokens - before - after))
        for part in content.tensor_split(count):  # those with one token more come first
            windows.append(torch.cat([row[:before], part, row[len(row) - after :]]))
            text_of.append(text)
    pad = nn.utils.rnn.pad_sequence
    seen = pad([torch.ones_like(window) for window in windows], batch_first=True)
    rows = pad(windows, batch_first=True, padding_value=pad_id)
    return rows, seen, torch.tensor(text_of, device=ids.device)


def layers_of(encoder: Any) -> nn.ModuleList:
    """The layers of an encoder of transformers' BERT family."""
    layers: nn.ModuleList = (
        encoder.transformer if hasattr(encoder, "transformer") else encoder.encoder
    ).layer
    return layers


def _shrink(layer: Any, inner: int, units: int) -> None:
    """Gives the layer's attention the width `inner`, and its feed-forward part so many `units`."""
    if hasattr(layer, "ffn"):  # DistilBERT
        attention, names, after = layer.attention, ("q_lin", "k_lin", "v_lin"), (layer.attention, "out_lin")
        up, down = (layer.ffn, "lin1"), (layer.ffn, "lin2")
    else:
        attention, names = layer.attention.self, ("query", "key", "value")
        after = (layer.attention.output, "dense")
        up, down = (layer.intermediate, "dense"), (layer.output, "dense")
    width = getattr(*up).in_features
    for holder, name, shape in (
        *((attention, name, (width, inner)) for name in names),
        (*after, (inner, width)),
        (*up, (width, units)),
        (*down, (units, width)),
    ):
        setattr(holder, name, nn.Linear(*shape))


def _has_pooler(config: Any) -> bool:
    return config.model_type in ("bert", "roberta", "xlm-roberta", "camembert", "mpnet", "albert")
