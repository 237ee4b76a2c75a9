"""What is made of noised counts: the figures that everybody knows where there is no noise, how far noise
moves them, and what it hides."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedtune.privacy.mechanisms.confusion import BINS, ConfusionPlan, Votes
from fedtune.serving.measures import measure
from fedtune.serving.private_measures import calibration, private_measures, rates, threshold

EXACT = np.array([[80.0, 15.0, 5.0], [10.0, 60.0, 0.0], [2.0, 8.0, 20.0]])


def test_without_noise_they_are_the_rates_that_everybody_knows() -> None:
    labels = np.repeat(np.repeat(np.arange(3), 3), EXACT.ravel().astype(int))
    said = np.repeat(np.tile(np.arange(3), 3), EXACT.ravel().astype(int))
    known = measure(np.eye(3, dtype=np.float32)[said], labels, ["a", "b", "c"])
    found = rates(EXACT, 0.0, ["a", "b", "c"])
    assert found["accuracy"]["value"] == pytest.approx(known["accuracy"])
    for name in ("precision_macro", "recall_macro", "f1_macro"):
        assert found[name] == pytest.approx(known[name])
    for name, one in known["per_class"].items():
        for rate in ("precision", "recall", "f1"):
            assert found["per_class"][name][rate]["value"] == pytest.approx(one[rate])
    assert found["confusion"] == EXACT.tolist() and found["hidden"] == []


@pytest.mark.slow
def test_the_standard_errors_are_those_of_drawn_matrices() -> None:
    """Units are drawn anew and noised anew, 4,000 times; what is said may be larger, by a fifth."""
    chance, noise, size = np.random.default_rng(1), 8.0, 20
    drawn = chance.multinomial(int(EXACT.sum()) * size, EXACT.ravel() / EXACT.sum(), 4000).reshape(-1, 3, 3)
    noised = drawn + chance.normal(0.0, noise, drawn.shape)
    said = rates(EXACT * size, noise, ["a", "b", "c"])
    made = [rates(one, noise, ["a", "b", "c"]) for one in noised]
    pairs = [(said["accuracy"], [one["accuracy"] for one in made])]
    for name in "abc":
        for rate in ("precision", "recall", "f1"):
            pairs.append((said["per_class"][name][rate], [one["per_class"][name][rate] for one in made]))
    for one, others in pairs:
        values = np.array([other["value"] for other in others])
        assert values.mean() == pytest.approx(one["value"], abs=0.01)
        assert 0.93 * values.std() <= one["standard_error"] <= 1.2 * values.std()


def test_what_the_noise_hides_is_not_told_and_the_means_are_of_the_others() -> None:
    cells = np.array([[9000.0, 10.0, -3.0], [20.0, 7000.0, 4.0], [-8.0, 2.0, 1.0]])
    found = rates(cells, 10.0, ["a", "b", "rare"])
    rare = found["per_class"]["rare"]
    assert rare["precision"] is rare["recall"] is rare["f1"] is None
    assert found["hidden"] == ["rare"]
    assert found["f1_macro"] == pytest.approx(
        np.mean([found["per_class"][name]["f1"]["value"] for name in "ab"])
    )
    nothing = rates(np.zeros((2, 2)), 10.0, ["a", "b"])
    assert nothing["accuracy"] is None and nothing["f1_macro"] is None


# --- probabilities -------------------------------------------------------------------------------


def plan_of(classes: int, noise: float, sites: int = 0) -> ConfusionPlan:
    return ConfusionPlan(
        trust="local", unit="record", noise_multiplier=noise, delta=1e-5, classes=classes, sites=sites
    )


def drawn(classes: int, n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(probabilities [n, c], labels [n]) of a model that is surer than it should be."""
    chance = np.random.default_rng(seed)
    logits = chance.normal(0.0, 1.5, (n, classes))
    true = np.exp(logits / 1.7) / np.exp(logits / 1.7).sum(1, keepdims=True)
    labels = (true.cumsum(1) < chance.random((n, 1))).sum(1)
    return (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32), labels


def votes_of(sure: np.ndarray, labels: np.ndarray, sites: np.ndarray | None = None) -> Votes:
    said = sure.argmax(1).astype(np.int64)
    return Votes(labels, said, (sure[:, 1] if sure.shape[1] == 2 else sure.max(1)).astype(float), None, sites)


def without_noise(plan: ConfusionPlan, votes: Votes) -> dict[str, np.ndarray]:
    return {part: one / plan.steps(part) for part, one in plan.totals(votes).items()}


@pytest.mark.parametrize("classes", [2, 4])
def test_the_calibration_error_is_the_usual_one_in_bins_of_a_twentieth(classes: int) -> None:
    sure, labels = drawn(classes, 4000)
    plan = plan_of(classes, 1e-6)
    found = calibration(without_noise(plan, votes_of(sure, labels)), plan)
    top, right = sure.max(1).astype(float), sure.argmax(1) == labels
    bins = np.minimum((top * BINS).astype(int), BINS - 1)
    usual = sum(abs((right[bins == b].astype(float) - top[bins == b]).sum()) for b in range(BINS)) / len(top)
    assert usual > 0.05
    assert found["calibration_error"]["value"] == pytest.approx(usual, abs=1e-3)
    assert found["calibration_error"]["noise"] < 1e-6
    for one in found["calibration"]:
        (there,) = {b for b in bins if b / BINS <= one["probability"] <= (b + 1) / BINS}
        assert one["right"] == pytest.approx(right[bins == there].mean(), abs=1e-6)
        assert one["probability"] == pytest.approx(top[bins == there].mean(), abs=1e-4)


def test_the_noise_moves_the_calibration_error_by_no_more_than_is_said() -> None:
    """200 times noised anew: 98 in 100, and the bound is no idle one."""
    sure, labels = drawn(2, 6000)
    plan = plan_of(2, 6.0)
    exact, chance = without_noise(plan, votes_of(sure, labels)), np.random.default_rng(5)
    true = calibration(exact, plan)["calibration_error"]["value"]
    far, bounds = [], []
    for _ in range(200):
        noised = {k: one + chance.normal(0.0, plan.noise_of(k), one.shape) for k, one in exact.items()}
        told = calibration(noised, plan)["calibration_error"]
        far.append(abs(told["value"] - true))
        bounds.append(told["noise"])
    assert np.mean(np.array(far) <= np.array(bounds)) >= 0.97
    assert np.mean(bounds) < 5 * np.mean(far)


@pytest.mark.parametrize("balance", [0.5, 0.15])
def test_the_threshold_is_the_best_edge_and_its_error_that_of_drawn_counts(balance: float) -> None:
    sure, labels = drawn(2, 5000)
    chance = np.random.default_rng(2)
    kept = (labels == 0) | (chance.random(len(labels)) < balance / (1 - balance))
    sure, labels = sure[kept], labels[kept]
    plan = plan_of(2, 3.0)
    exact = without_noise(plan, votes_of(sure, labels))["bins"]
    found = threshold(exact, 0.0)
    assert found is not None

    def macro(edge: float) -> float:
        one = np.eye(2, dtype=np.float32)[(sure[:, 1] >= edge).astype(int)]
        return float(measure(one, labels, ["a", "b"])["f1_macro"])

    edges = [edge / BINS for edge in range(BINS + 1)]
    assert found["f1_macro"] == pytest.approx(max(map(macro, edges)), abs=1e-6)
    assert found["f1_macro"] == pytest.approx(macro(found["probability"]), abs=1e-6)
    assert found["f1_macro_at_half"] == pytest.approx(macro(0.5), abs=1e-6)
    whole = measure(sure, labels, ["a", "b"])["threshold"]
    assert found["f1_macro"] <= whole["f1_macro"] + 1e-6 < found["f1_macro"] + 0.02
    # Noised and drawn anew 500 times, at the edge that was chosen.
    noise, edge = plan.noise_of("bins"), round(found["probability"] * BINS)
    size = int(exact.sum())
    values = []
    for _ in range(500):
        cells = chance.multinomial(size, exact.reshape(-1) / exact.sum()).reshape(2, BINS)
        cells = cells + chance.normal(0.0, noise, (2, BINS))
        hits, alarms = cells[1, edge:].sum(), cells[0, edge:].sum()
        misses, others = cells[1, :edge].sum(), cells[0, :edge].sum()
        f1 = [2 * one / (2 * one + alarms + misses) for one in (hits, others)]
        values.append(np.mean(f1))
    said = threshold(exact, noise)
    assert said is not None and 0.8 * np.std(values) <= said["standard_error"] <= 1.25 * np.std(values)


def test_what_the_noise_hides_of_probabilities_is_not_told() -> None:
    sure, labels = drawn(2, 60)
    plan = plan_of(2, 8.0)
    found = calibration(without_noise(plan, votes_of(sure, labels)), plan)
    assert found["calibration_error"] is None and found["calibration"] == []
    assert threshold(without_noise(plan, votes_of(sure, labels))["bins"], plan.noise_of("bins")) is None
    nothing = {part: np.zeros(shape) for part, shape in plan.shapes.items()}
    assert calibration(nothing, plan)["calibration_error"] is None


def test_sites_that_were_named_are_told_and_others_count_for_none() -> None:
    sure, labels = drawn(3, 900)
    sites = np.arange(900) % 3 - 1
    plan = plan_of(3, 2.0, sites=2)
    found = private_measures(
        without_noise(plan, votes_of(sure, labels, sites)), plan, ["a", "b", "c"], ["north", "south"]
    )
    right = sure.argmax(1) == labels
    assert list(found["per_site"]) == ["north", "south"] and found["threshold"] is None
    for place, one in enumerate(found["per_site"].values()):
        assert one["units"] == pytest.approx(300, abs=1e-3)
        assert one["accuracy"]["value"] == pytest.approx(right[sites == place].mean(), abs=1e-6)
        error = math.sqrt(0.25 / 300 + (plan.noise_of("sites") / 300) ** 2)
        assert 0.5 * error < one["accuracy"]["standard_error"] < 1.2 * error
