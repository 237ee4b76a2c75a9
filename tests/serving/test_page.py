"""The page to try a model, in a real browser: it classifies, explains, complains, and fits a telephone.

Needs Chromium (Debian: `apt-get install chromium`), and is skipped where there is none.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from websockets.sync.client import ClientConnection, connect

from fedtune.serving.app import Served, make_app
from fedtune.serving.bundle import Bundle
from fedtune.serving.classifier import Classifier
from fedtune.serving.keys import Keys, make_key
from fedtune.serving.questions import Limits

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")


class Tab:
    """A tab of the browser, by its DevTools protocol."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket, self.count, self.complaints = socket, 0, list[str]()
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **given: Any) -> dict[str, Any]:
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": given}))
        while True:
            said = json.loads(self.socket.recv(timeout=30))
            if said.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
                self.complaints.append(json.dumps(said["params"]))
            if said.get("id") == self.count:
                assert "error" not in said, said
                found: dict[str, Any] = said["result"]
                return found

    def value(self, code: str) -> Any:
        found = self.call("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, code: str) -> Any:
        for _ in range(200):
            if found := self.value(code):
                return found
            time.sleep(0.05)
        raise AssertionError(f"never true: {code}; the page: {self.value('document.body.innerText')}")

    def open(self, url: str) -> None:
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)
        self.wait_for(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")
        self.wait_for("document.getElementById('about').textContent.startsWith('Labels: negative, positive')")

    def look(self, width: int, scheme: str) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=False
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def picture(self, path: Path) -> None:
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(found["data"]))


@pytest.fixture(scope="module")
def address(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """(the service of two models, a key)"""
    bundle, path = Bundle.open(exported), tmp_path_factory.mktemp("keys") / "keys"
    served = Served(bundle, Classifier.open(bundle, "onnx", threads=1), "onnx")
    key = make_key(path, "browser")
    app = make_app({"film": served, "mood": served}, Limits(rate=50), keys=Keys.open(path))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/", key
    server.should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    assert CHROMIUM is not None
    browser = subprocess.Popen(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
         f"--user-data-dir={tmp_path_factory.mktemp('browser')}", "about:blank"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert browser.stderr is not None
        port = next(
            found[1]
            for line in browser.stderr
            if (found := re.search(r"DevTools listening on ws://[^:]+:(\d+)/", line))
        )
        threading.Thread(target=browser.stderr.read, daemon=True).start()  # or it waits for a reader
        pages = httpx.get(f"http://127.0.0.1:{port}/json").json()
        page = next(one for one in pages if one["type"] == "page")
        with connect(page["webSocketDebuggerUrl"], max_size=None) as socket:
            yield Tab(socket)
    finally:
        browser.kill()
        browser.communicate()


TYPE = "document.getElementById('{}').value = {}"
SHOWN = "!document.getElementById('{}').hidden"


def contrast(tab: Tab, selector: str) -> float:
    """Of an element's text on what is behind it (WCAG 2.2)."""

    def luminance(color: str) -> float:
        parts = [float(one) / 255 for one in re.findall(r"[\d.]+", color)[:3]]
        red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    found = tab.value(f"""(() => {{
      let node = document.querySelector({json.dumps(selector)});
      const ink = getComputedStyle(node).color;
      while (getComputedStyle(node).backgroundColor === 'rgba(0, 0, 0, 0)') node = node.parentElement;
      return [ink, getComputedStyle(node).backgroundColor];
    }})()""")
    dark, light = sorted(map(luminance, found))
    return (light + 0.05) / (dark + 0.05)


def test_it_classifies_and_explains(tab: Tab, address: tuple[str, str]) -> None:
    url, key = address
    tab.complaints.clear()
    tab.open(url)
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


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_can_be_read_on_a_telephone_and_at_night(
    tab: Tab, address: tuple[str, str], tmp_path: Path, width: int, scheme: str
) -> None:
    url, key = address
    tab.look(width, scheme)
    tab.open(url)
    tab.value(TYPE.format("key", json.dumps(key)))
    tab.value(TYPE.format("text", "'good '.repeat(30) + 'a' + 'wful'.repeat(40)"))
    tab.value("document.getElementById('why').click()")
    tab.wait_for(SHOWN.format("explanation"))
    margin = (
        "document.documentElement.clientWidth - Math.max(...[...document.querySelectorAll('main > *')].map("
    )
    assert tab.value(margin + "(one) => one.getBoundingClientRect().right))") >= 15
    assert tab.value("document.documentElement.scrollWidth") <= width
    for selector in ("h1", "#about", "#text", "#ask", "#why", "#words mark", "#method", "summary"):
        assert contrast(tab, selector) >= 4.5, (selector, scheme)
    background = tab.value("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", background)[0]) < 128) == (scheme == "dark")
    for control in ("text", "ask", "why", "key", "model"):
        assert tab.value(f"document.getElementById('{control}').getBoundingClientRect().height") >= 40, (
            control
        )
    tab.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000
    if kept := os.environ.get("FEDTUNE_PICTURES"):
        shutil.copy(tmp_path / "page.png", Path(kept) / f"page-{width}-{scheme}.png")
