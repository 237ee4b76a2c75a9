"""Every module says what is public (`__all__`), and that is what it has; importing the package is light."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "fedtune"
MODULES = sorted(PACKAGE.rglob("*.py"))
HEAVY = (
    "torch",
    "numpy",
    "transformers",
    "flwr",
    "datasets",
    "hydra",
    "matplotlib",
    "rich",
    "scipy",
    "pandas",
    "pydantic",
)


def all_of(tree: ast.Module) -> list[str] | None:
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            assert isinstance(node, ast.Assign)
            return list(ast.literal_eval(node.value))
    return None


def defined_by(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            names.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            names.update(
                n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
            )
    return names


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def complaint(path: Path) -> str:
    """What is wrong with the names that a module calls public; '' for nothing."""
    tree, package = tree_of(path), path.name == "__init__.py"
    if not ast.get_docstring(tree):
        return "a module says what it is, why so, and what it does not do"
    public = all_of(tree)
    if public is None:
        return "" if package else "a module says what of it is public: __all__"
    # A package may name its modules.
    below = {other.stem for other in path.parent.glob("*.py")} if package else set()
    missing = sorted(set(public) - defined_by(tree) - below)
    twice = sorted({name for name in public if public.count(name) > 1})
    bare = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and node.name in public
        and not ast.get_docstring(node)
    ]
    return "; ".join(
        f"{what}: {names}"
        for what, names in (("not there", missing), ("twice", twice), ("without docstring", bare))
        if names
    )


def test_modules_have_docstrings_and_true_public_names_which_have_docstrings_too() -> None:
    found = {str(path.relative_to(PACKAGE)): complaint(path) for path in MODULES}
    assert {name: why for name, why in found.items() if why} == {}


def test_files_can_be_read_in_one_sitting() -> None:
    lines = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: count for name, count in lines.items() if count > 500} == {}


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("__all__ = []", "a module says what it is"),
        ('"""Doc."""', "__all__"),
        ('"""Doc."""\n__all__ = ["gone"]', "not there: ['gone']"),
        ('"""Doc."""\n__all__ = ["A", "A"]\nclass A:\n    """A."""', "twice: ['A']"),
        ('"""Doc."""\n__all__ = ["f"]\ndef f(): ...', "without docstring: ['f']"),
        ('"""Doc."""\n__all__ = ["f"]\ndef f():\n    """F."""', ""),
    ],
)
def test_the_test_can_fail(tmp_path: Path, source: str, why: str) -> None:
    path = tmp_path / "module.py"
    path.write_text(source)
    assert why in complaint(path) and bool(why) == bool(complaint(path))


def test_importing_the_package_is_light() -> None:
    code = f"import sys, fedtune.config; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_errors_are_the_tree_of_their_docstring() -> None:
    """The docstring of errors.py draws the tree; the classes must be that tree."""
    from fedtune import errors

    drawn: dict[str, str | None] = {}
    stack: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        word = next(
            (w for w in line.split() if w.endswith(("Error", "Exhausted", "Rejected", "Aborted"))), None
        )
        if word is None or not (line.lstrip().startswith(("|", "`")) or word == "FedtuneError"):
            continue
        depth = line.index(word)
        while stack and stack[-1][0] >= depth:
            stack.pop()
        drawn[word] = stack[-1][1] if stack else None
        stack.append((depth, word))
    real = {name: getattr(errors, name).__bases__[0].__name__ for name in errors.__all__}
    real["FedtuneError"] = None  # type: ignore[assignment]
    assert drawn == real
