"""Charges of nodes that are asked together: as if each had been charged by itself, and before any begins."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune import engines
from fedtune.config.convert import to_json
from fedtune.config.schema import AdapterConfig, Config
from fedtune.engines.local import ClientThread
from fedtune.errors import FederationError, LedgerError
from fedtune.federation.client import together
from fedtune.federation.client.node_context import node_ledger
from fedtune.federation.client.release import ReleaseCounter
from fedtune.federation.events import FederationResult
from fedtune.privacy.ledger import identity
from fedtune.privacy.ledger import ledger as ledger_module
from fedtune.privacy.ledger.budget import PrivacyBudget
from fedtune.privacy.ledger.chain import Chain
from fedtune.privacy.ledger.ledger import PrivacyLedger, Release
from fedtune.training import local
from tests.support.tiny_federation import private

Make = Callable[..., Config]
NODES = [f"site-{i}" for i in range(4)]


@pytest.fixture
def config(tiny: Make) -> Config:
    made = private(tiny())
    made.privacy.reproducible_noise = True
    made.federation.num_rounds = 2
    return made


def shown() -> list[Release]:
    """What a process that knows nothing yet reads in the file."""
    ledger = PrivacyLedger(node_ledger().path, shared=True)
    assert ledger.verify()[1] == []
    releases = ledger.releases()
    ledger.close()
    return releases


def same(releases: list[Release], run: str) -> list[tuple[object, ...]]:
    return sorted(
        (one.node, one.round, one.dataset, one.fingerprint, one.steps, one.delta, one.purpose, one.committed)
        for one in releases
        if one.run == run
    )


def test_a_run_is_the_same_as_with_one_charge_after_another(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str) -> tuple[FederationResult, int]:
        written: list[object] = []
        real = Chain.writing

        def counting(self: Chain) -> Any:
            written.append(self)
            return real(self)

        with monkeypatch.context() as patch:
            patch.setattr(Chain, "writing", counting)
            return engines.run(config, tmp_path / name), len(written)

    run("before")  # makes the ledger's secret
    fast, few = run("together")
    monkeypatch.setattr(together, "MOST", 2)
    _, some = run("two by two")
    monkeypatch.setattr(together, "MOST", 1)
    slow, many = run("alone")
    # A round's charges, group by group, and that they came to their end.
    assert (few, some, many) == (2 * (1 + 1), 2 * (2 + 1), 2 * (4 + 4))
    np.testing.assert_array_equal(fast.adapter, slow.adapter)
    of_one, of_other = same(shown(), fast.run), same(shown(), slow.run)
    assert of_one == of_other and len(of_one) == 8 and all(one[-1] for one in of_one)


def test_all_have_paid_on_the_disk_when_the_first_begins(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, seen = local.train_locally, []

    def train(model: Any, shard: Any, *arguments: Any, **options: Any) -> Any:
        paid = {one.node for one in shown() if one.round == options["round"] and not one.committed}
        seen.append((options["round"], shard.node, paid))
        return trained(model, shard, *arguments, **options)

    monkeypatch.setattr(local, "train_locally", train)
    engines.run(config, tmp_path / "run")
    assert seen == [(round, node, set(NODES)) for round in (1, 2) for node in NODES]


def test_a_kill_in_the_middle_of_a_round_leaves_all_of_it_charged(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node_ledger()
    witness = tmp_path / "witness"
    child = os.fork()
    if child == 0:
        try:

            def train(model: Any, shard: Any, *arguments: Any, **options: Any) -> Any:
                with witness.open("a") as file:
                    file.write(f"{shard.node}\n")
                if shard.node == NODES[2]:
                    os.kill(os.getpid(), signal.SIGKILL)
                raise MemoryError  # a fork after torch has trained is not defined

            monkeypatch.setattr(local, "train_locally", train)
            engines.run(config, tmp_path / "run")
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert witness.read_text().split() == NODES[:3]
    releases = shown()
    assert {one.node for one in releases} == set(NODES) and not any(one.committed for one in releases)


_KILLED = """
import os, signal, sys
from pathlib import Path

from fedtune import engines
from fedtune.config.convert import config_from_json
from fedtune.privacy.ledger.ledger import PrivacyLedger
from fedtune.training import local

text, folder, witness, moment = sys.argv[1:]
out = os.open(witness, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
calls = []


def at(what):
    calls.append(what)
    if calls.count(what) == 2 and what == moment:
        os.kill(os.getpid(), signal.SIGKILL)


def train(model, shard, *arguments, trained=local.train_locally, **options):
    os.write(out, f"{shard.node} {options['round']}\\n".encode())
    if shard.node == "site-2":
        at("trains")
    return trained(model, shard, *arguments, **options)


def reserve_all(self, asked, reserve=PrivacyLedger.reserve_all):
    answers = reserve(self, asked)
    at("charged")
    return answers


def commit_all(self, reservations, commit=PrivacyLedger.commit_all):
    at("settles")
    commit(self, reservations)


local.train_locally, PrivacyLedger.reserve_all, PrivacyLedger.commit_all = train, reserve_all, commit_all
result = engines.run(config_from_json(text), Path(folder))
print("released", *sorted(result.releases.items()))
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("moment", ["charged", "trains", "settles"])
def test_a_simulation_killed_in_a_round_pays_for_what_it_did_and_again_when_it_goes_on(
    config: Config, tmp_path: Path, moment: str
) -> None:
    config.federation.num_rounds = 3
    run, witness = tmp_path / "run", tmp_path / "witness"

    def go(config: Config, moment: str) -> subprocess.CompletedProcess[str]:
        arguments = [to_json(config), str(run), str(witness), moment]
        return subprocess.run([sys.executable, "-c", _KILLED, *arguments], capture_output=True, text=True)

    assert go(config, moment).returncode == -signal.SIGKILL
    done = go(dataclasses.replace(config, resume=str(run)), "never")
    assert done.returncode == 0, done.stderr[-3000:]
    touched = Counter(tuple(line.split()) for line in witness.read_text().splitlines())
    charged = Counter((one.node, str(one.round)) for one in shown())
    assert touched <= charged
    # The round in which it was killed was asked of all again; the plan's three releases are then used up.
    assert charged == {(node, str(round)): round for node in NODES for round in (1, 2)}
    assert touched["site-3", "2"] == (1 if moment in ("charged", "trains") else 2)
    assert done.stdout.split("released")[-1].split() == " ".join(f"('{n}', 3)" for n in NODES).split()


def test_who_refuses_costs_the_others_nothing(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ReleaseCounter.check

    def check(self: ReleaseCounter, request: Any, node: str, in_ledger: int) -> None:
        real(self, request, node, in_ledger + (-9 if node == NODES[1] and request.round == 2 else 0))

    monkeypatch.setattr(ReleaseCounter, "check", check)
    result = engines.run(config, tmp_path / "run")
    assert [(lost.node, lost.round) for lost in result.dropped] == [(NODES[1], 2)]
    assert "the ledger has lost some" in result.dropped[0].reason
    paid = Counter(node for node, *_ in same(shown(), result.run))
    assert paid == {node: 1 if node == NODES[1] else 2 for node in NODES}


@pytest.mark.parametrize("broken", ["charge", "settle"])
def test_what_cannot_be_done_together_is_done_by_each(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fails(*_: object) -> None:
        raise LedgerError("the disk is full")

    if broken == "charge":
        monkeypatch.setattr(together, "prepare", fails)
    else:
        monkeypatch.setattr(PrivacyLedger, "commit_all", fails)
    result = engines.run(config, tmp_path / "run")
    releases = same(shown(), result.run)
    assert len(result.history) == 2 and len(releases) == 8
    assert all(one[-1] is (broken == "charge") for one in releases)
    assert not together._waiting and not together._ended


def test_what_is_never_run_is_forgotten(config: Config, tmp_path: Path) -> None:
    class Stops:
        def on_client(self, node: str, status: str) -> None:
            if status == "answered":
                raise KeyboardInterrupt

        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: None

    with pytest.raises(KeyboardInterrupt):
        engines.run(config, tmp_path / "run", Stops())
    assert not together._waiting and not together._ended
    assert [one.committed for one in sorted(shown(), key=lambda one: one.node)] == [True, False, False, False]


@pytest.mark.slow
def test_what_is_asked_before_a_run_is_answered_from_one_look_at_the_ledger(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Path] = []
    real = identity.read_secret
    monkeypatch.setattr(ledger_module, "read_secret", lambda path: looks.append(path) or real(path))

    class Begun:
        def on_start(self, info: dict[str, Any]) -> None:
            begun.append(len(looks))

        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: None

    begun: list[int] = []

    def run(name: str) -> FederationResult:
        looks.clear()
        return engines.run(config, tmp_path / name, Begun())

    run("before")
    fast = run("together")
    monkeypatch.setattr(together, "MOST", 1)
    slow = run("alone")
    # Of all nodes: it is opened for `hello` and for `propose`, and the latter asks for their keys.
    assert begun[1] == 3 and begun[2] >= 3 * len(NODES)
    assert fast.plan == slow.plan
    assert [(n.name, n.declared_size, n.delta) for n in fast.nodes] == [
        (n.name, n.declared_size, n.delta) for n in slow.nodes
    ]
    assert not together._answers


def test_a_budget_that_does_not_reach_refuses_the_run_in_the_same_words(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node_ledger().set_budget(PrivacyBudget(0.5, 1e-3))

    def refused(name: str) -> str:
        with pytest.raises(FederationError) as raised:
            engines.run(config, tmp_path / name)
        return str(raised.value)

    fast = refused("together")
    monkeypatch.setattr(together, "MOST", 1)
    assert fast == refused("alone") and "0 of 4 nodes agreed" in fast and "BudgetExhausted" in fast
    assert shown() == []


# --- nodes that train together ------------------------------------------------------------------------


@pytest.fixture
def heads(config: Config) -> Config:
    """The same federation, where each node takes steps of a head, which it may do together with others."""
    config.adapter = AdapterConfig(name="head")
    return config


Groups = list[tuple[int, list[str]]]


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> Groups:
    """(round, nodes) of every group that trains together."""
    seen: Groups = []
    real = local.train_together

    def train(model: Any, shards: Any, *arguments: Any, **options: Any) -> Any:
        seen.append((options["round"], [shard.node for shard in shards]))
        return real(model, shards, *arguments, **options)

    monkeypatch.setattr(local, "train_together", train)
    return seen


@pytest.mark.parametrize("strategy", ["fedavg", "fedsgd"])
def test_nodes_that_train_together_end_where_they_do_alone(
    heads: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: Groups, strategy: str
) -> None:
    heads.federation.strategy = strategy  # type: ignore[assignment]
    if strategy == "fedsgd":
        heads.train.local_steps = 1
    fast = engines.run(heads, tmp_path / "together")
    assert groups == [(round, NODES) for round in (1, 2)]
    monkeypatch.setattr(together, "MOST", 1)
    slow = engines.run(heads, tmp_path / "alone")
    assert len(groups) == 2
    assert np.abs(fast.adapter).max() > 1e-3
    np.testing.assert_allclose(fast.adapter, slow.adapter, rtol=1e-5, atol=1e-7)
    assert fast.flops is not None and slow.flops is not None and 0 <= slow.flops - fast.flops < 2 * len(NODES)
    assert fast.train_seconds > 0 and fast.bytes_up == slow.bytes_up
    of_one, of_other = same(shown(), fast.run), same(shown(), slow.run)
    assert of_one == of_other and len(of_one) == 8 and all(one[-1] for one in of_one)


def test_all_have_paid_on_the_disk_when_they_begin_together(
    heads: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, seen = local.train_together, []

    def train(model: Any, shards: Any, *arguments: Any, **options: Any) -> Any:
        paid = {one.node for one in shown() if one.round == options["round"] and not one.committed}
        seen.append((options["round"], {shard.node for shard in shards} <= paid))
        return trained(model, shards, *arguments, **options)

    monkeypatch.setattr(local, "train_together", train)
    engines.run(heads, tmp_path / "run")
    assert seen == [(1, True), (2, True)]


def test_a_kill_while_they_train_together_leaves_all_charged(
    heads: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node_ledger()
    child = os.fork()
    if child == 0:
        try:
            monkeypatch.setattr(
                local, "train_together", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
            )
            engines.run(heads, tmp_path / "run")
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    releases = shown()
    assert {one.node for one in releases} == set(NODES) and not any(one.committed for one in releases)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_who_diverges_among_others_is_dropped_alone(
    heads: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = local.train_together

    def train(model: Any, shards: Any, plan: Any, starts: Any, *arguments: Any, **options: Any) -> Any:
        if options["round"] == 2:
            starts[1, 0] = np.inf
        return trained(model, shards, plan, starts, *arguments, **options)

    monkeypatch.setattr(local, "train_together", train)
    result = engines.run(heads, tmp_path / "run")
    assert [(lost.node, lost.round) for lost in result.dropped] == [(NODES[1], 2)]
    assert "UpdateRejected" in result.dropped[0].reason
    assert [summary.updates for summary in result.history] == [4, 3]
    # It has trained, and is charged like the others; that it came to its end is not noted.
    ended = {(node, round): committed for node, round, *_, committed in same(shown(), result.run)}
    assert ended == {(node, round): (node, round) != (NODES[1], 2) for node in NODES for round in (1, 2)}


@pytest.mark.parametrize("broken", ["fails", pytest.param("hangs", marks=pytest.mark.slow)])
def test_who_cannot_train_together_trains_alone_for_the_same_charge(
    heads: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    heads.federation.round_timeout = 2.0

    def train(*_: object, **__: object) -> None:
        while broken == "hangs":
            time.sleep(0.01)
        raise MemoryError

    whole = engines.run(dataclasses.replace(heads), tmp_path / "whole")
    monkeypatch.setattr(local, "train_together", train)
    heads.federation.num_rounds = 1
    result = engines.run(heads, tmp_path / "run")
    assert result.dropped == [] and result.history[0].updates == 4
    releases = same(shown(), result.run)
    assert len(releases) == 4 and all(one[-1] for one in releases)
    assert not together._waiting and whole.adapter.shape == result.adapter.shape


def test_who_refuses_is_not_trained_with_the_others(
    heads: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: Groups
) -> None:
    real = ReleaseCounter.check

    def check(self: ReleaseCounter, request: Any, node: str, in_ledger: int) -> None:
        real(self, request, node, in_ledger + (-9 if node == NODES[1] and request.round == 2 else 0))

    monkeypatch.setattr(ReleaseCounter, "check", check)
    result = engines.run(heads, tmp_path / "run")
    assert groups == [(1, NODES), (2, [NODES[0], *NODES[2:]])]
    assert [(lost.node, lost.round) for lost in result.dropped] == [(NODES[1], 2)]
    paid = Counter(node for node, *_ in same(shown(), result.run))
    assert paid == {node: 1 if node == NODES[1] else 2 for node in NODES}


@pytest.mark.parametrize("why", ["large", "another size", "no head", "a centre's round"])
def test_who_is_not_like_the_others_trains_alone(
    heads: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: Groups, why: str
) -> None:
    heads.federation.num_rounds = 1
    expected: Groups = []
    if why == "large":
        monkeypatch.setattr(together, "_SMALL", 100)
    if why == "another size":
        real = together._charge

        def charge(*arguments: Any, **options: Any) -> dict[str, together.Charged]:
            charged = real(*arguments, **options)
            for message, one in charged.items():
                if one.release.shard.node == NODES[2]:
                    plan = dataclasses.replace(one.release.training, declared_size=77)
                    release = dataclasses.replace(one.release, training=plan)
                    charged[message] = dataclasses.replace(one, release=release)
            return charged

        monkeypatch.setattr(together, "_charge", charge)
        expected = [(1, [NODES[0], NODES[1], NODES[3]])]
    if why == "no head":
        heads.adapter = AdapterConfig(name="lora", rank=2, alpha=4.0)
    if why == "a centre's round":
        heads.train.centre, heads.train.local_steps, heads.federation.strategy = True, 1, "fedsgd"
        heads.federation.num_rounds, expected = 2, [(2, NODES)]
    result = engines.run(heads, tmp_path / "run")
    assert groups == expected and result.history[0].updates == 4


def test_what_was_found_ahead_is_answered_without_a_thread(
    heads: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[object] = []
    real = ClientThread.run
    monkeypatch.setattr(ClientThread, "run", lambda self, *rest: calls.append(rest) or real(self, *rest))
    engines.run(heads, tmp_path / "run")
    assert len(calls) == 4  # hello, propose, and each round, of all nodes
    calls.clear()
    monkeypatch.setattr(together, "delays_answer", lambda context: 0.01)  # it may have to be given up
    engines.run(heads, tmp_path / "delayed")
    assert len(calls) == 4 + 4 * len(NODES)
