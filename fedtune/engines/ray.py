"""Flower's own simulation on Ray: the same apps, in worker processes, over a machine or a cluster.

`flwr.simulation.run_simulation` is deprecated in favour of the command `flwr run`, which starts a
SuperLink; it stays the only way to run a simulation from Python, so its warning is silenced and the
call kept in this file. `flwr run .` works as well (`fedtune.federation.server.app`).

Ray may run on several machines (`RAY_ADDRESS` names a cluster). A node's ledger lies on the machine that
started the run, so a worker on another refuses private data (`fedtune.engines.machine`).

Differences from engine `local`: workers load the model each (about 300 MB a worker, and 10 to 15 s to
start), so it pays from about a hundred nodes or several machines on. The seconds of training are what
the nodes report, coarsely, and FLOPs are unknown. A client that hangs is given up inside its worker, which
then goes on with a new thread and a new model. A worker that dies is replaced
(`fedtune.engines.ray_workers`).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import logging
import os
import platform
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedtune.engines.local import ClientThread
from fedtune.engines.machine import refusal_elsewhere, stays_here
from fedtune.engines.ray_workers import WorkerPool
from fedtune.errors import ConfigError, FederationError, FedtuneError, ResourceError
from fedtune.federation.client.release import ASKED_AGAIN
from fedtune.federation.flower import error_answer, quiet, simulation_workers

if TYPE_CHECKING:
    from fedtune.config.schema import Config
    from fedtune.federation.events import FederationResult, Observer

__all__ = ["ConfiguredClientApp", "run"]

# What worker processes need to be told, beyond what they inherit: where ledgers are, and not to phone home.
_PASSED_ON = ("FEDTUNE_HOME", "HF_HUB_OFFLINE", "HF_HOME", "OMP_NUM_THREADS")
_START_SECONDS = 300.0  # a worker imports torch, on a machine that has other work
_thread: ClientThread | None = None  # this process's, if it is one of Ray's


class ConfiguredClientApp(ClientApp):
    """fedtune's ClientApp with a run config; a simulation started from Python cannot give one otherwise.

    Args:
        run_config: of the run.
        environment: what a worker is told beyond what it inherits.
        timeout: seconds for a message.
        machine: the one where the ledgers lie; None: any may answer.
        again: whether a worker died that was asked the same.
    """

    def __init__(
        self,
        run_config: dict[str, Any],
        environment: dict[str, str],
        timeout: float,
        machine: str | None = None,
        again: bool = False,
    ) -> None:
        super().__init__()
        self._run_config = run_config
        self._environment = environment
        self._timeout = timeout
        self._machine = machine
        self._again = again

    def once_more(self) -> ConfiguredClientApp:
        """The same, for a message that a worker died of."""
        return ConfiguredClientApp(
            self._run_config, self._environment, self._timeout, self._machine, again=True
        )

    def __call__(self, message: Message, context: Context) -> Message:
        """Hands message and Context to `fedtune.federation.client.app.app`, which a worker imports itself."""
        if self._machine is not None and (elsewhere := refusal_elsewhere(self._machine)) is not None:
            return error_answer(message, f"{elsewhere} Nothing was charged.")
        os.environ.update(self._environment)
        from fedtune.federation.client.app import app
        from fedtune.federation.resources import forget

        # A Context of our own around the same state: Flower refuses one whose run_config has changed.
        own = Context(
            run_id=context.run_id,
            node_id=context.node_id,
            node_config=context.node_config,
            state=copy.deepcopy(context.state),
            run_config=self._run_config | ({ASKED_AGAIN: True} if self._again else {}),
        )
        global _thread
        _thread = _thread or ClientThread()
        try:
            answer: Message = _thread.run(lambda: app(message, own), self._timeout)
        except TimeoutError:
            # Given up here and not by the server alone: Ray would wait for this worker for ever.
            _thread.abandon()
            _thread = None
            forget()
            reason = f"did not answer in {self._timeout:g} s (federation.round_timeout)"
            return error_answer(message, reason)
        context.state = own.state
        return answer


def run(config: Config, run_dir: Path, observer: Observer | None = None) -> FederationResult:
    """Runs a federation on Ray.

    Raises:
        ResourceError: Ray is missing or cannot start.
        FedtuneError: as `fedtune.federation.server.loop.run_rounds` does.
    """
    if importlib.util.find_spec("ray") is None:
        raise ResourceError(
            "engine=ray needs the package ray, which is not installed. Install it with `pip install "
            "'fedtune[ray]'`, or use engine=local, which runs the same federation in this process."
        )
    from fedtune.models.encoder import select_device

    if (device := select_device(config.device)).type != "cpu":
        raise ConfigError(
            f"engine=ray trains on processors only, and device={config.device} is {device.type} here. Say "
            "device=cpu, or use engine=local, which trains on the accelerator in this process."
        )
    from flwr.simulation import run_simulation

    from fedtune.config.convert import to_json
    from fedtune.federation.resources import run_resources
    from fedtune.federation.server.loop import run_rounds

    num_nodes = len(run_resources(config).prepared.shards)
    outcome: list[FederationResult | BaseException] = []
    stop, ended = threading.Event(), threading.Event()

    def main(grid: Grid, context: Context) -> None:
        # Flower ends with an error of its own for whatever a ServerApp raises; ours is kept for the caller.
        try:
            outcome.append(run_rounds(grid, config, run_dir, observer, stop=stop, expected_nodes=num_nodes))
        except BaseException as error:
            outcome.append(error)
        finally:
            ended.set()

    server_app = ServerApp()
    server_app.main()(main)
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    client_app = ConfiguredClientApp(
        {"fedtune": to_json(dataclasses.replace(config, output=str(run_dir)))},
        environment,
        config.federation.round_timeout,
        platform.node() if stays_here(config) else None,
    )
    cores = os.cpu_count() or 1
    backend: dict[str, Any] = {
        "client_resources": {"num_cpus": min(config.engine.cpus_per_node, float(cores)), "num_gpus": 0.0},
        "init_args": {"logging_level": logging.ERROR, "log_to_driver": False},
    }
    quiet(logging.CRITICAL)  # it would print the traceback of whatever a worker raises
    pool = functools.partial(
        WorkerPool,
        again=ConfiguredClientApp.once_more,
        patience=config.federation.round_timeout + _START_SECONDS,
    )
    failure: Exception | None = None
    try:
        with warnings.catch_warnings(), simulation_workers(pool):
            warnings.simplefilter("ignore")
            run_simulation(server_app, client_app, num_nodes, backend_config=backend)
    except KeyboardInterrupt:
        stop.set()
        ended.wait(30.0)
    except Exception as error:
        stop.set()
        failure = error
    result = outcome[0] if outcome else failure
    if result is None:
        raise KeyboardInterrupt(
            f"Interrupted. Go on with `fedtune run resume={run_dir}`, if it holds a checkpoint."
        )
    if isinstance(result, FedtuneError | KeyboardInterrupt):
        raise result
    if isinstance(result, BaseException):
        raise FederationError(
            f"Ray or Flower's simulation failed: {type(result).__name__}: "
            f"{' '.join(str(result).split())[:300]}. Try engine=local, or fewer processor cores a node by "
            "engine.cpus_per_node.",
            public=False,  # what a library says may quote a text
        ) from result
    return result
