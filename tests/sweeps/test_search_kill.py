"""A search that really trains is killed by `kill -9` in a run, and goes on: nothing is lost or uncharged."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna")

ROUNDS, TRIALS = 4, 3
RELEASES = ROUNDS + 1  # of a node in a run: its size comes first


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "fedtune.cli.app", *words]


def settings(world: dict[str, Path]) -> list[str]:
    return [
        "data=files", f"data.path={world['data']}", "data.name=made-up", "data.site=site",
        "data.labels=[negative,positive]", "data.test_split=test", "data.test_public=true",
        "data.max_length=16", "partition=natural", f"model.name={world['model']}", "model.quantization=none",
        "adapter=lora", "adapter.rank=2",
        "train.sample_rate=0.3", "train.local_steps=2", f"federation.num_rounds={ROUNDS}", "device=cpu",
        "sweep=optuna", "train.learning_rate=tag(log,interval(0.001,0.1))", f"sweep.trials={TRIALS}",
        "sweep.pruner=none", "hydra.sweep.dir=sweep",
    ]  # fmt: skip


# The command line, killed when the second run of a sweep has kept its first round.
KILLED = """
import os, signal, sys
from pathlib import Path
from fedtune.cli.app import main
from fedtune.federation.server import checkpoint

save = checkpoint.save

def killed(*arguments, **options):
    saved = save(*arguments, **options)
    if any(Path("sweep/1/checkpoint").glob("round-*[1-9].ckpt")):
        os.kill(os.getpid(), signal.SIGKILL)
    return saved

checkpoint.save = killed
main(sys.argv[1:])
"""


def spent() -> dict[str, Any]:
    """By node, what its ledger says."""
    done = subprocess.run(command("budget", "show", "--json"), capture_output=True, text=True, check=True)
    return {one["node"]: one for one in json.loads(done.stdout)}


@pytest.mark.slow
def test_a_search_goes_on_after_kill_9(
    world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "home"))
    folders = [Path("sweep") / str(i) for i in range(TRIALS)]
    killed = [sys.executable, "-c", KILLED, "run", *settings(world)]
    done = subprocess.run(killed, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    first = (folders[0] / "record.json").read_bytes()
    assert not (folders[1] / "record.json").exists() and not folders[2].exists()
    before = spent()
    assert len(before) == 4 and all(RELEASES < one["releases"] <= 2 * RELEASES for one in before.values())

    done = subprocess.run(command("run", "sweep.resume=sweep"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 finished before, 2 to go" in done.stdout, done.stdout
    assert f"All {TRIALS} private runs " in done.stdout, done.stdout
    assert (folders[0] / "record.json").read_bytes() == first, "what was finished is not touched"
    made = [json.loads((folder / "record.json").read_text()) for folder in folders]
    assert [one["run"]["attempt"] for one in made] == [1, 2, 1], "what was begun goes on from its checkpoint"
    assert [one["federation"]["rounds"] for one in made] == [ROUNDS] * TRIALS
    assert len({one["config"]["train"]["learning_rate"] for one in made}) == TRIALS
    after = spent()
    for node, one in after.items():
        # The release that was under way when it was killed stays charged, and is made again.
        assert TRIALS * RELEASES <= one["releases"] <= TRIALS * RELEASES + 1
        assert one["epsilon"] > before[node]["epsilon"] > made[0]["privacy"]["epsilon"]
        assert one["epsilon"] >= max(record["privacy"]["epsilon"] for record in made)
    report = subprocess.run(command("report", "sweep"), capture_output=True, text=True, check=True)
    assert f"{TRIALS} of them chosen by a search" in report.stdout
