"""The mutants that `scripts/mutate` makes: which there are, which there are not, and what each changes."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path

import pytest
import yaml

from scripts.mutation.operators import mutants_of


def mutants(text: str) -> dict[str, str]:
    """Kind, before and after of each mutant, with the text that it makes."""
    text = textwrap.dedent(text)
    found = {}
    for index in range(len(mutants_of(ast.parse(text), "m"))):
        tree = ast.parse(text)
        mutant = mutants_of(tree, "m")[index]
        mutant.apply()
        found[f"{mutant.kind}: {mutant.before} -> {mutant.after}"] = ast.unparse(
            ast.fix_missing_locations(tree)
        )
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x = a < b <= c", {"x = a <= b <= c", "x = a < b < c"}),
        ("x = a + b * c", {"x = a - b * c", "x = a + b / c"}),
        ("x = -a", {"x = a"}),
        ("x = not a", {"x = a"}),
        ("x = a and b", {"x = a or b"}),
        ("x = 3", {"x = 4"}),
        ("x = 0.5", {"x = 1.5"}),
        ("x = 2000.0", {"x = 4000.0"}),
        ("x = True", {"x = False"}),
        ("x = 'noise'", {"x = 'XXnoise'"}),
        ("x = f(a, b)", {"x = f(b, a)"}),
        ("x = on_grid(a)", {"x = a"}),
        ("x = min(a, b)", {"x = max(a, b)"}),
        ("x += a", {"x -= a", "pass"}),
        ("self.x = a", {"pass"}),
        ("del a[b]", {"pass"}),
        ("if a:\n    b()", {"if not a:\n    b()", "if a:\n    pass"}),
        ("for a in b:\n    continue", {"for a in b:\n    break"}),
        ("def f():\n    return a", {"def f():\n    return None"}),
        ("def f():\n    raise E(f'no {a + 1}')", {"def f():\n    pass"}),
        ("def f(a=1):\n    pass", {"def f(a=2):\n    pass"}),
        ("x = [a for a in b if a]", {"x = [a for a in b if not a]"}),
        ("x = f'{a + 1} of {b}'", {"x = f'{a - 1} of {b}'", "x = f'{a + 2} of {b}'"}),
    ],
)
def test_each_kind(text: str, expected: set[str]) -> None:
    assert set(mutants(text).values()) == expected


@pytest.mark.parametrize(
    "text",
    [
        '"""A docstring of 3 lines."""',
        "import a",
        "__all__ = ['a']",
        "x: Literal['a', 'b']",
        "def f(a: int) -> Literal['a']:\n    assert a < 3",
        "if TYPE_CHECKING:\n    x = 3",
        "x = 'prose of several words'",
        "x = float(a)",
        "logger.warning('more than %d', a + 1)",
        "@lru_cache(maxsize=4)\ndef f():\n    pass",
    ],
)
def test_what_is_left_alone(text: str) -> None:
    assert mutants(text) == {}


def test_names_are_unique_and_outlive_a_move() -> None:
    text = "def f(a):\n    return g(a) + g(a)\n"
    names = [m.name for m in mutants_of(ast.parse(text), "m")]
    moved = [m.name for m in mutants_of(ast.parse(f"\n\n{text}"), "m")]
    assert len(set(names)) == len(names) and names == moved
    assert "m:f: unwrapped: g(a) -> a #1" in names


def test_what_runs_at_import_is_told_from_what_runs_in_a_function() -> None:
    text = "x = 1\nclass A:\n    y = 2\n    def f(self, z=3):\n        def g():\n            return 4\n"
    text += "        return g\n"
    cold = {m.before: m.cold for m in mutants_of(ast.parse(text), "m") if m.kind == "constant"}
    assert cold == {"1": True, "2": True, "3": True, "4": False}
    (inner,) = [m for m in mutants_of(ast.parse(text), "m") if m.before == "4"]
    assert inner.outermost == ("A.f", 4) and inner.where == "A.f.g" and list(inner.lines) == [6]


@pytest.mark.slow
def test_every_survivor_is_of_a_function_that_exists() -> None:
    root = Path(__file__).parents[1]
    groups = yaml.safe_load((root / "simulations" / "mutation" / "survivors.yaml").read_text())
    for name in (name for group in groups for name in group["mutants"]):
        module, where, _ = name.split(":", 2)
        tree: ast.AST = ast.parse((root / f"{module.replace('.', '/')}.py").read_text())
        for part in filter(None, where.split(".")):
            inner = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
            assert part in [n.name for n in inner], name
            tree = next(n for n in inner if n.name == part)
