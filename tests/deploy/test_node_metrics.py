"""What a node tells its administrator: what it does, and nothing of its data."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from fedtune.deploy.node_metrics import NodeActivity, monitor
from fedtune.deploy.thin_app import thin_app
from fedtune.privacy.publication import SINKS
from tests.deploy.test_thin_app import Delivery
from tests.support.site_parts import settings


def told(activity: NodeActivity, root: Path, **changes: Any) -> str:
    with monitor("0", settings(root, **changes), activity, lambda: True) as address:
        return httpx.get(f"http://{address}/metrics").text


def names(page: str) -> set[str]:
    return {line.split("{")[0].split(" ")[0] for line in page.splitlines() if line.startswith("fedtune_node")}


def busy() -> NodeActivity:
    activity = NodeActivity()
    activity.joined = True
    activity.answered("train", "answered", 12.375)
    activity.transferred(received=100, sent=40)
    return activity


@pytest.mark.slow
def test_of_private_data_no_time_and_no_budget_are_told(tmp_path: Path) -> None:
    activity = busy()
    page = told(activity, tmp_path)
    assert 'fedtune_node_answers_total{answer="answered",message="train"} 1.0' in page
    assert "fedtune_node_received_bytes_total 100.0" in page and "fedtune_node_sent_bytes_total 40.0" in page
    assert "12.375" not in page
    declared = set(SINKS["node_metrics"])
    budget = {"fedtune_node_epsilon_left", "fedtune_node_epsilon_budget"}
    assert names(page) == declared - budget - {"fedtune_node_answer_seconds_total"}
    activity.budget = {"epsilon_left": 3.5, "epsilon": 8.0, "delta": 1e-5, "unit": "any"}  # it published that
    assert names(told(activity, tmp_path)) == declared - {"fedtune_node_answer_seconds_total"}
    assert names(told(activity, tmp_path, data={"public": True})) == declared


def test_a_server_makes_no_lines_with_kinds_of_its_own() -> None:
    activity = NodeActivity()
    for number in range(1000):
        activity.answered(f"query.{number}\n", "refused", 0.0)
    for phase in ("query.secagg_share", "train.secagg_mask", "query.hello"):
        activity.answered(phase, "answered", 0.0)
    assert activity.answers == {
        ("other", "refused"): 1000, ("secagg", "answered"): 2, ("hello", "answered"): 1,
    }  # fmt: skip


@pytest.mark.slow
def test_health(tmp_path: Path) -> None:
    activity = NodeActivity()
    with monitor("0", settings(tmp_path, limits={"message_seconds": 50.0}), activity, bool) as address:
        assert httpx.get(f"http://{address}/healthz").status_code == 200
        assert httpx.get(f"http://{address}/readyz").status_code == 503
        activity.joined = True
        assert httpx.get(f"http://{address}/readyz").status_code == 200
        activity.step = time.monotonic() - 340.0  # longer than a message may take is not yet a hang
        assert httpx.get(f"http://{address}/healthz").status_code == 200
        activity.step = time.monotonic() - 360.0
        assert httpx.get(f"http://{address}/healthz").status_code == 503
        activity.joined = False  # it waits for the server, which may be away for weeks
        assert httpx.get(f"http://{address}/healthz").status_code == 200


def test_the_message_loop_counts(tmp_path: Path) -> None:
    delivery = Delivery(tmp_path, thin_app()[0])
    delivery.activity.step = 0.0
    delivery.deliver()
    assert delivery.activity.answers == {("hello", "answered"): 1}
    assert delivery.activity.received == sum(map(len, delivery.contents.values())) > 0
    assert delivery.activity.step > 0
    pushed: list[Any] = []
    delivery.connection = (*delivery.connection[:6], lambda *about: pushed.append(about), None)  # type: ignore[assignment]
    delivery.guarded()[6](5, "session", "name", b"12345")
    assert delivery.activity.sent == 5 and pushed == [(5, "session", "name", b"12345")]


def test_an_app_that_is_refused_is_counted_as_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delivery = Delivery(tmp_path, b"noise")
    assert delivery.deliver().has_error()
    assert delivery.activity.answers == {("hello", "refused"): 1}
