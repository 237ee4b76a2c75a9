"""What may be told to Prometheus is what `fedtune.privacy.publication` declares, by the metric's name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fedtune.monitoring.metrics import Exposition, Reading, Readings


def test_only_what_is_declared_leaves_and_what_is_local_only_of_public_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fedtune.privacy.publication.report_undeclared", lambda *_: None)

    def read() -> Iterator[Reading]:
        yield "fedtune_node_joined", "Declared public.", (), [((), 1.0)]
        yield "fedtune_node_answer_seconds_total", "Declared local.", ("message",), [(("train",), 2.5)]
        yield "fedtune_node_records", "Declared nowhere.", (), [((), 31.0)]

    private, public = Exposition(), Exposition()
    Readings(private, "node_metrics", read)
    Readings(public, "node_metrics", read, public_data=True)
    assert b"fedtune_node_joined 1.0" in private.page() and b"fedtune_node_joined 1.0" in public.page()
    assert b"seconds_total{" not in private.page()
    assert b'fedtune_node_answer_seconds_total{message="train"} 2.5' in public.page()
    assert b"records" not in private.page() + public.page()


def test_a_name_of_others_is_no_markup_and_no_line_of_its_own() -> None:
    exposition = Exposition()
    lines = [(('a"} 1\nfedtune_node_joined 7',), 1.0)]
    Readings(exposition, "server_metrics", lambda: [("fedtune_server_site_connected", "x", ("site",), lines)])
    page = exposition.page().decode()
    assert 'site="a\\"} 1\\nfedtune_node_joined 7"' in page
    assert not [line for line in page.splitlines() if line.startswith("fedtune_node_joined")]
