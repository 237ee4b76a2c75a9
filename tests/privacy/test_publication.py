"""The door: every field that is published is declared, local ones stay, and errors tell no secret."""

from __future__ import annotations

import logging
from types import MappingProxyType
from typing import Any

import pytest

from fedtune import errors
from fedtune.privacy import publication
from fedtune.privacy.publication import (
    SINKS,
    Field,
    charged,
    error_in_public,
    local,
    merge,
    one_line,
    public,
    publish,
)

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
        said = error_in_public(kind("17 of 24 records in /home/x"), "clinic")
        assert said.startswith(f"{kind.__name__}: node 'clinic' gives no answer, for ") and "17" not in said
        assert "17 of 24" in error_in_public(kind("17 of 24 records in /home/x", public=True), "clinic")
        assert "17 of 24" in error_in_public(kind("17 of 24 records in /home/x"), "clinic", permitted=True)
    assert "8.1" not in error_in_public(errors.BudgetExhausted("from 7 to 8.1, over 8"), "clinic")
    assert error_in_public(errors.FederationError("asked\ntwice"), "clinic") == "FederationError: asked twice"
    assert (
        error_in_public(ValueError("'the film was awful'"), "a")
        == "Node 'a' failed with ValueError; its own log says more."
    )


def test_an_error_that_says_nothing_of_itself_is_the_owners() -> None:
    class NewError(errors.FedtuneError):
        """Of somebody who did not think of it."""

    assert "secret" not in error_in_public(NewError("secret"), "clinic")


def test_every_field_says_why() -> None:
    for sink, fields in SINKS.items():
        for path, field in fields.items():
            assert len(field.why.split()) >= 3, (sink, path)
            assert field.kind == "local" or field.blank is None, (sink, path)


# Whoever moves a field from one kind to another changes it here too, and says in the commit who pays for it.
LOCAL: dict[str, dict[str, Any]] = {
    "reply": {
        "seconds": 0.0,
    },
    "record": {
        "run.seconds": None,
        "data.notes": None,
        "federation.unusable": None,
        "privacy.ledger.*.fingerprint": None,
        "metrics.by_round.*.seconds": None,
        "metrics.by_round.*.train_seconds": None,
        "cost.seconds": None,
        "cost.train_seconds": None,
        "cost.flops_counted": None,
        "cost.peak_memory_bytes": None,
        "cost.peak_device_bytes": None,
        "cost.energy_kwh": None,
        "cost.energy": None,
        "cost.carbon_kg": None,
        "cost.money.compute": None,
        "cost.money.energy": None,
        "cost.money.total": None,
    },
    "checkpoint": {
        "history.*.seconds": 0.0,
        "history.*.train_seconds": 0.0,
        "unusable": (),
        "seconds": 0.0,
        "train_seconds": 0.0,
        "flops": None,
    },
    "history": {
        "rounds.*.seconds": 0.0,
        "rounds.*.train_seconds": 0.0,
    },
    "personal": {
        "adapter": None,
    },
    "node_metrics": {"fedtune_node_answer_seconds_total": None},
    "round": {
        "seconds": 0.0,
        "train_seconds": 0.0,
    },
}

CHARGED: dict[str, str] = {
    "reply": "update",
    "evaluation": "right wrong",
    "request": "adapter",
    "secagg": "masked",
    "record": (
        "metrics.accuracy metrics.precision_macro metrics.recall_macro metrics.f1_macro metrics.loss "
        "metrics.per_site metrics.personal metrics.evaluation metrics.by_round.*.accuracy "
        "metrics.by_round.*.accuracy_error metrics.by_round.*.loss"
    ),
    "checkpoint": "history.*.accuracy history.*.accuracy_error history.*.loss evaluation",
    "history": "rounds.*.accuracy rounds.*.accuracy_error rounds.*.loss",
    "round": "accuracy accuracy_error loss",
    "server_metrics": "fedtune_server_run_accuracy",
    "private_evaluation": (
        "units accuracy precision_macro recall_macro f1_macro per_class hidden confusion calibration_error "
        "calibration threshold per_site"
    ),
}

PUBLIC: dict[str, str] = {
    "personal": "node steps",
    "hello": "version node software declared_size shards idle delta",
    "join": "budget head lost trusts",
    "consent": "version run attempt node refused refusal last_round",
    "reply": "version run round attempt node refused refusal error releases steps",
    "evaluation": "version run round attempt node refused refusal error answers",
    "proposal": "version run attempt plan encoder",
    "request": "version run round attempt plan",
    "secagg": (
        "version run round attempt phase plan size names sealing masking sealed seed_hashes key_hashes "
        "seed shares"
    ),
    "record": (
        "schema run.id run.versions run.commit run.dirty run.engine run.started run.seed run.hardware "
        "run.status run.attempt config data.name data.source data.only_site data.public data.labels "
        "data.labels_declared data.declared_sizes data.test_records data.public_start federation.nodes "
        "federation.rounds federation.cohort_size federation.node_names federation.recipe "
        "federation.dropped federation.left_out federation.void_rounds "
        "federation.ended_early federation.notices privacy.unit privacy.adjacency privacy.trust "
        "privacy.mechanism privacy.noise_multiplier privacy.max_grad_norm privacy.head_norm "
        "privacy.head_share privacy.head_rounds privacy.centre_rounds privacy.sample_rate "
        "privacy.local_steps privacy.matrix privacy.accountant privacy.delta privacy.target_epsilon "
        "privacy.records_per_unit privacy.reproducible_noise privacy.max_dropouts privacy.max_colluders "
        "privacy.adaptive_clipping privacy.evaluation_data privacy.evaluation privacy.sizes "
        "privacy.epsilon privacy.epsilon_rdp privacy.epsilon_towards_nodes "
        "privacy.epsilon_towards_server privacy.per_node privacy.steps privacy.ledger "
        "privacy.data_public privacy.cautions privacy.audit metrics.chance metrics.majority_rate "
        "metrics.num_records metrics.by_round.*.round metrics.by_round.*.num_rounds "
        "metrics.by_round.*.epsilon metrics.by_round.*.bytes_up metrics.by_round.*.bytes_down "
        "metrics.by_round.*.dropped metrics.by_round.*.updates metrics.by_round.*.void cost.flops "
        "cost.flops_source cost.peak_memory_note cost.encoder_bytes cost.adapter_bytes "
        "cost.num_parameters cost.bytes_up cost.bytes_down cost.money.currency cost.money.network "
        "cost.money.data cost.pricing artifacts"
    ),
    "checkpoint": (
        "config encoder plan strategy attempt nodes history.*.round history.*.num_rounds history.*.epsilon "
        "history.*.bytes_up history.*.bytes_down history.*.dropped history.*.updates history.*.void "
        "dropped releases answers exhausted notices ended_early trained public_start"
    ),
    "history": (
        "run epsilon delta releases ended_early notices rounds.*.round rounds.*.num_rounds "
        "rounds.*.epsilon rounds.*.bytes_up rounds.*.bytes_down rounds.*.dropped rounds.*.updates "
        "rounds.*.void"
    ),
    "export": (
        "schema fedtune run labels inputs made max_length base pad_id pairs separator site formats check "
        "quality window"
    ),
    "compression": "schema fedtune run made base settings texts processor privacy original steps formats",
    "private_evaluation": "model format data privacy",
    "failure": "error overrides when",
    "round": "round num_rounds epsilon bytes_up bytes_down dropped updates void delta",
    "server_metrics": """
        fedtune_server_requests_total fedtune_server_rounds_total fedtune_server_updates_total
        fedtune_server_received_bytes_total fedtune_server_sent_bytes_total
        fedtune_server_request_seconds_total fedtune_server_sites fedtune_server_site_connected
        fedtune_server_site_epsilon_left fedtune_server_site_epsilon_budget fedtune_server_runs
        fedtune_server_run_round fedtune_server_run_rounds fedtune_server_run_epsilon
        fedtune_server_certificate_days
        fedtune_server_trail_lines
    """,
    "node_metrics": """
        fedtune_node_joined fedtune_node_worker_running fedtune_node_answers_total
        fedtune_node_received_bytes_total fedtune_node_sent_bytes_total fedtune_node_epsilon_left
        fedtune_node_epsilon_budget
    """,
}


@pytest.mark.parametrize("sink", [*SINKS])
def test_each_field_is_of_its_kind(sink: str) -> None:
    assert publish(sink, {}, public_data=False) == ({}, {})

    def of(kind: str) -> set[str]:
        return {path for path, field in SINKS[sink].items() if field.kind == kind}

    assert of("public") == set(PUBLIC.get(sink, "").split())
    assert of("charged") == set(CHARGED.get(sink, "").split())
    kept = {path: field.blank for path, field in SINKS[sink].items() if field.kind == "local"}
    assert kept == LOCAL.get(sink, {})
    assert {*map(type, kept.values())} == {*map(type, LOCAL.get(sink, {}).values())}  # 0.0 is not False


def test_no_sink_is_new_or_gone() -> None:
    assert {*SINKS} == LOCAL.keys() | CHARGED.keys() | PUBLIC.keys()


def test_the_kinds_are_what_they_are_called() -> None:
    assert public("a setting") == Field("public", "a setting", None)
    assert charged("noised") == Field("charged", "noised", None)
    assert local("of records") == Field("local", "of records", None)
    assert local("of records", 0.0) == Field("local", "of records", 0.0)
    with pytest.raises(AttributeError):
        public("a setting").kind = "local"  # type: ignore[misc]


@pytest.fixture
def undeclared(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What was told to be undeclared; the sinks are set by `through`."""
    found: list[tuple[str, str]] = []
    monkeypatch.setattr(publication, "report_undeclared", lambda sink, path: found.append((sink, path)))
    yield found
    publication._tree.cache_clear()


def through(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, Field], values: Any, public_data: bool = False
) -> tuple[Any, Any]:
    monkeypatch.setattr(publication, "SINKS", {"test": fields})
    publication._tree.cache_clear()
    return publish("test", values, public_data=public_data)


def test_a_longer_name_says_otherwise_and_the_rest_is_inherited(
    monkeypatch: pytest.MonkeyPatch, undeclared: Any
) -> None:
    fields = {"a": local("of records", blank="-"), "a.b": public("a setting"), "a.b.c": local("of records")}
    values = {"a": {"x": 1, "b": {"c": 2, "d": [3]}}}
    published, own = through(monkeypatch, fields, values)
    assert published == {"a": {"x": "-", "b": {"c": None, "d": [3]}}}
    assert own == {"a": {"x": 1, "b": {"c": 2}}} and not undeclared
    assert through(monkeypatch, fields, values, public_data=True) == (values, {})


def test_a_name_of_its_own_comes_before_any_name(monkeypatch: pytest.MonkeyPatch, undeclared: Any) -> None:
    fields = {"a.*": local("of records"), "a.b": public("a setting")}
    assert through(monkeypatch, fields, {"a": {"b": 1, "c": 2}}) == (
        {"a": {"b": 1, "c": None}},
        {"a": {"c": 2}},
    )
    assert not undeclared


def test_what_is_undeclared_is_named_by_its_path(monkeypatch: pytest.MonkeyPatch, undeclared: Any) -> None:
    fields = {"a.b": public("a setting"), "rows.*.sum": public("a setting")}
    values = {"z": 1, "a": {"b": 1, "c": 2, "d": 3}, "rows": ({"sum": 1, "x": 2}, {"sum": 3})}
    assert through(monkeypatch, fields, values) == ({"a": {"b": 1}, "rows": [{"sum": 1}, {"sum": 3}]}, {})
    assert undeclared == [("test", "z"), ("test", "a.c"), ("test", "a.d"), ("test", "rows.*.x")]


def test_names_are_told_whole(monkeypatch: pytest.MonkeyPatch, undeclared: Any) -> None:
    through(monkeypatch, {"X.b": public("a setting")}, {"X": 17, "XX": 1})
    assert undeclared == [("test", "X"), ("test", "XX")]


def test_a_prefix_stands_before_each_name() -> None:
    assert publication._below("a", {"b": public("a setting")}) == {"a.b": public("a setting")}


def test_a_value_in_the_place_of_declared_ones_below_it(
    monkeypatch: pytest.MonkeyPatch, undeclared: Any
) -> None:
    fields = {"a.b": public("a setting")}
    assert through(monkeypatch, fields, {"a": None}) == ({"a": None}, {}) and not undeclared
    assert through(monkeypatch, fields, {"a": 17}) == ({"a": None}, {})
    assert undeclared == [("test", "a")]


def test_a_list_with_nothing_local_leaves_nothing_with_the_owner(
    monkeypatch: pytest.MonkeyPatch, undeclared: Any
) -> None:
    fields = {"rows.*.n": local("of records"), "rows.*.k": public("a setting")}
    assert through(monkeypatch, fields, {"rows": [{"k": 1}]}) == ({"rows": [{"k": 1}]}, {})
    published, own = through(monkeypatch, fields, {"rows": [{"k": 1}, {"n": 0}]})
    assert published == {"rows": [{"k": 1}, {"n": None}]} and own == {"rows": [None, {"n": 0}]}
    assert merge(published, own) == {"rows": [{"k": 1}, {"n": 0}]} and not undeclared


def test_merging_puts_the_true_value_in() -> None:
    assert merge({"a": None, "b": 1}, {"a": 2, "c": 3}) == {"a": 2, "b": 1, "c": 3}
    assert (
        merge(5, None) == 5
        and merge(None, 7) == 7
        and merge({"a": 1}, 7) == 7
        and merge(7, {"a": 1}) == {"a": 1}
    )
    assert merge({"a": 0.0}, {"a": 1.5}) == {"a": 1.5} and merge([0.0], [1.5]) == [1.5]
    assert merge([1, None], [None, 2]) == [1, 2]
    assert merge([1, 2], [3]) == [3] and merge((1, None), [None, 2]) == [None, 2]
    assert merge([1, 2], (3, None)) == (3, None)
    assert merge(MappingProxyType({"a": None}), {"a": 1}) == {"a": 1}


def test_a_line_shows_and_does_nothing_else() -> None:
    assert one_line(" a\n\tb  c ") == "a b c"
    assert one_line("a\x1b[2Kb\u202ec\ud800") == "a?[2Kb?c?"


def test_the_words_for_others_are_exact() -> None:
    data = errors.DataError("17 of 24\nrecords")
    assert error_in_public(data, "clinic") == (
        f"DataError: node 'clinic' gives no answer, for {data.in_public}; its own log says more."
    )
    assert error_in_public(data, "clinic", permitted=True) == "DataError: 17 of 24 records"
    assert error_in_public(ValueError("x"), "clinic", permitted=True) == (
        "Node 'clinic' failed with ValueError; its own log says more."
    )
