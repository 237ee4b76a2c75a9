"""`flwr run .` with a SuperLink of its own: the apps that pyproject.toml names, started by Flower itself."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedtune.config.convert import to_json
from fedtune.config.schema import Config
from tests.support.ports import free_port
from tests.support.tiny_federation import private

REPOSITORY = Path(__file__).parents[2]
SCRIPTS = Path(sys.executable).parent


@contextmanager
def superlink(home: Path, environment: dict[str, str]) -> Iterator[None]:
    """A SuperLink in simulation mode; Flower's default one would stay alive after the test."""
    port, control = free_port(), free_port()
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "test"\n\n[superlink.test]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    with (home / "superlink.out").open("w") as out:
        process = subprocess.Popen(
            [
                SCRIPTS / "flower-superlink", "--insecure", "--simulation", "--isolation", "subprocess",
                "--host", "127.0.0.1", "--port", str(port), "--control-api-address", f"127.0.0.1:{control}",
            ],
            env=environment,
            stdout=out,
            stderr=out,
        )  # fmt: skip
        try:
            for _ in range(120):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.5)
            yield
        finally:
            process.terminate()
            process.wait(30)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None or shutil.which("flwr", path=str(SCRIPTS)) is None,
    reason="needs ray and the flwr command",
)
def test_flwr_run_leaves_a_finished_run(tiny: Callable[..., Config], tmp_path: Path) -> None:
    config = private(tiny(federation__num_rounds=2, federation__round_timeout=400.0))
    run_dir = tmp_path / "run"
    (tmp_path / "run.toml").write_text(
        f"fedtune = {json.dumps(to_json(config))}\noutput = {json.dumps(str(run_dir))}\n"
    )
    environment = {**os.environ, "FLWR_HOME": str(tmp_path / "flwr"), "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{SCRIPTS}{os.pathsep}{environment['PATH']}"
    with superlink(tmp_path / "flwr", environment):
        run = subprocess.run(
            [
                SCRIPTS / "flwr", "run", ".", "--run-config", tmp_path / "run.toml", "--stream",
                "--federation-config", "num-supernodes=4",
            ],
            cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=800,
        )  # fmt: skip
    # `flwr run --stream` ends with 0 even when the run failed, so only the run folder can tell.
    assert (run_dir / "record.json").is_file(), run.stdout[-3000:] + run.stderr[-1000:]
    record = json.loads((run_dir / "record.json").read_text())
    assert record["federation"]["nodes"] == 4
    assert record["federation"]["rounds"] == 2
    assert 0 < record["privacy"]["epsilon"] <= 8.0
    assert (run_dir / "adapter" / "adapter_config.json").is_file()
    assert (run_dir / "statement.md").is_file()
    history = json.loads((run_dir / "history.json").read_text())
    assert [one["updates"] for one in history["rounds"]] == [4, 4]
    assert history["notices"] == []
