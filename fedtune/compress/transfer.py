"""A smaller model learns from a larger one, on texts without labels (Hinton et al. 2015).

    loss = t^2 KL(softmax(teacher / t), softmax(student / t))  +  h mean over layers |s_l - t_l|^2

s_l and t_l [d] are the means of a text's token states after a layer, scaled to length one. That second part
is of Sun et al. 2019 ("patient" distillation), who take the first token; these models read the mean. What
the teacher says is computed once. Embeddings are the teacher's and stay so where the student has its width:
they are half of a small BERT's numbers, and say little of the task.

Shapes: n texts, b texts in a batch, s tokens, d width, l layers compared, c classes.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedtune.config.compression import Transfer
from fedtune.errors import ModelError
from fedtune.models.encoder import autocast
from fedtune.models.modeling_fedtune import layers_of
from fedtune.models.surgery import encoder_of
from fedtune.serving.classifier import segments, token_batches

__all__ = ["Advance", "Inputs", "Teacher", "forward", "learn", "pooled_states"]

Advance = Callable[[int, int], None]  # (steps done, steps in all)
_CPU = torch.device("cpu")
_TOKENS = 4096  # of a batch that the teacher is asked about


@dataclass(frozen=True)
class Inputs:
    """How token ids become what a model is asked.

    Attributes:
        pad: the token that fills up.
        separator: of a model of pairs, as of `fedtune.serving.classifier.segments`; else None.
    """

    pad: int
    separator: int | None = None

    def batch(self, ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Token ids [b, s], their mask and, of pairs, their segments; s is rounded up to a multiple of 8, so
        that shapes are few."""
        longest = -(-max(len(one) for one in ids) // 8) * 8
        tokens = torch.full((len(ids), longest), self.pad, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for row, one in enumerate(ids):
            tokens[row, : len(one)] = torch.tensor(one)
            mask[row, : len(one)] = 1
        found = {"input_ids": tokens, "attention_mask": mask}
        if self.separator is not None:
            parts = segments(tokens.numpy(), mask.numpy(), self.separator)
            found["token_type_ids"] = torch.from_numpy(parts)
        return found


@dataclass(frozen=True)
class Teacher:
    """What the larger model says of each text.

    Attributes:
        ids: token ids of n texts.
        logits: float32 [n, c]; None of a bare encoder.
        states: float32 [n, l, d], scaled; None where they are not compared.
    """

    ids: Sequence[Sequence[int]]
    logits: Tensor | None
    states: Tensor | None

    @classmethod
    @torch.inference_mode()
    def ask(
        cls,
        model: nn.Module,
        ids: Sequence[Sequence[int]],
        layers: Sequence[int],
        inputs: Inputs,
        advance: Advance,
    ) -> Teacher:
        """What `model` says of `ids`; `layers`: after which of its layers to keep the state."""
        logits: Tensor | None = None
        states: Tensor | None = None
        done = 0
        for rows in token_batches([len(one) for one in ids], _TOKENS):
            with autocast(_CPU, "auto"):
                said, found = forward(model, inputs.batch([ids[row] for row in rows]), layers)
            if said is not None:
                logits = torch.zeros(len(ids), said.shape[1]) if logits is None else logits
                logits[rows] = said
            if found is not None:
                states = torch.zeros(len(ids), *found.shape[1:]) if states is None else states
                states[rows] = found
            done += len(rows)
            advance(done, len(ids))
        return cls(ids, logits, states)


def pooled_states(hidden: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Token states [b, s, d] after l layers -> their means over a text's tokens, at length one, [b, l, d]."""
    weights = mask.float()[..., None]
    means = [(one.float() * weights).sum(1) / weights.sum(1) for one in hidden]
    return functional.normalize(torch.stack(means, 1), dim=-1)


def forward(
    model: Any, batch: Mapping[str, Tensor], layers: Sequence[int]
) -> tuple[Tensor | None, Tensor | None]:
    """Of a `batch` as `Inputs` makes it: logits [b, c] (None of a bare encoder), and pooled states [b, l, d]
    after `layers` (None: of none)."""
    kept: dict[int, Tensor] = {}
    hooks = []
    stack = layers_of(encoder_of(model))
    for layer in layers:

        def keep(module: Any, inputs: Any, output: Any, layer: int = layer) -> None:
            kept[layer] = output[0] if isinstance(output, tuple) else output

        hooks.append(stack[layer].register_forward_hook(keep))
    try:
        found = model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    states = pooled_states([kept[one] for one in layers], batch["attention_mask"]) if layers else None
    logits = getattr(found, "logits", None)
    return None if logits is None else logits.float(), states


def learn(
    student: nn.Module,
    teacher: Teacher,
    layers: Sequence[int],
    settings: Transfer,
    seed: int,
    inputs: Inputs,
    advance: Advance,
    *,
    embeddings: bool = False,
) -> float:
    """Trains `student` in place to say what `teacher` says.

    Args:
        layers: of the student, after which its states are compared with the teacher's, in the teacher's
            order.
        advance: is told of each step.
        embeddings: whether they learn too.

    Returns:
        The mean loss of the last epoch; NaN without one.

    Raises:
        ModelError: the loss is no finite number.
    """
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(embeddings or "embeddings." not in name)
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.01)
    chance = random.Random(seed)
    steps = settings.epochs * math.ceil(len(teacher.ids) / settings.batch)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    compared = list(layers) if settings.hidden and teacher.states is not None else []
    step, losses = 0, [math.nan]
    student.eval()  # no dropout: the teacher's answers are soft already, and there are many texts
    for _ in range(settings.epochs):
        losses = []
        for rows in _batches(teacher.ids, settings.batch, chance):
            with autocast(_CPU, "auto"):
                logits, states = forward(student, inputs.batch([teacher.ids[row] for row in rows]), compared)
            loss = _loss(teacher, rows, logits, states, settings)
            if not torch.isfinite(loss):
                raise ModelError(
                    f"The student's loss is {loss.item()} in step {step + 1} of {steps}: what it has learnt "
                    "is lost. Nothing was written. Lower transfer.learning_rate (it is "
                    f"{settings.learning_rate:g}), or look whether the model itself has weights that are no "
                    "numbers."
                )
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            step += 1
            advance(step, steps)
    student.requires_grad_(False)
    return sum(losses) / len(losses)


def _loss(
    teacher: Teacher, rows: list[int], logits: Tensor | None, states: Tensor | None, settings: Transfer
) -> Tensor:
    loss = torch.zeros(())
    if logits is not None and teacher.logits is not None:
        t = settings.temperature
        wanted = (teacher.logits[rows] / t).log_softmax(-1)
        loss = loss + t * t * functional.kl_div(
            (logits / t).log_softmax(-1), wanted, reduction="batchmean", log_target=True
        )
    if states is not None and teacher.states is not None:
        loss = loss + settings.hidden * (states - teacher.states[rows]).square().sum(-1).mean()
    return loss


def _batches(ids: Sequence[Sequence[int]], size: int, chance: random.Random) -> Iterator[list[int]]:
    """All places once, in random order, texts of like length together."""
    order = list(range(len(ids)))
    chance.shuffle(order)
    found = []
    for start in range(0, len(order), size * 16):
        part = sorted(order[start : start + size * 16], key=lambda row: len(ids[row]))
        found += [part[at : at + size] for at in range(0, len(part), size)]
    chance.shuffle(found)
    yield from found
