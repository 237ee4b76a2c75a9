"""`fedtune node backup | restore`: a site gets back what it must not lose, and forgets nothing in silence."""

from __future__ import annotations

import json
import shutil
import stat
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.app import RecordDict

from fedtune.cli.app import main
from fedtune.deploy import backup as module
from fedtune.deploy.admission import BookHeads
from fedtune.deploy.backup import backup, restore
from fedtune.deploy.site import books_of, check_books, open_ledger
from fedtune.errors import ConfigError, LedgerError
from fedtune.privacy.ledger import ledger as ledger_module
from fedtune.privacy.ledger.ledger import PrivacyLedger
from tests.support.site_parts import SIZE, Site
from tests.support.tiny_federation import make_model, one_thread


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    one_thread()
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def site(tmp_path: Path, model: Path) -> Site:
    """A site that has released one round."""
    made = Site(tmp_path, model)
    Path(made.settings.key).write_text("the key of this node")
    assert made.ask(round=1)["update"]
    return made


@pytest.fixture
def saved(site: Site, tmp_path: Path) -> Path:
    """Its backup then; another round was released since."""
    config = tmp_path / "node.yaml"
    config.write_text("the owner's own file")
    backup(site.settings, config, tmp_path / "saved.zip")
    assert site.ask(round=2)["update"]
    return tmp_path / "saved.zip"


def started_again(site: Site) -> PrivacyLedger:
    """The ledger as a node that starts finds it."""
    for ledger in ledger_module._opened.values():
        ledger.close()
    ledger_module._opened.clear()
    ledger = open_ledger(site.settings, setting=True)
    check_books(site.settings)
    return ledger


def test_a_backup_is_whole_secret_and_replaces_nothing(site: Site, saved: Path, tmp_path: Path) -> None:
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600
    with zipfile.ZipFile(saved) as archive:
        names = set(archive.namelist())
        assert archive.read("node.yaml") == b"the owner's own file"
    assert names == {
        "manifest.json", "ledger.sqlite", "ledger.key", "ledger.budget.json", "audit.jsonl", "node.yaml",
        "node.key",
    }  # fmt: skip
    before = saved.read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        backup(site.settings, tmp_path / "node.yaml", saved)
    assert saved.read_bytes() == before
    # Books that are wrong are not saved as if they were right.
    log = Path(site.settings.audit_log)
    log.write_bytes(log.read_bytes()[:-10])
    with pytest.raises(LedgerError, match="is not what the privacy ledger knows"):
        backup(site.settings, tmp_path / "node.yaml", tmp_path / "other.zip")
    assert not (tmp_path / "other.zip").exists()


def test_whole_books_that_know_more_are_not_replaced(site: Site, saved: Path) -> None:
    before = {path: path.read_bytes() for path in (site.root / "state").iterdir() if path.suffix != ".lock"}
    with pytest.raises(LedgerError, match="there is nothing to restore"):
        restore(site.settings, saved, forget=1)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_what_the_backup_does_not_know_is_forgotten_by_its_number_alone(site: Site, saved: Path) -> None:
    """The ledger is lost; the audit log tells of the round that was released since."""
    Path(site.settings.ledger).write_bytes(b"not SQLite any more")
    for forget in (None, 0, 2):
        with pytest.raises(LedgerError, match=r"tell of 1 releases that the backup .* give --forget 1"):
            restore(site.settings, saved, forget)
    assert Path(site.settings.ledger).read_bytes() == b"not SQLite any more"
    done = restore(site.settings, saved, 1)
    assert done.forgotten == 1 and done.aside is not None
    assert (done.aside / "ledger.sqlite").read_bytes() == b"not SQLite any more"
    assert len((done.aside / "audit.jsonl").read_text().splitlines()) == 2
    assert len(started_again(site).releases()) == 1
    last = site.log()[-1]
    assert (last["event"], last["forgotten"]) == ("restored", 1) and done.head == books_of(
        site.settings
    ).head()
    # A node that went on through it would know better than its ledger; one that starts charges it again.
    assert not site.ask(round=2, attempt=2)["update"]
    site.state = RecordDict()
    assert site.ask(round=2, attempt=2)["update"]
    assert len(started_again(site).releases()) == 2


def test_a_new_machine_takes_the_place_of_a_lost_one_and_the_server_notices(
    site: Site, saved: Path, tmp_path: Path
) -> None:
    heads = BookHeads(tmp_path)
    heads.note("clinic-1", books_of(site.settings).head())  # as it was after the second round
    shutil.rmtree(site.root / "state")
    Path(site.settings.key).unlink()
    done = restore(site.settings, saved)  # nothing here knows of the second round
    assert done.aside is None and done.forgotten is None  # which is not none
    assert Path(site.settings.key).read_text() == "the key of this node"
    assert len(started_again(site).releases()) == 1 and site.log()[-1]["forgotten"] is None
    heads.note("clinic-1", books_of(site.settings).head())
    assert "went back" in str(heads.refusal("clinic-1"))
    heads.accept("clinic-1")
    assert heads.refusal("clinic-1") is None


def test_what_nobody_can_read_is_not_counted_as_nothing(site: Site, saved: Path) -> None:
    Path(site.settings.ledger).write_bytes(b"not SQLite any more")
    Path(site.settings.audit_log).write_bytes(b"nor a log\n")
    done = restore(site.settings, saved)
    assert done.forgotten is None and done.aside is not None


def test_a_restore_that_dies_in_between_leaves_a_site_that_does_not_start(
    site: Site, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(site.root / "state")
    put = module._put

    def dies(path: Path, content: bytes) -> None:
        if path == Path(site.settings.ledger):
            raise KeyboardInterrupt
        put(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_put", dies)
        with pytest.raises(KeyboardInterrupt):
            restore(site.settings, saved)
    with pytest.raises(LedgerError, match="is missing or empty"):
        started_again(site)
    restore(site.settings, saved)
    assert len(started_again(site).releases()) == 1


@pytest.mark.parametrize("how", ["torn", "changed", "another site's", "a way up", "no archive"])
def test_what_is_no_backup_of_this_site_is_refused(how: str, site: Site, saved: Path, tmp_path: Path) -> None:
    shutil.rmtree(site.root / "state")
    with zipfile.ZipFile(saved) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    manifest: dict[str, Any] = json.loads(files["manifest.json"])
    if how == "changed":
        files["audit.jsonl"] += b"{}\n"
    if how == "another site's":
        manifest["site"] = "clinic-2"
    if how == "a way up":
        files["../stolen"] = files["audit.jsonl"]
        manifest["files"]["../stolen"] = manifest["files"]["audit.jsonl"]
    files["manifest.json"] = json.dumps(manifest).encode()
    bad = tmp_path / "bad.zip"
    with zipfile.ZipFile(bad, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    if how == "torn":
        bad.write_bytes(bad.read_bytes()[:-100])
    if how == "no archive":
        bad.write_bytes(b"not an archive")
    with pytest.raises(ConfigError, match=r"is no backup|is a backup of site 'clinic-2'"):
        restore(site.settings, bad)
    assert not (site.root / "state").exists() and not (tmp_path.parent / "stolen").exists()


@pytest.mark.slow
def test_the_commands(site: Site, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {
        "federation": "trial", "site": "clinic-1", "server": "127.0.0.1:9", "ca": "ca.crt", "key": "node.key",
        "data": {"name": "made-up", "path": "data", "declared_size": SIZE},
        "budget": {"epsilon": 50.0, "delta": 1e-3},
        "permit": {"models": [str(model)]}, "ledger": "state/ledger.sqlite", "audit_log": "state/audit.jsonl",
    }  # fmt: skip
    config, target = tmp_path / "own.yaml", tmp_path / "own.zip"
    config.write_text(yaml.safe_dump(values))

    def command(*words: object) -> int:
        with pytest.raises(SystemExit) as done:
            main(["node", *map(str, words), "--config", str(config)])
        return int(done.value.code or 0)

    assert command("backup", "-o", target) == 0
    head = books_of(site.settings).head()
    assert f"head {head}" in capsys.readouterr().out
    shutil.rmtree(site.root / "state")
    assert command("restore", target) == 0
    said = capsys.readouterr().out
    assert "fedtune server DIR --accept-restore clinic-1" in said
    assert command("proof", "--against", head) == 0
    assert command("backup") == 2 and "Give `fedtune node backup" in capsys.readouterr().err
