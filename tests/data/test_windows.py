"""How a long text is cut into windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.config.loader import load
from fedtune.config.schema import ModelConfig
from fedtune.data.batches import pad
from fedtune.data.tokenize import encoded, tokenize
from fedtune.data.windows import Windows, in_windows, window_sizes
from fedtune.errors import ConfigError
from fedtune.models.encoder import load_tokenizer
from tests.data.conftest import make_corpus
from tests.support.tiny_federation import make_model


@given(
    content=st.integers(1, 300), most=st.integers(4, 20), before=st.integers(0, 1), after=st.integers(0, 2)
)
def test_windows_are_even_and_hold_all_of_a_text_once(
    content: int, most: int, before: int, after: int
) -> None:
    text = list(range(100, 100 + content))
    begin, end = [1] * before, [2] * after
    ids = in_windows([*begin, *text, *end], before, after, most)
    sizes = window_sizes(len(ids), most)
    assert sum(sizes) == len(ids) and max(sizes) <= most and max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-content // (most - before - after))  # no more of them than are needed
    found, start = [], 0
    for size in sizes:
        window = ids[start : start + size]
        assert window[:before] == begin and window[size - after :] == end
        found += window[before : size - after]
        start += size
    assert found == text


def test_of_a_corpus(home: Path, tmp_path: Path) -> None:
    tokenizer, name = load_tokenizer(ModelConfig(name=str(make_model(tmp_path / "model"))))
    corpus = make_corpus(12)
    cut, windows = tokenize(corpus, tokenizer, name, 8), tokenize(corpus, tokenizer, name, 8, 3)
    whole = tokenize(corpus, tokenizer, name, 64)
    rows = Windows.of(windows)
    assert Windows.of(cut) is None and rows is not None
    assert whole.lengths.max() > 3 * 6 + 2  # more than three windows hold
    for record in range(12):
        ids = whole.tokens(record)[1:-1]
        mine, _ = rows.of_records(np.array([record]))
        assert len(mine) == min(3, -(-len(ids) // 6))
        padded, mask = pad(rows, mine, 8)
        assert np.concatenate([row[seen][1:-1] for row, seen in zip(padded, mask, strict=True)]).tolist() == (
            ids[:18].tolist()
        )
        if len(mine) == 1:
            assert windows.tokens(record).tolist() == cut.tokens(record).tolist()
    again = tokenize(corpus, tokenizer, name, 8, 3)  # from the cache, where the cut ones are another file
    assert np.array_equal(again.input_ids, windows.input_ids) and again.window == 8
    part = windows.subset([3, 1])
    assert part.window == 8 and np.array_equal(part.tokens(0), windows.tokens(3))
    texts = list(corpus.texts)
    assert encoded(tokenizer, texts, None, 8, 3) == [windows.tokens(i).tolist() for i in range(12)]


def test_windows_of_records_in_any_order(home: Path, tmp_path: Path) -> None:
    tokenizer, name = load_tokenizer(ModelConfig(name=str(make_model(tmp_path / "model"))))
    rows = Windows.of(tokenize(make_corpus(12), tokenizer, name, 8, 3))
    assert rows is not None
    chosen, text_of = rows.of_records(np.array([7, 2, 7]))
    each = [range(rows.first[record], rows.first[record + 1]) for record in (7, 2, 7)]
    assert chosen.tolist() == [row for of in each for row in of]
    assert text_of.tolist() == [i for i, of in enumerate(each) for _ in of]


def test_pairs_have_no_windows() -> None:
    with pytest.raises(ConfigError, match=r"long_text=window .* data.long_text=cut"):
        load(["data.long_text=window", "data.text_pair=second"])
    assert load(["data.long_text=window", "data.max_windows=4"]).data.windows == 4
    assert load(["data.max_windows=4"]).data.windows == 1
