"""examples/sweep: its script asks for a sweep that exists, by launchers whose settings exist."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.pages import ROOT

SCRIPT = ROOT / "examples" / "sweep" / "frontier.sh"


def started(folder: Path, *words: str, program: str) -> subprocess.CompletedProcess[str]:
    """The script with `program` in the place of `fedtune`."""
    commands = folder / "bin"
    commands.mkdir()
    (commands / "fedtune").write_text(f"#!/bin/sh\n{program}\n")
    (commands / "fedtune").chmod(0o755)
    path = f"{commands}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [str(SCRIPT), *words], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize(("how", "launcher"), [("slurm", "submitit_slurm"), ("ray", "ray")])
def test_it_asks_for_settings_that_exist(how: str, launcher: str, tmp_path: Path) -> None:
    from dataclasses import fields
    from importlib import import_module

    from fedtune.config.loader import load
    from fedtune.config.overrides import check_overrides

    done = started(tmp_path, how, "FOLDER", "seed=7", program='for word; do echo "$word"; done; echo')
    assert done.returncode == 0, done.stderr
    (run, *overrides), report = (part.split("\n") for part in done.stdout.strip().split("\n\n"))
    assert run == "run" and report == ["report", "FOLDER"]
    assert f"hydra/launcher={launcher}" in overrides
    check_overrides(overrides, multirun=True)
    if how == "slurm":
        config = import_module("hydra_plugins.hydra_submitit_launcher.config")
        known = {field.name for field in fields(config.SlurmQueueConf)}
        given = {
            word.split("=")[0].split(".")[-1] for word in overrides if word.startswith("hydra.launcher.")
        }
        assert given and given <= known
    load([word for word in overrides if not word.startswith(("hydra", "experiment"))])


def test_another_word_is_refused(tmp_path: Path) -> None:
    done = started(tmp_path, "slrum", "FOLDER", program="exit 0")
    assert done.returncode == 2 and "not 'slrum'" in done.stderr


@pytest.mark.slow
def test_it_makes_a_frontier_here(world: dict[str, Path], tmp_path: Path) -> None:
    """Two runs of a tiny federation as jobs of Submitit's local executor."""
    pytest.importorskip("submitit")
    data, folder = world["data"], tmp_path / "frontier"
    words = [
        *(f"model.name={world['model']}", "model.quantization=none", "device=cpu", "federation.num_rounds=1"),
        *("data=files", f"data.path={data}", "data.name=made-up", "data.labels=[negative,positive]"),
        *("data.test_split=test", "data.public=true", "data.max_length=16", "data.site=site"),
        *("privacy=local", "privacy.epsilon=4,8", "seed=0"),
    ]
    done = started(tmp_path, "local", str(folder), *words, program=f'exec "{sys.executable}" -m fedtune "$@"')
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "report.html").is_file() and len(list(folder.rglob("record.json"))) == 2
