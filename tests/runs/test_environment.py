"""What a run ran on is read, not guessed."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import numpy
import pytest

import fedtune
from fedtune.runs import environment


def test_versions_are_those_that_are_installed() -> None:
    found = environment.versions()
    assert found["python"] == platform.python_version()
    assert found["fedtune"] == fedtune.__version__
    assert found["numpy"] == numpy.__version__
    assert "torch" in found and "flwr" in found


def checkout(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A git repository of its own, which is taken for fedtune's."""
    module = folder / "fedtune" / "experiments" / "environment.py"
    module.parent.mkdir(parents=True)
    module.write_text("code")
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *arguments], check=True, capture_output=True)
    monkeypatch.setattr("fedtune.config.build._PACKAGE", folder / "fedtune")


def test_the_commit_is_the_codes_and_changes_make_it_dirty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout(tmp_path, monkeypatch)
    head, dirty = environment.commit()
    assert head is not None and len(head) == 40 and dirty is False
    (tmp_path / "fedtune" / "experiments" / "environment.py").write_text("other code")
    assert environment.commit() == (head, True)


def test_outside_of_a_checkout_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.config.build._PACKAGE", tmp_path / "fedtune")
    assert environment.commit() == (None, None)


def test_without_git_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout(tmp_path, monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.commit() == (None, None)


def test_hardware_is_there_and_plausible() -> None:
    found = environment.hardware()
    assert found["cores"] >= found["usable_cores"] >= 1
    assert found["processor"]
    assert found["memory_bytes"] is None or found["memory_bytes"] > 2**28
    assert found["device"] == "cpu" and found["accelerator"] is None
