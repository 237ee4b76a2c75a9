"""Flower's internals are touched in two files: `federation/flower.py` and `deploy/flower.py`.

Its public packages, and their `__all__`, are what Flower promises to keep; everything else moves between its
versions without a word.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "fedtune"
ALLOWED = {PACKAGE / "federation" / "flower.py", PACKAGE / "deploy" / "flower.py"}
PUBLIC = ("flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.simulation")


def internals(file: Path, source: str) -> Iterator[str]:
    """Where `source` takes something of Flower that is not public, unless `file` may."""
    if file in ALLOWED:
        return
    for node in ast.walk(ast.parse(source)):
        names: list[tuple[str, str | None]] = []
        if isinstance(node, ast.Import):
            names = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__"):
                names = [(str(node.args[0].value), None)]
        for module, name in names:
            if module.split(".")[0] == "flwr" and not _is_public(module, name):
                yield f"{file.relative_to(PACKAGE.parent)}:{node.lineno} takes {module}.{name or '*'}"


def _is_public(module: str, name: str | None) -> bool:
    if name is None:
        return module in PUBLIC
    return module in PUBLIC and name in importlib.import_module(module).__all__


def test_flowers_internals_stay_in_two_files() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert set(files) >= ALLOWED
    assert [where for file in files for where in internals(file, file.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("file", "source", "touches"),
    [
        ("deploy/node.py", "from flwr.supernode.start_client_internal import _push_messages", True),
        ("engines/local.py", "def f():\n    import flwr.common.serde", True),
        ("engines/local.py", "import importlib\nimportlib.import_module('flwr.supercore.run')", True),
        ("engines/local.py", "from flwr.app.error import Error", True),
        ("engines/local.py", "from flwr import supercore", True),
        ("engines/local.py", "from flwr.app import log", True),
        ("engines/local.py", "from flwr.app import Error, Message\nfrom flwr.serverapp import Grid", False),
        ("data/partition.py", "from flwr_datasets.partitioner import IidPartitioner", False),
        ("deploy/flower.py", "from flwr.supercore.run import Run", False),
        ("federation/flower.py", "from flwr.supercore.run import Run", False),
    ],
)
def test_the_test_can_fail(file: str, source: str, touches: bool) -> None:
    assert bool(list(internals(PACKAGE / file, source))) is touches
