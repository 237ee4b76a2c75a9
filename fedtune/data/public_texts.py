"""Labelled texts that are public, on which the server trains first (`public.path`).

Whoever names the file declares it public: epsilon says nothing of it. So what is found wrong may be said in
full, and what is most likely a mistake is refused: texts that are among the run's own private ones, or among
those that it is tested on. Texts, and pairs as a whole, are compared as a ledger knows them again, whatever
their capitals, blanks and Unicode form (`fedtune.privacy.ledger.identity`). Where the private texts are
elsewhere, as in a real federation, nobody can compare.

No text is left out because it is private too: what the model starts from would then tell which ones are.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedtune.config.files import meant_path
from fedtune.config.schema import Config
from fedtune.data.corpus import ByteArray, Corpus, TokenizedCorpus
from fedtune.data.sources.columns import Columns, build_corpus
from fedtune.data.sources.files import read_table, readable
from fedtune.data.tokenize import tokenize
from fedtune.errors import DataError, ResourceError

__all__ = ["PublicTexts", "read_public"]

_LEAST = 8  # texts
_MOST_SHARED = 0.01  # of the texts: what short ones have in common by chance
_SHOWN = 8  # classes, in a message


@dataclass(frozen=True, eq=False)
class PublicTexts:
    """What the server trains on first.

    Attributes:
        corpus: the texts, with labels of the run.
        tokens: the same, tokenised as the run's are.
        digest: SHA-256 of the file, 64 hex digits.
        notes: what was decided while reading, and which of them are private texts too.
    """

    corpus: Corpus
    tokens: TokenizedCorpus
    digest: str
    notes: tuple[str, ...]

    def facts(self) -> dict[str, Any]:
        """For a record: the file's digest and how many texts it has."""
        return {"digest": self.digest, "texts": self.corpus.num_records}


def read_public(
    config: Config, label_names: Sequence[str], tokenizer: Any, tokenizer_id: str,
    *, private: TokenizedCorpus, test: TokenizedCorpus,
) -> PublicTexts:  # fmt: skip
    """The texts of `public.path`, checked.

    Args:
        config: names the file and its columns.
        label_names: of the run, in order.
        tokenizer: of the run's encoder.
        tokenizer_id: a string that changes whenever the tokenizer's output may.
        private: what the run trains on, as far as it is here.
        test: what it is tested on, as far as it is here.

    Raises:
        DataError: there is no such file, it cannot be read, has other labels or a class without a text, or
            its texts are among the private or the tested ones.
        ResourceError: it may not be read.
    """
    path = _file(config)
    data, public = config.data, config.public
    named = dataclasses.replace(
        data,
        text=public.text or data.text,
        text_pair=public.text_pair or data.text_pair,
        label=public.label or data.label,
        unit=None,
        site=None,
    )
    table = read_table(path, Columns.of(named, "public"))
    corpus = build_corpus("public", table, Columns.of(named, "public"), label_names, fixed=True)
    _check_enough(corpus, path)
    notes = [*corpus.notes, *_check_apart(corpus, private, test, config, path)]
    tokens = tokenize(corpus, tokenizer, tokenizer_id, data.longest, data.windows)
    return PublicTexts(corpus, tokens, _digest(path), tuple(notes))


def _file(config: Config) -> Path:
    path = Path(str(config.public.path)).expanduser()
    if not path.exists():
        raise DataError(
            f"public.path is {path}, and there is no such file. Name one that exists.{meant_path(path)}"
        )
    if not path.is_file():
        raise DataError(f"public.path is {path}, which is no file. Name the file with the public texts.")
    return readable(path, "public.path")


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ResourceError(f"{path} may not be read: {error.strerror}. Change its permissions.") from error


def _check_enough(corpus: Corpus, path: Path) -> None:
    counts = np.bincount(corpus.labels, minlength=len(corpus.label_names))
    lacking = [name for name, count in zip(corpus.label_names, counts, strict=True) if not count]
    if lacking:
        shown = ", ".join(lacking[:_SHOWN]) + (
            f" and {len(lacking) - _SHOWN} more" if len(lacking) > _SHOWN else ""
        )
        raise DataError(
            f"{len(lacking)} of the {len(corpus.label_names)} classes have no text in {path} (public.path): "
            f"{shown}. A model that starts from it would be sure that no text is theirs. Add a text of each, "
            "or leave public.path out."
        )
    if corpus.num_records < _LEAST:
        raise DataError(
            f"{path} (public.path) holds {corpus.num_records} texts, and to train on it takes {_LEAST} or "
            "more. Add texts, or leave public.path out: the model then starts from the classes' names."
        )


def _check_apart(
    corpus: Corpus, private: TokenizedCorpus, test: TokenizedCorpus, config: Config, path: Path
) -> list[str]:
    """Notes of what public and private texts have in common; refuses where that is more than chance."""
    most = _MOST_SHARED * corpus.num_records
    shared = _shared(corpus, test)
    if shared > most:
        raise DataError(
            f"{shared:,} of the {corpus.num_records:,} texts of {path} (public.path) are among those that "
            "the model is tested on: its accuracy would be that of its memory. Take them out of one of the "
            "two files."
        )
    shared = _shared(corpus, private)
    if not shared:
        return []
    if config.data.public:
        return [
            f"{shared:,} of the {corpus.num_records:,} texts of public.path are training texts of the run, "
            "which its owner declared public."
        ]
    if shared > most:
        raise DataError(
            f"{shared:,} of the {corpus.num_records:,} texts of {path} (public.path) are private training "
            "texts of this run. What the server trains on first is protected by nothing, and no ledger is "
            "charged for it. Name a file of other texts, or leave public.path out. If these texts are public "
            "indeed, take them out of the private data: they need no protection."
        )
    return [
        f"{shared:,} of the {corpus.num_records:,} texts of public.path are among the private training texts "
        "too. Whoever named the file declared them public: epsilon does not hold for them."
    ]


def _shared(corpus: Corpus, other: TokenizedCorpus) -> int:
    """How many of the texts are in `other` too: of pairs, both together.

    The first mark is the whole record's. The further ones, of a pair's texts, depend on how common each is in
    its own corpus.
    """
    known = {row.tobytes() for row in _whole(other.marks)}
    return sum(row.tobytes() in known for row in _whole(corpus.marks))


def _whole(marks: ByteArray) -> ByteArray:
    """Of marks [n, k, 32] or [n, 32] those of the records, [n, 32]."""
    return marks[:, 0] if marks.ndim == 3 else marks
