"""A trust model is one file: nothing else compares its name, and names of trust models and units stand once.

Whoever needs to know what differs asks the mechanism (`fedtune.privacy.mechanisms.base.Mechanism`).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtune.config.schema import TRUSTS, UNITS
from fedtune.privacy.mechanisms.registry import MECHANISMS

PACKAGE = Path(__file__).resolve().parents[2] / "fedtune"
HOME = PACKAGE / "privacy" / "mechanisms"
NAMED_ONCE = PACKAGE / "config" / "schema.py"
DEFAULT_PERMIT = PACKAGE / "federation" / "client" / "policy.py"  # what a site permits that says nothing
_KEYS = ("trust", "privacy.trust")


def is_trust(node: ast.AST) -> bool:
    """Whether an expression is some trust model's name: `plan.trust`, `privacy["trust"]`, `trust`, ..."""
    if isinstance(node, ast.Attribute):
        return node.attr.lstrip("_") == "trust"
    if isinstance(node, ast.Name):
        return node.id.lstrip("_") == "trust"
    if isinstance(node, ast.Subscript):
        return isinstance(node.slice, ast.Constant) and node.slice.value in _KEYS
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
        return bool(node.args) and isinstance(node.args[0], ast.Constant) and node.args[0].value in _KEYS
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "str":
        return any(is_trust(argument) for argument in node.args)
    return False


def named(node: ast.AST, names: tuple[str, ...]) -> set[str]:
    """Which of `names` an expression, or what it collects, are literally."""
    parts = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
    return {one.value for one in parts if isinstance(one, ast.Constant) and one.value in names}


def comparisons(source: str) -> Iterator[int]:
    """Lines of `source` where a trust model's name decides."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            parts = [one for side in sides for one in (side, *getattr(side, "elts", ()))]
            if any(is_trust(part) for part in parts) and any(named(side, TRUSTS) for side in sides):
                yield node.lineno
        elif isinstance(node, ast.BinOp):
            inside = {name for side in (node.left, node.right) for name in named(side, TRUSTS)}
            if inside and any(is_trust(one) for one in ast.walk(node)):
                yield node.lineno
        elif isinstance(node, ast.Match) and is_trust(node.subject):
            yield node.lineno
        elif isinstance(node, ast.Dict):
            keys = {key.value for key in node.keys if isinstance(key, ast.Constant)}
            if len(keys & set(TRUSTS)) > 1 or (keys & {"distributed", "central"}):
                yield node.lineno
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("startswith", "endswith", "__eq__")
            and is_trust(node.func.value)
        ):
            yield node.lineno


def listings(source: str, names: tuple[str, ...]) -> Iterator[int]:
    """Lines where two or more of `names` are listed."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Tuple | ast.List | ast.Set) and len(named(node, names)) > 1:
            yield node.lineno


def everywhere_else(*homes: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        if HOME not in path.parents and path not in homes:
            yield path, path.read_text(encoding="utf-8")


def shown(path: Path, line: int) -> str:
    return f"{path.relative_to(PACKAGE.parent)}:{line}"


def test_nothing_outside_its_file_compares_a_trust_models_name() -> None:
    found = [shown(path, line) for path, source in everywhere_else() for line in comparisons(source)]
    assert found == []


def test_names_of_trust_models_and_units_are_listed_once() -> None:
    trusts = [
        shown(path, line)
        for path, source in everywhere_else(NAMED_ONCE, DEFAULT_PERMIT)
        for line in listings(source, TRUSTS)
    ]
    units = [
        shown(path, line) for path, source in everywhere_else(NAMED_ONCE) for line in listings(source, UNITS)
    ]
    assert trusts + units == []


def test_each_trust_model_is_registered_has_a_file_and_a_page() -> None:
    assert tuple(MECHANISMS) == TRUSTS
    assert {kind.__module__.rpartition(".")[2] for kind in MECHANISMS.values()} == set(TRUSTS)
    assert all((PACKAGE.parent / "conf" / "privacy" / f"{trust}.yaml").is_file() for trust in TRUSTS)
    assert all(set(kind.units) <= set(UNITS) for kind in MECHANISMS.values())


@pytest.mark.parametrize(
    "source",
    [
        'plan.trust == "local"',
        'if "none" != self._trust: pass',
        'x = privacy["trust"] in ("central", "none")',
        'x = settings.get("privacy.trust") == "none"',
        'x = str(record["trust"]) not in ["local"]',
        'x = {"distributed": 1, "central": 2}[privacy["trust"]]',
        'match plan.trust:\n    case "local":\n        pass',
        'x = {run.trust for run in runs} - {"none"}',
        'x = other.trust in (mine.trust, "none")',
        'x = plan.trust.startswith("dis")',
    ],
)
def test_the_test_of_comparisons_can_fail(source: str) -> None:
    assert list(comparisons(source)) == [1]


@pytest.mark.parametrize(
    "source", ['quantization == "none"', "plan.trust == other.trust", "plan.trust not in permit.trust"]
)
def test_the_test_of_comparisons_can_pass(source: str) -> None:
    assert list(comparisons(source)) == []


def test_the_test_of_listings_can_fail() -> None:
    assert list(listings('UNITS = ("record", "person", "client")', UNITS)) == [1]
    assert list(listings('x in ["local", "central"]', TRUSTS)) == [1]
    assert list(listings('("local", "ray", "deployment")', TRUSTS)) == []
