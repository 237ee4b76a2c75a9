"""What `fedtune compress` does, as settings: a page of `conf/compress/`, and what the command line changes
in it.

Each setting stands here once, with type, range and meaning; help, checks and messages follow from that, as
for those of a run (`fedtune.config.schema`). `load` refuses steps in an order that makes no sense, before
anything is loaded.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import yaml

from fedtune.config.convert import (
    build,
    nearest,
    parse_yaml,
    read_yaml,
    settings,
    unknown_setting,
    value_text,
)
from fedtune.config.pages import conf_dir, group_options
from fedtune.config.schema import Before, Group, Text, as_tuple, setting
from fedtune.errors import ConfigError

__all__ = [
    "GROUP",
    "PAGE",
    "Compression",
    "Distill",
    "Prune",
    "Quantization",
    "Transfer",
    "load",
    "pages_text",
]

GROUP = "compress"
PAGE = "student"  # where none is named
Step = Literal["prune", "distill", "quantize"]
Quantization = Literal["int8", "int8-weights", "nf4"]


@dataclass
class Prune(Group):
    """What is cut out of the model."""

    method: Literal["structured", "unstructured"] = setting(
        "structured",
        "structured: heads, units and layers are cut out, so that it gets smaller and faster; "
        "unstructured: the smallest weights become 0, which dense arithmetic is no faster with",
    )
    heads: float = setting(0.0, "structured: share of the attention heads that go", ge=0, lt=1)
    units: float = setting(0.0, "structured: share of the feed-forward units that go", ge=0, lt=1)
    layers: int = setting(0, "structured: how many whole layers go", ge=0)
    weights: float = setting(0.0, "unstructured: share of the encoder's weights that become 0", ge=0, lt=1)


@dataclass
class Distill(Group):
    """The student that learns from the model (Hinton et al. 2015)."""

    layers: int | None = setting(
        None, "a student of so many of the model's own layers, evenly spaced; null: `student`", ge=1
    )
    student: Text | None = setting(
        None, "a smaller encoder to start from: hub name, folder, or embedded:minilm"
    )


@dataclass
class Transfer(Group):
    """How what was cut learns again: from the model as it was before, on texts without labels."""

    epochs: int = setting(3, "passes over the texts; 0: it does not learn again", ge=0)
    batch: int = setting(32, "texts in a step", ge=1)
    learning_rate: float = setting(2e-4, "of AdamW, falling to 0", gt=0, lt=1)
    temperature: float = setting(2.0, "by which logits are divided before they are compared", gt=0)
    hidden: float = setting(
        1.0,
        "weight of the distance between mean token states after each layer that both have (after Sun et al. "
        "2019, who take the first token's)",
        ge=0,
    )
    augment: int = setting(
        4, "altered copies of each text: words masked, replaced, or a part alone (Tang et al. 2019)", ge=0
    )


@dataclass
class Compression(Group):
    """One compression, complete."""

    steps: Annotated[tuple[Step, ...], Before(as_tuple)] = setting(
        ("distill", "quantize"), "what is done, in this order"
    )
    quantize: Annotated[tuple[Quantization, ...], Before(as_tuple)] = setting(
        ("int8",),
        "int8: integer products, small and fast; int8-weights, nf4: integers in the file alone, expanded for "
        "float products",
    )
    texts: Text | None = setting(
        None,
        "a file of public or unlabelled texts to learn from, one a line; null: a part of the run's public "
        "test split",
    )
    share: float = setting(
        0.5, "of the public test split's persons, to learn from; the others are measured on", gt=0, lt=1
    )
    seed: int = setting(0, "of the split, of altered copies and of the order of texts", ge=0, le=2**32 - 1)
    threads: int = setting(1, "of the processor, while it is measured", ge=1)
    prune: Prune = field(default_factory=Prune)
    distill: Distill = field(default_factory=Distill)
    transfer: Transfer = field(default_factory=Transfer)


def load(words: Sequence[str] = ()) -> Compression:
    """The compression that `fedtune compress ... WORDS` does: `compress=PAGE` and `NAME=VALUE`, checked.

    Raises:
        ConfigError: a word is no setting, has a value that is not allowed, or the steps make no sense.
    """
    given: dict[str, str] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise ConfigError(
                f"{word!r} is no setting: settings are written name=value, as in distill.layers=3."
            )
        if name in given:
            raise ConfigError(f"{name} is given twice ({word!r} is the second). Keep one of them.")
        given[name] = text
    page = given.pop(GROUP, PAGE)
    options = group_options(GROUP)
    if page not in options:
        guess = nearest(page, options)
        hint = f" Did you mean {GROUP}={guess}?" if guess else ""
        raise ConfigError(f"There is no {GROUP}={page}.{hint} There are: {', '.join(options)}.")
    values = read_yaml(conf_dir() / GROUP / f"{page}.yaml")
    for name, text in given.items():
        if name not in settings(Compression):
            raise unknown_setting(
                name, settings(Compression), listing="'fedtune compress --help' lists all of them."
            )
        *above, last = name.split(".")
        branch = values
        for part in above:
            branch = branch.setdefault(part, {})
        branch[last] = _value(name, text)
    made = build(Compression, values, "the compression")
    _check(made)
    return made


def _value(name: str, text: str) -> Any:
    kind = settings(Compression)[name].kind
    if kind is str:
        return None if text == "null" else text
    try:
        value = parse_yaml(text)
    except (yaml.YAMLError, RecursionError):
        return text  # which is then refused, with what is allowed
    if kind is float and isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 takes 1e-4 for a text
        except ValueError:
            return value
    return [value] if kind is tuple and isinstance(value, str) else value


def _check(made: Compression) -> None:
    """Refuses what makes no sense together, with the reason."""
    steps, prune, distill = made.steps, made.prune, made.distill
    if not steps:
        raise ConfigError("steps=[] does nothing. Name steps: steps=[distill,quantize].")
    twice = sorted({step for step in steps if steps.count(step) > 1})
    if twice:
        raise ConfigError(f"steps={value_text(steps)} has {' and '.join(twice)} twice. Each is done once.")
    if "quantize" in steps[:-1]:
        raise ConfigError(
            f"steps={value_text(steps)}: quantize comes last. What follows it would train or cut integers, "
            "which have no gradient; write "
            f"steps={value_text([*(s for s in steps if s != 'quantize'), 'quantize'])}."
        )
    if "quantize" in steps and not made.quantize:
        raise ConfigError("quantize=[] names no format. Write quantize=[int8], or leave the step out.")
    if "prune" in steps:
        _check_prune(made)
    if "distill" in steps and distill.layers is not None and distill.student is not None:
        raise ConfigError(
            f"distill.layers={distill.layers} and distill.student are two ways to a student: one of the "
            "model's own layers, or another encoder. For the second add distill.layers=null."
        )
    if "distill" in steps and distill.layers is None and distill.student is None:
        raise ConfigError(
            "distill needs one of distill.layers=N (a student of N of the model's own layers) and "
            "distill.student=NAME (a smaller encoder), and not both."
        )
    if steps[:2] == ("prune", "distill"):
        if prune.method == "unstructured":
            raise ConfigError(
                "steps=[prune,distill] with prune.method=unstructured: to distill trains every weight of the "
                "student, and the zeros would be gone. Write steps=[distill,prune]."
            )
        if distill.student is not None:
            raise ConfigError(
                "steps=[prune,distill] with distill.student: the student starts from another encoder, so "
                "what was pruned would be thrown away. Write steps=[distill,prune]."
            )
    if made.transfer.epochs == 0 and "distill" in steps and distill.student is not None:
        raise ConfigError(
            "transfer.epochs=0 with distill.student: the student would never have learnt the task. Give "
            "epochs."
        )


def _check_prune(made: Compression) -> None:
    prune = made.prune
    structured = {"prune.heads": prune.heads, "prune.units": prune.units, "prune.layers": prune.layers}
    unstructured = {"prune.weights": prune.weights}
    own, other = (structured, unstructured) if prune.method == "structured" else (unstructured, structured)
    if not any(own.values()):
        raise ConfigError(
            f"prune.method={prune.method} would cut nothing: give {' or '.join(own)}, as in "
            f"{next(iter(own))}=0.33."
        )
    wrong = [name for name, value in other.items() if value]
    if wrong:
        raise ConfigError(
            f"{' and '.join(wrong)} is not for prune.method={prune.method}, which takes {', '.join(own)}."
        )
    if prune.layers and "distill" in made.steps and made.distill.layers is not None:
        raise ConfigError(
            "prune.layers and distill.layers both take layers out. Keep distill.layers, and prune heads or "
            "units."
        )


def pages_text(width: int = 76) -> str:
    """The pages of conf/compress/, each with the first sentence of its comment."""
    lines = []
    for name in group_options(GROUP):
        comment = [
            line.lstrip("# ").rstrip()
            for line in (conf_dir() / GROUP / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
            if line.startswith("#")
        ]
        about = " ".join(comment[1:]).strip()
        head = f"  {'*' if name == PAGE else ''}{name}"
        lines += textwrap.wrap(about, width, initial_indent=f"{head:<14}", subsequent_indent=" " * 14)
    return "\n".join(lines)
