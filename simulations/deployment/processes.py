"""Real federations for the studies of this folder: folders, processes, and what they cost, on one machine.

Everything that runs is the product: `fedtune server`, `fedtune node`, `fedtune submit`, each a process of
its own. `Setup` says which data and model; `Federation` provisions, starts, restarts as systemd would, and
reads the ledgers and audit logs. Nothing here is used by fedtune itself.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
if str(REPOSITORY) not in sys.path:  # a checkout that is not installed
    sys.path.insert(0, str(REPOSITORY))

from fedtune.deploy.admission import enrol  # noqa: E402
from fedtune.deploy.provision import provision  # noqa: E402
from fedtune.deploy.site import make_key, read_site  # noqa: E402
from fedtune.federation.client.audit_log import AuditLog  # noqa: E402
from fedtune.privacy.ledger.ledger import PrivacyLedger  # noqa: E402
from fedtune.runs.environment import hardware  # noqa: E402

RECORDS = HERE / "records"
Row = dict[str, str]


@dataclass(frozen=True)
class Setup:
    """Data and model of a federation: rows for each site, public test rows, and overrides for `submit`."""

    name: str
    model: str
    sites: dict[str, list[Row]]
    test: list[Row]
    settings: tuple[str, ...]


def tiny(root: Path, nodes: int, *, rows: int = 200, test: int = 2000, noise: float = 0.15) -> Setup:
    """A random 2-layer BERT of width 32; one word of a text decides its label, `noise` of them wrong."""
    from tests.support.tiny_federation import BAD, GOOD, OTHER, make_model

    chance = random.Random(3)

    def row() -> Row:
        good = chance.random() < 0.5
        words = [*chance.choices(OTHER, k=5), chance.choice(GOOD if good else BAD)]
        chance.shuffle(words)
        label = good != (chance.random() < noise)
        return {"text": " ".join(words), "label": "positive" if label else "negative"}

    model = str(make_model(root / "model"))
    sites = {f"site-{i + 1:02d}": [row() for _ in range(rows)] for i in range(nodes)}
    settings = ("data.max_length=16", "model.quantization=none", "adapter=lora", "adapter.rank=2")
    return Setup("tiny", model, sites, [row() for _ in range(test)], (*settings, "train.learning_rate=0.02"))


def default(nodes: int) -> Setup:
    """The default job's encoder and adapter (MiniLM, head), and `opinions` dealt out evenly to the sites."""
    from fedtune.data.sources.opinions import load_opinions

    corpus = load_opinions()
    names = corpus.label_names
    assert corpus.units is not None
    groups: dict[str, list[Row]] = {}
    for text, label, unit in zip(corpus.texts, corpus.labels, corpus.units, strict=True):
        groups.setdefault(str(unit), []).append({"text": str(text), "label": names[int(label)]})
    units = sorted(groups)
    random.Random(0).shuffle(units)
    held = units[: round(0.15 * len(units))]
    rest = units[len(held) :]
    sites = {
        f"site-{i + 1:02d}": [row for unit in rest[i::nodes] for row in groups[unit]] for i in range(nodes)
    }
    return Setup("default", "embedded:minilm", sites, [row for unit in held for row in groups[unit]], ())


@dataclass
class Kept:
    """A process that is started again when it dies, as systemd would, until it is told to end."""

    command: list[str]
    log: Path
    environment: dict[str, str]
    wait: float | None = None  # seconds before it is started again; None: it is not
    starts: int = 0
    began: int = 0  # where in its log this start's lines begin
    process: subprocess.Popen[bytes] | None = None
    ending: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None

    def start(self) -> None:
        """Starts it, and whoever looks after it."""
        self._spawn()
        if self.wait is not None:
            self.thread = threading.Thread(target=self._look_after, daemon=True)
            self.thread.start()

    def _spawn(self) -> None:
        self.began = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, cwd=self.log.parent, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self.starts += 1

    def _look_after(self) -> None:
        assert self.process is not None and self.wait is not None
        while True:
            self.process.wait()
            if self.ending.wait(self.wait):
                return
            self._spawn()

    def kill(self) -> None:
        """SIGKILL to it and to what it started (they are one session)."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> None:
        """SIGTERM, then SIGKILL, for good."""
        self.ending.set()
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        if self.process is not None:
            self.kill()
            self.process.wait()


class Federation:
    """Folders and processes of one federation below `root`."""

    def __init__(
        self,
        root: Path,
        setup: Setup,
        *,
        host: str = "127.0.0.1",
        prefix: Callable[[str], list[str]] = lambda who: [],
        environment: dict[str, str] | None = None,
        public: bool = False,
        epsilon: float = 100.0,
        max_rounds: int = 200,
        idle_seconds: float = 900.0,
    ) -> None:
        self.root, self.setup, self._prefix = root, setup, prefix
        root.mkdir(parents=True, exist_ok=True)
        caches = Path(os.environ.get("FEDTUNE_HOME", root / "home")) / "cache"
        (root / "home" / "state").mkdir(parents=True, exist_ok=True)
        if caches.is_dir() and not (root / "home" / "cache").exists():
            (root / "home" / "cache").symlink_to(caches)
        self.environment = {
            **os.environ, "FEDTUNE_HOME": str(root / "home"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": str(REPOSITORY), **(environment or {}),
        }  # fmt: skip
        self.processes: dict[str, Kept] = {}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        file = root / "federation.yaml"
        sites = list(setup.sites)
        file.write_text(yaml.safe_dump({"name": "trial", "server": f"{host}:{port}", "sites": sites}))
        provision(file, root / "out")
        self.server = root / "out" / "server"
        self._write(root / "public" / "test.csv", setup.test)
        for site, rows in setup.sites.items():
            self._write(root / "data" / site / "train.csv", rows)
            with zipfile.ZipFile(root / "out" / "sites" / f"{site}.zip") as archive:
                archive.extractall(root)
            path = root / site / "node.yaml"
            node = yaml.safe_load(path.read_text())
            node["data"] |= {
                "name": "trial", "path": str(root / "data" / site), "declared_size": len(rows),
                "labels": ["negative", "positive"], "public": public,
            }  # fmt: skip
            node["budget"] |= {"epsilon": epsilon, "delta": 1e-3}
            node["permit"] |= {"models": [setup.model], "max_rounds": max_rounds}
            if public:
                node["permit"]["trust"] = ["local", "none"]
            node["limits"] |= {"threads": 1, "idle_seconds": idle_seconds}
            path.write_text(yaml.safe_dump(node))
            enrol(self.server, make_key(read_site(path))[0])

    @staticmethod
    def _write(path: Path, rows: list[Row]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, ["text", "label"])
            writer.writeheader()
            writer.writerows(rows)

    def start(self, name: str, *arguments: object, wait: float | None = None, script: str = "") -> Kept:
        """Starts `fedtune ARGUMENTS` (or a script of this folder with them) as process `name`."""
        program = [str(HERE / script)] if script else ["-m", "fedtune.cli.app"]
        command = [*self._prefix(name), sys.executable, *program, *map(str, arguments)]
        kept = Kept(command, self.root / f"{name}.log", self.environment, wait)
        self.processes[name] = kept
        kept.start()
        return kept

    def start_server(self, wait: float | None = None) -> None:
        """Starts the server and returns when it serves."""
        self.start("server", "server", self.server, wait=wait)
        self.until("server", "sites enrolled")

    def start_nodes(self, wait: float | None = None, strange: dict[str, Sequence[str]] | None = None) -> None:
        """Starts every site's node and returns when all have joined; `strange` names what some do wrongly."""
        strange = strange or {}
        for site in self.setup.sites:
            arguments = ("node", "--config", self.root / site / "node.yaml")
            if site in strange:
                self.start(site, *strange[site], *arguments, wait=wait, script="strange_node.py")
            else:
                self.start(site, *arguments, wait=wait)
        for site in self.setup.sites:
            self.until(site, "joined")

    def log(self, name: str) -> str:
        """What process `name` has printed."""
        path = self.root / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def until(self, name: str, words: str, seconds: float = 900.0) -> None:
        """Waits until process `name` has printed `words`."""
        end = time.monotonic() + seconds
        while words not in self.log(name):
            process = self.processes[name].process
            gone = process is not None and process.poll() is not None and self.processes[name].wait is None
            if time.monotonic() > end or gone:
                raise SystemExit(f"{name} did not say {words!r}:\n{self.log(name)[-3000:]}")
            time.sleep(0.2)

    def start_submit(self, name: str, *overrides: str, strange: Sequence[object] = ()) -> Kept:
        """Starts `fedtune submit`, whose run folder is `runs/NAME`, and returns at once.

        `strange`: what `strange_submit.py` makes of it.
        """
        settings = [
            "data=files", "data.name=trial", "data.labels=[negative,positive]",
            "data.test_split=test", "data.test_public=true",
            f"data.path={self.root / 'public'}", f"model.name={self.setup.model}",
            "train.precision=fp32", "device=cpu",
            *self.setup.settings, *overrides, f"hydra.run.dir={self.root / 'runs' / name}",
        ]  # fmt: skip
        script = "strange_submit.py" if strange else ""
        return self.start(f"submit-{name}", *strange, "submit", self.server, *settings, script=script)

    def submit(self, name: str, *overrides: str, seconds: float = 3000.0) -> tuple[Path, float]:
        """Runs `fedtune submit` to its end: (run folder, seconds). Exits if the run failed."""
        started = time.monotonic()
        kept = self.start_submit(name, *overrides)
        assert kept.process is not None
        status = kept.process.wait(seconds)
        if status != 0:
            raise SystemExit(f"submit ended with status {status}:\n{self.log(f'submit-{name}')[-4000:]}")
        return self.root / "runs" / name, time.monotonic() - started

    def books(self, run: str | None = None) -> dict[str, dict[str, Any]]:
        """For each site: does its ledger verify, its audit log, and how many releases does it hold."""
        found = {}
        for site in self.setup.sites:
            state = self.root / site / "state"
            ledger = PrivacyLedger.open(state / "ledger.sqlite")
            log = AuditLog(state / "audit.jsonl")
            entries = log.entries()
            rows, problems = ledger.verify()
            found[site] = {
                "ledger_rows": rows,
                "ledger_verifies": problems == [],
                "audit_log_verifies": log.verify() == [],
                "releases": len(ledger.releases(run=run) if run else ledger.releases()),
                "released": sum(one["event"] == "released" for one in entries),
                "bytes_out": sum(one.get("bytes_out", 0) for one in entries),
            }
        return found

    def close(self) -> None:
        """Ends every process."""
        for name in sorted(self.processes, key=lambda name: name == "server"):
            self.processes[name].end()


@contextlib.contextmanager
def quiet_folder(keep: Path | None = None) -> Any:
    """A folder of this study's own, removed afterwards unless `keep` names it."""
    import tempfile

    folder = keep or Path(tempfile.mkdtemp(prefix="fedtune-study-"))
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):  # what an earlier one measured would be read as this one's
        raise SystemExit(f"{folder} is not empty: name another folder, or remove it.")
    try:
        yield folder
    finally:
        if keep is None:
            shutil.rmtree(folder, ignore_errors=True)


def record_of(folder: Path) -> dict[str, Any]:
    """A run's record.json."""
    found: dict[str, Any] = json.loads((folder / "record.json").read_text())
    return found


def write(name: str, result: dict[str, Any], records: Path = RECORDS) -> None:
    """Keeps one study's record, with the machine and its load, and prints it."""
    import flwr
    import torch

    machine = {
        "processor": hardware()["processor"],
        "cores": os.cpu_count(),
        "load_average_after": [round(x, 2) for x in os.getloadavg()],
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "flwr": getattr(flwr, "__version__", "?"),
    }
    record = {"study": name, "measured": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **result}
    record["machine"] = machine
    records.mkdir(parents=True, exist_ok=True)
    (records / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2), flush=True)
