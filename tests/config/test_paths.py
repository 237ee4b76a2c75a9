"""Folders for state and cache: where they are, who may read them, what is said if they cannot be made."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from fedtune.config.paths import cache_dir, state_dir
from fedtune.errors import ResourceError


def test_below_fedtune_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "home"))
    assert state_dir() == tmp_path / "home" / "state"
    assert cache_dir() == tmp_path / "home" / "cache"
    assert state_dir().is_dir() and cache_dir().is_dir()
    assert stat.S_IMODE(state_dir().stat().st_mode) == 0o700


def test_relative_home_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDTUNE_HOME", "home")
    assert state_dir() == tmp_path / "home" / "state"


def test_platform_folders_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDTUNE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert tmp_path in state_dir().parents
    assert state_dir() != cache_dir()


def test_a_file_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").write_text("")
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "home"))
    with pytest.raises(ResourceError, match="FEDTUNE_HOME"):
        state_dir()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o500)
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "home"))
    with pytest.raises(ResourceError, match="cannot be made"):
        cache_dir()
