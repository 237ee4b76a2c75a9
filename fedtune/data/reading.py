"""How well an encoder's tokenizer reads texts: how many are cut, what it does not know, what it takes apart.

What it finds of private texts is for their owner alone. A length is chosen from texts only where they are
public (`chosen_length`); of private ones it would be a release that no epsilon covers.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedtune.config.schema import Config, DataConfig
from fedtune.data.corpus import Corpus, TokenizedCorpus

__all__ = ["Reading", "chosen_length", "reading_of"]

_MANY_CUT, _MANY_UNKNOWN = 0.1, 0.05  # shares of texts and of tokens from which on it is said
_APART = 0.5  # tokens a letter from which on it is said; of a language that a tokenizer knows, 0.2 to 0.35
_IDEOGRAPH = 3  # letters that a Chinese, Japanese or Korean character counts as
_SAMPLE, _BEGINNING = 500, 200  # texts, and characters of each, that tokens a letter are counted in
# Lengths that are chosen from, how many texts the chosen one should hold whole, and how many are asked.
_LENGTHS, _WHOLE, _ASKED = (64, 128, 256, 512), 0.95, 1000


@dataclass(frozen=True)
class Reading:
    """What a tokenizer makes of a corpus; as private as its texts.

    Attributes:
        texts: how many there are.
        cut: how many fill all that is seen of a text.
        limit: tokens that the tokenizer's encoder takes at once.
        words: tokens in all, without the special ones around each text.
        unknown: of these, how many the tokenizer does not know.
        tokens_a_letter: in the beginnings of some texts: tokens over characters that are no blanks; one of
            Chinese, Japanese or Korean counts as three.
    """

    texts: int
    cut: int
    limit: int
    words: int
    unknown: int
    tokens_a_letter: float

    def notes(self, config: Config) -> list[str]:
        """What should not go unsaid before a run of `config` is trained."""
        data, model, found = config.data, config.model.name, []
        if self.cut > _MANY_CUT * self.texts:
            if data.windows > 1:
                seen, more = f" in each of {data.windows} windows", f"data.max_windows={2 * data.windows}"
            elif 2 * data.longest <= self.limit:
                seen = ""
                more = f"data.max_length={2 * data.longest}, or data.long_text=window for much longer texts"
            else:
                seen, more = "", "data.long_text=window"
            found.append(
                f"{self.cut} of {self.texts} texts of {data.name} fill all of data.max_length={data.longest} "
                f"tokens{seen}: what is longer is cut there and not seen. If what tells the class comes "
                f"later, give more ({more}): it is a public setting, and time grows with it."
            )
        other = (
            "It was made for another language or script: name an encoder that knows this one in model.name."
        )
        if self.unknown > _MANY_UNKNOWN * self.words:
            found.append(
                f"{self.unknown} of {self.words} tokens ({self.unknown / self.words:.0%}) of {data.name} are "
                f"unknown to the tokenizer of {model}, so that the encoder cannot tell them apart. {other}"
            )
        elif self.tokens_a_letter > _APART:
            found.append(
                f"The tokenizer of {model} takes the texts of {data.name} apart into "
                f"{self.tokens_a_letter:.2f} tokens a letter; of a language that it knows it is 0.2 to 0.35. "
                f"{other}"
            )
        return found


def reading_of(corpus: Corpus, tokens: TokenizedCorpus, tokenizer: Any, data: DataConfig) -> Reading:
    """What `tokenizer` made of `corpus`: `tokens`, cut as `data` says."""
    unknown_id = getattr(tokenizer, "unk_token_id", None)
    unknown = 0 if unknown_id is None else int(np.count_nonzero(tokens.input_ids == unknown_id))
    special = int(tokenizer.num_special_tokens_to_add(pair=corpus.pairs is not None))
    return Reading(
        texts=tokens.num_records,
        cut=int(np.count_nonzero(tokens.lengths >= data.longest * data.windows)),
        limit=int(getattr(tokenizer, "model_max_length", 0) or 0),
        words=max(1, len(tokens.input_ids) - special * int((-(-tokens.lengths // data.longest)).sum())),
        unknown=unknown,
        tokens_a_letter=_tokens_a_letter(corpus.texts, tokenizer),
    )


def chosen_length(corpus: Corpus, tokenizer: Any, positions: int) -> tuple[int, str]:
    """The `data.max_length` of PUBLIC texts for which none was given, and one line that says so.

    It is the smallest of 64, 128, 256 and 512 tokens that holds 95 percent of them whole, or else the largest
    that the encoder takes; 1,000 texts, evenly spaced, are asked.

    Args:
        corpus: texts that their owner declared public.
        tokenizer: of the encoder.
        positions: tokens that the encoder takes.
    """
    rows = _evenly(corpus.num_records, _ASKED)
    most = min(_LENGTHS[-1], positions)
    encoded = tokenizer(
        [corpus.texts[row] for row in rows],
        None if corpus.pairs is None else [corpus.pairs[row] for row in rows],
        truncation=True,
        max_length=most + 1,
    )["input_ids"]
    lengths = np.array([len(ids) for ids in encoded])
    fitting = [length for length in _LENGTHS if length <= most and np.mean(lengths <= length) >= _WHOLE]
    length = fitting[0] if fitting else most
    return length, (
        f"data.max_length={length} was chosen from the texts, which are public: it holds "
        f"{np.mean(lengths <= length):.0%} of {len(rows)} of them whole. Time grows with it."
    )


def _tokens_a_letter(texts: Sequence[str], tokenizer: Any) -> float:
    beginnings = [texts[row][:_BEGINNING] for row in _evenly(len(texts), _SAMPLE)]
    if not beginnings:
        return 0.0
    encoded = tokenizer(beginnings, None, truncation=True, max_length=4 * _BEGINNING)["input_ids"]
    special = int(tokenizer.num_special_tokens_to_add(pair=False))
    letters = sum(_letters(text) for text in beginnings)
    return sum(len(ids) - special for ids in encoded) / max(1, letters)


def _letters(text: str) -> int:
    plain = [letter for letter in text if not letter.isspace()]
    if text.isascii():
        return len(plain)
    return sum(_IDEOGRAPH if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in plain)


def _evenly(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)).tolist() if count else []
