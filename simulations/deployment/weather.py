#!/usr/bin/env python
r"""What a federation meets in years, on purpose and at once: each trial with the product's own processes.

    python simulations/deployment/weather.py certificate     the server's certificate expires in a run
    python simulations/deployment/weather.py skew            clocks that are an hour wrong (needs `gcc`)
    sudo python simulations/deployment/weather.py read-only  folders that cannot be written any more
    python simulations/deployment/weather.py oversized       a server that sends 300 MiB as a question
    python simulations/deployment/weather.py foreign         a run of another app than fedtune's
    python simulations/deployment/weather.py descriptors     256 descriptors, and 230 half-sent requests
    python simulations/deployment/weather.py rotation        another authority, with a kill -9 at each step

A server, nodes and an operator on the loopback, over TLS, with a tiny model on made-up texts. Each trial
keeps what was said by whom (`said`), how the runs ended, and whether ledgers and audit logs verify.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import datetime
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from processes import Federation, Kept, quiet_folder, record_of, tiny, write

from fedtune.deploy import certificates
from fedtune.federation.client.audit_log import AuditLog
from tests.support.crowd import crowd, half_a_body

PRIVATE = ("privacy.epsilon=8", "privacy.delta=1e-4", "federation.round_timeout=30")


class Trial:
    """A federation, and what is written down of it."""

    def __init__(self, root: Path, nodes: int = 3, **options: Any) -> None:
        self.root = root
        self.federation = Federation(root, tiny(root, nodes, rows=60, test=100), **options)
        self.sites = list(self.federation.setup.sites)
        self.said: dict[str, str] = {}
        self.found: dict[str, Any] = {"said": self.said}
        self._begun = time.monotonic()

    def second(self) -> float:
        """Since the trial began."""
        return round(time.monotonic() - self._begun, 1)

    def shown(self, text: str) -> str:
        """On one line, without this machine's folder."""
        return " ".join(text.replace(str(self.root), "DIR").split())

    def fedtune(self, *words: object, seconds: float = 200.0) -> tuple[int, str]:
        """(status, what it said) of a command that ends."""
        done = subprocess.run(
            [sys.executable, "-m", "fedtune.cli.app", *map(str, words)],
            env=self.federation.environment, cwd=self.root, capture_output=True, text=True, timeout=seconds,
        )  # fmt: skip
        if "Traceback" in done.stdout + done.stderr:
            self.found.setdefault("tracebacks", []).append(" ".join(map(str, words[:2])))
        return done.returncode, self.shown(done.stdout + done.stderr)

    def keep(self, key: str, name: str, pattern: str, seconds: float = 150.0) -> str:
        """Waits until process `name` says a line with `pattern` since it was started; keeps it as `key`."""
        end = time.monotonic() + seconds
        while True:
            began = self.federation.processes[name].began
            log = (self.root / f"{name}.log").read_bytes()[began:]
            lines = log.decode(errors="replace").splitlines()
            if found := [line for line in lines if re.search(pattern, line)]:
                self.said[key] = self.shown(found[-1])
                return self.said[key]
            if time.monotonic() > end:
                self.said[key] = f"(nothing with {pattern!r} in {seconds:.0f} s)"
                return self.said[key]
            time.sleep(0.5)

    def node(self, site: str, *, wait: float | None = None) -> Kept:
        """Starts the node of a site."""
        return self.federation.start(site, "node", "--config", self.root / site / "node.yaml", wait=wait)

    def ended(self, name: str, seconds: float = 600.0) -> int | None:
        """The status of a process that ends; None if it did not."""
        process = self.federation.processes[name].process
        assert process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(seconds)
        return None

    def run(self, name: str) -> dict[str, Any]:
        """What became of a run."""
        folder = self.root / "runs" / name
        status = self.ended(f"submit-{name}")
        result: dict[str, Any] = {"status": status, "ended_at_second": self.second()}
        if (folder / "record.json").exists():
            record = record_of(folder)
            updates = [one["updates"] for one in record["metrics"]["by_round"]]
            result |= {
                "rounds": record["federation"]["rounds"],
                "updates_by_round": updates,
                "epsilon": round(record["privacy"]["epsilon"] or 0, 2),
                "dropped": sorted(
                    {self.shown(one["reason"])[:200] for one in record["federation"]["dropped"]}
                ),
            }
        else:
            result["said"] = self.shown(self.federation.log(f"submit-{name}")[-900:])
        return result

    def finish(self) -> dict[str, Any]:
        """The record, once all processes have ended."""
        self.federation.close()
        books = self.federation.books()
        self.found["all_books_verify"] = all(
            one["ledger_verifies"] and one["audit_log_verifies"] for one in books.values()
        )
        self.found["releases"] = {site: one["releases"] for site, one in books.items()}
        logs = {path.stem: path.read_text(errors="replace") for path in self.root.glob("*.log")}
        self.found.setdefault("tracebacks", []).extend(
            name for name, text in logs.items() if "Traceback" in text
        )
        return self.found


def certificate(trial: Trial) -> None:
    """The server's certificate expires while a run goes on; nobody renews it for a while."""
    federation, out = trial.federation, trial.root / "out"
    federation.start_server()
    federation.start_nodes()
    federation.start_submit("run", *PRIVATE, "federation.num_rounds=100")
    federation.until("submit-run", "round 2/")
    valid = 40.0
    certificates.make_server_certificate(
        out / "authority", out / "server", ["localhost", "127.0.0.1"], valid / 86_400
    )  # type: ignore[arg-type]
    gone = time.monotonic() + valid
    trial.keep("server, when it takes the certificate up", "server", "renewed certificate")
    time.sleep(max(0.0, gone - time.monotonic()) + 3)
    trial.found["expired_at_second"] = trial.second()
    lines = federation.log("submit-run").count("round ")
    status, said = trial.fedtune("status", out / "server")
    trial.said["operator, by fedtune status"] = f"(status {status}) {said}"
    federation.processes[trial.sites[0]].kill()
    trial.node(trial.sites[0])
    trial.keep("a node that is started now", trial.sites[0], "expired")
    trial.keep("a node that had joined, within a minute", trial.sites[1], "expired", 90)
    trial.keep("the submit that goes on", "submit-run", "expired|does not answer", 5)
    trial.found["rounds_told_while_expired"] = federation.log("submit-run").count("round ") - lines
    status, said = trial.fedtune("provision", trial.root / "federation.yaml", "-o", out, "--renew")
    trial.said["operator, by fedtune provision --renew"] = f"(status {status}) {said}"
    trial.found["renewed_at_second"] = trial.second()
    trial.keep("server, when it takes the new one up", "server", r"good for 39\d days")
    trial.keep("the node that was started while it was expired", trial.sites[0], "joined")
    trial.found["joined_again_at_second"] = trial.second()
    trial.found["run"] = trial.run("run")


def skew(trial: Trial) -> None:
    """One site's clock is an hour ahead, another's behind: when they join, and all at once in a run."""
    federation = trial.federation
    ahead, behind, right = trial.sites
    library, clocks = trial.root / "clock.so", {who: trial.root / f"{who}.clock" for who in trial.sites}
    subprocess.run(
        ["gcc", "-O2", "-shared", "-fPIC", "-o", library, Path(__file__).with_name("clock.c"), "-ldl"],
        check=True,
    )
    usual = dict(federation.environment)

    def put(who: str, seconds: int) -> None:
        clocks[who].write_text(f"{seconds}\n")

    def by_clock(file: Path) -> dict[str, str]:
        return {**usual, "LD_PRELOAD": str(library), "CLOCK_OFFSET_FILE": str(file)}

    def node(site: str) -> None:
        federation.environment = by_clock(clocks[site])
        trial.node(site)
        federation.environment = usual

    put(ahead, 3600), put(behind, -3600), put(right, 0)
    federation.start_server()
    for site in trial.sites:
        node(site)
    trial.keep("a node an hour ahead, when it joins", ahead, "clock")
    trial.keep("a node an hour behind, when it joins", behind, "clock|not yet valid")
    trial.found["statuses"] = {site: trial.ended(site, 10) for site in (ahead, behind)}
    federation.until(right, "joined")
    federation.start_submit("one-of-three", *PRIVATE, "federation.num_rounds=2")
    trial.found["run_of_the_site_that_is_right"] = trial.run("one-of-three")
    for site in (ahead, behind):
        put(site, 0)
        if trial.found["statuses"][site] is not None:  # its administrator starts it again
            node(site)
    for site in (ahead, behind):
        federation.until(site, "joined")
    trial.found["joined_when_clocks_were_right_at_second"] = trial.second()
    federation.start_submit("jumps", *PRIVATE, "federation.num_rounds=60")
    federation.until("submit-jumps", "round 2/")
    put(ahead, 3600), put(behind, -3600)
    trial.found["clocks_jumped_at_second"] = trial.second()
    trial.keep("a node whose clock jumped an hour ahead", ahead, "clock", 90)
    trial.keep("a node whose clock jumped an hour back", behind, "clock", 90)
    trial.found["ended_after_the_jump"] = {site: trial.ended(site, 20) for site in (ahead, behind)}
    trial.found["run_with_jumps"] = trial.run("jumps")
    federation.environment = by_clock(clocks[ahead])
    status, said = trial.fedtune("status", federation.server)
    trial.said["operator an hour ahead, by fedtune status"] = f"(status {status}) {said}"
    federation.environment = usual


@contextlib.contextmanager
def not_writable(folder: Path) -> Iterator[None]:
    """`folder`, for whoever opens a file in it from now on: a mount on itself that is read-only."""
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def read_only(trial: Trial) -> None:
    """`state/` of a site, then the server's folder: before they start, and in a run."""
    federation, site = trial.federation, trial.sites[0]
    state = trial.root / site / "state"
    state.mkdir(exist_ok=True)
    with not_writable(federation.server):
        status, said = trial.fedtune("server", federation.server, seconds=60)
        trial.said["a server that is started"] = f"(status {status}) {said}"
    federation.start_server()
    with not_writable(state):
        trial.node(site)
        trial.keep("a node that is started", site, "cannot|read-only|Read-only")
        trial.found["status_of_that_node"] = trial.ended(site, 20)
    federation.root.joinpath(f"{site}.log").rename(federation.root / f"{site}.before.log")
    federation.start_nodes()
    federation.start_submit("node", *PRIVATE, "federation.num_rounds=8")
    federation.until("submit-node", "round 2/")
    before = federation.books()[site]["releases"]
    with not_writable(state):
        trial.keep("a node in a run", site, "cannot be written|read-only|Read-only|cannot")
        federation.until("submit-node", "round 5/")
    trial.found["run_while_a_nodes_state_was_read_only"] = trial.run("node")
    trial.found["releases_of_that_site"] = {"before": before, "after": federation.books()[site]["releases"]}
    federation.start_submit("server", *PRIVATE, "federation.num_rounds=20")
    federation.until("submit-server", "round 2/")
    with not_writable(federation.server):
        trial.keep("a server in a run", "server", "cannot be|read-only|Read-only|readonly", 40)
        status, said = trial.fedtune("status", federation.server)
        trial.said["operator, by fedtune status"] = f"(status {status}) {said}"
        trial.keep("the submit meanwhile", "submit-server", "cannot|does not answer|refused|lost", 20)
    trial.found["run_while_the_servers_folder_was_read_only"] = trial.run("server")


def oversized(trial: Trial) -> None:
    """Questions of 300 MiB, which no node may take: as they are, and one MiB that is named 300 times; then a
    run as usual."""
    federation = trial.federation
    federation.start_server()
    federation.start_nodes()
    before = {site: _memory(federation, site) for site in trial.sites}
    trial.found["megabytes_of_a_node"] = {"before": before}
    for kind in ("oversized", "folded"):
        most: dict[str, float] = {}
        more = (*PRIVATE[:2], "federation.num_rounds=1", "federation.round_timeout=90")
        federation.start_submit(kind, *more, strange=(kind, 300))
        process = federation.processes[f"submit-{kind}"].process
        assert process is not None
        while process.poll() is None:
            for site in trial.sites:
                most[site] = max(most.get(site, 0.0), _memory(federation, site))
            time.sleep(0.2)
        trial.found["megabytes_of_a_node"][f"most, {kind}"] = most
        trial.found[f"{kind}_run"] = trial.run(kind)
    trial.said["a node, in its audit log"] = trial.shown(
        "; ".join(
            str(one["reason"])
            for one in AuditLog(trial.root / trial.sites[0] / "state" / "audit.jsonl").entries()
            if one["event"] == "refused"
        )
    )
    federation.start_submit("after", *PRIVATE, "federation.num_rounds=2")
    trial.found["run_as_usual_after_it"] = trial.run("after")


def foreign(trial: Trial) -> None:
    """A run that comes with another app than fedtune's: it is refused, and no code of it runs."""
    federation = trial.federation
    federation.start_server()
    federation.start_nodes()
    mark = trial.root / "it-ran"
    federation.start_submit("foreign", *PRIVATE, "federation.num_rounds=2", strange=("foreign", mark))
    trial.found["foreign_run"] = trial.run("foreign")
    trial.keep("a node", trial.sites[0], "not fedtune's", 10)
    trial.found["code_of_it_ran"] = mark.exists()
    federation.start_submit("after", *PRIVATE, "federation.num_rounds=2")
    trial.found["run_as_usual_after_it"] = trial.run("after")


def descriptors(trial: Trial) -> None:
    """A server with 256 descriptors while 230 strangers hold half-sent requests, and a run."""
    federation = trial.federation
    federation.start_server()
    server = federation.processes["server"].process
    assert server is not None
    trial.found["descriptors"] = psutil.Process(server.pid).rlimit(psutil.RLIMIT_NOFILE)[0]
    federation.start_nodes()
    before = _memory(federation, "server")
    public = certificates.public_key_of(
        certificates.load_private_key(trial.root / trial.sites[0] / "node.key")
    )
    named = {
        "flwr-public-key": base64.b64encode(public).decode(),
        "flwr-signature": "AAAA",
        "flwr-timestamp": datetime.datetime.now(datetime.UTC).isoformat(),
    }
    port = int(re.findall(r"server: .*:(\d+)", (trial.root / "federation.yaml").read_text())[0])
    asked: list[float] = []
    with crowd(("127.0.0.1", port), idle=100, greeted=65, fat=65, sends=half_a_body(named)):
        begun = time.monotonic()
        federation.start_submit("loaded", *PRIVATE, "federation.num_rounds=3")
        while federation.processes["submit-loaded"].process.poll() is None or len(asked) < 3:  # type: ignore[union-attr]
            at = time.monotonic()
            status, said = trial.fedtune("status", federation.server)
            asked.append(round(time.monotonic() - at, 1))
            trial.said["operator, by fedtune status"] = f"(status {status}) {said}"
            if status:
                trial.found.setdefault("status_failed", []).append(said)
        trial.found["seconds_held"] = round(time.monotonic() - begun, 1)
    trial.found["seconds_of_fedtune_status"] = asked
    trial.found["megabytes_of_the_server"] = {"before": before, "after": _memory(federation, "server")}
    trial.found["run"] = trial.run("loaded")


def rotation(trial: Trial) -> None:
    """announce, switch and retire while runs go on; nodes, server and `provision` are killed between."""
    federation, out, file = trial.federation, trial.root / "out", trial.root / "federation.yaml"

    def rotate(*words: str) -> None:
        status, said = trial.fedtune("provision", file, "-o", out, *words)
        trial.said[f"operator, by provision {' '.join(words)} at second {trial.second()}"] = (
            f"(status {status}) {said}"
        )

    def connected(when: str) -> None:
        end = time.monotonic() + 120
        while True:
            _, said = trial.fedtune("status", federation.server)
            if said.count("online") == 3 or time.monotonic() > end:
                trial.found.setdefault("sites_online", {})[when] = said.count("online")
                return
            time.sleep(8)

    federation.start_server(wait=2.0)
    federation.start_nodes(wait=2.0)
    federation.start_submit("run", *PRIVATE, "federation.num_rounds=200")
    federation.until("submit-run", "round 2/")
    rotate("--rotate", "switch")
    _killed_in_the_middle(trial, file, out)
    rotate("--rotate", "announce")  # again: the key that was made is used, and was told to nobody
    rotate("--rotate", "switch")  # too early: no site has said that it trusts the new one
    federation.processes[trial.sites[0]].kill()
    for site in trial.sites:
        trial.keep(f"{site}, when it learned", site, "trusts the authorities|other authorities vouch", 200)
    _until(trial, lambda: _all_know(out, len(trial.sites)), 200)
    rotate("--rotate", "switch")
    trial.keep("server, when it shows the new certificate", "server", "renewed certificate")
    federation.processes["server"].kill()
    federation.processes[trial.sites[1]].kill()
    connected("after the switch, and kill -9 of server and a node")
    trial.found["run_submitted_before_the_announcement"] = trial.run("run")
    federation.start("submit-again", "submit", federation.server, f"resume={trial.root / 'runs' / 'run'}")
    federation.until("submit-again", "round")
    rotate("--rotate", "retire")
    for site in trial.sites:
        _until(
            trial,
            lambda site=site: (
                (trial.root / site / "state" / "authorities.pem").read_text().count("BEGIN") == 1
            ),
            200,
        )
    connected("after the former authority was retired")
    federation.processes[trial.sites[2]].kill()
    connected("after a node was killed and joined with the new authority alone")
    status, said = trial.fedtune("stop", federation.server, trial.root / "runs" / "run")
    trial.said["operator, by fedtune stop"] = f"(status {status}) {said}"
    trial.found["status_of_the_resumed_run"] = trial.ended("submit-again", 200)
    trial.found["certificates_trusted_by_each_site"] = {
        site: (trial.root / site / "state" / "authorities.pem").read_text().count("BEGIN")
        for site in trial.sites
    }
    trial.found["starts"] = {name: kept.starts for name, kept in federation.processes.items() if kept.wait}


def _killed_in_the_middle(trial: Trial, file: Path, out: Path) -> None:
    """Kills `provision --rotate announce` when it has made the new key."""
    command = [
        sys.executable,
        "-m",
        "fedtune.cli.app",
        "provision",
        str(file),
        "-o",
        str(out),
        "--rotate",
        "announce",
    ]
    process = subprocess.Popen(command, env=trial.federation.environment, stdout=subprocess.DEVNULL)
    key = out / "authority" / "2" / "ca.key"
    while not key.exists() and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    trial.found["provision_killed_with"] = process.wait()
    trial.found["written_when_it_was_killed"] = sorted(
        str(path.relative_to(out)) for path in (out / "authority").rglob("*") if path.is_file()
    )


def _all_know(out: Path, sites: int) -> bool:
    """Whether each site has told the server that it trusts both authorities."""
    known = json.loads((out / "server" / "authorities-known.json").read_text())
    return sum(len(trusted) == 2 for trusted in known.values()) == sites


def _until(trial: Trial, done: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError):
            if done():
                return
        time.sleep(1)
    trial.found.setdefault("waited_in_vain_at_second", []).append(trial.second())


def _memory(federation: Federation, name: str) -> float:
    process = federation.processes[name].process
    assert process is not None
    with contextlib.suppress(psutil.Error):
        return round(psutil.Process(process.pid).memory_info().rss / 1e6)
    return 0.0


TRIALS: dict[str, tuple[Callable[[Trial], None], dict[str, Any]]] = {
    "certificate": (certificate, {"nodes": 2}),
    "skew": (skew, {}),
    "read-only": (read_only, {}),
    "oversized": (oversized, {"nodes": 2}),
    "foreign": (foreign, {"nodes": 2}),
    "descriptors": (
        descriptors,
        {"nodes": 2, "prefix": lambda who: ["prlimit", "--nofile=256:256", "--"] if who == "server" else []},
    ),
    "rotation": (rotation, {}),
}


def main() -> None:
    """Runs one trial and keeps its record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trial", choices=TRIALS)
    parser.add_argument("--folder", type=Path, help="keep what was made here")
    arguments = parser.parse_args()
    load = [round(x, 2) for x in os.getloadavg()]
    trial_of, options = TRIALS[arguments.trial]
    with quiet_folder(arguments.folder) as root:
        trial = Trial(root, **options)
        try:
            trial_of(trial)
        finally:
            trial.federation.close()
        found = trial.finish()
        seconds = trial.second()
    write(
        f"weather_{arguments.trial.replace('-', '_')}",
        {
            "question": " ".join((trial_of.__doc__ or "").split()),
            "command": f"python simulations/deployment/weather.py {arguments.trial}",
            "load_average_before": load,
            "seconds": seconds,
            **found,
        },
    )


if __name__ == "__main__":
    main()
