"""The time that each page of docs/ says it takes: that of its record, whose commands stand on the page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fedtune.runs.summary import duration
from tests.support.pages import ROOT, blocks
from tests.support.studies import import_script

STUDY = ROOT / "simulations" / "first_hour"
RECORDS = sorted(path.stem for path in (STUDY / "records").glob("*.json"))
TYPED = [page for page in RECORDS if page != "setup"]
TO_READ = [
    path for path in sorted((ROOT / "docs").glob("*.md")) if path.stem != "statement"
]  # not the references
WORDS_A_MINUTE = 220


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    return import_script(STUDY, "study", monkeypatch)


def record(page: str) -> dict[str, Any]:
    return dict(json.loads((STUDY / "records" / f"{page}.json").read_text(encoding="utf-8")))


def words(line: str) -> str:
    """A command without its comment, what a reader puts in its place by the name that the page has for it."""
    line = re.sub(r'"\$\(cat (\w+)\)"', r"'\1'", line.removesuffix(" &"))
    return " ".join(re.sub(r"\s+#.*", "", line).split())


def on_the_page(page: str) -> set[str]:
    """Its commands: in blocks, and those of the table of `promises`."""
    path = ROOT / "docs" / f"{page}.md"
    shown = [block.text for block in blocks(path) if block.language == "bash"]
    lines = "\n".join(shown).replace("\\\n", " ").splitlines()
    rows = re.findall(r"^\| .* \| `(fedtune [^`]+)` \|$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {words(line) for line in [*lines, *rows] if words(line)}


def test_there_is_a_session_for_each_page_with_commands(study: Any) -> None:
    assert {path.stem for path in study.SESSIONS.glob("*.txt")} == {"setup", *study.PAGES}
    assert {"setup", "own-data"} <= set(RECORDS) <= {"setup", *study.PAGES}


@pytest.mark.parametrize("page", TYPED)
def test_what_was_typed_stands_on_the_page_and_what_was_left_has_a_reason(page: str, study: Any) -> None:
    typed, left = set(), set()
    for line in study.lines_of(page):
        what, _, rest = line.partition(": ")
        if what == "left":
            command, _, reason = rest.rpartition(": ")
            assert len(reason) > 8, line
            left.add(words(command))
        elif what not in ("hand", "end") and not re.fullmatch(r"python \d", line):
            typed.add(words(line))
    assert not typed & left and not (typed | left) - on_the_page(page)


@pytest.mark.parametrize("page", RECORDS)
def test_the_record_has_what_the_session_says(page: str, study: Any) -> None:
    made = record(page)
    lines = [line for line in study.lines_of(page) if line.partition(": ")[0] not in ("hand", "end", "left")]
    assert [one["command"] for one in made["typed"]] == lines
    assert all(one["status"] in (0, None) for one in made["typed"])
    assert made["seconds"] == pytest.approx(sum(one["seconds"] or 0.0 for one in made["typed"]), abs=0.06)


@pytest.mark.parametrize("path", TO_READ, ids=lambda path: path.stem)
def test_a_page_says_how_long_it_takes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    (minutes, typed), *more = re.findall(r"^\*Time: (\d+) minutes? to read(.*)\.\*$", text, re.MULTILINE)
    assert not more
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert int(minutes) == pytest.approx(len(prose.split()) / WORDS_A_MINUTE, rel=0.25, abs=1)
    if path.stem in TYPED:
        said = duration(record(path.stem)["seconds"])
        assert f"; its commands took {said} ([" in typed and "first_hour/README.md)" in typed
    else:
        assert not typed


def test_the_table_is_made_from_the_records(study: Any) -> None:
    assert study.report() in (STUDY / "README.md").read_text(encoding="utf-8")


@pytest.mark.skipif("index" not in RECORDS, reason="the path as a whole was not typed yet")
def test_from_a_clone_to_a_model_that_is_served_takes_less_than_an_hour() -> None:
    whole = sum(record(name)["seconds"] for name in ("setup", "index"))
    assert whole < 3600 and duration(whole) in (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
