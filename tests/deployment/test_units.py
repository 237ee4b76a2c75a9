"""The systemd units and the Compose file start commands that fedtune has. (Neither program is run here.)"""

from __future__ import annotations

import configparser
from pathlib import Path

import pytest
import yaml

from fedtune.cli import _parser

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.mark.parametrize("name", ["server", "node"])
def test_systemd_units(name: str) -> None:
    unit = configparser.ConfigParser(interpolation=None, strict=True)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(DEPLOY / "systemd" / f"fedtune-{name}.service")
    program, *words = unit["Service"]["ExecStart"].split()
    assert Path(program).name == "fedtune" and Path(program).is_absolute()
    assert _parser().parse_args(words).command == name
    # What the command writes must be writable under ProtectSystem=strict.
    writable = unit["Service"]["ReadWritePaths"]
    assert any(word.startswith(writable) for word in words)


@pytest.mark.parametrize("name", ["server", "node"])
def test_compose_file(name: str) -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert _parser().parse_args([str(word) for word in services[name]["command"]]).command == name
    build = services[name]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).resolve() == (DEPLOY / "Dockerfile").resolve()
