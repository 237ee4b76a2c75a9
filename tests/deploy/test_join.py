"""Who may join, asked of a real SuperLink with TLS in this process; and what is said to whoever may not."""

from __future__ import annotations

import base64
import datetime
import http.client
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedtune.config.build import build
from fedtune.deploy import certificates, join, served_certificate, server, signing
from fedtune.deploy.admission import enrol, revoke
from fedtune.deploy.join import budget_of, budget_text, checked_budget
from fedtune.deploy.provision import provision
from fedtune.deploy.site import books_of
from fedtune.errors import ConfigError, FederationError, ResourceError
from fedtune.federation.client.audit_log import Books
from fedtune.federation.protocol import PROTOCOL
from tests.support.real_superlink import SITES, Real


class Looks(threading.Event):
    """Lets a loop that looks every few seconds look `count` times at once; `then` is called before each."""

    def __init__(self, count: int, then: Callable[[int], None] = lambda number: None) -> None:
        super().__init__()
        self.count, self.number, self.then = count, 0, then

    def wait(self, timeout: float | None = None) -> bool:
        self.number += 1
        self.then(self.number)
        return self.number > self.count


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    made = Real(tmp_path_factory.mktemp("real"))
    yield made
    made.close()


def refused(site: Any, key: Any, **options: Any) -> str:
    with pytest.raises(FederationError) as caught:
        join.check_in(site, key, print, **options)
    return str(caught.value)


def test_an_enrolled_site_may_join(real: Real) -> None:
    join.check_in(real.site("clinic-1"), real.keys["clinic-1"], pytest.fail)
    assert join.refusal(real.site("clinic-1"), real.keys["clinic-1"]) is None


def test_an_unknown_key_is_told_its_fingerprint_and_what_to_send(real: Real, tmp_path: Path) -> None:
    key = certificates.make_node_key(tmp_path / "node.key")
    said = refused(real.site("clinic-1"), key)
    assert "is not enrolled" in said and "--enrol" in said
    assert certificates.fingerprint(certificates.public_key_of(key)) in said


def test_the_key_of_another_site_is_named(real: Real) -> None:
    said = refused(real.site("clinic-1"), real.keys["clinic-2"])
    assert "enrolled for site 'clinic-2', and this is site 'clinic-1'" in said


@pytest.mark.parametrize(("seconds", "how"), [(60, "60 s ahead of"), (-600, "600 s behind")])
def test_a_clock_that_is_off_is_told_by_how_much(
    real: Real, monkeypatch: pytest.MonkeyPatch, seconds: float, how: str
) -> None:
    now = join._now
    monkeypatch.setattr(join, "_now", lambda: now() + datetime.timedelta(seconds=seconds))
    said = refused(real.site("clinic-1"), real.keys["clinic-1"])
    number, words = how.split(" s ")
    told = said.split("clock is ")[1].split(" s ")[0]
    assert abs(float(told) - float(number)) <= 3 and words in said and "5 s ahead and 305 s behind" in said


def test_a_clock_that_is_a_little_behind_is_fine(real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    now = join._now
    monkeypatch.setattr(join, "_now", lambda: now() - datetime.timedelta(seconds=200))
    join.check_in(real.site("clinic-1"), real.keys["clinic-1"], print)


@pytest.mark.slow
def test_two_nodes_with_one_key(real: Real) -> None:
    node_id = real.node_id("clinic-1")
    assert real.state.activate_node(node_id, 30.0)
    heard: list[str] = []
    site, key = real.site("clinic-1"), real.keys["clinic-1"]
    try:
        with pytest.raises(FederationError, match="Another node with the key of site 'clinic-1'.*One key is"):
            join.check_in(site, key, heard.append, patience=1.0)
        assert len(heard) == 1 and "waiting up to 1 s" in heard[0]
        # A node that was killed counts as connected for a minute: the next one waits for it to be gone.
        threading.Timer(1.0, real.state.deactivate_node, [node_id]).start()
        join.check_in(site, key, heard.append, patience=30.0)
    finally:
        real.state.deactivate_node(node_id)


def test_another_protocol_is_refused_with_both_named(real: Real, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = join.answer

    def theirs(*args: Any) -> Any:
        status, said = ours(*args)
        return status, {**said, "fedtune": "9.9", "protocol": PROTOCOL + 1}

    monkeypatch.setattr(join, "answer", theirs)
    said = refused(real.site("clinic-1"), real.keys["clinic-1"])
    assert f"runs fedtune 9.9, which speaks protocol {PROTOCOL + 1}, and this node fedtune {build()}" in said
    # Another program of the same protocol is welcome.
    monkeypatch.setattr(join, "answer", lambda *args: (200, {**ours(*args)[1], "fedtune": "9.9"}))
    join.check_in(real.site("clinic-1"), real.keys["clinic-1"], pytest.fail)
    monkeypatch.setattr(join, "answer", lambda *_: (403, {"error": "no such path"}))
    assert "another version, or another program" in refused(real.site("clinic-1"), real.keys["clinic-1"])


def test_only_who_holds_a_key_learns_of_it(real: Real) -> None:
    from cryptography.hazmat.primitives import serialization

    key = real.keys["clinic-1"].public_key()
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    given = {
        "x_fedtune_key": base64.b64encode(der).decode(),
        "x_fedtune_time": datetime.datetime.now(datetime.UTC).isoformat(),
        "x_fedtune_signature": base64.b64encode(b"x" * 96).decode(),
    }
    for headers in ({}, given, {**given, "x_fedtune_key": "%%%"}, {**given, "x_fedtune_signature": "AAAA"}):
        status, said = real.request("GET", join.PATH, **headers)
        assert status == 403 and set(said) == {"error"}


def test_a_revoked_key_is_out_at_once_and_stays_out(real: Real) -> None:
    site, key = real.site("clinic-3"), real.keys["clinic-3"]
    join.check_in(site, key, print)
    revoke(real.folder, "clinic-3")
    real.admission.update()
    assert "was revoked" in str(join.refusal(site, key))
    with pytest.raises(ConfigError, match="was revoked, and a key that was revoked stays so"):
        enrol(real.folder, certificates.public_line(certificates.public_key_of(key), "clinic-3"))
    (real.folder / "nodes" / "clinic-3.pub").write_text(
        certificates.public_line(certificates.public_key_of(key), "clinic-3") + "\n"
    )
    real.admission.update()  # a backup of nodes/ was put back, say
    assert "is not enrolled" in refused(site, key)
    new = certificates.make_node_key(real.root / "clinic-3.new")
    enrol(real.folder, certificates.public_line(certificates.public_key_of(new), "clinic-3"))
    real.admission.update()
    join.check_in(site, new, print)


def test_a_suspended_site_is_told_why_and_may_ask_again(real: Real) -> None:
    site, key, path = real.site("clinic-1"), real.keys["clinic-1"], real.folder / "nodes" / "clinic-1.pub"
    line = path.read_text()
    path.unlink()
    real.admission.update()
    with pytest.raises(ResourceError, match="does not let this site in now: the file with the key of site"):
        join.check_in(site, key, pytest.fail)
    assert "is missing at the server" in str(join.suspension(site, key, books_of(site)))
    named = real.signed("clinic-1")
    assert real.request("POST", "/v1/fleet/pull-messages", content_length="0", **named)[0] == 503
    path.write_text(line)
    real.admission.update()
    join.check_in(site, key, pytest.fail)
    assert join.suspension(site, key, books_of(site)) is None


@pytest.mark.slow
def test_a_node_whose_books_went_back_is_not_let_in_until_the_operator_says_so(
    real: Real, tmp_path: Path
) -> None:
    """Ledger and log were restored together from a backup of before a run: they agree with one another."""
    from fedtune.deploy.node import _wait_for_admission
    from fedtune.deploy.node_metrics import NodeActivity
    from fedtune.privacy.ledger.ledger import PrivacyLedger
    from tests.support.plans import local_plan

    state = tmp_path / "state"
    site = real.site("clinic-2", ledger=str(state / "l.sqlite"), audit_log=str(state / "a.jsonl"))
    key, books = real.keys["clinic-2"], books_of(site)

    def release(run: str) -> None:
        ledger = PrivacyLedger(Path(site.ledger), require_budget=True)  # as a process of its own
        ledger.reserve(
            dataset="d", fingerprint="f", node="clinic-2", run=run, round=1, plan=local_plan(num_rounds=3)
        )
        ledger.close()
        books.append("released", run=run)

    PrivacyLedger(Path(site.ledger)).set_budget(site.budget)
    release("one")
    copies = {path: path.read_bytes() for path in state.iterdir() if path.is_file()}
    _wait_for_admission(site, key, pytest.fail, NodeActivity())
    release("two")
    _wait_for_admission(site, key, pytest.fail, NodeActivity())
    kept = real.admission.heads.kept("clinic-2")
    assert kept == books.head()

    for path in state.iterdir():
        path.unlink()
    for path, content in copies.items():
        path.write_bytes(content)
    assert books.problems() == ([], [])
    with pytest.raises(FederationError, match="went back: the server keeps head.*--accept-restore clinic-2"):
        _wait_for_admission(site, key, pytest.fail, NodeActivity())
    refused = real.admission.refusal(certificates.public_key_of(key))
    assert refused is not None and refused[0] == 503 and "went back" in refused[1]
    real.admission.heads.accept("clinic-2")
    _wait_for_admission(site, key, pytest.fail, NodeActivity())
    assert real.admission.refusal(certificates.public_key_of(key)) is None

    # Grown again to more rows than the server knows, by a node that did not ask: it finds that by itself.
    real.admission.heads._known["clinic-2"] = {"head": kept, "back": None}
    (real.folder / "heads.json").write_text(json.dumps({"clinic-2": {"head": kept, "back": None}}))
    for number in range(4):
        release(f"more-{number}")
    for _ in range(2):  # and finds it again when it is started again: what is kept is what was kept
        with pytest.raises(FederationError, match="has another row there, and the head that was kept names"):
            _wait_for_admission(site, key, pytest.fail, NodeActivity())
        assert real.admission.heads.kept("clinic-2") == kept
        assert "--accept-restore clinic-2" in str(join.suspension(site, key, books_of(site)))
    join.publish(site, key, None, books)  # nor does a node that is running take its place
    assert real.admission.heads.kept("clinic-2") == kept
    real.admission.heads.accept("clinic-2")
    _wait_for_admission(site, key, pytest.fail, NodeActivity())
    (real.folder / "heads.json").unlink()
    real.admission.heads.reload()


def signed(real: Real, site: str, told: bytes, when: datetime.datetime) -> dict[str, str]:
    """The headers of a site's request, as signed at `when`."""
    key = real.keys[site]
    return {**signing.sign(key, join._PURPOSE, told, when), join._PUBLISHED: told.decode()}


def test_what_an_old_request_tells_is_not_taken(real: Real) -> None:
    """Repeated by somebody, a head of before would show a site's books as gone back, and lock it out."""
    now = datetime.datetime.now(datetime.UTC)

    def tell(row: int, when: datetime.datetime) -> int:
        told = json.dumps({"head": f"L{row}-{'a' * 24}.A{row}-{'b' * 24}"}).encode()
        return real.request("GET", join.PATH, **signed(real, "clinic-2", told, when))[0]

    try:
        assert tell(5, now) == 200
        assert tell(3, now - datetime.timedelta(days=1)) == tell(9, now + datetime.timedelta(days=1)) == 200
        assert str(real.admission.heads.kept("clinic-2")).startswith("L5-")
        assert real.admission.heads.refusal("clinic-2") is None
    finally:
        (real.folder / "heads.json").unlink()
        real.admission.heads.reload()


def test_what_the_server_cannot_read_or_keep_is_answered_in_words(real: Real) -> None:
    now = datetime.datetime.now(datetime.UTC)
    status, said = real.request("GET", join.PATH, **signed(real, "clinic-2", b"[" * 20_000, now))
    assert status == 403 and "signed by a site's key" in said["error"]
    (real.folder / "heads.json").write_text("{")
    try:
        with pytest.raises(ResourceError, match=r"cannot answer now \(HTTP status 503\); its operator"):
            join.publish(
                real.site("clinic-2"), real.keys["clinic-2"], None, Books(real.root / "l", real.root / "a")
            )
    finally:
        (real.folder / "heads.json").unlink()
        real.admission.heads.reload()


def test_a_renewed_certificate_is_taken_up_by_a_running_server(real: Real) -> None:
    assert real.config.ssl is not None
    served = served_certificate.ServedCertificate(real.folder, real.config.ssl)
    assert not served.renew()
    before = certificates.check_server(real.address, real.folder / "ca.crt")
    real.file.write_text(real.file.read_text() + "certificate_days: 12\n")
    provision(real.file, real.root / "out", renew=True)
    assert certificates.check_server(real.address, real.folder / "ca.crt") == pytest.approx(before, abs=0.01)
    assert served.renew() and not served.renew()
    days = certificates.check_server(real.address, real.folder / "ca.crt")
    assert days == pytest.approx(12, abs=0.01)
    assert (
        "expires in 11 days" in str(certificates.expiry_warning(days))
        and certificates.expiry_warning(31) is None
    )


def test_a_certificate_without_its_key_is_not_taken_up(real: Real, tmp_path: Path) -> None:
    """OpenSSL drops the old key when it is given another certificate: nobody could connect any more."""
    assert real.config.ssl is not None
    served, said = served_certificate.ServedCertificate(real.folder, real.config.ssl), []
    before = certificates.check_server(real.address, real.folder / "ca.crt")
    certificates.make_server_certificate(real.folder.parent / "authority", tmp_path, ["127.0.0.1"], 9)
    (real.folder / "server.crt").write_bytes((tmp_path / "server.crt").read_bytes())
    served_certificate.keep_certificate(served, Looks(5), said.append)
    assert len(said) == 1 and "do not belong together" in said[0] and "stays in use" in said[0]
    assert certificates.check_server(real.address, real.folder / "ca.crt") == pytest.approx(before, abs=0.01)
    with pytest.raises(ConfigError, match="do not belong together"):
        server.run_server(real.folder, print)
    (real.folder / "server.key").write_bytes((tmp_path / "server.key").read_bytes())
    served_certificate.keep_certificate(served, Looks(2), said.append)
    assert said[1:] == ["uses the renewed certificate, good for 8 days"]
    assert certificates.check_server(real.address, real.folder / "ca.crt") == pytest.approx(9, abs=0.01)


def test_a_request_that_is_too_large_or_does_not_say_is_refused_unread(real: Real) -> None:
    named = real.signed("clinic-1")
    status, said = real.request("POST", "/v1/fleet/push-object", content_length=str(2**40), **named)
    assert status == 413 and str(2**40) in said["error"]
    status, said = real.request("POST", "/v1/fleet/push-object", transfer_encoding="chunked", **named)
    assert status == 411


def test_plain_http_at_the_tls_port_gets_nothing_and_does_no_harm(real: Real) -> None:
    for path in ("/v1/fleet/pull-messages", join.PATH):
        connection = http.client.HTTPConnection("127.0.0.1", real.port, timeout=20)
        connection.request("GET", path)
        with pytest.raises((OSError, http.client.HTTPException)):
            connection.getresponse()
        connection.close()
    join.check_in(real.site("clinic-1"), real.keys["clinic-1"], pytest.fail)


def test_status_shows_each_site_and_what_it_publishes(real: Real, capsys: pytest.CaptureFixture[str]) -> None:
    from fedtune.cli.app import main

    with pytest.raises(SystemExit) as done:
        main(["status", str(real.folder)])
    assert not done.value.code
    said = capsys.readouterr().out
    assert said.startswith(f"server {real.address}\n")
    assert re.search(
        r"^site clinic-1 +(registered|online|offline) .*budget not published$", said, re.MULTILINE
    )


def test_the_database_is_waited_for_when_many_nodes_ask_at_once(real: Real) -> None:
    engine = real.app.state.linkstate_factory.state()._engine
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 60_000


def test_a_wrong_operators_token_is_named(real: Real, tmp_path: Path) -> None:
    import shutil

    from fedtune.deploy.client import status

    copy = tmp_path / "server"
    shutil.copytree(real.folder, copy)
    assert {one["site"] for one in status(copy).sites} == set(SITES)
    (copy / "operator.token").write_text("a" * 43 + "\n")
    with pytest.raises(FederationError, match="does not know the operator's token"):
        status(copy)


@pytest.mark.slow
def test_a_site_publishes_its_budget_only_if_its_owner_says_so(real: Real, tmp_path: Path) -> None:
    from fedtune.deploy.client import status
    from fedtune.deploy.node import publish_changes
    from fedtune.deploy.site import books_of, open_ledger
    from tests.support.plans import local_plan

    def of(name: str) -> Any:
        return next(one["budget"] for one in status(real.folder).sites if one["site"] == name)

    state = {"ledger": str(tmp_path / "ledger.sqlite"), "audit_log": str(tmp_path / "audit.jsonl")}
    silent, key = real.site("clinic-2", **state), real.keys["clinic-2"]
    assert not silent.publish_budget and budget_of(silent) is None
    books = books_of(silent)
    told = publish_changes(silent, key, books, None)
    assert of("clinic-2") is None and books.log.entries() == []
    assert budget_text(None) == "budget not published"

    open_site = real.site("clinic-2", publish_budget=True, **state)
    told = publish_changes(open_site, key, books, told)
    assert of("clinic-2") == {"epsilon_left": 50.0, "epsilon": 50.0, "delta": 1e-3, "unit": "any"}
    ledger = open_ledger(open_site, setting=True)
    ledger.reserve(
        dataset="made-up", fingerprint="f", node="clinic-2", run="r", round=1, plan=local_plan(num_rounds=3)
    )
    told = publish_changes(open_site, key, books, told)
    spent = ledger.epsilon(dataset="made-up", fingerprint="f")
    assert 50.0 - spent - 1e-4 <= of("clinic-2")["epsilon_left"] <= 50.0 - spent < 50.0
    assert publish_changes(open_site, key, books, told) == told
    assert [one["event"] for one in books.log.entries()] == ["published"] * 2, "once for each change"
    assert books.log.entries()[1]["epsilon_left"] == of("clinic-2")["epsilon_left"]
    assert (real.folder / "published.json").stat().st_mode & 0o077 == 0
    assert budget_text(of("clinic-2")).endswith("of 50 left at delta 0.001")
    publish_changes(silent, key, books, told)
    assert of("clinic-2") is None, "an owner who changes his mind is forgotten"


def test_what_is_published_is_the_sites_own_and_makes_sense(real: Real, tmp_path: Path) -> None:
    stranger = certificates.make_node_key(tmp_path / "node.key")
    good = {"epsilon_left": 1.0, "epsilon": 2.0, "delta": 1e-5, "unit": "record"}
    books = Books(tmp_path / "ledger.sqlite", tmp_path / "audit.jsonl")
    join.publish(real.site("clinic-1"), stranger, good, books)
    join.publish(real.site("clinic-1"), real.keys["clinic-1"], {**good, "epsilon": float("inf")}, books)
    assert real.board.all().get("clinic-1") is None
    assert checked_budget({**good, "unit": "<b>"}) is None and checked_budget({**good, "more": 1}) is None
    assert checked_budget([good]) is None and checked_budget(good) == good
    status, _ = real.request("GET", server.PUBLISHED_PATH)
    assert status == 403, "for whoever has the operator's token"


def test_a_node_that_answers_by_another_name_takes_no_part(real: Real) -> None:
    from flwr.app import ConfigRecord, Message, RecordDict

    from fedtune.deploy.client import Server
    from fedtune.federation.flower import task_identity
    from fedtune.federation.messages import NodeHello

    of = Server.of(real.folder)
    assert of.site_of(real.node_id("clinic-1")) == "clinic-1" and of.site_of(5) is None
    with task_identity(1):
        asked = Message(RecordDict(), 7, "query.hello")
        hello = Message(NodeHello("clinic-2", 9, 1, "fedtune").to_records(), reply_to=asked)
        other = Message(RecordDict({"reply": ConfigRecord({"node": "clinic-2"})}), reply_to=asked)
    assert (
        join.as_enrolled(hello, lambda _: "clinic-2") is hello
        and join.as_enrolled(other, pytest.fail) is other
    )
    wrong = join.as_enrolled(hello, lambda _: "clinic-1")
    assert "says that it is 'clinic-2', and its key is enrolled for 'clinic-1'" in wrong.error.reason
    assert wrong.metadata.src_node_id == hello.metadata.src_node_id
    assert join.as_enrolled(hello, lambda _: None).has_error()


def test_a_server_that_is_not_there_is_told_once_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, slept, heard = [1000.0], [], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(certificates.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(certificates.time, "sleep", sleep)
    tries: list[float] = []

    def check(address: str, authority: Path) -> float:
        tries.append(clock[0])
        if len(tries) <= 20:
            raise certificates.ResourceError(f"The server {address} does not answer (refused).")
        return 99.0

    monkeypatch.setattr(certificates, "check_server", check)
    assert certificates.wait_for_server("h:1", Path("ca.crt"), heard.append) == 99.0
    assert slept[:6] == [1, 2, 4, 8, 16, 30] and max(slept) == 30
    assert len(heard) == pytest.approx((clock[0] - 1000.0) / 60, abs=2) and len(heard) < len(tries) / 1.5
    assert "does not answer" in heard[0] and "Trying again" in heard[0]
