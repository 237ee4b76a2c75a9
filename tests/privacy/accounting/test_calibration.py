"""Calibration: the noise that meets a target, and numbers that are cached on disk."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedtune.config.files import cache_dir
from fedtune.errors import CalibrationError, PrivacyError
from fedtune.privacy.accounting import calibration
from fedtune.privacy.accounting.calibration import cached, cached_epsilon, noise_multiplier_for
from fedtune.privacy.accounting.epsilon import Term, epsilon_of_terms
from tests.support.golden import Golden
from tests.support.work import Points

TYPICAL = [
    (8.0, 1e-4, 0.05, 60),
    (1.0, 1e-5, 0.05, 60),
    (3.0, 1e-5, 0.01, 1000),
    (0.1, 1e-5, 0.05, 60),
    (50.0, 1e-5, 0.05, 60),
    (8.0, 1e-5, 1.0, 12),
    (0.01, 1e-5, 0.05, 60),
    (2.0, 1e-6, 0.3, 200),
]


@pytest.mark.parametrize(("target", "delta", "rate", "steps"), TYPICAL)
def test_lands_between_98_and_100_percent_of_the_target(
    target: float, delta: float, rate: float, steps: int
) -> None:
    sigma = noise_multiplier_for(target, delta, sample_rate=rate, steps=steps, use_cache=False)
    reached = epsilon_of_terms({Term(rate, sigma): steps}, delta)
    assert 0.98 * target <= reached <= target
    # Noise at two thirds would break the promise.
    assert epsilon_of_terms({Term(rate, sigma * 2 / 3): steps}, delta) > target


# Long trainings, small rates, both ends of epsilon, and the settings that once took seconds to minutes.
HARD = [
    (3.0, 1e-5, 0.01, 20_000),
    (20.0, 1e-5, 0.01, 20_000),
    (3.0, 1e-5, 1e-4, 20_000),
    (0.1, 1e-6, 0.001, 20_000),
    (1.0, 1e-5, 0.001, 20_000),
    (8.0, 1e-6, 0.3, 100_000),
    (0.1, 1e-5, 5e-4, 100_000),
    (3.0, 1e-5, 0.001, 100_000),
    (0.1, 1e-5, 1e-5, 100_000),
    (20.0, 1e-7, 1e-5, 100_000),
    (0.1, 1e-5, 1e-5, 1),
    (0.5, 1e-5, 1.0, 20_000),
]


@pytest.mark.parametrize(("target", "delta", "rate", "steps"), HARD)
def test_the_first_call_takes_about_a_second(
    target: float, delta: float, rate: float, steps: int, pld_points: Points
) -> None:
    sigma = noise_multiplier_for(target, delta, sample_rate=rate, steps=steps, use_cache=False)
    assert 0 < pld_points.number < 6_000_000  # about ten million a second
    assert 0.98 * target <= epsilon_of_terms({Term(rate, sigma): steps}, delta) <= target


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 60, 20_000, 100_000])
@pytest.mark.parametrize("rate", [1e-4, 1e-3, 0.01, 0.3, 1.0])
def test_a_grid_of_settings_is_never_above_the_target_nor_far_below(rate: float, steps: int) -> None:
    for target in (0.1, 1.0, 3.0, 8.0, 20.0):
        reached = calibrated(target, 1e-6, rate, steps)
        if reached is not None:
            assert 0.98 * target <= reached <= target
        else:  # refused rightly: the most noise there is does not meet it
            most = epsilon_of_terms({Term(rate, calibration.MAX_NOISE_MULTIPLIER): steps}, 1e-6)
            assert most > target


def calibrated(target: float, delta: float, rate: float, steps: int) -> float | None:
    try:
        sigma = noise_multiplier_for(target, delta, sample_rate=rate, steps=steps, use_cache=False)
    except CalibrationError:
        return None
    return epsilon_of_terms({Term(rate, sigma): steps}, delta)


def _forbidden(*arguments: object) -> float:
    raise AssertionError("calibrated again")


def test_the_second_call_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first = noise_multiplier_for(4.0, 1e-5, sample_rate=0.05, steps=61)
    monkeypatch.setattr(calibration, "_search", _forbidden)
    assert noise_multiplier_for(4.0, 1e-5, sample_rate=0.05, steps=61) == first
    monkeypatch.setattr(calibration, "_memory", {})  # as in a new process: from the disk
    assert noise_multiplier_for(4.0, 1e-5, sample_rate=0.05, steps=61) == first


def test_a_new_process_needs_no_accountant() -> None:
    first = noise_multiplier_for(4.0, 1e-5, sample_rate=0.05, steps=62)
    code = (
        "import sys; from fedtune.privacy.accounting.calibration import noise_multiplier_for as f; "
        "print(repr(f(4.0, 1e-5, sample_rate=0.05, steps=62)), 'dp_accounting' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == [repr(first), "False"]


def test_other_arguments_are_other_entries() -> None:
    base = noise_multiplier_for(4.0, 1e-5, sample_rate=0.05, steps=60)
    assert noise_multiplier_for(4.1, 1e-5, sample_rate=0.05, steps=60) < base
    assert noise_multiplier_for(4.0, 1e-6, sample_rate=0.05, steps=60) > base
    assert noise_multiplier_for(4.0, 1e-5, sample_rate=0.06, steps=60) > base
    assert noise_multiplier_for(4.0, 1e-5, sample_rate=0.05, steps=66) > base


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "null",
        lambda text: "[]",
        lambda text: text.replace('"value": ', '"value": 0.5'),
        lambda text: json.dumps({**json.loads(text), "value": 0.01}),  # too little noise, well-formed
        lambda text: json.dumps({**json.loads(text), "value": True}),
    ],
)
def test_a_damaged_cache_is_ignored_and_made_again(damage, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    first = noise_multiplier_for(6.0, 1e-5, sample_rate=0.05, steps=12)
    files = [p for p in (cache_dir() / "calibration").iterdir() if "[6.0, 1e-05, 0.05, 12]" in p.read_text()]
    assert len(files) == 1
    files[0].write_text(damage(files[0].read_text()))
    monkeypatch.setattr(calibration, "_memory", {})
    assert noise_multiplier_for(6.0, 1e-5, sample_rate=0.05, steps=12) == first
    assert json.loads(files[0].read_text())["value"] == first


def test_an_unusable_cache_costs_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("FEDTUNE_HOME", str(file))  # no folder can be made below a file
    sigma = noise_multiplier_for(8.0, 1e-4, sample_rate=1.0, steps=3)
    assert 0.98 * 8.0 <= epsilon_of_terms({Term(1.0, sigma): 3}, 1e-4) <= 8.0


@pytest.mark.slow
def test_two_processes_may_fill_one_cache_at_once(tmp_path: Path) -> None:
    code = (
        "from fedtune.privacy.accounting.calibration import noise_multiplier_for as f; "
        "print(repr(f(8.0, 1e-4, sample_rate=1.0, steps=4)))"
    )
    environment = {**os.environ, "FEDTUNE_HOME": str(tmp_path)}
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    answers = {process.communicate()[0].strip() for process in running}
    assert len(answers) == 1
    assert [path.suffix for path in (tmp_path / "cache" / "calibration").iterdir()] == [".json"]


def test_an_epsilon_that_no_noise_meets_names_the_smallest_that_can_be_reached(golden: Golden) -> None:
    with pytest.raises(CalibrationError) as raised:
        noise_multiplier_for(1e-4, 1e-5, sample_rate=0.05, steps=60)
    assert "0.0006" in str(raised.value)
    assert "train.sample_rate" in str(raised.value)
    golden(raised)


def test_an_epsilon_that_needs_no_noise_is_refused() -> None:
    with pytest.raises(CalibrationError, match="trust=none"):
        noise_multiplier_for(1e6, 1e-5, sample_rate=0.05, steps=60)


def test_a_delta_that_alone_allows_everything_ends_in_a_sentence() -> None:
    # Below delta = sample_rate, one step "meets" epsilon 0 with no noise at all.
    with pytest.raises(CalibrationError):
        noise_multiplier_for(0.5, 0.02, sample_rate=0.01, steps=1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"target_epsilon": 0.0}, "epsilon"),
        ({"target_epsilon": -1.0}, "epsilon"),
        ({"target_epsilon": math.nan}, "epsilon"),
        ({"target_epsilon": math.inf}, "epsilon"),
        ({"target_epsilon": True}, "epsilon"),
        ({"delta": 0.0}, "delta"),
        ({"delta": 1.0}, "delta"),
        ({"sample_rate": 0.0}, "sample_rate"),
        ({"sample_rate": 1.1}, "sample_rate"),
        ({"steps": 0}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"steps": True}, "steps"),
    ],
)
def test_arguments_without_meaning_are_named(changes: dict[str, float], named: str) -> None:
    values = {"target_epsilon": 1.0, "delta": 1e-5, "sample_rate": 0.05, "steps": 60, **changes}
    with pytest.raises(PrivacyError, match=named):
        noise_multiplier_for(**values)  # type: ignore[arg-type]


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file of a session before: the suite's own cache outlives it."""
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()


@pytest.mark.usefixtures("empty_cache")
def test_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def compute() -> float:
        calls.append(1)
        return 0.1 + 0.2

    assert [cached("test-once", [1, "a"], compute) for _ in range(3)] == [0.1 + 0.2] * 3
    monkeypatch.setattr(calibration, "_memory", {})
    assert cached("test-once", [1, "a"], compute) == 0.1 + 0.2  # every bit of it, from the disk
    assert len(calls) == 1
    cached("test-once", [2, "a"], compute)
    assert len(calls) == 2


@pytest.mark.usefixtures("empty_cache")
def test_another_kind_or_accountant_is_another_number(monkeypatch: pytest.MonkeyPatch) -> None:
    cached("test-kind", [1], lambda: 1.0)
    assert cached("test-other-kind", [1], lambda: 2.0) == 2.0
    monkeypatch.setattr(calibration, "_accountant", lambda: "another version")
    assert cached("test-kind", [1], lambda: 3.0) == 3.0


@pytest.mark.usefixtures("empty_cache")
def test_a_file_moved_to_other_arguments_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    cached("test-move", [1], lambda: 1.0)
    cached("test-move", [2], lambda: 2.0)
    first, second = sorted(
        (cache_dir() / "test-move").iterdir(), key=lambda path: json.loads(path.read_text())["value"]
    )
    second.write_text(first.read_text())
    monkeypatch.setattr(calibration, "_memory", {})
    assert cached("test-move", [2], lambda: 2.0) == 2.0


@pytest.mark.usefixtures("empty_cache")
def test_another_home_gets_files_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached("test-home", [1], lambda: 1.0)
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "elsewhere"))
    assert cached("test-home", [1], lambda: 2.0) == 2.0  # the number in memory belongs to the other home
    (file,) = (tmp_path / "elsewhere").rglob("test-home/*.json")
    assert json.loads(file.read_text())["value"] == 2.0


@pytest.mark.usefixtures("empty_cache")
def test_memory_is_asked_before_the_disk_and_does_not_grow_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calibration, "_memory", {str(i): 0.0 for i in range(10_000)})
    cached("test-memory", [1], lambda: 1.0)
    for file in (cache_dir() / "test-memory").iterdir():
        file.unlink()
    assert cached("test-memory", [1], lambda: 2.0) == 1.0
    assert len(calibration._memory) == 10_001
    cached("test-memory", [2], lambda: 1.0)
    assert len(calibration._memory) == 1


@pytest.mark.usefixtures("empty_cache")
def test_a_file_that_cannot_take_its_place_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> Path:
        raise OSError("the folder is full")

    monkeypatch.setattr(Path, "replace", refuse)
    assert cached("test-full", [1], lambda: 1.5) == 1.5
    assert list((cache_dir() / "test-full").iterdir()) == []


@pytest.mark.usefixtures("empty_cache")
def test_cached_epsilon_is_that_of_the_accountant(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def cached(what: str, arguments: Any, compute: Any) -> float:
        asked.append((what, arguments))
        return float(compute())

    monkeypatch.setattr(calibration, "cached", cached)
    one, other = Term(0.05, 1.0), Term(0.1, 2.0)
    assert cached_epsilon({other: 2, one: 3}, 1e-5) == pytest.approx(
        epsilon_of_terms({one: 3, other: 2}, 1e-5)
    )
    cached_epsilon({one: 3, other: 2}, 1e-5)
    assert asked == [("epsilon", [[[list(one), 3], [list(other), 2]], 1e-5])] * 2
    assert cached_epsilon(None, 1e-5) == math.inf and len(asked) == 2
