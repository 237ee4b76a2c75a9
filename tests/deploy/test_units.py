"""The systemd units and the Compose file start commands that fedtune has, and their own tools accept them.

`systemd-analyze` and `docker-compose` look at them where they are installed.
"""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from fedtune.cli.app import command

DEPLOY = Path(__file__).parents[2] / "deploy"


def assert_is_a_command(name: str, words: list[str]) -> None:
    assert words[0] == name
    command().commands[name].make_context(name, words[1:])  # raises if it takes no such arguments


@pytest.mark.parametrize("name", ["server", "node"])
def test_systemd_units(name: str) -> None:
    unit = configparser.ConfigParser(interpolation=None, strict=True)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(DEPLOY / "systemd" / f"fedtune-{name}.service")
    program, *words = unit["Service"]["ExecStart"].split()
    assert Path(program).name == "fedtune" and Path(program).is_absolute()
    assert_is_a_command(name, words)
    # What the command writes must be writable under ProtectSystem=strict.
    writable = unit["Service"]["ReadWritePaths"]
    assert any(word.startswith(writable) for word in words)


@pytest.mark.parametrize("name", ["server", "node"])
def test_compose_file(name: str) -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    assert_is_a_command(name, [str(word) for word in services[name]["command"]])
    build = services[name]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).resolve() == (DEPLOY / "Dockerfile").resolve()


def _run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **environment}
    )


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")
@pytest.mark.parametrize("name", ["server", "node"])
def test_systemd_accepts_the_units(name: str, tmp_path: Path) -> None:
    unit = tmp_path / f"fedtune-{name}.service"
    text = (DEPLOY / "systemd" / unit.name).read_text().replace("/opt/fedtune/bin/fedtune", "/bin/true")
    unit.write_text(text)
    done = _run("systemd-analyze", "verify", str(unit))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    unit.write_text(text.replace("NoNewPrivileges", "NoNewPriviledges"))
    assert "NoNewPriviledges" in _run("systemd-analyze", "verify", str(unit)).stderr


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is not here")
def test_docker_compose_accepts_the_file() -> None:
    file = str(DEPLOY / "compose.yaml")
    done = _run("docker-compose", "-f", file, "config", FEDTUNE_DIR="/x", FEDTUNE_PORT="7443")
    assert done.returncode == 0, done.stderr
    server = yaml.safe_load(done.stdout)["services"]["server"]
    assert any("7443" in str(port) for port in server["ports"])
    without = _run("docker-compose", "-f", file, "config", FEDTUNE_DIR="")
    assert without.returncode != 0 and "the server folder" in without.stderr
