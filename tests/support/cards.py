"""The lines of Python that a model card shows, and what they print where there is no fedtune."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["code_of", "without_fedtune"]


def code_of(page: Path, texts: Sequence[str] = ()) -> list[str]:
    """The Python blocks of a card, about its folder; with `texts`, asking them in place of its example."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    blocks = [block.replace("FOLDER", str(page.parent)) for block in blocks]
    if not texts:
        return blocks
    return [block.replace('["what a wonderful film"]', repr(list(texts))) for block in blocks]


def without_fedtune(code: str, tmp_path: Path) -> str:
    """What the code prints in a Python that has no fedtune."""
    program = "import sys\nsys.modules['fedtune'] = None\n" + code
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
