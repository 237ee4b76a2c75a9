"""The server's loop over rounds: ask, check, aggregate, step, evaluate, save; and go on after a crash.

Ours rather than Flower's strategies, which cannot resume, wait for ever for a node that is gone, and
average whatever they are sent. In short:

    1  lock the run folder, take an attempt number, load the checkpoint (or write the first)
    2  discover the nodes: names and declared sizes
    3  make the plan from public numbers (or take the checkpoint's), and propose the whole run to every node:
    who
       refuses is left out before anything is charged (`fedtune.federation.server.agreement`)
    for each round:
    4      wait until enough nodes are there; draw the cohort of those that are, from (seed, round), so that a
           resumed run draws the same (dp_ftrl: of those whose last round is long enough ago; and note durably
           that the round is begun)
    5      run the round's protocol; a node that raises, hangs, refuses or lies costs its own update 6
    too few updates: the round is void, the adapter stays, what was released stays charged 7      server
    optimizer, checkpoint, evaluation (`fedtune.federation.server.evaluation`), tell the observer 8
    evaluate the last state, unless that is known, and hand over the result

A run ends early, without error, when every node has refused because its releases are used up (as after
a crash: the round that was lost is charged, so the last one cannot be paid). Three void rounds in a row
end it with a FederationError; the checkpoint stays. Ctrl-C ends it between two messages, and the last
checkpoint is as good as any.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from flwr.serverapp import Grid

from fedtune.config.choices import resolved
from fedtune.config.schema import Config
from fedtune.errors import AggregationAborted, CheckpointError, FederationError
from fedtune.federation.events import Dropped, FederationResult, NodeInfo, Observer, SafeObserver
from fedtune.federation.messages import Proposal
from fedtune.federation.server import checkpoint as checkpoints
from fedtune.federation.server.agreement import agree, check_enough, propose
from fedtune.federation.server.cohort import discover_nodes, draw_cohort
from fedtune.federation.server.correlated import CorrelatedRounds
from fedtune.federation.server.evaluation import evaluator_for
from fedtune.federation.server.optimizers import server_optimizer
from fedtune.federation.server.roster import Roster
from fedtune.federation.server.rounds import CentralRound, PlainRound, RoundAsk, RoundOutcome, RoundProtocol
from fedtune.federation.server.state import RunState
from fedtune.federation.server.tracking_grid import TrackingGrid
from fedtune.federation.sizes import new_run_number, run_number
from fedtune.privacy.plan import PrivacyPlan
from fedtune.privacy.planning import make_plan
from fedtune.privacy.sizes import size_plan

__all__ = ["ServerSide", "Usage", "protocol_for", "run_rounds"]

_log = logging.getLogger(__name__)
MAX_VOID_ROUNDS = 3

# Seconds and FLOPs that clients have used in this process; None if the engine cannot see them.
Usage = Callable[[], tuple[float, int]]


class ServerSide(Protocol):
    """What the loop needs of model and public data; `fedtune.federation.resources.RunResources` is one."""

    def initial(self) -> np.ndarray:
        """The adapter that a run starts from, float32 [P]."""

    def evaluate(self, adapter: np.ndarray) -> Any:
        """Has `accuracy` and `loss`, rates and nats as plain numbers; on public data only."""


def protocol_for(plan: PrivacyPlan, config: Config) -> RoundProtocol:
    """How a round is done under a plan's trust model."""
    if plan.trust in ("local", "none"):
        return PlainRound()
    if plan.trust == "central":
        return CentralRound()
    from fedtune.federation.secagg.server import DistributedRound

    return DistributedRound(config, plan)


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
    expected_nodes: int | None = None,
) -> FederationResult:
    """Runs a federation to its end, or on from its checkpoint if `config.resume` is set.

    Args:
        grid: Flower's way to the nodes.
        run_dir: run folder; `checkpoint/` and `.lock` in it are this function's.
        server_side: model and public test data; None: those of the configuration.
        protocol: how a round is done; None: by the plan's trust model.
        usage: what the engine can measure of its clients.
        stop: set by another thread to end the run as Ctrl-C would.
        expected_nodes: nodes to wait for before the first round; None: `federation.nodes`, and if that is
            None too, those that are there when no more come.

    Raises:
        FederationError: no node can take part, too few agree to the run, or three rounds in a row had too few
            usable updates.
        CheckpointError: nothing to resume, another run's folder, or a folder in use.
        KeyboardInterrupt: Ctrl-C; its text says how to go on.
    """
    config, observer = resolved(config), SafeObserver(observer)
    with checkpoints.lock_folder(run_dir):
        try:
            return _run(
                TrackingGrid(grid),
                config,
                run_dir,
                observer,
                server_side,
                protocol,
                usage,
                stop,
                expected_nodes,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"Interrupted. Finished rounds are saved; go on with `fedtune run resume={run_dir}`. The "
                "round that was interrupted counts as released by the nodes that had begun it."
            ) from None


def _run(
    grid: TrackingGrid,
    config: Config,
    run_dir: Path,
    observer: Observer,
    server_side: ServerSide | None,
    protocol: RoundProtocol | None,
    usage: Usage | None,
    stop: threading.Event | None,
    expected_nodes: int | None,
) -> FederationResult:
    if server_side is None:
        from fedtune.federation.resources import run_resources

        server_side = run_resources(config)
    started = time.monotonic()
    federation = config.federation
    expected = federation.nodes if expected_nodes is None else expected_nodes
    dynamic = config.engine.name == "deployment"
    state, roster = _begin(grid, config, run_dir, server_side, observer, stop, expected, dynamic)
    protocol = protocol or protocol_for(state.plan, config)
    observer.on_start(state.info(config, run_dir))
    before = (state.seconds, state.train_seconds, state.flops)
    evaluator = evaluator_for(state.plan, config, server_side.evaluate)
    evaluation, void = evaluator.kept(state), 0
    while state.round < federation.num_rounds and state.ended_early is None:
        free = roster.wait_for(_needed(state.plan, config), state.exhausted, state.round + 1)
        state.joined(roster)
        round_started = time.monotonic()
        state.round += 1
        if state.correlated is not None:
            for name, last in roster.last_rounds.items():
                state.correlated.behind(last, f"node '{name}'")
            free = state.correlated.able(free, state.round)
        cohort = draw_cohort(free, _cohort_size(state.plan, config), config.seed, state.round)
        if state.correlated is not None:
            state.correlated.begin(state.round, cohort)
        ask = _ask(state, config, cohort, stop)
        outcome = _one_round(protocol, grid, ask, observer)
        state.account(outcome, ask.nodes)
        if all(node.name in state.exhausted for node in state.nodes):
            reason = outcome.dropped[0][1] if outcome.dropped else "none is left to ask"
            state.ended_early = (
                f"After {state.round - 1} of {federation.num_rounds} rounds every node had used up the "
                f"releases that it agreed to: {reason}"
            )
        if outcome.aggregate is None:
            void += 1
        else:
            void = 0
            state.adapter = state.optimizer.step(state.adapter, outcome.aggregate)
        state.plan = outcome.next_plan or state.plan

        summary = state.summary(outcome, federation.num_rounds)
        state.history.append(summary)
        if usage is None:
            state.train_seconds, state.flops = state.train_seconds + summary.train_seconds, None
        else:
            seconds, flops = usage()
            state.train_seconds = before[1] + seconds
            state.flops = None if before[2] is None else before[2] + flops
        # Before the evaluation: what the round released is paid for, so its result must not be lost to it.
        summary.seconds = time.monotonic() - round_started
        state.seconds = before[0] + time.monotonic() - started
        state.save(run_dir, config)
        last = state.round == federation.num_rounds or state.ended_early is not None
        evaluation = None
        if evaluator.due(state.round, last):
            there = _ask(state, config, roster.look(state.round), stop)
            evaluation = evaluator.evaluate(grid, there, state, observer)
            summary.accuracy, summary.loss = evaluation.accuracy, evaluation.loss
        summary.seconds = time.monotonic() - round_started
        state.seconds = before[0] + time.monotonic() - started
        state.save(run_dir, config)
        said = observer.on_round(summary)
        if said is not None and not last:
            state.ended_early = said
            state.save(run_dir, config)  # a resumed run must not go on with what was given up
        if void >= MAX_VOID_ROUNDS and state.ended_early is None:
            reasons = "; ".join(f"{node}: {reason}" for node, reason in outcome.dropped[:4])
            raise FederationError(
                f"{void} rounds in a row had fewer than federation.min_updates={federation.min_updates} "
                f"usable updates, the last of them round {state.round}, for these reasons: {reasons}. The "
                "adapter is as after the last good round; correct the cause and go on with "
                f"`fedtune run resume={run_dir}`."
            )
    if evaluation is None and evaluator.due(state.round, last=True):
        there = _ask(state, config, roster.look(state.round), stop)
        evaluation = evaluator.evaluate(grid, there, state, observer)
        state.save(run_dir, config)
    if state.correlated is not None:
        state.correlated.finish()
    result = state.result(evaluation)
    observer.on_finish(result)
    return result


def _begin(
    grid: TrackingGrid,
    config: Config,
    run_dir: Path,
    server_side: ServerSide,
    observer: Observer,
    stop: threading.Event | None,
    expected: int | None,
    dynamic: bool,
) -> tuple[RunState, Roster]:
    """Steps 1 to 3: a new state, checkpointed, or the checkpoint's; and who takes part."""
    there = checkpoints.has_checkpoint(run_dir)
    if config.resume is None and there:
        raise CheckpointError(
            f"{run_dir} already holds a run. Go on with it by `fedtune run resume={run_dir}`, or choose "
            "another folder by hydra.run.dir."
        )
    if config.resume is not None and not there:
        checkpoints.load_latest(run_dir)  # raises, with the way out
    attempt = checkpoints.next_attempt(run_dir)
    # Before nodes are discovered: a simulated one may tell its size then, and is charged.
    run = new_run_number(run_dir) if config.resume is None else run_number(run_dir)
    if config.resume is None and expected and size_plan(config) is not None:
        # A run that could not be planned must not have charged anybody for a size. What it comes to does not
        # matter: noise and delta do not follow from it.
        make_plan(config, [1] * expected)
    timeout = config.federation.round_timeout
    least = max(1, config.federation.min_updates) if dynamic else 0
    nodes, failed, notices = discover_nodes(
        grid, timeout, stop, expected, least=least, deadline=dynamic, observer=observer
    )
    refused: list[Dropped] = []
    ids = {node.name: node.node_id for node in nodes}
    if config.resume is None:
        plan, nodes, refused = agree(
            grid, config, nodes, run, attempt, stop=stop, deadline=dynamic, observer=observer
        )
        adapter, optimizer = server_side.initial(), server_optimizer(config)
        state = RunState(run, plan, adapter, optimizer, attempt, nodes=nodes)
        if plan.root() is not None:
            state.correlated = CorrelatedRounds.start(run_dir, state.run, plan, adapter.size)
        state.save(run_dir, config)
    else:
        state = RunState.restore(run_dir, config, attempt)
        nodes, refused = _agreed_again(grid, state, config, nodes, stop, dynamic, observer)
        nodes = state.reconnect(nodes)
    state.notices += notices
    state.dropped += [Dropped(f"node id {node_id}", 0, reason) for node_id, reason in failed] + refused
    for notice in state.notices:
        _log.warning("%s", notice)
    roster = Roster(
        grid,
        nodes,
        [node_id for node_id, _ in failed] + [ids[one.node] for one in refused],
        proposal=Proposal(state.run, attempt, state.plan),
        dynamic=dynamic,
        closed=state.plan.trust == "distributed",
        timeout=timeout,
        observer=observer,
        stop=stop,
    )
    return state, roster


def _agreed_again(
    grid: TrackingGrid,
    state: RunState,
    config: Config,
    nodes: Sequence[NodeInfo],
    stop: threading.Event | None,
    dynamic: bool,
    observer: Observer,
) -> tuple[list[NodeInfo], list[Dropped]]:
    """Of a run that goes on: who of `nodes` agrees to what is left of it, and who does not."""
    if state.round >= config.federation.num_rounds or state.ended_early is not None:
        return list(nodes), []
    answers = propose(
        grid, Proposal(state.run, state.attempt, state.plan), nodes, config.federation.round_timeout, stop,
        deadline=dynamic,
    )  # fmt: skip
    if state.correlated is not None:
        for answer in answers:
            state.correlated.behind(answer.last_round, f"node '{answer.node}'")
    refused = [Dropped(one.node, state.round, one.refused) for one in answers if one.refused is not None]
    for one in refused:
        observer.on_client(one.node, f"refused: {one.reason}")
    gone = {one.node for one in refused}
    left = [node for node in nodes if node.name not in gone]
    if refused:
        check_enough(left, refused, len(nodes), config, _needed(state.plan, config))
    return left, refused


def _ask(
    state: RunState, config: Config, nodes: Sequence[NodeInfo], stop: threading.Event | None
) -> RoundAsk:
    """What `nodes` are asked with the adapter as it is now."""
    return RoundAsk(
        run=state.run,
        round=state.round,
        attempt=state.attempt,
        plan=state.plan,
        adapter=state.adapter,
        nodes=nodes,
        timeout=config.federation.round_timeout,
        max_update_norm=config.federation.max_update_norm,
        min_updates=config.federation.min_updates,
        stop=stop,
        deadline=config.engine.name == "deployment",
        noise=None if state.correlated is None else state.correlated.noise,
    )


def _needed(plan: PrivacyPlan, config: Config) -> int:
    """Nodes without which a round is not worth beginning: what it asks is charged whatever becomes of it."""
    least = max(1, config.federation.min_updates)
    return max(least, plan.nodes - plan.max_dropouts) if plan.trust == "distributed" else least


def _cohort_size(plan: PrivacyPlan, config: Config) -> int | None:
    """Nodes that a round asks at most; None: all."""
    # A trusted server divides by the plan's cohort: more updates than that would be a larger step.
    return plan.cohort_size if plan.trust == "central" else config.federation.cohort_size


def _one_round(protocol: RoundProtocol, grid: Grid, ask: RoundAsk, observer: Observer) -> RoundOutcome:
    """The protocol's outcome; a round that it had to discard is void, and every node of it charged."""
    try:
        return protocol.run_round(grid, ask, observer)
    except AggregationAborted as error:
        return RoundOutcome(dropped=[(node.name, str(error)) for node in ask.nodes])
