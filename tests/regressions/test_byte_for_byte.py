"""Issue 10, item 1: nothing derived from private records leaves without a charge (PITFALLS 31, 39).

Two runs on data sets that differ in one unit, with what the mechanisms release replaced by constants: every
message in both directions, and every file that is not the owner's, must be the same to the last byte. So a
digest, a count, a measured time or an exact norm that somebody adds to any of them fails here.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedtune.config.schema import Config, PrivacyConfig
from fedtune.errors import DataError
from tests.support import tiny_federation
from tests.support.byte_for_byte import Row, differences, rows, run_once

Change = Callable[[list[Row]], list[Row]]

# (trust, unit): every mechanism with every unit that it protects.
CASES = [
    ("local", "record"),
    ("distributed", "person"),
    pytest.param("local", "person", marks=pytest.mark.slow),
    pytest.param("distributed", "record", marks=pytest.mark.slow),
    pytest.param("central", "client", marks=pytest.mark.slow),
    pytest.param("none", "record", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny_federation.one_thread()
    return tiny_federation.make_model(tmp_path_factory.mktemp("model"))


def settings(model: Path, root: Path, trust: str, unit: str) -> Config:
    config = tiny_federation.make_config(
        model, root / "data", output=str(root / "run"), federation__num_rounds=2, data__unit="person"
    )
    epsilon = None if trust == "none" else 50.0
    config.privacy = PrivacyConfig(trust=trust, unit=unit, epsilon=epsilon, max_grad_norm=1.0)
    evaluation = "private" if trust in ("local", "distributed") else "none"
    config.federation = dataclasses.replace(config.federation, evaluation=evaluation)
    config.tracker.name = "tensorboard"
    return config


def compare(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trust: str, unit: str, *changes: Change
) -> None:
    """Fails if the run on any changed data set leaves other bytes than the one on the first."""
    config = settings(model, tmp_path, trust, unit)
    first = run_once(config, rows(), tmp_path / "home-0", monkeypatch)
    assert {"record.json", "statement.md", "tracker.jsonl", "report.html", "frontier.csv"} <= set(first.files)
    assert first.messages
    for number, change in enumerate(changes, start=1):
        other = run_once(config, change(rows()), tmp_path / f"home-{number}", monkeypatch)
        assert differences(first, other) == [], change.__name__


def another_text(data: list[Row]) -> list[Row]:
    return [{**data[0], "text": "the day was so very great"}, *data[1:]]


def one_long_text(data: list[Row]) -> list[Row]:
    return [{**data[0], "text": " ".join(["film"] * 500)}, *data[1:]]


def another_label(data: list[Row]) -> list[Row]:
    return [{**data[0], "label": "positive"}, *data[1:]]


def one_record_more(data: list[Row]) -> list[Row]:
    return [*data, {"text": "a sad day", "label": "negative", "site": "site-0", "person": "person-0"}]


def one_without_text(data: list[Row]) -> list[Row]:
    return [*data, {"text": "", "label": "negative", "site": "site-0", "person": "person-0"}]


def one_person_says_else(data: list[Row]) -> list[Row]:
    return [{**row, "text": "awful food"} if row["person"] == "person-4" else row for row in data]


def one_site_says_else(data: list[Row]) -> list[Row]:
    return [{**row, "text": "happy very happy day"} if row["site"] == "site-1" else row for row in data]


@pytest.mark.parametrize(("trust", "unit"), CASES)
def test_two_data_sets_leave_the_same_bytes(
    trust: str, unit: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, list[Change]] = {
        "record": [one_long_text, one_record_more],
        "person": [one_person_says_else, another_label],
        "client": [one_site_says_else, one_without_text],
    }
    compare(model, tmp_path, monkeypatch, trust, unit, *changes[unit])


@pytest.mark.slow
def test_a_record_whose_gradient_is_nan_does_not_show(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.training import dp_step

    of_micro_batches = dp_step._of_micro_batches

    def broken(model, features, records, *options):  # type: ignore[no-untyped-def]
        def then(positions, found):  # type: ignore[no-untyped-def]
            for gradient in found:
                gradient[records[positions] == 0] = np.nan
            return options[-1](positions, found)

        return of_micro_batches(model, features, records, *options[:-1], then)

    for trust, unit in (("local", "record"), ("distributed", "record"), ("central", "client")):
        config = settings(model, tmp_path, trust, unit)
        whole = run_once(config, rows(), tmp_path / f"home-{trust}-0", monkeypatch)
        with monkeypatch.context() as patch:
            patch.setattr(dp_step, "_of_micro_batches", broken)
            other = run_once(config, rows(), tmp_path / f"home-{trust}-1", monkeypatch)
        assert differences(whole, other) == []


@pytest.mark.slow
@pytest.mark.parametrize("how", ["nan", "huge", "fails"])
def test_pitfall_39_an_update_that_a_trusted_server_cannot_use_does_not_show(
    how: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is trusted with the update itself; what it publishes must not say what it was like."""
    from fedtune.federation.client import app as client_app

    train = client_app._train

    def unusable(release, request):  # type: ignore[no-untyped-def]
        update, seconds = train(release, request)
        if release.shard.node == "site-2":
            if how == "fails":
                raise ValueError("cannot read 'the film was awful'")
            update = update * (np.nan if how == "nan" else 1e9)
        return update, seconds

    config = settings(model, tmp_path, "central", "client")
    # Were it void for a lost update, it would show here: every one of the four is needed.
    config.federation = dataclasses.replace(config.federation, min_updates=4)
    whole = run_once(config, rows(), tmp_path / "home-0", monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(client_app, "_train", unusable)
        other = run_once(config, rows(), tmp_path / "home-1", monkeypatch)
    whole.messages = [one for one in whole.messages if b"reply" not in one]
    other.messages = [one for one in other.messages if b"reply" not in one]
    assert differences(whole, other) == []
    assert "site-2" in other.local and "unusable" in other.local


@pytest.mark.slow
def test_the_texts_of_failures_stay_with_the_owner(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One node fails over its data, each time for another reason; only its owner hears for which."""
    from fedtune.federation.client import app as client_app

    def failing(text: str, kind: type[Exception]) -> object:
        train = client_app._train

        def fails(release, request):  # type: ignore[no-untyped-def]
            if release.shard.node == "site-2":
                raise kind(text)
            return train(release, request)

        return fails

    config, left = settings(model, tmp_path, "local", "record"), []
    texts = [
        "17 of 24 records have a label that is not in the set (row 3)",
        "no room for 8,437,912 bytes in /x",
    ]
    for number, text in enumerate(texts):
        with monkeypatch.context() as patch:
            patch.setattr(client_app, "_train", failing(text, DataError))
            left.append(run_once(config, rows(), tmp_path / f"home-{number}", monkeypatch))
    assert differences(*left) == []
    assert b"DataError: node 'site-2' gives no answer" in left[0].files["record.json"]
    for text, one in zip(texts, left, strict=True):
        assert text in one.printed and text in one.local
        assert not any(text.encode() in content for content in [*one.files.values(), *one.messages])


def test_a_label_that_does_not_exist_is_told_to_the_owner_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = []
    config = settings(model, tmp_path, "local", "record")
    for number, wrong in enumerate(([0], [5, 17])):
        data = [{**row, "label": "melancholic"} if i in wrong else row for i, row in enumerate(rows())]
        left.append(run_once(config, data, tmp_path / f"home-{number}", monkeypatch, fails=True))
    assert differences(*left) == []
    assert "1 of 120 records" in left[0].printed and "rows 6, 18" in left[1].printed


LEAKS = {
    "measured work": ("record", "cost.flops_counted"),
    "measured time": ("record", "metrics.by_round.*.seconds"),
    "notes on records": ("record", "data.notes"),
    "seconds of a node": ("reply", "seconds"),
    "seconds in the checkpoint": ("checkpoint", "train_seconds"),
    "seconds for a tracker": ("round", "seconds"),
}


@pytest.mark.parametrize(
    "leak",
    [pytest.param(leak, marks=[] if LEAKS[leak][0] == "reply" else pytest.mark.slow) for leak in LEAKS],
)
def test_the_comparison_finds_a_leak(
    leak: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one field declared public that is not, the two runs differ: the tests above can fail."""
    from fedtune.privacy import publication

    sink, path = LEAKS[leak]
    fields = {**publication.SINKS[sink], path: publication.public("a mistake")}
    monkeypatch.setattr(publication, "SINKS", {**publication.SINKS, sink: fields})
    publication._tree.cache_clear()
    try:
        config = settings(model, tmp_path, "local", "record")
        config.federation = dataclasses.replace(config.federation, num_rounds=1)
        # Who is drawn is random, and a round may ask the same work of both: one of a few pairs must differ.
        assert any(_differ(config, tmp_path / str(pair), monkeypatch) for pair in range(5))
    finally:
        publication._tree.cache_clear()


def _differ(config: Config, folder: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    one = run_once(config, rows(), folder / "home-0", monkeypatch)
    other = run_once(config, one_without_text(another_text(rows())), folder / "home-1", monkeypatch)
    return differences(one, other) != []


@pytest.mark.slow
def test_the_comparison_finds_a_digest(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unsalted digest in a field that is rightly public (PITFALLS 31)."""
    from fedtune.runs import measures

    facts = measures.data_facts

    def with_digest(config, data, result, notes):  # type: ignore[no-untyped-def]
        digest = hashlib.sha256(data.train.input_ids.tobytes()).hexdigest()
        return {**facts(config, data, result, notes), "source": digest[:12]}

    monkeypatch.setattr(measures, "data_facts", with_digest)
    config = settings(model, tmp_path, "local", "record")
    one = run_once(config, rows(), tmp_path / "home-0", monkeypatch)
    other = run_once(config, another_text(rows()), tmp_path / "home-1", monkeypatch)
    assert [text for text in differences(one, other) if text.startswith("record.json")]
