"""Measures are those of scikit-learn, and of a search over every threshold."""

from __future__ import annotations

import numpy as np
import pytest

from fedtune.serving.measures import measure

NAMES = ("a", "b", "c")


def made(n: int = 200, c: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    chance = np.random.default_rng(seed)
    probabilities = chance.dirichlet(np.ones(c), n).astype(np.float32)
    labels = np.where(chance.random(n) < 0.5, probabilities.argmax(1), chance.integers(0, c, n))
    return probabilities, labels, chance.choice(["north", "south"], n)


def test_rates_are_those_of_scikit_learn() -> None:
    reports = pytest.importorskip("sklearn.metrics")
    probabilities, labels, _ = made()
    found, said = measure(probabilities, labels, NAMES), probabilities.argmax(1)
    expected = reports.classification_report(labels, said, target_names=NAMES, output_dict=True)
    for name in NAMES:
        for ours, theirs in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
            assert found["per_class"][name][ours] == pytest.approx(expected[name][theirs])
        assert found["per_class"][name]["num_records"] == expected[name]["support"]
    assert found["f1_macro"] == pytest.approx(expected["macro avg"]["f1-score"])
    assert found["accuracy"] == pytest.approx(expected["accuracy"])
    assert found["confusion"] == reports.confusion_matrix(labels, said).tolist()
    assert found["threshold"] is None and found["num_records"] == 200


def test_a_class_that_is_not_there_has_no_rates() -> None:
    probabilities = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0]], np.float32)
    found = measure(probabilities, np.array([0, 0]), NAMES)["per_class"]
    assert found["c"] == {"num_records": 0, "precision": None, "recall": None, "f1": None}
    assert found["b"] == {"num_records": 0, "precision": 0.0, "recall": None, "f1": 0.0}


def test_the_calibration_error_of_known_cases() -> None:
    always = np.tile(np.array([[0.8, 0.2]], np.float32), (10, 1))
    right = np.array([0] * 8 + [1] * 2)
    assert measure(always, right, NAMES[:2])["calibration_error"] == pytest.approx(0.0, abs=1e-6)
    assert measure(always, 1 - right, NAMES[:2])["calibration_error"] == pytest.approx(0.6, abs=1e-6)
    # Two bins that are wrong in opposite directions do not cancel.
    mixed = np.array([[0.99, 0.01]] * 5 + [[0.55, 0.45]] * 5, np.float32)
    assert measure(mixed, np.array([1] * 5 + [0] * 5), NAMES[:2])["calibration_error"] == pytest.approx(0.72)


@pytest.mark.parametrize("seed", range(5))
def test_the_threshold_is_the_best_there_is(seed: int) -> None:
    probabilities, labels, _ = made(60, 2, seed)
    second = np.round(probabilities[:, 1], 1)  # with ties
    probabilities = np.stack([1 - second, second], 1).astype(np.float32)
    found = measure(probabilities, labels, NAMES[:2])["threshold"]

    def f1_macro(threshold: float) -> float:
        said = second >= threshold
        parts = []
        for truth, guess in ((labels == 1, said), (labels == 0, ~said)):
            hits = (truth & guess).sum()
            parts.append(2 * hits / max(1, truth.sum() + guess.sum()))
        return float(np.mean(parts))

    best = max(f1_macro(threshold) for threshold in np.linspace(-0.05, 1.05, 56))
    assert found["f1_macro"] == pytest.approx(best)
    assert f1_macro(found["probability"]) == pytest.approx(best)


def test_sites_are_apart() -> None:
    probabilities, labels, sites = made()
    found = measure(probabilities, labels, NAMES, sites)["per_site"]
    north = sites == "north"
    assert found["north"]["num_records"] == north.sum()
    assert found["north"]["accuracy"] == pytest.approx((probabilities.argmax(1) == labels)[north].mean())
    assert set(found) == {"north", "south"}


def test_nothing_is_not_measured() -> None:
    with pytest.raises(ValueError, match="nothing"):
        measure(np.zeros((0, 2), np.float32), np.zeros(0, np.int64), NAMES[:2])
