"""The meter measures what it says, and never makes up what it could not measure."""

from __future__ import annotations

import sys
import threading
import time
import types
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.cost.meter import Cost, Meter

A = Cost(1.0, 2.0, 30, 400, 5, 60, 70, 0.8)
B = Cost(10.0, 0.5, 7, 300, 9, 1, 2, 0.1)


def test_costs_add_up_and_peaks_take_the_maximum() -> None:
    both = A + B
    assert both == Cost(11.0, 2.5, 37, 400, 9, 61, 72, pytest.approx(0.9))


def test_the_empty_cost_changes_nothing_and_order_does_not_matter() -> None:
    assert A + Cost() == A == Cost() + A
    assert A + B == B + A
    assert (A + B) + A == A + (B + A)


@pytest.mark.parametrize("name", ["flops", "peak_memory_bytes", "energy_kwh"])
def test_unknown_stays_unknown(name: str) -> None:
    assert getattr(A + replace(B, **{name: None}), name) is None
    assert getattr(replace(B, **{name: None}) + A, name) is None


AMOUNT = st.none() | st.integers(0, 10**6)
COSTS = st.builds(
    Cost, AMOUNT, AMOUNT, AMOUNT, AMOUNT, st.integers(0, 99), st.integers(0, 99), st.integers(0, 99), AMOUNT
)


@given(COSTS, COSTS, COSTS)
def test_law_costs_are_a_sum(one: Cost, two: Cost, three: Cost) -> None:
    """So it does not matter in which order, or in which groups, the costs of nodes and rounds are added."""
    assert one + two == two + one
    assert (one + two) + three == one + (two + three)
    assert one + Cost() == one


def test_wall_time_is_measured_and_stops() -> None:
    with Meter(energy=False) as meter:
        time.sleep(0.05)
    taken = meter.seconds
    assert 0.05 <= taken < 60.0
    time.sleep(0.02)
    assert meter.seconds == taken


def touch(size: int) -> bytearray:
    block = bytearray(size)
    block[::4096] = b"1" * len(block[::4096])
    return block


def test_peak_memory_sees_memory_that_is_gone_again_and_forgets_what_was_before() -> None:
    with Meter(energy=False) as before:
        pass
    if "this run" not in before.peak_memory_note:
        pytest.skip("this system cannot reset its high-water mark")
    with Meter(energy=False) as during:
        del_me = touch(150_000_000)
        del del_me
    with Meter(energy=False) as after:
        pass
    small, large, again = (meter.cost().peak_memory_bytes for meter in (before, during, after))
    assert small is not None and small > 5_000_000
    assert large >= small + 100_000_000
    assert again <= large - 100_000_000


@pytest.mark.slow
def test_memory_of_workers_is_counted() -> None:
    import subprocess

    program = "x = b'1' * 120_000_000; import time; time.sleep(1.5)"
    with Meter(energy=False, children=True) as meter:
        child = subprocess.Popen([sys.executable, "-c", program])
        time.sleep(1.2)
        child.kill()
        child.wait()
    with Meter(energy=False) as alone:
        pass
    assert meter.cost().peak_memory_bytes > alone.cost().peak_memory_bytes + 100_000_000
    assert "workers" in meter.peak_memory_note


def test_what_other_layers_counted_is_passed_on() -> None:
    with Meter(energy=False) as meter:
        pass
    cost = meter.cost(train_seconds=3.0, flops=12, bytes_up=5, bytes_down=6)
    assert (cost.train_seconds, cost.flops, cost.bytes_up, cost.bytes_down) == (3.0, 12, 5, 6)
    assert cost.energy_kwh is None


def test_without_codecarbon_there_is_a_reason_and_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with Meter() as meter:
        pass
    assert meter.energy.kwh is None
    assert "not installed" in meter.energy.note


class FakeTracker:
    """codecarbon's tracker as far as the meter uses it."""

    energy_consumed = 0.25
    start_fails = False
    stop_fails = False
    may_start = threading.Event()
    may_start.set()

    def __init__(self, **_: object) -> None:
        self.final_emissions_data = types.SimpleNamespace(
            energy_consumed=self.energy_consumed, duration=7.0, codecarbon_version="9.9"
        )

    def start(self) -> None:
        self.may_start.wait(60.0)
        if self.start_fails:
            raise OSError("no counter")

    def stop(self) -> None:
        if self.stop_fails:
            raise RuntimeError("gone")


def fake(monkeypatch: pytest.MonkeyPatch, **settings: object) -> None:
    module = types.ModuleType("codecarbon")
    module.OfflineEmissionsTracker = type("Tracker", (FakeTracker,), settings)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "codecarbon", module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())


def test_energy_is_passed_on_and_called_an_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch)
    with Meter() as meter:
        pass
    assert meter.energy.kwh == 0.25
    assert meter.cost().energy_kwh == 0.25
    assert "estimate" in meter.energy.note and "9.9" in meter.energy.note
    assert meter.energy.covered_seconds == 7.0


@pytest.mark.parametrize(
    "settings", [{"start_fails": True}, {"stop_fails": True}, {"energy_consumed": float("nan")}]
)
def test_an_estimator_that_fails_costs_the_number_and_not_the_run(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, object]
) -> None:
    fake(monkeypatch, **settings)
    with Meter() as meter:
        pass
    assert meter.energy.kwh is None
    assert meter.energy.note.startswith("no energy estimate")


def test_its_slow_start_does_not_hold_the_run_up(monkeypatch: pytest.MonkeyPatch) -> None:
    may_start = threading.Event()
    fake(monkeypatch, may_start=may_start)
    meter = Meter()
    meter.__enter__()  # returns while the estimator is still starting
    ended = threading.Timer(0.2, may_start.set)
    ended.start()
    meter.stop()
    assert meter.energy.start_seconds >= 0.2
    assert meter.seconds < meter.energy.start_seconds  # waiting for the estimator is not part of the run


@pytest.mark.slow
def test_the_real_codecarbon_gives_a_plausible_number(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "codecarbon")  # which other tests do not find; see tests/conftest.py
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not path.endswith("no_energy")])
    pytest.importorskip("codecarbon")
    with Meter() as meter:
        time.sleep(3.0)
    if meter.energy.kwh is None:
        assert meter.energy.note.startswith("no energy estimate")
    else:
        watts = 3.6e6 * meter.energy.kwh / max(meter.energy.covered_seconds, 1e-9)
        assert 0.1 < watts < 5000
    assert "codecarbon" not in capfd.readouterr().err
