"""What README.md says of the command line is true: its blocks are compared with the real output."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedtune.config.convert import settings
from fedtune.config.pages import GROUPS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# Settings of Hydra's own, which the schema does not have.
HYDRAS = {"hydra.run.dir", "hydra.sweep.dir"}


def test_help_in_readme_is_the_real_help() -> None:
    """If this fails, put the output of `COLUMNS=100 fedtune --help` into the block under '## Commands'."""
    block = re.search(r"<!-- fedtune --help.*?-->\n```\n(.*?)```", README, re.DOTALL)
    assert block is not None
    real = subprocess.run(
        [sys.executable, "-m", "fedtune.cli.app", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "PYTHON_COLORS": "0"},
    ).stdout
    assert block.group(1).strip() == "\n".join(line.rstrip() for line in real.splitlines()).strip()


def test_settings_named_in_readme_exist() -> None:
    table = README[README.index("## Settings") : README.index("## Commands")]
    names = {word.split("=")[0] for word in re.findall(r"`([a-z_.]+(?:=[^`]*)?)`", table)}
    names -= {"conf", "conf/", "group.setting"}
    unknown = names - set(settings()) - set(GROUPS) - HYDRAS
    assert not unknown


@pytest.mark.parametrize("script", sorted(set(re.findall(r"scripts/(\w+)", README))))
def test_scripts_named_in_readme_exist(script: str) -> None:
    path = ROOT / "scripts" / script
    assert path.is_file() and path.stat().st_mode & 0o111
