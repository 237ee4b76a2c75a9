"""A real federation on this machine, in processes of its own: provision, one server, three sites, submit.

One story, told once because each part needs the one before: it equals the simulation at zero noise, keeps the
same accounts, survives `kill -9` of the server and of a site's worker, and a site refuses what it may.
"""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fedtune.engines.deployment.provision import enrol, provision
from fedtune.engines.deployment.site import make_key, read_site
from fedtune.federation.audit_log import AuditLog
from fedtune.privacy.ledger import PrivacyLedger
from tests.tiny_federation import BAD, GOOD, OTHER, make_model, one_thread

SITES = ("clinic-1", "clinic-2", "clinic-3")
REPOSITORY = Path(__file__).parents[2]


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, ["text", "label", "site"])
        writer.writeheader()
        writer.writerows(rows)


class Federation:
    """Folders and processes of one federation."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {
            **os.environ, "FEDTUNE_HOME": str(root / "home"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(REPOSITORY),
        }  # fmt: skip
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.model = make_model(root / "model")
        chance = random.Random(3)
        rows = []
        for i in range(126):
            label = ("negative", "positive")[chance.random() < 0.5]
            words = [*chance.choices(OTHER, k=4), chance.choice(GOOD if label == "positive" else BAD)]
            rows.append({"text": " ".join(words), "label": label, "site": SITES[i % 3]})
        train, test = rows[:96], rows[96:]
        write(root / "all" / "train.csv", train)
        write(root / "all" / "test.csv", test)
        write(root / "public" / "test.csv", test)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        file = root / "federation.yaml"
        file.write_text(
            yaml.safe_dump({"name": "trial", "server": f"127.0.0.1:{port}", "sites": list(SITES)})
        )
        provision(file, root / "out")
        self.server = root / "out" / "server"
        for site in SITES:
            mine = [row for row in train if row["site"] == site]
            write(root / "data" / site / "train.csv", mine)
            with zipfile.ZipFile(root / "out" / "sites" / f"{site}.zip") as archive:
                archive.extractall(root)
            path = root / site / "node.yaml"
            node = yaml.safe_load(path.read_text())
            node["data"] |= {"name": "made-up", "path": str(root / "data" / site), "declared_size": len(mine)}
            # Public, so that the run without noise is permitted and the budget refuses nothing.
            node["data"]["public"] = True
            node["permit"] |= {"trust": ["local", "none"], "models": [str(self.model)], "max_rounds": 5}
            node["limits"]["threads"] = 1
            path.write_text(yaml.safe_dump(node))
            enrol(self.server, make_key(read_site(path))[0])

    def start(self, name: str, *arguments: object) -> None:
        with (self.root / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "fedtune.cli", *map(str, arguments)],
                env=self.environment, cwd=self.root, stdout=log, stderr=log,
            )  # fmt: skip

    def log(self, name: str) -> str:
        path = self.root / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def until(self, name: str, words: str, seconds: float = 240.0) -> None:
        end = time.monotonic() + seconds
        while words not in self.log(name):
            assert time.monotonic() < end and self.processes[name].poll() is None, self.log(name)[-2000:]
            time.sleep(0.3)

    def start_server(self) -> None:
        self.start("server", "server", self.server)

    def settings(self, data: str, *more: str) -> list[str]:
        return [
            "data=files", "data.name=made-up", "data.labels=[negative,positive]", "data.site=site",
            "data.max_length=16", f"data.path={self.root / data}", "data.test_split=test",
            f"model.name={self.model}", "model.quantization=none", "adapter=lora", "adapter.rank=2",
            "train.sample_rate=0.3", "train.local_steps=2", "train.precision=fp32", "device=cpu",
            "federation.round_timeout=150", *more,
        ]  # fmt: skip

    def run(self, name: str, *arguments: object) -> int:
        self.start(name, *arguments)
        return self.processes[name].wait(500)

    def worker_of(self, site: str) -> int:
        parent = self.processes[site].pid
        (child,) = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        return int(child)

    def site_state(self, site: str) -> tuple[AuditLog, PrivacyLedger]:
        state = self.root / site / "state"
        return AuditLog(state / "audit.jsonl"), PrivacyLedger.open(state / "ledger.sqlite")

    def close(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        for process in self.processes.values():
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    one_thread()
    made = Federation(tmp_path_factory.mktemp("federation"))
    try:
        made.start_server()
        made.until("server", "sites enrolled")
        for site in SITES:
            made.start(site, "node", "--config", made.root / site / "node.yaml")
        for site in SITES:
            made.until(site, "joined")
        yield made
    finally:
        made.close()


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "record.json").read_text())
    return found


def adapter(folder: Path) -> np.ndarray:
    from safetensors.numpy import load_file

    arrays = load_file(folder / "adapter" / "adapter_model.safetensors")
    return np.concatenate([arrays[name].ravel() for name in sorted(arrays)])


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
    # The last digit of a float32 sum depends on the batch shapes in which the frozen layers were computed.
    np.testing.assert_allclose(adapter(real), adapter(simulated), atol=1e-6, rtol=0)
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
def test_it_survives_kill_9_of_server_and_worker(federation: Federation) -> None:
    folder = federation.root / "killed"
    more = ["privacy.epsilon=8", "privacy.delta=1e-3", "federation.num_rounds=5", f"hydra.run.dir={folder}"]
    federation.start("killed", "submit", federation.server, *federation.settings("public", *more))
    federation.until("killed", "round 1/5", 240)
    federation.processes["server"].send_signal(signal.SIGKILL)
    federation.processes["server"].wait()
    os.kill(federation.worker_of("clinic-2"), signal.SIGKILL)
    federation.start_server()
    assert federation.processes["killed"].wait(400) == 0, federation.log("killed")[-3000:]
    finished = record(folder)
    assert finished["federation"]["rounds"] == 5
    assert 0 < finished["privacy"]["epsilon"] <= 8
    left = 0
    for site in SITES:
        log, ledger = federation.site_state(site)
        assert log.verify() == [] and ledger.verify()[1] == []
        released = [
            one for one in log.entries() if one["event"] == "released" and one["asked"]["trust"] == "local"
        ]
        # What left is charged; what was charged may not have left.
        assert len(ledger.releases(run=released[0]["run"])) >= len(released)
        left += len(released)
        assert all(one["after"]["releases"] == one["before"]["releases"] + 1 for one in released)
    # Each round had an update; it goes on with who is back by then (federation.min_updates=1).
    assert left >= 5


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_that_no_site_permits_fails_with_the_reason(federation: Federation) -> None:
    more = ["privacy.epsilon=8", "privacy.delta=1e-3", "federation.num_rounds=6", "seed=1"]
    before = [len(federation.site_state(site)[1].releases()) for site in SITES]
    status = federation.run("refused", "submit", federation.server, *federation.settings("public", *more))
    assert status == 1
    assert "6 rounds are more than the permitted 5" in " ".join(federation.log("refused").split())
    for site, count in zip(SITES, before, strict=True):
        log, ledger = federation.site_state(site)
        assert len(ledger.releases()) == count
        assert log.entries()[-1]["event"] == "refused" and "6 rounds" in log.entries()[-1]["reason"]
