"""The systemd units and the Compose file start commands that fedtune has, and their own tools accept them.

`systemd-analyze` and `docker-compose` look at them where they are installed.
"""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fedtune.cli.app import command
from fedtune.deploy.provision import _NODE_YAML

DEPLOY = Path(__file__).parents[2] / "deploy"


def assert_is_a_command(name: str, words: list[str]) -> None:
    assert words[0] == name
    command().commands[name].make_context(name, words[1:])  # raises if it takes no such arguments


def unit_of(name: str) -> configparser.ConfigParser:
    unit = configparser.ConfigParser(interpolation=None, strict=False)  # SystemCallFilter stands there twice
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(DEPLOY / "systemd" / f"fedtune-{name}.service")
    return unit


@pytest.mark.parametrize("name", ["server", "node"])
def test_systemd_units(name: str) -> None:
    unit = unit_of(name)["Service"]
    program, *words = unit["ExecStart"].split()
    assert Path(program).name == "fedtune" and Path(program).is_absolute()
    assert_is_a_command(name, words)
    assert int(unit["LimitNOFILE"]) >= 4096 and unit["MemoryMax"][-1] in "G%" and unit["LimitCORE"] == "0"
    assert unit["ProtectSystem"] == "strict"  # so that it writes what is named and no more
    writable = Path(unit["ReadWritePaths"])
    if name == "server":
        assert words[1] == str(writable)
    else:
        # What a site permits is its owner's to say: the node writes its books beside that file, and not it.
        file = Path(words[words.index("--config") + 1])
        assert writable == file.parent / "state" and writable not in (file, *file.parents)
        books = re.findall(r"(?:ledger|audit_log): (\S+)", _NODE_YAML)
        assert len(books) == 2 and all((file.parent / book).is_relative_to(writable) for book in books)


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


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not here")
@pytest.mark.parametrize("name", ["server", "node"])
def test_systemd_finds_little_that_a_unit_could_still_do(name: str, tmp_path: Path) -> None:
    def exposure(file: Path) -> float:
        done = _run("systemd-analyze", "security", "--offline=true", "--no-pager", str(file))
        found = re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)
        assert found is not None, done.stderr
        return float(found[1])

    unit = DEPLOY / "systemd" / f"fedtune-{name}.service"
    assert exposure(unit) <= 2.5
    loose = tmp_path / unit.name
    loose.write_text(unit.read_text().replace("SystemCallFilter", "#").replace("CapabilityBoundingSet=", "#"))
    assert exposure(loose) > 2.5


@pytest.mark.slow
def test_the_server_needs_no_memory_that_is_both_written_and_run(tmp_path: Path) -> None:
    """Its unit says MemoryDenyWriteExecute; the kernel can be told the same of one process."""
    program = (
        "import ctypes, sys\n"
        "from pathlib import Path\n"
        "if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0): sys.exit(77)  # PR_SET_MDWE: Linux 6.3 and later\n"
        "import mmap\n"
        "try: mmap.mmap(-1, 4096, prot=mmap.PROT_WRITE | mmap.PROT_EXEC)\n"
        "except PermissionError: pass\n"
        "else: sys.exit('it is not denied')\n"
        "from fedtune.deploy import flower, server\n"
        "flower.superlink_app(Path(sys.argv[1]), '127.0.0.1', 9)\n"
        "from fedtune.deploy.certificates import make_authority, check_authority\n"
        "make_authority(Path(sys.argv[1]), 'trial'); check_authority(Path(sys.argv[1]))\n"
    )
    for name in ("ca.crt", "server.crt", "server.key"):
        (tmp_path / name).write_text("")
    (tmp_path / "ca.crt").unlink()
    done = _run(sys.executable, "-c", program, str(tmp_path))
    if done.returncode == 77:
        pytest.skip("this kernel cannot deny it to one process")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is not here")
def test_docker_compose_accepts_the_file() -> None:
    file = str(DEPLOY / "compose.yaml")
    done = _run("docker-compose", "-f", file, "config", FEDTUNE_DIR="/x", FEDTUNE_PORT="7443")
    assert done.returncode == 0, done.stderr
    server = yaml.safe_load(done.stdout)["services"]["server"]
    assert any("7443" in str(port) for port in server["ports"])
    without = _run("docker-compose", "-f", file, "config", FEDTUNE_DIR="")
    assert without.returncode != 0 and "the server folder" in without.stderr
