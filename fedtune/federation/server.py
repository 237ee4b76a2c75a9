"""The server's loop over rounds: ask, check, aggregate, step, evaluate, save; and go on after a crash.

Ours rather than Flower's strategies, which cannot resume, wait for ever for a node that is gone, and
average whatever they are sent. In short:

    1  lock the run folder, take an attempt number, load the checkpoint (or write the first)
    2  greet the nodes: names and declared sizes
    3  make the plan from public numbers (or take the checkpoint's), and the server optimizer
    for each round:
    4      draw the cohort from (seed, round), so that a resumed run draws the same
    5      run the round's protocol; a node that raises, hangs, refuses or lies costs its own update
    6      too few updates: the round is void, the adapter stays, what was released stays charged
    7      server optimizer, evaluation on the public test split, checkpoint, tell the observer
    8  evaluate the last state, hand over the result

A run ends early, without error, when every node has refused because its releases are used up (as after
a crash: the round that was lost is charged, so the last one cannot be paid). Three void rounds in a row
end it with a FederationError; the checkpoint stays. Ctrl-C ends it between two messages, and the last
checkpoint is as good as any.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedtune.config.schema import Config
from fedtune.errors import AggregationAborted, CheckpointError, FederationError
from fedtune.federation import checkpoint as checkpoints
from fedtune.federation.checkpoint import Checkpoint
from fedtune.federation.descent import server_optimizer
from fedtune.federation.events import (
    Dropped,
    FederationResult,
    NodeInfo,
    Observer,
    RoundSummary,
    SafeObserver,
)
from fedtune.federation.messages import NodeHello
from fedtune.federation.rounds import (
    CentralRound,
    PlainRound,
    RoundAsk,
    RoundOutcome,
    RoundProtocol,
    exchange,
    make_messages,
    reason_of,
)
from fedtune.federation.strategies import Strategy
from fedtune.privacy.plan import PrivacyPlan, make_plan

__all__ = ["ServerSide", "Usage", "draw_cohort", "protocol_for", "run_rounds"]

_log = logging.getLogger(__name__)
MAX_VOID_ROUNDS = 3
_COHORT_STREAM = 0xC0407  # keeps the cohort's draws apart from every other use of `seed`
# Settings that a resumed run may change: they decide where and how long, not what is computed or promised.
_MAY_CHANGE = ("resume", "output", "device", "engine", "pricing")

# Seconds and FLOPs that clients have used in this process; None if the engine cannot see them.
Usage = Callable[[], tuple[float, int]]


class ServerSide(Protocol):
    """What the loop needs of model and public data; `fedtune.federation.resident.Workplace` is one."""

    def initial(self) -> np.ndarray:
        """The adapter that a run starts from, float32 [P]."""

    def evaluate(self, adapter: np.ndarray) -> Any:
        """Has `accuracy` and `loss`; on public data only."""


@dataclass
class _Run:
    """Everything that changes from round to round, and nothing else."""

    run: str
    plan: PrivacyPlan
    adapter: np.ndarray
    strategy: Strategy
    attempt: int
    round: int = 0
    history: list[RoundSummary] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    releases: dict[str, int] = field(default_factory=dict)
    exhausted: list[str] = field(default_factory=list)
    seconds: float = 0.0
    train_seconds: float = 0.0
    flops: int | None = 0
    notices: list[str] = field(default_factory=list)
    ended_early: str | None = None

    def save(self, run_dir: Path, config: Config) -> None:
        """Checkpoints the state after `round`."""
        meta = {
            "config": asdict(config),
            "plan": self.plan.to_json(),
            "strategy": self.strategy.name,
            "attempt": self.attempt,
            "history": [summary.to_json() for summary in self.history],
            "dropped": [asdict(one) for one in self.dropped],
            "releases": self.releases,
            "exhausted": self.exhausted,
            "seconds": self.seconds,
            "train_seconds": self.train_seconds,
            "flops": self.flops,
            "notices": self.notices,
            "ended_early": self.ended_early,
        }
        checkpoints.save(
            run_dir, Checkpoint(self.run, self.round, self.adapter, self.strategy.state_dict(), meta)
        )

    @classmethod
    def restore(cls, run_dir: Path, config: Config, attempt: int) -> _Run:
        """The state to go on from. Raises CheckpointError if it is another run's or unreadable."""
        saved, notices = checkpoints.load_latest(run_dir)
        meta = saved.meta
        try:
            _same_config(meta["config"], config)
            strategy = server_optimizer(config)
            strategy.load_state_dict(saved.optimizer)
            return cls(
                run=saved.run,
                plan=PrivacyPlan.from_json(meta["plan"]),
                adapter=saved.adapter.astype(np.float32),
                strategy=strategy,
                attempt=attempt,
                round=saved.round,
                history=[RoundSummary.from_json(one) for one in meta["history"]],
                dropped=[Dropped(**one) for one in meta["dropped"]],
                releases=dict(meta["releases"]),
                exhausted=list(meta["exhausted"]),
                seconds=meta["seconds"],
                train_seconds=meta["train_seconds"],
                flops=meta["flops"],
                notices=[*meta["notices"], *notices],
                ended_early=meta["ended_early"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"The checkpoint in {run_dir} was written by another version of fedtune "
                f"({type(error).__name__}: {error}). Resume with that version, or start a new run."
            ) from error


def _same_config(saved: dict[str, Any], config: Config) -> None:
    """Raises CheckpointError, naming the settings, if a resumed run would not be the same run."""
    now = json.loads(json.dumps(asdict(config)))

    def differences(a: Any, b: Any, prefix: str) -> list[str]:
        if isinstance(a, dict) and isinstance(b, dict):
            return [
                d
                for key in sorted({*a, *b})
                for d in differences(a.get(key), b.get(key), f"{prefix}.{key}".strip("."))
            ]
        return [] if a == b else [f"{prefix} ({a!r}, now {b!r})"]

    changed = [d for d in differences(saved, now, "") if d.split(".")[0].split(" ")[0] not in _MAY_CHANGE]
    changed = [d for d in changed if not d.startswith("federation.round_timeout ")]
    if changed:
        raise CheckpointError(
            f"The run to resume was started with other settings: {', '.join(changed[:6])}. Its noise was "
            "calibrated to the old ones. Leave them out of the command, or start a new run."
        )


def draw_cohort(nodes: Sequence[NodeInfo], size: int | None, seed: int, round: int) -> list[NodeInfo]:
    """The nodes asked in a round: `size` of them without replacement (all if None), in the order of names.

    Depends on names, seed and round only: the same in every engine, and in a resumed run.
    """
    ordered = sorted(nodes, key=lambda node: node.name)
    if size is None or size >= len(ordered):
        return ordered
    generator = np.random.default_rng([_COHORT_STREAM, seed, round])
    return [ordered[i] for i in sorted(generator.choice(len(ordered), size=size, replace=False))]


def protocol_for(plan: PrivacyPlan, config: Config) -> RoundProtocol:
    """How a round is done under a plan's trust model."""
    if plan.trust in ("local", "none"):
        return PlainRound()
    if plan.trust == "central":
        return CentralRound()
    from fedtune.federation.distributed import DistributedRound

    return DistributedRound(config)


def greet(
    grid: Grid, config: Config, stop: threading.Event | None
) -> tuple[list[NodeInfo], list[Dropped], list[str]]:
    """Asks every connected node who it is: (nodes by name, nodes that failed, notices).

    Raises FederationError if no node can take part, or two have one name.
    """
    ids = list(grid.get_node_ids())
    unknown = [NodeInfo(name=f"node id {node_id}", node_id=node_id, declared_size=0) for node_id in ids]
    nodes: list[NodeInfo] = []
    failed: list[Dropped] = []
    idle = shards = 0
    waiting = set(ids)
    for answer in exchange(
        grid, make_messages(RecordDict(), "query.hello", unknown, 0), config.federation.round_timeout, stop
    ):
        node_id = answer.metadata.src_node_id
        waiting.discard(node_id)
        try:
            if answer.has_error():
                raise FederationError(reason_of(answer))
            hello = NodeHello.from_records(answer.content)
        except FederationError as error:
            failed.append(Dropped(f"node id {node_id}", 0, str(error)))
            continue
        shards = max(shards, hello.shards)
        if hello.idle:
            idle += 1
        else:
            nodes.append(NodeInfo(hello.node, node_id, hello.declared_size))
    late = f"did not answer in {config.federation.round_timeout:g} s (federation.round_timeout)"
    failed += [Dropped(f"node id {node_id}", 0, late) for node_id in sorted(waiting)]
    if not nodes:
        reasons = " ".join(dict.fromkeys(one.reason for one in failed)) or "No node is connected."
        raise FederationError(f"None of {len(ids)} nodes can take part in this run. {reasons}")
    nodes.sort(key=lambda node: node.name)
    names = [node.name for node in nodes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise FederationError(
            f"Two nodes say that they are {', '.join(twice)}. Shards are disjoint, so each node needs a "
            "partition-id of its own; the guarantee does not hold for one person's data on two nodes."
        )
    notices = []
    if idle:
        notices.append(
            f"{idle} of {len(ids)} connected nodes have no shard in this federation and stay idle."
        )
    if len(nodes) < shards:
        notices.append(
            f"The federation has {shards} shards, and only {len(nodes)} of them have a node that takes part; "
            "the data of the others is not trained on. With `flwr run`, start as many nodes as there are "
            f"shards: --federation-config 'num-supernodes={shards}'."
        )
    return nodes, failed, notices


def run_rounds(
    grid: Grid,
    config: Config,
    run_dir: Path,
    observer: Observer | None = None,
    *,
    server_side: ServerSide | None = None,
    protocol: RoundProtocol | None = None,
    usage: Usage | None = None,
    stop: threading.Event | None = None,
) -> FederationResult:
    """Runs a federation to its end, or on from its checkpoint if `config.resume` is set.

    Args:
        grid: Flower's way to the nodes.
        run_dir: run folder; `checkpoint/` and `.lock` in it are this function's.
        server_side: model and public test data; None: those of the configuration.
        protocol: how a round is done; None: by the plan's trust model.
        usage: what the engine can measure of its clients.
        stop: set by another thread to end the run as Ctrl-C would.

    Raises:
        FederationError: no node can take part, or three rounds in a row had too few usable updates.
        CheckpointError: nothing to resume, another run's folder, or a folder in use.
        KeyboardInterrupt: Ctrl-C; its text says how to go on.
    """
    told = SafeObserver(observer)
    with checkpoints.lock_folder(run_dir):
        try:
            return _run(grid, config, run_dir, told, server_side, protocol, usage, stop)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"Interrupted. Finished rounds are saved; go on with `fedtune run resume={run_dir}`. The "
                "round that was interrupted counts as released by the nodes that had begun it."
            ) from None


def _run(
    grid: Grid,
    config: Config,
    run_dir: Path,
    observer: Observer,
    server_side: ServerSide | None,
    protocol: RoundProtocol | None,
    usage: Usage | None,
    stop: threading.Event | None,
) -> FederationResult:
    if server_side is None:
        from fedtune.federation.resident import workplace

        server_side = workplace(config)
    started = time.monotonic()
    if config.resume is None and checkpoints.has_checkpoint(run_dir):
        raise CheckpointError(
            f"{run_dir} already holds a run. Go on with it by `fedtune run resume={run_dir}`, or choose "
            "another folder by hydra.run.dir."
        )
    if config.resume is not None and not checkpoints.has_checkpoint(run_dir):
        checkpoints.load_latest(run_dir)  # raises, with the way out
    attempt = checkpoints.next_attempt(run_dir)
    nodes, failed, notices = greet(grid, config, stop)
    if config.resume is None:
        plan = make_plan(config, [node.declared_size for node in nodes])
        state = _Run(secrets.token_hex(8), plan, server_side.initial(), server_optimizer(config), attempt)
        state.save(run_dir, config)
    else:
        state = _Run.restore(run_dir, config, attempt)
    state.notices += notices
    state.dropped += failed
    for notice in state.notices:
        _log.warning("%s", notice)
    protocol = protocol or protocol_for(state.plan, config)
    observer.on_start(
        {
            "run": state.run,
            "run_dir": str(run_dir),
            "nodes": [node.name for node in nodes],
            "num_rounds": config.federation.num_rounds,
            "first_round": state.round + 1,
            "trust": state.plan.trust,
            "epsilon": state.plan.target_epsilon,
            "delta": state.plan.delta if state.plan.is_private() else None,
            "attempt": attempt,
        }
    )

    before = (state.seconds, state.train_seconds, state.flops)
    evaluation, void = None, 0
    while state.round < config.federation.num_rounds and state.ended_early is None:
        evaluation = None
        round_started = time.monotonic()
        state.round += 1
        able = [node for node in nodes if node.name not in state.exhausted]
        cohort = draw_cohort(able, config.federation.cohort_size, config.seed, state.round)
        ask = RoundAsk(
            run=state.run,
            round=state.round,
            attempt=attempt,
            plan=state.plan,
            adapter=state.adapter,
            nodes=cohort,
            timeout=config.federation.round_timeout,
            max_update_norm=config.federation.max_update_norm,
            min_updates=config.federation.min_updates,
            stop=stop,
        )
        outcome = _one_round(protocol, grid, ask, observer)
        _account(state, outcome, cohort)
        if len(state.exhausted) == len(nodes):
            state.ended_early = (
                f"After {state.round - 1} of {config.federation.num_rounds} rounds every node had used up "
                f"the releases that it agreed to: {outcome.dropped[0][1]}"
            )
        if outcome.aggregate is None:
            void += 1
        else:
            void = 0
            state.adapter = state.strategy.step(state.adapter, outcome.aggregate)
        state.plan = outcome.next_plan or state.plan
        last = state.round == config.federation.num_rounds or state.ended_early is not None
        if last or state.round % max(1, config.federation.evaluate_every) == 0:
            evaluation = server_side.evaluate(state.adapter)
        summary = RoundSummary(
            round=state.round,
            num_rounds=config.federation.num_rounds,
            seconds=time.monotonic() - round_started,
            accuracy=None if evaluation is None else float(evaluation.accuracy),
            loss=None if evaluation is None else float(evaluation.loss),
            epsilon=_epsilon(state),
            bytes_up=outcome.bytes_up,
            bytes_down=outcome.bytes_down,
            dropped=list(outcome.dropped),
            updates=len(outcome.used),
            train_seconds=sum(reply.cost.get("seconds", 0.0) for reply in outcome.replies),
            void=outcome.aggregate is None,
        )
        state.history.append(summary)
        state.seconds = before[0] + time.monotonic() - started
        if usage is None:
            state.train_seconds, state.flops = state.train_seconds + summary.train_seconds, None
        else:
            seconds, flops = usage()
            state.train_seconds = before[1] + seconds
            state.flops = None if before[2] is None else before[2] + flops
        state.save(run_dir, config)
        observer.on_round(summary)
        if void >= MAX_VOID_ROUNDS and state.ended_early is None:
            reasons = "; ".join(f"{node}: {reason}" for node, reason in outcome.dropped[:4])
            raise FederationError(
                f"{void} rounds in a row had fewer than "
                f"federation.min_updates={config.federation.min_updates} usable updates, the last of them "
                f"round {state.round}, for these reasons: {reasons}. The adapter is as after the last good "
                f"round; correct the cause and go on with `fedtune run resume={run_dir}`."
            )
    if evaluation is None:
        evaluation = server_side.evaluate(state.adapter)
    result = _result(state, nodes, evaluation)
    observer.on_finish(result)
    return result


def _one_round(protocol: RoundProtocol, grid: Grid, ask: RoundAsk, observer: Observer) -> RoundOutcome:
    """The protocol's outcome; a round that it had to discard is void, and every node of it charged."""
    try:
        return protocol.run_round(grid, ask, observer)
    except AggregationAborted as error:
        return RoundOutcome(dropped=[(node.name, str(error)) for node in ask.nodes])


def _account(state: _Run, outcome: RoundOutcome, cohort: Sequence[NodeInfo]) -> None:
    """Charges each node of the cohort: by what it says, and where it says nothing, as if it had released."""
    answered = {reply.node: reply for reply in outcome.replies}
    for node in cohort:
        reply = answered.get(node.name)
        known = state.releases.get(node.name, 0)
        if reply is None:
            state.releases[node.name] = known + 1
            continue
        # A count that goes down would be a lie or a lost ledger; the larger one is the safe one.
        state.releases[node.name] = max(known, reply.releases)
        if reply.refusal == "BudgetExhausted" and node.name not in state.exhausted:
            state.exhausted.append(node.name)
    state.dropped += [Dropped(node, state.round, reason) for node, reason in outcome.dropped]


def _epsilon(state: _Run) -> float | None:
    """Epsilon of this run so far: that of the node with most releases, never an average (PITFALLS 29)."""
    most = max(state.releases.values(), default=0)
    if not state.plan.is_private():
        return None
    if most == 0:
        return 0.0
    return float(state.plan.epsilon(most))


def _result(state: _Run, nodes: Sequence[NodeInfo], evaluation: Any) -> FederationResult:
    return FederationResult(
        run=state.run,
        nodes=list(nodes),
        plan=state.plan,
        adapter=state.adapter.copy(),
        history=state.history,
        dropped=state.dropped,
        releases={node.name: state.releases.get(node.name, 0) for node in nodes},
        epsilon=_epsilon(state),
        evaluation=evaluation,
        seconds=state.seconds,
        train_seconds=state.train_seconds,
        flops=state.flops,
        bytes_up=sum(one.bytes_up for one in state.history),
        bytes_down=sum(one.bytes_down for one in state.history),
        attempt=state.attempt,
        ended_early=state.ended_early,
        notices=state.notices,
    )
