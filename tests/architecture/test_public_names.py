"""Every module says what is public (`__all__`), and that is what it has; importing the package is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "fedtune"
MODULES = sorted(PACKAGE.rglob("*.py"))
IDS = [str(path.relative_to(PACKAGE)) for path in MODULES]
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


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_module_has_docstring_and_true_public_names(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstring = ast.get_docstring(tree)
    assert docstring, "a module says what it is, why so, and what it does not do"
    public = all_of(tree)
    if path.name == "__init__.py" and public is None:
        return
    assert public is not None, "a module says what of it is public: __all__"
    assert len(public) == len(set(public))
    # A package may name its modules.
    below = {other.stem for other in path.parent.glob("*.py")} if path.name == "__init__.py" else set()
    assert set(public) <= defined_by(tree) | below


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_public_names_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    public = set(all_of(tree) or ())
    bare = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and node.name in public
        and not ast.get_docstring(node)
    ]
    assert bare == []


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_files_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500


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
