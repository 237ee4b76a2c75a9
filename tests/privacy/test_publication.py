"""The door: local fields stay, fields that nobody declared are left out, texts say whose they are."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from fedtune import errors
from fedtune.privacy import publication
from fedtune.privacy.publication import SINKS, charged, local, merge, public, publish, told

FIELDS = {
    "name": public("a setting"),
    "about": public("settings"),
    "about.*.seconds": local("depends on records", blank=0.0),
    "rows.*.count": local("depends on records"),
    "rows.*.sum": charged("noised"),
}
VALUES: dict[str, Any] = {
    "name": "a",
    "about": {"x": {"seconds": 1.5, "kind": "k"}, "y": {"seconds": 2.5}},
    "rows": [{"count": 3, "sum": 9.0}, {"count": 4, "sum": 8.0}],
}


@pytest.fixture(autouse=True)
def sink(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(publication, "SINKS", {**SINKS, "test": FIELDS})
    publication._tree.cache_clear()
    yield
    publication._tree.cache_clear()


def test_local_fields_of_private_data_stay_and_come_together_again() -> None:
    published, own = publish("test", VALUES, public_data=False)
    assert published == {
        "name": "a",
        "about": {"x": {"seconds": 0.0, "kind": "k"}, "y": {"seconds": 0.0}},
        "rows": [{"count": None, "sum": 9.0}, {"count": None, "sum": 8.0}],
    }
    assert own == {
        "about": {"x": {"seconds": 1.5}, "y": {"seconds": 2.5}},
        "rows": [{"count": 3}, {"count": 4}],
    }
    assert merge(published, own) == VALUES


def test_of_public_data_everything_passes() -> None:
    assert publish("test", VALUES, public_data=True) == (VALUES, {})


@pytest.mark.parametrize("public_data", [True, False])
def test_what_is_declared_nowhere_is_left_out_and_told_of(
    public_data: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def report(sink: str, path: str) -> None:
        logging.getLogger("door").error("%s in %s", path, sink)

    monkeypatch.setattr(publication, "report_undeclared", report)
    values = {"name": "a", "digest": "12ab", "rows": [{"sum": 1.0, "norm": 3.0}]}
    published, own = publish("test", values, public_data=public_data)
    assert published == {"name": "a", "rows": [{"sum": 1.0}]} and not own
    assert "digest in test" in caplog.text and "rows.*.norm in test" in caplog.text


def test_at_run_time_an_undeclared_field_is_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.undo()  # conftest makes it an error in tests
    assert publish("failure", {"error": "e", "digest": "12ab"}, public_data=False) == ({"error": "e"}, {})
    assert "'digest' is not declared" in caplog.text


def test_only_texts_of_public_values_travel() -> None:
    for kind in (errors.DataError, errors.ModelError, errors.ResourceError, errors.LedgerError):
        said = told(kind("17 of 24 records in /home/x"), "clinic")
        assert said.startswith(f"{kind.__name__}: node 'clinic' gives no answer, for ") and "17" not in said
        assert "17 of 24" in told(kind("17 of 24 records in /home/x", public=True), "clinic")
        assert "17 of 24" in told(kind("17 of 24 records in /home/x"), "clinic", permitted=True)
    assert "8.1" not in told(errors.BudgetExhausted("from 7 to 8.1, over 8"), "clinic")
    assert told(errors.FederationError("asked\ntwice"), "clinic") == "FederationError: asked twice"
    assert (
        told(ValueError("'the film was awful'"), "a")
        == "Node 'a' failed with ValueError; its own log says more."
    )


def test_an_error_that_says_nothing_of_itself_is_the_owners() -> None:
    class NewError(errors.FedtuneError):
        """Of somebody who did not think of it."""

    assert "secret" not in told(NewError("secret"), "clinic")


def test_every_field_says_why() -> None:
    for sink, fields in SINKS.items():
        for path, field in fields.items():
            assert len(field.why.split()) >= 3, (sink, path)
            assert field.kind == "local" or field.blank is None, (sink, path)
