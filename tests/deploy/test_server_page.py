"""The server's page, in a real browser: sites, runs, curves and statements, whatever they are called."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtune.deploy.server_metrics import Counted, monitor
from tests.support.browser import Tab, assert_readable, browser_tab, needs_chromium
from tests.support.server_parts import NASTY, Sites, good_certificate, make_view

pytestmark = [needs_chromium, pytest.mark.usefixtures("good_certificate")]
__all__ = ["good_certificate"]
ABOUT = "Sites reach it at fed.example.org:9443"


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with browser_tab(tmp_path_factory.mktemp("browser")) as made:
        yield made


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    view = make_view(tmp_path / "server")
    with monitor("0", view, Counted(None, {})) as address:
        yield f"http://{address}/"


OPEN = "document.querySelectorAll('#runs summary')[{}].click()"


@pytest.mark.slow
def test_names_and_statements_are_text_whatever_is_in_them(tab: Tab, url: str) -> None:
    tab.complaints.clear()
    tab.look(1400, "light")
    tab.open(url, ABOUT)
    sites = tab.value("[...document.querySelectorAll('#sites tbody tr')].map((one) => one.innerText)")
    assert len(sites) == 3 and any(NASTY in site for site in sites)
    assert any("clinic-1" in site and "5.25 of 8" in site for site in sites)
    assert any("clinic-2" in site and "not let in" in site and "not published" in site for site in sites)
    assert tab.value("document.getElementById('waiting').textContent").endswith(f"of {NASTY}, alice.")
    runs = tab.value("[...document.querySelectorAll('#runs summary')].map((one) => one.innerText)")
    assert [("waiting" in runs[0]), ("round 9 of 12" in runs[1]), ("by bob" in runs[2])] == [True] * 3
    tab.value(OPEN.format(2))
    tab.wait_for("document.querySelectorAll('#runs svg').length === 2")
    assert tab.value("document.querySelector('#runs pre').textContent") == f"# Privacy statement\n\n{NASTY}\n"
    assert tab.value("document.querySelectorAll('#runs svg circle').length") == 24
    assert NASTY in tab.value("document.querySelector('#runs li').textContent")
    tab.value(OPEN.format(1))
    tab.wait_for("document.querySelectorAll('#runs svg').length === 4")
    tab.value(OPEN.format(0))
    tab.wait_for("document.body.innerText.includes('Nothing was reported of this run yet')")
    assert tab.value("document.images.length") == 0 and tab.value("document.title") == "hospitals"
    assert tab.complaints == []  # no script, style or place was refused, and nothing failed


@pytest.mark.slow
def test_it_follows_a_run_and_keeps_open_what_is_open(tab: Tab, tmp_path: Path) -> None:
    view = make_view(tmp_path)
    sites = view.admission
    assert isinstance(sites, Sites)
    with monitor("0", view, Counted(None, {})) as address:
        tab.open(f"http://{address}/", ABOUT)
        tab.value(OPEN.format(2))
        tab.wait_for("!!document.querySelector('#runs pre')")
        sites.states["14"] = "running"
        sites.rows[0] = ("clinic-1", "offline")
        tab.value("refresh()")
        tab.wait_for("document.querySelectorAll('#runs summary').length === 4")
        tab.wait_for("document.querySelector('#sites').innerText.includes('away')")
        assert tab.value("document.querySelectorAll('#runs details')[3].open")
        assert not tab.value("document.querySelectorAll('#runs details')[0].open")
    tab.value("refresh()")
    tab.wait_for("!document.getElementById('wrong').hidden")
    assert "does not answer" in tab.value("document.getElementById('wrong').textContent")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_it_can_be_read_on_a_telephone_and_at_night(
    tab: Tab, url: str, tmp_path: Path, width: int, scheme: str
) -> None:
    tab.look(width, scheme)
    tab.open(url, ABOUT)
    tab.value(OPEN.format(2))
    tab.wait_for("!!document.querySelector('#runs pre')")
    assert_readable(
        tab, width, scheme, "h1", "#about", "#sites td", ".state", "summary b", "summary .soft", "pre"
    )
    assert tab.value("document.querySelector('#runs summary').getBoundingClientRect().height") >= 40
    picture = tmp_path / f"server-{width}-{scheme}.png"
    tab.picture(picture)
    assert picture.stat().st_size > 10_000
