"""The ledger survives `kill -9` at any instruction: it never shows less than what was released."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest

from fedtune.errors import BudgetExhausted
from fedtune.privacy.accounting.epsilon import Term
from fedtune.privacy.accounting.filter import least_epsilon
from fedtune.privacy.ledger.budget import PrivacyBudget
from fedtune.privacy.ledger.identity import Identity, keyed
from fedtune.privacy.ledger.ledger import PrivacyLedger
from fedtune.privacy.plan import PrivacyPlan
from tests.support.ledgers import charged
from tests.support.plans import local_plan

PLAN = local_plan(num_rounds=10_000, noise_multiplier=4.0)


def released(witness: Path) -> set[tuple[str, int]]:
    """What really left: lines that a victim wrote after its reservation had come back."""
    lines = witness.read_text().splitlines() if witness.exists() else []
    return {(line.split()[0], int(line.split()[1])) for line in lines if line.endswith(".")}


def victim(path: Path, witness: Path, run: str, plan: PrivacyPlan = PLAN) -> None:
    """Reserves, draws the noise of a release, lets it out, commits; again and again until it is killed."""
    ledger = PrivacyLedger(path)
    out = os.open(witness, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for round in range(plan.num_rounds):
        reservation = ledger.reserve(
            dataset="visits", fingerprint="f1", node="clinic", run=run, round=round, plan=plan
        )
        update = plan.noise(1000, plan.entropy("clinic", round, 0))
        assert np.isfinite(update).all()
        os.write(out, f"{run} {round} .\n".encode())  # from here on it is public
        ledger.commit(reservation)


def kill_at_random(path: Path, witness: Path, kills: int, seed: int) -> int:
    """Runs one victim after another, each killed at a random moment; returns how many got to release."""
    moments = random.Random(seed)
    busy = 0
    for i in range(kills):
        child = os.fork()
        if child == 0:
            try:
                victim(path, witness, f"run-{seed}-{i}")
            finally:
                os._exit(1)
        # From before the first instruction of SQLite to the middle of a later transaction.
        if moments.random() < 0.5:
            time.sleep(moments.uniform(0, 0.02))
        else:
            wait_for_more(witness)
            time.sleep(moments.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "the victim ended by itself"
        before = busy
        busy += any(run == f"run-{seed}-{i}" for run, _ in released(witness))
        if busy > before and i % 10 == 0:
            check(path, witness)
    return busy


def wait_for_more(witness: Path) -> None:
    """Until something is released, however slow the disk is just now."""
    before = witness.stat().st_size if witness.exists() else 0
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if witness.exists() and witness.stat().st_size > before:
            return
        time.sleep(0.0005)
    raise AssertionError("the victim released nothing for a minute")


def check(path: Path, witness: Path) -> None:
    ledger = PrivacyLedger(path)
    shown = {(release.run, release.round) for release in ledger.releases()}
    assert released(witness) <= shown
    problems = ledger.verify()[1]
    assert problems == []
    # What is composed is at least what left, too.
    steps = (charged(ledger, "visits", "f1") or {}).get(Term(0.05, 4.0), 0)
    assert steps == 5 * len(shown) >= 5 * len(released(witness))
    ledger.close()


def test_twenty_kills(tmp_path: Path) -> None:
    path, witness = tmp_path / "clinic.sqlite", tmp_path / "witness"
    busy = kill_at_random(path, witness, 20, seed=1)
    check(path, witness)
    assert busy > 3  # else the victims were killed too early to prove anything


@pytest.mark.slow
def test_two_hundred_and_fifty_kills(tmp_path: Path) -> None:
    path, witness = tmp_path / "clinic.sqlite", tmp_path / "witness"
    busy = kill_at_random(path, witness, 250, seed=2)
    check(path, witness)
    assert busy > 80
    # Some were killed between reserving and committing: those are spent, and the ledger goes on.
    unfinished = [release for release in PrivacyLedger(path).releases() if not release.committed]
    assert unfinished
    ledger = PrivacyLedger.open(path)
    ledger.reserve(dataset="visits", fingerprint="f1", node="clinic", run="after", round=0, plan=PLAN)


@pytest.mark.slow
def test_kills_do_not_get_past_the_budget(tmp_path: Path) -> None:
    path, witness = tmp_path / "clinic.sqlite", tmp_path / "witness"
    ledger = PrivacyLedger.open(path)
    budget = least_epsilon({Term(0.05, 4.0): 5 * 40}, 1e-5)  # forty runs, of one release each, by the filter
    ledger.set_budget(PrivacyBudget(budget, 1e-5))
    ledger.close()
    plan = local_plan(num_rounds=12, noise_multiplier=4.0)
    for i in range(400):  # how many are killed before they are charged depends on what else the machine does
        if len(PrivacyLedger(path).releases()) == 40:
            break
        child = os.fork()
        if child == 0:
            try:
                victim(path, witness, f"run-{i}", plan)
            finally:
                os._exit(1)
        # Some before the accounting is done; longer from kill to kill, for a busy machine does it late.
        time.sleep(random.Random(i).uniform(0.02, 0.4) * (1 + i // 40))
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it was refused, and is gone
        os.waitpid(child, 0)
    with pytest.raises(BudgetExhausted):
        victim(path, witness, "last", local_plan(num_rounds=41, noise_multiplier=4.0))
    assert 0 < len(released(witness)) <= len(PrivacyLedger(path).releases()) == 40


@pytest.mark.slow
def test_a_kill_while_a_large_set_is_registered_leaves_all_of_it_or_nothing(tmp_path: Path) -> None:
    path, chance = tmp_path / "clinic.sqlite", np.random.default_rng(0)
    held = [
        Identity(chance.integers(0, 256, (200_000, 32)).astype(np.uint8), None, f"old-{i}") for i in range(12)
    ]
    PrivacyLedger(path).reserve(
        dataset="first", fingerprint=held[0], node="clinic", run="first", round=0, plan=PLAN
    )
    secret = path.with_suffix(".key").read_bytes()
    moments, finished = random.Random(4), 0
    for i in range(1, len(held)):
        keyed(held[i], secret)  # what takes long, and writes nothing, is done before
        child = os.fork()
        if child == 0:
            try:
                PrivacyLedger(path).reserve(
                    dataset="d", fingerprint=held[i], node="clinic", run=f"run-{i}", round=0, plan=PLAN
                )
            finally:
                os._exit(1)
        time.sleep(moments.uniform(0.0, 0.25))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        ledger = PrivacyLedger(path)
        assert ledger.verify()[1] == []
        released = {release.run for release in ledger.releases()}
        known = set(ledger.state().sets)
        assert (f"run-{i}" in released) == (ledger.known_as(held[i]) in known)
        assert len(known) == len(released)
        finished += f"run-{i}" in released
        ledger.close()
    assert 0 < finished < len(held) - 1
    assert path.with_suffix(".key").read_bytes() == secret


@pytest.mark.slow
def test_the_witness_would_convict_a_ledger_that_forgets(tmp_path: Path) -> None:
    path, witness = tmp_path / "clinic.sqlite", tmp_path / "witness"
    busy = kill_at_random(path, witness, 8, seed=3)
    assert busy
    with sqlite3.connect(path) as connection:  # what a ledger without durable commits would leave
        connection.execute("DROP TRIGGER log_is_not_cut")
        connection.execute("DELETE FROM log WHERE seq > 1")
        connection.execute("UPDATE sqlite_sequence SET seq = 1")
        connection.execute(
            "CREATE TRIGGER log_is_not_cut BEFORE DELETE ON log BEGIN SELECT RAISE(ABORT, ''); END"
        )
    connection.close()
    with pytest.raises(AssertionError):
        check(path, witness)
