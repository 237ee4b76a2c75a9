"""Which texts a compression learns from, and which it is measured on: never the same, and never private ones.

    learn from    a file that a person names, of public or unlabelled texts; else part of the run's
                  public test split, whose labels are not looked at
    measured on   the public test split: the other part of it (no person is in both), or all of it but
                  what the file has too

What is computed from the released model and from such texts is post-processing (Dwork and Roth 2014,
proposition 2.1): it spends no privacy, and the run's statement stays true as it is. Texts of the nodes are
another thing: a student that learns from them learns about them. So a file that has texts of the run's own
private training data, where that can be read here, is refused; where it cannot be read, whoever names the
file answers for it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedtune.data.sources.load import hold_out
from fedtune.errors import ConfigError, DataError
from fedtune.export.checks import asked_in, lines_of, of_pairs, own_texts, parts, plain, public_test_split
from fedtune.runs.predict import Asked
from fedtune.serving.evaluation import asked_of

__all__ = ["POST_PROCESSING", "Texts", "altered", "texts_for", "texts_of_file"]

POST_PROCESSING = (
    "Everything here was computed from the released model and from texts that are not its training data. "
    "That is post-processing: it spends no privacy, and the guarantee is the run's own."
)
_LEAST = 8  # texts to learn from, or to measure on


@dataclass(frozen=True)
class Texts:
    """What is learnt from, and measured on.

    Attributes:
        learn: texts, or pairs of them, without labels.
        learn_from: what they are, in words.
        measure: texts, or pairs.
        measured_on: what they are, in words.
        labels: int64 [n], of the measured ones; None where nobody knows them.
        sites: str [n], of the measured ones, where they are known.
        notes: what was decided, and must not go unsaid.
    """

    learn: tuple[Asked, ...]
    learn_from: str
    measure: tuple[Asked, ...]
    measured_on: str
    labels: NDArray[np.int64] | None
    sites: NDArray[np.str_] | None
    notes: tuple[str, ...] = ()


def texts_for(record: Mapping[str, Any], named: str | None, share: float, seed: int) -> Texts:
    """The texts of a compression of the run with this `record`.

    Args:
        named: a file of texts to learn from, one a line (of pairs: two, with a tab between); None: `share` of
            the public test split's persons.

    Raises:
        DataError: the file is missing, empty, no text, or has private texts of the run; or the run has no
            public test split.
        ResourceError: it cannot be read.
    """
    public = public_test_split(record)
    if public is None:
        raise DataError(
            "This run has no public test split, so that nothing could be measured, and nothing learnt from. "
            "Name a labelled public test file when you run (data.test_split=test data.test_public=true), or "
            "leave the model as it is: fedtune export."
        )
    if named is None:
        learn, measure = hold_out(public, 1 - share, seed)
        where = "the run's public test split"
        return _checked(
            Texts(
                tuple(asked_of(learn)), f"{share:.0%} of {where}, by persons", tuple(asked_of(measure)),
                f"the rest of {where}, which nothing was learnt from", measure.labels, measure.sites,
            )
        )  # fmt: skip
    lines = asked_in(Path(named).expanduser(), of_pairs(record))
    notes = _own_texts(record, [text for one in lines for text in parts(one)])
    measured = {tuple(map(plain, parts(one))) for one in asked_of(public)}
    learn_lines = tuple(one for one in lines if tuple(map(plain, parts(one))) not in measured)
    if len(learn_lines) < len(lines):
        notes.append(
            f"{len(lines) - len(learn_lines):,} of the {len(lines):,} texts of {Path(named).name} are in the "
            "test split too: they were not learnt from."
        )
    return _checked(
        Texts(
            learn_lines, f"{Path(named).name}, which was named as public or unlabelled",
            tuple(asked_of(public)),
            "the run's public test split", public.labels, public.sites, tuple(notes),
        )
    )  # fmt: skip


def texts_of_file(named: str | None, seed: int) -> Texts:
    """The texts for a base encoder that no run has trained: nine tenths of a file to learn from.

    Raises:
        ConfigError: no file is named.
        DataError, ResourceError: as `texts_for`.
    """
    if named is None:
        raise ConfigError(
            "A base encoder that no run has trained needs public or unlabelled texts to learn from: add "
            "texts=FILE, one text a line."
        )
    lines = list(dict.fromkeys(lines_of(Path(named).expanduser())))
    random.Random(seed).shuffle(lines)
    some = max(1, len(lines) // 10)
    name = Path(named).name
    return _checked(
        Texts(
            tuple(lines[some:]),
            f"nine tenths of {name}",
            tuple(lines[:some]),
            f"a tenth of {name}",
            None,
            None,
        )
    )


def _checked(texts: Texts) -> Texts:
    if min(len(texts.learn), len(texts.measure)) < _LEAST:
        raise DataError(
            f"There are {len(texts.learn)} texts to learn from and {len(texts.measure)} to measure on, and "
            f"each takes {_LEAST} or more. Name a larger file: texts=FILE."
        )
    return texts


def _own_texts(record: Mapping[str, Any], lines: Sequence[str]) -> list[str]:
    """Refuses private training texts of the run among `lines`; notes of what was found or cannot be known."""
    shared, known = own_texts(record, lines)
    if not known:
        return [
            "The run's training data cannot be read here, so that nobody could compare the named texts with "
            "it."
        ]
    if not shared:
        return []
    if record["privacy"].get("data_public") is not True:
        raise DataError(
            f"{shared:,} of the {len(lines):,} texts are private training texts of this run. To learn from "
            "them would tell about them what no ledger was charged for, and a charged way is not supported. "
            "Name texts that are public or nobody's (texts=FILE), or leave texts out: part of the public "
            "test split is taken. To train a smaller model on the nodes' own texts, compress the base first "
            "and then run, which is charged: fedtune compress embedded:minilm -o FOLDER texts=FILE, then "
            "fedtune run model.name=FOLDER."
        )
    return [
        f"{shared:,} of the {len(lines):,} texts to learn from are training texts of the run, which its "
        "owner declared public. Their labels were not looked at; but on other data this would not be free."
    ]


def altered(texts: Sequence[Asked], copies: int, mask: str, seed: int) -> list[Asked]:
    """`copies` altered copies of each text, for a teacher to say what it thinks of them (Tang et al. 2019,
    4.3).

    Of each copy a word in ten is masked, another in ten is one of another text; of a copy in four a part of
    one to five words is left alone. (They replace words by others of the same part of speech; there is no
    tagger here.) Of a pair both texts are altered, each by itself.
    """
    chance = random.Random(seed)
    words = [word for one in texts for text in parts(one) for word in text.split()]

    def copy(text: str) -> str:
        own = text.split()
        if len(own) > 1 and chance.random() < 0.25:
            size = chance.randint(1, min(5, len(own)))
            start = chance.randint(0, len(own) - size)
            return " ".join(own[start : start + size])
        return " ".join(
            mask if draw < 0.1 else chance.choice(words) if draw < 0.2 else word
            for word in own
            for draw in (chance.random(),)
        )

    return [
        (copy(one[0]), copy(one[1])) if isinstance(one, tuple) else copy(one)
        for one in texts
        for _ in range(copies)
    ]
