"""A server that asks for what it must not have: each is refused with the reason, logged, and not charged."""

from __future__ import annotations

import copy
import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedtune.deploy.site import proof
from fedtune.federation.client.audit_log import AuditLog
from fedtune.federation.flower import blamed
from tests.support.site_parts import Site, raw_request, with_values
from tests.support.tiny_federation import make_data, make_model, one_thread


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    one_thread()
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def site(tmp_path: Path, model: Path) -> Site:
    return Site(tmp_path, model)


def reason(answer: Any) -> str:
    if answer.has_error():
        return str(answer.error.reason)
    record = answer.content["reply"]
    return str(record["refused"] or record["error"])


def test_a_round_is_released_logged_and_charged(site: Site) -> None:
    reply = site.ask()
    assert reply["update"] and reply["releases"] == 1 and site.charged() == 1
    entry = site.log()[-1]
    assert (entry["event"], entry["run"], entry["round"]) == ("released", "r", 1)
    assert entry["after"]["epsilon"] > entry["before"]["epsilon"] == 0
    assert entry["bytes_out"] > 0 and entry["asked"]["noise_multiplier"] > 0


def test_no_noise_is_refused_by_a_site_that_demands_privacy(site: Site) -> None:
    plan = site.plan()
    zero = site.send(raw_request(with_values(plan, noise_multiplier=0.0)))
    assert "noise_multiplier" in reason(zero)
    # With a configuration that agrees with it, which the server sends too.
    for changes in ({"epsilon": None, "noise_multiplier": 0.0}, {"epsilon": None, "noise_multiplier": 1e-9}):
        vars(site.config.privacy).update(changes)
        answer = site.send(raw_request(with_values(plan, noise_multiplier=changes["noise_multiplier"])))
        assert "noise_multiplier" in reason(answer)
    vars(site.config.privacy).update(trust="none", epsilon=None, noise_multiplier=None)
    assert "privacy.trust=none is not among the permitted local" in str(site.ask(plan=site.plan())["refused"])
    assert site.charged() == 0
    assert [one["event"] for one in site.log()] == ["refused"] * 4


@pytest.mark.parametrize("publish", [False, True])
def test_a_server_learns_what_is_left_only_where_the_site_says_so(
    tmp_path: Path, model: Path, publish: bool
) -> None:
    site = Site(tmp_path, model, budget_epsilon=0.0123, publish_budget=publish)
    refused = str(site.ask()["refused"])
    assert (refused.startswith("BudgetExhausted") and "its own log says more" in refused) or publish
    assert ("0.0123" in refused) is publish and bool(re.search("epsilon", refused)) is publish
    assert site.charged() == 0 and site.log()[-1]["event"] == "refused"


def test_trying_label_sets_tells_nothing_of_which_labels_occur(tmp_path: Path, model: Path) -> None:
    """Whether or not 'positive' occurs, a site whose file names the labels answers every set alike."""

    def answers(root: Path, labels: list[str] | None, occurs: bool) -> list[str]:
        site = Site(root, model, data={"labels": labels})
        if not occurs:
            path = root / "data" / "train.csv"
            path.write_text(path.read_text().replace("positive", "negative"))
        said = []
        for tried in (["negative", "neutral"], ["negative", "positive"], ["positive", "negative"]):
            site.config.data.labels = tried
            reply = site.send(RecordDict(), "query.hello")
            said.append(reply.error.reason if reply.has_error() else "here")
        return said

    with_it, without = (answers(tmp_path / f"named-{x}", ["negative", "positive"], x) for x in (True, False))
    assert with_it == without
    assert with_it[1] == "here" and "its labels are negative, neutral" in with_it[0]
    # What the file is to prevent: with no labels in it a set that lacks one that occurs cannot be used.
    with_it, without = (answers(tmp_path / f"any-{x}", None, x) for x in (True, False))
    node, reason = blamed(with_it[0])
    assert node == "clinic-1" and reason.startswith("DataError: node 'clinic-1' gives no answer")
    assert without[0] == "here"


def test_the_same_round_is_not_released_twice(site: Site) -> None:
    assert site.ask(round=2)["update"]
    for round, attempt in ((2, 1), (1, 1), (2, 0)):
        again = site.ask(round, attempt)
        assert not again["update"] and "An answer is released once for one charge" in again["error"]
    assert site.charged() == 1
    assert [one["event"] for one in site.log()] == ["released"] + ["refused"] * 3


def test_a_node_that_was_restarted_charges_the_same_round_again_and_ends_at_the_agreed_number(
    site: Site,
) -> None:
    for count in (1, 2, 3):
        site.state = RecordDict()  # memory of the run is lost with the node's process
        assert site.ask()["releases"] == count
    site.state = RecordDict()
    assert "releases" in site.ask()["refused"]
    assert site.charged() == 3


def test_data_that_was_replaced_during_a_run_is_refused(site: Site) -> None:
    assert site.ask(round=1)["update"]
    make_data(site.root / "data", 60)
    reply = site.ask(round=2)
    assert "its data has changed since this run began" in reply["refused"] and not reply["update"]
    assert site.charged() == 1
    assert site.ask(round=1, run="another")["update"], "a new run takes the data as it is now"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (RecordDict(), "no record 'request'"),
        (raw_request("not json"), "unreadable privacy plan"),
        (raw_request("[" * 50_000), "unreadable privacy plan"),
        (raw_request("{}", version=1), "message version 1.*speaks version 2"),
        (raw_request("{}", round=-1), "round is -1"),
        (raw_request("{}", more="x"), "unknown keys.*more"),
        (RecordDict({"request": ConfigRecord({"run": "r"})}), "message version None"),
        (raw_request("{}", np.zeros((2, 2), dtype=np.float32)), "should be float32"),
        (raw_request("{}", np.full(3, np.nan, dtype=np.float32)), "NaN"),
        (
            RecordDict(
                {
                    "adapter": ArrayRecord(
                        {"adapter": Array("float32", (2 * 10**9,), "numpy.ndarray", b"\x93NUMPY")}
                    ),
                    "request": raw_request("{}")["request"],
                }
            ),
            "cannot be decoded|should be float32",
        ),
    ],
)  # fmt: skip
def test_a_malformed_request_is_answered_with_what_is_wrong(
    site: Site, content: RecordDict, says: str
) -> None:
    answer = site.send(content)
    assert answer.has_error()
    assert re.search(says, reason(answer)), reason(answer)
    assert site.charged() == 0 and site.log()[-1]["event"] == "refused"


def test_a_message_of_a_kind_that_nobody_answers_does_not_end_the_worker(site: Site) -> None:
    answer = site.send(RecordDict(), "query.everything")
    assert answer.has_error() and "failed with" in reason(answer)
    assert site.log()[-1]["event"] == "refused"


@pytest.mark.parametrize("where", ["labels", "name", "trust", "key"])
def test_half_a_surrogate_pair_is_answered_and_logged_as_anything_else(site: Site, where: str) -> None:
    """JSON can write it and no encoding of text can hold it, so it must neither travel nor stop the log."""
    request, config = raw_request(json.dumps(site.plan().to_json()), site.start()), copy.deepcopy(site.config)
    if where == "labels":
        config.data.labels = ["negative", "\ud800"]
    elif where == "name":
        config.data.name = "\ud800"
    else:
        changes = {"trust": "\ud800"} if where == "trust" else {"\ud800": 1}
        request = raw_request(with_values(site.plan(), **changes), site.start())
    answer = site.send(request, config=config)
    assert "failed with" not in reason(answer), reason(answer)
    assert site.charged() == 0 and site.log()[-1]["event"] == "refused"
    assert AuditLog(Path(site.settings.audit_log)).verify() == []
    proof(site.settings)[0].encode()
    assert site.ask(run="another")["update"], "and the worker goes on"


def test_a_huge_text_in_a_request_does_not_fill_the_log(site: Site) -> None:
    site.send(raw_request("{}", run="x" * 1_000_000))
    assert Path(site.settings.audit_log).stat().st_size < 10_000


def test_a_full_disk_lets_nothing_leave(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert site.ask(round=1)["update"]
    before = Path(site.settings.audit_log).read_bytes()
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        write(descriptor, data[:40])  # as much as fitted
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("fedtune.federation.client.log_files.os.write", full)
        reply = site.ask(round=2)
    assert not reply["update"]
    # The server hears the kind; the site's own log has the disk.
    assert "ResourceError" in reply["error"] and "space left" not in reply["error"]
    assert "audit log cannot be written (No space left on device)" in caplog.text
    assert Path(site.settings.audit_log).read_bytes() == before, "no torn line is left"
    assert site.charged() == 2, "it was trained, so it is charged"
    assert site.ask(round=3)["update"]
    assert AuditLog(Path(site.settings.audit_log)).verify() == []


def test_a_full_disk_under_the_ledger_is_a_refusal_before_the_data_is_touched(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import sqlite3

    touched: list[int] = []
    monkeypatch.setattr("fedtune.training.local.train_locally", lambda *a, **k: touched.append(1))

    def full(*args: Any, **options: Any) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr("fedtune.privacy.ledger.chain.Chain._connected", full)
    reply = site.ask()
    assert "LedgerError" in reply["refused"] + reply["error"] and not reply["update"]
    assert "disk is full" not in reply["refused"] + reply["error"]
    assert "disk is full" in caplog.text and "Traceback" not in caplog.text
    assert not touched


def test_a_line_that_a_crash_tore_is_taken_out(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    log.append("released", round=1)
    whole = log.path.read_bytes()
    with log.path.open("ab") as file:
        file.write(b'{"time": "2026-01-01", "event": "rel' + b"x" * 9000)
    # Nor does a node that starts after a power cut take it for a line.
    assert log.verify() == [] and log.head().number == 1 and log.last()["round"] == 1
    log.append("released", round=2)
    assert log.path.read_bytes().startswith(whole)
    assert [entry["round"] for entry in log.entries()] == [1, 2] and log.verify() == []


def test_a_server_cannot_take_lines_out_of_the_proof(site: Site) -> None:
    """Its own words are in the log's reasons, and the proof shows those on a terminal."""
    asked = copy.deepcopy(site.config)
    asked.data.name = "\x1b[2J\x1b[1A\u202eother"
    answer = site.send(RecordDict(), "query.hello", asked)
    assert "?[2J?[1A?other" in answer.error.reason
    site.ask(run="\x1b[2Kxxx")
    text, _ = proof(site.settings)
    assert "?[2J?[1A?other" in text and "run ?[2Kxxx" in text
    assert all(line.isprintable() for line in text.splitlines())
