"""What a site's administrator does at the command line, and what the worker of a site is held to."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedtune.cli.app import main
from fedtune.config.build import build
from fedtune.deploy import channel, worker_process
from fedtune.deploy.site import open_ledger
from fedtune.deploy.worker_process import WorkerProcess
from fedtune.errors import ConfigError, LedgerError
from fedtune.privacy.ledger import ledger as ledger_module
from fedtune.privacy.ledger.ledger import PrivacyBudget, PrivacyLedger
from tests.support.golden import Golden
from tests.support.plans import local_plan
from tests.support.site_parts import SIZE, Site, settings
from tests.support.tiny_federation import make_data, make_model, one_thread

RELEASE: dict[str, Any] = {
    "dataset": "made-up", "fingerprint": "f", "node": "clinic-1", "run": "r", "round": 1,
    "plan": local_plan(num_rounds=3),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    one_thread()
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def node(tmp_path: Path, model: Path) -> Path:
    """A node.yaml beside its data."""
    make_data(tmp_path / "data", SIZE)
    values = {
        "federation": "trial", "site": "clinic-1", "server": "127.0.0.1:9", "ca": "ca.crt", "key": "node.key",
        "data": {
            "name": "made-up", "path": "data", "declared_size": SIZE, "labels": ["negative", "positive"],
        },
        "budget": {"epsilon": 3.0, "delta": 1e-3},
        "permit": {"models": [str(model)], "max_sample_rate": 0.5},
        "ledger": "state/ledger.sqlite", "audit_log": "state/audit.jsonl",
    }  # fmt: skip
    path = tmp_path / "node.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def command(*words: object) -> int:
    with pytest.raises(SystemExit) as done:
        main([str(word) for word in words])
    return int(done.value.code or 0)


@pytest.mark.slow
def test_a_dry_run_shows_what_a_run_would_do_and_does_none_of_it(
    node: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [
        "data.labels=[negative,positive]", f"model.name={model}", "model.quantization=none", "adapter=lora",
        "train.sample_rate=0.3", "privacy.delta=1e-3",
    ]  # fmt: skip
    permitted = ["privacy.epsilon=2", "federation.num_rounds=3"]
    assert command("node", "--config", node, "--dry-run", *asked, *permitted) == 0
    said = capsys.readouterr().out
    assert "\npermitted\nNothing was trained, released or sent." in said
    assert "3 rounds" in said and "epsilon" in said
    # Beyond the budget, and beyond what is permitted: each reason is told here, where the owner reads.
    refused = ["privacy.epsilon=8", "federation.num_rounds=500"]
    assert command("node", "--config", node, "--dry-run", *asked, *refused) == 1
    said = capsys.readouterr().out
    assert "refused: " in said and "500 rounds are more than the permitted 200" in said
    assert "Nothing was trained, released or sent." in said
    assert command("node", "--config", node, "proof") == 0
    assert "0 answers, 0 bytes left this site" in capsys.readouterr().out


def test_the_proof_shows_what_left_and_fails_when_a_book_was_changed(
    tmp_path: Path, model: Path, node: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site = Site(tmp_path, model)
    assert site.ask(round=1)["update"] and site.ask(round=2)["update"]
    assert command("node", "--config", node, "proof") == 0
    said = capsys.readouterr().out
    assert "2 releases, epsilon" in said and "audit log are whole" in said and " round 2" in said
    assert f"2 answers, {sum(one['bytes_out'] for one in site.log())} bytes left this site" in said
    path = Path(site.settings.audit_log)
    first = f'"bytes_out": {site.log()[0]["bytes_out"]}'
    path.write_text(path.read_text().replace(first, '"bytes_out": 1', 1))
    assert command("node", "--config", node, "proof") == 1
    assert "audit log: line 2 does not follow line 1: one of them was replaced" in capsys.readouterr().out


@pytest.mark.slow
def test_only_a_node_that_starts_sets_the_budget(
    tmp_path: Path, model: Path, node: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever tries a node.yaml with more to spend raises nothing for the node that runs with the old one."""
    asked = [
        "data.labels=[negative,positive]", f"model.name={model}", "model.quantization=none", "adapter=lora",
        "train.sample_rate=0.3", "privacy.delta=1e-3", "privacy.epsilon=40", "federation.num_rounds=3",
        "train.local_steps=4",
    ]  # fmt: skip
    path = tmp_path / "state" / "ledger.sqlite"
    raised = yaml.safe_load(node.read_text()) | {"budget": {"epsilon": 100.0, "delta": 1e-3}}
    node.write_text(yaml.safe_dump(raised))
    dry_run = ["node", "--config", node, "--dry-run", *asked]
    # Before the first start: nothing is made that a start would take for its own.
    assert command(*dry_run) == 0 and "epsilon now    0 " in capsys.readouterr().out
    assert command("node", "--config", node, "proof") == 0
    assert "there is no ledger yet" in capsys.readouterr().out and not path.parent.exists()

    site = Site(tmp_path, model)
    assert site.ask(round=1)["update"]
    rows, budget = PrivacyLedger(path).verify(), path.with_suffix(".budget.json").read_bytes()
    assert command(*dry_run) == 0 and " of 100" in capsys.readouterr().out
    assert command("node", "--config", node, "proof") == 0
    assert "budget epsilon 100 " in capsys.readouterr().out
    assert PrivacyLedger(path).verify() == rows and path.with_suffix(".budget.json").read_bytes() == budget
    assert open_ledger(site.settings).budgets().default == site.settings.budget


@pytest.mark.parametrize("content", [None, "", '{"version": 1, "default": {"epsilon": 99}}'])
def test_a_budget_file_that_is_lost_or_damaged_is_written_anew_by_a_start(
    content: str | None,
    tmp_path: Path,
    model: Path,
    node: Path,
    capsys: pytest.CaptureFixture[str],
    golden: Golden,
) -> None:
    site = settings(tmp_path, str(model))
    ledger = open_ledger(site, setting=True)
    ledger.set_budget(PrivacyBudget(1.0, 1e-4), dataset="visits")
    before = ledger.budgets()
    ledger.reserve(**RELEASE)
    ledger.budget_path.unlink()
    if content is not None:
        ledger.budget_path.write_text(content)
    with pytest.raises(LedgerError) as raised:
        ledger.reserve(**{**RELEASE, "round": 2})
    assert "budget.json" in str(raised.value)
    golden(raised)
    assert command("node", "--config", node, "proof") == 1
    said = capsys.readouterr().out
    assert "start the node again" in said and "1 releases, epsilon" in said and "0 answers" in said
    # What the owner said of one data set by itself stays, and does not become looser.
    assert open_ledger(site, setting=True).budgets() == before and before.datasets
    ledger.reserve(**{**RELEASE, "round": 2})


def test_a_node_that_died_in_its_first_start_starts_again(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the budget's file and its row: the file alone would look as if a ledger had been lost."""
    from fedtune.privacy.ledger import ledger as module

    write, site = module.write_budgets, settings(tmp_path, str(model))

    def dies(path: Path, budgets: Any) -> None:
        write(path, budgets)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_budgets", dies)
        with pytest.raises(KeyboardInterrupt):
            open_ledger(site, setting=True)
    assert Path(site.ledger).with_suffix(".budget.json").exists()
    assert open_ledger(site, setting=True).budgets().default == site.budget


def test_a_ledger_that_is_gone_is_not_begun_anew(
    tmp_path: Path,
    model: Path,
    node: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: Any,
    golden: Golden,
) -> None:
    made = Site(tmp_path, model)
    assert made.ask(round=1)["update"]
    path = Path(made.settings.ledger)
    open_ledger(made.settings).close()

    def refused(what: str) -> None:
        monkeypatch.setattr(ledger_module, "_opened", {})  # as a new process, which remembers nothing
        with pytest.raises(LedgerError, match=rf"{what}.* would forget what was spent"):
            open_ledger(made.settings, setting=True)
        assert command("node", "--config", node, "proof") == 1
        assert "would forget what was spent" in capsys.readouterr().out

    for beside in path.parent.glob("ledger.sqlite*"):
        beside.unlink()
    refused("its budget file .* and the audit log .* tells of 1 releases")
    # A worker that the running node starts again finds the budget, and no ledger that knows of it.
    with pytest.raises(LedgerError) as raised:
        open_ledger(made.settings).reserve(**RELEASE)
    golden(raised)
    path.touch()
    refused("its budget file .* and the audit log .* tells of 1 releases")
    path.unlink()
    path.with_suffix(".budget.json").unlink()
    refused("but the audit log .* tells of 1 releases")
    assert not path.exists()


def test_the_proof_says_all_that_is_wrong_with_damaged_books(
    tmp_path: Path, model: Path, node: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = Site(tmp_path, model)
    assert made.ask(round=1)["update"] and made.ask(round=2)["update"]
    path, log = Path(made.settings.ledger), Path(made.settings.audit_log)
    open_ledger(made.settings).close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TRIGGER log_is_not_edited")
        connection.execute("UPDATE log SET body = replace(body, '0.3', '0.2') WHERE seq = 4")
        connection.execute("UPDATE log SET time = '2020' WHERE seq = 6")
        connection.commit()
    log.write_bytes(b"3\nno line\n" + log.read_bytes())
    with pytest.raises(LedgerError):
        PrivacyLedger(path).state()
    assert command("node", "--config", node, "proof") == 1
    said = capsys.readouterr().out
    assert "ledger: row 4 was changed" in said and "ledger: row 6 was changed" in said
    assert "audit log: line 2 is no entry" in said and "2 answers" in said
    path.write_bytes(b"no database at all" * 100)
    assert command("node", "--config", node, "proof") == 1
    said = capsys.readouterr().out
    assert "ledger: The privacy ledger" in said and "audit log: line 2 is no entry" in said


@pytest.mark.slow
def test_books_of_which_one_was_wound_back_keep_the_node_from_starting(
    node: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older ledger beside a newer audit log; and an audit log that is cut or gone."""
    from fedtune.deploy.node import run_node
    from fedtune.deploy.site import books_of, check_books, make_key, read_site

    site = read_site(node)
    ledger = open_ledger(site, setting=True)
    books_of(site).append("answered", message="query.hello")
    check_books(site)
    ledger.close()
    old = tmp_path / "old.sqlite"
    old.write_bytes(Path(site.ledger).read_bytes())
    open_ledger(site).reserve(**RELEASE)
    books_of(site).append("answered", message="query.propose", run="0123456789abcdef", round=None)
    books_of(site).append("released", message="train")
    assert command("node", "proof", "--config", node) == 0
    said = capsys.readouterr().out
    assert "run 01234567" in said and "round" not in said, "before round 1 there is no round to name"
    assert "each is what the other knows" in said
    head = said.split("head ")[1].split()[0]
    assert command("node", "proof", "--config", node, "--against", head) == 0
    assert "go on from the head that was kept" in capsys.readouterr().out
    assert command("node", "proof", "--config", node, "--against", "L1") == 2
    assert "is no head of books" in capsys.readouterr().err

    whole, log = Path(site.ledger).read_bytes(), Path(site.audit_log).read_text()
    open_ledger(site).close()
    Path(site.ledger).write_bytes(old.read_bytes())
    with pytest.raises(LedgerError, match="rolled back or cut"):
        check_books(site)
    make_key(site)
    monkeypatch.setattr("fedtune.deploy.node.open_ledger", lambda *_, **__: None)
    monkeypatch.setattr("fedtune.deploy.node._wait_for_admission", lambda *_: pytest.fail("it asks to join"))
    with pytest.raises(LedgerError, match="rolled back or cut"):
        run_node(site, print)
    assert command("node", "proof", "--config", node, "--against", head) == 1
    said = capsys.readouterr().out
    assert (
        "rolled back or cut" in said and "the head that was kept names row" in said and "\nhead " not in said
    )
    assert command("node", "accept", "--config", node) != 0
    assert "forget what was spent" in capsys.readouterr().err.replace(
        "would be forgotten", "forget what was spent"
    )

    Path(site.ledger).write_bytes(whole)
    check_books(site)
    Path(site.audit_log).unlink()
    with pytest.raises(LedgerError, match="cut, rotated or removed"):
        check_books(site)
    assert command("node", "accept", "--config", node) == 0
    said = capsys.readouterr().out
    assert "noted in both books" in said and f"--accept-restore {site.site}`" in said
    check_books(site)
    assert command("node", "proof", "--config", node) == 0
    assert "was accepted there by the owner" in capsys.readouterr().out
    Path(site.audit_log).write_text(log)  # the lines turn up again: then the note is gone
    assert command("node", "proof", "--config", node) == 1


def test_the_books_of_version_0_1_are_taken_up_and_a_log_that_is_gone_is_named(
    node: Path, golden: Golden
) -> None:
    from fedtune.deploy.site import books_of, check_books, read_site
    from fedtune.federation.client.audit_log import AuditLog

    site = read_site(node)
    open_ledger(site, setting=True).reserve(**RELEASE)
    with pytest.raises(LedgerError) as raised:
        check_books(site)
    golden(raised)
    AuditLog(Path(site.audit_log)).append("released", message="train")
    check_books(site)
    books_of(site).append("answered", message="query.hello")
    check_books(site)


def test_a_ledger_that_is_wound_back_while_the_node_runs_is_found_before_the_next_answer(
    tmp_path: Path, model: Path
) -> None:
    site = Site(tmp_path, model)
    path = Path(site.settings.ledger)

    def let_go() -> None:
        for require_budget in (True, False):
            PrivacyLedger.open(path, require_budget=require_budget).close()

    assert site.ask(round=1)["update"]
    let_go()
    old = path.read_bytes()
    assert site.ask(round=2)["update"]
    let_go()
    path.with_name("other").write_bytes(old)
    path.with_name("other").replace(path)
    for _ in range(2):
        answer = site.ask(round=3)
        assert not answer["update"] and "LedgerError" in str(answer["error"])
    assert site.log()[-1]["event"] == "refused" and len(PrivacyLedger(path).releases()) == 1


@pytest.mark.parametrize("name", ["memory_gb", "message_seconds", "idle_seconds"])
@pytest.mark.parametrize("limit", [0, -1.0])
def test_a_limit_of_nothing_is_refused(name: str, limit: float, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"limits\.{name}={limit:g} .* above 0"):
        settings(tmp_path, limits={name: limit})


@pytest.mark.slow
def test_a_worker_is_held_to_its_owners_limits(tmp_path: Path) -> None:
    site = settings(tmp_path, limits={"threads": 1, "memory_gb": 0.5})
    code = (
        "import json, os, resource, sys\n"
        "from fedtune.deploy import worker\n"
        "from fedtune.federation.client.policy import SiteSettings\n"
        "worker._limit(SiteSettings.from_json(sys.argv[1]))\n"
        "try:\n"
        "    taken = bytearray(10**9)\n"
        "except MemoryError:\n"
        "    taken = None\n"
        "print(json.dumps([resource.getrlimit(resource.RLIMIT_DATA)[1], os.environ['OMP_NUM_THREADS'],\n"
        "                  taken is None, resource.getrlimit(resource.RLIMIT_CORE)]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, site.to_json()], check=True, capture_output=True, timeout=120
    )
    assert json.loads(done.stdout) == [500_000_000, "1", True, [0, 0]]


@pytest.mark.slow
def test_ctrl_c_in_the_nodes_terminal_is_not_for_the_worker(tmp_path: Path) -> None:
    """A terminal sends it to both: the node ends the worker, and nothing is printed."""
    code = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # whatever started the tests ignores
        "from fedtune.deploy import worker\n"
        "worker._load = lambda: None\n"
        "worker.main(sys.argv[1])\n"
    )
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/socket")
        listener.listen(1)
        listener.settimeout(60)
        started = subprocess.Popen(
            [sys.executable, "-c", code, f"{folder}/socket"], stderr=subprocess.PIPE, text=True
        )
        connection, _ = listener.accept()
        channel.send(connection, {}, [settings(tmp_path).to_json().encode()])
        assert channel.receive(connection)[0] == {"ready": started.pid, "fedtune": build()}
        started.send_signal(signal.SIGINT)
        time.sleep(0.2)
        connection.close()
        _, said = started.communicate(timeout=60)
    assert (started.returncode, said) == (0, "")


# A worker that does nothing but answer.
LATE = """
import socket, sys
from fedtune.config.build import build
from fedtune.deploy import channel
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
channel.receive(connection)
channel.send(connection, {"ready": 1, "fedtune": build()})
channel.receive(connection)
channel.send(connection, {}, [b"reply", b"context"])
channel.receive(connection)
"""


@pytest.mark.slow
def test_nobody_but_the_nodes_own_worker_is_listened_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even a process of the same user that reaches the socket first is told nothing."""
    started = subprocess.Popen

    def late(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return started([sys.executable, "-c", LATE, command[-1]], **options)

    monkeypatch.setattr(worker_process.subprocess, "Popen", late)
    worker, heard, first = WorkerProcess(settings(tmp_path)), [], threading.Event()

    def intrude() -> None:
        stranger = socket.socket(socket.AF_UNIX)
        stranger.connect(worker._path)
        first.set()
        stranger.settimeout(60)
        heard.append(stranger.recv(1))
        stranger.close()

    other = threading.Thread(target=intrude)
    other.start()
    assert first.wait(60)
    try:
        assert worker.ask(b"message", b"context", {"task": 1}, lambda: None) == [b"reply", b"context"]
    finally:
        worker.close()
    other.join(60)
    assert heard == [b""]
