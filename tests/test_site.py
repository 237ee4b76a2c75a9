"""The documents as a site: no warning, nothing fetched from elsewhere, and a search that finds."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support.browser import browser_tab, contrast, needs_chromium
from tests.support.pages import blocks

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = re.findall(
    r"^## (.+\?)\n[^#]+?^Search for: \*(.+?)\*\. Page: \[.+?\]\(([\w-]+)\.md(?:#[\w-]+)?\)\.$",
    (ROOT / "docs" / "questions.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)
FIRST = 3  # pages that somebody looks at
WIDEST = 100  # characters that a block has room for, at 1,400 pixels

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


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """Where the site is served."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.stem)
def test_a_command_is_seen_whole_on_a_wide_screen(path: Path) -> None:
    lines = [line for block in blocks(path) if block.language == "bash" for line in block.text.splitlines()]
    assert [line for line in lines if len(line) > WIDEST] == []


@needs_chromium
def test_it_is_read_on_a_phone_and_in_the_dark(address: str, tmp_path: Path) -> None:
    with browser_tab(tmp_path / "profile") as tab:
        for page in ("", "start/", "own-data/", "compare/", "reference/commands/"):
            for width, scheme, named in ((390, "dark", "slate"), (1400, "light", "default")):
                tab.look(width, scheme)
                tab.call("Page.navigate", url="about:blank")
                tab.call("Page.navigate", url=f"{address}/{page}")
                tab.wait_for("location.href !== 'about:blank' && document.readyState === 'complete'")
                tab.wait_for(f"document.body.getAttribute('data-md-color-scheme') === '{named}'")
                assert tab.value("document.documentElement.scrollWidth") <= width, (page, width)
                assert contrast(tab, "article p") >= 4.5, (page, scheme)


@needs_chromium
def test_a_phone_shows_all_columns_of_a_table_of_three(address: str, tmp_path: Path) -> None:
    """Names that could not break pushed the last column, with the explanation, off the screen."""
    with browser_tab(tmp_path / "profile") as tab:
        tab.look(390, "light")
        for page in ("", "promises/", "how-it-works/", "reference/files/", "reference/commands/"):
            tab.call("Page.navigate", url="about:blank")
            tab.call("Page.navigate", url=f"{address}/{page}")
            tab.wait_for("location.href !== 'about:blank' && document.readyState === 'complete'")
            wide = tab.value(
                "[...document.querySelectorAll('article table')].filter(table => "
                "table.rows[0].cells.length <= 3 && table.getBoundingClientRect().right > innerWidth)"
                ".map(table => table.innerText.slice(0, 80))"
            )
            assert wide == [], page


def test_an_option_stays_on_one_line_and_a_picture_can_be_opened(site: Path) -> None:
    start = (site / "start" / "index.html").read_text(encoding="utf-8")
    assert '<span class="option">--json</span>' in start and "<code>--json" not in start
    epsilon = (site / "epsilon" / "index.html").read_text(encoding="utf-8")
    assert re.search(r'<a href="([^"]+frontier\.png)"><img [^>]*src="\1"', epsilon)


def test_a_bound_on_what_an_attacker_finds_is_rounded_up() -> None:
    """2.3 of 1,000 stood there as 2 "at most"; and 4.3 as 4, which is `strong`, beside `moderate`."""
    from scripts.documents import GENERATED

    rows = re.findall(
        r"^\| ([\d.]+) \| (\d+) \| (\d+) percent \| (\w+) \|$",
        GENERATED["what an attacker finds"](),
        re.MULTILINE,
    )
    assert [row[0] for row in rows] == ["0.5", "1", "2", "4", "8", "16"]
    for _, found, _, word in rows:
        assert (int(found) <= 4) == (word == "strong") and (int(found) > 100) == (word == "weak")


def searched(words: str, index: Any) -> list[str]:
    """Pages in the order in which the theme's own search shows them.

    Its worker takes words by their beginnings, and weighs what lunr finds by 1 + (a + b)^2: a is 1 for the
    first part of a page, b the share of the words that occur.
    """
    terms = words.lower().split()
    best: dict[str, float] = {}
    for found in index.search(" ".join(f"{term}*" for term in terms)):
        page, _, part = found["ref"].partition("#")
        seen = found["match_data"].metadata
        share = sum(any(word.startswith(term) for word in seen) for term in terms) / len(terms)
        score = found["score"] * (1 + ((not part) + share) ** 2)
        best[page.rstrip("/")] = max(score, best.get(page.rstrip("/"), 0.0))
    return sorted(best, key=lambda page: -best[page])


def test_the_search_finds_the_page_of_each_question(site: Path) -> None:
    from lunr.builder import Builder
    from lunr.stop_word_filter import stop_word_filter

    made = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))
    assert made["config"]["pipeline"] == ["stopWordFilter"] and made["config"]["lang"] == ["en"]
    builder = Builder()
    builder.ref("location")
    builder.b(0)
    builder.pipeline.add(stop_word_filter)
    for name in ("title", "text"):
        builder.field(name, boost=made["config"]["fields"][name]["boost"])
    documents = [{**entry, "text": re.sub(r"<[^>]*>", " ", entry["text"])} for entry in made["docs"]]
    for document in documents:
        builder.add(document, {"boost": document.get("boost", 1)})
    index = builder.build()
    assert len(QUESTIONS) == 20
    missed = []
    for question, words, page in QUESTIONS:
        pages = [found for found in searched(words, index) if found != "questions"]
        if page not in pages[:FIRST]:
            missed.append(f"{question} ({words}): {pages[:6]}, not {page}")
    assert not missed, "\n".join(missed)


# What somebody sees who types into the search: the pages, and the parts of each that are listed below it.
SEARCHED = """(async () => {
  const input = document.querySelector('.md-search__input');
  const shown = () => document.querySelector('.md-search-result').innerHTML;
  const settled = async () => {
    for (let before = '', same = 0, i = 0; same < 5 && i < 200; i++) {
      await new Promise(resolve => setTimeout(resolve, 50));
      same = shown() === before ? same + 1 : 0;
      before = shown();
    }
  };
  for (const words of ['', WORDS]) {
    input.focus();
    input.value = words;
    input.dispatchEvent(new KeyboardEvent('keyup', { bubbles: true }));
    await settled();
  }
  return [...document.querySelectorAll('.md-search-result__item')].slice(0, 6).map(item =>
    [...item.querySelectorAll('a')].map(link =>
      [new URL(link.href).pathname, (link.querySelector('h1, h2') || link).innerText]));
})()"""


@needs_chromium
def test_somebody_who_types_a_question_finds_its_answer(address: str, tmp_path: Path) -> None:
    missed = []
    with browser_tab(tmp_path / "profile") as tab:
        tab.look(1400, "light")
        tab.call("Page.navigate", url=f"{address}/")
        tab.wait_for("document.querySelector('[data-md-component=search-query]') !== null")
        tab.wait_for("document.readyState === 'complete'")
        for question, words, page in QUESTIONS:
            found = tab.value(SEARCHED.replace("WORDS", json.dumps(words)))
            pages = [item[0][0].strip("/") for item in found if item[0][0] != "/questions/"]
            if page not in pages[:FIRST]:
                missed.append(f"{words}: {pages}, not {page}")
            found = tab.value(SEARCHED.replace("WORDS", json.dumps(question)))
            answers = [link[1] for item in found[:FIRST] for link in item]
            if question not in answers:
                missed.append(f"{question}: {answers}")
    assert not missed, "\n".join(missed)
