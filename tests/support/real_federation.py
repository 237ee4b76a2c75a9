"""Folders and processes of a real federation on this machine, for the tests that need one."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import yaml

from fedtune.deploy.admission import enrol
from fedtune.deploy.client import status
from fedtune.deploy.provision import provision
from fedtune.deploy.site import make_key, read_site
from fedtune.errors import FedtuneError
from fedtune.federation.client.audit_log import AuditLog
from fedtune.privacy.ledger.ledger import PrivacyLedger
from tests.support.ports import free_port
from tests.support.tiny_federation import BAD, GOOD, OTHER, make_model

SITES = ("clinic-1", "clinic-2", "clinic-3")
REPOSITORY = Path(__file__).parents[2]
NO_ENERGY = Path(__file__).parent / "no_energy"
UNLUCKY = Path(__file__).parent / "unlucky"  # what may happen to a worker, see there


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
            "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": f"{NO_ENERGY}:{REPOSITORY}",
        }  # fmt: skip
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.began: dict[str, int] = {}  # where in its log a process that was started again began
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
        self.port = port = free_port()
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
            node["data"] |= {"labels": ["negative", "positive"], "public": True}
            node["permit"] |= {"trust": ["local", "distributed", "none"], "models": [str(self.model)]}
            node["permit"]["max_rounds"] = 5 if site == SITES[-1] else 6
            node["limits"]["threads"] = 1
            path.write_text(yaml.safe_dump(node))
            enrol(self.server, make_key(read_site(path))[0])

    def start(self, name: str, *arguments: object, **environment: str) -> None:
        self.began[name] = len(self.log(name))
        with (self.root / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "fedtune.cli.app", *map(str, arguments)],
                env={**self.environment, **environment}, cwd=self.root, stdout=log, stderr=log,
            )  # fmt: skip

    def log(self, name: str) -> str:
        path = self.root / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def until(self, name: str, words: str, seconds: float = 600.0) -> None:
        end = time.monotonic() + seconds
        while words not in self.log(name)[self.began[name] :]:
            assert time.monotonic() < end and self.processes[name].poll() is None, self.log(name)[-2000:]
            time.sleep(0.3)

    def start_server(self) -> None:
        """Returns when it answers, and not only at its port."""
        self.start("server", "server", self.server, "--monitor", "0")
        end = time.monotonic() + 240.0
        while True:
            assert time.monotonic() < end and self.processes["server"].poll() is None, self.log("server")
            with contextlib.suppress(FedtuneError):
                status(self.server)
                return
            time.sleep(0.3)

    def start_node(self, site: str, code: Path = REPOSITORY) -> None:
        """`code`: the folder with the fedtune that it runs."""
        folder = self.root / site
        luck = {"PYTHONPATH": f"{UNLUCKY}:{code}", "FEDTUNE_TEST_UNLUCKY": str(folder / "unlucky")}
        self.start(site, "node", "--config", folder / "node.yaml", "--monitor", "0", **luck)

    @contextlib.contextmanager
    def unlucky(self, **sites: str) -> Iterator[None]:
        """What happens to the workers of sites (`clinic_2="1:advertise 3:mask"`) until the block ends."""
        files = {self.root / site.replace("_", "-") / "unlucky": words for site, words in sites.items()}
        for file, words in files.items():
            file.write_text(words)
        try:
            yield
        finally:
            for file in files:
                file.unlink()

    def start_all(self) -> None:
        self.start_server()
        for site in SITES:
            self.start_node(site)
        for site in SITES:
            self.until(site, "joined")

    def settings(self, data: str, *more: str) -> list[str]:
        return [
            "data=files", "data.name=made-up", "data.labels=[negative,positive]", "data.site=site",
            "data.max_length=16", f"data.path={self.root / data}", "data.test_split=test",
            "data.test_public=true",
            f"model.name={self.model}", "model.quantization=none", "adapter=lora", "adapter.rank=2",
            "train.sample_rate=0.3", "train.local_steps=2", "train.precision=fp32", "device=cpu",
            "federation.round_timeout=150", *more,
        ]  # fmt: skip

    def monitored(self, name: str, path: str) -> str:
        """What a server or a node says at its administrator's port."""
        (address,) = re.findall(r"(http://127\.0\.0\.1:\d+)/", self.log(name)[self.began[name] :])[:1]
        return httpx.get(f"{address}{path}", timeout=30).raise_for_status().text

    def run(self, name: str, *arguments: object) -> int:
        self.start(name, *arguments)
        return self.processes[name].wait(500)

    def kill(self, name: str) -> None:
        self.processes[name].send_signal(signal.SIGKILL)
        self.processes[name].wait()

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


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "record.json").read_text())
    return found


def adapter(folder: Path) -> np.ndarray:
    from safetensors.numpy import load_file

    arrays = load_file(folder / "adapter" / "adapter_model.safetensors")
    return np.concatenate([arrays[name].ravel() for name in sorted(arrays)])
