"""Kept numbers: the same arguments give the same file, and a file is never believed without its checksum."""

from __future__ import annotations

import json

import pytest

from fedtune.config.paths import cache_dir
from fedtune.privacy import cache
from fedtune.privacy.cache import kept


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
