"""Whether what was exported says what the run's model says: on public texts, each format against the
original.

The original is what `fedtune predict` asks: the run's own base, compressed as it was trained on, with its
adapter through PEFT. Texts are those of the public test split of the run, or a file that whoever exports
names, or, where there is neither, words of the tokenizer in no order: those show whether the arithmetic is
right, and little about labels of real texts.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.data.corpus import Corpus
from fedtune.errors import ConfigError, DataError, FedtuneError, ModelError, ResourceError
from fedtune.runs.predict import Asked, check_texts
from fedtune.serving.evaluation import asked_of

__all__ = [
    "LABELS_EQUAL",
    "TOLERANCE",
    "CheckTexts",
    "agreement",
    "asked_in",
    "calibration_texts",
    "check_texts_of",
    "lines_of",
    "of_pairs",
    "own_texts",
    "parts",
    "plain",
    "public_test_split",
    "refuse_if_wrong",
]

TOLERANCE = 1e-3  # of a logit, for formats in float32; the arithmetic is the same, its order is not
LABELS_EQUAL = 0.99  # share of labels, for int8
_MADE_UP = 256
_CALIBRATION = 512  # texts are enough for ranges


@dataclass(frozen=True)
class CheckTexts:
    """What is asked.

    Attributes:
        texts: n texts, or pairs of them.
        source: what they are, in words.
        labels: int64 [n], where they are known.
        sites: str [n], where they are known.
    """

    texts: tuple[Asked, ...]
    source: str
    labels: NDArray[np.int64] | None = None
    sites: NDArray[np.str_] | None = None


def check_texts_of(
    record: Mapping[str, Any], named: Path | None, vocabulary: Mapping[str, int], site: str | None = None
) -> CheckTexts:
    """The texts to check with.

    Args:
        record: of the run.
        named: a file with one text a line (of pairs: two, with a tab between); None: the run's public test
            split, if it can be read here.
        vocabulary: of the tokenizer.
        site: whose model is checked: of the test split its own texts, where it has some.

    Raises:
        DataError: the file that was named has no texts, or no pairs.
        ResourceError: it cannot be read.
    """
    pairs = of_pairs(record)
    if named is not None:
        return CheckTexts(asked_in(named, pairs), "texts that were given for the check")
    try:
        public = public_test_split(record)
    except (FedtuneError, OSError) as error:
        why = f", since the run's test split cannot be read here ({type(error).__name__})"
    else:
        if public is not None:
            source = "the run's public test split"
            if site is not None and public.sites is not None and np.any(public.sites == site):
                public = public.subset(np.flatnonzero(public.sites == site))
                source = f"the part of {site} in {source}"
            return CheckTexts(tuple(asked_of(public)), source, public.labels, public.sites)
        why = ", since the run has no public test split"
    chance = random.Random(0)
    words = sorted(word for word in vocabulary if word.isalpha())
    texts = [" ".join(chance.choices(words, k=chance.randint(3, 20))) for _ in range(2 * _MADE_UP)]
    half = texts[:_MADE_UP]
    made_up: tuple[Asked, ...] = tuple(zip(half, texts[_MADE_UP:], strict=True)) if pairs else tuple(half)
    return CheckTexts(made_up, f"made-up texts of the tokenizer's words{why}")


def of_pairs(record: Mapping[str, Any]) -> bool:
    """Whether the run was trained on pairs of texts."""
    return bool(record["config"]["data"].get("text_pair"))


def asked_in(path: Path, pairs: bool) -> tuple[Asked, ...]:
    """The lines of a file, each a text; with `pairs` each of them two, with a tab between.

    Raises:
        DataError: there are none, a line is no pair, or the file is no text in UTF-8.
        ResourceError: it cannot be read.
    """
    lines = lines_of(path)
    if not pairs:
        return tuple(lines)
    found = []
    for number, line in enumerate(lines, start=1):
        first, _, second = line.partition("\t")
        if not first.strip() or not second.strip():
            raise DataError(
                f"Line {number} of {path.name} is no pair, and the run was trained on pairs of texts. Write "
                "the first text, a tab and the second one on each line."
            )
        found.append((first, second))
    return tuple(found)


def lines_of(path: Path) -> list[str]:
    """The texts of a file that has one a line, empty lines left out.

    Raises:
        DataError: there are none, or it is no text in UTF-8.
        ResourceError: it cannot be read.
    """
    try:
        texts = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise ResourceError(
            f"Cannot read {path}: {error.strerror or error}. Name a file of texts."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    if not texts or any("\0" in text for text in texts):
        raise DataError(
            f"{path} {'holds no text' if not texts else 'is no text: it holds null bytes'}. "
            "Name a file with one text a line."
        )
    check_texts(texts)
    return texts


def public_test_split(record: Mapping[str, Any]) -> Corpus | None:
    """The test split that the run was evaluated on; None unless its owner declared it public.

    Raises:
        DataError: it is not there any more, or has other labels.
        ResourceError: it cannot be read.
    """
    from fedtune.config.choices import resolved
    from fedtune.config.convert import from_dict
    from fedtune.data.sources.load import load_corpus

    config = from_dict(dict(record["config"]))
    declared = config.data.public or (config.data.test_public and config.data.test_split is not None)
    if not declared or resolved(config).federation.evaluation != "public":
        return None
    _, test = load_corpus(config.data, config.seed)
    if test.label_names != tuple(record["data"]["labels"]):
        raise DataError("its label set is not the run's any more")
    return test


def calibration_texts(record: Mapping[str, Any], named: Path | None) -> tuple[list[Asked], str]:
    """The texts that static int8 takes its ranges from, and what they are, in words: public ones, for a file
    with the ranges tells of them.

    Args:
        record: of the run.
        named: a file with one public text a line (of pairs: two, with a tab between); None: training texts of
            the run, if they are public.

    Raises:
        DataError: the file has no texts or no pairs, or private training texts of the run.
        ConfigError: none is named, and those of the run are private or cannot be read here.
        ResourceError: the file cannot be read.
    """
    if named is not None:
        lines = list(asked_in(named, of_pairs(record)))
        shared, _ = own_texts(record, [text for one in lines for text in parts(one)])
        if shared and record["privacy"].get("data_public") is not True:
            raise DataError(
                f"{shared:,} of the texts in the {len(lines):,} lines of {named.name} are private training "
                "texts of this run. The ranges in a file of static int8 would tell of them what no ledger "
                "was charged for, and a charged way is not supported. Name public texts (--calibrate FILE), "
                "or take the format that needs none: --format onnx-int8."
            )
        where = f"{named.name}, which was named as public"
    else:
        train = _training_data(record) if record["privacy"].get("data_public") is True else None
        if train is None:
            raise ConfigError(
                "Static int8 takes its ranges from texts, which have to be public, and those that this run "
                "learnt from are private or cannot be read here. Name public texts, one a line (--calibrate "
                "FILE), or take the format that needs none: --format onnx-int8."
            )
        lines, where = list(asked_of(train)), "the run's training texts, which are public"
    some = random.Random(0).sample(lines, min(len(lines), _CALIBRATION))
    return some, f"{len(some):,} of {where}"


def own_texts(record: Mapping[str, Any], lines: Sequence[str]) -> tuple[int, bool]:
    """How many of `lines` are training texts of the run; and whether those could be read here to compare."""
    train = _training_data(record)
    own = set() if train is None else {plain(text) for one in asked_of(train) for text in parts(one)}
    return sum(plain(line) in own for line in lines), train is not None


def parts(asked: Asked) -> tuple[str, ...]:
    """The text, or both of a pair."""
    return asked if isinstance(asked, tuple) else (asked,)


def plain(text: str) -> str:
    """A text as it is compared with others: whatever its capitals and blanks."""
    return " ".join(text.casefold().split())


def _training_data(record: Mapping[str, Any]) -> Corpus | None:
    """What the run was trained on; None where it cannot be read here."""
    from fedtune.config.convert import from_dict
    from fedtune.data.sources.load import load_corpus

    try:
        return load_corpus(from_dict(dict(record["config"])).data, int(record["config"]["seed"]))[0]
    except (FedtuneError, OSError):
        return None


def agreement(
    original: NDArray[np.float32], found: NDArray[np.float32], labels: NDArray[np.int64] | None
) -> dict[str, Any]:
    """Figures of one format: logits [n, c] that it gives, beside those of the original."""
    said = found.argmax(1)
    return {
        "largest_difference": float(np.abs(found - original).max()),
        "labels_equal": float((said == original.argmax(1)).mean()),
        "accuracy": None if labels is None else float((said == labels).mean()),
    }


def refuse_if_wrong(name: str, figures: Mapping[str, Any]) -> None:
    """Raises `ModelError` if a format in float32 gives other logits than the original: then it is broken."""
    if not figures["largest_difference"] <= TOLERANCE:  # NaN too
        raise ModelError(
            f"The {name} format is not what was trained: a logit differs by "
            f"{figures['largest_difference']:.3g} where {TOLERANCE:g} is allowed, and "
            f"{figures['labels_equal']:.1%} of the labels are equal. Nothing was exported. Leave this "
            "format out (--format), and report it with the versions of torch, transformers and "
            "onnxruntime."
        )
