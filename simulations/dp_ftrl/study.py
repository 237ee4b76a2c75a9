#!/usr/bin/env python
"""Does correlated noise help a trusted server, and when? Logistic regression over 2,000 made-up clients.

    python simulations/dp_ftrl/study.py

makes `records/study.json`, `figure.png` and the tables of README.md (a few minutes of one core). No BERT, no
private data. Server, clipping, noise and accounting are the package's own (`ClippedUpdates`,
`CorrelatedNoise`, `PrivacyPlan`); noise is drawn from the seed so that the record can be made again. For each
mechanism the best of the same learning rates is shown, by the accuracy on made-up test data.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if str(HERE.parents[1]) not in sys.path:  # a checkout that is not installed
    sys.path.insert(0, str(HERE.parents[1]))

import numpy as np  # noqa: E402

from fedtune.federation.server.rounds import ClippedUpdates  # noqa: E402
from fedtune.privacy.accounting.calibration import noise_multiplier_for  # noqa: E402
from fedtune.privacy.mechanisms.central import Central  # noqa: E402
from fedtune.privacy.mechanisms.matrix import (  # noqa: E402
    BandedRoot,
    CorrelatedNoise,
)
from fedtune.privacy.plan import PrivacyPlan  # noqa: E402

CLIENTS, COHORT, ROUNDS, SEPARATION = 2000, 10, 400, 200  # each client takes part at most twice
FEATURES, RECORDS, DELTA, NORM = 30, 10, 1e-4, 1.0
EPSILONS, SEEDS, RATES = (1.0, 3.0), (0, 1, 2), (0.03, 0.1, 0.3)
MECHANISMS = ("every round", "independent", "correlated", "none")
SHAPES = ((12, 1), (100, 1), (100, 4), (100, 25), (100, 100), (400, 20), (400, 200), (1000, 50))


def plan_of(mechanism: str, epsilon: float, seed: int) -> PrivacyPlan:
    """The plan of one mechanism at `epsilon`: noise for clients in every round, or in one of `SEPARATION`."""
    values: dict[str, Any] = {
        "unit": "client", "num_rounds": ROUNDS, "max_grad_norm": NORM, "declared_size": CLIENTS,
        "nodes": CLIENTS,
        "delta": DELTA, "reproducible_noise": True, "seed": seed, "target_epsilon": epsilon,
    }  # fmt: skip
    steps = ROUNDS if mechanism == "every round" else 1
    values["noise_multiplier"] = noise_multiplier_for(epsilon, DELTA, sample_rate=1.0, steps=steps)
    if mechanism in ("independent", "correlated"):
        bands = SEPARATION if mechanism == "correlated" else 1
        central = Central(cohort_size=COHORT, method="dp_ftrl", bands=bands, min_separation=SEPARATION)
    else:
        central = Central(cohort_size=COHORT)
    return PrivacyPlan(mechanism=central, **values)


def world(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features [clients, records, d] and labels of the clients, and of 5,000 test records."""
    rng = np.random.default_rng([77, seed])
    truth = rng.standard_normal(FEATURES) / math.sqrt(FEATURES) * 3.0
    shift = rng.standard_normal((CLIENTS, 1, FEATURES)) * 0.5  # clients differ
    x = rng.standard_normal((CLIENTS, RECORDS, FEATURES)) + shift
    test = rng.standard_normal((5000, FEATURES))
    y = (rng.random((CLIENTS, RECORDS)) < 1 / (1 + np.exp(-(x @ truth)))) * 1.0
    return x, y, test, (rng.random(5000) < 1 / (1 + np.exp(-(test @ truth)))) * 1.0


def train(mechanism: str, epsilon: float, seed: int, rate: float) -> list[float]:
    """Test accuracy after every twentieth round."""
    x, y, test, labels = world(seed)
    plan = plan_of(mechanism, epsilon, seed)
    root, order = plan.root(), np.random.default_rng([78, seed]).permutation(CLIENTS)
    correlated = None if root is None else CorrelatedNoise(root, FEATURES)
    weights, found = np.zeros(FEATURES), []
    for round in range(1, ROUNDS + 1):
        server, clipped = ClippedUpdates(plan, FEATURES), np.zeros(FEATURES)
        start = (round - 1) % SEPARATION * COHORT
        for client in order[start : start + COHORT]:
            error = 0.5 * (1 + np.tanh(0.5 * (x[client] @ weights))) - y[client]
            change = -(error @ x[client]) / RECORDS
            if mechanism == "none":
                clipped += plan.clip_factors([np.linalg.norm(change)])[0] * change / COHORT
            else:
                server.add(change)
        if mechanism != "none":
            clipped, _ = server.release(plan.entropy("server", round, 1), correlated, round)
        weights = weights + rate * clipped
        if round % 20 == 0:
            found.append(float(np.mean((test @ weights > 0) == (labels > 0.5))))
    return found


def study() -> dict[str, Any]:
    """By epsilon and mechanism: the best learning rate, its curve and final accuracy over the seeds."""
    results = []
    for epsilon in EPSILONS:
        for mechanism in MECHANISMS:
            if mechanism == "none" and epsilon != EPSILONS[0]:
                results.append({**results[len(MECHANISMS) - 1], "target": epsilon})
                continue
            curves = {rate: np.array([train(mechanism, epsilon, s, rate) for s in SEEDS]) for rate in RATES}
            best = max(RATES, key=lambda rate: float(curves[rate][:, -1].mean()))
            final = curves[best][:, -1]
            plan = plan_of(mechanism, epsilon, 0)
            results.append(
                {
                    "mechanism": mechanism,
                    "epsilon": None if mechanism == "none" else plan.epsilon(),
                    "target": epsilon,
                    "noise_std_of_a_sum": 0.0 if mechanism == "none" else plan.noise_std(),
                    "rate": best,
                    "accuracy": [round(float(one), 4) for one in final],
                    "curve": [round(float(one), 4) for one in curves[best].mean(axis=0)],
                }
            )
            print(f"epsilon {epsilon:g}  {mechanism:12s} rate {best:g}  accuracy {final.mean():.3f}")
    ratios = [[n, b, BandedRoot(n, b, b).error_ratio(), BandedRoot(n, n, b).error_ratio()] for n, b in SHAPES]
    settings = {
        "clients": CLIENTS, "cohort_size": COHORT, "rounds": ROUNDS, "min_separation": SEPARATION,
        "delta": DELTA, "unit": "client", "adjacency": plan_of("independent", 1.0, 0).adjacency(),
        "max_grad_norm": NORM, "seeds": list(SEEDS), "rates": list(RATES), "reproducible_noise": True,
    }  # fmt: skip
    return {"settings": settings, "results": results, "error_ratios": ratios}


def tables(found: dict[str, Any]) -> str:
    """The tables of README.md."""
    lines = ["| epsilon | " + " | ".join(MECHANISMS) + " |", "|---|" + "---|" * len(MECHANISMS)]
    for epsilon in EPSILONS:
        mine = [one for one in found["results"] if one["target"] == epsilon]
        cells = [f"{np.mean(one['accuracy']):.3f} +- {np.std(one['accuracy']):.3f}" for one in mine]
        lines.append(f"| {epsilon:g} | " + " | ".join(cells) + " |")
    lines += ["", "| rounds | min_separation | times in all | bands = min_separation | bands = rounds |"]
    lines.append("|---|---|---|---|---|")
    for n, b, banded, full in found["error_ratios"]:
        lines.append(f"| {n} | {b} | {-(-n // b)} | {banded:.2f} | {full:.2f} |")
    return "\n".join(lines) + "\n"


def draw(found: dict[str, Any]) -> None:
    """figure.png: accuracy over rounds at the middle epsilon."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    styles = zip(("#D55E00", "#E69F00", "#0072B2", "#4D4D4D"), "^sov", ("-", "-", "-", "--"), strict=True)
    looks = dict(zip(MECHANISMS, styles, strict=True))  # told apart without colour, too
    for one in found["results"]:
        if one["target"] == EPSILONS[1]:
            color, mark, line = looks[one["mechanism"]]
            said = {"color": color, "marker": mark, "linestyle": line, "label": one["mechanism"]}
            axes.plot(range(20, ROUNDS + 1, 20), one["curve"], markersize=4, **said)
    axes.set(xlabel="round", ylabel="accuracy on test data (mean of 3 seeds)")
    axes.set_title(f"Epsilon {EPSILONS[1]:g} per client, delta {DELTA:g}", loc="left", fontsize=11)
    axes.legend(frameon=False)
    figure.savefig(HERE / "figure.png")


def main() -> None:
    """Runs everything and rewrites record, figure and the tables in README.md."""
    found = study()
    (HERE / "records").mkdir(exist_ok=True)
    (HERE / "records" / "study.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw(found)
    page, mark = HERE / "README.md", "<!-- tables -->\n"
    before, _, rest = page.read_text(encoding="utf-8").partition(mark)
    after = rest.partition(mark)[2]
    page.write_text(before + mark + tables(found) + mark + after, encoding="utf-8")


if __name__ == "__main__":
    main()
