"""Where the randomness of a private release comes from.

Two kinds of source stand behind one class. `Entropy.system()` reads the operating system's
cryptographic generator for every draw: nothing that the server, the seed or an earlier release knows
predicts it, and a process that dies and comes back draws afresh. `Entropy.reproducible()` is a counter
generator (Philox) keyed by everything that names a draw; it exists for simulations and for training
without privacy, and a plan hands it out only there.

Sampling and noise are separate streams, so that the number of one kind of draw never shifts the other.

Floating point. A Gaussian made of floats has holes: some sums `value + noise` cannot occur for some values,
and an exact output then tells the value (Mironov 2012; Holohan and Braghin 2021). Two mitigations stand
here. Each number that comes from the system's generator is the scaled sum of two independent Box-Muller
draws with 53-bit uniforms, so that more than 2^200 equally likely inputs stand behind an output. And
`on_grid` rounds a noised value to a multiple of a power of two near 2^-30 of the noise's standard
deviation, which removes the low bits that such an attack reads; rounding is post-processing and its error
is a billionth of the noise. This is a mitigation and no proof.

The proof is `discrete_gaussian`, for what is released in integers: no step rounds, every decision compares
random bits with integers, so each integer comes out with exactly the probability of the discrete Gaussian
(Canonne, Kamath and Steinke 2020, algorithms 1 to 3), as far as the source of bits is uniform. What makes
that possible in whole arrays is that the standard deviation is a power of two, which the mechanisms choose.

Timing is not hidden. Tails of floating-point noise end at 8.5 standard deviations for one draw (mass 1e-17).
"""

from __future__ import annotations

import hashlib
import math
import os

import numpy as np
import numpy.typing as npt

__all__ = ["MAX_LOG2_STD", "Entropy", "discrete_gaussian", "on_grid", "steps_of_one"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

MAX_LOG2_STD = 24  # squares of what is drawn fit into 63 bits
_ROUNDING = 4.0  # r of the argument in `discrete`: what lies between the discrete and the continuous Gaussian
_GRID_BITS = 30
_CHUNK = 1 << 14  # numbers a block: what a core's cache holds is faster than one large array


def _box_muller(count: int, words: npt.NDArray[np.uint64]) -> FloatArray:
    """`count` standard Gaussians from as many 64-bit words (rounded up to an even number)."""
    half = (count + 1) // 2
    uniforms = (words[: 2 * half] >> np.uint64(11)).astype(np.float64)
    uniforms += 0.5  # never 0, never 1
    uniforms *= 2.0**-53
    radius = np.sqrt(-2.0 * np.log(uniforms[:half]))
    angle = uniforms[half:] * (2.0 * math.pi)
    out = np.empty(2 * half, dtype=np.float64)
    np.multiply(radius, np.cos(angle), out=out[:half])
    np.multiply(radius, np.sin(angle), out=out[half:])
    return out[:count]


class Entropy:
    """Randomness of one release (one node, one round, one attempt).

    Guarantee: objects made by `system()` share no state with one another, with `seed`, or with what was
    drawn before. Objects made by `reproducible()` give the same draws for the same arguments on every
    machine, and unrelated draws when any argument differs.
    """

    def __init__(self, generators: dict[str, np.random.Generator] | None = None) -> None:
        self._generators = generators

    @classmethod
    def system(cls) -> Entropy:
        """Draws from the operating system's cryptographic generator."""
        return cls(None)

    @classmethod
    def reproducible(cls, seed: int, node: str, round: int, attempt: int) -> Entropy:
        """Draws that depend on the arguments alone. Not private: whoever knows `seed` knows the noise."""
        generators = {}
        for purpose in ("sampling", "noise"):
            # Length-prefixed fields: ("ab", 1) and ("a", "b1") must not collide.
            parts = [str(seed), node, str(round), str(attempt), purpose]
            name = "".join(f"{len(part)}:{part}," for part in parts)
            key = hashlib.sha256(b"fedtune noise v1 " + name.encode()).digest()[:16]
            generators[purpose] = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        return cls(generators)

    @property
    def is_reproducible(self) -> bool:
        """True where the draws can be repeated, so that they protect nobody."""
        return self._generators is not None

    def words(self, count: int, purpose: str = "noise") -> npt.NDArray[np.uint64]:
        """`count` uniform 64-bit words, uint64 [count], of the stream `purpose` ('noise' or 'sampling')."""
        if self._generators is None:
            return np.frombuffer(os.urandom(8 * count), dtype=np.uint64)
        return self._generators[purpose].integers(0, 2**64, size=count, dtype=np.uint64)

    def bernoulli(self, size: int, probability: float) -> npt.NDArray[np.bool_]:
        """bool [size], each True with `probability`, or up to 2^-53 less and never more, independently."""
        if not 0.0 <= probability <= 1.0:
            raise ValueError(f"probability must lie in [0, 1], not {probability}")
        words = self.words(size, "sampling")
        drawn: npt.NDArray[np.bool_] = (words >> np.uint64(11)) < np.uint64(math.floor(probability * 2.0**53))
        return drawn

    def permutation(self, size: int) -> IntArray:
        """A uniformly random order of 0 ... size-1, int64 [size], from the sampling stream."""
        # Ties among 64-bit keys have probability below size^2 / 2^65.
        return np.argsort(self.words(size, "sampling"), kind="stable").astype(np.int64)

    def gaussian(self, size: int, std: float) -> FloatArray:
        """float64 [size], independent, mean 0, standard deviation `std`. Zeros if `std` is 0."""
        if not (math.isfinite(std) and std >= 0.0):
            raise ValueError(f"std must be finite and not negative, not {std}")
        if std == 0.0:
            return np.zeros(size, dtype=np.float64)
        if self._generators is not None:
            return self._generators["noise"].standard_normal(size) * std
        out = np.empty(size, dtype=np.float64)
        scale = std / math.sqrt(2.0)
        for start in range(0, size, _CHUNK):
            count = min(_CHUNK, size - start)
            # Two words a number and draw. The summands come from separate pairs: the two halves of one
            # Box-Muller pair share their radius.
            even = count + (count & 1)
            words = self.words(2 * even)
            block = _box_muller(count, words[:even])
            block += _box_muller(count, words[even:])
            block *= scale
            out[start : start + count] = block
        return out


def on_grid(noised: FloatArray, std: float) -> FloatArray:
    """Rounds noised values to multiples of the power of two at or below `std` / 2^30.

    Post-processing: whatever guarantee `noised` has stays. Args: `noised` of any shape; `std` the
    standard deviation of the noise in it. With `std` 0 the values come back as they are.
    """
    if std == 0.0:
        return noised
    grid = 2.0 ** (math.floor(math.log2(std)) - _GRID_BITS)
    return np.asarray(np.round(noised / grid) * grid, dtype=np.float64)


# --- exact discrete Gaussians ------------------------------------------------------------------------


def steps_of_one(noise_multiplier: float) -> int:
    """Steps into which one unit is cut, so that noise of 2^24 steps is a Gaussian of `noise_multiplier`.

    A hair below, so that float rounding cannot take the multiplier under the plan's.
    """
    std = 2**MAX_LOG2_STD
    return math.floor(math.sqrt(std**2 - _ROUNDING**2) / noise_multiplier * (1.0 - 1e-12))


def _bits(size: int, width: int, entropy: Entropy) -> npt.NDArray[np.uint32] | npt.NDArray[np.uint64]:
    """`size` uniform integers of `width` bits, 1 <= width <= 64."""
    if width <= 32:  # random bytes are half of the cost of a draw: take no more than are needed
        return entropy.words((size + 1) // 2).view(np.uint32)[:size] >> np.uint32(32 - width)
    return entropy.words(size) >> np.uint64(64 - width)


def _one_in(k: int, size: int, entropy: Entropy) -> BoolArray:
    """bool [size], each True with probability exactly 1/k."""
    part = 2**32 // k
    drawn = _bits(size, 32, entropy).astype(np.uint64)
    redraw = np.flatnonzero(drawn >= np.uint64(part * k))
    while redraw.size:
        drawn[redraw] = _bits(redraw.size, 32, entropy)
        redraw = redraw[drawn[redraw] >= np.uint64(part * k)]
    return np.asarray(drawn < np.uint64(part))


def _exp_minus_one(size: int, entropy: Entropy) -> BoolArray:
    """bool [size], each True with probability exactly exp(-1) (algorithm 1 with gamma = 1)."""
    result = np.zeros(size, dtype=np.bool_)
    alive, k = np.arange(size), 2  # the draw for k = 1 always succeeds
    while alive.size:
        again = _one_in(k, alive.size, entropy)
        if k % 2:
            result[alive[~again]] = True
        alive, k = alive[again], k + 1
    return result


def _exp_minus(numerators: IntArray, log2_denominator: int, entropy: Entropy) -> BoolArray:
    """bool [n], True with probability exactly exp(-numerators / 2^log2_denominator).

    Canonne, Kamath and Steinke 2020, algorithm 1. Needs numerators >= 0 and 1 <= log2_denominator <= 62.
    """
    wholes = numerators >> log2_denominator
    fractions = (numerators & ((1 << log2_denominator) - 1)).astype(np.uint64)
    result = np.zeros(numerators.size, dtype=np.bool_)
    alive = np.arange(numerators.size)
    done = 0
    while True:  # exp(-whole): that many successes in a row
        more = wholes[alive] > done
        if not more.any():
            break
        keep = np.ones(alive.size, dtype=np.bool_)
        keep[more] = _exp_minus_one(int(more.sum()), entropy)
        alive, done = alive[keep], done + 1
    k = 1
    while alive.size:  # exp(-fraction): the first failure of Bernoulli(fraction / k) comes at an odd k
        again = _bits(alive.size, log2_denominator, entropy) < fractions[alive]
        if k > 1:
            hits = np.flatnonzero(again)
            again[hits] = _one_in(k, hits.size, entropy)
        if k % 2:
            result[alive[~again]] = True
        alive, k = alive[again], k + 1
    return result


def _discrete_laplace(size: int, bits: int, entropy: Entropy) -> IntArray:
    """About 0.63 `size` draws with probability proportional to exp(-|k| / 2^bits) (algorithm 2)."""
    low = _bits(size, bits, entropy).astype(np.int64)
    low = low[_exp_minus(low, bits, entropy)]
    high = np.zeros(low.size, dtype=np.int64)
    alive = np.arange(low.size)
    while alive.size:
        alive = alive[_exp_minus_one(alive.size, entropy)]
        high[alive] += 1
    magnitude = low + (high << bits)
    negative = _one_in(2, magnitude.size, entropy)
    once = ~(negative & (magnitude == 0))  # zero has one sign only
    return np.where(negative, -magnitude, magnitude)[once]


def discrete_gaussian(size: int, log2_std: int, entropy: Entropy) -> IntArray:
    """`size` independent discrete Gaussians, int64 [size], with parameter std = 2^log2_std.

    Each integer k has probability proportional to exp(-k^2 / (2 std^2)), exactly: the sampler (Canonne,
    Kamath and Steinke 2020, algorithm 3, with t = std) compares random bits with integers and never rounds,
    for which std is a power of two. The variance is std^2 to within 1e-30 for log2_std >= 2.
    Raises `ValueError` unless 1 <= log2_std <= 24 and size >= 0.
    """
    if not (1 <= log2_std <= MAX_LOG2_STD and size >= 0):
        raise ValueError(
            f"log2_std must lie in 1 ... {MAX_LOG2_STD} and size be 0 or more: {log2_std}, {size}"
        )
    std = 1 << log2_std
    blocks: list[IntArray] = []
    missing = size
    while missing > 0:
        proposed = _discrete_laplace(int(2.15 * missing) + 32, log2_std, entropy)
        excess = np.abs(proposed) - std
        block = proposed[_exp_minus(excess * excess, 2 * log2_std + 1, entropy)][:missing]
        blocks.append(block)
        missing -= block.size
    return np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.int64)
