"""What a node's frequent calls no longer ask the server's database, and that they are answered the same."""

from __future__ import annotations

import datetime
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from flwr.supernode import node_auth_http_interceptor

from fedtune.deploy import certificates, flower, spared
from tests.support.real_superlink import Real


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Real]:
    made = Real(tmp_path)
    yield made
    made.close()


def test_a_node_that_is_deleted_is_known_no_more(real: Real) -> None:
    state, node = real.state, real.node_id("clinic-1")
    key = next(bytes(info.public_key) for info in state.get_node_info() if info.node_id == node)
    assert state.get_node_id_by_public_key(key) == node
    assert state.get_node_id_by_public_key(b"nobody's") is None
    flower.forget_node(state, node)
    assert state.get_node_id_by_public_key(key) is None


def test_a_number_that_was_asked_for_before_a_deletion_is_not_kept_after_it() -> None:
    """One thread has read the number from the database; another deletes the node before it is noted."""

    def ask(key: bytes) -> int | None:
        if not deleted:
            deleted.append(key)
            nodes.delete("owner", 7)
            return 7
        return None

    deleted: list[bytes] = []
    nodes = spared.NodesByKey(ask, lambda *named: None)
    assert nodes.number(b"key") == 7
    assert nodes.number(b"key") is None


def test_a_number_is_asked_for_once() -> None:
    asked: list[bytes] = []
    nodes = spared.NodesByKey(lambda key: asked.append(key) or 7, lambda *named: None)  # type: ignore[func-returns-value]
    assert [nodes.number(b"key"), nodes.number(b"key")] == [7, 7] and asked == [b"key"]


def test_a_run_that_goes_on_is_asked_twice_a_second_and_one_that_ended_always(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, asked, ended = [100.0], list[int](), set[int]()

    def check(run: int, states: list[str], state: Any) -> str | None:
        asked.append(run)
        return "Run is finished." if run in ended else None

    monkeypatch.setattr(spared, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    going_on = spared.RunsThatGoOn(check)
    for now[0] in (100.0, 100.1, 100.4):
        assert going_on(1, [], None) is None and going_on(2, [], None) is None
    assert asked == [1, 2]
    ended.add(1)
    now[0] = 100.5
    assert (
        going_on(1, [], None) == going_on(1, [], None) == "Run is finished." and going_on(2, [], None) is None
    )
    assert asked == [1, 2, 1, 1, 2]


def test_a_node_signs_once_a_second_and_what_it_signs_is_taken(tmp_path: Path) -> None:
    """And the same signature under another time, or another's key, is not."""
    key, other = (certificates.make_node_key(tmp_path / name) for name in ("node.key", "other.key"))
    signs = node_auth_http_interceptor.NodeAuthHttpInterceptor
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node_auth_http_interceptor, "now", flower._this_second)
        patch.setattr(node_auth_http_interceptor, "sign_message", flower._sign_once)
        before = flower._sign_once.cache_info().misses
        made = [_headers(signs(key, key.public_key())) for _ in range(20)]
    assert flower._sign_once.cache_info().misses - before <= 2, "a second may end meanwhile"
    first = made[0]
    assert flower.signed_by_node(first) and flower.signed_by_node(first)
    later = flower._this_second() + datetime.timedelta(seconds=1)
    with pytest.MonkeyPatch.context() as patch:  # another test may have left Flower's clock as a node has it
        patch.setattr(node_auth_http_interceptor, "now", lambda: later)
        foreign = _headers(signs(other, other.public_key()))
    assert flower.signed_by_node(foreign)
    for name in (b"flwr-public-key", b"flwr-timestamp", b"flwr-signature"):
        assert not flower.signed_by_node({**first, name: foreign[name]}), name


def _headers(interceptor: Any) -> dict[bytes, bytes]:
    context = types.SimpleNamespace(request=httpx.Request("POST", "https://server/v1/fleet/pull-object"))
    interceptor.intercept(context, lambda sent: sent)
    return {name.lower(): value for name, value in context.request.headers.raw}
