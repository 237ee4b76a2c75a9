"""The steps that change a model: prune and distill. Each gives a smaller model that has learnt from the
original.

`State` is a model on its way: its layers' places in the original say which state of the original each of
them has to give. A layer takes over the work of those that went after it, so its own is compared with the
original's before the next layer that stayed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils import prune as torch_prune

from fedtune.compress.importance import choose, importance, least_layers
from fedtune.compress.transfer import Advance, Inputs, Teacher, forward, learn
from fedtune.config.compression import Compression
from fedtune.config.schema import ModelConfig
from fedtune.errors import ModelError
from fedtune.models.encoder import load_encoder_config, load_pretrained, load_tokenizer
from fedtune.models.modeling_fedtune import FedtuneForSequenceClassification, layers_of
from fedtune.models.surgery import Kept, anatomy, cut, encoder_of
from fedtune.serving.classifier import Forward

__all__ = ["Lesson", "State", "distill", "prune", "shown", "states_forward"]

_ASKED = 512  # texts that say what matters


@dataclass(frozen=True)
class Lesson:
    """What a model learns from.

    Attributes:
        original: the model before any step; the teacher of all of them.
        vocabulary: of its tokenizer.
        ids: of the texts as they are.
        more: of the texts and of their altered copies.
        inputs: how they become what a model is asked.
        told: what the original said of `more`, by the layers that were asked about: two steps that compare
            the same ones ask once.
    """

    original: nn.Module
    vocabulary: dict[str, int]
    ids: Sequence[Sequence[int]]
    more: Sequence[Sequence[int]]
    inputs: Inputs
    told: dict[tuple[int, ...], Teacher] = field(default_factory=dict)


@dataclass(frozen=True)
class State:
    """A model on its way.

    Attributes:
        model: as it is now.
        places: of its layers, in the original.
        last: of the original's layers.
        loss: the mean of the last epoch, of the step that made it; NaN where nothing was learnt.
        what: the step that made it, in words.
        seconds: it took.
        notes: what must not go unsaid.
    """

    model: nn.Module
    places: tuple[int, ...]
    last: int
    loss: float = float("nan")
    what: str = ""
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def targets(self) -> list[int]:
        """After which layers of the original its own layers' states should be."""
        return [*(place - 1 for place in self.places[1:]), self.last]


def prune(state: State, lesson: Lesson, settings: Compression, advance: Advance) -> State:
    """Cuts out what matters least on the lesson's texts, or puts the smallest weights to 0; then it learns
    again.

    Raises:
        ModelError: there are not so many layers, or a bare encoder has no place for fewer heads.
    """
    if settings.prune.method == "unstructured":
        return _sparse(state, lesson, settings, advance)
    whole = anatomy(state.model)
    wanted = settings.prune
    if wanted.layers >= whole.layers:
        raise ModelError(
            f"prune.layers={wanted.layers} would leave nothing: the model has {whole.layers} layers. Give at "
            f"most {whole.layers - 1}."
        )
    some = list(lesson.ids[:_ASKED])
    model, places = state.model, state.places
    if wanted.layers:
        stay = least_layers(model, wanted.layers, some, lesson.inputs)
        model, places = cut(model, Kept.all_of(stay, whole)), tuple(places[layer] for layer in stay)
    if wanted.heads or wanted.units:
        heads, units = importance(model, some, lesson.inputs, settings.seed)
        even = encoder_of(model) is model  # whose configuration has one number for all layers
        model = cut(
            model,
            Kept(
                tuple(range(len(places))),
                choose(heads, wanted.heads),
                choose(units, wanted.units, even=even),
            ),
        )
    now = anatomy(model)
    what = (
        f"pruned: {whole.layers - now.layers} of {whole.layers} layers, "
        f"{sum(whole.heads) - sum(now.heads)} of {sum(whole.heads)} heads and "
        f"{sum(whole.units) - sum(now.units):,} of {sum(whole.units):,} feed-forward units cut out"
    )
    return _learnt(replace(state, model=model, places=places, what=what), lesson, settings, advance)


def _sparse(state: State, lesson: Lesson, settings: Compression, advance: Advance) -> State:
    model = copy.deepcopy(state.model)
    parts = [
        (module, "weight")
        for module in layers_of(encoder_of(model)).modules()
        if isinstance(module, nn.Linear)
    ]
    torch_prune.global_unstructured(parts, torch_prune.L1Unstructured, amount=settings.prune.weights)
    what = f"pruned: {settings.prune.weights:.0%} of the weights of the layers' matrices, the smallest, are 0"
    made = _learnt(replace(state, model=model, what=what), lesson, settings, advance)
    for module, name in parts:
        torch_prune.remove(module, name)  # the zeros become the weights
    return made


def distill(
    state: State, lesson: Lesson, settings: Compression, labels: Sequence[str], advance: Advance
) -> State:
    """A student of fewer layers, or from another encoder, learns from the original.

    Args:
        labels: of the original; empty for a bare encoder.

    Raises:
        ModelError: the student is not smaller, has another vocabulary or other labels, or is no encoder.
    """
    if settings.distill.student is not None:
        return _other_student(state, lesson, settings, labels, advance)
    whole, wanted = anatomy(state.model), settings.distill.layers or 0
    if wanted >= whole.layers:
        raise ModelError(
            f"distill.layers={wanted}: the model has {whole.layers} layers, and a student is smaller. Give "
            f"at most {whole.layers - 1}."
        )
    stay = tuple(number * whole.layers // wanted for number in range(wanted))
    model = cut(state.model, Kept.all_of(stay, whole))
    places = tuple(state.places[layer] for layer in stay)
    numbers = ", ".join(str(layer + 1) for layer in stay)
    what = f"distilled: a student of {wanted} of {whole.layers} layers ({numbers})"
    return _learnt(replace(state, model=model, places=places, what=what), lesson, settings, advance)


def shown(name: str | None) -> str | None:
    """A hub name; of a folder its last part: the rest says something of this machine."""
    return Path(name).name if name is not None and Path(name).expanduser().exists() else name


def _other_student(
    state: State, lesson: Lesson, settings: Compression, labels: Sequence[str], advance: Advance
) -> State:
    name = str(settings.distill.student)
    said = shown(name)
    base, teacher = ModelConfig(name=name), lesson.original
    config = load_encoder_config(base)
    own = [str(one) for one in (config.id2label or {}).values()]
    if str((config.architectures or [""])[0]).endswith("ForSequenceClassification") and own != list(labels):
        raise ModelError(
            f"distill.student={said} is a classifier of other labels ({', '.join(own)}; the model's are "
            f"{', '.join(labels)}). Name the encoder that it was made of."
        )
    if load_tokenizer(base)[0].get_vocab() != lesson.vocabulary:
        raise ModelError(
            f"distill.student={said} has another vocabulary than the model, and the exported tokenizer is "
            "the model's. Name a student with the same tokenizer, or take some of the model's layers: "
            "distill.layers=2."
        )
    encoder = load_pretrained(base)
    sizes = [sum(p.numel() for p in encoder_of(one).parameters()) for one in (encoder, teacher)]
    if sizes[0] >= sizes[1]:
        raise ModelError(
            f"distill.student={said} has {sizes[0]:,} numbers and the model's encoder {sizes[1]:,}: a "
            "student is smaller. Name a smaller encoder, or give distill.layers=2."
        )
    same = encoder.config.hidden_size == encoder_of(teacher).config.hidden_size  # type: ignore[union-attr]
    model = _classifier(encoder, teacher, same=bool(same))
    count = anatomy(model).layers
    places = tuple(number * (state.last + 1) // count for number in range(count))
    notes = () if same else (
        f"States after layers were not compared: {said} has another width than the model.",
    )  # fmt: skip
    made = State(model, places, state.last, what=f"distilled: a student from {said}", notes=notes)
    without = replace(settings, transfer=replace(settings.transfer, hidden=0.0))
    return _learnt(made, lesson, settings if same else without, advance, embeddings=True)


def _classifier(encoder: nn.Module, teacher: nn.Module, *, same: bool) -> nn.Module:
    """`encoder` with a head of the teacher's make; with its numbers if the width is the `same`."""
    if not isinstance(teacher, FedtuneForSequenceClassification):
        if not same:
            raise ModelError(
                "A base encoder has nothing but its states to learn from, so its student needs the same "
                "width. Take some of its layers: distill.layers=2."
            )
        return encoder.eval()
    about: Any = copy.deepcopy(teacher.config)
    about.encoder, about.cut = encoder.config, None
    model = FedtuneForSequenceClassification(about)
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    if same:
        state |= {k: v for k, v in teacher.state_dict().items() if not k.startswith("encoder.")}
    known = model.state_dict()
    model.load_state_dict({**known, **{name: value for name, value in state.items() if name in known}})
    return model.eval()


def _learnt(
    state: State, lesson: Lesson, settings: Compression, advance: Advance, *, embeddings: bool = False
) -> State:
    """`state` after it has learnt from the original."""
    if not settings.transfer.epochs:
        return replace(state, loss=float("nan"))
    compared = state.targets if settings.transfer.hidden else []
    count = settings.transfer.epochs * -(-len(lesson.more) // settings.transfer.batch)
    ask = len(lesson.more)

    def part(begin: int, scale: float) -> Advance:
        return lambda done, whole: advance(round(begin + scale * done), ask + count)

    teacher = lesson.told.get(tuple(compared))
    if teacher is None:
        teacher = Teacher.ask(lesson.original, lesson.more, compared, lesson.inputs, part(0, 1.0))
        lesson.told[tuple(compared)] = teacher
    own = list(range(len(state.places))) if compared else []
    loss = learn(
        state.model,
        teacher,
        own,
        settings.transfer,
        settings.seed,
        lesson.inputs,
        part(ask, 1.0),
        embeddings=embeddings,
    )
    return replace(state, loss=loss)


def states_forward(model: nn.Module) -> Forward:
    """A bare encoder that gives its mean token states, at length one, float32 [b, d]."""
    last = [anatomy(model).layers - 1]

    def run(ids: NDArray[np.int64], mask: NDArray[np.int64]) -> NDArray[np.float32]:
        with torch.inference_mode():
            batch = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
            _, states = forward(model, batch, last)
        assert states is not None
        found: NDArray[np.float32] = states[:, 0].numpy()
        return found

    return run
