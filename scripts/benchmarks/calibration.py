"""How long a first calibration takes, and how near to its target it lands."""

from __future__ import annotations

import statistics
import time
from typing import Any

from fedtune.privacy.accounting import epsilon as accounting
from fedtune.privacy.accounting import pld
from fedtune.privacy.accounting.calibration import noise_multiplier_for
from fedtune.privacy.accounting.epsilon import Term, epsilon_of_terms
from scripts.benchmarks.common import write

# epsilon, delta, sample rate, steps: the default job; long trainings; small rates; both ends of epsilon.
SETTINGS = (
    (8.0, 1e-4, 0.05, 60),
    (0.1, 1e-6, 0.01, 20_000),
    (3.0, 1e-5, 0.01, 20_000),
    (20.0, 1e-5, 0.01, 20_000),
    (1.0, 1e-5, 0.001, 20_000),
    (3.0, 1e-5, 1e-4, 20_000),
    (0.1, 1e-5, 5e-4, 100_000),
    (3.0, 1e-5, 0.01, 100_000),
    (20.0, 1e-6, 0.3, 100_000),
)


def _forgotten() -> None:
    """As in a new process, whose accountant has seen nothing."""
    accounting._epsilon.cache_clear()
    pld.step_distribution.cache_clear()


def _ours(target: float, delta: float, rate: float, steps: int) -> dict[str, Any]:
    _forgotten()
    start = time.process_time()
    sigma = noise_multiplier_for(target, delta, sample_rate=rate, steps=steps, use_cache=False)
    took = time.process_time() - start
    reached = epsilon_of_terms({Term(rate, sigma): steps}, delta)
    return {
        "epsilon": target,
        "delta": delta,
        "sample_rate": rate,
        "steps": steps,
        "noise_multiplier": round(sigma, 4),
        "processor_seconds": round(took, 3),
        "reached": round(reached / target, 4),
    }


def _library(target: float, delta: float, rate: float, steps: int) -> float:
    """Seconds of dp_accounting's own calibration with its own accountant, to a hundredth of the target."""
    import dp_accounting as dp
    from dp_accounting.pld import PLDAccountant

    start = time.process_time()
    dp.calibrate_dp_mechanism(
        lambda: PLDAccountant(value_discretization_interval=min(1e-3, target / 1000)),
        lambda sigma: dp.SelfComposedDpEvent(
            dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(sigma)), steps
        ),
        target,
        delta,
        dp.LowerEndpointAndGuess(0.3, 1.0),
        tol=0.005,
    )
    return time.process_time() - start


def calibration() -> None:
    """Seconds of each first calibration, and of the library's own for two of them."""
    noise_multiplier_for(1.0, 1e-4, sample_rate=0.1, steps=10, use_cache=False)  # loads the libraries
    ours = [_ours(*setting) for setting in SETTINGS]
    compared = []
    for setting in (SETTINGS[0], SETTINGS[2]):
        theirs, mine = _library(*setting), _ours(*setting)["processor_seconds"]
        compared.append({"steps": setting[3], "library": round(theirs, 3), "fedtune": mine})
    ratios = [pair["library"] / pair["fedtune"] for pair in compared]
    write(
        "calibration",
        {
            "question": "processor seconds of a first calibration, the slowest of "
            f"{len(SETTINGS)} settings; dp_accounting's own calibration over it",
            "settings": ours,
            "compared": compared,
            "seconds_max": max(one["processor_seconds"] for one in ours),
            "reached_min": min(one["reached"] for one in ours),
            "reached_max": max(one["reached"] for one in ours),
            "ratio_median": round(statistics.median(ratios), 1),
            "target": "seconds_max below 2, reached between 0.98 and 1.00",
        },
    )
