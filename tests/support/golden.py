"""The words of errors, in one file: `tests/golden/errors.md`, so that rewording one is a change there alone.

A test asserts the type of an error, and that its text is the one in the file under the test's own name:

    with pytest.raises(DataError) as raised:
        load(folder)
    golden(raised)

`FEDTUNE_GOLDEN=write pytest TESTS` writes the texts of these tests anew; read the difference before it is
committed. What differs from machine to machine is taken out first: paths of temporary folders (`TMP`) and
what another library said (`CAUSE`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

__all__ = ["FILE", "Golden", "read", "write"]

FILE = Path(__file__).parents[1] / "golden" / "errors.md"
_HEAD = """# What errors say

Each text under the name of the test that provokes it. `FEDTUNE_GOLDEN=write pytest TESTS` writes them anew
(see `tests/support/golden.py`).
"""


def read() -> dict[str, str]:
    """Test name -> text."""
    if not FILE.is_file():
        return {}
    parts = re.split(r"^## (.+)\n\n", FILE.read_text(), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], (text.strip() for text in parts[1::2]), strict=True))


def write(texts: dict[str, str]) -> None:
    """Replaces the file by these texts, sorted by name."""
    FILE.write_text(_HEAD + "".join(f"\n## {name}\n\n{texts[name]}\n" for name in sorted(texts)))


class Golden:
    """Compares the texts of errors that one test provokes, in their order, with those in the file."""

    def __init__(self, test: str, base: Path) -> None:
        self.test, self.base, self.count = test, base, 0
        self.texts = read()  # now, for a test may break the reading of files

    def __call__(self, raised: object) -> None:
        """`raised` is what `pytest.raises` gives, or the error itself."""
        error = getattr(raised, "value", raised)
        assert isinstance(error, BaseException)
        self.count += 1
        name = self.test if self.count == 1 else f"{self.test} ({self.count})"
        text = self._steady(error)
        if os.environ.get("FEDTUNE_GOLDEN") == "write":
            if self.texts.get(name) != text:
                self.texts[name] = text
                write(self.texts)
            return
        assert text == self.texts.get(name), f"{name}: FEDTUNE_GOLDEN=write writes {FILE.name} anew"

    def _steady(self, error: BaseException) -> str:
        text = str(error)
        cause = error.__cause__
        said = "" if cause is None else str(cause).rstrip(".")
        for part in sorted(
            {said, " ".join(said.split()), *said.splitlines()[:1]} - {""}, key=len, reverse=True
        ):
            text = text.replace(part, "CAUSE")
        text = re.sub(re.escape(str(self.base)) + r"/[^/\s'\",;:]+", "TMP", text)
        return " ".join(text.split())
