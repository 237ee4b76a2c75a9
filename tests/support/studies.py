"""The scripts of a study in `simulations/`, imported for its tests."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def import_script(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of a study as a module, which the study's other script finds under its own name."""
    if not folder.exists():
        pytest.skip("simulations/ is not part of this installation")
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module
