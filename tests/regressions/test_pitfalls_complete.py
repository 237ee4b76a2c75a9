"""Each of the thirty rows of the list of privacy bugs has a regression test that is named after it."""

from __future__ import annotations

import re
from pathlib import Path

BUGS = 30  # rows of the list; none is without a meaning here


def test_every_pitfall_has_a_test_that_bears_its_number() -> None:
    covered = {
        int(number)
        for path in Path(__file__).parent.glob("test_pitfalls_*.py")
        for name in re.findall(r"^def (test_(?:pitfall_)?\d\w*)", path.read_text(), re.MULTILINE)
        for number in re.findall(r"(?:^test_(?:pitfall_)?|_and_)(\d+)(?=_)", name)
    }
    assert covered >= set(range(1, BUGS + 1))
