"""Kept numbers: the same arguments give the same file, and a file is never believed without its checksum."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedtune.config.paths import cache_dir
from fedtune.privacy.accounting import cache
from fedtune.privacy.accounting.cache import kept


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

    assert [kept("test-once", [1, "a"], compute) for _ in range(3)] == [0.1 + 0.2] * 3
    monkeypatch.setattr(cache, "_memory", {})
    assert kept("test-once", [1, "a"], compute) == 0.1 + 0.2  # every bit of it, from the disk
    assert len(calls) == 1
    kept("test-once", [2, "a"], compute)
    assert len(calls) == 2


def test_another_kind_or_accountant_is_another_number(monkeypatch: pytest.MonkeyPatch) -> None:
    kept("test-kind", [1], lambda: 1.0)
    assert kept("test-other-kind", [1], lambda: 2.0) == 2.0
    monkeypatch.setattr(cache, "_accountant", lambda: "another version")
    assert kept("test-kind", [1], lambda: 3.0) == 3.0


def test_a_file_moved_to_other_arguments_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    kept("test-move", [1], lambda: 1.0)
    kept("test-move", [2], lambda: 2.0)
    first, second = sorted(
        (cache_dir() / "test-move").iterdir(), key=lambda path: json.loads(path.read_text())["value"]
    )
    second.write_text(first.read_text())
    monkeypatch.setattr(cache, "_memory", {})
    assert kept("test-move", [2], lambda: 2.0) == 2.0


def test_another_home_gets_files_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept("test-home", [1], lambda: 1.0)
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "elsewhere"))
    assert kept("test-home", [1], lambda: 2.0) == 2.0  # the number in memory belongs to the other home
    (file,) = (tmp_path / "elsewhere").rglob("test-home/*.json")
    assert json.loads(file.read_text())["value"] == 2.0


def test_memory_is_asked_before_the_disk_and_does_not_grow_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cache, "_memory", {str(i): 0.0 for i in range(10_000)})
    kept("test-memory", [1], lambda: 1.0)
    for file in (cache_dir() / "test-memory").iterdir():
        file.unlink()
    assert kept("test-memory", [1], lambda: 2.0) == 1.0
    assert len(cache._memory) == 10_001
    kept("test-memory", [2], lambda: 1.0)
    assert len(cache._memory) == 1


def test_a_file_that_cannot_take_its_place_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> Path:
        raise OSError("the folder is full")

    monkeypatch.setattr(Path, "replace", refuse)
    assert kept("test-full", [1], lambda: 1.5) == 1.5
    assert list((cache_dir() / "test-full").iterdir()) == []
