"""The deterministic simulator: nothing that must not happen does, in 200 seeds; and faults are found."""

from __future__ import annotations

import logging

import pytest

from scripts.simulator.mutants import MUTANTS
from scripts.simulator.simulation import simulate

_FOUND_BY = {  # the first seed that finds it, where that is a late one
    "checkpoint-without-sync": 49,
    "folder-without-sync": 158,
    "round-is-told-before-it-is-saved": 167,
    "torn-line-counts": 33,
}
_QUICK = ("charge-after", "ledger-without-sync", "retry-releases-again")


@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(8, 200), marks=pytest.mark.slow)])
def test_whatever_fails_nothing_happens_that_must_not(seeds: range) -> None:
    """Releases, charges, books and results hold in federations that fail; more by `scripts/simulate`."""
    kinds: set[str] = set()
    for seed in seeds:
        outcome = simulate(seed)
        assert not outcome.problem, f"scripts/simulate --seed {seed}: {outcome.problem}"
        kinds |= set(outcome.failures)
    assert kinds == {"kill", "power", "error", "read-only"}
    assert logging.getLogger("fedtune").level == logging.NOTSET  # other tests read the log


@pytest.mark.slow
def test_a_seed_replays_exactly() -> None:
    outcomes = [simulate(seed) for seed in range(4)]
    assert any(outcome.failures for outcome in outcomes) and len({one.digest for one in outcomes}) == 4
    for outcome in outcomes:
        again = simulate(outcome.seed)
        assert again.trace == outcome.trace and again.digest == outcome.digest


@pytest.mark.parametrize(
    "name", [name if name in _QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MUTANTS]
)
def test_a_fault_is_found(name: str) -> None:
    """Where the simulator was changed another seed may find it, so the others are tried after its own."""
    with MUTANTS[name]():
        found = next((seed for seed in (_FOUND_BY.get(name, 0), *range(200)) if simulate(seed).problem), None)
    assert found is not None
    assert not simulate(found).problem
