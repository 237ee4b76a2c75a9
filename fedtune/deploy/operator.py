"""What the operator asks of a running server: start a run and be its ServerApp, and what is going on.

A run of fedtune is submitted by the process that will be its ServerApp: it starts the run at the SuperLink,
takes the run's task itself (`submission`), and runs the same loop as every other engine, with the display in
front of the person. So the record, the adapter and the statement are written where the person is, and the
server runs nobody's code. If this process dies, the run is resumed from its folder (`fedtune submit DIR
resume=RUN_DIR`); if the server has given the run up, this process goes on by itself, in another run there.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.deploy.submission import RunLost, served
from fedtune.deploy.superlink import Server
from fedtune.errors import ConfigError, FederationError

if TYPE_CHECKING:
    from fedtune.config.schema import Config
    from fedtune.federation.events import FederationResult, Observer

__all__ = ["Status", "run", "status"]

_log = logging.getLogger(__name__)
_MAX_RUNS = 20  # of the server's, for one run of ours


def run(config: Config, run_dir: Path, observer: Observer | None = None) -> FederationResult:
    """Runs a federation over the sites that are connected to the server in `config.engine.server`.

    Raises what `fedtune.federation.server.loop.run_rounds` raises; ConfigError or FederationError if there
    is no server, no token, or a run that the server ends again and again.
    """
    from fedtune.config.convert import to_json
    from fedtune.config.schema import TrackerConfig
    from fedtune.federation.events import SafeObserver
    from fedtune.federation.run_folder import lock_folder
    from fedtune.federation.server.checkpoint import has_checkpoint
    from fedtune.federation.server.loop import run_rounds

    if not config.engine.server:
        raise ConfigError(
            "engine.name=deployment needs engine.server=FOLDER; `fedtune submit FOLDER` sets both."
        )
    server = Server.of(Path(config.engine.server))
    # What is the operator's own (folders, the tracker's too) is nobody else's business.
    told = dataclasses.replace(
        config,
        output=None,
        resume=None,
        engine=dataclasses.replace(config.engine, server=None),
        tracker=TrackerConfig(),
    )
    with lock_folder(run_dir):
        pass  # not in use: what its last run left at the server may be stopped
    for _ in range(_MAX_RUNS):
        try:
            with served(server, to_json(told), run_dir, SafeObserver(observer)) as (grid, lost):
                return run_rounds(grid, config, run_dir, observer, stop=lost)
        except RunLost:
            _log.warning(
                "The server %s had ended the run, as it does with one that it has not heard of for a minute; "
                "going on from the last complete round.",
                server.address,
            )
            if has_checkpoint(run_dir):
                config = dataclasses.replace(config, resume=str(run_dir))
    raise FederationError(
        f"The server {server.address} ended the run {_MAX_RUNS} times. Finished rounds are saved; when its "
        "own log has said why, go on with `fedtune submit DIR resume=RUN_DIR`."
    )


@dataclasses.dataclass(frozen=True)
class Status:
    """What a server knows: sites with their state and what they publish, and runs, newest first."""

    address: str
    sites: tuple[dict[str, Any], ...]
    runs: tuple[dict[str, str], ...]


def status(folder: Path) -> Status:
    """Asks the server that `folder` describes. Raises ConfigError, FederationError or ResourceError."""
    from flwr.proto.control_pb2 import ListNodesRequest, ListRunsRequest
    from flwr.supercore.control import ControlHttpClient

    from fedtune.federation.flower import quiet

    quiet()
    server = Server.of(folder)
    with server.asked(ControlHttpClient) as control:
        nodes = control.ListNodes(ListNodesRequest()).nodes_info
        runs = control.ListRuns(ListRunsRequest()).run_dict
    budgets = server.published()
    sites = [
        {
            "site": node.name,
            "state": node.status,
            "since": node.last_activated_at or "",
            "budget": budgets.get(node.name),
        }
        for node in nodes
        if node.status != "unregistered"
    ]
    listed = [
        {
            "run": str(one.run_id),
            "state": one.status.sub_status or one.status.status,
            "details": one.status.details,
            "started": one.pending_at,
        }
        for one in runs.values()
    ]
    return Status(
        server.address,
        tuple(sorted(sites, key=lambda one: one["site"])),
        tuple(sorted(listed, key=lambda one: one["started"], reverse=True)),
    )
