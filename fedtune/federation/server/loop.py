"""The server's loop over rounds: ask, check, aggregate, step, evaluate, save; and go on after a crash.

Ours rather than Flower's strategies, which cannot resume, wait for ever for a node that is gone, and
average whatever they are sent. In short:

    1  lock the run folder, take an attempt number, load the checkpoint (or write the first)
    2  discover the nodes: names and declared sizes
    3  make the plan from public numbers (or take the checkpoint's), and propose the whole run to every node:
       who refuses is left out before anything is charged (`fedtune.federation.server.agreement`)
    for each round:
    4      wait until enough nodes are free; draw the cohort from (seed, round), so that a resumed run draws
           the same (dp_ftrl: of those whose last round is long enough ago; and note durably that the round
           is begun)
    5      run the round's protocol; a node that raises, hangs, refuses or lies costs its own update
    6      charge the cohort; server optimizer; with too few updates the round is void, the adapter stays, and
           what was released stays charged
    7      checkpoint
    8      evaluation (`fedtune.federation.server.evaluation`), checkpoint, tell the observer
    9  evaluate the last state, unless that is known, and hand over the result

A run ends early, without error, when every node has refused because its releases are used up (as after a
crash: the round that was lost is charged, so the last one cannot be paid). Three void rounds in a row end it
with a FederationError; in a simulation, whose nodes neither come nor go, one does where no round before it
gave anything. So does a run that is through and has moved nothing: it has learned nothing, and is no
success. The checkpoint stays. Ctrl-C ends it between two messages, and the last checkpoint is as good as
any.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from flwr.serverapp import Grid

from fedtune.config.choices import resolved
from fedtune.config.schema import Config
from fedtune.errors import AggregationAborted, CheckpointError
from fedtune.federation.events import (
    Dropped,
    FederationResult,
    NodeInfo,
    Observer,
    RoundSummary,
    SafeObserver,
)
from fedtune.federation.messages import Proposal
from fedtune.federation.run_folder import lock_folder, new_run_number, run_number
from fedtune.federation.server.agreement import agree, check_enough, check_possible, propose
from fedtune.federation.server.centring import next_adapter
from fedtune.federation.server.checkpoint import RunState, has_checkpoint, load_latest, next_attempt
from fedtune.federation.server.cohort import Roster, discover_nodes, draw_cohort
from fedtune.federation.server.correlated import CorrelatedRounds
from fedtune.federation.server.evaluation import Evaluator, evaluator_for
from fedtune.federation.server.learning import check_learned, most_void, too_many_void_rounds
from fedtune.federation.server.optimizers import damping, server_optimizer
from fedtune.federation.server.rounds import CentralRound, PlainRound, RoundAsk, RoundOutcome, RoundProtocol
from fedtune.federation.server.tracking_grid import TrackingGrid
from fedtune.privacy.mechanisms.counts import size_plan
from fedtune.privacy.plan import PrivacyPlan, make_plan

__all__ = ["ServerSide", "Usage", "protocol_for", "run_rounds"]

_log = logging.getLogger(__name__)

# Seconds and FLOPs that clients have used in this process; None if the engine cannot see them.
Usage = Callable[[], tuple[float, int]]


class ServerSide(Protocol):
    """What the loop needs of model and public data; `fedtune.federation.resources.RunResources` is one."""

    def digest(self) -> str:
        """Of the encoder and its tokenizer, which every node compares with its own."""

    def initial(self) -> np.ndarray:
        """The adapter that a run starts from, float32 [P]."""

    def public_facts(self) -> dict[str, Any]:
        """Which public texts that adapter was trained on, fit for JSON; asked where `public.path` names
        some."""

    def head(self) -> np.ndarray:
        """Which of the adapter's numbers are the classifier's, bool [P]; only asked where the plan tells them
        from the others."""

    def centre_size(self) -> int:
        """How many of the adapter's numbers, its last ones, are the centre; asked where a round sets one."""

    def classes(self) -> int:
        """How many classes there are; asked where the rate may be damped."""

    def evaluate(self, adapter: np.ndarray) -> Any:
        """Has `accuracy` and `loss`, rates and nats as plain numbers; on public data only."""


def protocol_for(plan: PrivacyPlan, config: Config) -> RoundProtocol:
    """How a round is done, by how the plan's mechanism has its sum formed."""
    if plan.mechanism.round == "plain":
        return PlainRound()
    if plan.mechanism.round == "clipped":
        return CentralRound()
    from fedtune.federation.secagg.server import DistributedRound

    return DistributedRound(config, plan)


@dataclass(frozen=True)
class _Setting:
    """What stays the same from the first round to the last.

    `dynamic`: nodes come and go, each on a machine of its own (a real federation).
    """

    grid: TrackingGrid
    config: Config
    run_dir: Path
    observer: Observer
    stop: threading.Event | None
    server_side: ServerSide

    @property
    def dynamic(self) -> bool:
        return self.config.engine.name == "deployment"

    def head(self, plan: PrivacyPlan) -> np.ndarray | None:
        """The head's part of the adapter, bool [P], where `plan` tells it from the rest."""
        return self.server_side.head() if plan.head_norm or plan.head_rounds else None

    def damping(self, plan: PrivacyPlan, sizes: Mapping[str, int], adapter: np.ndarray) -> float:
        """Share of the rate that a step takes by gradients of the nodes of declared `sizes`."""
        train = self.config.train
        return damping(train, plan, sizes, adapter.size, self.server_side.classes()) if train.damped else 1.0


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
    config = resolved(config)
    if server_side is None:
        from fedtune.federation.resources import run_resources

        server_side = run_resources(config)
    setting = _Setting(TrackingGrid(grid), config, run_dir, SafeObserver(observer), stop, server_side)
    with lock_folder(run_dir), _says_how_to_resume(run_dir):
        # 1 to 3. Attempt number, nodes, plan: from the beginning, or from the checkpoint.
        state, roster = _begin(setting, server_side, expected_nodes or config.federation.nodes)
        protocol = protocol or protocol_for(state.plan, config)
        evaluator = evaluator_for(state.plan, config, server_side.evaluate)
        return _rounds(setting, state, roster, protocol, evaluator, _Clock(state, usage))


def _rounds(
    setting: _Setting,
    state: RunState,
    roster: Roster,
    protocol: RoundProtocol,
    evaluator: Evaluator,
    clock: _Clock,
) -> FederationResult:
    """Steps 4 to 9, from the state's round on."""
    config, observer, num_rounds = setting.config, setting.observer, state.plan.num_rounds
    observer.on_start(state.info(config, setting.run_dir))
    evaluation: Any = state.known_evaluation()
    void_rounds = 0
    while state.round < num_rounds and state.ended_early is None:
        # 4. Wait until enough nodes are free, and draw the cohort.
        free = roster.wait_for(_needed(state.plan, config), state.exhausted, state.round + 1)
        state.join(roster)
        clock.start_round()
        cohort = _next_cohort(state, free, roster, config)

        # 5. Ask it. A node that raises, hangs, refuses or lies costs its own update.
        outcome = _one_round(protocol, setting.grid, _ask(setting, state, cohort), observer)

        # 6. Charge it, and take a step; with too few updates the round is void and the adapter stays.
        state.account(outcome, cohort, num_rounds)
        if outcome.aggregate is not None:
            state.adapter = _step(setting, state, outcome.aggregate, outcome.used)
        if state.round == state.plan.head_rounds and config.federation.strategy == "fedsgd":
            # What the head's rounds end with is their average; from here on all of the adapter is trained.
            state.adapter = state.optimizer.result(state.adapter)
            state.optimizer = server_optimizer(config, state.round)
        void_rounds = 0 if outcome.aggregate is not None else void_rounds + 1
        state.plan = outcome.next_plan or state.plan
        summary = state.summary(outcome, num_rounds)
        state.history.append(summary)

        # 7. Save: what the round released is paid for, so its result must not be lost to the evaluation.
        clock.count_training(state, summary)
        clock.stamp(state, summary)
        state.save(setting.run_dir, config)

        # 8. Evaluate, save, and tell the observer, who may end the run.
        last = state.round == num_rounds or state.ended_early is not None
        too_many = void_rounds >= most_void(state, setting.dynamic) and state.ended_early is None
        if last and not too_many:
            check_learned(state, config)  # before a charge for telling how good nothing is
        evaluation = None
        if not too_many and evaluator.due(state.round, last):
            evaluation = _evaluate(setting, evaluator, state, roster)
            summary.accuracy, summary.loss = evaluation.accuracy, evaluation.loss
        clock.stamp(state, summary)
        if evaluation is not None:  # else all of it is saved
            state.save(setting.run_dir, config)
        stop_reason = observer.on_round(summary)
        if stop_reason is not None and not last:
            state.ended_early = stop_reason
            state.save(setting.run_dir, config)  # a resumed run must not go on with what was given up
        if too_many:
            raise too_many_void_rounds(void_rounds, outcome, config, setting.run_dir, state.round)

    # 9. Evaluate the last state, unless that is known, and hand over the result.
    check_learned(state, config)
    if evaluation is None and evaluator.due(state.round, last=True):
        evaluation = _evaluate(setting, evaluator, state, roster)
        state.save(setting.run_dir, config)
    if state.correlated is not None:
        state.correlated.finish()
    result = state.result(evaluation)
    observer.on_finish(result)
    return result


def _begin(setting: _Setting, server_side: ServerSide, expected: int | None) -> tuple[RunState, Roster]:
    """Steps 1 to 3: a new state, checkpointed, or the checkpoint's; and who takes part."""
    config, run_dir, dynamic = setting.config, setting.run_dir, setting.dynamic
    started_before = has_checkpoint(run_dir)
    if config.resume is None and started_before:
        raise CheckpointError(
            f"{run_dir} already holds a run. Go on with it by `fedtune run resume={run_dir}`, or choose "
            "another folder by hydra.run.dir."
        )
    if config.resume is not None and not started_before:
        load_latest(run_dir)  # raises, with the way out
    attempt = next_attempt(run_dir)
    # Before nodes are discovered: a simulated one may tell its size then, and is charged.
    run = new_run_number(run_dir) if config.resume is None else run_number(run_dir)
    if config.resume is None and expected and size_plan(config) is not None:
        # A run that could not be planned must not have charged anybody for a size. What it comes to does not
        # matter: noise and delta do not follow from it.
        make_plan(config, [1] * expected)
        check_possible(config, expected)
    timeout = config.federation.round_timeout
    least = max(1, config.federation.min_updates) if dynamic else 0
    nodes, failed, notices = discover_nodes(
        setting.grid, timeout, setting.stop, expected,
        least=least, deadline=dynamic, observer=setting.observer,
    )  # fmt: skip
    unknown = list(failed.values())
    refused: list[Dropped] = []
    ids = {node.name: node.node_id for node in nodes}
    if config.resume is None:
        # Of a plan for fewer nodes than a round needs every round would be void, and charged.
        check_enough(nodes, unknown, len(nodes) + len(unknown), config)
        check_possible(config, len(nodes))
        plan, nodes, refused = agree(
            setting.grid, config, nodes, run, attempt, server_side.digest(),
            stop=setting.stop, deadline=dynamic, observer=setting.observer,
        )  # fmt: skip
        adapter, optimizer = server_side.initial(), server_optimizer(config)
        state = RunState(run, plan, adapter, optimizer, attempt, server_side.digest(), adapter, nodes=nodes)
        if config.public.path is not None:
            state.public_start = _public_start(config, server_side, adapter)
            state.save_start(run_dir)
        if plan.root() is not None:
            state.correlated = CorrelatedRounds.start(run_dir, state.run, plan, adapter.size)
        state.save(run_dir, config)
    else:
        state = RunState.restore(run_dir, config, attempt, server_side.initial)
        if state.encoder != server_side.digest():
            raise CheckpointError(
                f"The run in {run_dir} began with another encoder than {config.model.name!r} is now: the "
                f"digest was {state.encoder[:12]} and is {server_side.digest()[:12]}. Put the model back "
                "that it began with, or start a new run."
            )
        nodes, refused = _agreed_again(setting, state, nodes)
        nodes = state.reconnect(nodes)
    state.notices += notices
    state.dropped += unknown + refused
    sizes = {node.name: node.declared_size for node in state.nodes}
    if (share := setting.damping(state.plan, sizes, state.adapter)) < 1.0:
        knows = "the classes' names" if config.public.path is None else "public texts"
        state.notices.append(
            f"Noise is so heavy for so many classes that a step takes {share:g} of the rate: the result is "
            f"close to the start by {knows}. With train.damped=false it takes all of it."
        )
    for notice in state.notices:
        _log.warning("%s", notice)
    # Whoever is late may still answer, and join; whoever refuses or fails is asked again when it comes back.
    out = set(failed) | {ids[lost.node] for lost in refused}
    roster = Roster(
        setting.grid,
        nodes,
        out - setting.grid.busy(),
        proposal=Proposal(state.run, attempt, state.plan, state.encoder),
        dynamic=dynamic,
        closed=state.plan.mechanism.fixed_nodes,
        timeout=timeout,
        observer=setting.observer,
        stop=setting.stop,
    )
    return state, roster


def _public_start(config: Config, server_side: ServerSide, start: np.ndarray) -> dict[str, Any]:
    """What a record says of a start on public texts; with its accuracy, where there is a public test."""
    public_test = config.federation.evaluation == "public"
    accuracy = server_side.evaluate(start).accuracy if public_test else None
    return {**server_side.public_facts(), "accuracy": accuracy}


def _agreed_again(
    setting: _Setting, state: RunState, nodes: Sequence[NodeInfo]
) -> tuple[list[NodeInfo], list[Dropped]]:
    """Of a run that goes on: who of `nodes` agrees to what is left of it, and who does not."""
    federation = setting.config.federation
    if state.round >= state.plan.num_rounds or state.ended_early is not None:
        return list(nodes), []
    proposal = Proposal(state.run, state.attempt, state.plan, state.encoder)
    answers = propose(
        setting.grid, proposal, nodes, federation.round_timeout, setting.stop, deadline=setting.dynamic
    )
    if state.correlated is not None:
        for answer in answers:
            state.correlated.check_newest(answer.last_round, f"node '{answer.node}'")
    refused = [
        Dropped(answer.node, state.round, answer.refused) for answer in answers if answer.refused is not None
    ]
    for lost in refused:
        setting.observer.on_client(lost.node, f"refused: {lost.reason}")
    gone = {lost.node for lost in refused}
    left = [node for node in nodes if node.name not in gone]
    if refused:
        check_enough(left, refused, len(nodes), setting.config, _needed(state.plan, setting.config))
    return left, refused


def _next_cohort(state: RunState, free: Sequence[NodeInfo], roster: Roster, config: Config) -> list[NodeInfo]:
    """Begins the next round (with dp_ftrl durably, before the first message): who of `free` it asks."""
    state.round += 1
    if state.correlated is not None:
        for name, last in roster.last_rounds.items():
            state.correlated.check_newest(last, f"node '{name}'")
        free = state.correlated.separated(free, state.round)
    cohort = draw_cohort(free, _cohort_size(state.plan, config), config.seed, state.round)
    if state.correlated is not None:
        state.correlated.begin(state.round, cohort)
    return cohort


def _step(setting: _Setting, state: RunState, aggregate: np.ndarray, used: Sequence[str]) -> np.ndarray:
    """The next adapter. While the head alone is trained the rest stays, whatever noise or nodes put there."""
    plan, head = state.plan, setting.head(state.plan)
    if head is not None and plan.head_alone(state.round):
        stepped = state.optimizer.step(state.adapter, np.where(head, aggregate, 0.0))
        return np.where(head, stepped, state.adapter)
    declared = {node.name: node.declared_size for node in state.nodes}
    sizes = {name: declared[name] for name in used}
    state.optimizer.damping = setting.damping(plan, sizes, state.adapter)
    centre = setting.server_side.centre_size() if plan.centre_rounds else 0
    return next_adapter(state.optimizer, state.adapter, aggregate, plan, state.round, sizes, centre)


def _evaluate(setting: _Setting, evaluator: Evaluator, state: RunState, roster: Roster) -> Any:
    """Evaluates what the run would end with now; the nodes' answers are charged."""
    free = roster.refresh(state.round)
    away = [node.name for node in state.nodes if node not in free]
    ask = replace(_ask(setting, state, free), adapter=state.optimizer.result(state.adapter))
    outcome = evaluator.evaluate(setting.grid, ask, away, setting.observer)
    state.record_evaluation(outcome)
    return outcome.result


def _ask(setting: _Setting, state: RunState, nodes: Sequence[NodeInfo]) -> RoundAsk:
    """What `nodes` are asked with the adapter as it is now."""
    federation = setting.config.federation
    return RoundAsk(
        run=state.run,
        round=state.round,
        attempt=state.attempt,
        plan=state.plan,
        adapter=state.adapter,
        nodes=nodes,
        timeout=federation.round_timeout,
        max_update_norm=federation.max_update_norm,
        min_updates=federation.min_updates,
        stop=setting.stop,
        deadline=setting.dynamic,
        noise=None if state.correlated is None else state.correlated.noise,
        head=setting.head(state.plan),
        gradients=setting.config.federation.strategy == "fedsgd",
    )


def _needed(plan: PrivacyPlan, config: Config) -> int:
    """Nodes without which a round is not worth beginning: what it asks is charged whatever becomes of it."""
    return max(1, config.federation.min_updates, plan.mechanism.least_nodes(plan))


def _cohort_size(plan: PrivacyPlan, config: Config) -> int | None:
    """Nodes that a round asks at most; None: all."""
    return plan.mechanism.cohort(config.federation.cohort_size)


def _one_round(protocol: RoundProtocol, grid: Grid, ask: RoundAsk, observer: Observer) -> RoundOutcome:
    """The protocol's outcome; a round that it had to discard is void, and every node of it charged."""
    try:
        return protocol.run_round(grid, ask, observer)
    except AggregationAborted as error:
        return RoundOutcome(dropped=[(node.name, str(error)) for node in ask.nodes])


@contextmanager
def _says_how_to_resume(run_dir: Path) -> Iterator[None]:
    """Gives a KeyboardInterrupt a text that says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"Interrupted. Finished rounds are saved; go on with `fedtune run resume={run_dir}`. The "
            "round that was interrupted counts as released by the nodes that it had charged."
        ) from None


class _Clock:
    """Wall time and training time of a run, on top of what the checkpoint has of it."""

    def __init__(self, state: RunState, usage: Usage | None) -> None:
        self._usage = usage
        self._before = (state.seconds, state.train_seconds, state.flops)
        self._started = self._round_started = time.monotonic()

    def start_round(self) -> None:
        """From here on time is the next round's."""
        self._round_started = time.monotonic()

    def stamp(self, state: RunState, summary: RoundSummary) -> None:
        """Writes the time that has passed into the round's summary and the state."""
        now = time.monotonic()
        summary.seconds = now - self._round_started
        state.seconds = self._before[0] + now - self._started

    def count_training(self, state: RunState, summary: RoundSummary) -> None:
        """Adds the round's training: as the engine measured it, else as the nodes report it."""
        if self._usage is None:
            state.train_seconds, state.flops = state.train_seconds + summary.train_seconds, None
            return
        seconds, flops = self._usage()
        _, seconds_before, flops_before = self._before
        state.train_seconds = seconds_before + seconds
        state.flops = None if flops_before is None else flops_before + flops
