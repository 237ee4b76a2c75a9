"""The shell scripts parse, and say plainly when they cannot do their work. Nothing is installed here."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHELL = [
    path
    for path in [*sorted((ROOT / "scripts").iterdir()), ROOT / ".ci" / "run"]
    if path.is_file() and path.read_bytes().startswith(b"#!/usr/bin/env bash")
]
TOOLS = (
    "bash",
    "env",
    "cat",
    "cksum",
    "dirname",
    "grep",
    "rm",
    "mktemp",
    "tail",
    "tee",
    "chmod",
    "mkdir",
    "touch",
)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The scripts in a folder of their own, with a PATH that has no Python but the test's fakes."""
    for name in ("scripts", ".ci"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("benchmarks", "__pycache__")
        )
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        where = shutil.which(tool)
        assert where is not None
        (tmp_path / "bin" / tool).symlink_to(where)
    return tmp_path


def fake(checkout: Path, name: str, body: str) -> None:
    path = checkout / "bin" / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def call(checkout: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(checkout / command[0]), *command[1:]],
        capture_output=True,
        text=True,
        env={"PATH": str(checkout / "bin"), "HOME": str(checkout), "TMPDIR": str(checkout)},
    )


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_script_parses_and_may_be_run(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)


def test_no_python(checkout: Path) -> None:
    fake(checkout, "python3", "exit 1")  # too old
    done = call(checkout, "scripts/run")
    assert done.returncode == 1
    assert "needs Python 3.11" in done.stderr
    assert not (checkout / ".venv").exists()


def test_failed_install_is_said_and_done_again(checkout: Path) -> None:
    pip = 'if [[ "$2" == pip ]]; then echo "no space left" >&2; exit 1; fi'
    venv = f"mkdir -p .venv/bin; cat >.venv/bin/python <<'END'\n#!/usr/bin/env bash\n{pip}\nEND\n"
    venv += "chmod +x .venv/bin/python"
    fake(checkout, "python3", f'if [[ "$1 $2" == "-m venv" ]]; then\n{venv}\nfi')
    for _ in range(2):
        done = call(checkout, "scripts/test")
        assert done.returncode == 1
        assert "no space left" in done.stderr and "Setting up failed" in done.stderr


def test_set_up_once(checkout: Path) -> None:
    make = "mkdir -p .venv/bin; for f in python fedtune; do echo '#!/usr/bin/env bash' >.venv/bin/$f; done; "
    make += "echo 'echo \"called $*\"' >>.venv/bin/fedtune; chmod +x .venv/bin/*; echo made >>made"
    fake(checkout, "python3", f'if [[ "$1 $2" == "-m venv" ]]; then {make}; fi')
    for _ in range(2):
        done = call(checkout, "scripts/run", "privacy.epsilon=2", "data.name=a b")
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "called run privacy.epsilon=2 data.name=a b"
    assert (checkout / "made").read_text() == "made\n"
    (checkout / "constraints.txt").write_text("# changed\n")
    call(checkout, "scripts/run")
    assert (checkout / "made").read_text() == "made\nmade\n", "new pins, new environment"


def test_ci_says_that_it_failed(checkout: Path) -> None:
    fake(checkout, "python3", "echo 'no module named venv' >&2; exit 1")
    done = call(checkout, ".ci/run")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert any("found none of them" in line for line in lines)
    assert lines[-1] == "0 passed, 1 failed"
