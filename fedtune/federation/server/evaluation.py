"""The server's side of evaluation: by itself on a test part, by the nodes on their own data, or not at all.

`evaluator_for` chooses by `federation.evaluation`. Where nodes answer, the server sums their noised counts
and divides them: it never learns how much anybody holds out, and what it makes of the counts costs no more
(`fedtune.privacy.mechanisms.counts.estimate`). Nodes are asked in rounds that are fixed beforehand, all of
them, also those that were not in the cohort; who refuses or fails is named and left out of the sum. An
answer is kept in the checkpoint, so that a run that is resumed at its end does not pay for it twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from flwr.serverapp import Grid

from fedtune.config.choices import resolved
from fedtune.config.schema import Config
from fedtune.errors import PrivacyError, UpdateRejected
from fedtune.federation.events import NodeInfo, Observer
from fedtune.federation.flower import serialized_size
from fedtune.federation.messages import EvaluationReply, RoundRequest
from fedtune.federation.server.rounds import RoundAsk, exchange, make_messages, reason_of, time_to_live
from fedtune.privacy.mechanisms.counts import estimate, evaluation_rounds
from fedtune.privacy.plan import PrivacyPlan

__all__ = ["EvaluationOutcome", "Evaluator", "NodeScore", "NodesEvaluation", "evaluator_for"]


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
            own = estimate(right, wrong, 1, noise_std)
            scores.append(NodeScore(node, right, wrong, own.accuracy, own.standard_error))
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
            "missing": [list(pair) for pair in self.missing],
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> NodesEvaluation:
        """Inverse of `to_json`.

        Raises:
            TypeError, KeyError: a key is missing or unknown.
        """
        nodes = tuple(NodeScore(**score) for score in values["nodes"])
        missing = tuple((str(node), str(reason)) for node, reason in values["missing"])
        return cls(**{**values, "nodes": nodes, "missing": missing})


@dataclass(frozen=True)
class EvaluationOutcome:
    """What an evaluation gave.

    Attributes:
        result: has `accuracy` and `loss`, either of which may be None.
        answers: by node that was asked, how often it says that it has answered in this run; None where it
            may have answered, and been charged, and does not say.
        bytes_up, bytes_down: serialized bytes of all messages.
    """

    result: Any
    answers: Mapping[str, int | None] = field(default_factory=dict)
    bytes_up: int = 0
    bytes_down: int = 0


class Evaluator(Protocol):
    """How a run learns how good its adapter is."""

    def due(self, round: int, last: bool) -> bool:
        """Whether to evaluate after `round`; `last`: the run ends here."""

    def evaluate(
        self, grid: Grid, ask: RoundAsk, away: Sequence[str], observer: Observer
    ) -> EvaluationOutcome:
        """Evaluates `ask.adapter`; of all nodes, those in `away` cannot be asked."""


def evaluator_for(plan: PrivacyPlan, config: Config, score: Callable[[np.ndarray], Any]) -> Evaluator:
    """As `federation.evaluation` says; `score` evaluates an adapter on the test part."""
    federation = resolved(config).federation
    if federation.evaluation == "none":
        return NoEvaluator()
    if federation.evaluation == "private":
        return NodesEvaluator(plan, plan.num_rounds)
    return ServerEvaluator(score, federation.evaluate_every or 1)


class NoEvaluator:
    """Never evaluates."""

    def due(self, round: int, last: bool) -> bool:
        """Never."""
        return False

    def evaluate(
        self, grid: Grid, ask: RoundAsk, away: Sequence[str], observer: Observer
    ) -> EvaluationOutcome:
        """Nothing."""
        return EvaluationOutcome(None)


class ServerEvaluator:
    """On the server, without noise: on public data, which costs no privacy, or in a run that has none."""

    def __init__(self, score: Callable[[np.ndarray], Any], every: int) -> None:
        self._score, self._every = score, max(1, every)

    def due(self, round: int, last: bool) -> bool:
        """Whether to evaluate after `round`: every `every` rounds, and after the last."""
        return last or round % self._every == 0

    def evaluate(
        self, grid: Grid, ask: RoundAsk, away: Sequence[str], observer: Observer
    ) -> EvaluationOutcome:
        """See `Evaluator`."""
        return EvaluationOutcome(self._score(ask.adapter))


class NodesEvaluator:
    """By the nodes, on what they hold out."""

    def __init__(self, plan: PrivacyPlan, num_rounds: int) -> None:
        answers = plan.evaluation()
        if answers is None:
            raise PrivacyError(
                "federation.evaluation is private, and the run's plan has no answers about held-out data: it "
                "was made with other settings. Start a new run."
            )
        self._plan = answers
        self._rounds = evaluation_rounds(num_rounds, answers.num_rounds)

    def due(self, round: int, last: bool) -> bool:
        """In the planned rounds; and at the end, should that come early."""
        return last or round in self._rounds

    def evaluate(
        self, grid: Grid, ask: RoundAsk, away: Sequence[str], observer: Observer
    ) -> EvaluationOutcome:
        """Asks every node of `ask` once. Never raises because of one of them."""
        counts: dict[str, tuple[float, float]] = {}
        answers: dict[str, int | None] = {}
        missing = [(name, "was not connected, or still at work") for name in away]

        def drop(node: NodeInfo, reason: str) -> None:
            missing.append((node.name, reason))
            observer.on_client(node.name, f"refused: {reason}")

        request = RoundRequest(ask.run, ask.round, ask.attempt, ask.plan, ask.adapter)
        ttl = time_to_live(ask.timeout)
        messages = make_messages(request.to_records(), "query.evaluate", ask.nodes, ask.round, ttl=ttl)
        bytes_down, bytes_up = sum(serialized_size(message) for message in messages), 0
        waiting = {node.node_id: node for node in ask.nodes}
        for node_id, answer in exchange(grid, messages, ask.timeout, ask.stop, deadline=ask.deadline):
            node = waiting.pop(node_id)
            bytes_up += serialized_size(answer)
            try:
                if answer.has_error():
                    raise UpdateRejected(reason_of(answer))
                reply = EvaluationReply.from_records(
                    answer.content, node=node.name, run=ask.run, round=ask.round, attempt=ask.attempt
                )
            except UpdateRejected as error:
                answers[node.name] = None
                drop(node, str(error))
                continue
            answers[node.name] = reply.answers
            if reply.counts is None:
                drop(node, reply.refused or reply.error or "")
                continue
            right, wrong = (count / self._plan.scale for count in reply.counts)
            counts[node.name] = (right, wrong)
        for node in waiting.values():
            answers[node.name] = None
            drop(node, f"did not answer in {ask.timeout:g} s (federation.round_timeout)")
        result = NodesEvaluation.of(ask.round, counts, missing, self._plan.noise_std)
        return EvaluationOutcome(result, answers, bytes_up, bytes_down)
