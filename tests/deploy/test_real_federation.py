"""A real federation on this machine, in processes of its own: provision, one server, three sites, submit.

One federation for all of it, since starting it is what takes the time: it equals the simulation at zero
noise, keeps the same accounts, survives `kill -9` of every part, recovers from a site that is lost in any
phase of the secure aggregation, and a site refuses what it may.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest
from flwr.proto.control_pb2 import StopRunRequest
from flwr.supercore.control import ControlHttpClient

from fedtune import engines
from fedtune.config.loader import load
from fedtune.deploy.client import Server
from fedtune.federation.server import checkpoint
from fedtune.federation.server.checkpoint import load_latest
from tests.support.real_federation import SITES, Federation, adapter, record
from tests.support.tiny_federation import one_thread

PRIVATE = ("privacy.epsilon=8", "privacy.delta=1e-3")


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    one_thread()
    made = Federation(tmp_path_factory.mktemp("federation"))
    try:
        made.start_all()
        yield made
    finally:
        made.close()


def check_books(federation: Federation, run: str, most: int) -> dict[str, int]:
    """Releases charged for a run, by site. Ledgers and logs are whole; nothing left twice, or uncharged."""
    charged = {}
    for site in SITES:
        log, ledger = federation.site_state(site)
        assert log.verify() == [] and ledger.verify()[1] == []
        left = [one for one in log.entries() if one["event"] == "released" and one["run"] == run]
        asked = [(one["attempt"], one["round"]) for one in left]
        assert len(asked) == len(set(asked))
        charged[site] = len(ledger.releases(run=run))
        # What left is charged; what was charged may not have left.
        assert len(left) <= charged[site] <= most
        assert all(one["after"]["releases"] == one["before"]["releases"] + 1 for one in left)
    return charged


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_equals_the_simulation(federation: Federation) -> None:
    more = ["privacy=none", "federation.num_rounds=2"]
    real, simulated = federation.root / "real", federation.root / "simulated"
    status = federation.run(
        "submit", "submit", federation.server, *federation.settings("public", *more), f"hydra.run.dir={real}"
    )
    assert status == 0, federation.log("submit")[-3000:]
    status = federation.run("run", "run", *federation.settings("all", *more), f"hydra.run.dir={simulated}")
    assert status == 0, federation.log("run")[-3000:]
    one, other = record(real), record(simulated)
    # To the last bit: float32 travels as it is, and updates are summed in the order of names, not of arrival.
    np.testing.assert_array_equal(adapter(real), adapter(simulated))
    assert one["privacy"]["per_node"][0]["releases"] == 2
    for name in ("per_node", "epsilon", "steps", "sample_rate", "trust", "unit"):
        mine, theirs = one["privacy"][name], other["privacy"][name]
        if name == "per_node":
            keys = ("node", "epsilon", "delta", "releases")
            mine, theirs = ([{key: node[key] for key in keys} for node in side] for side in (mine, theirs))
        assert mine == theirs, name
    assert one["metrics"]["accuracy"] == other["metrics"]["accuracy"]
    assert one["run"]["engine"] == "deployment"
    for name in ("statement.md", "adapter/adapter_config.json"):
        assert (real / name).is_file()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_can_be_watched(federation: Federation) -> None:
    folder = federation.root / "watched"
    settings = federation.settings("public", "privacy=none", "federation.num_rounds=2")
    assert federation.run("watched", "submit", federation.server, *settings, f"hydra.run.dir={folder}") == 0
    status = json.loads(federation.monitored("server", "/status.json"))
    assert [(row["site"], row["state"]) for row in status["sites"]] == [(site, "online") for site in SITES]
    newest = status["runs"][0]
    assert (newest["state"], newest["by"], newest["last"]["round"]) == ("completed", "operator", 2)
    told = json.loads(federation.monitored("server", f"/run?id={newest['run']}"))
    assert told["statement"] == (folder / "statement.md").read_text()
    by_round = record(folder)["metrics"]["by_round"]
    assert [one["accuracy"] for one in told["rounds"]] == [one["accuracy"] for one in by_round]
    page = federation.monitored("server", "/metrics")
    assert 'fedtune_server_sites{state="online"} 3.0' in page and "fedtune_server_rounds_total" in page
    for site in SITES:
        page = federation.monitored(site, "/metrics")
        assert "fedtune_node_joined 1.0" in page and "fedtune_node_epsilon_left" not in page
        assert 'fedtune_node_answers_total{answer="answered",message="train"}' in page
        assert json.loads(federation.monitored(site, "/healthz")) == {"status": "alive"}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_site_may_be_lost_in_each_phase_of_the_secure_aggregation(federation: Federation) -> None:
    folder = federation.root / "distributed"
    more = [*PRIVATE, "privacy.trust=distributed", "privacy.max_dropouts=1", "federation.num_rounds=5"]
    # One site is lost in another phase of each round; in the fifth two are, and that is one too many.
    with federation.unlucky(clinic_2="1:advertise 2:share 3:mask 4:unmask 5:mask", clinic_3="5:mask"):
        settings = [*federation.settings("public", *more), f"hydra.run.dir={folder}"]
        status = federation.run("distributed", "submit", federation.server, *settings)
    assert status == 0, federation.log("distributed")[-3000:]
    done = record(folder)
    # In the fourth its vector had come, and is in the sum; the fifth is discarded.
    updates = [(one["round"], one["updates"]) for one in done["metrics"]["by_round"]]
    assert updates == [(1, 2), (2, 2), (3, 2), (4, 3), (5, 0)]
    # The worker's death is told by the site, in the phase in which it happened.
    reasons = [one["reason"] for one in done["federation"]["dropped"] if one["node"] == "clinic-2"]
    for phase, reason in zip(("advertise", "share", "mask"), reasons, strict=False):
        assert f"(in '{phase}')" in reason and "its worker ended" in reason and "signal" not in reason
    assert "by signal 9" in federation.log("clinic-2")  # how it ended is the site's own business
    # What had been reserved stays charged, and nothing else is: its first two rounds touched no data.
    # (On a machine so busy that the server gives the run up, it goes on and asks a round again.)
    charged, again = check_books(federation, done["run"]["id"], most=5), done["run"]["attempt"] - 1
    for site, count in {"clinic-1": 5, "clinic-2": 3, "clinic-3": 5}.items():
        assert count <= charged[site] <= count + again
    # The server counts what it cannot know as released.
    counted = {one["node"]: one["releases"] for one in done["privacy"]["per_node"]}
    assert all(counted[site] >= charged[site] for site in SITES)
    assert 0 < done["privacy"]["epsilon"] <= 8


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_it_survives_kill_9_of_server_and_worker(federation: Federation) -> None:
    folder = federation.root / "killed"
    more = [*PRIVATE, "federation.num_rounds=5", f"hydra.run.dir={folder}"]
    federation.start("killed", "submit", federation.server, *federation.settings("public", *more))
    federation.until("killed", "round 1/5")
    federation.kill("server")
    os.kill(federation.worker_of("clinic-2"), signal.SIGKILL)
    federation.start_server()
    assert federation.processes["killed"].wait(400) == 0, federation.log("killed")[-3000:]
    finished = record(folder)
    assert finished["federation"]["rounds"] == 5
    assert 0 < finished["privacy"]["epsilon"] <= 8
    # Each round had an update; it goes on with who is back by then (federation.min_updates=1).
    assert sum(check_books(federation, finished["run"]["id"], most=5).values()) >= 5


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_killed_submit_goes_on_from_the_last_complete_round(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The submitting process is the ServerApp, so this is `kill -9` of either, and of the server with it."""
    folder = federation.root / "resumed"
    more = [
        "privacy=none", "federation.num_rounds=5", "federation.strategy=fedadam",
        "federation.server_learning_rate=0.01",
    ]  # fmt: skip
    settings = federation.settings("public", *more)
    federation.start("dies", "submit", federation.server, *settings, f"hydra.run.dir={folder}")
    federation.until("dies", "round 1/5")
    federation.kill("dies")
    federation.kill("server")
    saved, _ = load_latest(folder)
    assert 1 <= saved.round < 5
    before = check_books(federation, saved.run, most=5)
    federation.start_server()  # for which the run of the killed process is not over yet
    status = federation.run("goes-on", "submit", federation.server, f"resume={folder}")
    assert status == 0, federation.log("goes-on")[-3000:]

    done = record(folder)
    assert (done["run"]["id"], done["run"]["attempt"]) == (saved.run, 2)
    assert [one["round"] for one in done["metrics"]["by_round"]][:4] == [1, 2, 3, 4]
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert (folder / "statement.md").is_file()
    # A round that was lost is charged again when it is asked again, and never beyond the number agreed to.
    assert all(saved.round <= count <= saved.round + 1 for count in before.values())
    counted = {one["node"]: one["releases"] for one in done["privacy"]["per_node"]}
    for site, charged in check_books(federation, saved.run, most=5).items():
        assert counted[site] >= charged >= before[site]

    # A simulation that nobody interrupts computes the same, to the last bit: adapter and the optimizer's
    # moments after round 4 (a site that lost a round may have no fifth release left).
    monkeypatch.setenv("FEDTUNE_HOME", str(federation.root / "other-home"))
    simulated = federation.root / "uninterrupted"
    engines.run(load(federation.settings("all", *more)), simulated)
    mine, theirs = (checkpoint._read(run / "checkpoint" / "round-000004.ckpt") for run in (folder, simulated))
    np.testing.assert_array_equal(mine.adapter, theirs.adapter)
    assert set(mine.optimizer) == set(theirs.optimizer) == {"m", "v"}
    for name, values in theirs.optimizer.items():
        np.testing.assert_array_equal(mine.optimizer[name], values)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_submit_goes_on_when_the_server_has_given_its_run_up(federation: Federation) -> None:
    """As a server does that was away for more than a minute: the submit goes on in another run of its."""
    folder = federation.root / "given-up"
    note = folder / "checkpoint" / "server-run"
    more = [*PRIVATE, "federation.num_rounds=3", f"hydra.run.dir={folder}"]
    federation.start("given-up", "submit", federation.server, *federation.settings("public", *more))
    federation.until("given-up", "round 1/3")
    number = note.read_text()
    with Server.of(federation.server).client(ControlHttpClient) as control:
        control.StopRun(StopRunRequest(run_id=int(number)))
    assert federation.processes["given-up"].wait(400) == 0, federation.log("given-up")[-3000:]
    done = record(folder)
    assert done["run"]["attempt"] == 2
    assert 0 < done["privacy"]["epsilon"] <= 8
    assert note.read_text() != number
    check_books(federation, done["run"]["id"], most=3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_chaos_of_a_minute(federation: Federation) -> None:
    """A node is killed and comes back, a worker dies over its update, a site sends garbage: the run ends."""
    folder = federation.root / "chaos"
    more = [*PRIVATE, "federation.num_rounds=3", f"hydra.run.dir={folder}"]
    with federation.unlucky(clinic_2="2:train", clinic_3="1:garbage 3:garbage"):
        federation.start("chaos", "submit", federation.server, *federation.settings("public", *more))
        federation.until("chaos", "round 1/3")
        federation.kill("clinic-1")
        federation.start_node("clinic-1")
        assert federation.processes["chaos"].wait(400) == 0, federation.log("chaos")[-3000:]
    done = record(folder)
    assert len(done["metrics"]["by_round"]) == 3
    assert 0 < done["privacy"]["epsilon"] <= 8
    reasons = {(one["node"], one["round"]): one["reason"] for one in done["federation"]["dropped"]}
    assert all("NaN or infinite" in reasons["clinic-3", round] for round in (1, 3))
    assert "its worker ended" in reasons["clinic-2", 2]  # how, its own log says
    charged = check_books(federation, done["run"]["id"], most=3)
    # What was lost and what was garbage is paid for. (A busy machine may keep a site out of another round.)
    assert charged["clinic-2"] >= 2 and charged["clinic-3"] >= 2


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_detached_run_is_followed_and_stopped_with_a_result(federation: Federation) -> None:
    folder = federation.root / "detached"
    more = [*PRIVATE, "federation.num_rounds=5", "seed=2", f"hydra.run.dir={folder}"]
    settings = federation.settings("public", *more)
    assert federation.run("detach", "submit", federation.server, *settings, "--detach") == 0
    assert f"fedtune follow {folder}" in federation.log("detach")
    federation.start("follow", "follow", folder)
    federation.until("follow", "round 1/5")
    worker = federation.worker_of("clinic-2")  # so that the run does not end before it is stopped
    os.kill(worker, signal.SIGSTOP)
    assert federation.run("stop", "stop", federation.server, folder) == 0
    os.kill(worker, signal.SIGCONT)
    assert federation.processes["follow"].wait(300) == 0, federation.log("follow")[-3000:]
    done = record(folder)
    assert 1 <= done["federation"]["rounds"] < 5
    assert "Stopped after this round by operator" in done["federation"]["ended_early"]
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    charged = check_books(federation, done["run"]["id"], most=4)
    assert max(charged.values()) == len(done["metrics"]["by_round"])  # nothing was charged for nothing
    federation.run("trail", "server", federation.server, "--trail")
    assert "run stopped" in federation.log("trail") and "the chain is whole" in federation.log("trail")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_node_that_is_told_to_leave_loses_nothing_that_it_was_charged(federation: Federation) -> None:
    folder = federation.root / "leaves"
    more = [*PRIVATE, "federation.num_rounds=3", "seed=3", f"hydra.run.dir={folder}"]
    federation.start("leaves", "submit", federation.server, *federation.settings("public", *more))
    federation.until("leaves", "round 1/3")
    node = federation.processes["clinic-2"]
    os.kill(federation.worker_of("clinic-2"), signal.SIGTERM)  # as a service manager does, to all of a unit
    node.terminate()
    assert node.wait(130) == 0
    assert "left the federation" in federation.log("clinic-2")
    federation.start_node("clinic-2")
    assert federation.processes["leaves"].wait(400) == 0, federation.log("leaves")[-3000:]
    run = record(folder)["run"]["id"]
    charged = check_books(federation, run, most=3)
    log, _ = federation.site_state("clinic-2")
    left = [one for one in log.entries() if one["event"] == "released" and one["run"] == run]
    assert len(left) == charged["clinic-2"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_site_that_refuses_is_named_and_the_run_is_partial(federation: Federation) -> None:
    folder = federation.root / "partial"
    more = [*PRIVATE, "federation.num_rounds=6", "seed=4", f"hydra.run.dir={folder}"]
    status = federation.run("partial", "submit", federation.server, *federation.settings("public", *more))
    assert status == 3, federation.log("partial")[-3000:]
    assert "Partial (exit status 3): clinic-3 took no part." in federation.log("partial")
    made = record(folder)
    (absent,) = made["federation"]["left_out"]
    assert absent["node"] == "clinic-3" and "6 rounds are more than the permitted 5" in absent["reason"]
    charged = check_books(federation, made["run"]["id"], most=6)
    assert charged == {"clinic-1": 6, "clinic-2": 6, "clinic-3": 0}
    statement = (folder / "statement.md").read_text()
    assert any("clinic-3" in line and "took no part" in line for line in statement.splitlines())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_that_no_site_permits_fails_with_the_reason(federation: Federation) -> None:
    more = [*PRIVATE, "federation.num_rounds=7", "seed=1"]
    before = [len(federation.site_state(site)[1].releases()) for site in SITES]
    status = federation.run("refused", "submit", federation.server, *federation.settings("public", *more))
    assert status == 1
    assert "7 rounds are more than the permitted 6" in " ".join(federation.log("refused").split())
    for site, count in zip(SITES, before, strict=True):
        log, ledger = federation.site_state(site)
        assert len(ledger.releases()) == count
        assert log.entries()[-1]["event"] == "refused" and "7 rounds" in log.entries()[-1]["reason"]
