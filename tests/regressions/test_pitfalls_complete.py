"""Each row of docs/pitfalls.md, the list of privacy bugs, has a test that is named after its number."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "pitfalls.md"


def test_every_pitfall_has_a_test_that_bears_its_number() -> None:
    rows = dict(re.findall(r"^\| (\d+) \|.*\| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    assert [int(number) for number in rows] == list(range(1, len(rows) + 1)) and len(rows) >= 43
    mended = {int(number) for number, why in rows.items() if not why.startswith("not yet")}
    covered = {
        int(number)
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_(?:pitfall_)?\d\w*)", path.read_text(), re.MULTILINE)
        for number in re.findall(r"(?:^test_(?:pitfall_)?|_and_)(\d+)(?=_)", name)
    }
    assert covered == mended
