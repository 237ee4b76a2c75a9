"""Batches hold every text once, no more tokens than allowed, and little padding."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.serving.classifier import token_batches


@given(
    st.lists(st.integers(1, 64), max_size=60),
    st.sampled_from([64, 512, 2048]),
    st.sampled_from([0, 12, math.inf]),
)
def test_every_text_is_in_one_batch_within_its_limits(
    lengths: list[int], max_tokens: int, max_padding: float
) -> None:
    batches = list(token_batches(lengths, max_tokens, max_padding))
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    for batch in batches:
        of_batch = [lengths[place] for place in batch]
        whole = len(batch) * max(of_batch)
        assert whole <= max_tokens or len(batch) == 1
        assert whole - sum(of_batch) <= max_padding


@pytest.mark.parametrize(
    ("max_padding", "expected"),
    [(math.inf, [[1, 2, 0, 3]]), (12, [[1, 2], [0, 3]]), (0, [[1], [2], [0], [3]])],
)
def test_texts_of_unlike_lengths_are_apart(max_padding: float, expected: list[list[int]]) -> None:
    assert list(token_batches([10, 30, 24, 8], 512, max_padding)) == expected
