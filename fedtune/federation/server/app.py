"""Flower's ServerApp, for `flwr run .` and for a SuperLink: the same loop that the engines run.

The run config has one key, `fedtune`: the resolved configuration as JSON (empty: the defaults of conf/),
for Flower's run config is flat and refuses keys that were not declared. `output` names the run folder;
without it that is `runs/<time>-<run id>` below fedtune's state folder, for the working directory of a
ServerApp is Flower's own and is removed with the app.

The run folder gets `checkpoint/`, `adapter/` (PEFT's format), `config.yaml` and `history.json`. The
record and the statement are made by `fedtune.runs`, a layer below this one, which this one does
not know: the run config's key `finish` names a function as `module:function` (pyproject.toml does), and
that is called as `finish(config, run_dir, result, meter)`. Empty, the run ends with the files above.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedtune.config.schema import Config
from fedtune.errors import ConfigError
from fedtune.federation.events import FederationResult, RoundSummary
from fedtune.privacy.publication import publish

if TYPE_CHECKING:
    from fedtune.cost.meter import Meter

__all__ = ["app", "finish"]

app = ServerApp()


class _PrintingObserver:
    """An Observer that writes lines: there is no terminal where a ServerApp runs."""

    def __init__(self) -> None:
        self._last_printed = -math.inf

    def on_start(self, info: dict[str, Any]) -> None:
        """The run, its nodes and its folder."""
        print(
            f"fedtune: run {info['run']} with {len(info['nodes'])} nodes in {info['run_dir']}",
            flush=True,
        )

    def on_round(self, summary: RoundSummary) -> None:
        """One line a round."""
        accuracy = "-" if summary.accuracy is None else f"{summary.accuracy:.3f}"
        if summary.accuracy_error is not None:
            accuracy += f" (standard error {summary.accuracy_error:.3f})"
        epsilon = "none" if summary.epsilon is None else f"{summary.epsilon:.3f}"
        print(
            f"fedtune: round {summary.round}/{summary.num_rounds}: {summary.updates} updates, accuracy "
            f"{accuracy}, epsilon {epsilon}",
            flush=True,
        )

    def on_client(self, node: str, status: str) -> None:
        """Only what went wrong."""
        if status not in ("asked", "answered"):
            print(f"fedtune: {node} {status}", flush=True)

    def on_wait(self, reason: str) -> None:
        """Why it waits, at most once a minute."""
        if reason and time.monotonic() - self._last_printed >= 60.0:
            print(f"fedtune: {reason}", flush=True)
            self._last_printed = time.monotonic()

    def on_finish(self, result: FederationResult) -> None:
        """Why it ended early, if it did."""
        if result.ended_early:
            print(f"fedtune: {result.ended_early}", flush=True)
        for notice in result.notices:
            print(f"fedtune: {notice}", flush=True)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the federation that the run config describes, and finishes its folder."""
    from fedtune.config.loader import save_config
    from fedtune.cost.meter import Meter
    from fedtune.federation.resources import config_of
    from fedtune.federation.server.loop import run_rounds

    config = config_of(str(context.run_config.get("fedtune", "")))
    run_dir = _run_dir(config, context)
    config = dataclasses.replace(config, output=str(run_dir))  # `config_of` hands the same one to everybody
    run_dir.mkdir(parents=True, exist_ok=True)
    if config.resume is None:
        save_config(config, run_dir)
    with Meter(children=True) as meter:
        result = run_rounds(grid, config, run_dir, _PrintingObserver())
        finish(config, run_dir, result, meter, str(context.run_config.get("finish", "")))
    print(f"fedtune: the run is in {run_dir}", flush=True)


def _run_dir(config: Config, context: Context) -> Path:
    chosen = config.resume or str(context.run_config.get("output", "")) or config.output
    if chosen:
        return Path(chosen).expanduser().absolute()
    from fedtune.config.files import state_dir

    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H-%M-%S")
    return state_dir() / "runs" / f"{now}-{context.run_id}"


def finish(config: Config, run_dir: Path, result: FederationResult, meter: Meter, finisher: str) -> None:
    """Writes adapter and history, and calls the function that `finisher` names (`module:function`), if any.

    Raises:
        ConfigError: there is no such function. Adapter and history are written by then, as they are when the
            function itself raises.
    """
    from fedtune.federation.resources import run_resources

    run_resources(config).save(result.adapter, run_dir / "adapter")
    history: dict[str, Any] = {
        "run": result.run,
        "epsilon": result.epsilon,
        "delta": result.plan.delta if result.plan.is_private() else None,
        "releases": result.releases,
        "ended_early": result.ended_early,
        "notices": result.notices,
        "rounds": [summary.to_json() for summary in result.history],
    }
    history, _ = publish("history", history, public_data=config.data.public)
    (run_dir / "history.json").write_text(json.dumps(history, indent=2) + "\n")
    if not finisher:
        return
    module, _, function = finisher.partition(":")
    try:
        call = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"The run config names finish={finisher!r}, and there is no such function ({error}). Leave the "
            f"key out, or write module:function. Adapter and history of the run are in {run_dir}."
        ) from error
    call(config, run_dir, result, meter)
