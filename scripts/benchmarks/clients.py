"""Rounds of many small clients: `clients` beside Flower's simulation and pfl, `scale` by their number.

Every measurement is a process of its own, all programs in turn, on the same made-up texts and the same kept
outputs: 100 clients take five steps of the head each in every round. fedtune's ledger is durable, and what it
takes (the books) is measured and named apart; no other program here has one. Flower runs fedtune's own apps
on Ray (`engine=ray`). pfl is installed once, for this alone, into the cache folder.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedtune.config.files import cache_dir
from scripts.benchmarks.common import ratios_of, write
from scripts.benchmarks.small_clients import STEPS

# Without their dependencies, which fedtune has too.
PFL = ("pfl==0.6.0", "dp-accounting==0.5.1", "prv-accountant==0.2.0", "multiprocess==0.70.19", "dill==0.4.1")
PEERS = {"pfl, same clipping and noise": 1.0, "pfl, plain SGD": 0.0}  # and the noise of each step
NODES, RECORDS, BATCH = 100, 25, 5  # a fifth of the records a step: five steps are an epoch of pfl's
ROUNDS, TURNS = 6, 3  # the first round of each process is left out
SCALE, COHORT, FEW, RATE = (1_000, 10_000, 100_000), 200, 5, 0.8  # `scale`: records of a node, sampling rate


def _child(home: Path, *words: object, path: Sequence[Path] = ()) -> dict[str, Any]:
    """Runs a module of this folder in a process of its own, its ledger and cache in `home`."""
    load = round(os.getloadavg()[0], 2)
    search = [*map(str, path), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {
        **os.environ, "FEDTUNE_HOME": str(home), "PYTHONPATH": os.pathsep.join(filter(None, search)),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-W", "ignore", "-m", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{words[0]} failed:\n{done.stderr[-2000:]}")
    measured: dict[str, Any] = json.loads(lines[-1][7:])
    return {name: _rounded(value) for name, value in measured.items()} | {"load": load}


def _rounded(value: Any) -> Any:
    return [round(one, 4) for one in value] if isinstance(value, list) else round(value, 4)


def _fedtune(folder: Path, nodes: int, records: int, rate: float, rounds: int, *words: str) -> dict[str, Any]:
    common = (folder, nodes, records, rounds, f"train.sample_rate={rate}", *words)
    return _child(folder / "home", "scripts.benchmarks.small_clients", *common)


def _pfl_site() -> Path:
    """Where pfl and what it needs beside fedtune's own packages is installed."""
    site = cache_dir() / "benchmarks" / PFL[0]
    if not (site / "pfl").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), *PFL]
        subprocess.run(pip, check=True)
    return site


def _pfl(folder: Path, cohort: int, rounds: int, batch: int, epochs: int, noise: float) -> dict[str, Any]:
    words = (folder / "features.npz", cohort, rounds, batch, epochs, noise)
    return _child(folder / "home", "scripts.benchmarks.pfl_clients", *words, path=[_pfl_site()])


def _steady(measured: dict[str, Any], name: str = "round_seconds") -> list[float]:
    return list(measured[name][1:])


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4), "min": min(values), "max": max(values),
    }  # fmt: skip


def _parts(runs: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of fedtune's rounds: what the ledger takes, training, and of that the secure noise."""
    return {
        name: _spread([one for run in runs for one in _steady(run, f"round_{name}_seconds")])
        for name in ("books", "training", "noise")
    }


def clients() -> None:
    """A round of 100 clients in each program, in turn."""
    programs: dict[str, list[dict[str, Any]]] = {"fedtune": [], "Flower on Ray": [], **{p: [] for p in PEERS}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _fedtune(folder, NODES, RECORDS, BATCH / RECORDS, 0)  # makes data and cache
        for _ in range(TURNS):
            for program, runs in programs.items():
                if program in PEERS:
                    runs.append(_pfl(folder, NODES, ROUNDS, BATCH, 1, PEERS[program]))
                else:
                    words = ("engine=ray",) if "Ray" in program else ()
                    runs.append(_fedtune(folder, NODES, RECORDS, BATCH / RECORDS, ROUNDS, *words))
    medians = {name: [statistics.median(_steady(run)) for run in runs] for name, runs in programs.items()}
    ours = programs["fedtune"]
    parts = _parts(ours)
    beside = {
        name: ratios_of(zip(theirs, medians["fedtune"], strict=True))
        for name, theirs in medians.items()
        if name != "fedtune"
    }
    without = [
        statistics.median(
            a - b for a, b in zip(_steady(run), _steady(run, "round_books_seconds"), strict=True)
        )
        for run in ours
    ]
    same = medians["pfl, same clipping and noise"]
    write(
        "clients",
        {
            "question": f"seconds of a round of {NODES} clients with {STEPS} steps of the head: others over "
            "fedtune",
            "runs": programs,
            "round_seconds": {
                name: _spread([one for run in runs for one in _steady(run)])
                for name, runs in programs.items()
            },
            "parts_seconds": parts,
            "beside": beside,
            "without_books": ratios_of(zip(same, without, strict=True)),
            "versions": [*PFL[:1], *(f"{name}=={version(name)}" for name in ("flwr", "ray"))],
            "target": "at least 10 (Flower on Ray) and 1 (pfl, same clipping and noise)",
        },
    )


def found(first: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """What the process that made data and cache took, and the one that ran the federation."""
    made = {f"first_{name}": value for name, value in first.items() if name != "load"}
    return {**made, **run, "round": _spread(_steady(run)), "parts_seconds": _parts([run])}


def of_nodes(nodes: int) -> dict[str, Any]:
    """What rounds of `COHORT` of so many nodes take; and of pfl's, where the features fit into its memory."""
    with tempfile.TemporaryDirectory() as name:
        folder, words = Path(name), (f"federation.cohort_size={COHORT}",)
        first = _fedtune(folder, nodes, FEW, RATE, 0, *words)
        of_all = found(first, _fedtune(folder, nodes, FEW, RATE, ROUNDS, *words))
        if (folder / "features.npz").exists():
            for program, noise in PEERS.items():
                peer = _pfl(folder, COHORT, ROUNDS, 0, STEPS, noise)
                of_all[program] = {**peer, "round": _spread(_steady(peer))}
    return of_all


def write_scale(sizes: dict[int, dict[str, Any]]) -> None:
    """Writes the record of what `of_nodes` found, by the number of nodes."""
    least, most = min(sizes), max(sizes)
    growth = {
        name: round(sizes[most][name] / sizes[least][name] / (most / least), 3)
        for name in ("start_processor_seconds", "first_data_processor_seconds", "peak_megabytes")
    }
    write(
        "scale",
        {
            "question": f"nodes of {FEW} records, {COHORT} of them in a round: seconds of a round, of these "
            "the books, seconds until the first, and megabytes at most",
            "nodes": {f"{nodes:,}": found for nodes, found in sizes.items()},
            "growth_over_nodes": growth,
            "target": "10,000: a round within 0.5 s, start within 10 s, below 1,000 MB; growth at most 1",
        },
    )


def scale() -> None:
    """Rounds of 200 of ever more nodes: what grows with how many there are."""
    write_scale({nodes: of_nodes(nodes) for nodes in SCALE})
