"""No circle between files: who reads one file must not have to read another first that needs this one.

Imports inside functions count, for a late import hides a circle and does not remove it. Those for type
checking alone do not, nor does the implicit import of the packages that a module lies in.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
Graph = dict[str, set[str]]


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


class _Imports(ast.NodeVisitor):
    """Collects the full names that a module imports, except below `if TYPE_CHECKING:`."""

    def __init__(self, package: str) -> None:
        self.package, self.names = package, list[str]()

    def visit_If(self, node: ast.If) -> None:
        if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            self.generic_visit(node)
            return
        for child in node.orelse:
            self.visit(child)

    def visit_Import(self, node: ast.Import) -> None:
        self.names += [alias.name for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        # Scripts of one study import one another by their bare names.
        base = node.module or ""
        self.names += [f"{base}.{alias.name}" for alias in node.names]


def imported(source: str, module: str, modules: set[str]) -> Iterator[str]:
    """The modules among `modules` that `source`, the text of `module`, imports."""
    package = module.rpartition(".")[0]
    visitor = _Imports(package)
    visitor.visit(ast.parse(source))
    for name in visitor.names:
        for candidate in (name, name.rpartition(".")[0]):
            # A script of a study imports its neighbours by their bare names; in fedtune `ray` is the library.
            bare = () if package.split(".")[0] == "fedtune" else (f"{package}.{candidate}",)
            found = next((full for full in (candidate, *bare) if full in modules), None)
            if found is not None:
                if found != module:
                    yield found
                break


def graph_of(sources: dict[str, str]) -> Graph:
    return {module: set(imported(source, module, set(sources))) for module, source in sources.items()}


def circle_in(graph: Graph) -> list[str]:
    """The modules of one circle, the first again at the end; empty if there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def sources_below(folder: str) -> dict[str, str]:
    return {module_name(file): file.read_text(encoding="utf-8") for file in (ROOT / folder).rglob("*.py")}


@pytest.mark.parametrize("folder", ["fedtune", "simulations", "scripts", "hydra_plugins"])
def test_no_circle_between_files(folder: str) -> None:
    sources = sources_below(folder)
    assert sources
    assert circle_in(graph_of(sources)) == []


@pytest.mark.parametrize(
    ("first", "second", "circle"),
    [
        ("from p import b", "from p import a", True),
        ("import p.b", "from p.a import x", True),
        ("def f():\n    from p.b import x", "def g():\n    import p.a", True),
        ("import b", "from a import x", True),  # two scripts in one folder
        ("if TYPE_CHECKING:\n    from p.b import x", "from p import a", False),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    from p.b import x", "from p import a", True),
        ("from p import b", "from q import a", False),
    ],
)
def test_the_test_can_fail(first: str, second: str, circle: bool) -> None:
    assert bool(circle_in(graph_of({"p.a": first, "p.b": second}))) is circle
