"""Chromium without a window, for the pages that we serve (Debian: `apt-get install chromium`)."""

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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import ClientConnection, connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")


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

    def open(self, url: str, about: str) -> None:
        """Returns when the page's first line, #about, begins with `about`."""
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)
        self.wait_for(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")
        self.wait_for(f"document.getElementById('about').textContent.startsWith({json.dumps(about)})")

    def look(self, width: int, scheme: str) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=False
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def picture(self, path: Path) -> None:
        """The whole page, kept in the folder FEDTUNE_PICTURES too, if that is set."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(found["data"]))
        if kept := os.environ.get("FEDTUNE_PICTURES"):
            shutil.copy(path, kept)


@contextmanager
def browser_tab(profile: Path) -> Iterator[Tab]:
    """A tab of a headless Chromium of its own, with its files in the folder `profile`."""
    assert CHROMIUM is not None
    browser = subprocess.Popen(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
         f"--user-data-dir={profile}", "about:blank"],
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


def assert_readable(tab: Tab, width: int, scheme: str, *selectors: str) -> None:
    """Nothing of the page is cut off at this width, and its words stand out from what is behind them."""
    margin = (
        "document.documentElement.clientWidth - Math.max(...[...document.querySelectorAll('main > *')].map("
    )
    assert tab.value(margin + "(one) => one.getBoundingClientRect().right))") >= 15
    assert tab.value("document.documentElement.scrollWidth") <= width
    for selector in selectors:
        assert contrast(tab, selector) >= 4.5, (selector, scheme)
    background = tab.value("getComputedStyle(document.body).backgroundColor")
    assert (int(re.findall(r"\d+", background)[0]) < 128) == (scheme == "dark")
