"""The exact sampler in arrays is the published algorithm, one number at a time, on the same random bits."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedtune.privacy.mechanisms.noise import (
    _bits,
    _discrete_laplace,
    _exp_minus,
    _exp_minus_one,
    _one_in,
    discrete_gaussian,
    steps_of_one,
)


class Words:
    """Entropy of known words, first those that are given."""

    def __init__(self, *first: int) -> None:
        self._first = list(first)
        self._random = np.random.default_rng(11)
        self.taken = 0

    def words(self, count: int, purpose: str = "noise") -> np.ndarray:
        drawn = self._random.integers(0, 2**64, count, dtype=np.uint64)
        for index in range(min(count, len(self._first))):
            drawn[index] = self._first.pop(0)
        self.taken += count
        return drawn


# Canonne, Kamath and Steinke 2020 in integers of Python. Numbers that are still undecided are treated in
# turn, attempt by attempt, which is the order in which arrays take their bits.


def bits(size: int, width: int, source: Words) -> list[int]:
    if width > 32:
        return [int(word) >> (64 - width) for word in source.words(size)]
    words = [int(word) for word in source.words(-(-size // 2))]
    halves = [half for word in words for half in (word % 2**32, word >> 32)]
    return [half >> (32 - width) for half in halves[:size]]


def one_in(k: int, size: int, source: Words) -> list[bool]:
    part = 2**32 // k
    drawn = bits(size, 32, source)
    while again := [i for i in range(size) if drawn[i] >= part * k]:
        for i, value in zip(again, bits(len(again), 32, source), strict=True):
            drawn[i] = value
    return [value < part for value in drawn]


def exp_minus_one(size: int, source: Words) -> list[bool]:
    result, alive, k = [False] * size, list(range(size)), 2
    while alive:
        for i, success in zip(alive[:], one_in(k, len(alive), source), strict=True):
            if not success:
                result[i] = k % 2 == 1
                alive.remove(i)
        k += 1
    return result


def exp_minus(numerators: list[int], log2_denominator: int, source: Words) -> list[bool]:
    denominator = 2**log2_denominator
    result, alive, done = [False] * len(numerators), list(range(len(numerators))), 0
    while more := [i for i in alive if numerators[i] // denominator > done]:
        kept = dict(zip(more, exp_minus_one(len(more), source), strict=True))
        alive = [i for i in alive if kept.get(i, True)]
        done += 1
    k = 1
    while alive:
        drawn = bits(len(alive), log2_denominator, source)
        again = [i for i, value in zip(alive, drawn, strict=True) if value < numerators[i] % denominator]
        if k > 1:
            again = [i for i, kept in zip(again, one_in(k, len(again), source), strict=True) if kept]
        for i in set(alive) - set(again):
            result[i] = k % 2 == 1
        alive, k = again, k + 1
    return result


def laplace(size: int, width: int, source: Words) -> list[int]:
    low = bits(size, width, source)
    low = [value for value, kept in zip(low, exp_minus(low, width, source), strict=True) if kept]
    high, alive = [0] * len(low), list(range(len(low)))
    while alive:
        alive = [i for i, more in zip(alive, exp_minus_one(len(alive), source), strict=True) if more]
        for i in alive:
            high[i] += 1
    magnitudes = [a + 2**width * b for a, b in zip(low, high, strict=True)]
    signs = one_in(2, len(low), source)
    signed = zip(magnitudes, signs, strict=True)
    return [-m if negative else m for m, negative in signed if m or not negative]


def gaussian(size: int, log2_std: int, source: Words) -> list[int]:
    std, found = 2**log2_std, []
    while len(found) < size:
        missing = size - len(found)
        proposed = laplace(int(2.15 * missing) + 32, log2_std, source)
        kept = exp_minus([(abs(k) - std) ** 2 for k in proposed], 2 * log2_std + 1, source)
        found += [k for k, good in zip(proposed, kept, strict=True) if good][:missing]
    return found


@pytest.mark.parametrize("size", [0, 1, 4, 7])
@pytest.mark.parametrize("width", [1, 20, 31, 32, 33, 49, 64])
def test_bits(size: int, width: int) -> None:
    mine, theirs = Words(), Words()
    assert _bits(size, width, mine).tolist() == bits(size, width, theirs)
    assert mine.taken == theirs.taken == (size if width > 32 else -(-size // 2))


@pytest.mark.parametrize("k", [1, 2, 3, 5, 1000])
def test_one_in(k: int) -> None:
    part = 2**32 // k
    # On both sides of the last accepted value and of the last success; then the redraws.
    edges = [min(edge, 2**32 - 1) for edge in (part - 1, part, part * k - 1, part * k, 2**32, 0)]
    first = [low + (high << 32) for low, high in zip(edges[::2], edges[1::2], strict=True)]
    mine, theirs = Words(*first), Words(*first)
    drawn = _one_in(k, 41, mine)
    assert drawn.tolist() == one_in(k, 41, theirs)
    assert drawn.dtype == np.bool_ and mine.taken == theirs.taken


def test_exp_minus_one() -> None:
    mine, theirs = Words(), Words()
    assert _exp_minus_one(500, mine).tolist() == exp_minus_one(500, theirs)
    assert mine.taken == theirs.taken


@pytest.mark.parametrize("log2_denominator", [1, 7, 41, 62])
def test_exp_minus(log2_denominator: int) -> None:
    one = 2**log2_denominator
    numerators = [0, 1, one // 2, one - 1, one, one + 1] * 40
    if log2_denominator < 60:
        numerators += [2 * one, 5 * one // 2, 7 * one + 3] * 40
    mine, theirs = Words(), Words()
    drawn = _exp_minus(np.array(numerators, dtype=np.int64), log2_denominator, mine)
    assert drawn.tolist() == exp_minus(numerators, log2_denominator, theirs)
    assert mine.taken == theirs.taken


@pytest.mark.parametrize("width", [1, 2, 12, 24])
def test_discrete_laplace(width: int) -> None:
    mine, theirs = Words(), Words()
    assert _discrete_laplace(300, width, mine).tolist() == laplace(300, width, theirs)
    assert mine.taken == theirs.taken


@pytest.mark.parametrize("size", [0, 1, 90])
@pytest.mark.parametrize("log2_std", [1, 2, 15, 16, 24])
def test_discrete_gaussian(size: int, log2_std: int) -> None:
    mine, theirs = Words(), Words()
    drawn = discrete_gaussian(size, log2_std, mine)  # type: ignore[arg-type]
    assert drawn.tolist() == gaussian(size, log2_std, theirs)
    assert drawn.dtype == np.int64 and mine.taken == theirs.taken


def test_a_size_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="size be 0 or more"):
        discrete_gaussian(-1, 5, Words())  # type: ignore[arg-type]


@pytest.mark.parametrize("noise", [0.05, 0.3, 1.0, 4.0, 77.7, 1000.0])
def test_a_unit_has_as_many_steps_as_the_noise_covers(noise: float) -> None:
    exact = math.sqrt(2**48 - 16) / noise  # the r of the argument is 4
    assert steps_of_one(noise) == math.floor(exact * (1 - 1e-12)) <= exact
