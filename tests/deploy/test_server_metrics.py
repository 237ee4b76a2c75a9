"""What a server tells its administrator: metrics, health, and what the page is made of."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedtune.deploy import server
from fedtune.deploy.operators import Operators
from fedtune.deploy.server_metrics import Counted, monitor
from fedtune.privacy.publication import SINKS
from tests.support.server_parts import good_certificate, make_view

pytestmark = pytest.mark.usefixtures("good_certificate")
__all__ = ["good_certificate"]


async def behind(scope: Any, receive: Any, send: Any) -> None:
    """Reads all, and answers with seven bytes."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 403 if "x" in scope["path"] else 200, "headers": []})
    await send({"type": "http.response.body", "body": b"seven b"})


def pass_through(counted: Counted, *paths: str) -> None:
    async def run() -> None:
        for path in paths:
            parts = iter([{"body": b"abc", "more_body": True}, {"body": b"de"}])

            async def receive(parts: Any = parts) -> Any:
                return next(parts)

            async def send(message: Any) -> None:
                pass

            await counted({"type": "http", "path": path}, receive, send)

    asyncio.run(run())


@pytest.mark.slow
def test_all_that_is_declared_is_told_and_nothing_of_a_strangers_path(tmp_path: Path) -> None:
    counted, view = Counted(behind, server._SIDES), make_view(tmp_path)
    pass_through(counted, "/v1/fleet/pull-messages", "/v1/fleet/pull-messages", "/v1/control/start-run")
    pass_through(counted, *(f"/x/{number}" for number in range(1000)))
    with monitor("0", view, counted) as address:
        page = httpx.get(f"http://{address}/metrics").text
    told = {
        line.split("{")[0].split(" ")[0] for line in page.splitlines() if line.startswith("fedtune_server")
    }
    assert told == set(SINKS["server_metrics"])
    for line in (
        'fedtune_server_requests_total{call="pull-messages",side="node",status="200"} 2.0',
        'fedtune_server_requests_total{call="start-run",side="operator",status="200"} 1.0',
        'fedtune_server_requests_total{call="other",side="stranger",status="403"} 1000.0',
        'fedtune_server_received_bytes_total{side="node"} 10.0',
        'fedtune_server_sent_bytes_total{side="node"} 14.0',
        'fedtune_server_sites{state="online"} 2.0', 'fedtune_server_sites{state="suspended"} 1.0',
        'fedtune_server_site_connected{site="clinic-2"} 0.0',
        'fedtune_server_site_epsilon_left{site="clinic-1"} 5.25',
        'fedtune_server_runs{state="pending"} 1.0', 'fedtune_server_runs{state="waiting"} 2.0',
        'fedtune_server_runs{state="running"} 1.0',
        'fedtune_server_run_round{run="12"} 9.0', 'fedtune_server_run_rounds{run="12"} 12.0',
        'fedtune_server_rounds_total{result="complete"} 21.0',
        'fedtune_server_updates_total{result="lost"} 2.0', "fedtune_server_certificate_days 300.0",
        "fedtune_server_trail_lines 1.0",
    ):  # fmt: skip
        assert line in page.splitlines(), line
    assert 'run="11"' not in page  # it has ended
    assert 'epsilon_left{site="clinic-2"}' not in page  # it publishes nothing
    assert "41.5" not in page and "process_resident_memory_bytes" in page


@pytest.mark.slow
def test_health_follows_the_loop_that_serves_everybody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted, view = Counted(behind, {}), make_view(tmp_path)
    started, stuck, is_stuck, ends = (threading.Event() for _ in range(4))

    async def main() -> None:
        await counted({"type": "lifespan"}, None, None)
        started.set()
        while not ends.is_set():
            if stuck.is_set():
                is_stuck.set()
                ends.wait(20)
            await asyncio.sleep(0.01)

    async def nothing(*_: Any) -> None:
        pass

    counted._app = nothing
    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        with monitor("0", view, counted) as address:
            assert started.wait(60)
            assert httpx.get(f"http://{address}/healthz").status_code == 200
            stuck.set()
            assert is_stuck.wait(60)
            monkeypatch.setattr("fedtune.deploy.server_metrics._SECONDS", 0.3)
            assert httpx.get(f"http://{address}/healthz").status_code == 503
    finally:
        ends.set()
        thread.join(20)


@pytest.mark.slow
def test_without_its_database_it_lives_and_is_not_ready(tmp_path: Path) -> None:
    view = make_view(tmp_path)
    with monitor("0", view, Counted(behind, {})) as address:
        assert httpx.get(f"http://{address}/readyz").status_code == 200

        def gone() -> Any:
            raise OSError("the disk is gone")

        view.admission.nodes = gone  # type: ignore[method-assign]
        assert httpx.get(f"http://{address}/readyz").status_code == 503
        assert httpx.get(f"http://{address}/healthz").status_code == 200
        assert httpx.get(f"http://{address}/metrics").status_code == 503


@pytest.mark.slow
def test_what_the_page_asks_for(tmp_path: Path) -> None:
    with monitor("0", make_view(tmp_path), Counted(behind, {})) as address:
        status = httpx.get(f"http://{address}/status.json").json()
        assert {row["site"]: row["state"] for row in status["sites"]}["clinic-2"] == "suspended"
        assert [run["run"] for run in status["runs"]] == ["13", "12", "11"]
        assert status["runs"][0]["last"] is None and status["runs"][1]["last"]["round"] == 9
        run = httpx.get(f"http://{address}/run", params={"id": "11"}).json()
        assert len(run["rounds"]) == 12 and run["statement"].startswith("# Privacy statement")
        assert "seconds" not in json.dumps(run["rounds"])
        assert httpx.get(f"http://{address}/run", params={"id": "../published"}).json() == {}
        page = httpx.get(f"http://{address}/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert "innerHTML" not in page.text and not re.search(r"https?://(?!www\.w3\.org)", page.text)


def test_only_an_operator_reports_and_not_more_than_a_report(tmp_path: Path) -> None:
    view = make_view(tmp_path)
    people = Operators(tmp_path, "t" * 43)
    gate = server.Gate(behind, people, None, progress=view.progress)  # type: ignore[arg-type]

    def report(token: str, body: bytes, length: int | None = None) -> int:
        found: list[int] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": body}

        async def send(message: Any) -> None:
            found.append(message.get("status"))

        headers = [(server.TOKEN_HEADER.encode(), token.encode())]
        headers.append((b"content-length", str(len(body) if length is None else length).encode()))
        scope = {"type": "http", "path": server.PROGRESS_PATH, "method": "POST", "headers": headers}
        asyncio.run(gate(scope, receive, send))
        return found[0]

    said = json.dumps({"run": "13", "statement": "done"}).encode()
    assert report("x" * 43, said) == 403 and view.progress.of("13") == {}
    assert report("t" * 43, said, 2**20 + 1) == 413 and view.progress.of("13") == {}
    assert report("t" * 43, b"{}") == 422
    assert report("t" * 43, said) == 200 and view.progress.of("13")["statement"] == "done"
    of_alice = json.dumps({"run": "12", "statement": "done"}).encode()
    assert report("t" * 43, of_alice) == 403 and view.progress.of("12")["statement"] == ""
