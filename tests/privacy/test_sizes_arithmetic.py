"""A size that is told with noise, recomputed by hand."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from fedtune.config.schema import Config
from fedtune.privacy.accounting.epsilon import Term, epsilon_of_terms
from fedtune.privacy.mechanisms.counts import SizePlan, largest, size_noise, size_plan
from fedtune.privacy.mechanisms.noise import Entropy, discrete_gaussian, steps_of_one

PLAN = SizePlan(trust="local", unit="record", noise_multiplier=20.0, delta=1e-6)


def test_what_a_count_costs() -> None:
    assert PLAN.purpose == "size" and PLAN.is_private() is True and PLAN.num_rounds == 1
    assert PLAN.terms(2, after=5) == {Term(1.0, 20.0): 2} and PLAN.terms(0) == {}
    assert PLAN.epsilon() == PLAN.epsilon(1) == epsilon_of_terms({Term(1.0, 20.0): 1}, 1e-6)
    assert PLAN.epsilon(3) == epsilon_of_terms({Term(1.0, 20.0): 3}, 1e-6) > PLAN.epsilon()


def test_noise_of_a_count_is_the_systems_unless_a_simulation_asks() -> None:
    assert not PLAN.entropy("n").is_reproducible
    plan = dataclasses.replace(PLAN, reproducible_noise=True, seed=7)
    same = Entropy.reproducible(7, "n/size", 0, 0).words(3)
    assert np.array_equal(plan.entropy("n").words(3), same)
    seedless = dataclasses.replace(PLAN, reproducible_noise=True)
    assert np.array_equal(seedless.entropy("n").words(3), Entropy.reproducible(0, "n/size", 0, 0).words(3))


@pytest.mark.parametrize("units", [0, 3, 1000, 123_456])
def test_a_told_size_is_the_count_and_exact_noise_rounded(units: int) -> None:
    for attempt in range(6):
        told = PLAN.told(units, Entropy.reproducible(1, "n", 0, attempt))
        noise = int(discrete_gaussian(1, 24, Entropy.reproducible(1, "n", 0, attempt))[0])
        assert told == max(1, round(units + noise / steps_of_one(20.0))) and type(told) is int


def test_which_sizes_are_told_with_noise() -> None:
    config = Config()
    assert (config.privacy.trust, size_noise(config)) == ("local", 20.0)
    config.privacy.trust = "distributed"
    config.privacy.delta, config.seed, config.privacy.reproducible_noise = 1e-7, 5, True
    assert size_plan(config) == SizePlan(
        trust="distributed", unit=config.privacy.unit, noise_multiplier=20.0, delta=1e-7,
        reproducible_noise=True, seed=5,
    )  # fmt: skip
    config.privacy.delta = None
    made = size_plan(config)
    assert made is not None and made.delta == 1e-6
    for trust in ("central", "none"):
        config.privacy.trust = trust
        assert size_noise(config) == 0.0 and size_plan(config) is None
    config.privacy.trust = "local"
    for part, name, value in (
        ("data", "public", True),
        ("data", "declared_size", 9),
        ("engine", "name", "deployment"),
    ):
        other = Config()
        setattr(getattr(other, part), name, value)
        assert size_noise(other) == 0.0 and size_plan(other) is None


def test_the_most_units_are_five_standard_deviations_above_what_was_told() -> None:
    assert largest(1000.0, 20.0, 9) == 1000.0 + 5 * 20.0 * math.sqrt(9)
    assert largest(1000.0, 0.0, 9) == 1000.0
