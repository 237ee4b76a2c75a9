"""Entropy: separate streams, no state, exact edge cases, and fast enough to be no excuse."""

from __future__ import annotations

import hashlib
import math
import os

import numpy as np
import pytest

from fedtune.privacy.mechanisms.noise import _CHUNK, Entropy, on_grid
from tests.support.work import calls_of

pytestmark = pytest.mark.system_entropy


def test_system_draws_never_repeat_and_ignore_every_seed() -> None:
    np.random.seed(0)  # noqa: NPY002
    first = Entropy.system().gaussian(1000, 1.0)
    np.random.seed(0)  # noqa: NPY002
    second = Entropy.system().gaussian(1000, 1.0)
    assert not np.intersect1d(first, second).size


def test_system_draws_read_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    real = os.urandom
    monkeypatch.setattr(os, "urandom", lambda count: asked.append(count) or real(count))
    Entropy.system().gaussian(1000, 1.0)
    assert sum(asked) >= 2 * 8 * 1000  # two 64-bit words a number and draw, two draws


def test_reproducible_draws_depend_on_every_argument() -> None:
    base = (7, "clinic", 3, 1)
    others = [(8, "clinic", 3, 1), (7, "clinic-", 3, 1), (7, "clinic", 4, 1), (7, "clinic", 3, 2)]
    same = Entropy.reproducible(*base).gaussian(50, 1.0)
    assert np.array_equal(same, Entropy.reproducible(*base).gaussian(50, 1.0))
    for other in others:
        assert not np.intersect1d(same, Entropy.reproducible(*other).gaussian(50, 1.0)).size


def test_names_that_run_into_numbers_do_not_collide() -> None:
    one = Entropy.reproducible(1, "a", 12, 3).gaussian(8, 1.0)
    two = Entropy.reproducible(1, "a1", 2, 3).gaussian(8, 1.0)
    assert not np.array_equal(one, two)


def test_sampling_does_not_shift_the_noise() -> None:
    plain = Entropy.reproducible(1, "n", 0, 0)
    sampled = Entropy.reproducible(1, "n", 0, 0)
    sampled.bernoulli(12345, 0.3)
    assert np.array_equal(plain.gaussian(20, 1.0), sampled.gaussian(20, 1.0))


@pytest.mark.parametrize("entropy", [Entropy.system(), Entropy.reproducible(1, "n", 0, 0)])
def test_edges(entropy: Entropy) -> None:
    assert entropy.gaussian(0, 1.0).shape == (0,)
    assert entropy.gaussian(1, 1.0).shape == (1,)
    assert np.array_equal(entropy.gaussian(3, 0.0), np.zeros(3))
    assert entropy.bernoulli(0, 0.5).shape == (0,)
    assert entropy.bernoulli(1000, 1.0).all()
    assert not entropy.bernoulli(1000, 0.0).any()
    assert sorted(entropy.permutation(100)) == list(range(100))


@pytest.mark.parametrize("std", [float("nan"), float("inf"), -1.0])
def test_a_spread_without_meaning_is_refused(std: float) -> None:
    with pytest.raises(ValueError, match="std"):
        Entropy.system().gaussian(3, std)


@pytest.mark.parametrize("probability", [float("nan"), -0.1, 1.1])
def test_a_probability_without_meaning_is_refused(probability: float) -> None:
    with pytest.raises(ValueError, match="probability"):
        Entropy.system().bernoulli(3, probability)


def test_grid_removes_the_low_bits_and_little_else() -> None:
    values = Entropy.system().gaussian(10_000, 3.0)
    rounded = on_grid(values, 3.0)
    grid = 2.0**-29  # 3.0 lies between 2 and 4
    assert np.array_equal(rounded / grid, np.round(rounded / grid))
    assert np.max(np.abs(rounded - values)) <= grid / 2
    assert np.array_equal(on_grid(values, 0.0), values)


def test_no_number_of_an_adapter_is_noised_by_itself() -> None:
    """300,000 numbers are one array: about 50 ms on an idle core."""
    entropy = Entropy.system()
    assert calls_of(lambda: entropy.gaussian(300_000, 1.0)) < 1_000


class Tape:
    """Stands in for `os.urandom`: known words, in the order in which they were read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, special: tuple[int, ...] = ()) -> None:
        self.read: list[int] = []
        self._special = list(special)
        self._random = np.random.default_rng(5)
        monkeypatch.setattr(os, "urandom", self)

    def __call__(self, count: int) -> bytes:
        words = self._random.integers(0, 2**64, count // 8, dtype=np.uint64)
        for index in range(min(len(words), len(self._special))):
            words[index] = self._special.pop(0)
        self.read += words.tolist()
        return words.tobytes()


def gaussians_by_hand(words: list[int], size: int, std: float) -> list[float]:
    """Box-Muller one number at a time: two pairs of uniforms behind each number."""
    numbers: list[float] = []
    while len(numbers) < size:
        count = min(size - len(numbers), _CHUNK)
        even = count + count % 2
        draws = []
        for _ in range(2):
            uniforms = [((word >> 11) + 0.5) / 2**53 for word in words[:even]]
            words = words[even:]
            radii = [math.sqrt(-2 * math.log(u)) for u in uniforms[: even // 2]]
            angles = [2 * math.pi * u for u in uniforms[even // 2 :]]
            draws.append(
                [r * math.cos(a) for r, a in zip(radii, angles, strict=True)]
                + [r * math.sin(a) for r, a in zip(radii, angles, strict=True)]
            )
        numbers += [std * (a + b) / math.sqrt(2) for a, b in zip(*draws, strict=True)][:count]
    return numbers


@pytest.mark.parametrize("size", [1, 2, 5, 6, 2 * _CHUNK + 3])
def test_gaussians_are_those_of_box_muller_on_the_words_that_were_read(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The smallest and the largest word: a uniform of 0 would be an infinite number, one of 1 a lost tail.
    tape = Tape(monkeypatch, special=(0, 2**64 - 1))
    drawn = Entropy.system().gaussian(size, 3.0)
    assert np.allclose(drawn, gaussians_by_hand(tape.read, size, 3.0), rtol=1e-12, atol=1e-14)
    assert len(tape.read) == sum(4 * math.ceil(min(_CHUNK, size - at) / 2) for at in range(0, size, _CHUNK))


def test_an_event_is_drawn_up_to_its_probability_and_not_beyond(monkeypatch: pytest.MonkeyPatch) -> None:
    # 0.3 lies half way between two multiples of 2^-53: the event is the smaller of the two intervals, for
    # whoever is drawn more often than is accounted is protected less.
    first = math.floor(0.3 * 2**53)
    Tape(monkeypatch, special=tuple(k << 11 for k in (0, first - 1, first)))
    assert Entropy.system().bernoulli(3, 0.3).tolist() == [True, True, False]
    Tape(monkeypatch, special=(0,))  # 1e-20 is far below one word in 2^53
    assert not Entropy.system().bernoulli(1, 1e-20).any()
    # A multiple of 2^-53: exactly as many words as the probability says, the low 11 bits do not count.
    Tape(monkeypatch, special=((2**51 << 11) - 1, 2**51 << 11))
    assert Entropy.system().bernoulli(2, 0.25).tolist() == [True, False]


def test_reproducible_draws_are_those_of_the_documented_key() -> None:
    """A generator made here: raw Philox words for sampling, its own Gaussians for noise."""
    named = b"fedtune noise v1 1:7,6:clinic,2:12,1:3,"
    keys = {
        purpose: int.from_bytes(hashlib.sha256(named + name).digest()[:16], "little")
        for purpose, name in (("sampling", b"8:sampling,"), ("noise", b"5:noise,"))
    }
    generators = {purpose: np.random.Philox(key=key) for purpose, key in keys.items()}
    drawn = Entropy.reproducible(7, "clinic", 12, 3)
    assert np.array_equal(drawn.words(5, "sampling"), generators["sampling"].random_raw(5))
    assert np.array_equal(drawn.words(5), generators["noise"].random_raw(5))
    expected = np.random.Generator(generators["noise"]).standard_normal(4) * 2.5
    assert np.array_equal(drawn.gaussian(4, 2.5), expected)


def test_only_draws_that_can_be_repeated_say_so() -> None:
    assert Entropy.reproducible(1, "n", 0, 0).is_reproducible is True
    assert Entropy.system().is_reproducible is False
