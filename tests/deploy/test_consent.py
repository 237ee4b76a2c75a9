"""Whose runs a site takes, and which its administrator has approved."""

from __future__ import annotations

import datetime
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message, RecordDict

from fedtune.cli.app import main
from fedtune.cli.site_steps import approve
from fedtune.config.convert import to_json
from fedtune.deploy import consent as module
from fedtune.deploy.certificates import public_key_of, public_line
from fedtune.deploy.consent import SUBMITTER, Consent, sign_run
from fedtune.errors import ConfigError, FederationError, LedgerError
from fedtune.federation.flower import task_identity
from tests.support.site_parts import Site, settings
from tests.support.tiny_federation import make_model

ALICE, MALLORY = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
LINE = public_line(public_key_of(ALICE), "alice")
CONFIG = '{"seed": 1}'


def message(kind: str = "query.propose", run: str | None = "r1") -> Any:
    content = RecordDict()
    if run is not None:
        content["proposal"] = ConfigRecord({"run": run, "version": 1})
    with task_identity(5):
        return Message(content, 7, kind)


def signed(key: Any = ALICE, federation: str = "trial", config: str = CONFIG) -> dict[str, str]:
    return {"fedtune": CONFIG, SUBMITTER: sign_run(key, federation, config)}


def refusal(consent: Consent, run_config: dict[str, str], server_run: int = 1, **of: Any) -> str:
    with pytest.raises(FederationError) as raised:
        consent.check(server_run, run_config, message(**of))
    assert "Nothing was charged" in str(raised.value)
    return str(raised.value)


# --- submitters --------------------------------------------------------------------------------------


def test_a_site_takes_the_runs_of_those_whom_it_names(tmp_path: Path) -> None:
    consent = Consent(settings(tmp_path, submitters=[LINE]))
    mine = signed()
    assert "is of none" in refusal(consent, mine, run=None)
    for kind in ("query.propose", "train", "train"):
        consent.check(1, mine, message(kind))
    assert "not signed by any of them" in refusal(consent, {"fedtune": CONFIG})
    assert "signed by another" in refusal(consent, signed(MALLORY))
    for other in (signed(config='{"seed": 2}'), signed(federation="other")):
        assert "not signed by any" in refusal(consent, other)
    for broken in ("", "{}", "[]", "null", "[" * 5000, json.dumps({"x-fedtune-key": 1})):
        assert "not signed by any" in refusal(consent, {"fedtune": CONFIG, SUBMITTER: broken})
    consent.check(2, {"fedtune": CONFIG}, message("query.hello", None))  # what is public anyway


def test_a_server_cannot_start_a_signed_run_again(tmp_path: Path) -> None:
    site, mine = settings(tmp_path, submitters=[LINE]), signed()
    Consent(site).check(1, mine, message())
    Consent(site).check(1, mine, message("train"))
    assert "starts it again as run 2" in refusal(Consent(site), mine, 2)  # over a restart of the node
    values = json.loads(mine[SUBMITTER])
    other = {**mine, SUBMITTER: json.dumps({**values, "x-fedtune-signature": _twin(values)})}
    assert "starts it again as run 3" in refusal(Consent(site), other, 3)
    Consent(site).check(3, signed(), message())  # alice has submitted it again


def _twin(values: dict[str, str]) -> str:
    """Another signature that is as good as this one, which anybody can make of it."""
    import base64

    from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

    order = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFC7634D81F4372DDF581A0DB248B0A77AECEC196ACCC52973
    r, s = decode_dss_signature(base64.b64decode(values["x-fedtune-signature"]))
    return base64.b64encode(encode_dss_signature(r, order - s)).decode()


def test_a_server_cannot_put_another_run_into_a_signed_one(tmp_path: Path) -> None:
    site, mine = settings(tmp_path, submitters=[LINE]), signed()
    Consent(site).check(1, mine, message("train", run="r1"))
    for other in ("r2", None, "r" * 101):
        assert "is of" in refusal(Consent(site), mine, kind="train", run=other)
    Consent(site).check(1, mine, message("train", run="r1"))
    Consent(site).check(2, signed(), message("train", run="r1"))  # alice resumes it


def test_what_was_signed_before_the_file_was_lost_may_have_been_used(tmp_path: Path) -> None:
    site, mine, path = settings(tmp_path, submitters=[LINE]), signed(), tmp_path / "state" / "consent.json"
    Consent(site).check(1, mine, message(run="r1"))
    path.unlink()  # a new machine, with a backup's books
    Consent(site)
    known = json.loads(path.read_text())
    later = datetime.datetime.fromisoformat(known["since"]) + datetime.timedelta(minutes=5)
    path.write_text(json.dumps({**known, "since": later.isoformat()}))
    assert "before the site began to keep signatures" in refusal(Consent(site), mine, 2, run="r2")
    path.write_text(json.dumps({**known, "since": "now"}))
    with pytest.raises(LedgerError, match="cannot be read"):
        Consent(site)


def test_a_signature_that_is_old_when_it_comes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    consent, mine = Consent(settings(tmp_path, submitters=[LINE])), signed()
    now = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=8)
    fixed = SimpleNamespace(now=lambda zone: now, fromisoformat=datetime.datetime.fromisoformat)
    monkeypatch.setattr(
        module,
        "datetime",
        SimpleNamespace(datetime=fixed, UTC=datetime.UTC, timedelta=datetime.timedelta),
    )
    assert "signed 8.0 days ago" in refusal(consent, mine)


def test_a_line_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="submitters: 'alice' is no enrolment line"):
        Consent(settings(tmp_path, submitters=["alice"]))


# --- approval ----------------------------------------------------------------------------------------


def test_a_run_waits_for_the_administrator_and_is_taken_once(tmp_path: Path) -> None:
    site = settings(tmp_path, approval=True)
    consent, run_config = Consent(site), {"fedtune": CONFIG}
    for kind in ("query.propose", "train", "query.evaluate", "query.mask"):
        assert "fedtune node approve" in refusal(consent, run_config, kind=kind)
    consent.check(1, run_config, message("query.hello", None))
    (waiting,) = consent.waiting()
    assert waiting["config"] == CONFIG and not waiting["approved"]
    Consent(site).approve(waiting["digest"][:32])  # in another process
    assert "approve" in refusal(consent, run_config, run=None)  # it names no run
    consent.check(1, run_config, message(run="r1"))
    consent.check(2, run_config, message("train", run="r1"))  # it was resumed
    assert "approve" in refusal(consent, run_config, run="r2")
    assert "approve" in refusal(consent, {"fedtune": '{"seed": 2}'}, run="r1")
    assert len(consent.waiting()) == 2


def test_what_waits_does_not_grow_without_end_and_damage_opens_nothing(tmp_path: Path) -> None:
    consent = Consent(settings(tmp_path, approval=True))
    for seed in range(80):
        refusal(consent, {"fedtune": f'{{"seed": {seed}}}'})
    refusal(consent, {"fedtune": "x" * 200_000})
    assert len(consent.waiting()) == 50
    (tmp_path / "state" / "consent.json").write_text('{"runs": {}')
    with pytest.raises(LedgerError, match="cannot be read"):
        consent.check(1, {"fedtune": CONFIG}, message())


def test_two_runs_whose_numbers_begin_alike_are_two(tmp_path: Path) -> None:
    consent, run_config = Consent(settings(tmp_path, approval=True)), {"fedtune": CONFIG}
    refusal(consent, run_config)
    consent.approve(consent.waiting()[0]["digest"])
    for last in ("x", "y"):
        assert "approve" in refusal(consent, run_config, run="r" * 100 + last)
    consent.check(1, run_config, message(run="r" * 100))


def test_a_digest_that_none_or_several_begin_with_approves_nothing(tmp_path: Path) -> None:
    consent = Consent(settings(tmp_path, approval=True))
    refusal(consent, {"fedtune": CONFIG})
    beginning = consent.waiting()[0]["digest"][:31]  # of so few digits a twin could be made
    for digest in ("", "zz", beginning):
        with pytest.raises(ConfigError, match=r"runs that wait begin with"):
            consent.approve(digest)
    assert not consent.waiting()[0]["approved"]


def test_the_administrator_sees_what_a_run_would_spend(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Site(tmp_path, make_model(tmp_path / "model"), approval=True)
    node = tmp_path / "node.yaml"
    _write_node(node, one.settings)
    refusal(Consent(one.settings), {"fedtune": to_json(one.config)})
    (waiting,) = Consent(one.settings).waiting()

    def ask(*words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as left:
            main(["node", "approve", *words, "--config", str(node)])
        return int(str(left.value.code or 0)), capsys.readouterr().out

    status, said = ask()
    assert status == 0 and ": waits" in said and "epsilon after" in said and "permitted" in said
    run = waiting["digest"][:32]
    assert ask(run)[0] == 2  # no terminal, and nobody said yes
    assert not Consent(one.settings).waiting()[0]["approved"]
    for typed, expected in (("\n", False), ("n\n", False), ("", False), ("y\n", True)):
        monkeypatch.setattr(sys, "stdin", Terminal(typed))
        status, said = ask(run)
        assert said.index("epsilon after") < said.index("Approve this run, once?")
        assert bool(Consent(one.settings).waiting()[0]["approved"]) is expected is (status == 0)
        assert (": approved" in said) is expected


def test_a_script_approves_with_yes(tmp_path: Path) -> None:
    one = Site(tmp_path, make_model(tmp_path / "model"), approval=True)
    refusal(Consent(one.settings), {"fedtune": to_json(one.config)})
    run = Consent(one.settings).waiting()[0]["digest"][:32]
    assert ": approved" in approve(one.settings, [run], yes=True)[1]
    assert Consent(one.settings).waiting()[0]["approved"]
    with pytest.raises(ConfigError, match="one run at a time"):
        approve(one.settings, [run, run], yes=True)


class Terminal(io.StringIO):
    """Somebody who types."""

    def isatty(self) -> bool:
        return True


def test_what_waits_writes_no_line_of_its_own_and_loads_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Site(tmp_path, make_model(tmp_path / "model"), approval=True)
    values = json.loads(to_json(one.config))
    values["model"]["name"] = "evil\x1b[8m\nrun 0000: approved"
    values["data"]["name"] = "\x1b]0;x\x07"
    refusal(Consent(one.settings), {"fedtune": json.dumps(values)})
    monkeypatch.setattr("fedtune.deploy.site.dry_run", lambda *_: pytest.fail("it was loaded"))
    found, text = approve(one.settings, [])
    assert "asks for data '?]0;x?'" in text and len(text.splitlines()) == 2
    assert all(line.isprintable() for line in [*text.splitlines(), *found["runs"][0]["dry_run"]])


def _write_node(path: Path, site: Any) -> None:
    import yaml

    values = json.loads(site.to_json())
    budget = {name: values.pop(f"budget_{name}") for name in ("epsilon", "delta", "unit")}
    path.write_text(yaml.safe_dump({**values, "budget": budget}))
