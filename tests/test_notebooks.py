"""The notebooks of examples/ run from top to bottom, and what is kept of their output is small.

`FEDTUNE_NOTEBOOKS=write pytest -m slow tests/test_notebooks.py` keeps their output anew.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.pages import ROOT

EXAMPLES = ROOT / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
LARGEST = 100_000  # bytes of a notebook with its output


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_output_is_kept_and_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert len(text) < LARGEST and any(cell["outputs"] for cell in cells)
    assert not [o for cell in cells for o in cell["outputs"] if o["output_type"] == "error"]
    assert "/tmp/" not in text and "site-packages" not in text, "paths of the machine that made it"


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the `fedtune` of this environment as the command that it calls."""
    nbclient = pytest.importorskip("nbclient")
    import nbformat

    shutil.copy(EXAMPLES / "visits.csv", tmp_path)
    commands = tmp_path / "bin"
    commands.mkdir()
    script = commands / "fedtune"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fedtune "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    book = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(
        book, timeout=250, kernel_name="python3", resources=place, record_timing=False
    ).execute()
    if os.environ.get("FEDTUNE_NOTEBOOKS") == "write":  # keeps the output in the repository
        for cell in book.cells:
            kept = [o for o in cell.get("outputs", ()) if o.get("name") != "stderr"]
            if cell.cell_type == "code":
                cell.outputs = kept
        text = nbformat.writes(book).replace(f"{tmp_path}{os.sep}", "")
        path.write_text(f"{text}\n", encoding="utf-8")


def test_the_visits_are_what_their_script_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support.studies import import_script

    made = import_script(EXAMPLES, "make_visits", monkeypatch).visits()
    assert (EXAMPLES / "visits.csv").read_text(encoding="utf-8") == made
