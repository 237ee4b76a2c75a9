"""Nodes that do what a test tells them, and a server side without a model.

`fake_app` is a ClientApp whose nodes answer with a known update, or misbehave; everything between it
and the server loop (messages, LocalGrid, protocol, checkpoints) is the real thing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedtune.config.schema import Config, FederationConfig, PrivacyConfig, TrainConfig
from fedtune.engines import local
from fedtune.engines.local import LocalGrid
from fedtune.federation.events import FederationResult, RoundSummary
from fedtune.federation.flower import task_identity
from fedtune.federation.messages import Consent, NodeHello, Proposal, RoundReply, RoundRequest
from fedtune.federation.server.loop import run_rounds

SIZE = 6
HUNG = threading.Event()  # by a node, which the grid need not wait for; see `impatient`

# What node i does in a round: gives the reply, or raises, or sleeps, or returns records of its own.
Behaviour = Callable[[int, RoundRequest, RoundReply], RoundReply | RecordDict]


def honest_update(node: int, round: int) -> np.ndarray:
    """What node `node` sends in `round`: known, different for each, exact in float32."""
    return (np.arange(SIZE) + 1 + 10 * node + round / 4).astype(np.float32) / 64


def honest(node: int, request: RoundRequest, reply: RoundReply) -> RoundReply:
    """Answers as it should."""
    return reply


def fake_app(behave: Behaviour = honest) -> ClientApp:
    """A ClientApp without data: node i is called `node-i`, and `behave` has the last word."""
    app = ClientApp()

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        i = int(context.node_config["partition-id"])  # type: ignore[arg-type]
        answer = NodeHello(f"node-{i}", 100 * (i + 1), int(context.node_config["num-partitions"]), "fake")  # type: ignore[arg-type]
        return Message(answer.to_records(), reply_to=message)

    @app.query("propose")
    def propose(message: Message, context: Context) -> Message:
        i = int(context.node_config["partition-id"])  # type: ignore[arg-type]
        proposal = Proposal.from_records(message.content)
        answer = Consent(f"node-{i}", proposal.run, proposal.attempt)
        return Message(answer.to_records(), reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        i = int(context.node_config["partition-id"])  # type: ignore[arg-type]
        request = RoundRequest.from_records(message.content)
        reply = RoundReply(
            node=f"node-{i}",
            run=request.run,
            round=request.round,
            attempt=request.attempt,
            releases=request.round,
            steps=request.plan.local_steps,
            seconds=0.5,
            update=honest_update(i, request.round),
        )
        answer = behave(i, request, reply)
        return Message(answer if isinstance(answer, RecordDict) else answer.to_records(), reply_to=message)

    return app


def misbehaving(bad_node: int, how: str) -> Behaviour:
    """All nodes are honest but one, which does `how`."""

    def behave(node: int, request: RoundRequest, reply: RoundReply) -> RoundReply | RecordDict:
        if node != bad_node:
            return reply
        update = np.array(reply.update)
        if how == "raise":
            raise RuntimeError("patient Jane Doe has a rare disease")
        if how == "hang":
            HUNG.set()
            time.sleep(3.0)
        if how == "nan":
            update[2] = np.nan
        if how == "infinity":
            update[0] = np.inf
        if how == "huge":
            update *= 1e9
        if how == "short":
            update = update[:-1]
        if how == "empty":
            update = update[:0]
        if how == "refuse":
            return replace(reply, update=None, refused="BudgetExhausted: no more", refusal="BudgetExhausted")
        if how == "other round":
            return replace(reply, round=request.round + 1)
        if how == "other node":
            return replace(reply, node="node-0")
        if how == "nothing":
            return replace(reply, update=None)
        records = replace(reply, update=update).to_records()
        if how == "float64":
            records["update"] = ArrayRecord({"update": Array(update.astype(np.float64))})
        if how == "scalar":
            records["update"] = ArrayRecord({"update": Array(np.array(1.5, dtype=np.float32))})
        if how == "matrix":
            records["update"] = ArrayRecord({"update": Array(update.reshape(2, 3))})
        if how == "extra key":
            records["reply"]["num-examples"] = 17
        if how == "missing key":
            del records["reply"]["round"]
        if how == "extra record":
            records["metrics"] = type(records["reply"])({"loss": 0.1})
        if how == "wrong type":
            records["reply"]["releases"] = 1.0
        if how == "other version":
            records["reply"]["version"] = 99
        if how == "lying header":
            array = records["update"]["update"]
            records["update"] = ArrayRecord({"update": Array("float32", (SIZE,), array.stype, b"no numpy")})
        return records

    return behave


def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every client has as long as it takes, but one that sets `HUNG` is given up at once.

    So no deadline is missed on a busy machine, and none is waited for.
    """

    class Answered(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            while not super().wait(0.002):
                if HUNG.is_set():
                    HUNG.clear()
                    break
            return self.is_set()

    monkeypatch.setattr(local, "threading", SimpleNamespace(Event=Answered, Thread=threading.Thread))


@dataclass
class Scores:
    """What the loop reads of an Evaluation."""

    accuracy: float
    loss: float


@dataclass
class FakeServerSide:
    """Starts at zero; the accuracy is the mean of the adapter, so that a test can see what was evaluated."""

    size: int = SIZE
    evaluated: list[np.ndarray] = field(default_factory=list)

    def digest(self) -> str:
        return "fake"

    def initial(self) -> np.ndarray:
        return np.zeros(self.size, dtype=np.float32)

    def evaluate(self, adapter: np.ndarray) -> Scores:
        self.evaluated.append(adapter.copy())
        return Scores(float(adapter.mean()), 1.0)


@dataclass
class Watcher:
    """An Observer that keeps what it is told."""

    started: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[RoundSummary] = field(default_factory=list)
    clients: list[tuple[str, str]] = field(default_factory=list)
    finished: list[FederationResult] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)

    def on_start(self, info: dict[str, Any]) -> None:
        self.started.append(info)

    def on_round(self, summary: RoundSummary) -> None:
        self.rounds.append(summary)

    def on_client(self, node: str, status: str) -> None:
        self.clients.append((node, status))

    def on_wait(self, reason: str) -> None:
        self.waits.append(reason)

    def on_finish(self, result: FederationResult) -> None:
        self.finished.append(result)


def fake_config(**federation: Any) -> Config:
    """A configuration without privacy and without data, for the fakes."""
    # The evaluator's calls are what tests look at the adapters through: one after each round.
    options = {
        "num_rounds": 3,
        "round_timeout": 30.0,
        "strategy": "fedavg",
        "evaluate_every": 1,
        **federation,
    }
    return Config(
        privacy=PrivacyConfig(trust="none", epsilon=None),
        train=TrainConfig(sample_rate=0.5, local_steps=1),
        federation=FederationConfig(**options),
    )


def run_fake(
    run_dir: Path,
    behave: Behaviour = honest,
    *,
    nodes: int = 3,
    config: Config | None = None,
    observer: Any = None,
    server_side: FakeServerSide | None = None,
    **options: Any,
) -> FederationResult:
    """Runs the real server loop and the real LocalGrid over fake nodes."""
    config = config or fake_config()
    grid = LocalGrid(fake_app(behave), nodes, {}, timeout=config.federation.round_timeout)
    try:
        with task_identity(grid.run_id):
            return run_rounds(
                grid,
                config,
                run_dir,
                observer,
                server_side=server_side or FakeServerSide(),
                expected_nodes=nodes,
                **options,
            )
    finally:
        grid.close(wait=0.0)
