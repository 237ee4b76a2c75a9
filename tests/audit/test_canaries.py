"""Where canaries are put, what is measured beside them, and how they are scored."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from fedtune.audit.canaries import GradientCanaries, Scores, _noise
from tests.support import audited_plans as plans


def spread(canaries: int, size: int, blocks: tuple[int, ...] = (), seed: int = 0) -> GradientCanaries:
    return GradientCanaries.spread(canaries, size, np.random.default_rng(seed), blocks)


@pytest.mark.parametrize(
    ("canaries", "size", "blocks"),
    [(1000, 2000, ()), (64, 128, ()), (37, 1000, ()), (500, 5000, (3000, 2, 200, 1700, 98)), (1, 2, ())],
)
def test_every_coordinate_has_one_use(canaries: int, size: int, blocks: tuple[int, ...]) -> None:
    placed = spread(canaries, size, blocks)
    used = np.concatenate([placed.coordinates, placed.controls])
    assert len(np.unique(used)) == len(used) and used.min() >= 0 and used.max() < size
    assert placed.count == canaries == len(placed.included) == len(placed.windows)
    assert set(placed.windows) <= set(placed.control_windows)  # each has noise measured beside it
    assert np.array_equal(placed.members, np.flatnonzero(placed.included))


def test_parameters_share_canaries_evenly_however_large() -> None:
    """So that a small head is watched as well as a large matrix."""
    placed = spread(400, 20_000, (10_000, 9_000, 800, 200))
    assert np.bincount(placed.windows).tolist() == [100, 100, 100, 100]
    # A parameter too small to measure noise in joins its neighbour, and a full one leaves the rest to others.
    placed = spread(400, 20_000, (10_000, 9_798, 2, 200))
    assert np.bincount(placed.windows).tolist() == [150, 149, 101]  # 101: one half of 202
    assert placed.coordinates[placed.windows == 2].min() >= 19_798


def test_half_of_the_coins_are_heads_and_places_depend_on_the_generator() -> None:
    a, b = spread(20_000, 40_000), spread(20_000, 40_000, seed=1)
    assert abs(a.included.mean() - 0.5) < 0.02
    assert not np.array_equal(a.included, b.included) and not np.array_equal(a.coordinates, b.coordinates)


@pytest.mark.parametrize(("canaries", "size", "blocks"), [(0, 10, ()), (6, 10, ()), (1, 10, (4, 4))])
def test_no_room_is_refused(canaries: int, size: int, blocks: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        spread(canaries, size, blocks)


def test_noise_is_common_unless_a_block_is_really_different() -> None:
    rng = np.random.default_rng(5)
    windows = np.repeat(np.arange(50), 64)
    values = 2.0 * rng.standard_normal(windows.size)
    found = _noise(values, windows)
    assert len(set(found.tolist())) == 1 and found[0] == pytest.approx(2.0, rel=0.1)
    values[windows == 7] = 0.0
    values[windows == 9] *= 0.3
    found = _noise(values, windows)
    assert found[7] == 0.0 and found[9] == pytest.approx(0.6, rel=0.3) and found[8] == found[0]


def test_scores_are_log_likelihood_ratios() -> None:
    """Against densities written out, for a plan whose noise is known well."""
    plan = plans.local(sample_rate=0.25, noise_multiplier=2.0)
    placed = spread(2000, 4000)
    rng = np.random.default_rng(6)
    scores = Scores(placed, 0.25, 8)
    expected = {"poisson": np.zeros(2000), "fixed": np.zeros(2000), "periodic": np.zeros((4, 2000))}
    for step in range(8):
        sums = 2.0 * rng.standard_normal(4000)
        scores.observe(sums * plan.max_grad_norm / plan.expected_batch_size(), plan)
        x = sums[placed.coordinates]
        out, inside = stats.norm.logpdf(x, 0.0, 2.0), stats.norm.logpdf(x, 1.0, 2.0)
        expected["poisson"] += np.logaddexp(np.log(0.75) + out, np.log(0.25) + inside) - out
        expected["fixed"] += inside - out
        expected["periodic"][step % 4] += inside - out
    found = scores.result()
    assert set(found) == set(expected)
    expected["periodic"] = np.logaddexp.reduce(expected["periodic"], axis=0)
    for name, values in found.items():  # the noise was measured from 2,000 controls: within some percent
        assert np.corrcoef(values, expected[name])[0, 1] > 0.999
        assert values.std() == pytest.approx(expected[name].std(), rel=0.15)


def test_every_unit_every_time_has_one_score() -> None:
    scores = Scores(spread(20, 40), 1.0, 5)
    scores.observe(np.ones(40), plans.local(sample_rate=1.0))
    assert set(scores.result()) == {"poisson"}


def test_a_release_without_noise_gives_certainty_and_no_nan() -> None:
    placed = spread(64, 128)
    for rate in (1.0, 0.5):
        plan = plans.local(sample_rate=rate)
        scores = Scores(placed, rate, 1)
        sums = np.zeros(128)
        sums[placed.coordinates[placed.members]] = plan.max_grad_norm
        scores.observe(sums / plan.expected_batch_size(), plan)
        found = scores.result()["poisson"]
        assert np.isfinite(found).all()
        assert found[placed.included].min() > 1e6 and found[~placed.included].max() < 0.0
