"""The examples in docstrings run, and give what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import fedtune

PACKAGE = Path(fedtune.__file__).parent
THAT_TRAIN = {"api.py", "predict.py"}  # tests/test_public_api.py runs theirs with the tiny federation
MODULES = sorted(
    "fedtune." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.name not in {"__init__.py", *THAT_TRAIN} and ">>> " in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0 and result.failed == 0


def test_accounting_and_calibration_have_one() -> None:
    assert {"fedtune.privacy.accounting.epsilon", "fedtune.privacy.accounting.calibration"} <= set(MODULES)
