"""The documents as a site: no warning, nothing fetched from elsewhere, and a search that finds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = re.findall(
    r"^\| (.+?\?.*?) \| (.+?) \| \[.+?\]\((.+?)\.md\) \|$",
    (ROOT / "docs" / "questions.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)
FIRST = 3  # pages that somebody looks at

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 18
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "<!-- generated" not in text, page
        for tag in re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", text):
            assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", tag), f"{page}: {tag}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//", style.read_text(encoding="utf-8")), style


def test_the_search_finds_the_page_of_each_question(site: Path) -> None:
    from lunr import lunr

    index = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    documents = [entry for entry in index["docs"] if entry["text"] or entry["title"]]
    # As the theme's own search has it: titles far above texts, words by their beginnings.
    search = lunr("location", [{"field_name": "title", "boost": 1000}, "text"], documents)
    assert len(QUESTIONS) == 20
    missed = []
    for question, words, page in QUESTIONS:
        query = " ".join(f"{word}*" for word in words.split())
        pages: list[str] = []
        for found in search.search(query):
            place = found["ref"].partition("#")[0].rstrip("/")
            if place not in pages and place != "questions":
                pages.append(place)
        if page not in pages[:FIRST]:
            missed.append(f"{question} ({words}): {pages[:6]}, not {page}")
    assert not missed, "\n".join(missed)
