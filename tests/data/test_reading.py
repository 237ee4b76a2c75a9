"""What a tokenizer makes of texts, and the length that is chosen from public ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fedtune.config.schema import Config, DataConfig, ModelConfig
from fedtune.data.corpus import Corpus
from fedtune.data.reading import Reading, chosen_length, reading_of
from fedtune.data.tokenize import tokenize
from fedtune.models.encoder import load_tokenizer
from tests.data.conftest import WordTokenizer, make_corpus

SENTENCES = {
    "English": "The food was cold when it came, and nobody said a word about it to us.",
    "German": "Das Essen war kalt, als es kam, und niemand hat ein Wort dazu gesagt.",
    "Spanish": "La comida estaba fría cuando llegó, y nadie nos dijo una palabra.",
    "Russian": "Еда была холодной, когда её принесли, и никто не сказал нам ни слова.",
    "Greek": "Το φαγητό ήταν κρύο όταν ήρθε και κανείς δεν μας είπε τίποτα.",
    "Arabic": "كان الطعام باردا عندما وصل ولم يقل لنا أحد كلمة واحدة.",
    "Japanese": "料理が運ばれてきたときには冷めていて、誰も何も言いませんでした。",
    "Korean": "음식이 나왔을 때 이미 식어 있었고 아무도 말해 주지 않았습니다.",
}


def corpus_of(*texts: str) -> Corpus:
    plain = make_corpus(len(texts))
    return dataclasses.replace(plain, texts=texts)


@pytest.mark.parametrize("language", SENTENCES)
def test_a_language_that_the_default_encoder_does_not_know_is_said(language: str, home: Any) -> None:
    config = Config(data=DataConfig(name="mine"))
    tokenizer, name = load_tokenizer(config.model)
    corpus = corpus_of(SENTENCES[language])
    tokens = tokenize(corpus, tokenizer, name, 64)
    notes = reading_of(corpus, tokens, tokenizer, config.data).notes(config)
    known = language in ("English", "German", "Spanish")
    assert (notes == []) == known, notes
    assert known or ("another language" in notes[0] and "model.name" in notes[0])


def test_a_tokenizer_of_bytes_knows_every_letter_and_is_found_out_by_the_pieces() -> None:
    class Bytes(WordTokenizer):
        unk_token_id = 3

        def __call__(self, texts: list[str], pairs: Any, *, max_length: int, **_: Any) -> dict[str, Any]:
            ids = [[0, *(b + 10 for b in t.replace(" ", "").encode()), 2] for t in texts]
            return {"input_ids": [one[:max_length] for one in ids]}

    corpus = corpus_of(SENTENCES["Japanese"], SENTENCES["Russian"])
    tokens = tokenize(corpus, Bytes(), "bytes", 512)
    read = reading_of(corpus, tokens, Bytes(), DataConfig(max_length=512))
    assert read.unknown == 0 and read.tokens_a_letter > 1
    (note,) = read.notes(Config(model=ModelConfig(name="own")))
    assert "tokens a letter" in note


def test_what_is_said_is_counted() -> None:
    def notes(length: int = 32, long_text: Any = "cut", **changes: Any) -> list[str]:
        read = dataclasses.replace(Reading(100, 10, 512, 1000, 50, 0.5), **changes)
        return read.notes(Config(data=DataConfig(name="mine", max_length=length, long_text=long_text)))

    assert notes() == []
    assert "11 of 100 texts" in notes(cut=11)[0] and "data.max_length=64" in notes(cut=11)[0]
    assert "data.long_text=window" in notes(300, cut=11)[0]  # 600 tokens would be refused
    assert "data.max_windows=16" in notes(300, "window", cut=11)[0]
    assert "51 of 1000 tokens (5%)" in notes(unknown=51)[0]
    assert "0.51" in notes(tokens_a_letter=0.51)[0]
    assert len(notes(cut=100, unknown=1000, tokens_a_letter=2.0)) == 2  # unknown and apart are one thing


@pytest.mark.parametrize(
    ("words", "longest", "chosen"),
    [(20, 20, 64), (62, 62, 64), (63, 63, 128), (20, 400, 64), (300, 300, 512), (900, 900, 512)],
)
def test_the_length_is_the_smallest_that_holds_most_of_the_texts(
    tokenizer: WordTokenizer, words: int, longest: int, chosen: int
) -> None:
    """Of a hundred texts four are of `longest` words."""
    corpus = corpus_of(*[" ".join(["word"] * (longest if i < 4 else words)) for i in range(100)])
    length, said = chosen_length(corpus, tokenizer, 512)
    assert length == chosen and f"data.max_length={chosen} was chosen" in said
    assert chosen_length(corpus, tokenizer, 100)[0] == (
        64 if chosen == 64 else 100
    )  # the encoder's own limit


def test_many_texts_are_asked_evenly(tokenizer: WordTokenizer) -> None:
    corpus = corpus_of(*["word " * (20 if i < 2500 else 100) for i in range(5000)])  # short ones first
    assert chosen_length(corpus, tokenizer, 512)[0] == 128
