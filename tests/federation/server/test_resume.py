"""A real process, really killed: what is on disk afterwards, and how the run goes on from it."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedtune import engines
from fedtune.config.convert import to_json
from fedtune.config.schema import Config, PrivacyConfig
from fedtune.federation import run_folder
from fedtune.federation.client.node_context import node_ledger
from fedtune.federation.server.checkpoint import load_latest
from tests.support.tiny_federation import private

REPOSITORY = Path(__file__).parents[3]
# Tells what it does on standard output, and stays where it has told its last argument, to be killed there.
CHILD = """
import sys
import time
from pathlib import Path
from tests.support.fake_federation import Watcher
from tests.support.tiny_federation import one_thread
one_thread()
from fedtune import engines
from fedtune.config.convert import config_from_json

class Teller(Watcher):
    def on_client(self, node, status):
        told = f"{len(self.rounds) + 1} {node} {status.split(':')[0]}"
        print(told, flush=True)
        if told == sys.argv[3]:
            time.sleep(600)
    def on_round(self, summary):
        super().on_round(summary)

try:
    engines.run(config_from_json(sys.argv[1]), Path(sys.argv[2]), Teller())
except KeyboardInterrupt as error:
    print("interrupted:", error, flush=True)
    sys.exit(130)
"""


def start(config: Config, run_dir: Path, stays: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, to_json(config), str(run_dir), stays],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite that was started in the background ignores Ctrl-C, and would hand that on to the child.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for(child: subprocess.Popen[str], line: str) -> None:
    """Reads what the child tells until it tells `line`."""
    assert child.stdout is not None
    for told in child.stdout:
        if told.strip() == line:
            return
    assert child.stderr is not None
    pytest.fail(f"the child ended before {line!r}: {child.stderr.read()[-2000:]}")


@pytest.mark.slow
def test_a_run_goes_on_after_kill_9_with_its_accounting_intact(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    config = private(tiny(federation__num_rounds=4))
    run_dir = tmp_path / "run"
    moment = "2 site-1 answered"  # in the middle of round 2
    child = start(config, run_dir, moment)
    wait_for(child, moment)
    child.send_signal(signal.SIGKILL)
    child.wait()

    saved, notices = load_latest(run_dir)
    assert saved.round == 1
    assert notices == []
    released = {f"site-{i}": len(node_ledger().releases(node=f"site-{i}")) for i in range(4)}
    assert released["site-0"] == released["site-1"] == 2  # round 2 is charged although its result is lost

    config.resume = str(run_dir)
    result = engines.run(config, run_dir)
    assert result.run == saved.run
    assert result.attempt == 2
    assert [summary.round for summary in result.history][:3] == [1, 2, 3]
    # Sites 0 and 1 released twice in round 2, so their four releases are used up before round 4; the
    # guarantee of the run stays what was promised.
    assert result.releases["site-0"] == 4
    assert result.releases["site-3"] == 4
    assert result.epsilon is not None
    assert result.epsilon <= 8.0
    for i in range(4):
        ledger = node_ledger()
        assert len(ledger.releases(run=result.run, node=f"site-{i}")) == 4
    assert {d.node for d in result.dropped} >= {"site-0", "site-1"}
    assert all("BudgetExhausted" in d.reason for d in result.dropped if d.node in ("site-0", "site-1"))


@pytest.mark.slow
def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(tiny: Callable[..., Config], tmp_path: Path) -> None:
    config = tiny(federation__num_rounds=30)
    run_dir = tmp_path / "run"
    child = start(config, run_dir)
    wait_for(child, "2 site-0 answered")
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert f"go on with `fedtune run resume={run_dir}`" in out
    assert "Traceback" not in err
    saved, _ = load_latest(run_dir)
    assert 1 <= saved.round < 30


class Stops:
    """Presses Ctrl-C after the second round."""

    def on_start(self, info):  # type: ignore[no-untyped-def]
        pass

    def on_client(self, node, status):  # type: ignore[no-untyped-def]
        pass

    def on_finish(self, result):  # type: ignore[no-untyped-def]
        pass

    def on_round(self, summary):  # type: ignore[no-untyped-def]
        if summary.round == 2:
            raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("trust", ["none", "local, reproducible", "local"])
def test_a_resumed_run_ends_as_an_uninterrupted_one_where_no_noise_is_secret(
    trust: str, tiny: Callable[..., Config], tmp_path: Path
) -> None:
    def settings() -> Config:
        config = tiny(federation__num_rounds=3)
        if trust != "none":
            config.privacy = PrivacyConfig(
                trust="local", epsilon=8.0, reproducible_noise=trust.endswith("reproducible")
            )
        return config

    whole = engines.run(settings(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt, match="resume="):
        engines.run(settings(), tmp_path / "cut", Stops())
    saved, _ = load_latest(tmp_path / "cut")
    assert saved.round == 2
    measured = run_folder.read_local(tmp_path / "cut")["checkpoint"]["meta"]
    result = engines.run(dataclasses.replace(settings(), resume=str(tmp_path / "cut")), tmp_path / "cut")
    assert len(result.history) == 3
    assert result.flops is not None
    assert result.flops > measured["flops"] > 0
    assert result.train_seconds > measured["train_seconds"] > 0
    assert np.linalg.norm(result.adapter - saved.adapter) > 0
    # The operating system's noise is another every time; what the seed decides is not.
    assert np.array_equal(result.adapter, whole.adapter) == (trust != "local")
