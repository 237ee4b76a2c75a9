"""Cached numbers: equal arguments give one file, and no file is believed without its checksum."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fedtune.config.files import cache_dir
from fedtune.privacy.accounting import cache
from fedtune.privacy.accounting.cache import cached, cached_epsilon
from fedtune.privacy.accounting.epsilon import Term, epsilon_of_terms


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file of a session before: the suite's own cache outlives it."""
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()


def test_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def compute() -> float:
        calls.append(1)
        return 0.1 + 0.2

    assert [cached("test-once", [1, "a"], compute) for _ in range(3)] == [0.1 + 0.2] * 3
    monkeypatch.setattr(cache, "_memory", {})
    assert cached("test-once", [1, "a"], compute) == 0.1 + 0.2  # every bit of it, from the disk
    assert len(calls) == 1
    cached("test-once", [2, "a"], compute)
    assert len(calls) == 2


def test_another_kind_or_accountant_is_another_number(monkeypatch: pytest.MonkeyPatch) -> None:
    cached("test-kind", [1], lambda: 1.0)
    assert cached("test-other-kind", [1], lambda: 2.0) == 2.0
    monkeypatch.setattr(cache, "_accountant", lambda: "another version")
    assert cached("test-kind", [1], lambda: 3.0) == 3.0


def test_a_file_moved_to_other_arguments_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    cached("test-move", [1], lambda: 1.0)
    cached("test-move", [2], lambda: 2.0)
    first, second = sorted(
        (cache_dir() / "test-move").iterdir(), key=lambda path: json.loads(path.read_text())["value"]
    )
    second.write_text(first.read_text())
    monkeypatch.setattr(cache, "_memory", {})
    assert cached("test-move", [2], lambda: 2.0) == 2.0


def test_another_home_gets_files_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached("test-home", [1], lambda: 1.0)
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "elsewhere"))
    assert cached("test-home", [1], lambda: 2.0) == 2.0  # the number in memory belongs to the other home
    (file,) = (tmp_path / "elsewhere").rglob("test-home/*.json")
    assert json.loads(file.read_text())["value"] == 2.0


def test_memory_is_asked_before_the_disk_and_does_not_grow_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cache, "_memory", {str(i): 0.0 for i in range(10_000)})
    cached("test-memory", [1], lambda: 1.0)
    for file in (cache_dir() / "test-memory").iterdir():
        file.unlink()
    assert cached("test-memory", [1], lambda: 2.0) == 1.0
    assert len(cache._memory) == 10_001
    cached("test-memory", [2], lambda: 1.0)
    assert len(cache._memory) == 1


def test_a_file_that_cannot_take_its_place_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> Path:
        raise OSError("the folder is full")

    monkeypatch.setattr(Path, "replace", refuse)
    assert cached("test-full", [1], lambda: 1.5) == 1.5
    assert list((cache_dir() / "test-full").iterdir()) == []


def test_cached_epsilon_is_that_of_the_accountant(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def cached(what: str, arguments: Any, compute: Any) -> float:
        asked.append((what, arguments))
        return float(compute())

    monkeypatch.setattr(cache, "cached", cached)
    one, other = Term(0.05, 1.0), Term(0.1, 2.0)
    assert cached_epsilon({other: 2, one: 3}, 1e-5) == pytest.approx(
        epsilon_of_terms({one: 3, other: 2}, 1e-5)
    )
    cached_epsilon({one: 3, other: 2}, 1e-5)
    assert asked == [("epsilon", [[[list(one), 3], [list(other), 2]], 1e-5])] * 2
    assert cached_epsilon(None, 1e-5) == math.inf and len(asked) == 2
