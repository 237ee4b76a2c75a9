"""examples/three-sites: its script makes a federation whose sites permit the run that is submitted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fedtune.monitoring.endpoint import PORT
from tests.support.pages import ROOT

EXAMPLE = ROOT / "examples" / "three-sites"
SITES = ("harbour", "hill", "market")


def services() -> dict[str, dict[str, object]]:
    return dict(yaml.safe_load((EXAMPLE / "compose.yaml").read_text(encoding="utf-8"))["services"])


def test_the_compose_file_starts_what_the_script_makes() -> None:
    from fedtune.cli.app import command

    found = services()
    assert set(found) == {"setup", "server", "submit", *SITES}
    for site in SITES:
        words = ["node", "--config", f"/federation/{site}/node.yaml", "--monitor", str(PORT)]
        assert found[site]["command"] == words
    for name in ("server", "submit", *SITES):
        words = found[name]["command"]
        assert isinstance(words, list) and words[0] in command().commands
        # The image asks /healthz of this port: who does not listen there is never healthy.
        assert words[-2:] == ["--monitor", str(PORT)] or found[name]["healthcheck"] == {"disable": True}
    assert found["setup"]["healthcheck"] == {"disable": True}
    assert all(one["stop_grace_period"] == "150s" for one in found.values())  # after 10, Docker kills
    build = found["server"]["build"]
    assert isinstance(build, dict) and (EXAMPLE / build["context"] / build["dockerfile"]).is_file()


@pytest.mark.slow
def test_each_site_permits_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, words in (("fedtune", "-m fedtune"), ("python", "")):
        script = commands / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    place = tmp_path / "federation"
    setup = [str(EXAMPLE / "setup.sh"), str(place), "localhost:9443", str(ROOT / "examples" / "visits.csv")]
    subprocess.run(setup, check=True, capture_output=True, text=True)
    assert {path.stem for path in (place / "server" / "nodes").iterdir()} == set(SITES)
    asked = services()["submit"]["command"]
    assert isinstance(asked, list)
    settings = [word for word in asked if "=" in word and not word.startswith("hydra")]
    for site in SITES:
        lines = (place / site / "data.csv").read_text().splitlines()
        assert len(lines) > 200 and all(f",{site}," in line for line in lines[1:])
        done = subprocess.run(
            ["fedtune", "node", "--config", str(place / site / "node.yaml"), "--dry-run", *settings],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0 and "permitted" in done.stdout, done.stdout + done.stderr
    # Called again it keeps what there is.
    subprocess.run(setup, check=True, capture_output=True, text=True)
