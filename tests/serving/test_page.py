"""The page to try a model, in a real browser: it classifies, explains, complains, and fits a telephone.

Needs Chromium (Debian: `apt-get install chromium`), and is skipped where there is none.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import uvicorn

from fedtune.serving.app import Served, make_app
from fedtune.serving.bundle import Bundle
from fedtune.serving.classifier import Classifier
from fedtune.serving.keys import Keys, make_key
from fedtune.serving.questions import Limits
from tests.support.browser import Tab, assert_readable, browser_tab, needs_chromium

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser_tab(tmp_path_factory.mktemp("browser")) as made:
        yield made


@pytest.fixture(scope="module")
def address(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """(the service of two models, a key)"""
    bundle, path = Bundle.open(exported), tmp_path_factory.mktemp("keys") / "keys"
    served = Served(bundle, Classifier.open(bundle, "onnx", threads=1), "onnx")
    key = make_key(path, "browser")
    models = {"film": served, "mood": of_pairs(served)}
    app = make_app(models, Limits(rate=50), keys=Keys.open(path))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/", key
    server.should_exit = True
    thread.join(20)


def of_pairs(served: Served) -> Served:
    """The same model, as one that takes two texts."""
    about = {**served.bundle.about, "pairs": True}
    return dataclasses.replace(served, bundle=dataclasses.replace(served.bundle, about=about))


ABOUT = "Labels: negative, positive"
TYPE = "document.getElementById('{}').value = {}"
SHOWN = "!document.getElementById('{}').hidden"


@pytest.mark.slow
def test_it_classifies_and_explains(tab: Tab, address: tuple[str, str]) -> None:
    url, key = address
    tab.complaints.clear()
    tab.open(url, ABOUT)
    tab.value(TYPE.format("text", "'Good food,  an <b>awful</b> film \\u{1F600} so nice'"))
    tab.value("document.getElementById('ask').click()")
    tab.wait_for(SHOWN.format("wrong"))
    assert "key" in tab.value("document.getElementById('wrong').textContent")
    tab.value(TYPE.format("key", json.dumps(key)))
    tab.value("document.getElementById('why').click()")
    tab.wait_for(SHOWN.format("explanation"))
    asked = {"model": "film", "text": "Good food,  an <b>awful</b> film \U0001f600 so nice"}
    headers = {"Authorization": f"Bearer {key}"}
    found = httpx.post(url + "explain", json=asked, headers=headers).json()
    assert tab.value("document.getElementById('words').textContent") == asked["text"]  # and no markup of it
    assert tab.value("[...document.querySelectorAll('#words mark')].map((one) => Number(one.title))") == (
        pytest.approx([one["weight"] for one in found["words"]], abs=0.006)
    )
    assert tab.value("document.querySelectorAll('#bars .name').length") == 2
    assert f"{100 * found['probability']:.1f} %" in tab.value("document.getElementById('bars').textContent")
    tab.value("document.querySelector('#statement summary').click()")
    tab.wait_for("document.querySelector('#statement pre').textContent.startsWith('# Privacy statement')")
    # The browser said nothing but that the first request had no key: no script, style or place was refused.
    assert [one for one in tab.complaints if "401" not in one] == []


@pytest.mark.slow
def test_a_model_of_pairs_gets_a_second_text_and_explains_both(tab: Tab, address: tuple[str, str]) -> None:
    url, key = address
    tab.open(url, ABOUT)
    assert not tab.value(SHOWN.format("second"))
    tab.value(TYPE.format("model", "'mood'"))
    tab.value("document.getElementById('model').dispatchEvent(new Event('change'))")
    tab.wait_for(SHOWN.format("second"))
    for name, value in (("text", "'an awful film'"), ("pair", "'so nice food'"), ("key", json.dumps(key))):
        tab.value(TYPE.format(name, value))
    tab.value("document.getElementById('why').click()")
    tab.wait_for(SHOWN.format("explanation"))
    for part, text, count in (("words", "an awful film", 3), ("others", "so nice food", 3)):
        assert tab.value(f"document.getElementById('{part}').textContent") == text
        assert tab.value(f"document.querySelectorAll('#{part} mark').length") == count
    tab.value(TYPE.format("model", "'film'"))
    tab.value("document.getElementById('model').dispatchEvent(new Event('change'))")
    tab.value("document.getElementById('why').click()")
    tab.wait_for(f"!({SHOWN.format('others')})")
    assert not tab.value(SHOWN.format("second"))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_can_be_read_on_a_telephone_and_at_night(
    tab: Tab, address: tuple[str, str], tmp_path: Path, width: int, scheme: str
) -> None:
    url, key = address
    tab.look(width, scheme)
    tab.open(url, ABOUT)
    tab.value(TYPE.format("key", json.dumps(key)))
    tab.value(TYPE.format("text", "'good '.repeat(30) + 'a' + 'wful'.repeat(40)"))
    tab.value("document.getElementById('why').click()")
    tab.wait_for(SHOWN.format("explanation"))
    assert_readable(
        tab, width, scheme, "h1", "#about", "#text", "#ask", "#why", "#words mark", "#method", "summary"
    )
    for control in ("text", "ask", "why", "key", "model"):
        assert tab.value(f"document.getElementById('{control}').getBoundingClientRect().height") >= 40, (
            control
        )
    picture = tmp_path / f"page-{width}-{scheme}.png"
    tab.picture(picture)
    assert picture.stat().st_size > 10_000
