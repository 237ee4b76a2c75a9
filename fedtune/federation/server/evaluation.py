"""The server's side of evaluation: by itself on a test part, by the nodes on their own data, or not at all.

`evaluator_for` chooses by `federation.evaluation`. Where nodes answer, the server sums their noised counts
and divides them: it never learns how much anybody holds out, and what it makes of the counts costs no more
(`fedtune.privacy.evaluation.estimate`). Nodes are asked in rounds that are fixed beforehand, all of them,
also those that were not in the cohort; who refuses or fails is named and left out of the sum. An answer is
kept in the checkpoint, so that a run that is resumed at its end does not pay for it twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from flwr.serverapp import Grid

from fedtune.config.choices import resolved
from fedtune.config.schema import Config
from fedtune.errors import PrivacyError, UpdateRejected
from fedtune.federation.events import NodeInfo, Observer, RoundSummary
from fedtune.federation.flower import serialized_size
from fedtune.federation.messages import EvaluationReply, RoundRequest
from fedtune.federation.server.rounds import RoundAsk, exchange, make_messages, reason_of, time_to_live
from fedtune.privacy.evaluation import estimate, evaluation_rounds
from fedtune.privacy.plan import PrivacyPlan

if TYPE_CHECKING:
    from fedtune.federation.server.state import RunState

__all__ = ["Evaluator", "NodeScore", "NodesEvaluation", "evaluator_for"]


@dataclass(frozen=True)
class NodeScore:
    """One node's answer in units, noised; `accuracy` None where the noise hides it."""

    node: str
    right: float
    wrong: float
    accuracy: float | None
    standard_error: float | None


@dataclass(frozen=True)
class NodesEvaluation:
    """What the nodes' noised counts say of an adapter.

    Attributes:
        round: after which the nodes were asked.
        accuracy: over all nodes that answered; None where the noise hides it, or nobody answered.
        standard_error: of `accuracy`, from the noise and the finite number of units.
        units: noised number of units evaluated.
        nodes: one score a node that answered.
        missing: (node, reason) of those that did not.
    """

    round: int
    accuracy: float | None
    standard_error: float | None
    units: float
    nodes: tuple[NodeScore, ...]
    missing: tuple[tuple[str, str], ...]
    loss: None = None  # a loss has no bound, so it cannot be noised: it stays where it is

    @classmethod
    def of(
        cls,
        round: int,
        counts: dict[str, tuple[float, float]],
        missing: Sequence[tuple[str, str]],
        noise_std: float,
    ) -> NodesEvaluation:
        """From each node's (right, wrong) in units, with noise `noise_std` in each."""
        scores = []
        # By name: the order of arrival depends on how long each node computed, and would show in the last
        # digits of the sums.
        counts = dict(sorted(counts.items()))
        for node, (right, wrong) in counts.items():
            one = estimate(right, wrong, 1, noise_std)
            scores.append(NodeScore(node, right, wrong, one.accuracy, one.standard_error))
        right, wrong = (sum(cells) for cells in zip((0.0, 0.0), *counts.values(), strict=True))
        whole = estimate(right, wrong, max(len(counts), 1), noise_std)
        return cls(
            round, whole.accuracy, whole.standard_error, whole.units, tuple(scores), tuple(sorted(missing))
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` is its inverse."""
        return {
            "round": self.round,
            "accuracy": self.accuracy,
            "standard_error": self.standard_error,
            "units": self.units,
            "nodes": [vars(score) for score in self.nodes],
            "missing": [list(one) for one in self.missing],
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> NodesEvaluation:
        """Raises TypeError or KeyError if a key is missing or unknown."""
        nodes = tuple(NodeScore(**one) for one in values["nodes"])
        missing = tuple((str(node), str(reason)) for node, reason in values["missing"])
        return cls(**{**values, "nodes": nodes, "missing": missing})


class Evaluator(Protocol):
    """How a run learns how good its adapter is."""

    def due(self, round: int, last: bool) -> bool:
        """Whether to evaluate after `round`."""

    def evaluate(self, grid: Grid, ask: RoundAsk, state: RunState, observer: Observer) -> Any:
        """Has `accuracy` and `loss`. Notes in `state` what nodes spent, and in its last summary
        what travelled."""

    def kept(self, state: RunState) -> Any:
        """What is known of the last state without asking again; None if nothing is."""


def evaluator_for(plan: PrivacyPlan, config: Config, score: Callable[[np.ndarray], Any]) -> Evaluator:
    """As `federation.evaluation` says; `score` evaluates an adapter on the test part."""
    federation = resolved(config).federation
    if federation.evaluation == "none":
        return NoEvaluator()
    if federation.evaluation == "private":
        return NodesEvaluator(plan, federation.num_rounds)
    return OpenEvaluator(score, federation.evaluate_every)


class NoEvaluator:
    """Knows nothing."""

    def due(self, round: int, last: bool) -> bool:
        """Never."""
        return False

    def evaluate(self, grid: Grid, ask: RoundAsk, state: RunState, observer: Observer) -> None:
        """Nothing."""

    def kept(self, state: RunState) -> None:
        """Nothing."""


class OpenEvaluator:
    """On the server, without noise: on public data, which costs no privacy, or in a run that has none."""

    def __init__(self, score: Callable[[np.ndarray], Any], every: int) -> None:
        self._score, self._every = score, max(1, every)

    def due(self, round: int, last: bool) -> bool:
        """Every so many rounds, and after the last."""
        return last or round % self._every == 0

    def evaluate(self, grid: Grid, ask: RoundAsk, state: RunState, observer: Observer) -> Any:
        """See `Evaluator`."""
        return self._score(state.adapter)

    def kept(self, state: RunState) -> None:
        """Nothing: it is computed again."""


class NodesEvaluator:
    """By the nodes, on what they hold out."""

    def __init__(self, plan: PrivacyPlan, num_rounds: int) -> None:
        about = plan.evaluation()
        if about is None:
            raise PrivacyError(
                "federation.evaluation is private, and the run's plan has no answers about held-out data: it "
                "was made with other settings. Start a new run."
            )
        self._about = about
        self._rounds = evaluation_rounds(num_rounds, about.num_rounds)

    def due(self, round: int, last: bool) -> bool:
        """In the planned rounds; and at the end, should that come early."""
        return last or round in self._rounds

    def kept(self, state: RunState) -> NodesEvaluation | None:
        """The checkpoint's, if it is of the last round."""
        known = state.evaluation
        return known if known is not None and known.round == state.round else None

    def evaluate(self, grid: Grid, ask: RoundAsk, state: RunState, observer: Observer) -> NodesEvaluation:
        """Asks every node of `ask` once. Never raises because of one of them."""
        counts: dict[str, tuple[float, float]] = {}
        missing: list[tuple[str, str]] = []
        summary = state.history[-1] if state.history else None

        def lost(node: NodeInfo, reason: str) -> None:
            missing.append((node.name, reason))
            observer.on_client(node.name, f"refused: {reason}")

        request = RoundRequest(ask.run, ask.round, ask.attempt, ask.plan, state.adapter)
        ttl = time_to_live(ask.timeout)
        messages = make_messages(request.to_records(), "query.evaluate", ask.nodes, ask.round, ttl=ttl)
        _traffic(summary, 0, sum(serialized_size(message) for message in messages))
        waiting = {node.node_id: node for node in ask.nodes}
        away = [node for node in state.nodes if node not in ask.nodes]
        missing += [(node.name, "was not connected, or still at work") for node in away]
        for node_id, answer in exchange(grid, messages, ask.timeout, ask.stop, deadline=ask.deadline):
            node = waiting.pop(node_id)
            _traffic(summary, serialized_size(answer), 0)
            known = state.answers.get(node.name, 0)
            try:
                if answer.has_error():
                    raise UpdateRejected(reason_of(answer))
                reply = EvaluationReply.from_records(
                    answer.content, node=node.name, run=ask.run, round=ask.round, attempt=ask.attempt
                )
            except UpdateRejected as error:
                state.answers[node.name] = known + 1  # it may have been charged
                lost(node, str(error))
                continue
            state.answers[node.name] = max(known, reply.answers)
            if reply.counts is None:
                lost(node, reply.refused or reply.error or "")
                continue
            right, wrong = (cell / self._about.scale for cell in reply.counts)
            counts[node.name] = (right, wrong)
        for node in waiting.values():
            state.answers[node.name] = state.answers.get(node.name, 0) + 1
            lost(node, f"did not answer in {ask.timeout:g} s (federation.round_timeout)")
        # By name, for a checkpoint must not say who answered first.
        state.answers = dict(sorted(state.answers.items()))
        found = NodesEvaluation.of(ask.round, counts, missing, self._about.noise_std)
        state.evaluation = found
        if summary is not None:
            summary.epsilon = state.epsilon()
            summary.accuracy, summary.accuracy_error = found.accuracy, found.standard_error
        return found


def _traffic(summary: RoundSummary | None, up: int, down: int) -> None:
    if summary is not None:
        summary.bytes_up, summary.bytes_down = summary.bytes_up + up, summary.bytes_down + down
